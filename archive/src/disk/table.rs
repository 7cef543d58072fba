//! Partition tables: the master boot record (MBR), and the GUID partition table (GPT; UEFI specification, chapter 5).

use super::SECTOR;
use crate::tar::is_header;
use crate::{Error, Reason, Refused};

/// Bytes read before the first partition. Common tools start partitions at 1 MiB. The entries of a GPT end within the
/// first 17 KiB.
pub const FRONT: usize = 34 * SECTOR;
/// Type of the single entry in the boot record of a GPT disk.
const PROTECTIVE: u8 = 0xee;
/// Types of extended partitions in a boot record.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// Types of FAT partitions in a boot record.
const FATS: [u8; 8] = [0x01, 0x04, 0x06, 0x0b, 0x0c, 0x0e, 0xef, 0xea];
/// Type of a Linux partition in a boot record.
const LINUX: u8 = 0x83;
/// Type GUIDs of partitions with a FAT in a GPT, in on-disk byte order: EFI system, and basic data.
pub(super) const GUID_FATS: [[u8; 16]; 2] = [
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b],
    [0xa2, 0xa0, 0xd0, 0xeb, 0xe5, 0xb9, 0x33, 0x44, 0x87, 0xc0, 0x68, 0xb6, 0xb7, 0x26, 0x99, 0xc7],
];
/// Type GUIDs of Linux partitions in a GPT: data, and roots for 32-bit and 64-bit ARM (systemd's Discoverable
/// Partitions Specification).
pub(super) const GUID_LINUX: [[u8; 16]; 3] = [
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4],
    [0x10, 0xd7, 0xda, 0x69, 0xe4, 0x2c, 0x3c, 0x4e, 0xb1, 0x6c, 0x21, 0xa1, 0xd4, 0x9a, 0xbe, 0xd3],
    [0x45, 0xb0, 0x21, 0xb9, 0xf0, 0x1d, 0xc3, 0x41, 0xaf, 0x44, 0x4c, 0x6f, 0x28, 0x0d, 0x3f, 0xae],
];

/// A partition of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// Number in the table, from 1.
    pub number: u32,
    /// Start in bytes.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// Contents according to the table.
    pub meant: Meant,
}

/// Contents of a partition according to its type in the table. The type may be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meant {
    /// A FAT file system.
    Fat,
    /// A Linux file system.
    Linux,
    /// Anything else.
    Other,
}

/// Returns true for the first sector of a disk: the signature, entries that a boot record can have, and no valid header
/// of a tarball. A tar header could contain the signature by chance.
pub(super) fn is_boot_record(start: &[u8]) -> bool {
    let Some(sector) = start.get(..SECTOR) else { return false };
    let entries: Vec<&[u8]> = entries(sector).collect();
    sector.ends_with(&[0x55, 0xaa])
        && entries.iter().all(|entry| matches!(entry.first(), Some(0 | 0x80)))
        && entries.iter().any(|entry| entry.get(4).is_some_and(|kind| *kind != 0))
        && !is_header(sector)
}

/// Reads the partitions, ordered by their offsets.
pub(super) fn read_table(front: &[u8]) -> Result<Vec<Partition>, Error> {
    let damaged = |what: &str| Error::from(Refused::archive(Reason::Damaged(what.to_owned())));
    if !is_boot_record(front) {
        return Err(damaged("it begins with no partition table"));
    }
    let gpt = entries(front).any(|entry| entry.get(4) == Some(&PROTECTIVE));
    let mut found =
        if gpt { guid(front).ok_or_else(|| damaged("its GPT makes no sense"))? } else { boot_record(front) };
    // A table may list its partitions in any order. The stream passes them by offset.
    found.sort_by_key(|partition| partition.start);
    let mut end = u64::try_from(FRONT).unwrap_or(u64::MAX);
    if found.is_empty() {
        return Err(damaged("it has no partitions"));
    }
    // The stream is read once, so two partitions cannot share bytes.
    for partition in &found {
        if partition.start < end {
            return Err(damaged("its partitions overlap, or lie over the table"));
        }
        end = partition.start.checked_add(partition.length).ok_or_else(|| damaged("a partition is too long"))?;
    }
    Ok(found)
}

/// Returns the bytes that the image takes on a disk: up to the end of its last partition, or of the backup table that a
/// GPT has behind it.
pub(super) fn length(front: &[u8]) -> Result<u64, Error> {
    let end = read_table(front)?.iter().map(|partition| partition.start + partition.length).max().unwrap_or_default();
    let header = front.get(SECTOR..2 * SECTOR).filter(|header| header.starts_with(b"EFI PART"));
    let gpt = entries(front).any(|entry| entry.get(4) == Some(&PROTECTIVE));
    let second = header.filter(|_| gpt).and_then(|header| u64_at(header, 32)).map(|sector| sector.saturating_add(1));
    Ok(end.max(second.unwrap_or_default().saturating_mul(512)))
}

/// Returns true if the boot record has an extended partition.
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
        // Logical partitions are chained through the disk. A stream cannot follow the chain.
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
    // Common tools write this layout, and FRONT covers it. Any other layout is refused.
    if first != 2 || count > 128 || size != 128 {
        return None;
    }
    let table = front.get(2 * SECTOR..)?;
    let mut found = Vec::new();
    for (number, entry) in (1..=count).zip(table.chunks_exact(128)) {
        // A type of zeros marks an unused entry (UEFI specification, chapter 5).
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
