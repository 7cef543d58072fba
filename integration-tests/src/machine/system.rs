//! Operating systems for emulated machines: Debian's kernel and busybox only. They are small, so that a slow machine
//! boots them in seconds. The agent comes with the installer.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::board::Board;
use crate::image::{Compression, noise, pack};
use crate::process::{run, tool};
use crate::wait::seconds;

/// Script of the initial RAM file system: loads all modules and starts the root.
const INIT: &str = include_str!("system/init");
/// First script of the root.
const RC: &str = include_str!("system/rc");
/// The DHCP client's script.
const UDHCPC: &str = include_str!("system/udhcpc");
/// The `shutdown` command that the agent calls: the part of shutdown(8) that it uses.
const SHUTDOWN: &str = include_str!("system/shutdown");
/// Table of busybox's init, which starts the agent again whenever it ends.
const INITTAB: &str = "::sysinit:/etc/rc\n::respawn:/etc/agent\n::shutdown:/bin/busybox umount -a -r\n";
/// Table of an init that starts no agent.
const INITTAB_NO_AGENT: &str = "::sysinit:/etc/rc\n::shutdown:/bin/busybox umount -a -r\n";
/// An init that hangs.
const HANG: &str = "#!/bin/sh\necho init hangs\nwhile :; do /bin/busybox sleep 1000; done\n";
/// An init that waits for an operator.
const EMERGENCY: &str = "#!/bin/sh\necho You are in emergency mode.\nwhile :; do /bin/sh; /bin/busybox sleep 1; done\n";
/// First line of [`RC`] that sets the network up.
const NETWORK: &str = "$b ip link set lo up\n";
/// End of [`RC`] for a system that restarts after its first boot. The rest of systemd's part: it passes the argument in its
/// file on to reboot(2).
const RESTART: &str = "if ! [ -e /etc/booted ]; then\n    until [ -s /run/systemd/reboot-param ]; do $b usleep 200000; done\n    \
                       echo booted >/etc/booted\n    $b sync\n    read -r number word </run/systemd/reboot-param\n    \
                       echo \"marco-test-firmware: $word\" >/dev/console\n    $b reboot -f\nfi\n";
/// Word on the kernel's command line for which the harness never lets the kernel run.
pub const HOLD: &str = "marco.test_hold";

/// Sends the agent's output to the console, which the harness records.
const AGENT: &str = "#!/bin/sh\nexec /usr/bin/marco-agent run </dev/null >/dev/console 2>&1\n";

/// The file system label by which [`Kind::CloudInit`] finds its data, as in Ubuntu's images for the Pi.
pub const CLOUD_INIT_LABEL: &str = "system-boot";

/// Timeout of packing a few files on a busy machine.
const PACK: std::time::Duration = seconds(120);

/// Behaviour of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It boots.
    Good,
    /// It boots. It has a configuration of cloud-init, with the data beside its boot files.
    CloudInit,
    /// Its init ends at once, and the kernel panics.
    Panics,
    /// Its kernel hangs before it starts a program: the harness holds the processor.
    Holds,
    /// It hangs in its initial RAM file system.
    HangsEarly,
    /// Its init hangs.
    HangsInInit,
    /// Its init waits at the console for an operator.
    Emergency,
    /// It boots, and never starts the agent.
    NoAgent,
    /// It boots, and never gets a network.
    NoNetwork,
    /// It boots, and restarts once by itself, as after a first boot.
    Restarts,
    /// Its boot files are those of a board that is not emulated, so the installer refuses it.
    NoSystem,
}

/// Inputs of an image.
#[derive(Debug, Clone)]
pub struct Pieces {
    /// The machine that the image is for.
    pub board: Board,
    /// Folder with unpacked Debian packages, made by `scripts/debian-root.sh`.
    pub debian: PathBuf,
}

/// Makes an image: the source tree is `folder/NAME`, the tarball `folder/NAME.tar.gz`.
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
        ("etc/inittab", if kind == Kind::NoAgent { INITTAB_NO_AGENT } else { INITTAB }),
        ("etc/fstab", "PARTUUID=00000000-02 / ext4 defaults 0 1\nPARTUUID=00000000-01 /boot/firmware vfat ro 0 2\n"),
        ("etc/ssh/sshd_config", "# nobody listens here, but the host keys are the node's\n"),
        // Empty, as in published images: the installer must give each node an id of its own.
        ("etc/machine-id", ""),
        ("etc/marco/agent.toml", "shutdown_command = [\"/sbin/shutdown\"]\n"),
        ("usr/lib/noise/name", name),
    ];
    for (path, text) in texts {
        fs::write(root.join(path), text)?;
    }
    let rc = match kind {
        Kind::NoNetwork => RC.split(NETWORK).next().unwrap_or_default().to_owned(),
        // Before the network, and so before the agent.
        Kind::Restarts => RC.replace(NETWORK, &format!("{RESTART}{NETWORK}")),
        _ => RC.to_owned(),
    };
    for (path, text) in
        [("etc/rc", rc.as_str()), ("etc/udhcpc", UDHCPC), ("etc/agent", AGENT), ("sbin/shutdown", SHUTDOWN)]
    {
        fs::write(root.join(path), text)?;
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(0o755))?;
    }
    // Bytes that do not compress, so that the stream takes long enough to be observed.
    fs::write(root.join("usr/lib/noise/bytes"), noise(name, pieces.board.ballast()))?;
    let init = match kind {
        Kind::Panics => Some("#!/bin/sh\nexit 1\n"),
        Kind::HangsInInit => Some(HANG),
        Kind::Emergency => Some(EMERGENCY),
        _ => None,
    };
    if let Some(init) = init {
        fs::write(root.join("sbin/init"), init)?;
        fs::set_permissions(root.join("sbin/init"), fs::Permissions::from_mode(0o755))?;
    } else {
        // A symbolic link, as in real images: the checks have to follow it.
        symlink("../bin/busybox", root.join("sbin/init"))?;
    }
    if kind == Kind::NoSystem {
        // The push takes it, because a Pi 5 starts from it. No emulated board does.
        for name in ["kernel_2712.img", "cmdline.txt", "config.txt", "bcm2712-rpi-5-b.dtb"] {
            fs::write(root.join("boot/firmware").join(name), "# of another board\n")?;
        }
        return Ok(());
    }
    if kind == Kind::CloudInit {
        fs::create_dir_all(root.join("etc/cloud/cloud.cfg.d"))?;
        let configuration = format!("datasource:\n  NoCloud:\n    fs_label: {CLOUD_INIT_LABEL}\n");
        fs::write(root.join("etc/cloud/cloud.cfg.d/99-label.cfg"), configuration)?;
        fs::write(root.join("boot/firmware/user-data"), "#cloud-config\n")?;
        fs::write(root.join("boot/firmware/meta-data"), "instance-id: a-test\n")?;
    }
    if kind == Kind::Holds {
        // A kernel with the driver of a Pi's watchdog: for it the installer asks the firmware to start the watchdog.
        fs::create_dir_all(root.join("lib/modules/e2e"))?;
        fs::write(root.join("lib/modules/e2e/modules.builtin"), "kernel/drivers/watchdog/bcm2835_wdt.ko\n")?;
    }
    lay_out_boot(pieces, kind, &root.join("boot/firmware")).await
}

/// Lays out the system's own boot files.
async fn lay_out_boot(pieces: &Pieces, kind: Kind, boot: &Path) -> Result<()> {
    let board = pieces.board;
    fs::copy(kernel(&pieces.debian)?, boot.join("kernel.img"))?;
    fs::write(boot.join("config.txt"), "auto_initramfs=0\nkernel=kernel.img\ninitramfs initramfs followkernel\n")?;
    let hold = if kind == Kind::Holds { HOLD } else { "" };
    // The kernel's own watchdog in place of a Pi's, already running when its driver is loaded.
    let cmdline = format!(
        "console={} root=PARTUUID=00000000-02 rootfstype=ext4 rootwait softdog.soft_active_on_boot=1 {hold}\n",
        board.console()
    );
    fs::write(boot.join("cmdline.txt"), cmdline)?;
    fs::write(boot.join("overlays/README"), "no overlays\n")?;
    for tree in board.device_trees() {
        fs::copy(device_tree(&pieces.debian, tree)?, boot.join(tree))?;
    }
    if board.device_trees().is_empty() {
        // The machine needs no device tree, but the installer refuses an image for a Pi without one.
        fs::write(boot.join("bcm2711-rpi-4-b.dtb"), "not read by this machine\n")?;
    }
    let work = tempfile::tempdir()?;
    initramfs(pieces, kind, work.path(), &boot.join("initramfs")).await
}

/// The kernel in Debian's packages; there is exactly one.
fn kernel(debian: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(debian.join("boot"))?.filter_map(Result::ok).map(|entry| entry.path());
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz"));
    entries.find(named).with_context(|| format!("no kernel in {}", debian.display()))
}

/// The file of a device tree. Debian has it under Linux's name, which differs from the firmware's.
fn device_tree(debian: &Path, firmware_name: &str) -> Result<PathBuf> {
    // The vendor's kernel has its own names for two chips: bcm2710 is Linux's bcm2837, and bcm2708 is bcm2835.
    let name = firmware_name.replace("bcm2710-", "bcm2837-").replace("bcm2708-", "bcm2835-");
    let found = crate::tree::list(&debian.join("usr/lib"))?.into_iter().find(|path| path.ends_with(&name));
    Ok(debian.join("usr/lib").join(found.with_context(|| format!("Debian's kernel has no {name}"))?))
}

/// Packs busybox, the modules and a script.
async fn initramfs(pieces: &Pieces, kind: Kind, work: &Path, to: &Path) -> Result<()> {
    for folder in ["bin", "dev", "modules", "proc", "root", "sys"] {
        fs::create_dir_all(work.join(folder))?;
    }
    fs::copy(pieces.debian.join("bin/busybox"), work.join("bin/busybox"))?;
    symlink("busybox", work.join("bin/sh"))?;
    let hang = "$b mount -t ext4";
    let hangs = INIT.replace(hang, &format!("echo hangs early\nwhile :; do $b sleep 1000; done\n{hang}"));
    fs::write(work.join("init"), if kind == Kind::HangsEarly { &hangs } else { INIT })?;
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

/// The files of these modules and of their dependencies, in loading order. Modules built into the kernel have no file
/// and are left out.
fn modules(debian: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let folder = debian.join("lib/modules");
    let version = fs::read_dir(&folder)?.next().context("no modules")??.path();
    let dependencies = fs::read_to_string(version.join("modules.dep"))?;
    let mut order: Vec<PathBuf> = Vec::new();
    let mut seen = BTreeSet::new();
    for name in names {
        // modules.dep(5): the module, a colon, then its dependencies, of which the last one is loaded first.
        let plain = |path: &str| Some(path.rsplit('/').next()?.split('.').next()?.replace('-', "_"));
        let line = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(module, _)| plain(module).is_some_and(|module| module == name.replace('-', "_")));
        let Some((module, needed)) = line else { continue };
        // Two modules may need the same third one, which must be loaded once.
        for path in needed.split_whitespace().rev().chain([module]) {
            if seen.insert(path.to_owned()) {
                order.push(version.join(path));
            }
        }
    }
    Ok(order)
}
