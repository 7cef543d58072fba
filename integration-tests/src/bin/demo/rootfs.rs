//! A root file system made of this machine's own programs and libraries.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use integration_tests::image::{Compression, lay_out_boot, pack};

/// Source folders, with the most bytes copied of each.
const PARTS: [(&str, u64); 4] =
    [("usr/bin", 40_000_000), ("usr/sbin", 10_000_000), ("usr/lib", 40_000_000), ("usr/share", 10_000_000)];
/// Larger files would crowd out the many small ones.
const LARGEST: u64 = 5_000_000;

/// Makes the tree `folder/demo-os` and the image `folder/demo-os.tar.gz`.
pub(super) fn make(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let root = folder.join("demo-os");
    for part in
        ["boot/firmware", "dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "usr", "var/lib", "var/log"]
    {
        fs::create_dir_all(root.join(part))?;
    }
    for (part, limit) in PARTS {
        let mut left = limit;
        copy(&Path::new("/").join(part), &root.join(part), &mut left)?;
    }
    for name in ["bin", "sbin", "lib"] {
        std::os::unix::fs::symlink(format!("usr/{name}"), root.join(name))?;
    }
    let init = root.join("usr/sbin/init");
    // `init` is usually a symbolic link, and `fs::copy` would write to its target.
    let _ = fs::remove_file(&init);
    fs::create_dir_all(root.join("usr/sbin"))?;
    fs::copy("/bin/sh", &init).context("something for init")?;
    fs::write(root.join("etc/os-release"), "PRETTY_NAME=\"Demo OS\"\nID=demo\n")?;
    fs::write(
        root.join("etc/fstab"),
        "PARTUUID=00000000-02 / ext4 defaults 0 1\nPARTUUID=00000000-01 /boot/firmware vfat defaults 0 2\n",
    )?;
    lay_out_boot(&root.join("boot/firmware"), "Demo OS")?;
    let image = pack(&root, &folder.join("demo-os.tar.gz"), Compression::Gzip)?;
    Ok((root, image))
}

/// Copies files, folders and links, with their modes, until the limit is reached. Unreadable files are left out.
fn copy(from: &Path, to: &Path, left: &mut u64) -> Result<()> {
    fs::create_dir_all(to)?;
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    for entry in entries.flatten() {
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let Ok(metadata) = fs::symlink_metadata(&source) else { continue };
        if metadata.is_dir() && *left > 0 {
            copy(&source, &target, left)?;
        } else if metadata.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
        } else if metadata.is_file() && metadata.len() <= LARGEST.min(*left) && fs::copy(&source, &target).is_ok() {
            *left -= metadata.len();
        }
    }
    Ok(())
}
