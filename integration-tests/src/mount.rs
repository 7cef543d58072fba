//! Mounted file systems for tests. Needs root.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::mount::{UnmountFlags, unmount};

use crate::process::{run, tool};
use crate::seconds;

/// A mount, unmounted on drop, also if the test fails. A process with an open file there keeps the file system until it
/// ends.
#[derive(Debug)]
pub struct Mount {
    folder: PathBuf,
}

impl Mount {
    /// Mounts a tmpfs on a new folder. `size`: as mount(8) takes it.
    pub async fn tmpfs(folder: PathBuf, size: &str) -> Result<Self> {
        Self::new(folder, &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).await
    }

    /// Mounts an ext4 of `bytes` on a new folder, from a sparse file beside it: it takes only the disk space that is
    /// written.
    pub async fn ext4(folder: PathBuf, bytes: u64) -> Result<Self> {
        let image = folder.with_extension("ext4");
        fs::File::create(&image)?.set_len(bytes)?;
        let image = image.display().to_string();
        run(&tool("mkfs.ext4")?, &["-q", "-F", &image], seconds(60)).await?.success()?;
        Self::new(folder, &["-o", "loop,acl,user_xattr", &image]).await
    }

    /// Mounts this file over itself read-only, so that root cannot write it either.
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

    /// Changes its options, for example `ro`. Fails while a file there is open for writing.
    pub async fn remount(&self, options: &str) -> Result<()> {
        let (options, shown) = (format!("remount,{options}"), self.folder.display().to_string());
        run(&tool("mount")?, &["-o", &options, &shown], seconds(60)).await?.success().map(|_| ())
    }

    /// The mount point.
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a process that a failed test left behind may still have a file open.
        let unmounted = unmount(&self.folder, UnmountFlags::DETACH);
        // A second panic would abort the process and hide why the test failed.
        assert!(unmounted.is_ok() || std::thread::panicking(), "{} stays mounted", self.folder.display());
    }
}
