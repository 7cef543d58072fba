//! Root tarballs.

use std::io::Read;
use std::path::Path;

use crate::Error;

/// What is in a tarball.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TarSummary {
    /// Entries.
    pub entries: u64,
    /// Bytes of its regular files, holes included.
    pub unpacked_bytes: u64,
}

/// Reads a decompressed tarball through and checks every rule. `progress` gets the unpacked bytes so far, now and then.
///
/// # Errors
/// `Refused` with the first broken rule; `Io` when reading fails.
pub fn check_tar<R: Read>(reader: R, progress: &mut dyn FnMut(u64)) -> Result<TarSummary, Error> {
    let _ = (reader, progress);
    todo!()
}

/// Unpacks a decompressed tarball under `root`, which must exist, by the same rules, never through a link out of it.
/// Existing files are replaced. Owners and device nodes are restored when running as root. Nothing is synced.
/// `progress` gets the unpacked bytes so far, now and then.
///
/// # Errors
/// As [`check_tar`]; what was written before stays.
pub fn unpack_tar<R: Read>(reader: R, root: &Path, progress: &mut dyn FnMut(u64)) -> Result<TarSummary, Error> {
    let _ = (reader, root, progress);
    todo!()
}
