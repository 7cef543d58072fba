//! Partition tables: the master boot record, and the GUID partition table (UEFI specification, chapter 5).

use super::SECTOR;
use crate::tar::is_header;
use crate::{Error, Reason, Refused};

/// What is read before the first partition: 1 MiB, where every tool of this century begins; the entries of a GPT are in
/// the first 17 KiB.
pub const FRONT: usize = 34 * SECTOR;
/// Type of the one entry that a disk with a GPT has in its boot record.
const PROTECTIVE: u8 = 0xee;
/// Types of partitions that hold further tables.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// A partition of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

/// Whether this is the first sector of a disk: its signature, entries that a boot record can have, and no header of a
/// tarball, which could look like one by chance.
pub(super) fn is_boot_record(start: &[u8]) -> bool {
    let Some(sector) = start.get(..SECTOR) else { return false };
    let entries: Vec<&[u8]> = entries(sector).collect();
    sector.ends_with(&[0x55, 0xaa])
        && entries.iter().all(|entry| matches!(entry.first(), Some(0 | 0x80)))
        && entries.iter().any(|entry| entry.get(4).is_some_and(|kind| *kind != 0))
        && !is_header(sector)
}

/// The partitions, in the order in which they lie on the disk.
pub(super) fn read_table(front: &[u8]) -> Result<Vec<Partition>, Error> {
    let damaged = |what: &str| Error::from(Refused::archive(Reason::Damaged(what.to_owned())));
    if !is_boot_record(front) {
        return Err(damaged("it begins with no partition table"));
    }
    let gpt = entries(front).any(|entry| entry.get(4) == Some(&PROTECTIVE));
    let mut found =
        if gpt { guid(front).ok_or_else(|| damaged("its GPT makes no sense"))? } else { boot_record(front) };
    found.sort_by_key(|partition| partition.start);
    let mut end = u64::try_from(FRONT).unwrap_or(u64::MAX);
    if found.is_empty() {
        return Err(damaged("it has no partitions"));
    }
    for partition in &found {
        if partition.start < end {
            return Err(damaged("its partitions overlap, or lie over the table"));
        }
        end = partition.start.checked_add(partition.length).ok_or_else(|| damaged("a partition is too long"))?;
    }
    Ok(found)
}

/// Whether the boot record has a partition of further tables.
pub(super) fn has_extended(front: &[u8]) -> bool {
    entries(front).any(|entry| entry.get(4).is_some_and(|kind| EXTENDED.contains(kind)))
}

fn entries(sector: &[u8]) -> impl Iterator<Item = &[u8]> {
    sector.get(446..510).unwrap_or_default().chunks_exact(16)
}

fn boot_record(front: &[u8]) -> Vec<Partition> {
    let entry = |(number, entry): (u32, &[u8])| {
        let kind = entry.get(4)?;
        let (start, length) = (u32_at(entry, 8)?, u32_at(entry, 12)?);
        let wanted = *kind != 0 && !EXTENDED.contains(kind) && length > 0;
        wanted.then(|| Partition { number, start: bytes(start.into()), length: bytes(length.into()) })
    };
    (1..).zip(entries(front)).filter_map(entry).collect()
}

fn guid(front: &[u8]) -> Option<Vec<Partition>> {
    let header = front.get(SECTOR..2 * SECTOR)?;
    if !header.starts_with(b"EFI PART") {
        return None;
    }
    let (first, count, size) = (u64_at(header, 72)?, u32_at(header, 80)?, u32_at(header, 84)?);
    if first != 2 || count > 128 || size != 128 {
        return None;
    }
    let table = front.get(2 * SECTOR..)?;
    let mut found = Vec::new();
    for (number, entry) in (1..=count).zip(table.chunks_exact(128)) {
        if entry.iter().take(16).all(|&byte| byte == 0) {
            continue;
        }
        let (first, last) = (u64_at(entry, 32)?, u64_at(entry, 40)?);
        let sectors = last.checked_sub(first)?.checked_add(1)?;
        let (start, length) = (first.checked_mul(512)?, sectors.checked_mul(512)?);
        found.push(Partition { number, start, length });
    }
    Some(found)
}

fn bytes(sectors: u64) -> u64 {
    sectors.saturating_mul(512)
}

fn u32_at(from: &[u8], at: usize) -> Option<u32> {
    from.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(from: &[u8], at: usize) -> Option<u64> {
    from.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}
