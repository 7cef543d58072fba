//! Contents of the zip, and the zip itself.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use marco_archive::ZipSummary;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::boards::is_tree_of;
use super::kernel::Kernel;
use super::source::{Source, read};
use crate::args::{Arch, Board};

/// Firmware files of the Pi, and the boards that need them. They do not depend on the kernel.
const FIRMWARE: [(&str, &[Board]); 5] = [
    ("bootcode.bin", &[Board::Pi1, Board::Pi2, Board::Pi3]),
    ("start.elf", &[Board::Pi1, Board::Pi2, Board::Pi3]),
    ("fixup.dat", &[Board::Pi1, Board::Pi2, Board::Pi3]),
    ("start4.elf", &[Board::Pi4]),
    ("fixup4.dat", &[Board::Pi4]),
];
// Boot partition, its older mount point, and Debian's package raspi-firmware.
const FIRMWARE_FOLDERS: [&str; 3] = ["/boot/firmware", "/boot", "/usr/lib/raspi-firmware"];

const README: &str = "Overlays are taken from this folder because this file is here, and so from no other kernel's.\n";

/// Files of the zip by name.
pub(super) type Files = BTreeMap<String, Vec<u8>>;

/// Remarks for the operator.
pub(super) type Notes = Vec<String>;

/// Collects everything except the initramfs.
pub(super) fn collect(
    source: &Source,
    kernel: &Kernel,
    boards: &[Board],
    cmdline: Option<&str>,
) -> Result<(Files, Notes)> {
    let (mut files, mut notes) = (Files::new(), Notes::new());
    let image = kernel_name(kernel.arch);
    files.insert(image.to_owned(), read(&kernel.image)?);
    for (name, path) in kernel.device_trees.iter().filter(|(name, _)| is_tree_of(boards, name)) {
        files.insert(name.clone(), read(path)?);
    }
    let trees = files.len() > 1;
    files.insert("config.txt".to_owned(), config_txt(kernel, image, trees).into_bytes());
    let cmdline = cmdline.map_or_else(|| default_cmdline(kernel.arch, boards), str::to_owned);
    files.insert("cmdline.txt".to_owned(), format!("{}\n", cmdline.trim()).into_bytes());
    overlays(&mut files, &mut notes, kernel, trees)?;
    firmware(&mut files, &mut notes, source, boards)?;
    // The vendor's versions contain `rpi-` or `-v`. Only these kernels can request a trial boot.
    if trees && !kernel.version.contains("rpi-") && !kernel.version.contains("-v") {
        notes.push(format!(
            "{} is no kernel of Raspberry Pi's: it cannot ask the firmware for a trial boot, so updates of real boards need \
             a set made from Raspberry Pi OS",
            kernel.version
        ));
    }
    Ok((files, notes))
}

fn kernel_name(arch: Arch) -> &'static str {
    match arch {
        Arch::Amd64 => "vmlinuz",
        Arch::Arm64 => "kernel8.img",
        Arch::Armhf => "kernel7.img",
        Arch::Armel => "kernel.img",
    }
}

/// Renders config.txt. It is short: these lines are copied into the recovery partition's own config.txt of 511 bytes.
fn config_txt(kernel: &Kernel, image: &str, trees: bool) -> String {
    let mut text =
        format!("# The installer of Marco Bootstrap, with the kernel {}\nauto_initramfs=0\n", kernel.version);
    match kernel.arch {
        Arch::Arm64 => text.push_str("arm_64bit=1\n"),
        Arch::Armhf | Arch::Armel => text.push_str("arm_64bit=0\n"),
        Arch::Amd64 => {}
    }
    text.push_str(&format!("kernel={image}\ninitramfs initramfs followkernel\n"));
    if !trees {
        // An empty value tells the firmware that no device tree is wanted.
        text.push_str("device_tree=\n");
    }
    text
}

fn default_cmdline(arch: Arch, boards: &[Board]) -> String {
    let only_virtual = boards.iter().all(|board| *board == Board::Virtual);
    let consoles = match arch {
        Arch::Amd64 => "console=ttyS0",
        _ if only_virtual => "console=ttyAMA0",
        // The firmware replaces serial0 by the board's serial port.
        _ => "console=serial0,115200 console=tty1",
    };
    // panic=10: a board restarts 10 s after a kernel panic instead of hanging.
    format!("{consoles} rdinit=/init panic=10")
}

/// Adds the two files without which the firmware takes overlays from another kernel's set.
fn overlays(files: &mut Files, notes: &mut Notes, kernel: &Kernel, trees: bool) -> Result<()> {
    for name in ["README", "overlay_map.dtb", "hat_map.dtb"] {
        let path = kernel.overlays.as_ref().map(|folder| folder.join(name)).filter(|path| path.is_file());
        if let Some(path) = path {
            files.insert(format!("overlays/{name}"), read(&path)?);
        }
    }
    files.entry("overlays/README".to_owned()).or_insert_with(|| README.as_bytes().to_vec());
    if !files.contains_key("overlays/overlay_map.dtb") {
        files.insert("overlays/overlay_map.dtb".to_owned(), empty_tree());
        if trees {
            notes.push(
                "the kernel has no overlays: overlay_map.dtb is an empty one, so no dtoverlay line works".to_owned(),
            );
        }
    }
    Ok(())
}

/// Returns an empty device tree (Devicetree Specification, "Flattened Devicetree Format").
fn empty_tree() -> Vec<u8> {
    // FDT_BEGIN_NODE, an empty name, FDT_END_NODE, FDT_END.
    let structure: [u32; 4] = [1, 0, 2, 9];
    let header: [u32; 10] = [0xd00d_feed, 72, 56, 72, 40, 17, 16, 0, 0, 16];
    let words = header.iter().chain(&[0; 4]).chain(&structure);
    words.flat_map(|word| word.to_be_bytes()).collect()
}

fn firmware(files: &mut Files, notes: &mut Notes, source: &Source, boards: &[Board]) -> Result<()> {
    let mut missing: BTreeMap<Board, Vec<&str>> = BTreeMap::new();
    for (name, of) in FIRMWARE {
        let wanting: Vec<Board> = of.iter().copied().filter(|board| boards.contains(board)).collect();
        if wanting.is_empty() {
            continue;
        }
        let mut found = None;
        for folder in FIRMWARE_FOLDERS {
            found = source.read(&format!("{folder}/{name}"))?;
            if found.is_some() {
                break;
            }
        }
        match found {
            Some(bytes) => {
                files.insert(name.to_owned(), bytes);
            }
            None => wanting.iter().for_each(|board| missing.entry(*board).or_default().push(name)),
        }
    }
    for (board, names) in missing {
        // A note, not an error: an update uses the firmware that is already on the card.
        notes.push(format!(
            "the firmware files {} are not in the source: a new card for {board} needs them (`marcoctl card write --firmware \
             DIR`), an update does not",
            names.join(", ")
        ));
    }
    Ok(())
}

/// Writes the zip and checks it like controller and agent do. The same files give the same bytes.
pub(super) fn write_zip(files: &Files, path: &Path) -> Result<ZipSummary> {
    let named = || format!("cannot write {}", path.display());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).with_context(named)?;
    {
        let mut zip = ZipWriter::new(file.as_file_mut());
        for (name, bytes) in files {
            // An initramfs and most kernels are compressed already. The other files compress well.
            let packed = name == "initramfs" || name.starts_with("kernel") || name == "vmlinuz";
            let method = if packed { CompressionMethod::Stored } else { CompressionMethod::Deflated };
            let options = SimpleFileOptions::default()
                .compression_method(method)
                // A fixed time keeps the bytes reproducible.
                .last_modified_time(zip::DateTime::default())
                .unix_permissions(0o644);
            zip.start_file(name.as_str(), options).with_context(named)?;
            zip.write_all(bytes).with_context(named)?;
        }
        zip.finish().with_context(named)?;
    }
    let handle = file.as_file_mut();
    handle.sync_all().with_context(named)?;
    handle.rewind().with_context(named)?;
    let summary =
        marco_archive::check_zip(handle).context("the zip that was made is not one that a controller takes")?;
    marco_archive::check_installer_set(&summary).context("the set that was made is not one that a controller takes")?;
    persist(file, path).with_context(named)?;
    Ok(summary)
}

/// Renames the finished file to its name, readable for everyone.
fn persist(file: tempfile::NamedTempFile, path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    // Temporary files have mode 0600.
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    file.persist(path)?;
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        // The rename is durable only after a sync of the folder.
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::empty_tree;

    #[test]
    fn the_empty_device_tree_is_as_long_as_it_says() {
        let tree = empty_tree();
        assert_eq!(tree.len(), 72);
        assert_eq!(tree[..8], [0xd0, 0x0d, 0xfe, 0xed, 0, 0, 0, 72]);
    }
}
