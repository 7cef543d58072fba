//! Files of another root: an installed system's, seen from outside. Its links are followed as that system would follow
//! them, never out of it (`openat2` with `RESOLVE_IN_ROOT`). The root may come from an image of unknown origin.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::step;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};

/// Largest file that is read whole, in bytes.
const LARGEST: u64 = 16 * 1024 * 1024;

/// Kind of a folder's entry. Links are not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A device, FIFO or socket.
    Other,
}

/// A root, held open by its descriptor.
#[derive(Debug)]
pub struct Rooted(OwnedFd);

impl Rooted {
    /// Opens the folder.
    pub fn open(root: &Path) -> Result<Self> {
        Ok(Self(rustix::fs::openat(CWD, root, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?))
    }

    fn at(&self, path: &Path, flags: OFlags) -> Result<File> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = flags | OFlags::CLOEXEC;
        Ok(rustix::fs::openat2(&self.0, path, flags, Mode::empty(), ResolveFlags::IN_ROOT)?.into())
    }

    /// Reads a whole regular file. `None`: there is none.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<Option<Vec<u8>>> {
        // Without O_NONBLOCK a FIFO in a hostile image would block the agent forever.
        let file = match self.at(path.as_ref(), OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(file) => file,
            Err(error) if absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        // One byte more than allowed, to tell a file of the largest size from a larger one.
        file.take(LARGEST + 1).read_to_end(&mut bytes)?;
        let fits = u64::try_from(bytes.len()).is_ok_and(|length| length <= LARGEST);
        if fits { Ok(Some(bytes)) } else { Err(Error::new(ErrorKind::FileTooLarge, "larger than 16 MiB")) }
    }

    /// True for a regular file that is not empty and, with `executable`, has an x bit.
    pub fn is_file(&self, path: impl AsRef<Path>, executable: bool) -> bool {
        self.at(path.as_ref(), OFlags::PATH)
            .and_then(|file| file.metadata())
            .is_ok_and(|found| found.is_file() && found.len() > 0 && (!executable || found.mode() & 0o111 != 0))
    }

    /// True for a regular file, even an empty one.
    pub fn is_there(&self, path: impl AsRef<Path>) -> bool {
        self.at(path.as_ref(), OFlags::PATH).and_then(|file| file.metadata()).is_ok_and(|found| found.is_file())
    }

    /// True for a folder.
    pub fn is_dir(&self, path: impl AsRef<Path>) -> bool {
        self.at(path.as_ref(), OFlags::PATH).and_then(|file| file.metadata()).is_ok_and(|found| found.is_dir())
    }

    /// Opens a regular file for reading. Returns an error for anything else, a device or FIFO for example.
    pub fn open_file(&self, path: impl AsRef<Path>) -> Result<File> {
        let file = self.at(path.as_ref(), OFlags::RDONLY | OFlags::NONBLOCK)?;
        if file.metadata()?.is_file() { Ok(file) } else { Err(Error::new(ErrorKind::InvalidInput, "not a file")) }
    }

    /// Entries of a folder, sorted by name. Empty if there is no folder.
    pub fn list(&self, path: impl AsRef<Path>) -> Result<Vec<(OsString, Kind)>> {
        let folder = match self.at(path.as_ref(), OFlags::DIRECTORY) {
            Ok(folder) => folder,
            Err(error) if absent(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut entries = Vec::new();
        for entry in Dir::read_from(&folder)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let found = rustix::fs::statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let kind = match FileType::from_raw_mode(found.st_mode) {
                FileType::RegularFile => Kind::File,
                FileType::Directory => Kind::Folder,
                FileType::Symlink => Kind::Link,
                _ => Kind::Other,
            };
            entries.push((name.to_owned(), kind));
        }
        entries.sort();
        Ok(entries)
    }

    /// Removes everything in a folder, but not the folder.
    pub fn clear(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        for (name, kind) in self.list(path)? {
            let inner = path.join(&name);
            let folder = self.at(path, OFlags::DIRECTORY)?;
            if kind == Kind::Folder {
                self.clear(&inner)?;
                rustix::fs::unlinkat(&folder, &name, AtFlags::REMOVEDIR)?;
            } else {
                rustix::fs::unlinkat(&folder, &name, AtFlags::empty())?;
            }
        }
        Ok(())
    }

    /// Creates an empty file, open for writing, in place of any file or link of that name.
    pub fn create(&self, path: impl AsRef<Path>, mode: u32) -> Result<File> {
        step::below("write", &self.0, path.as_ref(), &[])?;
        self.remove(path.as_ref())?;
        let (folder, name) = self.parent(path.as_ref())?;
        // O_EXCL never follows a link, whatever appears after the removal.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&folder, name, flags, Mode::from_raw_mode(mode))?.into())
    }

    fn parent<'a>(&self, path: &'a Path) -> Result<(File, &'a OsStr)> {
        let name = path.file_name().ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the path has no name"))?;
        Ok((self.folder(path.parent().unwrap_or(Path::new("")))?, name))
    }

    /// Opens a folder. Missing ones on its path are made.
    pub fn folder(&self, path: impl AsRef<Path>) -> Result<File> {
        let mut sofar = PathBuf::new();
        let mut folder = self.at(&sofar, OFlags::DIRECTORY)?;
        for part in path.as_ref().components() {
            sofar.push(part);
            folder = match self.at(&sofar, OFlags::DIRECTORY) {
                Ok(folder) => folder,
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    rustix::fs::mkdirat(&folder, Path::new(part.as_os_str()), Mode::from_raw_mode(0o755))?;
                    self.at(&sofar, OFlags::DIRECTORY)?
                }
                Err(error) => return Err(error),
            };
        }
        Ok(folder)
    }

    /// Replaces any file or link of that name atomically, synced to the disk.
    pub fn write(&self, path: impl AsRef<Path>, bytes: &[u8], mode: u32) -> Result<()> {
        let path = path.as_ref();
        step::below("replace", &self.0, path, bytes)?;
        let (folder, name) = self.parent(path)?;
        let mut temporary = OsString::from(".marco-");
        temporary.push(name);
        // O_NOFOLLOW: the image may hold a link of the temporary name.
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file: File = rustix::fs::openat(&folder, &temporary, flags, Mode::from_raw_mode(0o600))?.into();
        file.write_all(bytes)?;
        // `openat` would reduce the mode by the umask.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
        file.sync_all()?;
        rustix::fs::renameat(&folder, &temporary, &folder, name)?;
        folder.sync_all()
    }

    /// Creates a symbolic link in place of any file or link of that name.
    pub fn link(&self, path: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<()> {
        step::below("link", &self.0, path.as_ref(), &[])?;
        self.remove(path.as_ref())?;
        let (folder, name) = self.parent(path.as_ref())?;
        Ok(rustix::fs::symlinkat(to.as_ref(), &folder, name)?)
    }

    /// Removes a file or link. Does nothing if there is none.
    pub fn remove(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let Some(name) = path.file_name() else { return Ok(()) };
        step::below("remove", &self.0, path, &[])?;
        let removed = self
            .at(path.parent().unwrap_or(Path::new("")), OFlags::DIRECTORY)
            .and_then(|folder| Ok(rustix::fs::unlinkat(&folder, name, AtFlags::empty())?));
        match removed {
            Err(error) if !absent(&error) => Err(error),
            _ => Ok(()),
        }
    }
}

fn absent(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::Rooted;

    #[test]
    fn a_link_never_leads_out_of_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        symlink("../../../secret", root.join("etc/a")).unwrap();
        symlink(dir.path().join("secret"), root.join("etc/b")).unwrap();
        symlink("..", root.join("up")).unwrap();
        let rooted = Rooted::open(&root).unwrap();
        assert_eq!(rooted.read("etc/a").unwrap(), None);
        assert_eq!(rooted.read("etc/b").unwrap(), None);
        rooted.write("etc/b", b"inside", 0o644).unwrap();
        rooted.write("up/secret", b"inside", 0o644).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("secret")).unwrap(), "outside");
        assert_eq!(rooted.read("etc/b").unwrap().unwrap(), b"inside");
        assert_eq!(std::fs::read_to_string(root.join("secret")).unwrap(), "inside");
    }

    #[test]
    fn links_are_followed_as_the_system_itself_would() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("usr/lib")).unwrap();
        std::fs::write(dir.path().join("usr/lib/os-release"), "here").unwrap();
        symlink("/usr/lib/os-release", dir.path().join("release")).unwrap();
        assert_eq!(Rooted::open(dir.path()).unwrap().read("release").unwrap().unwrap(), b"here");
    }
}
