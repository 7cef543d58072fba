//! Boot zips.

use std::io::{Read, Seek};
use std::path::Path;

use crate::Error;

/// A file of a zip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZipFile {
    /// Its path, relative, with `/` between the parts.
    pub name: String,
    /// Size in bytes, unpacked.
    pub size: u64,
    /// SHA-256 of its contents.
    pub sha256: [u8; 32],
}

/// What is in a zip.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ZipSummary {
    /// Entries, folders included.
    pub entries: u64,
    /// Bytes of all files, unpacked.
    pub unpacked_bytes: u64,
    /// The files, in the order of the zip.
    pub files: Vec<ZipFile>,
    /// The text of `config.txt` in the zip's root, if there is one of at most 64 KiB.
    pub config_txt: Option<String>,
}

/// Reads a boot zip through and checks every rule, contents included.
///
/// # Errors
/// `Refused` with the first broken rule; `Io` when reading fails.
pub fn check_zip<R: Read + Seek>(reader: R) -> Result<ZipSummary, Error> {
    let _ = reader;
    todo!()
}

/// Writes a boot zip's files under `dest`, which must exist, after checking all of its names; contents are checked while
/// they are written. Existing files are replaced. Nothing is synced.
///
/// # Errors
/// As [`check_zip`]; what was written before stays.
pub fn unpack_zip<R: Read + Seek>(reader: R, dest: &Path) -> Result<ZipSummary, Error> {
    let _ = (reader, dest);
    todo!()
}
