//! The bytes of artifacts, by their SHA-256: `DATA/artifacts/sha256/ab/abcdef...`, and uploads in
//! `DATA/staging/SHA256.part`. What names them is the store's business.

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

/// What an artifact is meant to be, and so which checks it must pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// An operating system as a tarball or a whole-disk image, plain or compressed with gzip, xz or zstd.
    Image,
    /// The same, once it was judged where it was pushed: it may be no system by rules of today.
    KnownImage,
    /// Boot files as a zip that start the installer.
    InstallerBootcode,
    /// Boot files as a zip that start the installed system.
    SystemBootcode,
}

/// Why an artifact is not taken or cannot be given.
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
    /// Somebody else is uploading the same bytes.
    #[error("another upload of the same bytes is under way")]
    Busy,
    /// A chunk does not begin where the one before ended.
    #[error("the data goes on at offset {expected}, not {got}")]
    WrongOffset {
        /// Where it must go on.
        expected: u64,
        /// Where the chunk begins.
        got: u64,
    },
    /// More bytes than the header said.
    #[error("the upload is longer than the {0} bytes that were announced")]
    TooLong(u64),
    /// Fewer bytes than the header said; they are kept.
    #[error("the upload ended at {got} of {size} bytes; push again to go on from there")]
    Incomplete {
        /// Bytes that are there.
        got: u64,
        /// Bytes announced.
        size: u64,
    },
    /// Bytes with this SHA-256 are stored, and have another size.
    #[error("the bytes with this SHA-256 are {stored}, not {announced}")]
    WrongSize {
        /// What is stored.
        stored: u64,
        /// As announced.
        announced: u64,
    },
    /// The bytes are not those that were announced.
    #[error("the bytes have SHA-256 {got}, not {expected}")]
    WrongDigest {
        /// As announced.
        expected: Digest,
        /// As computed.
        got: Digest,
    },
    /// The contents break a rule.
    #[error(transparent)]
    Refused(#[from] marco_archive::Refused),
    /// A tarball that is compressed in a way that is not taken.
    #[error("{0}")]
    Format(String),
    /// The controller stops; bytes that came are kept.
    #[error("the controller is stopping; push again to go on")]
    Stopping,
    /// There are no such bytes.
    #[error("there is no artifact with SHA-256 {0}")]
    NotFound(Digest),
    /// The disk failed.
    #[error("cannot {action}")]
    Io {
        /// What was being done.
        action: String,
        /// What the system said.
        source: io::Error,
    },
}

/// A stored and checked artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBlob {
    /// Of its bytes.
    pub sha256: Digest,
    /// In bytes.
    pub size: u64,
    /// In bytes; the last chunk is shorter.
    pub chunk_size: u32,
    /// SHA-256 of each chunk, 32 bytes each, in order.
    pub chunk_sha256: Vec<u8>,
    /// Bytes of its files, unpacked.
    pub unpacked_bytes: u64,
    /// Entries of the archive.
    pub entries: u64,
    /// How it is packed.
    pub packing: Packing,
    /// What an image says about itself; `None` for boot files.
    pub facts: Option<Facts>,
}

/// The folder of artifacts. Several controllers may share it. Each file is its own lock: a push holds it until the row in
/// the store is committed, and only who holds it alone removes the file.
#[derive(Debug, Clone)]
pub struct Artifacts {
    blobs: PathBuf,
    staging: PathBuf,
    stop: CancellationToken,
    /// Held by whoever judges stored images: one at a time, so that serving goes on beside it.
    judging: Arc<tokio::sync::Mutex<()>>,
}

/// An open artifact.
#[derive(Debug, Clone)]
pub struct BlobReader {
    file: Arc<File>,
    size: u64,
}

impl Artifacts {
    /// Opens the folder, and makes it when it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(data_dir: &Path) -> Result<Self, ArtifactError> {
        let (blobs, staging) = (data_dir.join("artifacts").join("sha256"), data_dir.join("staging"));
        for folder in [&blobs, &staging] {
            fs::create_dir_all(folder).map_err(failed(format!("make the folder {}", folder.display())))?;
        }
        Ok(Self { blobs, staging, stop: CancellationToken::new(), judging: Arc::default() })
    }

    /// Checks that are under way end when this is cancelled.
    #[must_use]
    pub fn stopping(self, stop: CancellationToken) -> Self {
        Self { stop, ..self }
    }

    /// Begins an upload, or goes on with one that was cut: its offset says from where.
    ///
    /// # Errors
    /// A bad size, no room, or another upload of the same bytes.
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
    /// When there are none.
    pub async fn reader(&self, sha256: Digest) -> Result<BlobReader, ArtifactError> {
        let path = self.blob(sha256);
        off_runtime(move || {
            let (file, size) = open_blob(&path)?.ok_or(ArtifactError::NotFound(sha256))?;
            Ok(BlobReader { file: Arc::new(file), size })
        })
        .await
    }

    /// Removes cut uploads that nobody went on with since `older_than`; how many.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn sweep(&self, older_than: SystemTime) -> Result<u64, ArtifactError> {
        let staging = self.staging.clone();
        off_runtime(move || {
            let action = format!("look through {}", staging.display());
            let mut removed = 0;
            for entry in fs::read_dir(&staging).map_err(failed(action.clone()))? {
                let path = entry.map_err(failed(action.clone()))?.path();
                // A file that is gone by now was finished in the meantime, and one that is locked is being written.
                let Ok(file) = File::open(&path) else { continue };
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

    /// Bytes from an offset, at most `len`, fewer only at the end; read off the runtime.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn read_chunk(&self, offset: u64, len: usize) -> Result<Bytes, ArtifactError> {
        let left = self.size.saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(len);
        let file = Arc::clone(&self.file);
        off_runtime(move || {
            let mut data = vec![0; len];
            file.read_exact_at(&mut data, offset).map_err(failed("read an artifact"))?;
            Ok(Bytes::from(data))
        })
        .await
    }
}

/// Runs what waits for the disk where it holds up nobody.
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

/// Removes a file; false when there was none.
fn remove_file(path: &Path) -> Result<bool, ArtifactError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(format!("remove {}", path.display()))(error)),
    }
}

/// Makes a change of a name in a file's folder last.
fn sync_folder(path: &Path) -> Result<(), ArtifactError> {
    let folder = path.parent().unwrap_or(path);
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed(format!("sync {}", folder.display())))
}

impl Digest {
    /// Reads 64 lower-case hexadecimal digits.
    ///
    /// # Errors
    /// When it is something else.
    pub fn parse(text: &str) -> Result<Self, ArtifactError> {
        let invalid = || ArtifactError::InvalidDigest(text.chars().take(80).collect());
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
