//! A system's boot partition: found in its fstab, and read without mounting it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use chrono::NaiveDate;
use fatfs::{Dir, FsOptions};
use tar::EntryType;

use super::table::{FileSystem, Partition};
use super::tarball::Entry;
use super::walk::Walk;
use crate::part::Part;

/// Mode of all entries: the kernel's default for a FAT.
const MODE: u32 = 0o755;

/// A boot partition and its mount point in the system.
#[derive(Debug)]
pub(super) struct Boot {
    disk: File,
    start: u64,
    length: u64,
    /// Folder of the root that it replaces.
    pub(super) at: PathBuf,
    /// Number in the partition table. `None`: no table.
    pub(super) number: Option<u32>,
    shown: String,
}

impl Boot {
    /// Creates it from a partition that starts at byte `start` of `disk`.
    pub(super) fn new(disk: File, start: u64, partition: &Partition, at: &str, shown: String) -> Self {
        let Partition { number, length, .. } = *partition;
        Self { disk, start, length, at: PathBuf::from(at), number, shown }
    }

    /// Packs its contents below its mount point.
    pub(super) fn pack<W: Write>(&self, walk: &mut Walk<'_, W>) -> Result<()> {
        // Not mounted: desktops often have it mounted already, and not every kernel supports FAT (docs/decisions/0032).
        let part = Part::of(self.disk.try_clone()?, self.start, self.length);
        let fat =
            fatfs::FileSystem::new(part, FsOptions::new()).with_context(|| format!("cannot read {}", self.shown))?;
        self.folder(walk, &fat.root_dir(), &self.at)
    }

    fn folder<W: Write>(&self, walk: &mut Walk<'_, W>, folder: &Dir<'_, Part>, path: &Path) -> Result<()> {
        let named = |path: &Path| {
            let below = path.strip_prefix(&self.at).unwrap_or(path);
            format!("cannot read {}/{}", self.shown, below.display())
        };
        let mut entries = folder.iter().collect::<Result<Vec<_>, _>>().with_context(|| named(path))?;
        // A FAT keeps the order of creation. Sorted names give the same tarball for the same files.
        entries.sort_by_key(fatfs::DirEntry::file_name);
        for entry in entries {
            let name = entry.file_name();
            let path = path.join(&name);
            if matches!(name.as_str(), "." | "..") || walk.excludes.has(&path) {
                continue;
            }
            // A broken FAT can contain such names.
            if name.contains('/') || name.is_empty() {
                bail!("{}: it has a name that no system could have", named(&path));
            }
            let header = Entry {
                path: format!("./{}{}", path.display(), if entry.is_dir() { "/" } else { "" }).into_bytes(),
                mode: MODE,
                mtime: (seconds(entry.modified()), 0),
                ..Entry::default()
            };
            if entry.is_dir() {
                walk.tarball.bare(&header, EntryType::Directory).with_context(|| named(&path))?;
                walk.count(0);
                self.folder(walk, &entry.to_dir(), &path)?;
            } else {
                let size = entry.len();
                walk.tarball.file(&header, size, None, &mut entry.to_file()).with_context(|| named(&path))?;
                walk.count(size);
            }
        }
        Ok(())
    }
}

/// Converts a FAT's time to seconds. It has no time zone and is taken as UTC.
fn seconds(time: fatfs::DateTime) -> i64 {
    let (date, time) = (time.date, time.time);
    NaiveDate::from_ymd_opt(i32::from(date.year), u32::from(date.month), u32::from(date.day))
        .and_then(|date| date.and_hms_opt(u32::from(time.hour), u32::from(time.min), u32::from(time.sec)))
        .map_or(0, |time| time.and_utc().timestamp())
}

/// Mount point of the boot partition, according to an fstab.
#[derive(Debug)]
pub(super) struct Named<'a> {
    /// Folder without the leading slash.
    pub(super) at: String,
    /// The partition that the entry names. `None`: the entry's source matches none of them.
    pub(super) partition: Option<&'a Partition>,
}

/// Returns the entry for a FAT at `/boot/firmware` or `/boot` in an fstab (fstab(5)).
pub(super) fn fstab_boot<'a>(fstab: &str, fats: &[&'a Partition]) -> Option<Named<'a>> {
    fstab.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (source, at, kind) = (words.next()?, words.next()?, words.next()?);
        let at = at.strip_prefix('/').filter(|at| matches!(*at, "boot" | "boot/firmware"))?;
        if source.starts_with('#') || !matches!(kind, "vfat" | "msdos" | "auto") {
            return None;
        }
        let partition = fats.iter().copied().find(|fat| is_named(fat, source));
        Some(Named { at: at.to_owned(), partition })
    })
}

fn is_named(fat: &Partition, source: &str) -> bool {
    let FileSystem::Fat { label, id } = &fat.file_system else { return false };
    match source.split_once('=') {
        Some(("PARTUUID", uuid)) => uuid.trim_matches('"').eq_ignore_ascii_case(&fat.uuid),
        Some(("LABEL", text)) => text.trim_matches('"') == label,
        Some(("UUID", text)) => {
            text.trim_matches('"').eq_ignore_ascii_case(&format!("{:04x}-{:04x}", id >> 16, id & 0xffff))
        }
        Some(_) => false,
        // `/dev/mmcblk0p1` or `/dev/sda1`: only the number counts, because the disk has another name here.
        None => {
            let name = source.trim_end_matches(|last: char| last.is_ascii_digit());
            let number = source.strip_prefix(name).and_then(|number| number.parse().ok());
            source.starts_with("/dev/") && number.is_some() && number == fat.number
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::{FileSystem, Partition};
    use super::fstab_boot;

    fn fat(number: u32, label: &str, id: u32) -> Partition {
        let file_system = FileSystem::Fat { label: label.to_owned(), id };
        Partition { number: Some(number), uuid: format!("0a1b2c3d-{number:02x}"), start: 0, length: 0, file_system }
    }

    #[test]
    fn the_boot_partition_is_the_one_that_the_system_mounts() {
        let (recovery, boot) = (fat(1, "RECOVERY", 1), fat(4, "bootfs", 0xABCD_0102));
        let fats = [&recovery, &boot];
        for (line, number, at) in [
            ("PARTUUID=0a1b2c3d-04 /boot/firmware vfat defaults 0 2", Some(4), "boot/firmware"),
            ("PARTUUID=0A1B2C3D-01\t/boot\tvfat", Some(1), "boot"),
            ("LABEL=bootfs /boot/firmware auto", Some(4), "boot/firmware"),
            ("UUID=ABCD-0102 /boot vfat", Some(4), "boot"),
            ("/dev/mmcblk0p1 /boot vfat", Some(1), "boot"),
            ("/dev/sda4 /boot vfat", Some(4), "boot"),
            ("PARTUUID=ffffffff-01 /boot vfat", None, "boot"),
        ] {
            let fstab = format!("proc /proc proc defaults 0 0\n# LABEL=x /boot vfat\n{line}\nLABEL=data /data vfat\n");
            let named = fstab_boot(&fstab, &fats).unwrap();
            assert_eq!((named.partition.and_then(|fat| fat.number), named.at.as_str()), (number, at), "{line}");
        }
        for none in ["", "LABEL=bootfs /mnt vfat", "LABEL=boot /boot ext4", "#LABEL=bootfs /boot vfat", "LABEL=bootfs"]
        {
            assert!(fstab_boot(none, &fats).is_none(), "{none}");
        }
    }
}
