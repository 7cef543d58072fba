//! Boot zips: a strict reader of our own. The usual ones are lenient where hostile zips live: they prefer one header to
//! the other, drop the first of two equal names, and skip bytes that belong to no entry.

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

/// Most entries, folders included. A full set of firmware, overlays and device trees has about 500.
pub(crate) const MAX_ENTRIES: u64 = 4096;
/// Most bytes unpacked: p4 of the resident layout holds 512 MiB.
pub(crate) const MAX_UNPACKED: u64 = 512 << 20;
/// Highest ratio of an entry that is larger than [`RATIO_FREE`].
pub(crate) const MAX_RATIO: u64 = 200;
/// Entries up to this size may pack as well as they like: a page of zeros is no bomb.
pub(crate) const RATIO_FREE: u64 = 1 << 20;
/// Longest `config.txt` that is kept; the firmware itself reads no more.
const MAX_CONFIG: u64 = 64 << 10;
/// Most texts that are kept, for a configuration that includes others.
const MAX_TEXTS: usize = 32;

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
    /// The texts that the firmware may read, by their names in lower case: `config.txt` and what it may include.
    pub texts: BTreeMap<String, String>,
}

/// Reads a boot zip through and checks every rule, contents included.
///
/// # Errors
/// `Refused` with the first broken rule; `Io` when reading fails.
pub fn check_zip<R: Read + Seek>(reader: R) -> Result<ZipSummary, Error> {
    walk(reader, None)
}

/// Writes a boot zip's files under `dest`, which must exist, after checking all of its names; contents are checked while
/// they are written. Existing files are replaced. Nothing is synced.
///
/// # Errors
/// As [`check_zip`]; what was written before stays.
pub fn unpack_zip<R: Read + Seek>(reader: R, dest: &Path) -> Result<ZipSummary, Error> {
    walk(reader, Some(&Folder::open(dest)?))
}

fn walk<R: Read + Seek>(mut reader: R, dest: Option<&Folder>) -> Result<ZipSummary, Error> {
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
            // The firmware reads bytes: what is no UTF-8 is in comments.
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

/// Hands an entry's contents out block by block, and checks that they are exactly what the headers say.
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
            // Bytes after the end of the compressed data would be a second, hidden content.
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
