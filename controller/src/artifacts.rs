//! The bytes of artifacts, by their SHA-256: `DATA/artifacts/sha256/ab/abcdef...`, and uploads in
//! `DATA/staging/SHA256.part`. What names them is the store's business.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;

/// Largest artifact in bytes, 64 GiB: the largest cards that people put into Pis hold twice that.
pub const MAX_SIZE: u64 = 64 << 30;

/// SHA-256 of an artifact's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// What an artifact is meant to be, and so which checks it must pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// An operating system as a tarball, plain or compressed with gzip, xz or zstd.
    Image,
    /// Boot files as a zip that start the installer.
    InstallerBootcode,
    /// Boot files as a zip that start the installed system.
    SystemBootcode,
}

/// How an artifact is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all: a plain tar.
    None,
    /// gzip.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard.
    Zstd,
    /// A zip.
    Zip,
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
    /// How it is compressed.
    pub compression: Compression,
}

/// The folder of artifacts.
#[derive(Debug, Clone)]
pub struct Artifacts {
    data_dir: PathBuf,
}

/// One upload: the only writer of its bytes while it lives.
#[derive(Debug)]
pub struct Upload {
    _todo: (),
}

/// An open artifact.
#[derive(Debug, Clone)]
pub struct BlobReader {
    _todo: (),
}

impl Artifacts {
    /// Opens the folder, and makes it when it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(data_dir: &Path) -> Result<Self, ArtifactError> {
        Ok(Self { data_dir: data_dir.to_owned() })
    }

    /// Begins an upload, or goes on with one that was cut: its offset says from where.
    ///
    /// # Errors
    /// A bad size, no room, or another upload of the same bytes.
    pub async fn begin(&self, sha256: Digest, size: u64) -> Result<Upload, ArtifactError> {
        todo!("{:?} {sha256} {size}", self.data_dir)
    }

    /// Opens stored bytes.
    ///
    /// # Errors
    /// When there are none.
    pub async fn reader(&self, sha256: Digest) -> Result<BlobReader, ArtifactError> {
        todo!("{sha256}")
    }

    /// Removes stored bytes; false when there were none.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn remove(&self, sha256: Digest) -> Result<bool, ArtifactError> {
        todo!("{sha256}")
    }

    /// Removes cut uploads that nobody went on with since `older_than`; how many.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn sweep(&self, older_than: SystemTime) -> Result<u64, ArtifactError> {
        todo!("{older_than:?}")
    }
}

impl Upload {
    /// Where the next chunk must begin; equal to the size when all bytes are there.
    pub fn offset(&self) -> u64 {
        todo!()
    }

    /// Adds a chunk.
    ///
    /// # Errors
    /// When it does not begin at the offset or goes past the size. What came before is kept.
    pub async fn append(&mut self, offset: u64, data: Bytes) -> Result<(), ArtifactError> {
        todo!("{offset} {}", data.len())
    }

    /// Checks digest and contents, and stores the bytes. `progress` gets the unpacked bytes so far, now and then, from
    /// another thread. Bytes that are refused are removed; if they are only incomplete they stay for another try.
    ///
    /// # Errors
    /// Why they are not taken.
    pub async fn finish(
        self,
        content: Content,
        progress: impl Fn(u64) + Send + 'static,
    ) -> Result<StoredBlob, ArtifactError> {
        progress(0);
        todo!("{content:?}")
    }
}

impl BlobReader {
    /// Size in bytes.
    pub fn size(&self) -> u64 {
        todo!()
    }

    /// Bytes from an offset, at most `len`, fewer only at the end; read off the runtime.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn read_chunk(&self, offset: u64, len: usize) -> Result<Bytes, ArtifactError> {
        todo!("{offset} {len}")
    }
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

impl Compression {
    /// The word in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Zip => "zip",
        }
    }
}
