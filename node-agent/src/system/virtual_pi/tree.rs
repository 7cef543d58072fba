//! The folders of a virtual Pi: a new card in layout resident with a small system, and the kernel's checks when it
//! starts that system.

use std::io::{Cursor, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::firmware::Boot;
use super::{Board, Options, SystemError};
use crate::bootpart::{BootPart, DefaultBoot, IDENTITY};
use crate::supervise;
use crate::system::rooted::Rooted;

/// Installer set of a new card, also packed into its fallback zip.
const INSTALLER: [(&str, &str); 8] = [
    ("bcm2711-rpi-4-b.dtb", "virtual device tree of a Raspberry Pi 4 B\n"),
    ("cmdline.txt", "console=serial0,115200 console=tty1 panic=10\n"),
    ("config.txt", "arm_64bit=1\nauto_initramfs=0\ninitramfs marco-installer.img followkernel\n"),
    ("kernel8.img", "virtual kernel of the installer\n"),
    ("marco-installer.img", "virtual initramfs of the installer\n"),
    ("overlays/README", "Overlays of this set.\n"),
    ("overlays/overlay_map.dtb", "virtual overlay map\n"),
    ("overlays/disable-bt.dtbo", "virtual overlay\n"),
];
/// Files of the firmware itself. A set never contains them.
const FIRMWARE: [(&str, &str); 2] = [("start4.elf", "virtual firmware\n"), ("fixup4.dat", "virtual firmware data\n")];
/// Boot files of the running system.
const BOOT: [(&str, &str); 6] = [
    ("bcm2711-rpi-4-b.dtb", "virtual device tree of a Raspberry Pi 4 B\n"),
    ("config.txt", "arm_64bit=1\n"),
    ("fixup4.dat", "virtual firmware data\n"),
    ("kernel8.img", "virtual kernel of the first system\n"),
    ("overlays/README", "Overlays of this system.\n"),
    ("start4.elf", "virtual firmware\n"),
];
/// Root of the running system.
const ROOT: [(&str, &str); 4] = [
    ("etc/os-release", "ID=marco-virtual\nPRETTY_NAME=\"Marco virtual system\"\n"),
    ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
    ("etc/group", "root:x:0:\n"),
    ("usr/share/doc/README", "The system that a virtual Pi is delivered with.\n"),
];
/// Paths that a kernel tries without `init=`. systemd's own path is listed, since links are not followed here.
const INITS: [&str; 5] = ["sbin/init", "usr/sbin/init", "usr/lib/systemd/systemd", "lib/systemd/systemd", "init"];

/// Path of the supervisor on the command line.
const SUPERVISOR: &str = "/var/lib/marco-agent/supervise";
/// File of an image that hangs: at `kernel`, before it starts a program, or at `init`.
const HANGS: &str = "etc/marco-virtual/hangs";

/// Lays out a card. After an interruption it starts again from the beginning.
pub(super) fn lay_out(dir: &Path, id: &str, board: &Board, options: Options) -> Result<(), SystemError> {
    for part in ["boot", "root", "home"] {
        empty(&dir.join(part))?;
    }
    for folder in ["recovery/marco", "agent"] {
        let folder = dir.join(folder);
        std::fs::create_dir_all(&folder).map_err(SystemError::io("make", folder))?;
    }
    write_all(&dir.join("recovery"), &FIRMWARE)?;
    if options.stock {
        return lay_out_system(dir, "recovery", id);
    }
    if !options.blank {
        lay_out_system(dir, "boot", id)?;
    }

    let zip =
        zip(&INSTALLER).map_err(|error| SystemError::Invalid(format!("cannot make the fallback zip: {error}")))?;
    let bootpart = BootPart::new(dir.join("recovery"), board);
    let path = bootpart.fallback_zip();
    std::fs::write(&path, &zip).map_err(SystemError::io("write", &path))?;
    let invalid = |error| SystemError::Invalid(format!("cannot lay out the recovery partition: {error}"));
    let prefix = bootpart.stage(&path, &hex::encode(Sha256::digest(&zip))).map_err(invalid)?;
    bootpart.make_default(prefix).map_err(invalid)?;
    bootpart
        .set_boot_partition(if options.blank { DefaultBoot::Installer } else { DefaultBoot::System })
        .map_err(invalid)
}

/// Copies the installer's identity to the new system, as an installation on a real card does.
pub(super) fn copy_identity(from: &Path, to: &Path) -> Result<(), SystemError> {
    for name in IDENTITY {
        let path = from.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => crate::durable::replace(&to.join(name), &bytes, 0o600)
                .map_err(SystemError::io("write", to.join(name)))?,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(SystemError::io("read", path)(error)),
        }
    }
    Ok(())
}

/// Lays out the running system, with its boot files in this partition.
fn lay_out_system(dir: &Path, boot: &str, id: &str) -> Result<(), SystemError> {
    for folder in ["root/var/lib/marco-agent", "root/boot/firmware", "root/home"] {
        let folder = dir.join(folder);
        std::fs::create_dir_all(&folder).map_err(SystemError::io("make", folder))?;
    }
    write_all(&dir.join(boot), &BOOT)?;
    write_all(&dir.join("root"), &ROOT)?;
    let cmdline = format!("console=tty1 root=PARTUUID={}-02 rootfstype=ext4 rootwait\n", disk_id(id));
    write_all(&dir.join(boot), &[("cmdline.txt", &cmdline)])?;
    write_all(&dir.join("root"), &[("etc/hostname", &format!("{id}\n")), ("sbin/init", "#!/bin/true\n")])?;
    let init = dir.join("root/sbin/init");
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(&init, executable).map_err(SystemError::io("make executable", init))
}

fn write_all(folder: &Path, files: &[(&str, &str)]) -> Result<(), SystemError> {
    for (name, text) in files {
        let path = folder.join(name);
        let parent = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent).map_err(SystemError::io("make", parent))?;
        std::fs::write(&path, text).map_err(SystemError::io("write", &path))?;
    }
    Ok(())
}

/// Same bytes on every call, so that all virtual Pis have the same fallback digest.
fn zip(files: &[(&str, &str)]) -> Result<Vec<u8>, zip::result::ZipError> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Deflated)
        .last_modified_time(zip::DateTime::default());
    for (name, text) in files {
        writer.start_file(*name, options)?;
        writer.write_all(text.as_bytes())?;
    }
    Ok(writer.finish()?.into_inner())
}

/// Disk identifier in the partition table, derived from the Pi's id.
pub(super) fn disk_id(id: &str) -> String {
    hex::encode(Sha256::digest(id.as_bytes())).chars().take(8).collect()
}

/// Empties the folder, as a new file system would be.
pub(super) fn empty(folder: &Path) -> Result<(), SystemError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            // Without root's rights, an image's folders may be closed to their owner too.
            open_folders(folder).and_then(|()| std::fs::remove_dir_all(folder))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        // A test mounted a small file system there. It stays, and is empty.
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(()),
        other => other,
    }
    .and_then(|()| std::fs::create_dir_all(folder))
    .map_err(SystemError::io("empty", folder))
}

fn open_folders(folder: &Path) -> std::io::Result<()> {
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))?;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_folders(&entry.path())?;
        }
    }
    Ok(())
}

/// True if a kernel with this command line restarts after a panic. The default of Debian's and Raspberry Pi OS's
/// kernels is to halt (`PANIC_TIMEOUT=0`), and the last of several values counts.
pub(super) fn restarts_after_panic(boot: &Boot) -> bool {
    let words = boot.cmdline.split_whitespace();
    let last = words.filter_map(|word| word.strip_prefix("panic=")).next_back();
    last.is_some_and(|seconds| seconds.parse::<i32>().is_ok_and(|seconds| seconds != 0))
}

/// Reason that the started kernel panics. `None`: the system comes up.
pub(super) fn cannot_come_up(root: &Path, boot: &Boot, id: &str) -> Option<String> {
    let word = |key: &str| boot.cmdline.split_whitespace().rev().find_map(|word| word.strip_prefix(key));
    let devices = [format!("PARTUUID={}-02", disk_id(id)), "/dev/mmcblk0p2".to_owned()];
    match word("root=") {
        Some(device) if devices.iter().any(|known| known == device) => {}
        Some(device) => return Some(format!("there is no root file system at {device}")),
        None => return Some("the command line names no root file system".into()),
    }
    let Ok(root) = Rooted::open(root) else { return Some("there is no root file system".into()) };
    // The supervisor of a trial becomes the init that the image itself names.
    let mut named = boot.cmdline.split_whitespace().rev().filter_map(|word| word.strip_prefix("init="));
    let supervised = named.clone().next() == Some(SUPERVISOR);
    if supervised && !root.is_file(supervise::PROGRAM, true) {
        return Some("the root file system has no supervisor".into());
    }
    let found = match named.find(|init| *init != SUPERVISOR) {
        Some(init) => root.is_file(init, true),
        None => INITS.iter().any(|init| root.is_file(init, true)),
    };
    (!found).then(|| "the root file system has no init".into())
}

/// A started system that never gets as far as its agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hang {
    /// Part of the system that hangs.
    pub(super) at: &'static str,
    /// A watchdog or the supervisor resets the machine. Otherwise it waits for hands.
    pub(super) is_reset: bool,
}

/// Returns how the system hangs, by its file [`HANGS`]. `None`: it does not.
pub(super) fn hangs(root: &Path, boot: &Boot) -> Option<Hang> {
    let root = Rooted::open(root).ok()?;
    let at = String::from_utf8_lossy(&root.read(HANGS).ok()??).trim().to_owned();
    if at == "kernel" {
        return Some(Hang { at: "kernel", is_reset: boot.watchdog.is_some() });
    }
    let words = || boot.cmdline.split_whitespace();
    let named = words().rev().find_map(|word| word.strip_prefix("init="));
    let limited =
        words().any(|word| word.strip_prefix("marco.limit=").is_some_and(|limit| limit.parse::<u64>().is_ok()));
    Some(Hang { at: "init", is_reset: named == Some(SUPERVISOR) && limited })
}
