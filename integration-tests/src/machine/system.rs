//! Operating systems for emulated machines: a kernel of Debian's, busybox, and nothing else. Small, so that a slow
//! machine boots them in seconds; the agent comes with the installer.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::board::Board;
use crate::image::{Compression, hide_missing_boot_files, noise, pack};
use crate::process::{run, tool};
use crate::wait::seconds;

/// What the initial RAM file system runs: everything that its kernel has as a module, then the root.
const INIT: &str = include_str!("system/init");
/// What the root runs first.
const RC: &str = include_str!("system/rc");
/// The DHCP client's script.
const UDHCPC: &str = include_str!("system/udhcpc");
/// What the agent calls to restart or power off: as much of shutdown(8) as it uses.
const SHUTDOWN: &str = include_str!("system/shutdown");
/// Who does what: busybox's init starts the agent again when it ends.
const INITTAB: &str = "::sysinit:/etc/rc\n::respawn:/etc/agent\n::shutdown:/bin/busybox umount -a -r\n";
/// The agent's output goes to the console, where the harness keeps it.
const AGENT: &str = "#!/bin/sh\nexec /usr/bin/marco-agent run </dev/null >/dev/console 2>&1\n";

/// The label by which that of [`Kind::CloudInit`] looks for its data: what images of Ubuntu for the Pi have.
pub const CLOUD_INIT_LABEL: &str = "system-boot";

/// How long packing a few files may take on a machine that has much else to do.
const PACK: std::time::Duration = seconds(120);

/// What an image is to be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It comes up.
    Good,
    /// It comes up, and has the configuration of a cloud-init, with data for it beside its boot files.
    CloudInit,
    /// Its init ends at once, and the kernel panics.
    Panics,
    /// It has no boot files, which nobody can know before it is unpacked: then the installer refuses it.
    NoSystem,
}

/// Where the pieces come from.
#[derive(Debug, Clone)]
pub struct Pieces {
    /// The machine that the image is for.
    pub board: Board,
    /// The root of Debian's packages, made by `scripts/debian-root.sh`.
    pub debian: PathBuf,
}

/// Makes an image: the tree is `folder/NAME`, the tarball beside it.
pub async fn make(pieces: &Pieces, kind: Kind, name: &str, folder: &Path) -> Result<PathBuf> {
    let root = folder.join(name);
    lay_out(pieces, kind, name, &root).await.with_context(|| format!("laying out {}", root.display()))?;
    pack(&root, &folder.join(format!("{name}.tar.gz")), Compression::Gzip)
}

async fn lay_out(pieces: &Pieces, kind: Kind, name: &str, root: &Path) -> Result<()> {
    for path in [
        "bin",
        "boot/firmware/overlays",
        "dev",
        "etc/marco",
        "etc/ssh",
        "home",
        "proc",
        "root",
        "run",
        "sbin",
        "sys",
        "tmp",
        "usr/bin",
        "usr/lib/noise",
        "var/lib",
    ] {
        fs::create_dir_all(root.join(path))?;
    }
    fs::copy(pieces.debian.join("bin/busybox"), root.join("bin/busybox"))?;
    symlink("busybox", root.join("bin/sh"))?;
    let release = format!("ID=busybox\nPRETTY_NAME=\"Busybox {name}\"\n");
    let texts = [
        ("etc/os-release", release.as_str()),
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
        ("etc/group", "root:x:0:\n"),
        ("etc/hostname", "image\n"),
        ("etc/hosts", "127.0.0.1\tlocalhost\n"),
        ("etc/inittab", INITTAB),
        ("etc/fstab", "PARTUUID=00000000-02 / ext4 defaults 0 1\nPARTUUID=00000000-01 /boot/firmware vfat ro 0 2\n"),
        ("etc/ssh/sshd_config", "# nobody listens here, but the host keys are the node's\n"),
        ("etc/machine-id", ""),
        ("etc/marco/agent.toml", "shutdown_command = [\"/sbin/shutdown\"]\n"),
        ("usr/lib/noise/name", name),
    ];
    for (path, text) in texts {
        fs::write(root.join(path), text)?;
    }
    for (path, text) in [("etc/rc", RC), ("etc/udhcpc", UDHCPC), ("etc/agent", AGENT), ("sbin/shutdown", SHUTDOWN)] {
        fs::write(root.join(path), text)?;
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(0o755))?;
    }
    // Some bytes that do not compress, so that the stream is seen to run.
    fs::write(root.join("usr/lib/noise/bytes"), noise(name, pieces.board.ballast()))?;
    if kind == Kind::Panics {
        fs::write(root.join("sbin/init"), "#!/bin/sh\nexit 1\n")?;
        fs::set_permissions(root.join("sbin/init"), fs::Permissions::from_mode(0o755))?;
    } else {
        symlink("../bin/busybox", root.join("sbin/init"))?;
    }
    if kind == Kind::NoSystem {
        return hide_missing_boot_files(root);
    }
    if kind == Kind::CloudInit {
        fs::create_dir_all(root.join("etc/cloud/cloud.cfg.d"))?;
        let configuration = format!("datasource:\n  NoCloud:\n    fs_label: {CLOUD_INIT_LABEL}\n");
        fs::write(root.join("etc/cloud/cloud.cfg.d/99-label.cfg"), configuration)?;
        fs::write(root.join("boot/firmware/user-data"), "#cloud-config\n")?;
        fs::write(root.join("boot/firmware/meta-data"), "instance-id: a-test\n")?;
    }
    lay_out_boot(pieces, &root.join("boot/firmware")).await
}

/// The system's own boot files.
async fn lay_out_boot(pieces: &Pieces, boot: &Path) -> Result<()> {
    let board = pieces.board;
    fs::copy(kernel(&pieces.debian)?, boot.join("kernel.img"))?;
    fs::write(boot.join("config.txt"), "auto_initramfs=0\nkernel=kernel.img\ninitramfs initramfs followkernel\n")?;
    let cmdline = format!("console={} root=PARTUUID=00000000-02 rootfstype=ext4 rootwait\n", board.console());
    fs::write(boot.join("cmdline.txt"), cmdline)?;
    fs::write(boot.join("overlays/README"), "no overlays\n")?;
    for tree in board.device_trees() {
        fs::copy(device_tree(&pieces.debian, tree)?, boot.join(tree))?;
    }
    if board.device_trees().is_empty() {
        // The machine itself needs none, but an image without one is no system for a Pi.
        fs::write(boot.join("bcm2711-rpi-4-b.dtb"), "not read by this machine\n")?;
    }
    let work = tempfile::tempdir()?;
    initramfs(pieces, work.path(), &boot.join("initramfs")).await
}

/// Debian's kernel; there is one.
fn kernel(debian: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(debian.join("boot"))?.filter_map(Result::ok).map(|entry| entry.path());
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"));
    entries.find(named).with_context(|| format!("no kernel in {}", debian.display()))
}

/// The device tree for a board, which Debian's kernel calls by the name that Linux has for it.
fn device_tree(debian: &Path, firmware_name: &str) -> Result<PathBuf> {
    let name = firmware_name.replace("bcm2710-", "bcm2837-").replace("bcm2708-", "bcm2835-");
    let found = crate::tree::list(&debian.join("usr/lib"))?.into_iter().find(|path| path.ends_with(&name));
    Ok(debian.join("usr/lib").join(found.with_context(|| format!("Debian's kernel has no {name}"))?))
}

/// Busybox, the modules, and a script.
async fn initramfs(pieces: &Pieces, work: &Path, to: &Path) -> Result<()> {
    for folder in ["bin", "dev", "modules", "proc", "root", "sys"] {
        fs::create_dir_all(work.join(folder))?;
    }
    fs::copy(pieces.debian.join("bin/busybox"), work.join("bin/busybox"))?;
    symlink("busybox", work.join("bin/sh"))?;
    fs::write(work.join("init"), INIT)?;
    fs::set_permissions(work.join("init"), fs::Permissions::from_mode(0o755))?;
    let mut order = String::new();
    for module in modules(&pieces.debian, pieces.board.modules())? {
        let name = module.file_name().context("a module's name")?.to_string_lossy().into_owned();
        fs::copy(&module, work.join("modules").join(&name))?;
        order.push_str(&format!("/modules/{name}\n"));
    }
    fs::write(work.join("modules/order"), order)?;

    let (folder, file) = (work.display().to_string(), to.display().to_string());
    let arguments = ["-c", r#"cd "$1" && find . | cpio -o -H newc --quiet -R 0:0 -O "$2""#, "sh", &folder, &file];
    run(&tool("sh")?, &arguments, PACK).await?.success().context("packing an initial RAM file system")?;
    Ok(())
}

/// The files of these modules and of all that they need, in the order in which they can be loaded; what the kernel has
/// built in is left out.
fn modules(debian: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let folder = debian.join("lib/modules");
    let version = fs::read_dir(&folder)?.next().context("no modules")??.path();
    let dependencies = fs::read_to_string(version.join("modules.dep"))?;
    let mut order: Vec<PathBuf> = Vec::new();
    let mut seen = BTreeSet::new();
    for name in names {
        // modules.dep(5): the module, a colon, all that it needs, the last one first to be loaded.
        let plain = |path: &str| Some(path.rsplit('/').next()?.split('.').next()?.replace('-', "_"));
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(module, _)| plain(module).is_some_and(|module| module == name.replace('-', "_")));
        let Some((module, needed)) = line else { continue };
        for path in needed.split_whitespace().rev().chain([module]) {
            if seen.insert(path.to_owned()) {
                order.push(version.join(path));
            }
        }
    }
    Ok(order)
}
