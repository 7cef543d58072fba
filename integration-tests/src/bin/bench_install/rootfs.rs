//! A root file system like a Pi's, made of this machine's `/usr`: it has as many small files as a real one.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use integration_tests::image::lay_out_root;

use crate::bed::run;

/// Largest file that is taken, so that no single one dominates.
const LARGEST: u64 = 16 << 20;
/// Source folders, with their share of the whole in percent.
const SOURCES: [(&str, u64); 3] = [("usr/share", 45), ("usr/lib/x86_64-linux-gnu", 40), ("usr/bin", 15)];

/// One root file system, packed twice.
pub(crate) struct Images {
    pub(crate) gzip: PathBuf,
    pub(crate) zstd: PathBuf,
    /// Sum of its files' sizes in bytes.
    pub(crate) size: u64,
    pub(crate) files: u64,
}

/// Makes the root file system of about `bytes` bytes in `dir`.
pub(crate) async fn make(dir: &Path, bytes: u64) -> Result<Images> {
    let overlay = dir.join("overlay");
    lay_out_root(&overlay, "bench")?;
    let (mut list, mut size, mut files) = (Vec::new(), 0, 0);
    for (folder, percent) in SOURCES {
        let mut left = bytes / 100 * percent;
        let wanted = left;
        take(&Path::new("/").join(folder), &mut left, &mut list, &mut files)?;
        size += wanted - left;
    }
    ensure!(size >= bytes / 100 * 95, "this machine's /usr has only {size} bytes");
    let names = dir.join("names");
    fs::write(&names, list)?;
    let (tar, names, overlay) = (dir.join("bench.tar"), names.display().to_string(), overlay.display().to_string());
    let path = tar.display().to_string();
    let from_usr = ["--create", "--numeric-owner", "--no-recursion", "--file", &path, "--directory", "/", "--null"];
    run("tar", &[&from_usr[..], &["--files-from", &names]].concat()).await?;
    run("tar", &["--append", "--numeric-owner", "--file", &path, "--directory", &overlay, "."]).await?;
    // gzip -6 as for the images of 2015, and zstd as for an image of today.
    run("gzip", &["--keep", "--force", "-6", &path]).await?;
    run("zstd", &["-q", "-f", "-9", "-T2", &path]).await?;
    fs::remove_file(&tar)?;
    Ok(Images { gzip: tar.with_extension("tar.gz"), zstd: tar.with_extension("tar.zst"), size, files })
}

/// Adds folders, files and links below a folder, in the order of their names, until `left` is used up.
fn take(folder: &Path, left: &mut u64, list: &mut Vec<u8>, files: &mut u64) -> Result<()> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| folder.display().to_string())?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<_>>()?;
    // In the order of names, so that two runs on one machine pack the same files.
    entries.sort();
    for path in entries {
        let found = fs::symlink_metadata(&path)?;
        let size = if found.is_file() { found.size() } else { 0 };
        let plain = found.is_file() || found.is_symlink();
        if size > (*left).min(LARGEST) || !(plain || found.is_dir()) {
            continue;
        }
        use std::os::unix::ffi::OsStrExt as _;
        list.extend_from_slice(path.strip_prefix("/")?.as_os_str().as_bytes());
        list.push(0);
        *left -= size;
        *files += u64::from(found.is_file());
        if found.is_dir() {
            take(&path, left, list, files)?;
        }
    }
    Ok(())
}
