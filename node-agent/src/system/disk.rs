//! The card as the kernel shows it: its table, its partitions, their file systems, and where they are mounted.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use marco_archive::disk::Needs;
use mbrman::{BOOT_INACTIVE, CHS, MBR, MBRPartitionEntry};
use rustix::mount::{MountFlags, UnmountFlags};

use super::command::run;
use super::{Refusal, Stretch, SystemError};
use crate::settings::{FILE_SYSTEMS, Settings};
use erasure::Erasure;
use plan::{Part, Plan, SECTOR, plan};

pub(crate) mod erasure;
pub(crate) mod find;
pub(crate) mod kept;
pub(crate) mod plan;
pub(crate) mod probe;

/// Time limit for making a file system. Discarding a large card is slow.
const MKFS_TIME: Duration = Duration::from_secs(15 * 60);
/// Bytes zeroed at the beginning and at the end of a new partition. Leftovers there would be taken for a file system or
/// a member of a RAID.
const WIPE: usize = 1 << 20;
/// The last bytes of a sector that holds a partition table.
const BOOT_SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// The label of a recovery partition.
pub(crate) const RECOVERY_LABEL: &str = "RECOVERY";

/// A whole disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Its device.
    pub(crate) device: PathBuf,
}

impl Disk {
    /// The device of a partition: `mmcblk0p1`, but `sda1`.
    pub(crate) fn partition(&self, number: u32) -> PathBuf {
        let mut name = self.device.clone().into_os_string();
        if name.to_string_lossy().ends_with(|last: char| last.is_ascii_digit()) {
            name.push("p");
        }
        name.push(number.to_string());
        name.into()
    }

    fn open(&self, write: bool) -> Result<File, SystemError> {
        let opened = std::fs::OpenOptions::new().read(true).write(write).open(&self.device);
        opened.map_err(SystemError::io("open", &self.device))
    }

    /// Sectors of the device, or of the file that stands for one.
    fn sectors(&self) -> Result<u64, SystemError> {
        let end = self.open(false)?.seek(SeekFrom::End(0)).map_err(SystemError::io("measure", &self.device))?;
        Ok(end / SECTOR)
    }

    /// The table. `None`: the disk can be read and has no table.
    fn table(&self) -> Result<Option<MBR>, SystemError> {
        let mut device = self.open(false)?;
        let mut first = [0; 512];
        device.read_exact_at(&mut first, 0).map_err(SystemError::io("read the partition table of", &self.device))?;
        if !first.ends_with(&BOOT_SIGNATURE) {
            return Ok(None);
        }
        match MBR::read_from(&mut device, 512) {
            Ok(table) => Ok(Some(table)),
            Err(mbrman::Error::Io(error)) => Err(SystemError::io("read the partition table of", &self.device)(error)),
            // A card with a table that cannot be parsed may hold anything, so it must not count as blank.
            Err(error) => {
                let message = format!("the partition table of {} makes no sense: {error}", self.device.display());
                Err(Refusal { reason: "PARTITION_TABLE_UNREADABLE", message }.into())
            }
        }
    }

    /// The partitions in the table. Empty: no table.
    pub(crate) fn parts(&self) -> Result<Vec<Part>, SystemError> {
        Ok(self.table()?.as_ref().map(parts).unwrap_or_default())
    }

    /// The signature in the table, as PARTUUIDs begin with it. `None`: no table that can be read, or no signature.
    pub(crate) fn signature(&self) -> Option<String> {
        let signature = u32::from_le_bytes(self.table().ok()??.header.disk_signature);
        (signature != 0).then(|| format!("{signature:08x}"))
    }

    /// Name of a partition by its place in the table: `PARTUUID=1a2b3c4d-02`. It stays the same if the card is plugged
    /// in elsewhere.
    pub(crate) fn partuuid(&self, number: u32) -> Result<String, SystemError> {
        let table = self.table()?.ok_or_else(|| SystemError::Invalid("the card has no partition table".into()))?;
        Ok(format!("PARTUUID={:08x}-{number:02x}", u32::from_le_bytes(table.header.disk_signature)))
    }

    /// Decides what an installation does with the table.
    pub(crate) fn plan(&self, settings: &Settings) -> Result<Plan, SystemError> {
        Ok(plan(&self.parts()?, self.sectors()?, settings)?)
    }

    /// Checks that the card's partitions, present or planned, are large enough.
    pub(crate) fn fits(&self, settings: &Settings, needs: Needs) -> Result<(), SystemError> {
        let parts = match self.plan(settings)? {
            Plan::Keep => self.parts()?,
            Plan::Write(parts) => parts,
            // After the move the card has only this partition, so the sizes are those of a card with nothing else.
            Plan::Move(recovery) => match plan(&[recovery], self.sectors()?, settings)? {
                Plan::Write(parts) => parts,
                Plan::Keep | Plan::Move(_) => Vec::new(),
            },
        };
        Ok(plan::fits(&parts, needs)?)
    }

    /// New place of the recovery partition for an image of this many bytes before it. `None`: it can stay.
    pub(crate) fn behind(&self, image: u64) -> Result<Option<Part>, SystemError> {
        Ok(plan::behind(&self.parts()?, self.sectors()?, image)?)
    }

    /// Puts the card into layout resident. Returns true if it was not. Partitions that keep their place may be mounted,
    /// others must not be.
    pub(crate) fn partition_resident(&self, settings: &Settings) -> Result<bool, SystemError> {
        let parts = match self.plan(settings)? {
            Plan::Keep => {
                // The table is right, but the kernel may still show that of a raw image.
                self.tell_kernel(&self.parts()?)?;
                return Ok(false);
            }
            Plan::Write(parts) => parts,
            Plan::Move(_) => return Err(SystemError::Invalid("the recovery partition has to be moved first".into())),
        };
        self.write_table(&parts)?;
        self.tell_kernel(&parts)?;
        Ok(true)
    }

    /// Removes every partition but the recovery partition, which it returns. The others must not be mounted.
    pub(crate) fn keep_recovery(&self) -> Result<Part, SystemError> {
        let found = self.parts()?.into_iter().find(|part| part.number == 1);
        let recovery = found.ok_or_else(|| SystemError::Invalid("the card has no recovery partition".into()))?;
        self.write_table(&[recovery])?;
        self.tell_kernel(&[recovery])?;
        Ok(recovery)
    }

    /// Copies the recovery partition to its new place, reads it back past the page cache, and only then writes the
    /// table, which lists nothing else. It must not be mounted for writing. The kernel sees the change after a restart.
    pub(crate) fn move_recovery(&self, to: Part) -> Result<(), SystemError> {
        let failed = || SystemError::io("move the recovery partition of", &self.device);
        let from = File::open(self.partition(1)).map_err(failed())?;
        let device = self.open(true)?;
        let start = to.start * SECTOR;
        let (mut read, mut written) = (vec![0; WIPE], vec![0; WIPE]);
        for at in (0..to.sectors * SECTOR).step_by(WIPE) {
            let count = fill(&from, &mut read, at).map_err(failed())?;
            device.write_all_at(read.get(..count).unwrap_or_default(), start + at).map_err(failed())?;
        }
        device.sync_all().map_err(failed())?;
        let (length, advice) = (std::num::NonZero::new(to.sectors * SECTOR), rustix::fs::Advice::DontNeed);
        // Otherwise the page cache would be compared with itself, and a failing card would pass.
        rustix::fs::fadvise(&device, start, length, advice).map_err(|error| failed()(error.into()))?;
        for at in (0..to.sectors * SECTOR).step_by(WIPE) {
            let count = fill(&from, &mut read, at).map_err(failed())?;
            device.read_exact_at(written.get_mut(..count).unwrap_or_default(), start + at).map_err(failed())?;
            if read.get(..count) != written.get(..count) {
                let message = "what was written is not what is read back: the card may be failing";
                return Err(failed()(std::io::Error::other(message)));
            }
        }
        // A power cut before this leaves the old table, and with it the old copy.
        self.put_table(&[to])
    }

    /// Shows the kernel the boot partition and root of an image as partitions 4 and 2. The card's own table does not
    /// list them.
    pub(crate) fn show(&self, boot: Stretch, root: Stretch) -> Result<(), SystemError> {
        let part = |number, stretch: Stretch| {
            let (start, sectors) = (stretch.start / SECTOR, stretch.length / SECTOR);
            Part { number, kind: 0, start, sectors }
        };
        let mut parts = self.parts()?;
        parts.retain(|part| part.number == 1);
        parts.extend([part(2, root), part(4, boot)]);
        self.tell_kernel(&parts)
    }

    /// Writes the first sector of an image and syncs it.
    pub(crate) fn write_first(&self, sector: &[u8; 512]) -> Result<(), SystemError> {
        let failed = || SystemError::io("write the partition table of", &self.device);
        let device = self.open(true)?;
        device.write_all_at(sector, 0).and_then(|()| device.sync_all()).map_err(failed())
    }

    /// Zeroes both ends of new partitions, then writes the table.
    fn write_table(&self, parts: &[Part]) -> Result<(), SystemError> {
        let kept = self.parts()?;
        let device = self.open(true)?;
        let wipe = || {
            for part in parts.iter().filter(|part| !kept.contains(part)) {
                let (start, length) = (part.start * SECTOR, part.sectors * SECTOR);
                let wipe = vec![0; usize::try_from(length).unwrap_or(WIPE).min(WIPE)];
                device.write_all_at(&wipe, start)?;
                device.write_all_at(&wipe, start + length - u64::try_from(wipe.len()).unwrap_or_default())?;
            }
            device.sync_all()
        };
        wipe().map_err(SystemError::io("partition", &self.device))?;
        self.put_table(parts)
    }

    /// Writes the table. A card that had one keeps its signature, which PARTUUIDs are made of.
    fn put_table(&self, parts: &[Part]) -> Result<(), SystemError> {
        let before = self.table()?;
        let mut device = self.open(true)?;
        let write = || -> std::io::Result<()> {
            let mut signature = [0; 4];
            getrandom::fill(&mut signature).map_err(std::io::Error::other)?;
            // A signature of zero would give every such card the same PARTUUIDs.
            if let Some(table) = before.filter(|table| table.header.disk_signature != [0; 4]) {
                signature = table.header.disk_signature;
            }
            let mut table = MBR::new_from(&mut device, 512, signature).map_err(std::io::Error::other)?;
            for part in parts {
                let entry = usize::try_from(part.number).ok().and_then(|number| table.get_mut(number));
                let number = |sectors: u64| u32::try_from(sectors).map_err(std::io::Error::other);
                if let Some(entry) = entry {
                    *entry = MBRPartitionEntry {
                        boot: BOOT_INACTIVE,
                        first_chs: CHS::empty(),
                        sys: part.kind,
                        last_chs: CHS::empty(),
                        starting_lba: number(part.start)?,
                        sectors: number(part.sectors)?,
                    };
                }
            }
            table.write_into(&mut device).map_err(std::io::Error::other)?;
            device.sync_all()
        };
        write().map_err(SystemError::io("partition", &self.device))
    }

    /// Makes a FAT on the partition of this erasure.
    pub(crate) async fn make_fat(&self, erasure: Erasure, label: &str, options: &[String]) -> Result<(), SystemError> {
        let device = self.partition(erasure.number());
        let device = device.to_string_lossy();
        let mut command = vec!["/sbin/mkfs.vfat", "-F", "32", "-n", label];
        command.extend(options.iter().map(String::as_str));
        command.push(&device);
        run(&command, MKFS_TIME).await
    }

    /// Makes a file system of one of the [`FILE_SYSTEMS`] on the partition of this erasure. Anything there is lost.
    pub(crate) async fn make(
        &self,
        erasure: Erasure,
        kind: &str,
        label: &str,
        options: &[String],
    ) -> Result<(), SystemError> {
        let program = FILE_SYSTEMS.iter().find(|(name, _)| *name == kind).map(|(_, program)| *program);
        let program = program.ok_or(SystemError::Unsupported("the installer does not make that file system"))?;
        let device = self.partition(erasure.number());
        let device = device.to_string_lossy();
        // Each program asks before it overwrites a file system, or refuses, unless it is forced.
        let mut command = match kind {
            "ext4" => vec![program, "-t", "ext4", "-F", "-q", "-L", label],
            "f2fs" => vec![program, "-f", "-l", label],
            _ => vec![program, "-f", "-L", label],
        };
        command.extend(options.iter().map(String::as_str));
        command.push(&device);
        run(&command, MKFS_TIME).await
    }

    /// Updates the kernel's list of partitions. The kernel never drops a mounted partition, so one must be where it
    /// was.
    fn tell_kernel(&self, parts: &[Part]) -> Result<(), SystemError> {
        // A file that stands for a disk in a test has no partitions in the kernel.
        let Some(name) = find::kernel_name(&self.device) else { return Ok(()) };
        let device = self.open(true)?;
        let shown = find::kernel_parts(&name);
        // Removed first: the kernel refuses a new partition that overlaps an old one.
        for old in &shown {
            let stays = parts
                .iter()
                .any(|part| part.number == old.number && part.start == old.start && part.sectors == old.sectors);
            if !stays {
                marco_syscalls::delete_partition(&device, old.number)
                    .map_err(SystemError::io("take the old partitions away from", &self.device))?;
            }
        }
        for part in parts {
            let seen = shown
                .iter()
                .any(|old| part.number == old.number && part.start == old.start && part.sectors == old.sectors);
            if !seen {
                marco_syscalls::add_partition(&device, part.number, part.start * SECTOR, part.sectors * SECTOR)
                    .map_err(SystemError::io("show the kernel the partitions of", &self.device))?;
            }
        }
        Ok(())
    }
}

/// Fills the buffer, or reads up to the end. Returns the bytes read.
fn fill(from: &File, buffer: &mut [u8], at: u64) -> std::io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match from.read_at(rest, at + u64::try_from(filled).unwrap_or_default())? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// The used entries among the four primary partitions.
fn parts(table: &MBR) -> Vec<Part> {
    let used = |(number, entry): (usize, &MBRPartitionEntry)| {
        // The table also lists logical partitions, from number 5 on. They are not supported.
        let number = u32::try_from(number).ok().filter(|number| *number <= 4 && entry.is_used())?;
        let (start, sectors) = (entry.starting_lba.into(), entry.sectors.into());
        Some(Part { number, kind: entry.sys, start, sectors })
    };
    table.iter().filter_map(used).collect()
}

/// The file system on a device by its magic number, as in mount(2). `None`: none that an installation makes.
/// [`probe::probe`] tells if the device is empty.
pub(crate) fn file_system(device: &Path) -> Result<Option<&'static str>, SystemError> {
    Ok(probe::look(device).map_err(SystemError::io("read", device))?.kind)
}

/// True if the beginning of a device holds no data.
pub(crate) fn is_blank(device: &Path) -> Result<bool, SystemError> {
    Ok(probe::look(device).map_err(SystemError::io("read", device))?.blank)
}

/// Access of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Reading only.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
}

/// Mounts a device by the file system that it holds. On a FAT only root can read, since it may hold the node's key.
pub(crate) fn mount(device: &Path, at: &Path, access: Access) -> Result<(), SystemError> {
    let kind = file_system(device)?.ok_or_else(|| {
        SystemError::Invalid(format!("there is no file system that can be mounted on {}", device.display()))
    })?;
    std::fs::create_dir_all(at).map_err(SystemError::io("make", at))?;
    let read_only = if access == Access::ReadOnly { MountFlags::RDONLY } else { MountFlags::empty() };
    let (flags, data) = match kind {
        "vfat" => (MountFlags::NOATIME | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, c"umask=0077"),
        _ => (MountFlags::NOATIME, c""),
    };
    rustix::mount::mount(device, at, kind, flags | read_only, Some(data))
        .map_err(|error| SystemError::io("mount", device)(error.into()))
}

/// Unmounts the file system at this folder. Does nothing if none is mounted.
pub(crate) fn unmount(at: &Path) -> Result<(), SystemError> {
    match rustix::mount::unmount(at, UnmountFlags::empty()) {
        // EINVAL: not a mount point.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(SystemError::io("unmount", at)(error.into())),
    }
}

/// Writes the mounted file system to its device and makes it read-only.
pub(crate) fn make_read_only(at: &Path) -> Result<(), SystemError> {
    remount(at, Access::ReadOnly)
}

/// Makes a mounted file system writable again.
pub(crate) fn make_writable(at: &Path) -> Result<(), SystemError> {
    remount(at, Access::ReadWrite)
}

fn remount(at: &Path, access: Access) -> Result<(), SystemError> {
    // A remount replaces all flags, so those of the mount are repeated.
    let mut flags = MountFlags::NOATIME | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    if access == Access::ReadOnly {
        flags |= MountFlags::RDONLY;
    }
    rustix::mount::mount_remount(at, flags, c"").map_err(|error| SystemError::io("mount again", at)(error.into()))
}

#[cfg(test)]
pub(super) mod tests;
