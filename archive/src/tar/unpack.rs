//! Writes members to the disk. Every path is opened part by part from the root's descriptor, and no link is followed.
//! The guard has already resolved the archive's own links. A link that was on the disk before is replaced.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, chmodat, chownat, fchmod,
    fchown, fsetxattr, futimens, linkat, lsetxattr, makedev, mkdirat, mknodat, open, openat, symlinkat, unlinkat,
    utimensat,
};
use rustix::io::Errno;

use super::guard::Place;
use super::reader::{Kind, Member, TarReader};
use crate::Error;

const OPEN_FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::CLOEXEC).union(OFlags::NOFOLLOW);
/// Mode of folders for which the archive has no member.
const FOLDER_MODE: Mode = Mode::from_bits_retain(0o755);
/// Mode of files until their contents are written.
const FILE_MODE: Mode = Mode::from_bits_retain(0o600);

/// The folder into which a tarball is unpacked.
pub(super) struct Root {
    root: OwnedFd,
    /// Open descriptors of the folders down to the one used last. Neighbours in an archive usually share a folder.
    stack: Vec<(Vec<u8>, OwnedFd)>,
    /// Modes and times of folders, set at the end. Writing into a folder would change its times, and a mode may forbid
    /// the writing.
    folders: Vec<(Vec<Vec<u8>>, Attributes)>,
    /// True if the process runs as root.
    privileged: bool,
    not_restored: u64,
}

/// Metadata of a member.
struct Attributes {
    mode: Mode,
    uid: u64,
    gid: u64,
    times: Timestamps,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Attributes {
    fn of(member: &Member) -> Self {
        let (seconds, nanos) = member.mtime;
        let times = Timestamps {
            // The access time of an archived file has no meaning on the new system.
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: nanos.into() },
        };
        let mode = Mode::from_bits_retain(member.mode);
        Self { mode, uid: member.uid, gid: member.gid, times, xattrs: member.xattrs.clone() }
    }
}

impl Root {
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let root = open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| Error::io(format!("open {}", path.display()))(errno.into()))?;
        let privileged = rustix::process::geteuid().is_root();
        Ok(Self { root, stack: Vec::new(), folders: Vec::new(), privileged, not_restored: 0 })
    }

    /// Creates a member. `progress` receives the bytes of its contents written so far.
    pub(super) fn make<R: BufRead>(
        &mut self,
        member: &Member,
        place: &Place,
        reader: &mut TarReader<R>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), Error> {
        let failed = |errno: Errno| Error::io(format!("create \"{}\"", member.path.escape_ascii()))(errno.into());
        self.not_restored += member.lost;
        if member.kind == Kind::Folder {
            self.folder(&place.path)?;
            self.folders.push((place.path.clone(), Attributes::of(member)));
            return Ok(());
        }
        let Some((name, parents)) = place.path.split_last() else {
            return Err(failed(Errno::INVAL));
        };
        let name = OsStr::from_bytes(name);
        let attributes = Attributes::of(member);
        match &member.kind {
            Kind::File => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let folder = self.folder(parents)?;
                // O_EXCL and O_NOFOLLOW: the file is always new. A symbolic link of that name cannot redirect the
                // write.
                let file =
                    File::from(replacing(folder, name, || openat(folder, name, flags, FILE_MODE)).map_err(failed)?);
                let shown = || member.path.escape_ascii();
                let written = |err: io::Error| Error::io(format!("write \"{}\"", shown()))(err);
                let mut end = 0;
                reader.contents(&mut |offset, block| {
                    file.write_all_at(block, offset).map_err(written)?;
                    end = offset.saturating_add(u64::try_from(block.len()).unwrap_or(u64::MAX));
                    progress(end);
                    Ok(())
                })?;
                if end < member.size {
                    // The file ends with a hole, so its length is not set yet.
                    file.set_len(member.size).map_err(written)?;
                }
                self.dress(&file, &attributes)
                    .map_err(|errno| Error::io(format!("set the attributes of \"{}\"", shown()))(errno.into()))
            }
            Kind::HardLink(_) => {
                let (to, to_parents) =
                    place.target.as_deref().and_then(<[_]>::split_last).ok_or_else(|| failed(Errno::INVAL))?;
                // The guard admits only an earlier file of this archive as target, so its folder exists.
                let to_folder = self.folder(to_parents)?.try_clone().map_err(Error::io("open a folder"))?;
                let to = OsStr::from_bytes(to);
                let folder = self.folder(parents)?;
                replacing(folder, name, || linkat(&to_folder, to, folder, name, AtFlags::empty())).map_err(failed)
            }
            Kind::Symlink(to) => {
                let folder = self.folder(parents)?;
                replacing(folder, name, || symlinkat(OsStr::from_bytes(to), folder, name)).map_err(failed)?;
                // Without a mode: Linux ignores the mode of a symbolic link.
                self.dress_by_name(parents, name, &attributes, None).map_err(failed)
            }
            Kind::Character(..) | Kind::Block(..) | Kind::Fifo | Kind::Folder => {
                let (kind, device) = match member.kind {
                    Kind::Character(major, minor) => (FileType::CharacterDevice, makedev(major, minor)),
                    Kind::Block(major, minor) => (FileType::BlockDevice, makedev(major, minor)),
                    _ => (FileType::Fifo, 0),
                };
                let folder = self.folder(parents)?;
                match replacing(folder, name, || mknodat(folder, name, kind, FILE_MODE, device)) {
                    // Without root (or in a container), device nodes cannot be created. They are counted, see
                    // `not_restored`.
                    Err(Errno::PERM) => {
                        self.not_restored += 1;
                        Ok(())
                    }
                    Err(errno) => Err(failed(errno)),
                    Ok(()) => self.dress_by_name(parents, name, &attributes, Some(attributes.mode)).map_err(failed),
                }
            }
        }
    }

    /// Sets modes, owners and times of the folders. Returns the number of things that could not be restored.
    pub(super) fn finish(mut self) -> Result<u64, Error> {
        let mut folders = std::mem::take(&mut self.folders);
        // Deepest first: once a mode forbids entering a folder, nothing below it remains to be done.
        folders.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        for (path, attributes) in &folders {
            let folder = self.folder(path)?.try_clone().map_err(Error::io("open a folder"))?;
            self.dress(&folder, attributes).map_err(|errno| {
                let shown = path.join(&b'/').escape_ascii().to_string();
                Error::io(format!("set the attributes of \"{shown}\""))(errno.into())
            })?;
        }
        Ok(self.not_restored)
    }

    /// Opens a folder and creates missing parents with [`FOLDER_MODE`].
    fn folder(&mut self, path: &[Vec<u8>]) -> Result<&OwnedFd, Error> {
        let common = self.stack.iter().zip(path).take_while(|((open, _), wanted)| open == *wanted).count();
        self.stack.truncate(common);
        for part in path.iter().skip(common) {
            let parent = self.stack.last().map_or(&self.root, |(_, folder)| folder);
            let folder = enter(parent, OsStr::from_bytes(part)).map_err(|errno| {
                Error::io(format!("make the folder \"{}\"", path.join(&b'/').escape_ascii()))(errno.into())
            })?;
            self.stack.push((part.clone(), folder));
        }
        Ok(self.stack.last().map_or(&self.root, |(_, folder)| folder))
    }

    /// Sets all metadata of an open file or folder. The owner is set first: a change of owner clears setuid bits and
    /// capabilities.
    fn dress(&mut self, file: &impl AsFd, attributes: &Attributes) -> Result<(), Errno> {
        if self.privileged {
            let done = owner(attributes).map(|(uid, gid)| fchown(file, Some(uid), Some(gid)));
            self.count_owner(done)?;
        }
        fchmod(file, attributes.mode)?;
        self.not_restored +=
            set_xattrs(&attributes.xattrs, |name, value| fsetxattr(file, name, value, XattrFlags::empty()))?;
        // Times come last: nothing after this call writes to the file.
        futimens(file, &attributes.times)
    }

    /// Like [`Self::dress`], for links and devices. They cannot be opened without side effects.
    fn dress_by_name(
        &mut self,
        parents: &[Vec<u8>],
        name: &OsStr,
        attributes: &Attributes,
        mode: Option<Mode>,
    ) -> Result<(), Errno> {
        let privileged = self.privileged;
        let folder = self.folder(parents).map_err(|_| Errno::IO)?;
        let mut done = None;
        if privileged {
            done = Some(
                owner(attributes)
                    .map(|(uid, gid)| chownat(folder, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)),
            );
        }
        // `chmodat` follows links, so a mode is passed for devices and pipes only.
        if let Some(mode) = mode {
            chmodat(folder, name, mode, AtFlags::empty())?;
        }
        let mut refused = 0;
        if !attributes.xattrs.is_empty() {
            // No system call sets an attribute by folder descriptor and name. This path leads to the same place
            // (proc(5), /proc/pid/fd).
            let folder = format!("/proc/self/fd/{}", folder.as_raw_fd());
            refused = set_xattrs(&attributes.xattrs, |attribute, value| {
                lsetxattr(Path::new(&folder).join(name), attribute, value, XattrFlags::empty())
            })?;
        }
        utimensat(folder, name, &attributes.times, AtFlags::SYMLINK_NOFOLLOW)?;
        self.not_restored += refused;
        done.map_or(Ok(()), |done| self.count_owner(done))
    }

    /// Counts an owner that cannot be set (user namespace, file system without owners). Any other error is returned.
    fn count_owner(&mut self, done: Option<Result<(), Errno>>) -> Result<(), Errno> {
        match done {
            Some(Ok(())) => Ok(()),
            None | Some(Err(Errno::PERM | Errno::INVAL | Errno::NOTSUP)) => {
                self.not_restored += 1;
                Ok(())
            }
            Some(Err(errno)) => Err(errno),
        }
    }
}

/// Sets extended attributes. Returns the number that this process or the file system does not permit.
fn set_xattrs(xattrs: &[(Vec<u8>, Vec<u8>)], set: impl Fn(&OsStr, &[u8]) -> Result<(), Errno>) -> Result<u64, Errno> {
    let mut refused = 0;
    for (name, value) in xattrs {
        match set(OsStr::from_bytes(name), value) {
            Ok(()) => {}
            // EINVAL: an ACL or a label that this kernel does not accept.
            Err(Errno::PERM | Errno::NOTSUP | Errno::ACCESS | Errno::INVAL) => refused += 1,
            Err(errno) => return Err(errno),
        }
    }
    Ok(refused)
}

/// Returns the owner, or `None` if a number is outside Linux' range. The value -1 would mean "leave unchanged".
fn owner(attributes: &Attributes) -> Option<(Uid, Gid)> {
    let valid = |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
    Some((Uid::from_raw(valid(attributes.uid)?), Gid::from_raw(valid(attributes.gid)?)))
}

fn enter(parent: &OwnedFd, part: &OsStr) -> Result<OwnedFd, Errno> {
    match openat(parent, part, OPEN_FOLDER, Mode::empty()) {
        Err(Errno::NOENT) => {}
        // Something other than a folder has the name, perhaps a link. The archive's folder replaces it.
        Err(Errno::NOTDIR | Errno::LOOP) => unlinkat(parent, part, AtFlags::empty())?,
        other => return other,
    }
    mkdirat(parent, part, FOLDER_MODE)?;
    let folder = openat(parent, part, OPEN_FOLDER, Mode::empty())?;
    // mkdir(2) applies the umask of the process, fchmod(2) does not.
    fchmod(&folder, FOLDER_MODE)?;
    Ok(folder)
}

/// Runs `make`, and removes an existing entry of that name if necessary. Trying first saves a system call per file: the
/// name is free in nearly all cases.
fn replacing<T>(folder: &OwnedFd, name: &OsStr, make: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    match make() {
        Err(Errno::EXIST) => {
            unlinkat(folder, name, AtFlags::empty())?;
            make()
        }
        other => other,
    }
}
