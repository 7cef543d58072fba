//! Finds the card from the kernel's `/sys/class/block` and `/proc/self/mountinfo`.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::plan::Part;
use super::{Access, Disk, RECOVERY_LABEL, file_system, mount, unmount};

const BLOCK: &str = "/sys/class/block";

/// Whole disks with a device behind them. Cards come before USB disks, USB disks before others; then by name.
pub(crate) fn disks() -> Vec<Disk> {
    let mut names: Vec<String> = names().into_iter().filter(|name| is_disk(name)).collect();
    names.sort_by_key(|name| (!name.starts_with("mmcblk"), !name.starts_with("sd"), name.clone()));
    names.into_iter().map(|name| Disk { device: Path::new("/dev").join(name) }).collect()
}

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(BLOCK).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn is_disk(name: &str) -> bool {
    let folder = Path::new(BLOCK).join(name);
    // An eMMC also shows its own boot areas as disks.
    let area = name.starts_with("mmcblk") && (name.contains("boot") || name.contains("rpmb"));
    !area && !folder.join("partition").exists() && folder.join("device").exists() && number(&folder, "size") > 0
}

fn number(folder: &Path, file: &str) -> u64 {
    let text = std::fs::read_to_string(folder.join(file)).unwrap_or_default();
    text.trim().parse().unwrap_or_default()
}

/// The kernel's name of a block device. `None`: not a block device.
pub(super) fn kernel_name(device: &Path) -> Option<String> {
    let found = std::fs::metadata(device).ok()?;
    found.file_type().is_block_device().then(|| name_of(found.rdev()))?
}

fn name_of(device: u64) -> Option<String> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let link = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    Some(link.file_name()?.to_str()?.to_owned())
}

/// The partitions of a disk as the kernel lists them. Their types are not known there: `kind` is 0.
pub(super) fn kernel_parts(disk: &str) -> Vec<Part> {
    let folder = std::fs::canonicalize(Path::new(BLOCK).join(disk)).unwrap_or_default();
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let parts = entries.filter(|path| path.join("partition").exists());
    let part = |path: PathBuf| Part {
        number: u32::try_from(number(&path, "partition")).unwrap_or_default(),
        kind: 0,
        start: number(&path, "start"),
        sectors: number(&path, "size"),
    };
    parts.map(part).collect()
}

/// The card: the first disk with a FAT as first partition that is labelled RECOVERY or, if no disk has the label, holds
/// a folder `marco`. `scratch` is a folder to mount a candidate at.
pub(crate) fn card(scratch: &Path) -> Option<Disk> {
    let candidates: Vec<Disk> =
        disks().into_iter().filter(|disk| matches!(file_system(&disk.partition(1)), Ok(Some("vfat")))).collect();
    // Labels first: reading one needs no mount of a stranger's file system.
    let labelled = candidates.iter().find(|disk| label(&disk.partition(1)).as_deref() == Some(RECOVERY_LABEL));
    labelled.or_else(|| candidates.iter().find(|disk| has_marco(&disk.partition(1), scratch))).cloned()
}

fn has_marco(device: &Path, scratch: &Path) -> bool {
    if let Err(error) = mount(device, scratch, Access::ReadOnly) {
        tracing::debug!(device = %device.display(), error = %crate::cause::chain(&error), "not mounted for a look");
        return false;
    }
    let has = scratch.join("marco").is_dir();
    let _ = unmount(scratch);
    has
}

/// The label in a FAT's boot sector.
pub(crate) fn label(device: &Path) -> Option<String> {
    let mut sector = [0; 512];
    File::open(device).ok()?.read_exact(&mut sector).ok()?;
    // FAT32 has a longer parameter block, so the label lies further behind.
    let place = if sector.get(82..87) == Some(b"FAT32") { 71 } else { 43 };
    let label = sector.get(place..place + 11)?;
    Some(String::from_utf8_lossy(label).trim_end().to_owned())
}

/// The disk of the root file system. `None`: the root is not on a partition.
pub(crate) fn disk_of_root() -> Option<Disk> {
    partition_of("/").map(|(disk, _)| disk)
}

/// The disk of the file system at this path, and its partition's number. `None`: it is not on a partition.
pub(crate) fn partition_of(path: &str) -> Option<(Disk, u32)> {
    let name = name_of(std::fs::metadata(path).ok()?.dev())?;
    let folder = std::fs::canonicalize(Path::new(BLOCK).join(&name)).ok()?;
    if !folder.join("partition").exists() {
        return None;
    }
    let disk = folder.parent()?.file_name()?.to_str()?.to_owned();
    let partition = u32::try_from(number(&folder, "partition")).ok()?;
    Some((Disk { device: Path::new("/dev").join(disk) }, partition))
}

/// Mount point of a device. `None`: not mounted.
pub(crate) fn mounted_at(device: &Path) -> Option<PathBuf> {
    let rdev = std::fs::metadata(device).ok()?.rdev();
    let wanted = format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    point(&table, &wanted)
}

/// Mount point of the whole file system on `device` (major:minor), by proc_pid_mountinfo(5).
fn point(table: &str, device: &str) -> Option<PathBuf> {
    table.lines().find_map(|line| {
        let mut words = line.split(' ').skip(2);
        let (found, root, point) = (words.next()?, words.next()?, words.next()?);
        // A bind mount of a subfolder does not show the whole file system.
        (found == device && root == "/").then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::point;

    #[test]
    fn a_mount_point_is_found_by_its_device() {
        let table = "22 1 179:2 / / rw,noatime shared:1 - ext4 /dev/root rw\n\
                     40 22 179:4 /sub /srv rw - vfat /dev/mmcblk0p4 rw\n\
                     41 22 179:4 / /boot/firm\\040ware rw - vfat /dev/mmcblk0p4 rw\n";
        assert_eq!(point(table, "179:4").unwrap().to_str(), Some("/boot/firm ware"));
        assert_eq!(point(table, "179:3"), None);
    }
}
