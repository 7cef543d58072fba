//! Downloads of artifacts: resumable at the byte where they stopped, from any controller, each chunk checked before
//! anything else sees it.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// An error of whoever makes connections.
pub type ConnectError = Box<dyn std::error::Error + Send + Sync>;
/// Makes a fresh connection to some controller; called once for each try, so that it can take another one each time.
pub type Connect = Arc<dyn Fn() -> BoxFuture<'static, Result<Channel, ConnectError>> + Send + Sync>;
/// Told how many bytes are verified, of how many.
pub type Progress = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// A download was given up.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The caller wanted no more of it.
    #[error("the download was cancelled")]
    Cancelled,
    /// The controller has no such artifact, or does not let this node have it.
    #[error("the controller refuses the download: {0}")]
    Refused(String),
    /// What was sent is not what was asked for.
    #[error("{0}")]
    Corrupt(String),
    /// Too many tries in a row without a chunk.
    #[error("no progress in {tries} tries; the last one: {last}")]
    GivenUp {
        /// How many.
        tries: u32,
        /// Why the last one failed.
        last: String,
    },
    /// The file could not be written.
    #[error("cannot write the download")]
    Io(#[from] std::io::Error),
}

impl DownloadError {
    /// A stable word for programs, for an execution's error.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Cancelled => "CANCELLED",
            Self::Refused(_) => "DOWNLOAD_REFUSED",
            Self::Corrupt(_) => "DIGEST_MISMATCH",
            Self::GivenUp { .. } => "DOWNLOAD_FAILED",
            Self::Io(_) => "DISK_IO",
        }
    }
}

/// Downloads artifacts.
#[derive(Clone)]
pub struct Downloader {
    #[expect(dead_code)]
    connect: Connect,
}

/// A download whose header is here; its chunks arrive in order, each checked.
#[derive(Debug)]
pub struct Download {
    /// Size of the whole in bytes.
    pub size_bytes: u64,
    /// The chunks; ends after the last one, or with an error.
    pub chunks: mpsc::Receiver<Result<Bytes, DownloadError>>,
}

impl Downloader {
    /// With the default policy: back-off with jitter, given up after 20 tries in a row without a chunk.
    pub fn new(connect: Connect) -> Self {
        Self { connect }
    }

    /// Downloads the bytes with this digest to a file; goes on from what an interrupted try left there.
    pub async fn to_file(
        &self,
        _sha256: &str,
        _path: &Path,
        _progress: Progress,
        _cancel: &CancellationToken,
    ) -> Result<(), DownloadError> {
        todo!()
    }

    /// Starts to download the bytes with this digest. Returns with the header; dropping the result ends it.
    pub async fn stream(&self, _sha256: &str, _cancel: &CancellationToken) -> Result<Download, DownloadError> {
        todo!()
    }
}
