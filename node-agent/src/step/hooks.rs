//! Hooks of tests, by the folder of the machine whose steps they see.

use std::io::Result;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

/// A step that is about to be done.
#[derive(Debug)]
pub struct Step<'a> {
    /// The action, for example `replace`, `reboot`, `report`.
    pub what: &'static str,
    /// The file that changes. Of an effect and of a word to a controller: a folder of the machine.
    pub path: &'a Path,
    /// The bytes to write; empty for other steps.
    pub bytes: &'a [u8],
    /// Its kind.
    pub kind: Kind,
}

/// Kinds of steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A change of the card, or an effect on the machine.
    Change,
    /// A word to a controller.
    Word,
    /// A read of the card. It changes nothing.
    Read,
}

/// A test's hook.
pub trait Hook: Send + Sync + 'static {
    /// Called before each step. An error is what the step returns instead of being done. A hook that unwinds ends the
    /// task or thread there, like a kill.
    ///
    /// # Errors
    /// Those that the test wants.
    fn at(&self, step: &Step<'_>) -> Result<()>;
}

/// Folders and their hooks. A global, because a step knows nothing but its path: no part of the agent hands a test's
/// hook on to the next one, and each machine of a test has a folder of its own.
static HOOKS: RwLock<Vec<(PathBuf, Arc<dyn Hook>)>> = RwLock::new(Vec::new());

/// Removes its hook when it is dropped.
#[derive(Debug)]
pub struct Watch(PathBuf);

/// Hooks the steps of the machine in this folder.
pub fn watch(folder: &Path, hook: Arc<dyn Hook>) -> Watch {
    HOOKS.write().unwrap_or_else(PoisonError::into_inner).push((folder.to_owned(), hook));
    Watch(folder.to_owned())
}

impl Drop for Watch {
    fn drop(&mut self) {
        HOOKS.write().unwrap_or_else(PoisonError::into_inner).retain(|(folder, _)| *folder != self.0);
    }
}

pub(crate) fn at(what: &'static str, path: &Path, bytes: &[u8]) -> Result<()> {
    announce(Kind::Change, what, path, bytes)
}

pub(crate) fn word(what: &'static str, path: &Path) -> Result<()> {
    announce(Kind::Word, what, path, &[])
}

pub(crate) fn below(what: &'static str, folder: &OwnedFd, path: &Path, bytes: &[u8]) -> Result<()> {
    at(what, &Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd())).join(path), bytes)
}

pub(crate) fn read(path: &Path) -> Result<()> {
    announce(Kind::Read, "read", path, &[])
}

fn announce(kind: Kind, what: &'static str, path: &Path, bytes: &[u8]) -> Result<()> {
    let path = resolved(path);
    let hook = {
        let hooks = HOOKS.read().unwrap_or_else(PoisonError::into_inner);
        hooks.iter().find(|(folder, _)| path.starts_with(folder)).map(|(_, hook)| Arc::clone(hook))
    };
    match hook {
        Some(hook) => hook.at(&Step { what, path: &path, bytes, kind }),
        None => Ok(()),
    }
}

/// The path behind an open folder.
fn resolved(path: &Path) -> PathBuf {
    // "/", "proc", "self", "fd" and the number.
    let descriptor: PathBuf = path.components().take(5).collect();
    if !descriptor.starts_with("/proc/self/fd") {
        return path.to_owned();
    }
    let folder = std::fs::read_link(&descriptor).unwrap_or(descriptor);
    folder.join(path.components().skip(5).collect::<PathBuf>())
}
