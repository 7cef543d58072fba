//! Files and folders below an open folder, never through a link.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, open, openat, unlinkat};
use rustix::io::Errno;

use crate::Error;

const OPEN_FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);
/// The partition's mount options decide on a FAT; elsewhere boot files are for everyone to read.
const FILE_MODE: Mode = Mode::from_bits_retain(0o644);
const FOLDER_MODE: Mode = Mode::from_bits_retain(0o755);

/// The folder that a zip is unpacked into.
pub(super) struct Folder(OwnedFd);

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(path, flags, Mode::empty())
            .map(Self)
            .map_err(|errno| Error::io(format!("open {}", path.display()))(errno.into()))
    }

    pub(super) fn make_folder(&self, name: &str) -> Result<(), Error> {
        self.descend(name).map(drop)
    }

    /// A new, empty file in place of whatever had its name.
    pub(super) fn create(&self, name: &str) -> Result<File, Error> {
        let failed = |errno: Errno| Error::io(format!("create {name:?}"))(errno.into());
        let parent;
        let (folder, part) = match name.rsplit_once('/') {
            Some((head, part)) => {
                parent = self.descend(head)?;
                (&parent, part)
            }
            None => (&self.0, name),
        };
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(folder, part, flags, FILE_MODE) {
            Err(Errno::EXIST) => {
                unlinkat(folder, part, AtFlags::empty()).map_err(failed)?;
                openat(folder, part, flags, FILE_MODE)
            }
            other => other,
        };
        file.map(File::from).map_err(failed)
    }

    /// Opens a folder below, and makes what is missing on the way.
    fn descend(&self, name: &str) -> Result<OwnedFd, Error> {
        let failed = |errno: Errno| Error::io(format!("make the folder {name:?}"))(errno.into());
        let mut folder = self.0.try_clone().map_err(Error::io("open a folder"))?;
        for part in name.split('/') {
            match mkdirat(&folder, part, FOLDER_MODE) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed(errno)),
            }
            folder = openat(&folder, part, OPEN_FOLDER, Mode::empty()).map_err(failed)?;
        }
        Ok(folder)
    }
}
