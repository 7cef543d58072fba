//! Files on a card that may fail, on a file system without atomic updates: written through, and read back past the page
//! cache.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Advice, OFlags};
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::BootError;
use crate::{durable, step};

/// Overwrites the old contents with one write: the file keeps its sectors, its folder entry and its length.
pub(super) fn write_in_place(path: &Path, bytes: &[u8]) -> Result<(), BootError> {
    let write = || {
        step::at("write in place", path, bytes)?;
        // O_SYNC and no truncation: the firmware finds the old text or the new one after a power cut, never an empty
        // file.
        let flags = i32::try_from(OFlags::SYNC.bits()).unwrap_or_default();
        let mut options = OpenOptions::new();
        let file = options.write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(path)?;
        file.write_all_at(bytes, 0)?;
        // The agent's own texts all have one length; only another program's file differs.
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if file.metadata()?.len() != length {
            file.set_len(length)?;
            file.sync_all()?;
        }
        Ok(())
    };
    write().map_err(BootError::io("write", path))?;
    check_written(path, bytes)
}

pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<(), BootError> {
    write_whole(path, &json(path, value)?)
}

/// The bytes that [`write_json`] writes.
pub(super) fn json(path: &Path, value: &impl Serialize) -> Result<Vec<u8>, BootError> {
    serde_json::to_vec_pretty(value).map_err(|error| BootError::io("write", path)(error.into()))
}

/// Parses a file. `None`: it is missing or torn.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, BootError> {
    match durable::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound) => Ok(None),
        Err(error) => Err(BootError::io("read", path)(error)),
    }
}

/// A file's bytes. `None`: it is missing.
pub(super) fn read_whole(path: &Path) -> Result<Option<Vec<u8>>, BootError> {
    match durable::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(BootError::io("read", path)(error)),
    }
}

/// Writes a file that only its owner may read, syncs it, and reads it back. FAT has no atomic rename, so a power cut
/// may leave it torn. Readers treat a torn file as missing.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), BootError> {
    let write = || {
        step::at("write", path, bytes)?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        std::io::Write::write_all(&mut file, bytes)?;
        file.sync_all()?;
        if let Some(folder) = path.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(BootError::io("write", path))?;
    check_written(path, bytes)
}

fn check_written(path: &Path, bytes: &[u8]) -> Result<(), BootError> {
    let found = sha256_of_card(path).map_err(BootError::io("read back", path))?;
    if found == hex::encode(Sha256::digest(bytes)) {
        Ok(())
    } else {
        Err(BootError::NotWritten { path: path.to_owned() })
    }
}

/// Removes a file. Does nothing if it is missing.
pub(super) fn remove_file(path: &Path) -> Result<(), BootError> {
    match durable::remove(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(BootError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// A file's bytes on the card, past the page cache. `None`: it is missing.
pub(crate) fn read_from_card(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    step::read(path)?;
    let mut file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// SHA-256 of a file on the card, past the page cache.
pub(super) fn sha256_of_card(path: &Path) -> std::io::Result<String> {
    step::read(path)?;
    let mut file = File::open(path)?;
    rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?;
    let (mut digest, mut buffer) = (Sha256::new(), vec![0; 64 * 1024]);
    loop {
        let read = file.read(&mut buffer)?;
        match buffer.get(..read) {
            Some([]) | None => return Ok(hex::encode(digest.finalize())),
            Some(bytes) => digest.update(bytes),
        }
    }
}
