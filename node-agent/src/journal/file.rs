//! The journal's file: JSON, replaced whole.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Entries, Entry, FILE_NAME, JournalError};
use crate::durable;

const VERSION: u32 = 1;

#[derive(Serialize)]
struct Document {
    version: u32,
    entries: Vec<Entry>,
}

/// The document as it is read: a newer agent may have written entries that are not understood here.
#[derive(Deserialize)]
struct Written {
    version: u32,
    entries: Vec<Value>,
}

/// The file's contents.
pub(super) fn encode(path: &Path, entries: &Entries) -> Result<Vec<u8>, JournalError> {
    let document = Document { version: VERSION, entries: entries.0.clone() };
    serde_json::to_vec_pretty(&document).map_err(|error| JournalError::Io {
        path: path.to_owned(),
        what: "encoded",
        source: error.into(),
    })
}

/// `None`: there is no such file. Contents that are not a journal are an error of kind `InvalidData`.
pub(super) fn read(path: &Path) -> io::Result<Option<Vec<Entry>>> {
    let contents = match durable::read(path) {
        Ok(contents) => contents,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let invalid = |error: serde_json::Error| io::Error::new(io::ErrorKind::InvalidData, error);
    let document: Written = serde_json::from_slice(&contents).map_err(invalid)?;
    // Within a version entries and fields are only added, so another version is not understood at all.
    if document.version == VERSION {
        Ok(Some(document.entries.into_iter().filter_map(entry).collect()))
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("it has version {}", document.version)))
    }
}

/// Reads an entry as far as it is understood. One with an unknown action keeps its place, so that it is answered for.
/// One in an unknown state says nothing to this agent, and must not take the others with it.
fn entry(mut value: Value) -> Option<Entry> {
    if let Ok(entry) = serde_json::from_value(value.clone()) {
        return Some(entry);
    }
    let execution = value.get("execution").cloned().unwrap_or_default();
    if let Some(action) = value.get_mut("action") {
        *action = Value::String("unknown".to_owned());
    }
    match serde_json::from_value(value) {
        Ok(entry) => Some(entry),
        Err(error) => {
            tracing::error!(%execution, error = %error, "entry of the journal is not understood, left out");
            None
        }
    }
}

/// Reads the entries from the file, or from the place where a crash left them.
pub(super) fn load(path: &Path) -> Result<Vec<Entry>, JournalError> {
    let failed = |what, source| JournalError::Io { path: path.to_owned(), what, source };
    match read(path) {
        Ok(Some(entries)) => return Ok(entries),
        Ok(None) => {}
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            let aside = set_aside(path).map_err(|source| failed("set aside", source))?;
            tracing::error!(error = %error, file = %aside.display(), "journal not readable, set aside");
        }
        Err(source) => return Err(failed("read", source)),
    }
    // On a file system without atomic renames (FAT) the contents may still be under the other name.
    let successor = durable::successor(path);
    match read(&successor) {
        Ok(entries) => Ok(entries.unwrap_or_default()),
        // A crash may tear the successor, which was not in force yet: nothing of it was done.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Vec::new()),
        Err(source) => Err(failed("read", source)),
    }
}

fn set_aside(path: &Path) -> io::Result<PathBuf> {
    // Never overwritten: an earlier torn journal may explain the jobs that it held.
    for number in 1..=u32::MAX {
        let aside = path.with_file_name(format!("{FILE_NAME}.bad-{number}"));
        if !aside.try_exists()? {
            crate::step::at("set aside", path, &[])?;
            std::fs::rename(path, &aside)?;
            return Ok(aside);
        }
    }
    Err(io::Error::other("too many journals were set aside"))
}
