//! Sources of a system: a folder, or the partitions of a card, a device or an image file. Nothing is written to them.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, openat2, statat};

use super::boot::{Boot, fstab_boot};
use super::device::{Place, device_of};
use super::mounted::Mounted;
use super::table::{FileSystem, Partition, partitions};

/// Usual mount points of a boot partition, for a system without an entry in fstab.
const BOOT: [&str; 2] = ["boot/firmware", "boot"];

/// A readable root.
#[derive(Debug)]
pub(super) struct Source {
    /// Path for reading.
    pub(super) root: PathBuf,
    /// Path for messages. Paths below it are joined to it.
    pub(super) shown: PathBuf,
    /// Boot partition that replaces one of the root's folders. `None`: it is part of the root, or not found.
    pub(super) boot: Option<Boot>,
    /// Things on the card that are not packed.
    pub(super) left_out: Vec<String>,
    /// Keeps the root mounted while it is read.
    _mounted: Option<Mounted>,
}

impl Source {
    /// Detects the kind of source and finds the system in it.
    pub(super) async fn open(path: &Path) -> Result<Self> {
        let facts = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        let kind = facts.file_type();
        if kind.is_dir() {
            let (root, shown) = (path.to_owned(), path.to_owned());
            return Ok(Self { root, shown, boot: None, left_out: Vec::new(), _mounted: None });
        }
        if !kind.is_file() && !kind.is_block_device() {
            bail!("{} is neither a folder nor a disk nor an image of one", path.display());
        }
        let disk = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let partitions = partitions(&disk).with_context(|| format!("cannot pack {}", path.display()))?;
        Self::find(path, &disk, partitions).await
    }

    async fn find(path: &Path, disk: &File, partitions: Vec<Partition>) -> Result<Self> {
        let mut seen = Vec::new();
        for partition in partitions.iter().filter(|partition| partition.file_system.is_roots()) {
            let shown = partition.shown(path);
            let place = Place { path, disk, partition };
            // Mounted by the kernel, because only it knows all file systems of a root (docs/decisions/0032).
            let mounted = Mounted::new(&place).await.with_context(|| format!("cannot read {shown}"))?;
            // A data partition may also be ext4. A root has the folders etc and usr.
            if !is_system(&mounted) {
                seen.push(shown);
                continue;
            }
            let (boot, notes) = boot(path, disk, &partitions, &mounted)?;
            let mut left_out = notes;
            let number = |boot: &Boot| boot.number;
            for other in &partitions {
                if other.number != partition.number && boot.as_ref().map(number) != Some(other.number) {
                    left_out.push(format!("{}: another partition ({})", other.shown(path), other.file_system));
                }
            }
            // The mount has no path in the file tree; its descriptor does.
            let root = PathBuf::from(format!("/proc/self/fd/{}", mounted.as_raw_fd()));
            return Ok(Self { root, shown: PathBuf::from(shown), boot, left_out, _mounted: Some(mounted) });
        }
        let seen = if seen.is_empty() { String::new() } else { format!(": none is on {}", seen.join(", ")) };
        bail!("there is no system (folders etc and usr) on {}{seen}", path.display());
    }
}

/// Returns true if a system's root is mounted there.
fn is_system(root: &Mounted) -> bool {
    ["etc", "usr"].into_iter().all(|name| is_folder(root, name))
}

fn is_folder(root: &Mounted, name: &str) -> bool {
    // Not through links: an absolute one would lead to a folder of this machine.
    statat(root, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|facts| FileType::from_raw_mode(facts.st_mode).is_dir())
}

/// Finds the system's boot partition: the one that its fstab mounts, else the only FAT other than the recovery
/// partition.
fn boot(path: &Path, disk: &File, partitions: &[Partition], root: &Mounted) -> Result<(Option<Boot>, Vec<String>)> {
    let fats: Vec<&Partition> =
        partitions.iter().filter(|partition| matches!(partition.file_system, FileSystem::Fat { .. })).collect();
    let named = fstab_boot(&fstab(root), &fats);
    let guessed = || {
        let mut others = fats.iter().copied().filter(|fat| !fat.is_recovery());
        others.next().filter(|_| others.next().is_none())
    };
    let Some(partition) = named.as_ref().and_then(|named| named.partition).or_else(guessed) else {
        let note = if fats.is_empty() { "there is none here" } else { "it is not clear which one it is" };
        return Ok((None, vec![format!("the boot partition: {note}")]));
    };
    let usual = || BOOT.into_iter().find(|folder| is_folder(root, folder)).map(str::to_owned);
    let Some(at) = named.map(|named| named.at).filter(|at| is_folder(root, at)).or_else(usual) else {
        return Ok((None, vec![format!("{}: the system has no folder boot for it", partition.shown(path))]));
    };
    let shown = partition.shown(path);
    // The partition's own device, if it has one: writes through a mount go through that device's cache, not the disk's.
    let own = device_of(&Place { path, disk, partition }).with_context(|| format!("cannot read {shown}"))?;
    let boot = match own {
        Some(device) => {
            let own = File::open(&device).with_context(|| format!("cannot read {}", device.display()))?;
            Boot::new(own, 0, partition, &at, shown)
        }
        None => Boot::new(disk.try_clone()?, partition.start, partition, &at, shown),
    };
    Ok((Some(boot), Vec::new()))
}

/// Reads the system's fstab. Empty if it cannot be read. A link cannot lead out of the system.
fn fstab(root: &Mounted) -> String {
    let opened = openat2(root, "etc/fstab", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT);
    opened.ok().and_then(|file| std::io::read_to_string(File::from(file)).ok()).unwrap_or_default()
}
