//! The boot partition of a disk image. What it holds shows only when all of it has gone by: it is kept in an unnamed file
//! until then, and listed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use fatfs::{Dir, FileSystem, FsOptions};

use crate::Error;
use crate::facts::{Folder, MAX_DEPTH, MAX_NAMES, MAX_TEXT, MAX_TEXTS};

/// Most bytes that are kept of one: twice what Raspberry Pi OS has. Of a larger one the contents are not known.
const MOST: u64 = 1 << 30;
/// Bytes that listing it may read. Chains of clusters that lead in circles end here.
const READ: u64 = 64 << 20;

/// A FAT partition as it goes by.
#[derive(Debug)]
pub(super) struct BootPartition {
    file: File,
    kept: u64,
}

fn failed(source: io::Error) -> Error {
    Error::Io { action: "keep the image's boot partition while it is read".to_owned(), source }
}

impl BootPartition {
    /// One of this many bytes, kept in this folder.
    pub(super) fn new(folder: &Path, length: u64) -> Result<Self, Error> {
        let file = tempfile::tempfile_in(folder).map_err(failed)?;
        file.set_len(length).map_err(failed)?;
        Ok(Self { file, kept: 0 })
    }

    /// Bytes of it.
    pub(super) fn take(&mut self, offset: u64, block: &[u8]) -> Result<(), Error> {
        if block.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        self.kept = self.kept.saturating_add(u64::try_from(block.len()).unwrap_or(u64::MAX));
        if self.kept > MOST {
            // What was kept is given back.
            return self.file.set_len(0).map_err(failed);
        }
        self.file.write_all_at(block, offset).map_err(failed)
    }

    /// Its files. `None`: it was too large to be kept.
    ///
    /// # Errors
    /// It is no FAT that can be read.
    pub(super) fn list(self) -> io::Result<Option<Folder>> {
        if self.kept > MOST {
            return Ok(None);
        }
        let fat = FileSystem::new(Bounded { file: self.file, left: READ }, FsOptions::new())?;
        let mut found = Listing::default();
        found.list(&fat.root_dir(), "", 1)?;
        Ok(Some(Folder { names: found.names, texts: found.texts }))
    }
}

#[derive(Default)]
struct Listing {
    names: BTreeSet<String>,
    texts: BTreeMap<String, String>,
}

impl Listing {
    /// The same files as of a boot folder in a tarball: without overlays, and without what is empty.
    fn list(&mut self, folder: &Dir<'_, Bounded>, above: &str, depth: usize) -> io::Result<()> {
        for entry in folder.iter() {
            let entry = entry?;
            let name = entry.file_name().to_lowercase();
            let path = format!("{above}{name}");
            if entry.is_dir() {
                if !matches!(name.as_str(), "." | ".." | "overlays") && depth < MAX_DEPTH {
                    self.list(&entry.to_dir(), &format!("{path}/"), depth + 1)?;
                }
                continue;
            }
            if entry.len() == 0 {
                continue;
            }
            if name.ends_with(".txt") && entry.len() <= MAX_TEXT && self.texts.len() < MAX_TEXTS {
                let mut text = Vec::new();
                entry.to_file().read_to_end(&mut text)?;
                self.texts.insert(path.clone(), String::from_utf8_lossy(&text).into_owned());
            }
            self.names.insert(path);
            if self.names.len() > MAX_NAMES {
                return Err(io::Error::other(format!("it has more than {MAX_NAMES} files")));
            }
        }
        Ok(())
    }
}

/// A file of which only so much is read.
struct Bounded {
    file: File,
    left: u64,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.left = self.left.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX));
        if self.left == 0 {
            return Err(io::Error::other("its folders lead in circles"));
        }
        Ok(count)
    }
}

impl Write for Bounded {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.file.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Bounded {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}
