//! Decides on the places of a tarball's members. Links of the archive are resolved here, by name only, so the unpacker
//! never follows one on the disk.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;

use super::header::MAX_PATH;
use super::reader::{Kind, Member};
use crate::Reason;

/// Longest part of a path in bytes: Linux' NAME_MAX.
const MAX_PART: usize = 255;
/// Maximum number of parts of a path. The unpacker keeps one folder open per part.
const MAX_DEPTH: usize = 128;
/// Maximum number of links on one path: Linux' own limit.
const MAX_LINKS: usize = 40;
/// Maximum number of remembered names, including parents without a member of their own.
const MAX_KNOWN: usize = 4_000_000;
/// Maximum bytes of links, link targets and folder names that the guard and the unpacker remember.
const MAX_REMEMBERED: usize = 64 << 20;

/// The place of a member.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Parts of the path below the root, with the archive's links resolved. Empty: the root itself.
    pub path: Vec<Vec<u8>>,
    /// The resolved target of a hard link. `None` for other members.
    pub target: Option<Vec<Vec<u8>>>,
}

/// Type of an entry that the archive created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    Folder,
    Symlink,
    /// A regular file with contents.
    File,
    /// An empty file, a device or a FIFO.
    Other,
}

/// Everything that the archive created so far.
#[derive(Debug, Default)]
pub(crate) struct Guard {
    /// Types by hash of the path. Two million full paths would take too much memory. The hash is keyed at random, so an
    /// archive cannot contain deliberate collisions.
    known: HashMap<u64, Known>,
    hasher: RandomState,
    symlinks: HashMap<Vec<u8>, Vec<u8>>,
    remembered: usize,
}

impl Guard {
    /// Returns the place of a member, or the rule that it breaks.
    pub(super) fn admit(&mut self, member: &Member) -> Result<Place, Reason> {
        let folder = member.kind == Kind::Folder;
        // A folder at the place of a link to a folder means the linked folder: an overlay on a system with a merged
        // /usr.
        let path = self.resolve(&member.path, folder)?;
        if path.is_empty() {
            return if folder { Ok(Place { path, target: None }) } else { Err(Reason::EmptyName) };
        }
        let key = self.key(&path);
        match self.known.get(&key) {
            Some(Known::Folder) if !folder => return Err(Reason::FileAndFolder),
            Some(Known::Symlink | Known::File | Known::Other) if folder => return Err(Reason::FileAndFolder),
            _ => {}
        }
        let (target, known) = match &member.kind {
            Kind::HardLink(target) => {
                let target = self.resolve(target, false)?;
                let known = self.known.get(&self.key(&target)).copied();
                let known = known.filter(|known| *known != Known::Folder && target != path).ok_or(Reason::HardLink)?;
                (Some(target), known)
            }
            Kind::Symlink(_) => (None, Known::Symlink),
            Kind::Folder => (None, Known::Folder),
            Kind::File if member.size > 0 => (None, Known::File),
            _ => (None, Known::Other),
        };
        // The new member replaces an earlier one at this place, also a link.
        self.forget_symlink(&path);
        match (&member.kind, &target) {
            (Kind::Symlink(to), _) => self.remember_symlink(&path, to.clone())?,
            (_, Some(target)) if known == Known::Symlink => {
                // A hard link to a symbolic link is that link under a second name. It is followed like the first.
                let to = self.symlinks.get(&joined(target)).cloned().ok_or(Reason::HardLink)?;
                self.remember_symlink(&path, to)?;
            }
            _ => {}
        }
        if folder {
            // The unpacker keeps path and attributes of every folder until the end.
            let attributes: usize = member.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
            self.remember(member.path.len() + attributes)?;
        }
        self.know(&path, known)?;
        Ok(Place { path, target })
    }

    /// Returns the entry that a running system would find at this path. See [`Self::follow`].
    pub(crate) fn find(&self, path: &[u8]) -> Option<Known> {
        self.follow(path).map(|(_, known)| known)
    }

    /// Returns the entry that a running system would find at this path, and its own path, with links followed. `None`:
    /// the archive has no such entry. An absolute link starts at the archive's root, which becomes the system's root.
    pub(crate) fn follow(&self, path: &[u8]) -> Option<(Vec<u8>, Known)> {
        let mut todo: Vec<Vec<u8>> = parts(path).map(<[u8]>::to_vec).collect();
        todo.reverse();
        let mut done: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        let mut last = Some(Known::Folder);
        while let Some(part) = todo.pop() {
            // At the root, `..` stays at the root, as on a running system.
            if part == b".." {
                done.pop();
                continue;
            }
            done.push(part);
            last = self.known.get(&self.key(&done)).copied();
            match last? {
                Known::Symlink => {
                    let target = self.symlinks.get(&joined(&done))?;
                    links += 1;
                    if links > MAX_LINKS {
                        return None;
                    }
                    if target.first() == Some(&b'/') {
                        done.clear();
                    } else {
                        done.pop();
                    }
                    todo.extend(parts(target).map(<[u8]>::to_vec).collect::<Vec<_>>().into_iter().rev());
                }
                Known::File | Known::Other if !todo.is_empty() => return None,
                Known::File | Known::Other | Known::Folder => {}
            }
        }
        Some((joined(&done), last?))
    }

    /// Splits a path into parts and follows the archive's links. `follow_last`: also follow a link in the last part.
    fn resolve(&mut self, path: &[u8], follow_last: bool) -> Result<Vec<Vec<u8>>, Reason> {
        if path.is_empty() {
            return Err(Reason::EmptyName);
        }
        if path.len() > MAX_PATH {
            return Err(Reason::LongName(MAX_PATH));
        }
        if path.first() == Some(&b'/') {
            return Err(Reason::AbsolutePath);
        }
        // Reversed, so that the target of a link can be pushed in its place.
        let mut todo: Vec<Vec<u8>> = parts(path).map(<[u8]>::to_vec).collect();
        for part in &todo {
            if part == b".." {
                return Err(Reason::ParentPath);
            }
            if part.contains(&0) {
                return Err(Reason::ControlCharacter);
            }
            if part.len() > MAX_PART {
                return Err(Reason::LongName(MAX_PART));
            }
        }
        todo.reverse();
        let mut done: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            if part == b".." {
                // Only the target of a link can contain `..`. Above the root lies the host's file system.
                done.pop().ok_or(Reason::ThroughLink)?;
                continue;
            }
            done.push(part);
            if done.len() > MAX_DEPTH {
                return Err(Reason::Depth(MAX_DEPTH));
            }
            let last = todo.is_empty();
            if last && !follow_last {
                break;
            }
            match self.known.get(&self.key(&done)) {
                Some(Known::Symlink) => {
                    let target = self.symlinks.get(&joined(&done)).ok_or(Reason::ThroughLink)?;
                    links += 1;
                    // The absolute target is a path of the future system. On this machine it would be the host's file.
                    if target.first() == Some(&b'/') || links > MAX_LINKS {
                        return Err(Reason::ThroughLink);
                    }
                    done.pop();
                    todo.extend(parts(target).map(<[u8]>::to_vec).collect::<Vec<_>>().into_iter().rev());
                }
                Some(Known::File | Known::Other) if !last => return Err(Reason::FileAndFolder),
                Some(_) => {}
                // A parent without a member of its own is created on the way.
                None if !last => self.know(&done, Known::Folder)?,
                None => {}
            }
        }
        Ok(done)
    }

    fn key(&self, path: &[Vec<u8>]) -> u64 {
        self.hasher.hash_one(path)
    }

    fn know(&mut self, path: &[Vec<u8>], known: Known) -> Result<(), Reason> {
        let key = self.key(path);
        self.known.insert(key, known);
        if self.known.len() > MAX_KNOWN { Err(Reason::TooManyEntries(super::MAX_ENTRIES)) } else { Ok(()) }
    }

    fn remember(&mut self, bytes: usize) -> Result<(), Reason> {
        self.remembered = self.remembered.saturating_add(bytes);
        if self.remembered > MAX_REMEMBERED { Err(Reason::TooManyNames(MAX_REMEMBERED)) } else { Ok(()) }
    }

    fn remember_symlink(&mut self, path: &[Vec<u8>], to: Vec<u8>) -> Result<(), Reason> {
        let path = joined(path);
        self.remember(path.len() + to.len())?;
        self.symlinks.insert(path, to);
        Ok(())
    }

    fn forget_symlink(&mut self, path: &[Vec<u8>]) {
        if self.known.get(&self.key(path)) == Some(&Known::Symlink) {
            let path = joined(path);
            let to = self.symlinks.remove(&path).unwrap_or_default();
            self.remembered = self.remembered.saturating_sub(path.len() + to.len());
        }
    }
}

/// Iterates over the parts of a path, without empty parts and dots.
fn parts(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

fn joined(path: &[Vec<u8>]) -> Vec<u8> {
    path.join(&b'/')
}
