//! The only way for a running system to write to the card's FATs. They are mounted read-only as far as the agent
//! decides it, since a power cut cannot tear a FAT that is not written. One is mounted for writing only while a
//! [`Writable`] exists.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, StatVfsMountFlags};

use super::BootError;
use crate::system::{self, SystemError};

/// Tries to make the partition read-only again, and the pause between them. A program that another thread starts holds
/// the agent's open files until its `exec`, and the partition stays busy until then.
const TRIES: u32 = 40;
const PAUSE: Duration = Duration::from_millis(25);

/// Exclusive access to a partition that is open for writing.
#[derive(Debug)]
pub struct Writable {
    folder: PathBuf,
    /// True: it was mounted read-only, and is made so again.
    closes: bool,
    _lock: File,
}

impl Writable {
    /// Waits for exclusive access to the partition that is mounted at this folder.
    pub(crate) fn open(folder: &Path) -> Result<Self, BootError> {
        // The folder itself is locked: on a read-only mount no lock file can be made.
        let lock = File::open(folder).and_then(|file| {
            rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
            Ok(file)
        });
        let lock = lock.map_err(BootError::io("lock", folder))?;
        let found = rustix::fs::statvfs(folder).map_err(|error| BootError::io("look at", folder)(error.into()))?;
        let closes = found.f_flag.contains(StatVfsMountFlags::RDONLY);
        if closes {
            let opened = system::make_writable(folder);
            opened.map_err(|error| BootError::io("mount for writing", folder)(std::io::Error::other(error)))?;
        }
        Ok(Self { folder: folder.to_owned(), closes, _lock: lock })
    }
}

impl Drop for Writable {
    fn drop(&mut self) {
        if self.closes
            && let Err(error) = close(&self.folder)
        {
            // Everything was synced when it was written. The partition only stays writable.
            tracing::warn!(folder = %self.folder.display(), error = %crate::cause::chain(&error), "partition stays writable");
        }
    }
}

fn close(folder: &Path) -> Result<(), SystemError> {
    let mut tries = 1;
    loop {
        match system::make_read_only(folder) {
            Err(SystemError::Io { source, .. }) if source.kind() == ErrorKind::ResourceBusy && tries < TRIES => {
                tries += 1;
                #[expect(
                    clippy::disallowed_methods,
                    reason = "the kernel tells nobody when it is free; all here blocks"
                )]
                std::thread::sleep(PAUSE);
            }
            done => return done,
        }
    }
}
