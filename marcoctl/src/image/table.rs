//! Partitions of a disk, and their file systems as detected by the first bytes.

use std::fmt;
use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use fatfs::FsOptions;
use mbrman::MBR;

use crate::part::Part;

const SECTOR: u32 = 512;
/// Partition type in the boot record of a GPT disk.
const PROTECTIVE: u8 = 0xee;
/// Label of the installer's own partition.
const RECOVERY: &str = "RECOVERY";
/// Bytes needed to detect a file system. The superblock of btrfs is the last one.
const SUPERBLOCKS: usize = 0x10_000 + 0x100;

/// File system of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FileSystem {
    /// FAT of any width, with its label and serial number.
    Fat { label: String, id: u32 },
    /// ext2, ext3 or ext4. `dirty`: the journal was not replayed.
    Ext { dirty: bool },
    /// Another file system that a root may use, by the kernel's name.
    Other(&'static str),
    /// No known file system.
    Unknown,
}

impl FileSystem {
    /// Returns true if a root may be on it.
    pub(super) fn is_roots(&self) -> bool {
        matches!(self, Self::Ext { .. } | Self::Other(_))
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fat { label, .. } if label.is_empty() => f.write_str("FAT"),
            Self::Fat { label, .. } => write!(f, "FAT {label}"),
            Self::Ext { .. } => f.write_str("ext4"),
            Self::Other(name) => f.write_str(name),
            Self::Unknown => f.write_str("no file system that is known here"),
        }
    }
}

/// A partition, or a file system without a partition table.
#[derive(Debug, Clone)]
pub(super) struct Partition {
    /// Number in the table. `None`: there is no table.
    pub(super) number: Option<u32>,
    /// PARTUUID, derived from the table's signature as Linux does. Empty without a table.
    pub(super) uuid: String,
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) file_system: FileSystem,
}

impl Partition {
    /// Formats the partition's name for messages.
    pub(super) fn shown(&self, disk: &Path) -> String {
        match self.number {
            Some(number) => format!("{}:p{number}", disk.display()),
            None => format!("{}:", disk.display()),
        }
    }

    /// Returns true for the installer's partition, known by its label.
    pub(super) fn is_recovery(&self) -> bool {
        matches!(&self.file_system, FileSystem::Fat { label, .. } if label == RECOVERY)
    }
}

/// Returns the partitions of a disk in the order of their numbers.
pub(super) fn partitions(disk: &File) -> Result<Vec<Partition>> {
    let mut disk = disk.try_clone()?;
    let length = disk.seek(SeekFrom::End(0))?;
    disk.seek(SeekFrom::Start(0))?;
    // A superfloppy, or the device of a single partition.
    let whole = file_system(&disk, 0, length)?;
    if whole.is_roots() {
        return Ok(vec![Partition { number: None, uuid: String::new(), start: 0, length, file_system: whole }]);
    }
    if matches!(whole, FileSystem::Fat { .. }) {
        bail!("it is a FAT, which holds no system: name the whole disk, or the partition of the root");
    }
    let table = MBR::read_from(&mut disk, SECTOR).context("there is neither a file system nor a partition table")?;
    let signature = u32::from_le_bytes(table.header.disk_signature);
    let mut partitions = Vec::new();
    for (number, entry) in table.iter().filter(|(_, entry)| entry.is_used()) {
        if entry.sys == PROTECTIVE {
            bail!(
                "its partition table is a GPT: mount its root, with the boot partition below it, and name the folder"
            );
        }
        // It contains further partitions, not a file system. Our cards have none.
        if entry.is_extended() {
            continue;
        }
        let number = u32::try_from(number)?;
        let (start, length) = (u64::from(entry.starting_lba), u64::from(entry.sectors));
        let (start, length) = (start * u64::from(SECTOR), length * u64::from(SECTOR));
        let uuid = format!("{signature:08x}-{number:02x}");
        let file_system = file_system(&disk, start, length)?;
        partitions.push(Partition { number: Some(number), uuid, start, length, file_system });
    }
    Ok(partitions)
}

fn file_system(disk: &File, start: u64, length: u64) -> Result<FileSystem> {
    let mut head = vec![0; SUPERBLOCKS];
    let mut filled = 0;
    while let Some(rest) = head.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        let read = disk.read_at(rest, start + u64::try_from(filled)?)?;
        if read == 0 {
            break;
        }
        filled += read;
    }
    let has = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    Ok(if has(0x438, &[0x53, 0xef]) {
        // s_feature_incompat, EXT4_FEATURE_INCOMPAT_RECOVER.
        FileSystem::Ext { dirty: head.get(0x460).is_some_and(|features| features & 0x4 != 0) }
    } else if has(0x1_0040, b"_BHRfS_M") {
        FileSystem::Other("btrfs")
    } else if has(0x400, &[0x10, 0x20, 0xf5, 0xf2]) {
        FileSystem::Other("f2fs")
    } else if has(0, b"XFSB") {
        FileSystem::Other("xfs")
    } else if has(0, b"hsqs") {
        FileSystem::Other("squashfs")
    } else if has(0x36, b"FAT") || has(0x52, b"FAT") {
        // The letters alone prove little. fatfs checks the whole boot sector.
        let fat = fatfs::FileSystem::new(Part::of(disk.try_clone()?, start, length), FsOptions::new());
        fat.map_or(FileSystem::Unknown, |fat| FileSystem::Fat {
            label: fat.volume_label().trim().to_owned(),
            id: fat.volume_id(),
        })
    } else {
        FileSystem::Unknown
    })
}
