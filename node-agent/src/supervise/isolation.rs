//! Lets go of the root: the program moves into memory, and sees nothing but the kernel's own file systems.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Error};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::fs::MemfdFlags;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use super::KEEPER;

/// Kernel file systems of the keeper: type and folder.
const MOUNTS: [(&str, &str); 3] = [("proc", "proc"), ("devtmpfs", "dev"), ("sysfs", "sys")];
/// Every root with an init has this folder. The keeper's root is mounted over it, for the keeper alone.
const OVER: &str = "/proc";

/// Starts this program again from memory, with these arguments and a root of its own. Returns only if that failed.
pub(super) fn start_again(arguments: &[OsString]) -> Error {
    match leave_root() {
        Ok(program) => {
            let path = format!("/proc/self/fd/{}", program.as_raw_fd());
            Command::new(path).arg0(KEEPER).args(arguments).exec()
        }
        Err(error) => error,
    }
}

/// Returns a copy of this program in memory. The root is an empty tmpfs then.
fn leave_root() -> io::Result<File> {
    let program = rustix::fs::memfd_create(KEEPER, MemfdFlags::CLOEXEC)?;
    let mut program = File::from(program);
    marco_syscalls::own_mounts()?;
    // Otherwise the image's init would see these mounts.
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
    // Process 1 may have no /proc yet.
    rustix::mount::mount("proc", OVER, "proc", MountFlags::NOSUID, None)?;
    io::copy(&mut File::open("/proc/self/exe")?, &mut program)?;

    rustix::mount::mount("tmpfs", OVER, "tmpfs", MountFlags::NOSUID, Some(c"size=64k,mode=0700"))?;
    std::env::set_current_dir(OVER)?;
    for (kind, folder) in MOUNTS {
        std::fs::create_dir(folder)?;
        rustix::mount::mount(kind, folder, kind, MountFlags::NOSUID, None)?;
    }
    std::fs::create_dir("old")?;
    rustix::process::pivot_root(".", "old")?;
    std::env::set_current_dir("/")?;
    rustix::mount::unmount("/old", UnmountFlags::DETACH)?;
    std::fs::remove_dir("/old")?;
    Ok(program)
}
