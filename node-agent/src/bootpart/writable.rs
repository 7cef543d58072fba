//! The one door for a running system's writes to the card's FATs. They are mounted for reading only where it is ours to say,
//! since a FAT that is not written cannot be torn; one is mounted for writing only while this is held.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, StatVfsMountFlags};

use super::BootError;
use crate::system::{self, SystemError};

/// A program that another thread starts has, until it is there, whatever file we have open for writing, and as long the
/// partition cannot be closed: that often, and with that pause, it is tried.
const TRIES: u32 = 40;
const PAUSE: Duration = Duration::from_millis(25);

/// Holds the partition open for writing, and others off.
#[derive(Debug)]
pub struct Writable {
    folder: PathBuf,
    /// It was mounted for reading only, and is again afterwards.
    closes: bool,
    _lock: File,
}

impl Writable {
    /// Waits until nobody else holds the partition that is mounted at this folder.
    pub(crate) fn open(folder: &Path) -> Result<Self, BootError> {
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
            // Everything was synced where it was written; it only stays open to others.
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
