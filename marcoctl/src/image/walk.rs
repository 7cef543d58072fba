//! Walks a root in a fixed order and packs every entry.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::fs::{OFlags, SeekFrom, lgetxattr, llistxattr, major, minor, seek};
use rustix::io::Errno;
use tar::EntryType;

use super::boot::Boot;
use super::excludes::Excludes;
use super::tarball::{Entry, Tarball};

/// Folders that may be another file system and still belong to the system: its boot partition.
const BOOT: [&str; 2] = ["boot", "boot/firmware"];
/// Prefixes of the extended attributes that are packed. Labels of this machine's security module are left out.
const XATTRS: [&[u8]; 4] = [b"user.", b"security.capability", b"trusted.", b"system.posix_acl_"];
/// Maximum number of parts of a file with holes. A file with more is packed without holes, as the unpacker limits the
/// map.
const MAX_PARTS: usize = 1 << 18;
/// Maximum length of the value of an extended attribute (xattr(7)).
const MAX_XATTR: usize = 64 << 10;

/// A walk over a root.
pub(super) struct Walk<'a, W> {
    /// Root for reading.
    pub(super) root: &'a Path,
    /// Root for messages.
    pub(super) shown: &'a Path,
    /// Boot partition that replaces one of the folders.
    pub(super) boot: Option<&'a Boot>,
    pub(super) excludes: &'a Excludes,
    pub(super) tarball: Tarball<W>,
    /// Device and inode of the tarball itself, which may lie inside the root.
    pub(super) own: (u64, u64),
    pub(super) cross: bool,
    /// Path under which a file with several names was packed first, by device and inode.
    pub(super) links: HashMap<(u64, u64), Vec<u8>>,
    pub(super) entries: u64,
    pub(super) bytes: u64,
    pub(super) skipped: Vec<String>,
    pub(super) progress: &'a dyn Fn(u64),
}

impl<W: Write> Walk<'_, W> {
    /// Packs the whole root.
    pub(super) fn run(&mut self) -> Result<()> {
        let facts = fs::metadata(self.root).with_context(|| format!("cannot read {}", self.shown.display()))?;
        self.folder(Path::new(""), &facts)
    }

    fn folder(&mut self, path: &Path, facts: &Metadata) -> Result<()> {
        let place = self.root.join(path);
        let entry = self.entry(path, &place, facts)?;
        self.bare(&entry, EntryType::Directory, path)?;
        // On the running system the mount hides the folder's own contents, so only the partition is packed.
        if let Some(boot) = self.boot.filter(|boot| boot.at == path) {
            return boot.pack(self);
        }
        let named = self.shown.join(path);
        let unreadable = || format!("cannot read {}", named.display());
        let mut names = Vec::<OsString>::new();
        for name in fs::read_dir(&place).with_context(unreadable)? {
            names.push(name.with_context(unreadable)?.file_name());
        }
        // readdir(3) has no order. Sorted names give the same tarball for the same files.
        names.sort();
        for name in names {
            let path = path.join(&name);
            if self.excludes.has(&path) {
                continue;
            }
            let place = self.root.join(&path);
            let below = fs::symlink_metadata(&place).with_context(|| self.unreadable(&path))?;
            if !below.is_dir() {
                self.other(&path, &place, &below)?;
            } else if below.dev() == facts.dev() || self.cross || BOOT.iter().any(|boot| path == Path::new(boot)) {
                self.folder(&path, &below)?;
            } else {
                // The contents of the mount are left out, but its mount point is kept.
                let entry = self.entry(&path, &place, &below)?;
                self.bare(&entry, EntryType::Directory, &path)?;
                self.skipped.push(format!("{}: another file system", shown(&path)));
            }
        }
        Ok(())
    }

    fn other(&mut self, path: &Path, place: &Path, facts: &Metadata) -> Result<()> {
        let kind = facts.file_type();
        let key = (facts.dev(), facts.ino());
        if key == self.own {
            return Ok(());
        }
        // A socket exists only while its process runs.
        if kind.is_socket() {
            self.skipped.push(format!("{}: a socket", shown(path)));
            return Ok(());
        }
        let mut entry = self.entry(path, place, facts)?;
        if facts.nlink() > 1 {
            // Only the first name has contents. A hard link to it keeps them shared after unpacking.
            if let Some(first) = self.links.get(&key) {
                entry.link.clone_from(first);
                // The attributes are already stored with the first name.
                entry.xattrs.clear();
                return self.bare(&entry, EntryType::Link, path);
            }
            self.links.insert(key, entry.path.clone());
        }
        if kind.is_symlink() {
            let target = fs::read_link(place).with_context(|| self.unreadable(path))?;
            entry.link = target.into_os_string().into_vec();
            return self.bare(&entry, EntryType::Symlink, path);
        }
        if kind.is_char_device() || kind.is_block_device() {
            entry.device = (major(facts.rdev()), minor(facts.rdev()));
            let kind = if kind.is_char_device() { EntryType::Char } else { EntryType::Block };
            return self.bare(&entry, kind, path);
        }
        if kind.is_fifo() {
            return self.bare(&entry, EntryType::Fifo, path);
        }
        self.file(&entry, path, place, facts)
    }

    fn file(&mut self, entry: &Entry, path: &Path, place: &Path, facts: &Metadata) -> Result<()> {
        let shown = self.shown.join(path);
        let named = || format!("cannot read {}", shown.display());
        // O_NOFOLLOW: the entry may have been replaced by a link since it was examined. O_NONBLOCK: or by a pipe
        // without a writer.
        let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).unwrap_or_default();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(place).with_context(named)?;
        let size = facts.len();
        // st_blocks counts blocks of 512 bytes on every file system (stat(2)).
        let holes = facts.blocks().saturating_mul(512) < size;
        let parts = if holes { parts(&file, size).with_context(named)? } else { None };
        let whole = [(0, size)];
        let mut data = Data { file: &file, parts: parts.as_deref().unwrap_or(&whole), number: 0, done: 0 };
        self.tarball
            .file(entry, size, parts.as_deref(), &mut data)
            .with_context(|| format!("cannot pack {}", shown.display()))?;
        self.count(size);
        Ok(())
    }

    fn bare(&mut self, entry: &Entry, kind: EntryType, path: &Path) -> Result<()> {
        self.tarball.bare(entry, kind).with_context(|| format!("cannot pack {}", self.shown.join(path).display()))?;
        self.count(0);
        Ok(())
    }

    fn unreadable(&self, path: &Path) -> String {
        format!("cannot read {}", self.shown.join(path).display())
    }

    /// Counts one entry with this many bytes.
    pub(super) fn count(&mut self, bytes: u64) {
        self.entries += 1;
        self.bytes += bytes;
        (self.progress)(self.bytes);
    }

    fn entry(&self, path: &Path, place: &Path, facts: &Metadata) -> Result<Entry> {
        let mut name = b"./".to_vec();
        name.extend_from_slice(path.as_os_str().as_bytes());
        if facts.is_dir() && !path.as_os_str().is_empty() {
            name.push(b'/');
        }
        let xattrs = xattrs(place)
            .with_context(|| format!("cannot read the attributes of {}", self.shown.join(path).display()))?;
        Ok(Entry {
            path: name,
            link: Vec::new(),
            mode: facts.mode(),
            uid: facts.uid(),
            gid: facts.gid(),
            mtime: (facts.mtime(), facts.mtime_nsec()),
            device: (0, 0),
            xattrs,
        })
    }
}

fn shown(path: &Path) -> String {
    format!("/{}", PathBuf::from(path).display())
}

fn xattrs(place: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    // The kernel's limit for the list of names is the same as for a value (xattr(7)).
    let mut names = vec![0; MAX_XATTR];
    let length = match llistxattr(place, names.as_mut_slice()) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(errno) => return Err(errno.into()),
    };
    names.truncate(length);
    let mut all = Vec::new();
    let mut names: Vec<&[u8]> = names.split(|&byte| byte == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    for name in names {
        // A label of this machine's security module would be wrong on a node (docs/decisions/0032).
        if !XATTRS.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        let mut value = vec![0; MAX_XATTR];
        let length = lgetxattr(place, name, value.as_mut_slice())?;
        value.truncate(length);
        all.push((name.to_vec(), value));
    }
    Ok(all)
}

/// Returns the stored parts of a file. `None`: it has no holes, or too many parts.
fn parts(file: &File, size: u64) -> io::Result<Option<Vec<(u64, u64)>>> {
    let mut parts = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < size => start,
            // Only a hole is left.
            Ok(_) | Err(Errno::NXIO) => break,
            // The file system does not support SEEK_DATA.
            Err(Errno::INVAL) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(size);
        parts.push((start, end - start));
        if parts.len() > MAX_PARTS {
            return Ok(None);
        }
        at = end;
    }
    if parts.last().is_none_or(|(start, length)| start + length < size) {
        // GNU tar marks a hole at the end of the file by an empty part.
        parts.push((size, 0));
    }
    Ok(if parts == [(0, size)] { None } else { Some(parts) })
}

/// Reads the stored parts of a file in order.
struct Data<'a> {
    file: &'a File,
    parts: &'a [(u64, u64)],
    number: usize,
    done: u64,
}

impl Read for Data<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some((start, length)) = self.parts.get(self.number) {
            let left = length - self.done;
            if left == 0 {
                self.number += 1;
                self.done = 0;
                continue;
            }
            let room = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let read = self.file.read_at(buffer.get_mut(..room).unwrap_or_default(), start + self.done)?;
            self.done += u64::try_from(read).unwrap_or_default();
            return Ok(read);
        }
        Ok(0)
    }
}
