//! The system's boot partition (p4): filled from the image's own boot files or from a zip, fitted to the card, checked.

use std::ffi::OsString;
use std::io::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};

use marco_archive::firmware::{BootFiles, Tree, lookup, same_on_trial, select};

use super::InstallError;
use super::plan::{self, BootMount};
use super::trial::{self, Supervision};
use crate::system::rooted::{Kind, Rooted};
use crate::system::{Board, Target};

/// No boot partition has folders within folders deeper than this.
const DEPTH: usize = 16;

/// A folder of boot files, for `marco_archive::firmware`, the one reader of what the firmware takes.
struct Folder<'a> {
    root: &'a Rooted,
    folder: &'a Path,
}

impl Folder<'_> {
    /// Finds a file in any case of letters: a root tells cases apart, and the FAT that the file goes to does not.
    fn path(&self, name: &str) -> Option<PathBuf> {
        let mut path = self.folder.to_owned();
        for part in lookup(name).split('/') {
            let entries = self.root.list(&path).ok()?;
            let same = |name: &OsString| name.to_str().is_some_and(|name| name.to_lowercase() == part);
            path.push(entries.into_iter().map(|(name, _)| name).find(same)?);
        }
        Some(path)
    }
}

impl BootFiles for Folder<'_> {
    fn has(&self, name: &str) -> bool {
        self.path(name).is_some_and(|path| self.root.is_file(path, false))
    }

    fn text(&self, name: &str) -> Option<String> {
        let bytes = self.root.read(self.path(name)?).ok().flatten()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn tree(board: &Board) -> Tree<'static> {
    board.device_tree().map_or(Tree::Unknown, Tree::Named)
}

/// Finds the image's boot files: in the folder that it mounts as vfat, or in the other one.
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

/// Moves the boot files from the root to the boot partition.
pub(super) fn move_from(root: &Rooted, mount: BootMount, boot: &Rooted) -> std::result::Result<(), InstallError> {
    // Copied first: after a power cut the whole installation begins again, from an empty root.
    copy(root, Path::new(mount.folder()), boot, Path::new(""), DEPTH)
        .map_err(InstallError::disk("copy the image's boot files"))?;
    root.clear(mount.folder()).map_err(InstallError::disk("empty the image's boot folder"))
}

/// Returns the mount point of the boot partition that came with a disk image; `/boot/firmware` if its fstab names none.
pub(super) fn mounted(root: &Rooted) -> std::result::Result<BootMount, InstallError> {
    let fstab = root.read("etc/fstab").map_err(InstallError::disk("read /etc/fstab of the image"))?.unwrap_or_default();
    Ok(BootMount::of_fstab(&String::from_utf8_lossy(&fstab)).unwrap_or(BootMount::Firmware))
}

/// Copies a folder to a FAT, which has files and folders only: a link to a file becomes that file, and everything else
/// is left out.
fn copy(from: &Rooted, source: &Path, to: &Rooted, dest: &Path, depth: usize) -> Result<()> {
    for (name, kind) in from.list(source)? {
        let (source, dest) = (source.join(&name), dest.join(&name));
        match kind {
            // Bounds the recursion, whatever the image holds.
            Kind::Folder if depth == 0 => return Err(Error::new(ErrorKind::InvalidInput, "folders too deep")),
            Kind::Folder => {
                to.folder(&dest)?;
                copy(from, &source, to, &dest, depth - 1)?;
            }
            // A link to a folder, or to nothing.
            Kind::Link if !from.is_file(&source, false) => {}
            Kind::File | Kind::Link => {
                std::io::copy(&mut from.open_file(&source)?, &mut to.create(&dest, 0o755)?)?;
            }
            Kind::Other => {}
        }
    }
    Ok(())
}

/// Makes the command line name this card's root, and a trial boot take the same files as any other. A trial gets its
/// parameters and its supervisor.
pub(super) fn fit(
    root: &Rooted,
    boot: &Rooted,
    board: &Board,
    target: &Target,
    supervision: &Supervision,
) -> std::result::Result<(), InstallError> {
    let supervised = supervision.install(root).map_err(InstallError::disk("install the supervisor of the trial"))?;
    let files = Folder { root: boot, folder: Path::new("") };
    let file = select(&files, &board.family, tree(board), false).cmdline;
    let lacks = || InstallError::not_a_system(format!("the boot files have no {file}"));
    let place = files.path(&file).ok_or_else(lacks)?;
    let text = boot.read(&place).map_err(InstallError::disk("read the command line"))?.ok_or_else(lacks)?;
    let text = plan::cmdline(&String::from_utf8_lossy(&text), &target.root_device, &target.root_type);
    // Not as `[tryboot] cmdline=` in config.txt: firmware that ignores that would boot without the parameters.
    let text = supervision.add_parameters(&text, supervised);
    boot.write(&place, text.as_bytes(), 0o755).map_err(InstallError::disk("write the command line"))?;

    // Images of Ubuntu name other files in `[tryboot]`, for trial boots of their own. Our trial must try the files that
    // every later boot takes.
    let lines = same_on_trial(&files, &board.family, tree(board));
    let place = files.path("config.txt").unwrap_or_else(|| "config.txt".into());
    let config = boot.read(&place).map_err(InstallError::disk("read config.txt"))?.unwrap_or_default();
    let mut added = String::new();
    if !lines.is_empty() {
        tracing::info!(lines = lines.join(" "), "config.txt gets lines, so that a trial boot takes the same files");
        added += &format!("\n# Marco Bootstrap: a trial boot takes the same files\n[all]\n{}\n", lines.join("\n"));
    }
    // They stay after the trial: without the flag of a trial boot the firmware skips them.
    let watched = trial::firmware_lines(root);
    if !watched.is_empty() {
        added += &format!("\n# Marco Bootstrap: a kernel that hangs on trial is reset\n{watched}");
    }
    if added.is_empty() {
        return Ok(());
    }
    let config = [config.as_slice(), added.as_bytes()].concat();
    boot.write(&place, &config, 0o755).map_err(InstallError::disk("write config.txt"))
}

/// Ends the trial: removes its parameters from the boot files, and returns the number of files that had them. The partition
/// must be mounted for writing.
///
/// # Errors
/// Returns an error if parameters are left, or the firmware would find no command line: the next boot could fail, and the
/// installer would no longer be there for it.
pub(crate) fn end_trial(boot: &Path, board: &Board) -> Result<usize> {
    let removed = trial::remove_below(boot)?;
    let root = Rooted::open(boot)?;
    let files = Folder { root: &root, folder: Path::new("") };
    let file = select(&files, &board.family, tree(board), false).cmdline;
    if files.has(&file) {
        return Ok(removed);
    }
    Err(Error::new(ErrorKind::NotFound, format!("the new system has no {file} any more")))
}

/// Fails if this board cannot boot from these files: a kernel, a command line, `config.txt`, and its device tree.
pub(super) fn check(boot: &Rooted, board: &Board) -> std::result::Result<(), InstallError> {
    let files = Folder { root: boot, folder: Path::new("") };
    match select(&files, &board.family, tree(board), false).lacks.as_slice() {
        [] => Ok(()),
        lacks => Err(InstallError::not_a_system(format!("the boot files lack {}", lacks.join(", ")))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::Duration;

    use marco_archive::Facts;
    use marco_archive::firmware::{Tree, select};

    use super::{Folder, Supervision, check, end_trial, fit};
    use crate::system::rooted::Rooted;
    use crate::system::{Board, Target};

    const TREE: &str = "bcm2711-rpi-4-b.dtb";

    /// Boot files of one layout, written in many ways: the configuration's name, its line, and the folder.
    const WAYS: [(&str, &str, &str); 6] = [
        ("config.txt", "os_prefix=current/", "current"),
        ("config.txt", "os_prefix=./current//", "current"),
        ("config.txt", "os_prefix=/current/", "current"),
        ("CONFIG.TXT", "os_prefix=Current/", "current"),
        ("Config.txt", "os_prefix=current/", "CURRENT"),
        ("config.txt", "os_prefix=gone/", ""),
    ];

    fn lay_out(config: &str, line: &str, folder: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join(folder)).unwrap();
        fs::write(dir.path().join(config), format!("{line}\nkernel=VMLINUZ\n[tryboot]\nos_prefix=new/\n")).unwrap();
        for (name, text) in [("vmlinuz", "kernel"), ("cmdline.txt", "root=LABEL=writable"), (TREE, "tree")] {
            fs::write(dir.path().join(folder).join(name), text).unwrap();
        }
        dir
    }

    /// The facts of the same files that a push would store.
    fn pushed(boot: &Path) -> Facts {
        let mut facts = Facts::default();
        let mut folders = vec![boot.to_owned()];
        while let Some(folder) = folders.pop() {
            for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let name = path.strip_prefix(boot).unwrap().to_str().unwrap().to_lowercase();
                if name.ends_with(".txt") {
                    facts.texts.insert(name.clone(), fs::read_to_string(&path).unwrap());
                }
                facts.boot_files.insert(name);
            }
        }
        facts
    }

    #[test]
    fn push_and_installer_read_each_layout_alike() {
        for (config, line, folder) in WAYS {
            for lacking in ["", "vmlinuz", "cmdline.txt", TREE] {
                let dir = lay_out(config, line, folder);
                if !lacking.is_empty() {
                    fs::remove_file(dir.path().join(folder).join(lacking)).unwrap();
                }
                let boot = Rooted::open(dir.path()).unwrap();
                let here = select(&Folder { root: &boot, folder: Path::new("") }, "pi4", Tree::Named(TREE), false);
                assert_eq!(here, select(&pushed(dir.path()), "pi4", Tree::Named(TREE), false), "{line} {lacking}");
                assert_eq!(here.lacks.is_empty(), lacking.is_empty(), "{config} {line} {folder} {lacking}: {here:?}");
            }
        }
    }

    #[test]
    fn command_line_is_fitted_where_the_firmware_reads_it() {
        let board = Board { model: "Raspberry Pi 4 Model B Rev 1.4".into(), family: "pi4".into(), ..Board::default() };
        let target = Target::in_test();
        for (config, line, folder) in WAYS {
            let dir = lay_out(config, line, folder);
            let boot = Rooted::open(dir.path()).unwrap();
            check(&boot, &board).unwrap();
            let root = tempfile::tempdir().unwrap();
            let supervision = Supervision { program: None, limit: Duration::from_secs(840) };
            fit(&Rooted::open(root.path()).unwrap(), &boot, &board, &target, &supervision).unwrap();
            let cmdline = fs::read_to_string(dir.path().join(folder).join("cmdline.txt")).unwrap();
            assert!(cmdline.contains("root=PARTUUID=00-02"), "{line}: {cmdline}");
            assert!(cmdline.contains("panic=10"), "{line}: {cmdline}");
            assert_eq!(end_trial(dir.path(), &board).unwrap(), 1, "{line}");
            let cmdline = fs::read_to_string(dir.path().join(folder).join("cmdline.txt")).unwrap();
            assert!(cmdline.contains("root=PARTUUID=00-02") && !cmdline.contains("panic"), "{line}: {cmdline}");
            assert!(
                fs::read_to_string(dir.path().join(config)).unwrap().contains("a trial boot takes the same"),
                "{line}"
            );
        }
    }
}
