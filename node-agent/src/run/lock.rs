//! One agent for each state folder: two would overwrite each other's journal, and with one identity on two agents the
//! controller takes the node for cloned and quarantines it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::RunError;
use crate::system::{System, SystemError};

/// Name of the lock's file. The folder itself is locked while an identity is renewed.
const FILE: &str = "agent.lock";
/// Characters of the holder's command line that are shown.
const COMMAND: usize = 120;

/// Keeps other agents from the folders until it is dropped, or the process ends.
#[derive(Debug)]
pub(super) struct Lock(#[expect(dead_code, reason = "held for its Drop only")] Vec<File>);

impl Lock {
    /// Takes the folders of this machine's journal and identity.
    ///
    /// # Errors
    /// Another agent has one of them.
    pub(super) fn take(system: &dyn System) -> Result<Self, RunError> {
        let (state, identity) = (system.state_dir(), system.identity_dir());
        let mut held = Vec::new();
        // Once if both are the same folder: a second lock of one file refuses itself, also within a process.
        for folder in [Some(&state), Some(&identity).filter(|identity| **identity != state)].into_iter().flatten() {
            held.extend(take(folder)?);
        }
        Ok(Self(held))
    }
}

/// `None`: the file system is read-only or full and has no lock file yet. The agent still runs, to report that.
fn take(folder: &Path) -> Result<Option<File>, RunError> {
    let path = folder.join(FILE);
    let mut file = match open(folder, &path) {
        Ok(file) => file,
        Err(error) => {
            tracing::warn!(file = %path.display(), error = %error, "folder cannot be locked");
            return Ok(None);
        }
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            return Err(RunError::InUse { folder: folder.to_owned(), holder: holder(&mut file) });
        }
        Err(error) => return Err(SystemError::io("lock", path)(error.into()).into()),
    }
    // The process id is only for the error of a later agent; the lock itself is the kernel's.
    if let Err(error) = std::fs::write(&path, format!("{}\n", std::process::id())) {
        tracing::debug!(file = %path.display(), error = %error, "holder of the lock not written");
    }
    Ok(Some(file))
}

/// Opens the lock's file, made if it is missing, for reading only: a file that is open for writing keeps its file system
/// from being mounted read-only (`MS_REMOUNT`, mount(2): EBUSY), and an installer does that before it moves the partition
/// on which its own folder lies.
fn open(folder: &Path, path: &Path) -> std::io::Result<File> {
    let made = std::fs::create_dir_all(folder).and_then(|()| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path).map(drop)
    });
    match made {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Err(error),
        // A full or read-only file system may still have the file, and that can be locked.
        Err(error) => File::open(path).map_err(|_| error),
        Ok(()) => File::open(path),
    }
}

/// Names the holder of the lock, as far as it said so.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
    let Some(pid) = read.ok().and_then(|_| text.trim().parse::<u32>().ok()) else {
        return "another process".to_owned();
    };
    // Only shown, never acted on: in another container the same number is another process.
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    let command: String = command.trim().chars().take(COMMAND).collect();
    if command.is_empty() { format!("process {pid}") } else { format!("process {pid}: {command}") }
}

#[cfg(test)]
mod tests {
    use super::{FILE, take};
    use crate::run::RunError;

    #[test]
    fn second_taker_learns_who_was_first() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("state");
        let first = take(&folder).unwrap();
        assert!(first.is_some());
        let Err(RunError::InUse { folder: named, holder }) = take(&folder) else { panic!("both hold it") };
        assert_eq!(named, folder);
        assert!(holder.starts_with(&format!("process {}: ", std::process::id())), "{holder}");
        // The lock goes with its holder. A file that it left, with whatever text, does not count.
        drop(first);
        std::fs::write(folder.join(FILE), "4294967295 and much more").unwrap();
        assert!(take(&folder).unwrap().is_some());
    }

    /// `fcntl(F_GETFL)` says how a file is open.
    #[test]
    fn held_lock_keeps_no_file_system_from_being_mounted_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let held = take(dir.path()).unwrap().unwrap();
        let flags = rustix::fs::fcntl_getfl(&held).unwrap();
        assert_eq!(flags & rustix::fs::OFlags::ACCMODE, rustix::fs::OFlags::RDONLY);
    }

    #[test]
    fn folder_that_cannot_be_written_stops_no_agent() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("no-folder");
        std::fs::write(&file, "").unwrap();
        assert!(take(&file).unwrap().is_none());
    }
}
