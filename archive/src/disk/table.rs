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
/// Types of partitions that hold a FAT, in a boot record.
const FATS: [u8; 8] = [0x01, 0x04, 0x06, 0x0b, 0x0c, 0x0e, 0xef, 0xea];
/// Type of a partition of Linux, in a boot record.
const LINUX: u8 = 0x83;
/// Types that hold a FAT in a GPT, as their bytes lie there: EFI system, and basic data.
pub(super) const GUID_FATS: [[u8; 16]; 2] = [
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b],
    [0xa2, 0xa0, 0xd0, 0xeb, 0xe5, 0xb9, 0x33, 0x44, 0x87, 0xc0, 0x68, 0xb6, 0xb7, 0x26, 0x99, 0xc7],
];
/// Types of Linux in a GPT: data, and roots for ARM of 32 and 64 bits (systemd's Discoverable Partitions Specification).
pub(super) const GUID_LINUX: [[u8; 16]; 3] = [
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4],
    [0x10, 0xd7, 0xda, 0x69, 0xe4, 0x2c, 0x3c, 0x4e, 0xb1, 0x6c, 0x21, 0xa1, 0xd4, 0x9a, 0xbe, 0xd3],
    [0x45, 0xb0, 0x21, 0xb9, 0xf0, 0x1d, 0xc3, 0x41, 0xaf, 0x44, 0x4c, 0x6f, 0x28, 0x0d, 0x3f, 0xae],
];

/// A partition of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// How long it is, in bytes.
    pub length: u64,
    /// Its contents by the table.
    pub meant: Meant,
}

/// The contents of a partition by its type in the table, which need not be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meant {
    /// A FAT.
    Fat,
    /// A file system of Linux.
    Linux,
    /// Something else.
    Other,
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

/// Bytes of the image by its table: up to the end of its last partition, or of the second table that a GPT has behind that.
pub(super) fn length(front: &[u8]) -> Result<u64, Error> {
    let end = read_table(front)?.iter().map(|partition| partition.start + partition.length).max().unwrap_or_default();
    let header = front.get(SECTOR..2 * SECTOR).filter(|header| header.starts_with(b"EFI PART"));
    let gpt = entries(front).any(|entry| entry.get(4) == Some(&PROTECTIVE));
    let second = header.filter(|_| gpt).and_then(|header| u64_at(header, 32)).map(|sector| sector.saturating_add(1));
    Ok(end.max(second.unwrap_or_default().saturating_mul(512)))
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
        let meant = match kind {
            kind if FATS.contains(kind) => Meant::Fat,
            &LINUX => Meant::Linux,
            _ => Meant::Other,
        };
        wanted.then(|| Partition { number, start: bytes(start.into()), length: bytes(length.into()), meant })
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
        let kind = entry.get(..16).unwrap_or_default();
        let meant = match kind {
            kind if GUID_FATS.iter().any(|guid| guid == kind) => Meant::Fat,
            kind if GUID_LINUX.iter().any(|guid| guid == kind) => Meant::Linux,
            _ => Meant::Other,
        };
        found.push(Partition { number, start, length, meant });
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
