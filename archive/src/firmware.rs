//! Determines the files that the firmware loads from a boot partition: kernel, command line and device tree, with or
//! without an `os_prefix`. Push, agent and installer all use this module, so their answers cannot differ.
//!
//! Source: <https://www.raspberrypi.com/documentation/computers/config_txt.html>

use crate::config_txt::{Conditions, ConfigTxt};

/// Maximum depth of nested `include` lines.
const INCLUDES: u32 = 8;
/// Names of the board families in the filters of `config.txt`.
pub const FAMILIES: [&str; 5] = ["pi1", "pi2", "pi3", "pi4", "pi5"];

/// Mount point of the boot partition in a system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootMount {
    /// `/boot/firmware`: Debian since version 12.
    Firmware,
    /// `/boot`: Arch Linux ARM, and Raspberry Pi OS before Debian 12.
    Boot,
}

impl BootMount {
    /// Both mount points, the newer one first.
    pub const ALL: [Self; 2] = [Self::Firmware, Self::Boot];

    /// Path of the folder relative to the root.
    pub const fn folder(self) -> &'static str {
        match self {
            Self::Firmware => "boot/firmware",
            Self::Boot => "boot",
        }
    }

    /// Absolute path, as written in fstab.
    pub const fn mount_point(self) -> &'static str {
        match self {
            Self::Firmware => "/boot/firmware",
            Self::Boot => "/boot",
        }
    }

    /// Returns the mount point of the vfat file system in an fstab, or `None` if it has none at either place.
    pub fn of_fstab(fstab: &str) -> Option<Self> {
        let lines = fstab.lines().filter(|line| !line.trim_start().starts_with('#'));
        let vfat: Vec<&str> = lines
            .filter_map(|line| {
                // The device is not checked: the installer replaces it anyway. The type and the place identify the
                // entry.
                let mut words = line.split_whitespace().skip(1);
                let point = words.next()?;
                (words.next()? == "vfat").then(|| point.strip_suffix('/').unwrap_or(point))
            })
            .collect();
        Self::ALL.into_iter().find(|mount| vfat.contains(&mount.mount_point()))
    }

    /// Chooses the folder of a root that becomes the boot partition. The folder mounted by the root's fstab comes
    /// first, then the other one. Folders without boot files are skipped. If both have some, the first one that is
    /// `whole` wins.
    pub fn choose<'a, F: BootFiles>(
        fstab: &str,
        folders: &'a [(Self, F)],
        whole: impl Fn(&F) -> bool,
    ) -> Option<&'a (Self, F)> {
        let named = Self::of_fstab(fstab);
        let mut bootable: Vec<&(Self, F)> = folders.iter().filter(|(_, files)| is_bootable(files)).collect();
        bootable.sort_by_key(|(mount, _)| Some(*mount) != named);
        bootable.iter().find(|(_, files)| whole(files)).or(bootable.first()).copied()
    }
}

/// Normalises the name of a boot file for lookups. FAT ignores case, and empty or `.` parts have no effect. Prefixes
/// are written in many ways (`current/`, `./current//`, `Current/`).
pub fn lookup(name: &str) -> String {
    let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    parts.join("/").to_lowercase()
}

/// The files of a boot partition, or of the folder that becomes one. Names are normalised by [`lookup`].
pub trait BootFiles {
    /// Returns true if a file of this name exists and is not empty.
    fn has(&self, name: &str) -> bool;

    /// Returns the text of a file. `None`: it does not exist or cannot be read.
    fn text(&self, name: &str) -> Option<String>;
}

/// The default device tree of a board, used unless `device_tree=` names another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tree<'a> {
    /// The name of the board's file.
    Named(&'a str),
    /// The board needs a file, but the set has none for it.
    Missing,
    /// The board's model is not known, so no tree is required.
    Unknown,
}

/// The files that the firmware loads, and the files that it needs but does not find.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// The effective `os_prefix`. Empty: not set, or ignored by the firmware.
    pub prefix: String,
    /// Name of the kernel, relative to the prefix. `None`: missing.
    pub kernel: Option<String>,
    /// Name of the command line's file, with the prefix.
    pub cmdline: String,
    /// Name of the device tree, relative to the prefix. `None`: missing or not needed.
    pub device_tree: Option<String>,
    /// Descriptions of the missing files, for messages.
    pub lacks: Vec<String>,
}

/// Returns the kernels that the firmware of a board family tries, in order, unless `kernel=` names one.
pub fn kernels(family: &str) -> &'static [&'static str] {
    match family {
        "pi1" => &["kernel.img"],
        "pi2" => &["kernel7.img", "kernel.img"],
        "pi5" => &["kernel_2712.img", "kernel8.img"],
        _ => &["kernel8.img", "kernel7l.img", "kernel7.img", "kernel.img"],
    }
}

/// Returns the default device tree of a board by family and model. `None`: the family is not known.
pub fn device_tree(family: &str, model: &str) -> Option<&'static str> {
    let name = match family {
        "pi1" if model.contains("Zero W") => "bcm2708-rpi-zero-w.dtb",
        "pi1" if model.contains("Zero") => "bcm2708-rpi-zero.dtb",
        "pi1" if model.contains("Plus") => "bcm2708-rpi-b-plus.dtb",
        "pi1" => "bcm2708-rpi-b.dtb",
        // Revision 1.2 of the Pi 2 has the processor of a Pi 3.
        "pi2" if model.contains("Rev 1.2") => "bcm2710-rpi-2-b.dtb",
        "pi2" => "bcm2709-rpi-2-b.dtb",
        "pi3" if model.contains("Zero 2") => "bcm2710-rpi-zero-2-w.dtb",
        "pi3" if model.contains("Compute Module") => "bcm2710-rpi-cm3.dtb",
        "pi3" if model.contains("Plus") => "bcm2710-rpi-3-b-plus.dtb",
        "pi3" => "bcm2710-rpi-3-b.dtb",
        "pi4" if model.contains("Compute Module") => "bcm2711-rpi-cm4.dtb",
        "pi4" if model.contains("400") => "bcm2711-rpi-400.dtb",
        "pi4" => "bcm2711-rpi-4-b.dtb",
        "pi5" if model.contains("Compute Module") => "bcm2712-rpi-cm5-cm5io.dtb",
        "pi5" if model.contains("500") => "bcm2712-rpi-500.dtb",
        "pi5" => "bcm2712-rpi-5-b.dtb",
        _ => return None,
    };
    Some(name)
}

/// Returns true if a folder contains boot files: a `config.txt`, or a kernel for any board.
pub fn is_bootable(files: &dyn BootFiles) -> bool {
    let kernels = FAMILIES.into_iter().flat_map(kernels);
    std::iter::once(&"config.txt").chain(kernels).any(|name| files.has(name))
}

/// Reads `config.txt` with all included files. `None`: there is no `config.txt`.
pub fn config(files: &dyn BootFiles) -> Option<ConfigTxt> {
    let text = files.text("config.txt")?;
    Some(ConfigTxt::parse(&included(files, &text, INCLUDES)))
}

/// Replaces `include` lines by the named files. Like the firmware, it skips a file that does not exist.
fn included(files: &dyn BootFiles, text: &str, deeper: u32) -> String {
    let mut whole = String::with_capacity(text.len());
    for line in text.lines() {
        let named = line.trim().strip_prefix("include").filter(|rest| rest.starts_with([' ', '\t']));
        match named {
            Some(name) if deeper > 0 => {
                if let Some(text) = files.text(name.trim()) {
                    whole.push_str(&included(files, &text, deeper - 1));
                }
            }
            _ => {
                whole.push_str(line);
                whole.push('\n');
            }
        }
    }
    whole
}

/// Determines the files that a board of this family boots. `tryboot`: true for a trial boot.
pub fn select(files: &dyn BootFiles, family: &str, tree: Tree<'_>, tryboot: bool) -> Selection {
    let Some(config) = config(files) else {
        let mut found = below(files, &ConfigTxt::default(), &conditions(family, tryboot), tree, "");
        found.lacks.insert(0, "config.txt".to_owned());
        return found;
    };
    let conditions = conditions(family, tryboot);
    let named = value(&config, "os_prefix", &conditions).unwrap_or_default();
    let found = below(files, &config, &conditions, tree, named);
    let taken = found.kernel.is_some() && (found.device_tree.is_some() || !needs_tree(&config, &conditions, tree));
    if named.is_empty() || taken {
        return found;
    }
    // If kernel or device tree are missing below the prefix, the firmware ignores the prefix. If files are missing
    // either way, the shorter list is reported.
    let plain = below(files, &config, &conditions, tree, "");
    if plain.lacks.is_empty() || plain.lacks.len() < found.lacks.len() { plain } else { found }
}

/// Returns the lines for `config.txt` that make a trial boot load the same files as a normal boot. Our cards start
/// every new system on trial. Publishers write `[tryboot]` sections for updaters with a second set of files beside the
/// first.
pub fn same_on_trial(files: &dyn BootFiles, family: &str, tree: Tree<'_>) -> Vec<String> {
    let Some(config) = config(files) else { return Vec::new() };
    let (normally, on_trial) = (conditions(family, false), conditions(family, true));
    let taken = select(files, family, tree, false);
    let differs = |key| value(&config, key, &normally) != value(&config, key, &on_trial);
    let initramfs = |conditions| config.initramfs(conditions).join(",");
    let mut lines = Vec::new();
    if differs("os_prefix") {
        lines.push(format!("os_prefix={}", taken.prefix));
    }
    if let Some(kernel) = taken.kernel.as_ref().filter(|_| differs("kernel")) {
        lines.push(format!("kernel={kernel}"));
    }
    if differs("cmdline") {
        lines.push(format!("cmdline={}", taken.cmdline.strip_prefix(&taken.prefix).unwrap_or(&taken.cmdline)));
    }
    if let Some(tree) = taken.device_tree.as_ref().filter(|_| differs("device_tree")) {
        lines.push(format!("device_tree={tree}"));
    }
    if initramfs(&normally) != initramfs(&on_trial) && !initramfs(&normally).is_empty() {
        lines.push(format!("initramfs {} followkernel", initramfs(&normally)));
    }
    lines
}

fn conditions(family: &str, tryboot: bool) -> Conditions {
    Conditions { models: vec![family.to_owned()], tryboot, ..Conditions::default() }
}

fn value<'a>(config: &'a ConfigTxt, key: &str, conditions: &Conditions) -> Option<&'a str> {
    config.get(key, conditions).map(str::trim).filter(|value| !value.is_empty())
}

/// Returns true if a device tree is required. An empty `device_tree=` tells the firmware to load none.
fn needs_tree(config: &ConfigTxt, conditions: &Conditions, tree: Tree<'_>) -> bool {
    match config.get("device_tree", conditions).map(str::trim) {
        Some(name) => !name.is_empty(),
        None => tree != Tree::Unknown,
    }
}

fn below(
    files: &dyn BootFiles,
    config: &ConfigTxt,
    conditions: &Conditions,
    tree: Tree<'_>,
    prefix: &str,
) -> Selection {
    let get = |key| value(config, key, conditions);
    let has = |name: &str| files.has(&format!("{prefix}{name}"));
    let place = if prefix.is_empty() { String::new() } else { format!(" below {prefix}") };
    let mut lacks = Vec::new();

    let family = conditions.models.first().map(String::as_str).unwrap_or_default();
    let named = get("kernel");
    let kernel = match named {
        Some(name) => has(name).then(|| name.to_owned()),
        None => kernels(family).iter().find(|name| has(name)).map(|name| (*name).to_owned()),
    };
    if kernel.is_none() {
        let name = named.unwrap_or("kernel8.img or the like");
        lacks.push(format!("a kernel{place} ({name})"));
    }

    let cmdline = get("cmdline").unwrap_or("cmdline.txt");
    if !has(cmdline) {
        lacks.push(format!("{prefix}{cmdline}"));
    }

    let mut device_tree = None;
    if needs_tree(config, conditions, tree) {
        let wanted = match (get("device_tree"), tree) {
            (Some(name), _) | (None, Tree::Named(name)) => Some(name),
            (None, Tree::Missing | Tree::Unknown) => None,
        };
        let upstream = get("upstream_kernel").is_some_and(|value| value != "0");
        device_tree = wanted.and_then(|name| {
            let mainline = mainline(name);
            [name.to_owned(), mainline].into_iter().take(if upstream { 2 } else { 1 }).find(|name| has(name))
        });
        if device_tree.is_none() {
            lacks.push(match wanted {
                Some(name) => format!("the device tree{place} ({name})"),
                None => format!("a device tree{place} (bcm27*.dtb)"),
            });
        }
    }
    Selection { prefix: prefix.to_owned(), kernel, cmdline: format!("{prefix}{cmdline}"), device_tree, lacks }
}

/// Converts a downstream name of a device tree to Linux' own. The firmware tries it with `upstream_kernel=1`.
fn mainline(name: &str) -> String {
    name.replace("bcm2708-", "bcm2835-").replace("bcm2709-", "bcm2836-").replace("bcm2710-", "bcm2837-")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{BootFiles, Tree, same_on_trial, select};

    struct Folder(BTreeMap<&'static str, &'static str>);

    impl BootFiles for Folder {
        fn has(&self, name: &str) -> bool {
            self.0.get(name).is_some_and(|text| !text.is_empty())
        }

        fn text(&self, name: &str) -> Option<String> {
            self.0.get(name).map(|text| (*text).to_owned())
        }
    }

    fn folder<const N: usize>(files: [(&'static str, &'static str); N]) -> Folder {
        Folder(files.into())
    }

    const PI4: Tree<'_> = Tree::Named("bcm2711-rpi-4-b.dtb");

    fn ubuntu() -> Folder {
        folder([
            ("config.txt", "[all]\nos_prefix=current/\n[tryboot]\nos_prefix=new/\n[all]\nkernel=vmlinuz\n"),
            ("current/vmlinuz", "k"),
            ("current/cmdline.txt", "root=LABEL=writable"),
            ("current/bcm2711-rpi-4-b.dtb", "t"),
        ])
    }

    #[test]
    fn files_are_looked_for_below_the_prefix() {
        let found = select(&ubuntu(), "pi4", PI4, false);
        assert_eq!((found.cmdline.as_str(), found.lacks.len()), ("current/cmdline.txt", 0), "{found:?}");
        let mut lacking = ubuntu();
        lacking.0.remove("current/cmdline.txt");
        lacking.0.insert("cmdline.txt", "root=LABEL=writable");
        assert_eq!(select(&lacking, "pi4", PI4, false).lacks, ["current/cmdline.txt"]);
    }

    #[test]
    fn prefix_without_kernel_is_ignored() {
        let files = folder([
            ("config.txt", "os_prefix=gone/\n"),
            ("kernel8.img", "k"),
            ("cmdline.txt", "root=x"),
            ("bcm2711-rpi-4-b.dtb", "t"),
        ]);
        let found = select(&files, "pi4", PI4, false);
        assert_eq!((found.prefix.as_str(), found.lacks.len()), ("", 0), "{found:?}");
    }

    #[test]
    fn everything_missing_is_named() {
        let found = select(&folder([("config.txt", "\n")]), "pi4", PI4, false).lacks.join(", ");
        for word in ["kernel8.img", "cmdline.txt", "bcm2711-rpi-4-b.dtb"] {
            assert!(found.contains(word), "{found}");
        }
        assert_eq!(select(&folder([]), "pi4", PI4, false).lacks.len(), 4);
    }

    #[test]
    fn trial_boot_takes_the_same_files() {
        assert_eq!(same_on_trial(&ubuntu(), "pi4", PI4), ["os_prefix=current/"]);
        let mut mended = ubuntu();
        mended.0.insert(
            "config.txt",
            "[all]\nos_prefix=current/\n[tryboot]\nos_prefix=new/\n[all]\nkernel=vmlinuz\n[all]\nos_prefix=current/\n",
        );
        assert_eq!(same_on_trial(&mended, "pi4", PI4), [""; 0]);
        assert_eq!(select(&mended, "pi4", PI4, true), select(&mended, "pi4", PI4, false));
    }

    #[test]
    fn includes_and_other_names_are_followed() {
        let files = folder([
            ("config.txt", "include more.txt\ninclude gone.txt\n"),
            ("more.txt", "kernel=u-boot.bin\ncmdline=boot.txt\nupstream_kernel=1\n"),
            ("u-boot.bin", "k"),
            ("boot.txt", "root=x"),
            ("bcm2837-rpi-3-b.dtb", "t"),
        ]);
        let found = select(&files, "pi3", Tree::Named("bcm2710-rpi-3-b.dtb"), false);
        assert_eq!((found.cmdline.as_str(), found.lacks.len()), ("boot.txt", 0), "{found:?}");
        assert_eq!(select(&files, "pi4", PI4, false).lacks.len(), 1);
    }

    #[test]
    fn empty_device_tree_means_none_is_loaded() {
        let files = folder([("config.txt", "device_tree=\nkernel=k.img\n"), ("k.img", "k"), ("cmdline.txt", "root=x")]);
        assert_eq!(select(&files, "pi4", PI4, false).lacks.len(), 0);
    }
}
