//! The card of an emulated machine, read from outside while the machine is off: its partition table, its FATs by mtools,
//! its ext4 by debugfs.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::process::{run, tool};
use crate::wait::seconds;

/// Of an MBR.
const SECTOR: u64 = 512;
/// How long reading a card may take on a machine that has much else to do.
const LIMIT: std::time::Duration = seconds(120);

/// A card image.
#[derive(Debug, Clone)]
pub struct Card {
    path: PathBuf,
}

/// A primary partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partition {
    /// Its type in the MBR.
    pub kind: u8,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
}

impl Partition {
    /// Whether the firmware can boot from it.
    pub fn is_fat(self) -> bool {
        matches!(self.kind, 0x01 | 0x04 | 0x06 | 0x0b | 0x0c | 0x0e)
    }
}

impl Card {
    /// The image in this file.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The partition with this number (1 to 4), where the card has one.
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

    /// Copies a FAT partition into a folder, which is made anew; none when the card does not have that partition, as FAT,
    /// with a file system that can be read. A file that cannot be read is not copied, but named: after a power cut FAT
    /// may have some, and the firmware reads past those that it does not need.
    pub async fn copy_fat(&self, number: u32, to: &Path) -> Result<Option<Vec<String>>> {
        if to.exists() {
            std::fs::remove_dir_all(to).with_context(|| format!("emptying {}", to.display()))?;
        }
        std::fs::create_dir_all(to)?;
        let Some(partition) = self.partition(number)?.filter(|partition| partition.is_fat()) else { return Ok(None) };
        if !self.has_fat(partition)? {
            return Ok(None);
        }
        // A table entry is written before the file system.
        let image = format!("{}@@{}", self.path.display(), partition.offset);
        let listed = run(&tool("mdir")?, &["-b", "-/", "-i", &image, "::/"], LIMIT).await?;
        // mdir says that about an empty one, too.
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
                if copy.exists() {
                    std::fs::remove_file(copy)?;
                }
            }
        }
        Ok(Some(unreadable))
    }

    /// Whether the partition begins with what every FAT begins with.
    fn has_fat(&self, partition: Partition) -> Result<bool> {
        let mut file = std::fs::File::open(&self.path)?;
        file.seek(SeekFrom::Start(partition.offset))?;
        let mut sector = [0_u8; 512];
        file.read_exact(&mut sector)?;
        Ok(sector.ends_with(&[0x55, 0xaa]) && matches!(sector.first(), Some(0xeb | 0xe9)))
    }

    /// The label of a FAT32 partition, which must be the same in its boot sector and in its root folder.
    pub async fn label(&self, number: u32) -> Result<String> {
        let partition = self.partition(number)?.with_context(|| format!("the card has no partition {number}"))?;
        let mut file = std::fs::File::open(&self.path)?;
        // The place of the label in a FAT32's boot sector (Microsoft's FAT32 File System Specification, 3.3).
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

    /// Copies a folder of an ext4 partition, with owners and modes, into a folder, which is made anew.
    pub async fn copy_ext4(&self, number: u32, from: &str, to: &Path) -> Result<()> {
        if to.exists() {
            std::fs::remove_dir_all(to).with_context(|| format!("emptying {}", to.display()))?;
        }
        std::fs::create_dir_all(to)?;
        let partition = self.partition(number)?.with_context(|| format!("the card has no partition {number}"))?;
        let image = format!("{}?offset={}", self.path.display(), partition.offset);
        // What a machine that was killed left in the journal is not in the tree yet; debugfs does not look there.
        let command = format!("rdump {from} {}", to.display());
        let output = run(&tool("debugfs")?, &["-R", &command, &image], LIMIT).await?;
        let complaints: Vec<&str> = output
            .stderr
            .lines()
            .filter(|line| !line.starts_with("debugfs "))
            .filter(|line| !line.is_empty())
            .collect();
        ensure!(output.status.success() && complaints.is_empty(), "debugfs: {}", complaints.join("\n"));
        Ok(())
    }

    /// Checks an ext4 partition from outside, without changing it: the error is what e2fsck found.
    pub async fn check_ext4(&self, number: u32) -> Result<()> {
        let partition = self.partition(number)?.with_context(|| format!("the card has no partition {number}"))?;
        let image = format!("{}?offset={}", self.path.display(), partition.offset);
        let output = run(&tool("e2fsck")?, &["-f", "-n", &image], LIMIT).await?;
        ensure!(output.status.success(), "e2fsck of partition {number}: {}{}", output.stdout, output.stderr);
        Ok(())
    }
}
