//! Folders and files that other users of the machine must not read.

use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::Context as _;

use crate::chain;

/// Makes the data directory, if it is missing, for its owner alone.
pub(crate) fn make_private(dir: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("cannot make the data directory {}", dir.display()))
}

/// Takes the rights of group and others from a file or folder of an earlier start, if it exists.
pub(crate) fn keep_private(path: &Path) {
    // A missing folder is created later, with the process's umask.
    let Ok(found) = std::fs::metadata(path) else { return };
    let mode = found.permissions().mode();
    if mode & 0o077 == 0 {
        return;
    }
    let path_shown = path.display();
    // A failure only warns, because the controller can work all the same.
    match std::fs::set_permissions(path, Permissions::from_mode(mode & 0o700)) {
        Ok(()) => tracing::info!(path = %path_shown, "other users of this machine could read it: mode mended"),
        Err(error) => {
            tracing::warn!(path = %path_shown, error = chain(&error), "other users of this machine can read it")
        }
    }
}
