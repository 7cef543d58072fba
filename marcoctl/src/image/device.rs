//! The kernel's own device of a partition, and mounts of that partition. Data written through a mount may not be on the
//! disk yet.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{major, minor};

use super::table::Partition;
use crate::card::{device_number, mounted_at, partitions, word};

/// Unit of sysfs in bytes.
const SECTOR: u64 = 512;

/// A partition of a disk or of a file.
pub(super) struct Place<'a> {
    pub(super) path: &'a Path,
    pub(super) disk: &'a File,
    pub(super) partition: &'a Partition,
}

/// Returns the kernel's own device of a partition, or `None` if it has none.
///
/// # Errors
/// Returns an error if the partition is mounted: reading past the mount would pack outdated contents.
pub(super) fn device_of(place: &Place<'_>) -> Result<Option<PathBuf>> {
    let facts = place.disk.metadata()?;
    if !facts.file_type().is_block_device() {
        refuse_when_attached(place.partition, &facts)?;
        return Ok(None);
    }
    let number = (major(facts.rdev()), minor(facts.rdev()));
    let Some(wanted) = place.partition.number else {
        refuse_when_mounted(place.path, number)?;
        return Ok(Some(place.path.to_owned()));
    };
    let disk = PathBuf::from(format!("/sys/dev/block/{}:{}", number.0, number.1));
    let found = partitions(&disk).into_iter().find(|folder| word(&folder.join("partition")) == wanted.to_string());
    let Some(folder) = found else { return Ok(None) };
    let device = device_at(&folder);
    refuse_when_mounted(&device, device_number(&folder.join("dev")))?;
    Ok(Some(device))
}

fn device_at(folder: &Path) -> PathBuf {
    Path::new("/dev").join(folder.file_name().unwrap_or_default())
}

/// Refuses a part of a file if a loop device of that part is mounted.
fn refuse_when_attached(partition: &Partition, file: &Metadata) -> Result<()> {
    let end = partition.start.saturating_add(partition.length);
    // A file has no devices of its own. Loop devices of it are found by their backing file.
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let disk = entry.path();
        let backing = fs::metadata(word(&disk.join("loop/backing_file")));
        if !backing.is_ok_and(|backing| (backing.dev(), backing.ino()) == (file.dev(), file.ino())) {
            continue;
        }
        let number = |file: PathBuf| word(&file).parse::<u64>().unwrap_or_default();
        let offset = number(disk.join("loop/offset"));
        for folder in partitions(&disk).into_iter().chain([disk]) {
            // The loop device as a whole has no file `start`, which gives 0.
            let from = offset.saturating_add(number(folder.join("start")).saturating_mul(SECTOR));
            let until = from.saturating_add(number(folder.join("size")).saturating_mul(SECTOR));
            // Any overlap counts: a loop device may cover the whole file, or start at another offset.
            if from < end && partition.start < until {
                refuse_when_mounted(&device_at(&folder), device_number(&folder.join("dev")))?;
            }
        }
    }
    Ok(())
}

fn refuse_when_mounted(device: &Path, number: (u32, u32)) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    if let Some(at) = mounted_at(&mounts, number, |source| Path::new(source) == device) {
        bail!("{} is mounted at {at}: unmount it, or pack the folder where the system is mounted", device.display());
    }
    Ok(())
}
