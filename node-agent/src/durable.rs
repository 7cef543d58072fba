//! Atomic replacement of a file.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::step;

/// Path at which the next contents of `path` are written before the rename.
pub(crate) fn successor(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    path.with_file_name(name)
}

/// Renames a file within its directory, over any file of that name. Synced to the disk on return.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let directory = to.parent().ok_or_else(|| io::Error::other("the path has no directory"))?;
    step::at("rename", to, &[])?;
    std::fs::rename(from, to)?;
    File::open(directory)?.sync_all()
}

/// Locks a directory until the returned file is dropped. Waits for another holder.
pub(crate) fn hold(directory: &Path) -> io::Result<File> {
    let file = File::open(directory)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Replaces the file at `path` by `contents`, with permissions `mode`. The new contents are on the disk on return.
/// After an error or a power cut, the old ones are.
pub(crate) fn replace(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let directory = path.parent().ok_or_else(|| io::Error::other("the path has no directory"))?;
    step::at("replace", path, contents)?;
    std::fs::create_dir_all(directory)?;
    let successor = successor(path);
    // A crash may have left one, perhaps with other permissions.
    match std::fs::remove_file(&successor) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&successor)?;
    file.write_all(contents)?;
    file.sync_all()?;
    std::fs::rename(&successor, path)?;
    // On FAT, a rename over a file leaves the entry with the old start, whose clusters are free by then, until the
    // renamed file's own metadata is written. So syncing the directory alone is not enough.
    file.sync_all()?;
    File::open(directory)?.sync_all()
}

/// Reads a file of the card.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    step::read(path)?;
    std::fs::read(path)
}

/// Reads a text of the card.
pub(crate) fn read_text(path: &Path) -> io::Result<String> {
    step::read(path)?;
    std::fs::read_to_string(path)
}

/// Removes a file.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    step::at("remove", path, &[])?;
    std::fs::remove_file(path)
}
