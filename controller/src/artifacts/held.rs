//! Removal of unneeded stored bytes, a new examination of stored images, and the list of stored files.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use marco_archive::Facts;

use super::check::check;
use super::{ArtifactError, Artifacts, Content, Digest, failed, off_runtime, open_blob, remove_file, sync_folder};

impl Artifacts {
    /// Removes stored bytes; false: there were none, or a push holds them. Readers that have them open go on.
    ///
    /// # Errors
    /// Returns an error if the disk fails.
    pub async fn remove(&self, sha256: Digest) -> Result<bool, ArtifactError> {
        self.remove_if(sha256, async { Ok(true) }).await
    }

    /// Removes stored bytes if nothing needs them; false: they stay. `unneeded` is asked while they are locked, so that
    /// no push can begin to rely on them in between. A push that holds them decides by its row; the sweep removes its
    /// leftovers.
    ///
    /// # Errors
    /// Returns an error if the disk or `unneeded` fails.
    pub async fn remove_if<E: From<ArtifactError>>(
        &self,
        sha256: Digest,
        unneeded: impl Future<Output = Result<bool, E>>,
    ) -> Result<bool, E> {
        let path = self.blob(sha256);
        // On the file itself, so that it holds between threads, processes and controllers that share the folder.
        let Some(held) = off_runtime(move || hold(&path)).await? else { return Ok(false) };
        if !unneeded.await? {
            return Ok(false);
        }
        // The lock is held past the removal: a push that opens the file now finds that it lost its name.
        let path = self.blob(sha256);
        let removed = off_runtime(move || {
            let removed = remove_file(&path)?;
            sync_folder(&path)?;
            drop(held);
            Ok(removed)
        });
        Ok(removed.await?)
    }

    /// The stored files, with the time at which each was stored.
    ///
    /// # Errors
    /// Returns an error if the disk fails.
    pub async fn stored(&self) -> Result<BTreeMap<Digest, SystemTime>, ArtifactError> {
        let blobs = self.blobs.clone();
        off_runtime(move || {
            let action = || format!("look through {}", blobs.display());
            let mut found = BTreeMap::new();
            for shard in fs::read_dir(&blobs).map_err(failed(action()))? {
                let shard = shard.map_err(failed(action()))?.path();
                // A missing shard, or a file in its place, holds no artifact.
                for entry in fs::read_dir(shard).into_iter().flatten() {
                    let entry = entry.map_err(failed(action()))?;
                    let Some(digest) = entry.file_name().to_str().and_then(|name| Digest::parse(name).ok()) else {
                        continue;
                    };
                    // A file that went in between is skipped.
                    if let Ok(facts) = entry.metadata() {
                        found.insert(digest, changed(&facts));
                    }
                }
            }
            Ok(found)
        })
        .await
    }

    /// Facts that stored bytes state about themselves as a system. It reads all bytes, so one image at a time.
    ///
    /// # Errors
    /// `NotFound` if the bytes are not here, `Stopping`, and the disk's errors. A refused archive is no error: its
    /// facts say so.
    pub async fn judge(&self, sha256: Digest) -> Result<Facts, ArtifactError> {
        let _turn = self.judging.lock().await;
        let (path, staging, stop) = (self.blob(sha256), self.staging.clone(), self.stop.clone());
        off_runtime(move || {
            let (file, size) = open_blob(&path)?.ok_or(ArtifactError::NotFound(sha256))?;
            match check(&file, &staging, sha256, size, Content::KnownImage, &stop, &|_| ()) {
                Ok(blob) => Ok(blob.facts.unwrap_or_default()),
                Err(error @ (ArtifactError::Refused(_) | ArtifactError::Format(_))) => {
                    Ok(Facts::refused(error.to_string()))
                }
                Err(error) => Err(error),
            }
        })
        .await
    }
}

/// Takes the exclusive lock of a stored file; `None`: there is no file, or it is locked.
fn hold(path: &Path) -> Result<Option<File>, ArtifactError> {
    let action = || format!("open {}", path.display());
    let file = match File::options().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed(action()))?,
    };
    match file.try_lock() {
        Ok(()) => {}
        // A push holds it and will name it; waiting here would hold up the sweep.
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(failed(action())(error)),
    }
    // Another controller may have removed the file between opening and locking it.
    Ok(is_named(&file, path)?.then_some(file))
}

/// True if the open file is still the one of this name.
pub(super) fn is_named(file: &File, path: &Path) -> Result<bool, ArtifactError> {
    let ours = file.metadata().map_err(failed(format!("look at {}", path.display())))?;
    let named = fs::metadata(path);
    Ok(named.is_ok_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())))
}

/// The later of the inode's time, which a rename changes, and the file's own, which a write changes.
fn changed(facts: &fs::Metadata) -> SystemTime {
    let inode = u64::try_from(facts.ctime()).unwrap_or_default();
    let inode = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(inode)).unwrap_or(SystemTime::UNIX_EPOCH);
    facts.modified().unwrap_or(inode).max(inode)
}
