//! Boot zips, read by a strict reader of our own. Common readers are lenient in exactly the ways that attacks use: they
//! prefer one header to the other, drop the first of two equal names, and skip bytes that belong to no entry.

mod directory;
mod names;
mod write;

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use flate2::Crc;
use flate2::read::DeflateDecoder;
use sha2::{Digest as _, Sha256};

use crate::{Error, Reason, Refused};
use directory::{Entry, Method};
use write::Folder;

/// Maximum number of entries, folders included. A full set of firmware, overlays and device trees has about 500.
pub(crate) const MAX_ENTRIES: u64 = 4096;
/// Maximum of unpacked bytes: the size of p4 in the resident layout.
pub(crate) const MAX_UNPACKED: u64 = 512 << 20;
/// Maximum compression ratio of an entry larger than [`RATIO_FREE`].
pub(crate) const MAX_RATIO: u64 = 200;
/// Size in bytes up to which the ratio is not limited. A small file of zeros is no bomb.
pub(crate) const RATIO_FREE: u64 = 1 << 20;
/// Maximum size of a text that is kept, in bytes. The firmware reads no more of `config.txt`.
const MAX_CONFIG: u64 = 64 << 10;
/// Maximum number of texts that are kept, for a configuration with includes.
const MAX_TEXTS: usize = 32;

/// A file in a zip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZipFile {
    /// Relative path with `/` as separator.
    pub name: String,
    /// Unpacked size in bytes.
    pub size: u64,
    /// SHA-256 of the unpacked contents.
    pub sha256: [u8; 32],
}

/// Contents of a zip.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ZipSummary {
    /// Number of entries, folders included.
    pub entries: u64,
    /// Unpacked bytes of all files.
    pub unpacked_bytes: u64,
    /// Files in the order of the central directory.
    pub files: Vec<ZipFile>,
    /// Text of `config.txt` at the top level. `None`: missing, larger than 64 KiB, or not UTF-8.
    pub config_txt: Option<String>,
    /// Texts that the firmware may read (`config.txt` and possible includes), by name in lower case.
    pub texts: BTreeMap<String, String>,
}

/// Reads a boot zip to its end and checks every rule, contents included.
///
/// # Errors
/// `Refused` with the first broken rule; `Io` if reading fails.
pub fn check_zip<R: Read + Seek>(reader: R) -> Result<ZipSummary, Error> {
    walk(reader, None)
}

/// Unpacks a boot zip under `dest`, which must exist. All names are checked first, contents while they are written.
/// Existing files are replaced. Nothing is synced.
///
/// # Errors
/// As for [`check_zip`]. Files that were already written stay.
pub fn unpack_zip<R: Read + Seek>(reader: R, dest: &Path) -> Result<ZipSummary, Error> {
    walk(reader, Some(&Folder::open(dest)?))
}

fn walk<R: Read + Seek>(mut reader: R, dest: Option<&Folder>) -> Result<ZipSummary, Error> {
    // All headers and names are checked here, before the first file is written.
    let entries = directory::read(&mut reader)?;
    let mut summary = ZipSummary::default();
    for entry in &entries {
        summary.entries += 1;
        if entry.folder {
            if let Some(dest) = dest {
                dest.make_folder(&entry.name)?;
            }
            continue;
        }
        let mut file = dest.map(|dest| dest.create(&entry.name)).transpose()?;
        let name = entry.name.to_lowercase();
        // `config.txt` may come after 32 other texts and is always kept.
        let kept = name == "config.txt" || (name.ends_with(".txt") && summary.texts.len() < MAX_TEXTS);
        let mut text = (kept && entry.size <= MAX_CONFIG).then(Vec::<u8>::new);
        let sha256 = contents(&mut reader, entry, |block| {
            if let Some(text) = &mut text {
                text.extend_from_slice(block);
            }
            match &mut file {
                Some(file) => {
                    std::io::Write::write_all(file, block).map_err(Error::io(format!("write {:?}", entry.name)))
                }
                None => Ok(()),
            }
        })?;
        if let Some(text) = text {
            // The firmware reads bytes. Invalid UTF-8 occurs in comments only.
            summary.texts.insert(name.clone(), String::from_utf8_lossy(&text).into_owned());
            if name == "config.txt" {
                summary.config_txt = String::from_utf8(text).ok();
            }
        }
        summary.unpacked_bytes += entry.size;
        summary.files.push(ZipFile { name: entry.name.clone(), size: entry.size, sha256 });
    }
    Ok(summary)
}

/// Passes an entry's contents to `block` and checks them against the headers: both sizes and the checksum. Returns the
/// SHA-256.
fn contents<R: Read + Seek>(
    reader: &mut R,
    entry: &Entry,
    mut block: impl FnMut(&[u8]) -> Result<(), Error>,
) -> Result<[u8; 32], Error> {
    reader.seek(SeekFrom::Start(entry.data_start)).map_err(Error::io("seek in the zip"))?;
    let packed = reader.take(entry.packed_size);
    match entry.method {
        Method::Store => hashed(packed, entry, &mut block).map(|(sha256, _)| sha256),
        Method::Deflate => {
            let (sha256, inflater) = hashed(DeflateDecoder::new(packed), entry, &mut block)?;
            // Bytes behind the end of the deflate stream would be hidden contents for another reader.
            if inflater.total_in() != entry.packed_size {
                return Err(refused(entry, Reason::HeaderMismatch("the packed size")));
            }
            Ok(sha256)
        }
    }
}

fn hashed<S: Read>(
    mut source: S,
    entry: &Entry,
    block: &mut impl FnMut(&[u8]) -> Result<(), Error>,
) -> Result<([u8; 32], S), Error> {
    let mut buffer = vec![0; 128 << 10];
    let mut crc = Crc::new();
    let mut hash = Sha256::new();
    let mut done: u64 = 0;
    loop {
        let read = match source.read(&mut buffer) {
            Ok(read) => read,
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(err) if matches!(err.kind(), std::io::ErrorKind::InvalidInput | std::io::ErrorKind::InvalidData) => {
                return Err(refused(entry, Reason::Damaged("the compressed data is broken".to_owned())));
            }
            Err(err) if err.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(refused(entry, Reason::Truncated));
            }
            Err(err) => return Err(Error::io("read the zip")(err)),
        };
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        done += u64::try_from(read).unwrap_or(u64::MAX);
        // Checked before the block is written: a false size must not fill the disk.
        if done > entry.size {
            return Err(refused(entry, Reason::HeaderMismatch("the size")));
        }
        crc.update(bytes);
        hash.update(bytes);
        block(bytes)?;
    }
    if done != entry.size {
        return Err(refused(entry, Reason::HeaderMismatch("the size")));
    }
    // CRC-32 finds accidents only. Attacks are found by the artifact's SHA-256.
    if crc.sum() != entry.crc {
        return Err(refused(entry, Reason::Checksum));
    }
    Ok((hash.finalize().into(), source))
}

fn refused(entry: &Entry, reason: Reason) -> Error {
    Refused::entry(entry.name.as_bytes(), reason).into()
}

#[cfg(test)]
mod tests;
