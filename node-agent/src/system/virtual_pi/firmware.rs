//! The firmware of a Raspberry Pi as a pure function of its boot partitions. It decides which partition boots and from
//! which files, and reports silent mixes of two sets. The rules are those of the vendor's documentation of
//! `autoboot.txt`, `config.txt` and `tryboot` (<https://www.raspberrypi.com/documentation/computers/config_txt.html>).
//! Where the real one would try other boot devices or guess, this one is dead: a card that only boots by luck should
//! fail in a test.

use std::path::{Path, PathBuf};
use std::time::Duration;

use marco_archive::config_txt::{Conditions, ConfigTxt, Setting};

use crate::bootpart::render::kernels;

/// Differences between boards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// Name of its filter in `config.txt`. Its kernels' names follow from it.
    pub family: &'static str,
    /// Device tree that it loads by default. `None`: the machine brings its own.
    pub device_tree: Option<&'static str>,
}

/// A Raspberry Pi 4 B.
pub const PI_4: Model = Model { family: "pi4", device_tree: Some("bcm2711-rpi-4-b.dtb") };
/// Bytes that the firmware reads of `autoboot.txt` and of a command line.
const SHORT_FILE: usize = 512;
/// Partition that boots by default: the first FAT of the card.
const FIRST: u32 = 1;

/// Mount points of the card's FAT partitions.
#[derive(Debug, Clone, Copy)]
pub struct Partitions<'a> {
    /// Partition 1.
    pub recovery: &'a Path,
    /// Partition 4.
    pub boot: &'a Path,
}

impl Partitions<'_> {
    fn get(&self, number: u32) -> Option<&Path> {
        match number {
            1 => Some(self.recovery),
            4 => Some(self.boot),
            _ => None,
        }
    }
}

/// Result of a boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// A kernel started.
    Booted(Boot),
    /// No kernel started, for this reason. The board hangs until its watchdog resets it.
    Dead(String),
}

/// A started kernel and its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// Number of the partition.
    pub partition: u32,
    /// True for a trial boot. The flag is cleared by now.
    pub tryboot: bool,
    /// The `os_prefix` in force. Empty: none, or it was ignored.
    pub prefix: String,
    /// The kernel's path within the partition.
    pub kernel: PathBuf,
    /// The command line, trimmed.
    pub cmdline: String,
    /// The device tree's path within the partition. `None`: the board loads none.
    pub device_tree: Option<PathBuf>,
    /// Paths of the initial RAM file systems within the partition.
    pub initramfs: Vec<PathBuf>,
    /// Time after which the watchdog that the firmware starts resets a kernel that does not take it over. `None`: it starts
    /// none.
    pub watchdog: Option<Duration>,
    /// Silent mixes of two sets of boot files.
    pub mixed: Vec<Mixed>,
}

/// A silent mix of two sets of boot files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mixed {
    /// Kernel or device tree are missing under the prefix, so everything came from the partition's root.
    PrefixIgnored,
    /// The prefix has no `overlays/README`, so the overlays came from the partition's root.
    OverlaysFromRoot,
}

/// Boots with the trial flag of the last reset. The flag is one-shot: the caller clears it after either result.
pub fn boot(model: &Model, partitions: Partitions<'_>, tryboot: bool) -> Outcome {
    match try_boot(model, partitions, tryboot) {
        Ok(boot) => Outcome::Booted(boot),
        Err(reason) => Outcome::Dead(reason),
    }
}

fn try_boot(model: &Model, partitions: Partitions<'_>, tryboot: bool) -> Result<Boot, String> {
    let mut conditions = Conditions { models: vec![model.family.to_owned()], tryboot, boot_partition: None };
    // A missing, unreadable or torn file counts as empty: the first FAT boots.
    let autoboot = ConfigTxt::parse(&read_short(&partitions.recovery.join("autoboot.txt")).unwrap_or_default());
    let partition = match autoboot.get("boot_partition", &conditions).map(str::trim) {
        None | Some("" | "0") => FIRST,
        Some(number) => number.parse().map_err(|_| format!("boot_partition={number:?} is no number"))?,
    };
    let root = partitions.get(partition).ok_or_else(|| format!("partition {partition} is not FAT"))?;
    conditions.boot_partition = Some(partition);

    // With `tryboot_a_b` the trial selects another partition, without it another file.
    let whole_partition_trial = autoboot.get("tryboot_a_b", &conditions).map(str::trim) == Some("1");
    let name = if tryboot && !whole_partition_trial { "tryboot.txt" } else { "config.txt" };
    let text = std::fs::read(root.join(name)).map_err(|_| format!("partition {partition} has no {name}"))?;
    let config = ConfigTxt::parse(&String::from_utf8_lossy(&text));
    let get = |key| config.get(key, &conditions).map(str::trim);

    let device_tree = get("device_tree").filter(|name| !name.is_empty()).or(model.device_tree);
    let has_device_tree = |prefix| device_tree.is_none_or(|name| is_file(root, prefix, name));

    let mut mixed = Vec::new();
    // As the real firmware: an incomplete prefix is ignored silently, and everything comes from the root.
    let mut prefix = get("os_prefix").unwrap_or_default();
    if !prefix.is_empty() && (kernel(model, root, prefix, get).is_none() || !has_device_tree(prefix)) {
        prefix = "";
        mixed.push(Mixed::PrefixIgnored);
    }
    if !prefix.is_empty() && !is_file(root, prefix, "overlays/README") {
        mixed.push(Mixed::OverlaysFromRoot);
    }
    let kernel = kernel(model, root, prefix, get).ok_or_else(|| format!("partition {partition} has no kernel"))?;
    if let Some(missing) = device_tree.filter(|name| !is_file(root, prefix, name)) {
        return Err(format!("partition {partition} has no {missing}"));
    }
    let cmdline = read_short(&root.join(format!("{prefix}{}", get("cmdline").unwrap_or("cmdline.txt"))))
        .ok_or_else(|| format!("partition {partition} has no command line"))?;
    let loads = |setting: &&Setting| ["initramfs", "ramfsfile"].contains(&setting.key.as_str());
    // The last line that applies wins, as for every other key.
    let initramfs = config.settings().iter().rev().filter(loads).find(|setting| setting.applies(&conditions));
    let files = initramfs.and_then(|setting| setting.value.split_whitespace().next()).unwrap_or_default();
    let files = files.split(',').filter(|file| !file.is_empty());
    let initramfs: Vec<PathBuf> = files.map(|file| PathBuf::from(format!("{prefix}{file}"))).collect();
    if let Some(missing) = initramfs.iter().find(|file| !root.join(file).is_file()) {
        return Err(format!("partition {partition} has no {}", missing.display()));
    }
    let device_tree = device_tree.map(|name| PathBuf::from(format!("{prefix}{name}")));
    let (prefix, cmdline) = (prefix.to_owned(), cmdline.trim().to_owned());
    let watchdog =
        get("kernel_watchdog_timeout").and_then(|seconds| seconds.parse().ok()).filter(|seconds| *seconds > 0);
    let watchdog = watchdog.map(Duration::from_secs);
    // The firmware tells the kernel of it. Its own words come before those of the file.
    let cmdline = match watchdog {
        Some(limit) => format!("watchdog.open_timeout={} {cmdline}", limit.as_secs()),
        None => cmdline,
    };
    Ok(Boot { partition, tryboot, prefix, kernel, cmdline, device_tree, initramfs, watchdog, mixed })
}

fn kernel<'a>(
    model: &Model,
    root: &Path,
    prefix: &str,
    get: impl Fn(&'static str) -> Option<&'a str>,
) -> Option<PathBuf> {
    let path = |name: &str| is_file(root, prefix, name).then(|| PathBuf::from(format!("{prefix}{name}")));
    if let Some(name) = get("kernel").filter(|name| !name.is_empty()) {
        return path(name);
    }
    let names = kernels(model.family).iter().filter(|name| !(get("arm_64bit") == Some("0") && **name == "kernel8.img"));
    names.copied().find_map(path)
}

/// True if the file exists and is not empty. The prefix is put before the name unchanged, as the firmware does.
fn is_file(root: &Path, prefix: &str, name: &str) -> bool {
    root.join(format!("{prefix}{name}")).metadata().is_ok_and(|file| file.is_file() && file.len() > 0)
}

fn read_short(path: &Path) -> Option<String> {
    let mut bytes = std::fs::read(path).ok()?;
    bytes.truncate(SHORT_FILE);
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests;
