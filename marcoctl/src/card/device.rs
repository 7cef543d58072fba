//! Inspects the target of a card: its kind, its contents, and signs that it is in use.

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{major, minor};

use crate::output::{bytes, clean};

/// The target of a card.
#[derive(Debug)]
pub(crate) enum Target {
    /// A whole device.
    Device {
        /// Model, size and partitions, for people.
        description: String,
    },
    /// An image file.
    File {
        /// True if the file exists already.
        exists: bool,
    },
}

/// Inspects a target. Refuses one that must not be written.
pub(crate) fn inspect(path: &Path) -> Result<Target> {
    let facts = match fs::metadata(path) {
        Ok(facts) => facts,
        // A missing path below /dev is a typing error, not a new image file.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !path.starts_with("/dev") => {
            return Ok(Target::File { exists: false });
        }
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
    };
    if facts.is_file() {
        return Ok(Target::File { exists: true });
    }
    if !facts.file_type().is_block_device() {
        bail!("{} is neither a disk nor a file", path.display());
    }
    let number = (major(facts.rdev()), minor(facts.rdev()));
    let place = PathBuf::from(format!("/sys/dev/block/{}:{}", number.0, number.1));
    let folder = fs::canonicalize(&place).with_context(|| format!("cannot look at {}", place.display()))?;
    // A partition has this file in sysfs, a whole disk does not.
    if folder.join("partition").exists() {
        let whole = folder.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        bail!("{} is a partition: a card is written whole, perhaps /dev/{whole}", path.display());
    }
    if word(&folder.join("ro")) == "1" {
        bail!("{} is write-protected: look for the little switch on the card's adapter", path.display());
    }
    // A card reader without a card is a device of size 0.
    if word(&folder.join("size")) == "0" {
        bail!("there is no card in {}", path.display());
    }
    let partitions = partitions(&folder);
    let mut all = vec![(folder.clone(), number)];
    all.extend(partitions.iter().map(|folder| (folder.clone(), device_number(&folder.join("dev")))));
    for (folder, number) in &all {
        refuse_when_used(folder, *number)?;
    }
    Ok(Target::Device { description: describe(path, &folder, &partitions) })
}

/// Returns the sysfs folders of a disk's partitions, sorted by name.
pub(crate) fn partitions(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut partitions: Vec<PathBuf> = entries.filter(|path| path.join("partition").exists()).collect();
    partitions.sort();
    partitions
}

/// Refuses a device that is mounted, used as swap space, or part of a larger device (RAID, LVM, encryption).
fn refuse_when_used(folder: &Path, number: (u32, u32)) -> Result<()> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    if let Some(at) = mounted_at(&mounts, number, |source| number_of(source) == Some(number)) {
        // For the disk of the running system, "unmount it first" would be bad advice.
        let system = if at == "/" { ": it holds the system that runs here" } else { ": unmount it first" };
        bail!("/dev/{name} is mounted at {}{system}", clean(&at));
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()).any(|at| number_of(at) == Some(number)) {
        bail!("/dev/{name} is swap space in use");
    }
    // sysfs lists the device mapper and RAID devices that use it.
    let holder = fs::read_dir(folder.join("holders")).into_iter().flatten().find_map(Result::ok);
    if let Some(holder) = holder {
        bail!("/dev/{name} is part of /dev/{}, which is in use", holder.file_name().to_string_lossy());
    }
    Ok(())
}

/// Finds the mount point of a device in the kernel's list (proc(5)). The device is matched by number, or by source name
/// for file systems with numbers of their own, such as btrfs.
pub(crate) fn mounted_at(mounts: &str, number: (u32, u32), is_source: impl Fn(&str) -> bool) -> Option<String> {
    let text = format!("{}:{}", number.0, number.1);
    mounts.lines().find_map(|line| {
        let (first, last) = line.split_once(" - ")?;
        let mut fields = first.split(' ').skip(2);
        let (device, at) = (fields.next()?, fields.nth(1)?);
        let source = last.split(' ').nth(1)?;
        (device == text || source.starts_with("/dev/") && is_source(source)).then(|| at.to_owned())
    })
}

fn number_of(path: &str) -> Option<(u32, u32)> {
    let facts = fs::metadata(path).ok().filter(|facts| facts.file_type().is_block_device())?;
    Some((major(facts.rdev()), minor(facts.rdev())))
}

/// Parses the device number in a file `dev` of sysfs.
pub(crate) fn device_number(file: &Path) -> (u32, u32) {
    let text = word(file);
    let (major, minor) = text.split_once(':').unwrap_or_default();
    (major.parse().unwrap_or(u32::MAX), minor.parse().unwrap_or(u32::MAX))
}

/// Reads a file of sysfs without surrounding blanks. Empty if it does not exist.
pub(crate) fn word(file: &Path) -> String {
    fs::read_to_string(file).map(|text| text.trim().to_owned()).unwrap_or_default()
}

fn describe(path: &Path, folder: &Path, partitions: &[PathBuf]) -> String {
    let sectors = |folder: &Path| word(&folder.join("size")).parse::<u64>().unwrap_or_default();
    let model = ["device/vendor", "device/model", "device/name"].iter().map(|file| word(&folder.join(file)));
    let model: Vec<String> = model.filter(|text| !text.is_empty()).collect();
    let model = if model.is_empty() { "no model known".to_owned() } else { model.join(" ") };
    // Only a remark: a card in a built-in slot (mmcblk) is not removable either.
    let fixed = if word(&folder.join("removable")) == "0" { ", not removable" } else { "" };
    let mut text =
        format!("{}: {}, {}{fixed}\n", path.display(), clean(&model), bytes(sectors(folder).saturating_mul(512)));
    if partitions.is_empty() {
        text.push_str("  no partitions\n");
    }
    for partition in partitions {
        let name = partition.file_name().unwrap_or_default().to_string_lossy();
        let label = label(&Path::new("/dev").join(&*name)).unwrap_or_default();
        let size = bytes(sectors(partition).saturating_mul(512));
        text.push_str(format!("  {name}  {size}  {}\n", clean(&label)).replace("  \n", "\n").as_str());
    }
    text
}

/// Reads the label of a FAT32 or ext file system.
fn label(device: &Path) -> Option<String> {
    let mut start = [0; 2048];
    let mut file = fs::File::open(device).ok()?;
    file.seek(SeekFrom::Start(0)).ok()?;
    file.read_exact(&mut start).ok()?;
    let field = |at: usize, length: usize| {
        let text = start.get(at..at + length)?.split(|&byte| byte == 0).next()?;
        Some(String::from_utf8_lossy(text).trim().to_owned())
    };
    if start.get(82..87) == Some(b"FAT32") {
        return field(71, 11).map(|label| format!("FAT {label}"));
    }
    (start.get(1080..1082) == Some(&[0x53, 0xef]))
        .then(|| field(1144, 16))
        .flatten()
        .map(|label| format!("ext {label}"))
}

#[cfg(test)]
mod tests {
    use super::mounted_at;

    const MOUNTS: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:31 / /home rw - btrfs /dev/sdb2 rw
31 22 179:1 / /media/card rw - vfat /dev/mmcblk0p1 rw
";

    #[test]
    fn a_mounted_device_is_found_by_number_or_by_name() {
        assert_eq!(mounted_at(MOUNTS, (8, 1), |_| false).as_deref(), Some("/"));
        assert_eq!(mounted_at(MOUNTS, (179, 1), |_| false).as_deref(), Some("/media/card"));
        assert_eq!(mounted_at(MOUNTS, (8, 18), |source| source == "/dev/sdb2").as_deref(), Some("/home"));
        assert_eq!(mounted_at(MOUNTS, (8, 2), |_| false), None);
    }
}
