//! The journal's file: JSON, replaced whole.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::loss::Loss;
use super::{Entries, Entry, FILE_MODE, FILE_NAME, JournalError};
use crate::durable;

const VERSION: u32 = 1;

/// Contents of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) entries: Vec<Entry>,
    pub(super) loss: Option<Loss>,
}

#[derive(Serialize)]
struct Document<'a> {
    version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    lost: Option<&'a Loss>,
    entries: &'a [Entry],
}

/// The document as it is read: a newer agent may have written entries that are not understood here.
#[derive(Deserialize)]
struct Written {
    version: u32,
    #[serde(default)]
    lost: Option<Loss>,
    entries: Vec<Value>,
}

/// The file's contents.
pub(super) fn encode(path: &Path, entries: &Entries, loss: Option<&Loss>) -> Result<Vec<u8>, JournalError> {
    let document = Document { version: VERSION, lost: loss, entries: &entries.0 };
    serde_json::to_vec_pretty(&document).map_err(|error| JournalError::Io {
        path: path.to_owned(),
        what: "encoded",
        source: error.into(),
    })
}

/// `None`: there is no such file. Contents that are not a journal are an error of kind `InvalidData`.
pub(super) fn read(path: &Path) -> io::Result<Option<Contents>> {
    let contents = match durable::read(path) {
        Ok(contents) => contents,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let invalid = |error: serde_json::Error| io::Error::new(io::ErrorKind::InvalidData, error);
    let document: Written = serde_json::from_slice(&contents).map_err(invalid)?;
    // Within a version entries and fields are only added, so another version is not understood at all.
    if document.version == VERSION {
        let entries = document.entries.into_iter().filter_map(entry).collect();
        Ok(Some(Contents { entries, loss: document.lost }))
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

/// Reads the journal from the file, or from the place where a crash left it.
pub(super) fn load(path: &Path) -> Result<Contents, JournalError> {
    let failed = |what, source| JournalError::Io { path: path.to_owned(), what, source };
    let loss = match read(path) {
        Ok(Some(contents)) => return Ok(contents),
        Ok(None) => None,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            let aside = set_aside(path).map_err(|source| failed("set aside", source))?;
            tracing::error!(error = %error, file = %aside.display(), "journal not readable, set aside");
            Some(Loss::new(format!("the journal could not be read ({error}); it was set aside as {}", aside.display())))
        }
        Err(source) => return Err(failed("read", source)),
    };
    // On a file system without atomic renames (FAT) the contents may still be under the other name.
    let successor = durable::successor(path);
    let mut contents = match read(&successor) {
        Ok(contents) => contents.unwrap_or_default(),
        // A crash may tear the successor, which was not in force yet: nothing of it was done.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Contents::default(),
        Err(source) => return Err(failed("read", source)),
    };
    let Some(loss) = loss else { return Ok(contents) };
    // Nothing tells how old this copy is.
    contents.entries.iter_mut().for_each(|entry| entry.torn = true);
    contents.loss = Some(loss);
    // At once: the torn file is gone, so the next start would see nothing of the loss.
    let bytes = encode(path, &Entries(contents.entries.clone()), contents.loss.as_ref())?;
    if let Err(error) = durable::replace(path, &bytes, FILE_MODE) {
        tracing::warn!(error = %error, "loss of the journal is known in memory only");
    }
    Ok(contents)
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
