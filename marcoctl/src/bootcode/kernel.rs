//! Finds the kernels in a source and chooses one.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::source::{Source, read, resolve};
use crate::args::Arch;
use crate::compression::decoded;

/// A kernel with its modules and device trees.
#[derive(Debug, Clone)]
pub(crate) struct Kernel {
    /// Version, which is also the name of the modules' folder.
    pub(crate) version: String,
    /// Architecture of the image.
    pub(crate) arch: Arch,
    /// Path of the boot image.
    pub(crate) image: PathBuf,
    /// Folder with the modules.
    pub(crate) modules: PathBuf,
    /// Paths of the Pis' device trees, by the names that the Pi's firmware looks for.
    pub(crate) device_trees: BTreeMap<String, PathBuf>,
    /// Folder with the overlays. `None`: the source has none.
    pub(crate) overlays: Option<PathBuf>,
    /// File with the configuration (`CONFIG_...=y`). `None`: the source has none.
    pub(crate) config: Option<PathBuf>,
}

/// Kernel files of older boot partitions, the endings of their modules' folders, and their architectures.
const UNNAMED: [(&str, &str, Arch); 5] = [
    ("kernel8.img", "v8", Arch::Arm64),
    ("kernel_2712.img", "2712", Arch::Arm64),
    ("kernel7l.img", "v7l", Arch::Armhf),
    ("kernel7.img", "v7", Arch::Armhf),
    ("kernel.img", "", Arch::Armel),
];

impl Kernel {
    /// Chooses the only kernel with this architecture and version. `None`: any.
    pub(crate) fn choose(source: &Source, arch: Option<Arch>, version: Option<&str>) -> Result<Self> {
        let mut all = Self::all(source)?;
        let have = listed(&all);
        all.retain(|kernel| {
            arch.is_none_or(|arch| kernel.arch == arch) && version.is_none_or(|wanted| kernel.version == wanted)
        });
        // The kernel for Pi 3 and 4 also starts a Pi 5, so it is preferred to the one for Pi 5 only.
        if all.iter().any(|kernel| kernel.version.ends_with("v8")) {
            all.retain(|kernel| !kernel.version.ends_with("2712"));
        }
        match all.as_slice() {
            [one] => Ok(one.clone()),
            [] if have.is_empty() => bail!(
                "there is no kernel with its modules in what --root and --package name (boot/vmlinuz-VERSION and \
                 lib/modules/VERSION)"
            ),
            [] => bail!("no kernel fits --arch and --kernel; there are: {have}"),
            several => bail!("there are several kernels: choose one with --arch or --kernel: {}", listed(several)),
        }
    }

    fn all(source: &Source) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        for (number, root) in source.roots().iter().enumerate() {
            // If a package has a kernel, the kernel of the system in the root is not wanted.
            if !source.is_package(number) && !found.is_empty() {
                break;
            }
            for folder in ["boot", "boot/firmware"] {
                let Some(folder) = resolve(root, Path::new(folder)) else { continue };
                for name in names(&folder) {
                    if let Some(version) = name.strip_prefix("vmlinuz-").or_else(|| name.strip_prefix("vmlinux-")) {
                        found.extend(Self::named(source, root, &folder.join(&name), version)?);
                    }
                }
            }
            if found.is_empty() {
                found.extend(unnamed(root));
            }
        }
        Ok(found)
    }

    /// Finds the parts of a kernel as packaged by Debian and Raspberry Pi OS. `None`: no modules, or an unknown image.
    fn named(source: &Source, root: &Path, image: &Path, version: &str) -> Result<Option<Self>> {
        // A kernel is offered only with its modules: the boards need some of them.
        let Some(modules) = source.find(&format!("lib/modules/{version}")) else { return Ok(None) };
        let Some(arch) = arch_of(&read(image)?, version) else { return Ok(None) };
        let trees = resolve(root, Path::new(&format!("usr/lib/linux-image-{version}")));
        let trees = trees.or_else(|| source.find(&format!("usr/lib/linux-image-{version}")));
        let mut device_trees = BTreeMap::new();
        if let Some(trees) = &trees {
            collect_trees(trees, &mut device_trees);
            // Debian's arm64 kernels have a folder per vendor.
            collect_trees(&trees.join("broadcom"), &mut device_trees);
        }
        Ok(Some(Self {
            version: version.to_owned(),
            arch,
            image: image.to_owned(),
            modules,
            device_trees,
            overlays: trees.map(|trees| trees.join("overlays")).filter(|overlays| overlays.is_dir()),
            config: source.find(&format!("boot/config-{version}")),
        }))
    }

    /// Reads the lines of the configuration. `None`: the source has no configuration.
    pub(crate) fn config_lines(&self) -> Result<Option<String>> {
        let text = self.config.as_deref().map(read).transpose()?;
        Ok(text.map(|text| String::from_utf8_lossy(&text).into_owned()))
    }
}

/// Finds kernels of a boot partition of Raspberry Pi OS from before it had versions in file names.
fn unnamed(root: &Path) -> Vec<Kernel> {
    let mut found = Vec::new();
    let Some(modules) = resolve(root, Path::new("lib/modules")) else { return found };
    for folder in ["boot/firmware", "boot"] {
        let Some(folder) = resolve(root, Path::new(folder)) else { continue };
        for (file, ending, arch) in UNNAMED {
            let image = folder.join(file);
            if !image.is_file() {
                continue;
            }
            let plain =
                |version: &str| UNNAMED.iter().all(|(_, other, _)| other.is_empty() || !version.ends_with(other));
            // Kernels of that time had versions like `6.1.21-v8+`.
            let fits = |version: &str| {
                let version = version.trim_end_matches('+');
                if ending.is_empty() { plain(version) } else { version.ends_with(&format!("-{ending}")) }
            };
            for version in names(&modules).into_iter().filter(|version| fits(version)) {
                let mut device_trees = BTreeMap::new();
                collect_trees(&folder, &mut device_trees);
                found.push(Kernel {
                    modules: modules.join(&version),
                    version,
                    arch,
                    image: image.clone(),
                    device_trees,
                    overlays: Some(folder.join("overlays")).filter(|overlays| overlays.is_dir()),
                    config: None,
                });
            }
        }
        if !found.is_empty() {
            break;
        }
    }
    found
}

/// Returns the names in a folder, sorted. Empty if it cannot be read.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Collects the device trees of Pis in a folder. Mainline kernels name them after another number of the chip. Firmware
/// and agent look for the vendor's names, so such a tree gets both names.
fn collect_trees(folder: &Path, trees: &mut BTreeMap<String, PathBuf>) {
    for name in names(folder).into_iter().filter(|name| name.starts_with("bcm2") && name.ends_with(".dtb")) {
        let vendor = [("bcm2835-rpi", "bcm2708-rpi"), ("bcm2836-rpi", "bcm2709-rpi"), ("bcm2837-rpi", "bcm2710-rpi")];
        for (mainline, vendor) in vendor {
            if let Some(rest) = name.strip_prefix(mainline) {
                trees.entry(format!("{vendor}{rest}")).or_insert_with(|| folder.join(&name));
            }
        }
        if name.contains("-rpi") {
            trees.insert(name.clone(), folder.join(&name));
        }
    }
}

fn listed(kernels: &[Kernel]) -> String {
    let named: Vec<String> = kernels.iter().map(|kernel| format!("{} ({})", kernel.version, kernel.arch)).collect();
    named.join(", ")
}

/// Determines the architecture by the marks that boot loaders look for. `None`: unknown.
fn arch_of(image: &[u8], version: &str) -> Option<Arch> {
    let plain;
    // Raspberry Pi OS compresses its arm64 kernel with gzip.
    let image = if image.starts_with(&[0x1f, 0x8b]) {
        plain = decoded(image.to_vec()).ok()?;
        plain.as_slice()
    } else {
        image
    };
    let has = |at: usize, mark: &[u8]| image.get(at..at + mark.len()) == Some(mark);
    // Linux documentation: the x86 boot protocol.
    if has(0x202, b"HdrS") {
        return Some(Arch::Amd64);
    }
    // Linux documentation: arm64 "Booting", and EFI zboot, which also starts with `MZ`.
    if has(0x38, b"ARM\x64") || (has(0, b"MZ") && has(4, b"zimg")) {
        return Some(Arch::Arm64);
    }
    // A zImage of 32-bit ARM. The image does not tell if it runs on ARMv6; only the version does.
    has(0x24, &0x016f_2818_u32.to_le_bytes()).then(|| {
        let version = version.trim_end_matches('+');
        if version.ends_with("-rpi") || version.ends_with("-v6") { Arch::Armel } else { Arch::Armhf }
    })
}

#[cfg(test)]
mod tests {
    use super::arch_of;
    use crate::args::Arch;

    fn image(at: usize, mark: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[at..at + mark.len()].copy_from_slice(mark);
        image
    }

    #[test]
    fn a_kernels_processor_is_told_by_its_file() {
        let zimage = image(0x24, &[0x18, 0x28, 0x6f, 0x01]);
        assert_eq!(arch_of(&image(0x202, b"HdrS"), "6.1.0-9-amd64"), Some(Arch::Amd64));
        assert_eq!(arch_of(&image(0x38, b"ARM\x64"), "6.12.1+rpt-rpi-v8"), Some(Arch::Arm64));
        assert_eq!(arch_of(&zimage, "6.1.0-9-rpi"), Some(Arch::Armel));
        assert_eq!(arch_of(&zimage, "6.12.1+rpt-rpi-v7"), Some(Arch::Armhf));
        assert_eq!(arch_of(&image(0, b"text"), "6"), None);
    }
}
