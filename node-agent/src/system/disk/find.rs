//! Finds the card from the kernel's `/sys/class/block` and `/proc/self/mountinfo`.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::plan::Part;
use super::{Access, Disk, RECOVERY_LABEL, file_system, mount, unmount};
use crate::bootpart::BootPart;
use crate::system::{Board, Refusal};

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

/// The card: the disk with a FAT as first partition that is labelled RECOVERY or, if no disk has the label, the first that
/// holds a folder `marco`. `scratch` is a folder to mount a candidate at.
///
/// # Errors
/// Returns an error if several disks have the label, and no job tells for which one this installer was started.
pub(crate) fn card(scratch: &Path) -> Result<Option<Disk>, Refusal> {
    // Labels first: reading one needs no mount of a stranger's file system.
    let mut labelled = labelled();
    if labelled.len() > 1 {
        let named = labelled.into_iter().map(|disk| {
            let named = named_by_job(&disk.partition(1), scratch);
            (disk, named)
        });
        return started_for(named.collect()).map(Some);
    }
    Ok(labelled.pop().or_else(|| fats().find(|disk| has_marco(&disk.partition(1), scratch))))
}

fn fats() -> impl Iterator<Item = Disk> {
    disks().into_iter().filter(|disk| matches!(file_system(&disk.partition(1)), Ok(Some("vfat"))))
}

fn labelled() -> Vec<Disk> {
    fats().filter(|disk| label(&disk.partition(1)).as_deref() == Some(RECOVERY_LABEL)).collect()
}

/// The signature of this disk, for a job on it, if other disks could be taken for it. `None`: there is no other, and
/// installers that refuse unknown fields can do the job.
pub(crate) fn to_be_named(disk: &Disk) -> Option<String> {
    let mut others = labelled().into_iter().filter(|other| other != disk);
    others.next().and_then(|_| disk.signature())
}

/// Selects the one disk whose own job names it. The others may hold stale jobs, and systems that are somebody else's.
fn started_for(labelled: Vec<(Disk, Option<String>)>) -> Result<Disk, Refusal> {
    let devices: Vec<String> = labelled.iter().map(|(disk, _)| disk.device.display().to_string()).collect();
    let ours = |(disk, named): &(Disk, Option<String>)| named.is_some() && *named == disk.signature();
    let mut found = labelled.into_iter().filter(ours).map(|(disk, _)| disk);
    match (found.next(), found.next()) {
        (Some(disk), None) => Ok(disk),
        _ => {
            let message = format!(
                "{} are all labelled {RECOVERY_LABEL}, and no job tells which of them this installer was started for: \
                 leave only one of them plugged in",
                devices.join(" and ")
            );
            Err(Refusal { reason: "CARD_AMBIGUOUS", message })
        }
    }
}

/// The signature that the job on this recovery partition names. `None`: there is no job, or it names none.
fn named_by_job(device: &Path, scratch: &Path) -> Option<String> {
    if let Err(error) = mount(device, scratch, Access::ReadOnly) {
        tracing::debug!(device = %device.display(), error = %crate::cause::chain(&error), "not mounted for a look");
        return None;
    }
    let job = BootPart::new(scratch, &Board::default()).read_job();
    let _ = unmount(scratch);
    job.ok().flatten()?.disk
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
    use std::path::Path;

    use super::{point, started_for};
    use crate::settings::Settings;
    use crate::system::disk::Disk;

    /// A card in a file, and its signature.
    fn card(folder: &Path, name: &str) -> (Disk, String) {
        let device = folder.join(name);
        std::fs::File::create(&device).unwrap().set_len(1 << 30).unwrap();
        let disk = Disk { device };
        let settings: Settings = toml::from_str("boot.size = \"64MiB\"").unwrap();
        disk.partition_resident(&settings).unwrap();
        let signature = disk.signature().unwrap();
        (disk, signature)
    }

    #[test]
    fn of_several_cards_the_one_that_its_job_names_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let ((old, of_old), (new, of_new)) = (card(dir.path(), "mmcblk0"), card(dir.path(), "sda"));
        let found = |in_old: Option<&String>, in_new: Option<&String>| {
            started_for(vec![(old.clone(), in_old.cloned()), (new.clone(), in_new.cloned())])
        };
        assert_eq!(found(None, Some(&of_new)).unwrap(), new);
        // A stale job that was copied along with its card names another disk.
        assert_eq!(found(Some(&of_new), Some(&of_new)).unwrap(), new);
        for (in_old, in_new) in [(None, None), (Some(&of_new), None), (Some(&of_old), Some(&of_new))] {
            let refusal = found(in_old, in_new).unwrap_err();
            assert_eq!(refusal.reason, "CARD_AMBIGUOUS");
            assert!(refusal.message.contains("mmcblk0 and ") && refusal.message.contains("sda"), "{}", refusal.message);
        }
    }

    #[test]
    fn a_mount_point_is_found_by_its_device() {
        let table = "22 1 179:2 / / rw,noatime shared:1 - ext4 /dev/root rw\n\
                     40 22 179:4 /sub /srv rw - vfat /dev/mmcblk0p4 rw\n\
                     41 22 179:4 / /boot/firm\\040ware rw - vfat /dev/mmcblk0p4 rw\n";
        assert_eq!(point(table, "179:4").unwrap().to_str(), Some("/boot/firm ware"));
        assert_eq!(point(table, "179:3"), None);
    }
}
