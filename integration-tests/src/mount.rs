//! File systems that a test mounts. It needs root.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::mount::{UnmountFlags, unmount};

use crate::process::{run, tool};
use crate::seconds;

/// Unmounted when it is dropped, also by a test that fails. Whoever still has a file open there keeps it until they end.
#[derive(Debug)]
pub struct Mount {
    folder: PathBuf,
}

impl Mount {
    /// A tmpfs of that size (as mount(8) takes it) on a new folder.
    pub async fn tmpfs(folder: PathBuf, size: &str) -> Result<Self> {
        Self::new(folder, &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).await
    }

    /// An ext4 of that many bytes on a new folder, in a file beside it. It takes as much of this machine's disk as is written.
    pub async fn ext4(folder: PathBuf, bytes: u64) -> Result<Self> {
        let image = folder.with_extension("ext4");
        fs::File::create(&image)?.set_len(bytes)?;
        let image = image.display().to_string();
        run(&tool("mkfs.ext4")?, &["-q", "-F", &image], seconds(60)).await?.success()?;
        Self::new(folder, &["-o", "loop,acl,user_xattr", &image]).await
    }

    /// This file, as one that can be read and not written, whoever tries.
    pub async fn read_only(file: PathBuf) -> Result<Self> {
        let shown = file.display().to_string();
        run(&tool("mount")?, &["--bind", &shown, &shown], seconds(60)).await?.success()?;
        // From here on it is unmounted, also when the rest fails.
        let mounted = Self { folder: file };
        run(&tool("mount")?, &["-o", "remount,bind,ro", &shown], seconds(60)).await?.success()?;
        Ok(mounted)
    }

    async fn new(folder: PathBuf, what: &[&str]) -> Result<Self> {
        fs::create_dir_all(&folder)?;
        let shown = folder.display().to_string();
        let mounted = run(&tool("mount")?, &[what, &[&shown]].concat(), seconds(60)).await?;
        mounted.success().with_context(|| format!("mounting {shown}"))?;
        Ok(Self { folder })
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = unmount(&self.folder, UnmountFlags::DETACH);
        // A test that fails says why, and not what came of that.
        assert!(unmounted.is_ok() || std::thread::panicking(), "{} stays mounted", self.folder.display());
    }
}
