//! The bytes of artifacts, by their SHA-256, in `DATA/artifacts/sha256/ab/abcdef...`, and uploads in
//! `DATA/staging/SHA256.part`. The store keeps the names that point at them.

mod check;
mod held;
mod upload;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use marco_archive::Facts;
use tokio_util::sync::CancellationToken;

pub use marco_archive::Packing;
pub use upload::Upload;

/// Largest artifact in bytes, 64 GiB: the largest cards that people put into Pis hold twice that.
pub const MAX_SIZE: u64 = 64 << 30;

/// SHA-256 of an artifact's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// The kind of an artifact, which decides the checks that it must pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// An operating system as a tarball or a whole-disk image, plain or compressed with gzip, xz or zstd.
    Image,
    /// An image that was examined at its push. It is not refused as no system, because the rules may be newer than it.
    KnownImage,
    /// Boot files as a zip that start the installer.
    InstallerBootcode,
    /// Boot files as a zip that start the installed system.
    SystemBootcode,
}

/// The reason why an artifact is refused, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// Not 64 lower-case hexadecimal digits.
    #[error("{0:?} is not a SHA-256 in lower-case hexadecimal")]
    InvalidDigest(String),
    /// Size 0 or above [`MAX_SIZE`].
    #[error("the size must be 1 to {MAX_SIZE} bytes, not {0}")]
    InvalidSize(u64),
    /// The disk is too full.
    #[error("the upload needs {needed} bytes, and the controller's disk has {free} to spare")]
    NoSpace {
        /// Bytes still to come.
        needed: u64,
        /// Bytes free, without the reserve.
        free: u64,
    },
    /// Another client uploads the same bytes.
    #[error("another upload of the same bytes is under way")]
    Busy,
    /// A chunk does not begin where the one before ended.
    #[error("the data goes on at offset {expected}, not {got}")]
    WrongOffset {
        /// Offset at which the data must continue.
        expected: u64,
        /// Offset of the chunk.
        got: u64,
    },
    /// More bytes than the header said.
    #[error("the upload is longer than the {0} bytes that were announced")]
    TooLong(u64),
    /// Fewer bytes than the header said; they are kept.
    #[error("the upload ended at {got} of {size} bytes; push again to go on from there")]
    Incomplete {
        /// Bytes received so far.
        got: u64,
        /// Bytes announced.
        size: u64,
    },
    /// Bytes with this SHA-256 are stored, with another size.
    #[error("the bytes with this SHA-256 are {stored}, not {announced}")]
    WrongSize {
        /// Size of the stored bytes.
        stored: u64,
        /// Size that was announced.
        announced: u64,
    },
    /// The bytes are not those that were announced.
    #[error("the bytes have SHA-256 {got}, not {expected}")]
    WrongDigest {
        /// The digest that was announced.
        expected: Digest,
        /// The digest of the bytes.
        got: Digest,
    },
    /// The contents break a rule.
    #[error(transparent)]
    Refused(#[from] marco_archive::Refused),
    /// A tarball with an unsupported compression.
    #[error("{0}")]
    Format(String),
    /// The controller stops; received bytes are kept.
    #[error("the controller is stopping; push again to go on")]
    Stopping,
    /// No bytes with this digest are stored.
    #[error("there is no artifact with SHA-256 {0}")]
    NotFound(Digest),
    /// The disk failed.
    #[error("cannot {action}")]
    Io {
        /// The failed action, with its path.
        action: String,
        /// The system's error.
        source: io::Error,
    },
}

/// A stored and checked artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBlob {
    /// Digest of all bytes.
    pub sha256: Digest,
    /// Size in bytes.
    pub size: u64,
    /// Size of a chunk in bytes; the last one may be shorter.
    pub chunk_size: u32,
    /// SHA-256 of each chunk, 32 bytes each, in order.
    pub chunk_sha256: Vec<u8>,
    /// Size of all its files in bytes, unpacked.
    pub unpacked_bytes: u64,
    /// Number of entries of the archive.
    pub entries: u64,
    /// Archive format and compression.
    pub packing: Packing,
    /// Facts that an image states about itself; `None`: boot files.
    pub facts: Option<Facts>,
}

/// The folder of artifacts. Several controllers may share it. Each file is its own lock: a push holds it until the row
/// in the store is committed, and only the holder of the exclusive lock removes the file.
#[derive(Debug, Clone)]
pub struct Artifacts {
    blobs: PathBuf,
    staging: PathBuf,
    stop: CancellationToken,
    /// Held while a stored image is examined: one at a time, so that serving goes on.
    judging: Arc<tokio::sync::Mutex<()>>,
}

/// An open artifact.
#[derive(Debug, Clone)]
pub struct BlobReader {
    file: Arc<File>,
    size: u64,
}

impl Artifacts {
    /// Opens the folder, and creates it if it is missing.
    ///
    /// # Errors
    /// Returns an error if it cannot be created.
    pub fn open(data_dir: &Path) -> Result<Self, ArtifactError> {
        // Both under one folder, so that an upload is moved into place by a rename.
        let (blobs, staging) = (data_dir.join("artifacts").join("sha256"), data_dir.join("staging"));
        for folder in [&blobs, &staging] {
            fs::create_dir_all(folder).map_err(failed(format!("make the folder {}", folder.display())))?;
        }
        Ok(Self { blobs, staging, stop: CancellationToken::new(), judging: Arc::default() })
    }

    /// Ends running checks when `stop` is cancelled.
    #[must_use]
    pub fn stopping(self, stop: CancellationToken) -> Self {
        Self { stop, ..self }
    }

    /// Begins an upload, or continues one that was cut; the upload's offset tells from which byte.
    ///
    /// # Errors
    /// Returns an error for a bad size, a full disk, or another upload of the same bytes.
    pub async fn begin(&self, sha256: Digest, size: u64) -> Result<Upload, ArtifactError> {
        if size == 0 || size > MAX_SIZE {
            return Err(ArtifactError::InvalidSize(size));
        }
        let store = self.clone();
        off_runtime(move || Upload::begin(store, sha256, size)).await
    }

    /// Opens stored bytes.
    ///
    /// # Errors
    /// Returns an error if none are stored.
    pub async fn reader(&self, sha256: Digest) -> Result<BlobReader, ArtifactError> {
        let path = self.blob(sha256);
        off_runtime(move || {
            let (file, size) = open_blob(&path)?.ok_or(ArtifactError::NotFound(sha256))?;
            Ok(BlobReader { file: Arc::new(file), size })
        })
        .await
    }

    /// Removes cut uploads without new bytes since `older_than`; returns their number.
    ///
    /// # Errors
    /// Returns an error if the disk fails.
    pub async fn sweep(&self, older_than: SystemTime) -> Result<u64, ArtifactError> {
        let staging = self.staging.clone();
        off_runtime(move || {
            let action = format!("look through {}", staging.display());
            let mut removed = 0;
            for entry in fs::read_dir(&staging).map_err(failed(action.clone()))? {
                let path = entry.map_err(failed(action.clone()))?.path();
                // A file that is gone was finished in the meantime; one that is locked is being written.
                let Ok(file) = File::open(&path) else { continue };
                // The last write counts, so an upload that goes on slowly is never old.
                let old = file.metadata().and_then(|metadata| metadata.modified()).is_ok_and(|time| time < older_than);
                if old && file.try_lock().is_ok() && remove_file(&path)? {
                    removed += 1;
                }
            }
            Ok(removed)
        })
        .await
    }

    fn blob(&self, sha256: Digest) -> PathBuf {
        let name = sha256.to_string();
        // 256 folders keep each of them small.
        let shard: String = name.chars().take(2).collect();
        self.blobs.join(shard).join(name)
    }

    fn part(&self, sha256: Digest) -> PathBuf {
        self.staging.join(format!("{sha256}.part"))
    }
}

impl BlobReader {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// At most `len` bytes from an offset, fewer only at the end. Reads off the runtime.
    ///
    /// # Errors
    /// Returns an error if the disk fails.
    pub async fn read_chunk(&self, offset: u64, len: usize) -> Result<Bytes, ArtifactError> {
        let left = self.size.saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(len);
        let file = Arc::clone(&self.file);
        off_runtime(move || {
            let mut data = vec![0; len];
            // By position: one open file serves several readers.
            file.read_exact_at(&mut data, offset).map_err(failed("read an artifact"))?;
            Ok(Bytes::from(data))
        })
        .await
    }
}

/// Runs work that waits for the disk on a blocking thread, so that no task is held up.
async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ArtifactError> + Send + 'static,
) -> Result<T, ArtifactError> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|error| Err(failed("finish a task")(io::Error::other(error))))
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> ArtifactError {
    let action = action.into();
    move |source| ArtifactError::Io { action, source }
}

fn open_blob(path: &Path) -> Result<Option<(File, u64)>, ArtifactError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(failed(format!("open {}", path.display())))?,
    };
    let size = file.metadata().map_err(failed(format!("open {}", path.display())))?.len();
    Ok(Some((file, size)))
}

/// Removes a file; false: there was none.
fn remove_file(path: &Path) -> Result<bool, ArtifactError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(format!("remove {}", path.display()))(error)),
    }
}

/// Makes a change of the file's name durable.
fn sync_folder(path: &Path) -> Result<(), ArtifactError> {
    let folder = path.parent().unwrap_or(path);
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed(format!("sync {}", folder.display())))
}

impl Digest {
    /// Reads 64 lower-case hexadecimal digits.
    ///
    /// # Errors
    /// Returns an error if the text is anything else.
    pub fn parse(text: &str) -> Result<Self, ArtifactError> {
        // Cut, because the text may be anything that a caller sent.
        let invalid = || ArtifactError::InvalidDigest(text.chars().take(80).collect());
        // The decoder takes upper case too, but a digest is also a file's name and must have one spelling.
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(invalid());
        }
        let mut digest = [0; 32];
        hex::decode_to_slice(text, &mut digest).map_err(|_| invalid())?;
        Ok(Self(digest))
    }

    /// The 32 bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

#[cfg(test)]
mod tests;
