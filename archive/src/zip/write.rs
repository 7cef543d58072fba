//! Creates files and folders below an open folder. Never follows a link.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, open, openat, unlinkat};
use rustix::io::Errno;

use crate::Error;

const OPEN_FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);
/// Mode of files. On FAT the mount options override it; elsewhere everyone may read boot files.
const FILE_MODE: Mode = Mode::from_bits_retain(0o644);
const FOLDER_MODE: Mode = Mode::from_bits_retain(0o755);

/// The folder into which a zip is unpacked.
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

    /// Creates an empty file and replaces an existing one of that name.
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
        // O_EXCL and O_NOFOLLOW: the file is always new. A symbolic link of that name cannot redirect the write.
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

    /// Opens a folder below this one and creates missing parents.
    fn descend(&self, name: &str) -> Result<OwnedFd, Error> {
        let failed = |errno: Errno| Error::io(format!("make the folder {name:?}"))(errno.into());
        let mut folder = self.0.try_clone().map_err(Error::io("open a folder"))?;
        // Part by part with O_NOFOLLOW: a link on the disk cannot lead out of the folder.
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
