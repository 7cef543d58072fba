//! A partition mounted read-only without a mount point. No other process sees it, and it disappears with this process,
//! however that ends.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};
use tokio::process::Command;

use super::device::{Place, device_of};
use super::table::{FileSystem, Partition};

/// Timeout for `losetup`, which normally answers at once.
const PATIENCE: Duration = Duration::from_secs(20);

/// A mount without a mount point. Dropping it unmounts.
#[derive(Debug)]
pub(super) struct Mounted(OwnedFd);

impl AsFd for Mounted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Mounted {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Mounted {
    pub(super) async fn new(place: &Place<'_>) -> Result<Self> {
        // Looked up first: while a file system is mounted, its superblock on the disk may be out of date.
        let own = device_of(place)?;
        let kind = match place.partition.file_system {
            // Replaying the journal would write to someone's card, and reading past it would miss files.
            FileSystem::Ext { dirty: true } => bail!(
                "it was not unmounted properly, and reading it as it is would miss what its journal holds: let \
                 `e2fsck -p` put it in order first"
            ),
            FileSystem::Ext { dirty: false } => "ext4",
            FileSystem::Other(name) => name,
            FileSystem::Fat { .. } | FileSystem::Unknown => bail!("it has no file system of a root"),
        };
        if let Some(device) = own {
            return mount(&device, kind).map(Self);
        }
        let device = attach(place).await?;
        let mounted = mount(&device, kind);
        // The mount keeps the loop device alive. Once detached, it disappears with the mount.
        let detached = losetup(&["--detach".to_owned(), device.display().to_string()]).await;
        let mounted = mounted?;
        detached?;
        Ok(Self(mounted))
    }
}

fn mount(device: &Path, kind: &str) -> Result<OwnedFd> {
    let mounted = || -> rustix::io::Result<OwnedFd> {
        // The mount API of Linux 5.2. mount(2) needs a mount point, which a killed process would leave behind.
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(context.as_fd(), "source", device)?;
        fsconfig_set_flag(context.as_fd(), "ro")?;
        fsconfig_create(context.as_fd())?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            // The contents are foreign: no setuid program, device or executable of the card may take effect here.
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    mounted().map_err(|errno| match errno {
        Errno::PERM => anyhow::anyhow!("mounting a {kind} needs root: run this with sudo"),
        Errno::NODEV => anyhow::anyhow!("this machine's kernel knows no {kind}"),
        errno => anyhow::Error::from(errno).context(format!("cannot mount the {kind} on {}", device.display())),
    })
}

/// Creates a loop device for a part of a file or of a disk.
async fn attach(place: &Place<'_>) -> Result<PathBuf> {
    if !rustix::process::geteuid().is_root() {
        bail!("mounting it needs root: run this with sudo");
    }
    let Partition { start, length, .. } = place.partition;
    let arguments =
        ["--find", "--show", "--read-only", "--offset", &start.to_string(), "--sizelimit", &length.to_string()];
    let mut arguments: Vec<String> = arguments.into_iter().map(str::to_owned).collect();
    arguments.extend(["--".to_owned(), place.path.display().to_string()]);
    Ok(PathBuf::from(losetup(&arguments).await?.trim()))
}

async fn losetup(arguments: &[String]) -> Result<String> {
    // The usual places of losetup: sudo may have removed them from PATH.
    let path = ["/usr/sbin/losetup", "/sbin/losetup", "/usr/bin/losetup", "/bin/losetup"];
    let program = path.into_iter().find(|path| Path::new(path).exists()).unwrap_or("losetup");
    let running = Command::new(program).args(arguments).kill_on_drop(true).output();
    let output = tokio::time::timeout(PATIENCE, running).await.context("losetup does not answer")?;
    let output = output.context("losetup (of util-linux) cannot be run")?;
    if !output.status.success() {
        bail!("losetup: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
