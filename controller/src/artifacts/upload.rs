//! Uploads: bytes are written in order into a file with one writer, then checked, then moved into place.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::check::check;
use super::held::is_named;
use super::{
    ArtifactError, Artifacts, Content, Digest, StoredBlob, failed, off_runtime, open_blob, remove_file, sync_folder,
};

/// Bytes that an upload leaves free on the disk, because the store and the logs are on it too.
const RESERVE: u64 = 256 << 20;
/// Limit of tries to lock the file. Others may move it away between opening and locking, once an upload.
const ATTEMPTS: u32 = 10;

/// One upload, the only writer of its bytes. Bytes that it stored, or found stored, are not removed before it is
/// dropped.
#[derive(Debug)]
pub struct Upload {
    store: Artifacts,
    sha256: Digest,
    size: u64,
    offset: u64,
    place: Place,
}

#[derive(Debug)]
enum Place {
    /// The bytes are stored already. Pushes of the same bytes share the lock.
    Stored(Arc<File>),
    /// The bytes are in staging. The lock ends with the last use of the file, which may be a write after its caller
    /// left.
    Staged(Arc<File>),
}

impl Upload {
    pub(super) fn begin(store: Artifacts, sha256: Digest, size: u64) -> Result<Self, ArtifactError> {
        let part = store.part(sha256);
        for _ in 0..ATTEMPTS {
            if let Some((file, stored)) = open_blob(&store.blob(sha256))? {
                // Locked by a push that has just stored it, or by its removal; both are over in a moment.
                if file.try_lock_shared().is_err() {
                    return Err(ArtifactError::Busy);
                }
                if !is_named(&file, &store.blob(sha256))? {
                    continue;
                }
                // The same digest with another size: the caller announced one of them wrongly.
                if stored != size {
                    return Err(ArtifactError::WrongSize { stored, announced: size });
                }
                return Ok(Self { store, sha256, size, offset: size, place: Place::Stored(Arc::new(file)) });
            }
            let Some(file) = lock(&part)? else { continue };
            let mut offset = file.metadata().map_err(failed("look at a cut upload"))?.len();
            if offset > size {
                // It was announced with another size before. One of the two sizes is wrong; the digest will tell.
                file.set_len(0).map_err(failed("empty a cut upload"))?;
                offset = 0;
            }
            // Before the first byte: an upload of an hour must not fail at its end.
            let (needed, free) = (size - offset, free(&part)?);
            if needed > free {
                // An empty file would only be removed by the sweep, days later.
                if offset == 0 {
                    remove_file(&part)?;
                }
                return Err(ArtifactError::NoSpace { needed, free });
            }
            return Ok(Self { store, sha256, size, offset, place: Place::Staged(Arc::new(file)) });
        }
        Err(ArtifactError::Busy)
    }

    /// Offset at which the next chunk must begin; equal to the size if all bytes are there.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Adds a chunk.
    ///
    /// # Errors
    /// Returns an error if the chunk does not begin at the offset or goes past the size. Earlier bytes are kept.
    pub async fn append(&mut self, offset: u64, data: Bytes) -> Result<(), ArtifactError> {
        if offset != self.offset {
            return Err(ArtifactError::WrongOffset { expected: self.offset, got: offset });
        }
        let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
        if length > self.size - self.offset {
            return Err(ArtifactError::TooLong(self.size));
        }
        // Stored bytes are complete, so only a staged file is written.
        let (Place::Staged(file) | Place::Stored(file)) = &self.place;
        if length > 0 {
            let file = Arc::clone(file);
            off_runtime(move || file.write_all_at(&data, offset).map_err(failed("write an upload"))).await?;
            self.offset += length;
        }
        Ok(())
    }

    /// Removes the received bytes of an upload that is a mistake or an attack. Stored bytes stay.
    ///
    /// # Errors
    /// Returns an error if the disk fails.
    pub async fn discard(self) -> Result<(), ArtifactError> {
        off_runtime(move || match &self.place {
            Place::Stored(_) => Ok(()),
            Place::Staged(_) => remove_file(&self.store.part(self.sha256)).map(|_| ()),
        })
        .await
    }

    /// Checks digest and contents, and stores the bytes. They stay locked until this is dropped, so that the row in the
    /// store comes first. `progress` gets the number of unpacked bytes now and then, from another thread. Refused bytes
    /// are removed; bytes that are only incomplete stay for another try.
    ///
    /// # Errors
    /// Returns the reason why they are refused.
    pub async fn finish(
        &self,
        content: Content,
        progress: impl Fn(u64) + Send + 'static,
    ) -> Result<StoredBlob, ArtifactError> {
        if self.offset < self.size {
            return Err(ArtifactError::Incomplete { got: self.offset, size: self.size });
        }
        let (store, sha256, size) = (self.store.clone(), self.sha256, self.size);
        // The thread holds the file too: a caller that leaves does not release the lock.
        match &self.place {
            Place::Stored(file) => {
                let file = Arc::clone(file);
                off_runtime(move || check_stored(&store, &file, sha256, size, content, &progress)).await
            }
            Place::Staged(file) => {
                let file = Arc::clone(file);
                off_runtime(move || check_staged(&store, &file, sha256, size, content, &progress)).await
            }
        }
    }
}

fn check_stored(
    store: &Artifacts,
    file: &File,
    sha256: Digest,
    size: u64,
    content: Content,
    progress: &impl Fn(u64),
) -> Result<StoredBlob, ArtifactError> {
    let checked = check(file, &store.staging, sha256, size, content, &store.stop, progress);
    let blob = store.blob(sha256);
    if matches!(checked, Err(ArtifactError::WrongDigest { .. })) && is_named(file, &blob)? {
        // The disk returned other bytes than it was given. With the file gone, the next push brings the bytes back.
        tracing::error!(artifact = %sha256, "stored bytes are damaged and were removed");
        remove_file(&blob)?;
    }
    checked
}

fn check_staged(
    store: &Artifacts,
    file: &File,
    sha256: Digest,
    size: u64,
    content: Content,
    progress: &impl Fn(u64),
) -> Result<StoredBlob, ArtifactError> {
    let (blob, part) = (store.blob(sha256), store.part(sha256));
    match check(file, &store.staging, sha256, size, content, &store.stop, progress) {
        Ok(stored) => {
            move_into_place(file, &part, &blob)?;
            Ok(stored)
        }
        // Nothing is wrong with the bytes, so they stay for another try.
        Err(error @ (ArtifactError::Io { .. } | ArtifactError::Stopping)) => Err(error),
        Err(error) => {
            remove_file(&part)?;
            Err(error)
        }
    }
}

fn move_into_place(file: &File, part: &Path, blob: &Path) -> Result<(), ArtifactError> {
    let action = || format!("store {}", blob.display());
    // Bytes before the name: after a power cut a named file must be whole.
    file.sync_all().map_err(failed(action()))?;
    if let Some(folder) = blob.parent() {
        fs::create_dir_all(folder).map_err(failed(action()))?;
        // The shard's own name must be durable as well.
        sync_folder(folder)?;
    }
    fs::rename(part, blob).map_err(failed(action()))?;
    sync_folder(blob)?;
    sync_folder(part)
}

/// Opens and locks a staged file; `None`: it was moved away in between.
fn lock(part: &Path) -> Result<Option<File>, ArtifactError> {
    let action = || format!("open {}", part.display());
    let file =
        File::options().read(true).write(true).create(true).truncate(false).open(part).map_err(failed(action()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(ArtifactError::Busy),
        Err(TryLockError::Error(error)) => return Err(failed(action())(error)),
    }
    Ok(is_named(&file, part)?.then_some(file))
}

/// Bytes that an upload may take on the disk, without the reserve.
fn free(part: &PathBuf) -> Result<u64, ArtifactError> {
    let disk = rustix::fs::statvfs(part).map_err(|errno| failed("ask how full the disk is")(errno.into()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize).saturating_sub(RESERVE))
}
