//! Creates, fills and verifies the file system of p1 without mounting it.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, bail};
use chrono::{Datelike as _, Timelike as _};
use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions, format_volume};

use super::contents::Contents;
use super::folders;
use crate::clock;
use crate::part::Part;

/// Cluster size in bytes. Small, so that 256 MiB have the 65,525 clusters that a FAT32 requires.
const CLUSTER: u32 = 2048;
const LABEL: &[u8; 11] = b"RECOVERY   ";
/// Bytes between two steps of the progress bar.
const BLOCK: usize = 256 << 10;

/// Time of all files: the time at which this run wrote its first card.
#[derive(Debug)]
struct Now;

impl fatfs::TimeProvider for Now {
    fn get_current_date(&self) -> fatfs::Date {
        self.get_current_date_time().date
    }

    fn get_current_date_time(&self) -> fatfs::DateTime {
        static NOW: OnceLock<fatfs::DateTime> = OnceLock::new();
        *NOW.get_or_init(|| {
            let now = clock::now().with_timezone(&chrono::Local);
            let small = |number: u32| u16::try_from(number).unwrap_or_default();
            // A FAT stores years from 1980 to 2107.
            fatfs::DateTime {
                date: fatfs::Date {
                    year: u16::try_from(now.year()).unwrap_or(1980).clamp(1980, 2107),
                    month: small(now.month()),
                    day: small(now.day()),
                },
                time: fatfs::Time {
                    hour: small(now.hour()),
                    min: small(now.minute()),
                    sec: small(now.second()),
                    millis: 0,
                },
            }
        })
    }
}

static CLOCK: Now = Now;

/// Creates the file system and writes the files.
pub(super) fn write(mut part: Part, contents: &Contents, progress: &dyn Fn(u64)) -> Result<()> {
    let mut id = [0; 4];
    getrandom::fill(&mut id).context("no randomness")?;
    // Not mkfs.vfat and a mount: that needs root even for an image file, and a desktop would mount the new partition
    // while it is filled (docs/decisions/0031).
    let options = FormatVolumeOptions::new()
        .fat_type(FatType::Fat32)
        .bytes_per_cluster(CLUSTER)
        .volume_label(*LABEL)
        .volume_id(u32::from_le_bytes(id));
    format_volume(&mut part, options).context("cannot make a FAT32")?;
    part.seek(SeekFrom::Start(0))?;
    let card = FileSystem::new(&mut part, FsOptions::new().time_provider(&CLOCK))?;
    // The number of clusters decides on the width, not the request.
    if card.fat_type() != FatType::Fat32 {
        bail!("the file system that was made is no FAT32");
    }
    {
        let root = card.root_dir();
        for (name, bytes) in contents.files() {
            for (at, _) in name.match_indices('/') {
                let (folder, _) = name.split_at(at);
                root.create_dir(folder).with_context(|| folder.to_owned())?;
            }
            let mut file = root.create_file(name).with_context(|| name.to_owned())?;
            for block in bytes.chunks(BLOCK) {
                file.write_all(block).with_context(|| name.to_owned())?;
                progress(u64::try_from(block.len())?);
            }
            file.flush().with_context(|| name.to_owned())?;
        }
    }
    // Counting the free clusters also stores their number in the file system.
    let stats = card.stats()?;
    card.unmount()?;
    folders::repair(&mut part, stats.total_clusters() - stats.free_clusters())
}

/// Reads every file and compares it.
pub(super) fn verify(part: Part, contents: &Contents, progress: &dyn Fn(u64)) -> Result<()> {
    let card = FileSystem::new(part, FsOptions::new())?;
    let root = card.root_dir();
    let mut buffer = vec![0; BLOCK];
    for (name, bytes) in contents.files() {
        let mut file = root.open_file(name).with_context(|| name.to_owned())?;
        for block in bytes.chunks(BLOCK) {
            let found = buffer.get_mut(..block.len()).unwrap_or_default();
            file.read_exact(found).with_context(|| name.to_owned())?;
            if found != block {
                bail!("{name} differs");
            }
            progress(u64::try_from(block.len())?);
        }
        if file.read(&mut buffer)? != 0 {
            bail!("{name} is longer than it was written");
        }
    }
    Ok(())
}
