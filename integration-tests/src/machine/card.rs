//! The card of an emulated machine, read from outside while the machine is off: the partition table, FATs by mtools,
//! ext4 by debugfs.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{run, tool};
use crate::wait::seconds;

/// Bytes of a sector in an MBR.
const SECTOR: u64 = 512;
/// Timeout of one program that reads the card on a busy machine.
const LIMIT: std::time::Duration = seconds(120);

/// A card image.
#[derive(Debug, Clone)]
pub struct Card {
    path: PathBuf,
}

/// A primary partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// Type byte in the MBR.
    pub kind: u8,
    /// Start in bytes.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

impl Partition {
    /// True for the types that the firmware can boot from.
    pub fn is_fat(self) -> bool {
        matches!(self.kind, 0x01 | 0x04 | 0x06 | 0x0b | 0x0c | 0x0e)
    }
}

impl Card {
    /// The card in this image file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Path of the image file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The primary partition with this number (1 to 4); `None` if its entry is empty.
    pub fn partition(&self, number: u32) -> Result<Option<Partition>> {
        let mut file = std::fs::File::open(&self.path).with_context(|| format!("opening {}", self.path.display()))?;
        let mut mbr = [0_u8; 512];
        file.read_exact(&mut mbr).context("reading the partition table")?;
        ensure!(mbr.ends_with(&[0x55, 0xaa]), "the card has no partition table");
        let entry = number.checked_sub(1).and_then(|index| {
            let begin = 446 + usize::try_from(index).ok()? * 16;
            mbr.get(begin..begin + 16).filter(|_| index < 4)
        });
        let entry = entry.with_context(|| format!("there is no primary partition {number}"))?;
        let word = |at: usize| entry.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        let (kind, start, length) = (entry.get(4).copied(), word(8), word(12));
        let (Some(kind), Some(start), Some(length)) = (kind, start, length) else { bail!("the entry is short") };
        let (offset, length) = (u64::from(start) * SECTOR, u64::from(length) * SECTOR);
        Ok((kind != 0).then_some(Partition { kind, offset, length }))
    }

    /// Copies a FAT partition into a folder, which is emptied first. `None`: there is no such partition, it is no FAT,
    /// or it has no readable file system. Returns the paths of unreadable files, which are not copied: a power cut may
    /// leave some, and the firmware reads past those that it does not need.
    pub async fn copy_fat(&self, number: u32, to: &Path) -> Result<Option<Vec<String>>> {
        if to.exists() {
            std::fs::remove_dir_all(to).with_context(|| format!("emptying {}", to.display()))?;
        }
        std::fs::create_dir_all(to)?;
        let Some(partition) = self.partition(number)?.filter(|partition| partition.is_fat()) else { return Ok(None) };
        // The installer writes the partition table before the file systems, so a power cut can leave a partition
        // without one.
        if !self.has_fat(partition)? {
            return Ok(None);
        }
        let image = format!("{}@@{}", self.path.display(), partition.offset);
        let listed = run(&tool("mdir")?, &["-b", "-/", "-i", &image, "::/"], LIMIT).await?;
        // mdir also fails with this message for an empty file system.
        if !listed.status.success() && !listed.stderr.contains("not found") {
            return Ok(None);
        }
        let (mcopy, mut unreadable) = (tool("mcopy")?, Vec::new());
        for entry in listed.stdout.lines() {
            let Some(path) = entry.strip_prefix("::/").filter(|path| !path.is_empty()) else { continue };
            let copy = to.join(path);
            if path.ends_with('/') {
                std::fs::create_dir_all(copy)?;
                continue;
            }
            std::fs::create_dir_all(copy.parent().context("a file outside")?)?;
            let file = copy.display().to_string();
            let copied = run(&mcopy, &["-n", "-Q", "-i", &image, entry, &file], LIMIT).await?;
            if !copied.status.success() {
                unreadable.push(path.to_owned());
                // mcopy may leave the readable part behind.
                if copy.exists() {
                    std::fs::remove_file(copy)?;
                }
            }
        }
        Ok(Some(unreadable))
    }

    /// True if the first sector has a FAT's jump instruction and signature.
    fn has_fat(&self, partition: Partition) -> Result<bool> {
        let mut file = std::fs::File::open(&self.path)?;
        file.seek(SeekFrom::Start(partition.offset))?;
        let mut sector = [0_u8; 512];
        file.read_exact(&mut sector)?;
        Ok(sector.ends_with(&[0x55, 0xaa]) && matches!(sector.first(), Some(0xeb | 0xe9)))
    }

    /// The label of a FAT32 partition. Returns an error unless the boot sector and the root folder have the same.
    pub async fn label(&self, number: u32) -> Result<String> {
        let partition = self.partition(number)?.with_context(|| format!("the card has no partition {number}"))?;
        let mut file = std::fs::File::open(&self.path)?;
        // Offset of the label in a FAT32's boot sector (Microsoft's FAT32 File System Specification, 3.3).
        file.seek(SeekFrom::Start(partition.offset + 71))?;
        let mut in_sector = [0_u8; 11];
        file.read_exact(&mut in_sector)?;
        let in_sector = String::from_utf8_lossy(&in_sector).trim_end().to_owned();
        let image = format!("{}@@{}", self.path.display(), partition.offset);
        let told = run(&tool("mlabel")?, &["-s", "-i", &image, "::"], LIMIT).await?.success()?;
        let in_folder = told.trim().trim_start_matches("Volume label is ").trim();
        ensure!(in_folder.eq_ignore_ascii_case(&in_sector), "the labels are {in_sector:?} and {told:?}");
        Ok(in_sector)
    }

    /// Copies a folder of an ext4 partition, with owners and modes, into a folder, which is emptied first.
    pub async fn copy_ext4(&self, number: u32, from: &str, to: &Path) -> Result<()> {
        if to.exists() {
            std::fs::remove_dir_all(to).with_context(|| format!("emptying {}", to.display()))?;
        }
        std::fs::create_dir_all(to)?;
        let partition = self.partition(number)?.with_context(|| format!("the card has no partition {number}"))?;
        let image = format!("{}?offset={}", self.path.display(), partition.offset);
        // debugfs does not replay the journal, so changes that a killed machine left there are missing.
        let command = format!("rdump {from} {}", to.display());
        let output = run(&tool("debugfs")?, &["-R", &command, &image], LIMIT).await?;
        let complaints: Vec<&str> = output
            .stderr
            .lines()
            // debugfs prints its version to standard error.
            .filter(|line| !line.starts_with("debugfs "))
            .filter(|line| !line.is_empty())
            .collect();
        ensure!(output.status.success() && complaints.is_empty(), "debugfs: {}", complaints.join("\n"));
        Ok(())
    }

    /// Checks an ext4 partition read-only. The error contains e2fsck's findings.
    pub async fn check_ext4(&self, number: u32) -> Result<()> {
        let partition = self.partition(number)?.with_context(|| format!("the card has no partition {number}"))?;
        let image = format!("{}?offset={}", self.path.display(), partition.offset);
        let output = run(&tool("e2fsck")?, &["-f", "-n", &image], LIMIT).await?;
        ensure!(output.status.success(), "e2fsck of partition {number}: {}{}", output.stdout, output.stderr);
        Ok(())
    }
}
