//! The boot partition of a disk image. A FAT can be listed only once all of it has arrived. Until then it is kept in an
//! unnamed file.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use fatfs::{Dir, FileSystem, FsOptions};

use crate::Error;
use crate::facts::{Folder, MAX_DEPTH, MAX_NAMES, MAX_TEXT, MAX_TEXTS};

/// Maximum bytes that are kept: twice the size that Raspberry Pi OS uses. The contents of a larger partition stay
/// unknown.
const MOST: u64 = 1 << 30;
/// Maximum bytes that the listing may read. This also stops cluster chains that lead in circles.
const READ: u64 = 64 << 20;

/// Copy of a FAT partition while the image is read.
#[derive(Debug)]
pub(super) struct BootPartition {
    file: File,
    kept: u64,
}

fn failed(source: io::Error) -> Error {
    Error::Io { action: "keep the image's boot partition while it is read".to_owned(), source }
}

impl BootPartition {
    /// Creates the copy in `folder` for a partition of `length` bytes.
    pub(super) fn new(folder: &Path, length: u64) -> Result<Self, Error> {
        // Unnamed: a crash of the controller leaves no file behind.
        let file = tempfile::tempfile_in(folder).map_err(failed)?;
        file.set_len(length).map_err(failed)?;
        Ok(Self { file, kept: 0 })
    }

    /// Stores bytes of the partition.
    pub(super) fn take(&mut self, offset: u64, block: &[u8]) -> Result<(), Error> {
        // Zeros stay holes, so a mostly empty partition takes little of the disk.
        if block.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        self.kept = self.kept.saturating_add(u64::try_from(block.len()).unwrap_or(u64::MAX));
        if self.kept > MOST {
            // The disk space is released. Later blocks are counted, but not kept.
            return self.file.set_len(0).map_err(failed);
        }
        self.file.write_all_at(block, offset).map_err(failed)
    }

    /// Lists the files. `None`: the partition was too large to keep.
    ///
    /// # Errors
    /// Returns an error if the partition is not a readable FAT.
    pub(super) fn list(self) -> io::Result<Option<Folder>> {
        if self.kept > MOST {
            return Ok(None);
        }
        let fat = FileSystem::new(Bounded { file: self.file, left: READ }, FsOptions::new())?;
        let mut found = Folder::default();
        found.list(&fat.root_dir(), "", 1)?;
        Ok(Some(found))
    }
}

impl Folder {
    /// Lists the same files as for a boot folder in a tarball: no overlays, and no empty files.
    fn list(&mut self, folder: &Dir<'_, Bounded>, above: &str, depth: usize) -> io::Result<()> {
        for entry in folder.iter() {
            let entry = entry?;
            // FAT ignores case. The facts use lower case, see `firmware::lookup`.
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

/// A file with a limit on the bytes read.
struct Bounded {
    file: File,
    left: u64,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // The cluster chain of a folder can lead back to itself. fatfs would follow it forever.
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
