//! System calls that the agent needs and no library offers, or none as a safe function: reboot(2) with an argument, the
//! ioctl BLKPG, and unshare(2) of the mounts. BLKPG tells the kernel of one partition while others of the same disk are
//! mounted.

use std::convert::Infallible;
use std::ffi::CStr;
use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::AsRawFd as _;

/// `BLKPG` of linux/fs.h: `_IO(0x12, 105)`.
const BLKPG: libc::c_ulong = 0x1269;
/// `BLKPG_ADD_PARTITION` of linux/blkpg.h.
const ADD: libc::c_int = 1;
/// `BLKPG_DEL_PARTITION` of linux/blkpg.h.
const DELETE: libc::c_int = 2;

/// `struct blkpg_ioctl_arg` of linux/blkpg.h.
#[repr(C)]
struct Argument {
    operation: libc::c_int,
    flags: libc::c_int,
    length: libc::c_int,
    data: *const Partition,
}

/// `struct blkpg_partition` of linux/blkpg.h.
#[repr(C)]
struct Partition {
    start: libc::c_longlong,
    length: libc::c_longlong,
    number: libc::c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// Restarts the machine at once and passes this argument to the firmware (reboot(2), `LINUX_REBOOT_CMD_RESTART2`).
/// Dirty pages are not written back: sync first.
///
/// # Errors
/// Returns EPERM if the process lacks CAP_SYS_BOOT.
pub fn restart_with(argument: &CStr) -> Result<Infallible> {
    // SAFETY: the argument is a string with its NUL that lives over the call, and the kernel only reads it.
    unsafe {
        libc::syscall(
            libc::SYS_reboot,
            libc::LINUX_REBOOT_MAGIC1,
            libc::LINUX_REBOOT_MAGIC2,
            libc::LINUX_REBOOT_CMD_RESTART2,
            argument.as_ptr(),
        );
    }
    // The call returns only if it failed.
    Err(Error::last_os_error())
}

/// Gives the calling process mounts of its own (unshare(2), `CLONE_NEWNS`). Threads that exist already keep the old ones.
///
/// # Errors
/// Returns EPERM if the process lacks CAP_SYS_ADMIN.
pub fn own_mounts() -> Result<()> {
    // SAFETY: the call takes no pointer. With this flag alone it shares or closes no descriptor and no memory.
    let done = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    if done == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// Announces a partition to the kernel. `start` and `length` are in bytes, `number` counts from 1.
///
/// # Errors
/// Returns EBUSY if it overlaps another partition or the number is taken, and another error if the device cannot have
/// partitions.
pub fn add_partition(disk: &File, number: u32, start: u64, length: u64) -> Result<()> {
    let signed = |value: u64| libc::c_longlong::try_from(value).map_err(Error::other);
    partition(disk, ADD, number, signed(start)?, signed(length)?)
}

/// Removes a partition from the kernel's view of a disk. The disk itself is not changed.
///
/// # Errors
/// Returns EBUSY if it is mounted, and ENXIO if the kernel does not know it.
pub fn delete_partition(disk: &File, number: u32) -> Result<()> {
    partition(disk, DELETE, number, 0, 0)
}

fn partition(
    disk: &File,
    operation: libc::c_int,
    number: u32,
    start: libc::c_longlong,
    length: libc::c_longlong,
) -> Result<()> {
    let number = libc::c_int::try_from(number).map_err(Error::other)?;
    let data = Partition { start, length, number, device_name: [0; 64], volume_name: [0; 64] };
    let size = libc::c_int::try_from(size_of::<Partition>()).map_err(Error::other)?;
    let argument = Argument { operation, flags: 0, length: size, data: &raw const data };
    // SAFETY: both structures have the kernel's layout and live over the call; the kernel only reads them.
    let done = unsafe { libc::ioctl(disk.as_raw_fd(), BLKPG as _, &raw const argument) };
    if done == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_no_disk_has_no_partitions() {
        let file = tempfile::tempfile().unwrap();
        // ENOTTY with any privileges: a regular file has no such ioctl.
        assert_eq!(super::add_partition(&file, 1, 0, 512).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
