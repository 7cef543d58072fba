//! The system's boot partition (p4): filled from the image's own boot files or from a zip, fitted to the card, checked.

use std::io::{ErrorKind, Result};
use std::path::Path;

use marco_archive::firmware::{BootFiles, Tree, same_on_trial, select};

use super::InstallError;
use super::plan::{self, BootMount};
use crate::system::rooted::{Kind, Rooted};
use crate::system::{Board, Target};

/// No boot partition has folders within folders deeper than this.
const DEPTH: usize = 16;

/// A folder of boot files, as the one reader of what the firmware takes sees it.
struct Folder<'a> {
    root: &'a Rooted,
    folder: &'a Path,
}

impl BootFiles for Folder<'_> {
    fn has(&self, name: &str) -> bool {
        self.root.is_file(self.folder.join(name.trim_start_matches('/')), false)
    }

    fn text(&self, name: &str) -> Option<String> {
        let bytes = self.root.read(self.folder.join(name.trim_start_matches('/'))).ok().flatten()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn tree(board: &Board) -> Tree<'static> {
    board.device_tree().map_or(Tree::Unknown, Tree::Named)
}

/// Where the image's boot files are: in what it mounts as vfat, or in the other place.
pub(super) fn find(root: &Rooted, board: &Board) -> std::result::Result<BootMount, InstallError> {
    let fstab = root.read("etc/fstab").map_err(InstallError::disk("read /etc/fstab of the image"))?.unwrap_or_default();
    let folders = BootMount::ALL.map(|mount| (mount, Folder { root, folder: Path::new(mount.folder()) }));
    let whole = |files: &Folder<'_>| select(files, &board.family, tree(board), false).lacks.is_empty();
    let chosen = BootMount::choose(&String::from_utf8_lossy(&fstab), &folders, whole);
    chosen.map(|(mount, _)| *mount).ok_or_else(|| {
        InstallError::not_a_system(
            "the image has no boot files: neither /boot/firmware nor /boot has a config.txt or a kernel",
        )
    })
}

/// Moves them to the boot partition.
pub(super) fn move_from(root: &Rooted, mount: BootMount, boot: &Rooted) -> std::result::Result<(), InstallError> {
    copy(root, Path::new(mount.folder()), boot, Path::new(""), DEPTH)
        .map_err(InstallError::disk("copy the image's boot files"))?;
    root.clear(mount.folder()).map_err(InstallError::disk("empty the image's boot folder"))
}

/// Where a system mounts the boot partition that came with its disk image.
pub(super) fn mounted(root: &Rooted) -> std::result::Result<BootMount, InstallError> {
    let fstab = root.read("etc/fstab").map_err(InstallError::disk("read /etc/fstab of the image"))?.unwrap_or_default();
    Ok(BootMount::of_fstab(&String::from_utf8_lossy(&fstab)).unwrap_or(BootMount::Firmware))
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

/// Makes the command line name this card's root, and a trial boot take the same files as any other.
pub(super) fn fit(boot: &Rooted, board: &Board, target: &Target) -> std::result::Result<(), InstallError> {
    let files = Folder { root: boot, folder: Path::new("") };
    let file = select(&files, &board.family, tree(board), false).cmdline;
    let read = boot.read(&file).map_err(InstallError::disk("read the command line"))?;
    let text = read.ok_or_else(|| InstallError::not_a_system(format!("the boot files have no {file}")))?;
    let text = plan::cmdline(&String::from_utf8_lossy(&text), &target.root_device, &target.root_type);
    boot.write(&file, text.as_bytes(), 0o755).map_err(InstallError::disk("write the command line"))?;

    let lines = same_on_trial(&files, &board.family, tree(board));
    if lines.is_empty() {
        return Ok(());
    }
    tracing::info!(lines = lines.join(" "), "config.txt gets lines, so that a trial boot takes the same files");
    let config = boot.read("config.txt").map_err(InstallError::disk("read config.txt"))?.unwrap_or_default();
    let added = format!("\n# Marco Bootstrap: a trial boot takes the same files\n[all]\n{}\n", lines.join("\n"));
    let config = [config.as_slice(), added.as_bytes()].concat();
    boot.write("config.txt", &config, 0o755).map_err(InstallError::disk("write config.txt"))
}

/// Whether this board can boot from these files: a kernel, a command line, `config.txt`, and the board's device tree.
pub(super) fn check(boot: &Rooted, board: &Board) -> std::result::Result<(), InstallError> {
    let files = Folder { root: boot, folder: Path::new("") };
    match select(&files, &board.family, tree(board), false).lacks.as_slice() {
        [] => Ok(()),
        lacks => Err(InstallError::not_a_system(format!("the boot files lack {}", lacks.join(", ")))),
    }
}
