//! The system's boot partition (p4): filled from the image's own boot files or from a zip, fitted to the card, checked.

use std::io::{ErrorKind, Result};
use std::path::Path;

use marco_archive::config_txt::{Conditions, ConfigTxt};

use super::InstallError;
use super::plan::{self, BootMount};
use crate::bootpart::render::kernels;
use crate::system::rooted::{Kind, Rooted};
use crate::system::{Board, Target};

/// No boot partition has folders within folders deeper than this.
const DEPTH: usize = 16;

/// Where the image's boot files are: in what it mounts as vfat.
pub(super) fn find(root: &Rooted) -> std::result::Result<BootMount, InstallError> {
    let fstab = root.read("etc/fstab").map_err(InstallError::disk("read /etc/fstab of the image"))?.unwrap_or_default();
    let named = plan::boot_mount(&String::from_utf8_lossy(&fstab)).filter(|mount| bootable(root, mount.path()));
    let mount =
        named.or_else(|| [BootMount::Firmware, BootMount::Boot].into_iter().find(|mount| bootable(root, mount.path())));
    mount.ok_or_else(|| {
        InstallError::not_a_system(
            "the image has no boot files: neither /boot/firmware nor /boot has a config.txt or a kernel",
        )
    })
}

/// Moves them to the boot partition.
pub(super) fn move_from(root: &Rooted, mount: BootMount, boot: &Rooted) -> std::result::Result<(), InstallError> {
    copy(root, mount.path(), boot, Path::new(""), DEPTH).map_err(InstallError::disk("copy the image's boot files"))?;
    root.clear(mount.path()).map_err(InstallError::disk("empty the image's boot folder"))
}

/// Where a system mounts the boot partition that came with its disk image.
pub(super) fn mounted(root: &Rooted) -> std::result::Result<BootMount, InstallError> {
    let fstab = root.read("etc/fstab").map_err(InstallError::disk("read /etc/fstab of the image"))?.unwrap_or_default();
    Ok(plan::boot_mount(&String::from_utf8_lossy(&fstab)).unwrap_or(BootMount::Firmware))
}

fn bootable(root: &Rooted, folder: &Path) -> bool {
    let families = ["pi1", "pi2", "pi5", ""];
    let mut names = families.into_iter().flat_map(kernels).copied().chain(["config.txt"]);
    names.any(|name| root.is_file(folder.join(name), false))
}

/// FAT has files and folders only: a link to a file becomes that file, and what else there is stays behind.
fn copy(from: &Rooted, source: &Path, to: &Rooted, dest: &Path, depth: usize) -> Result<()> {
    for (name, kind) in from.list(source)? {
        let (source, dest) = (source.join(&name), dest.join(&name));
        match kind {
            Kind::Folder if depth == 0 => return Err(std::io::Error::new(ErrorKind::InvalidInput, "folders too deep")),
            Kind::Folder => {
                to.folder(&dest)?;
                copy(from, &source, to, &dest, depth - 1)?;
            }
            Kind::Link if !from.is_file(&source, false) => {}
            Kind::File | Kind::Link => {
                std::io::copy(&mut from.open_file(&source)?, &mut to.create(&dest, 0o755)?)?;
            }
            Kind::Other => {}
        }
    }
    Ok(())
}

/// Makes the command line name this card's root.
pub(super) fn fit(boot: &Rooted, target: &Target) -> std::result::Result<(), InstallError> {
    let read = boot.read("cmdline.txt").map_err(InstallError::disk("read cmdline.txt"))?;
    let text = read.ok_or_else(|| InstallError::not_a_system("the boot files have no cmdline.txt"))?;
    let text = plan::cmdline(&String::from_utf8_lossy(&text), &target.root_device, &target.root_type);
    boot.write("cmdline.txt", text.as_bytes(), 0o755).map_err(InstallError::disk("write cmdline.txt"))
}

/// Whether this board can boot from these files: a kernel, `cmdline.txt`, `config.txt`, and the board's device tree.
pub(super) fn check(boot: &Rooted, board: &Board) -> std::result::Result<(), InstallError> {
    let read = boot.read("config.txt").map_err(InstallError::disk("read config.txt"))?;
    let lacks = |what: &str| InstallError::not_a_system(format!("the boot files have no {what}"));
    let config = ConfigTxt::parse(&String::from_utf8_lossy(&read.ok_or_else(|| lacks("config.txt"))?));
    let conditions = Conditions { models: vec![board.family.clone()], ..Conditions::default() };
    let get = |key| config.get(key, &conditions).filter(|value| !value.is_empty());
    // A set under a prefix of its own boots as well.
    let prefix = get("os_prefix").unwrap_or_default();
    let has = |name: &str| boot.is_file(format!("{prefix}{name}"), false) || boot.is_file(name, false);
    let kernel = match get("kernel") {
        Some(name) => has(name),
        None => kernels(&board.family).iter().any(|name| has(name)),
    };
    if !kernel {
        return Err(lacks("kernel for this board"));
    }
    if !has("cmdline.txt") {
        return Err(lacks("cmdline.txt"));
    }
    match get("device_tree").or(board.device_tree()) {
        Some(name) if !has(name) => Err(lacks(&format!("device tree for this board ({name})"))),
        _ => Ok(()),
    }
}
