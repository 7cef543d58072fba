//! Steps: each write that must last, each effect on the machine, each word to a controller, and each read of the card.
//!
//! The helpers that do these things announce them here, so that a test sees all steps of an update without a list of
//! them. Its hook can let a step fail, or end the agent at it. The hooks exist only with the feature `steps`, which
//! programs for a Pi are built without; a step then costs nothing.

#[cfg(feature = "steps")]
mod hooks;

#[cfg(feature = "steps")]
pub use hooks::{Hook, Kind, Step, Watch, watch};
#[cfg(feature = "steps")]
pub(crate) use hooks::{at, below, read, word};
#[cfg(not(feature = "steps"))]
pub(crate) use silent::{at, below, read, word};

#[cfg(not(feature = "steps"))]
mod silent {
    use std::io::Result;
    use std::os::fd::OwnedFd;
    use std::path::Path;

    /// Announces a step on this path. `bytes`: what is about to be written.
    #[inline]
    pub(crate) fn at(_what: &'static str, _path: &Path, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    /// Announces a step on a path below an open folder.
    #[inline]
    pub(crate) fn below(_what: &'static str, _folder: &OwnedFd, _path: &Path, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    /// Announces a word to a controller.
    #[inline]
    pub(crate) fn word(_what: &'static str, _path: &Path) -> Result<()> {
        Ok(())
    }

    /// Announces a read.
    #[inline]
    pub(crate) fn read(_path: &Path) -> Result<()> {
        Ok(())
    }
}
