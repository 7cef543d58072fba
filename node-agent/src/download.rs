//! Downloads of artifacts: resumable at the byte where they stopped, from any controller. Each chunk is checked before
//! it is used.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use marco_archive::{Facts, Packing};
use marco_proto::v1::GetArtifactRequest;
use marco_proto::v1::artifact_service_client::ArtifactServiceClient;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;

use crate::backoff::full_jitter;
use fetch::{Fetch, Opened};

mod fetch;
mod header;

/// Verified chunks that wait for the writer, in addition to the one being received.
const WAITING: usize = 1;
/// Tries to get the facts of an image, each at the next controller, before the node goes on without them.
const FACTS_TRIES: u32 = 3;
/// Longest wait for one try. A Pi 1 needs a second for TLS. An update must not stand still for a silent controller,
/// since the installer judges the image again.
const FACTS_WAIT: Duration = Duration::from_secs(5);

/// Prefix of the names of downloads.
const PREFIX: &str = "download-";
/// Name of every download in earlier agents.
const BEFORE: &str = "boot.zip";

/// File of the download with this digest. With one name for all, the rest of an interrupted download would be taken for
/// the beginning of the next.
pub(crate) fn file_in(folder: &Path, sha256: &str) -> PathBuf {
    folder.join(format!("{PREFIX}{sha256}"))
}

/// True if downloads left files in a folder.
pub(crate) fn is_to_sweep(folder: &Path) -> bool {
    !left_in(folder, None).is_empty()
}

/// Removes the files that downloads left in a folder, except the one with this digest. Best effort: a file that stays
/// only takes room.
pub(crate) fn sweep(folder: &Path, keep: Option<&str>) {
    for path in left_in(folder, keep) {
        match crate::durable::remove(&path) {
            Ok(()) => tracing::info!(file = %path.display(), "rest of a download removed"),
            Err(error) => tracing::warn!(file = %path.display(), error = %error, "rest of a download not removed"),
        }
    }
}

fn left_in(folder: &Path, keep: Option<&str>) -> Vec<PathBuf> {
    let keep = keep.map(|sha256| file_in(folder, sha256));
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let ours = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        (name.starts_with(PREFIX) || name == BEFORE) && keep.as_ref() != Some(path)
    };
    entries.map(|entry| entry.path()).filter(ours).collect()
}

/// Error of making a connection.
pub type ConnectError = Box<dyn std::error::Error + Send + Sync>;
/// Opens a fresh connection to a controller. Called once for each try, so that each try can take another controller.
pub type Connect = Arc<dyn Fn() -> BoxFuture<'static, Result<Channel, ConnectError>> + Send + Sync>;
/// Called with the verified bytes and the total.
pub type Progress = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// A download failed for good.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The caller cancelled it.
    #[error("the download was cancelled")]
    Cancelled,
    /// The controller has no such artifact, or this node may not have it.
    #[error("the controller refuses the download: {0}")]
    Refused(String),
    /// The received data is not the requested artifact.
    #[error("{0}")]
    Corrupt(String),
    /// Too many tries in a row brought no data.
    #[error("no progress in {tries} tries; the last one: {last}")]
    GivenUp {
        /// Number of tries.
        tries: u32,
        /// Error of the last try.
        last: String,
    },
    /// The local file could not be written.
    #[error("cannot write the download")]
    Io(#[from] std::io::Error),
}

impl DownloadError {
    /// Stable word for programs, used as the reason of an execution's error.
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

/// Retry policy of a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Upper bound of the first pause. It doubles with each further try.
    pub first_pause: Duration,
    /// Upper bound of every pause.
    pub longest_pause: Duration,
    /// Number of tries in a row without a new byte after which the download fails.
    pub tries: u32,
    /// Time without data after which a connection is given up for another.
    pub stall: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            first_pause: Duration::from_millis(200),
            longest_pause: Duration::from_secs(15),
            tries: 20,
            stall: Duration::from_secs(30),
        }
    }
}

/// Downloads artifacts from the controllers.
#[derive(Clone)]
pub struct Downloader {
    connect: Connect,
    policy: Policy,
}

impl std::fmt::Debug for Downloader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Downloader").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// A download with a valid header. Its chunks arrive in order, each checked.
#[derive(Debug)]
pub struct Download {
    /// Size of the artifact in bytes.
    pub size_bytes: u64,
    /// Facts of an image. `None`: the controller did not send any.
    pub facts: Option<Facts>,
    /// Packing of an image as the push found it. `None`: the controller did not send it.
    pub packing: Option<Packing>,
    /// The chunks. They end after the last one, if the digest of the whole artifact is right, or with an error.
    pub chunks: mpsc::Receiver<Result<Bytes, DownloadError>>,
    /// Keeps the download running. Drop it to stop.
    pub receiving: Receiving,
}

/// The receiving task, which ends when this is dropped.
#[derive(Debug)]
pub struct Receiving(#[expect(dead_code, reason = "held for its Drop only")] AbortOnDropHandle<()>);

impl Downloader {
    /// Downloads with the default policy.
    pub fn new(connect: Connect) -> Self {
        Self::with_policy(connect, Policy::default())
    }

    /// Downloads with this policy.
    pub fn with_policy(connect: Connect, policy: Policy) -> Self {
        Self { connect, policy }
    }

    /// Downloads the artifact with this digest to a file. Continues an interrupted download, as far as its chunks are
    /// right. The file is synced, and removed if its digest is wrong in the end.
    ///
    /// # Errors
    /// Returns a [`DownloadError`]. Except after `Corrupt`, the file is kept for the next try.
    pub async fn to_file(
        &self,
        sha256: &str,
        path: &Path,
        progress: Progress,
        cancel: &CancellationToken,
    ) -> Result<(), DownloadError> {
        let Download { size_bytes, mut chunks, receiving: _receiving, .. } =
            self.start(sha256, Some(path.to_owned()), cancel).await?;
        let mut file = tokio::fs::OpenOptions::new().append(true).create(true).open(path).await?;
        // `start` has cut the file back to its correct chunks.
        let mut done = file.metadata().await?.len();
        progress(done, size_bytes);
        while let Some(chunk) = chunks.recv().await {
            match chunk {
                Ok(chunk) => {
                    crate::step::at("append", path, &chunk)?;
                    file.write_all(&chunk).await?;
                    done += u64::try_from(chunk.len()).unwrap_or_default();
                    progress(done, size_bytes);
                }
                Err(error) => {
                    // tokio writes in the background: without this the next try could miss the last chunk.
                    file.flush().await?;
                    // Every chunk is right and the whole is not: a resumed download would fail the same way.
                    if matches!(error, DownloadError::Corrupt(_)) {
                        tokio::fs::remove_file(path).await?;
                    }
                    return Err(error);
                }
            }
        }
        file.flush().await?;
        crate::step::at("sync", path, &[])?;
        file.sync_all().await?;
        if done == size_bytes { Ok(()) } else { Err(DownloadError::Corrupt("the download ended early".into())) }
    }

    /// Starts the download of the artifact with this digest. Returns after the header. Dropping the result stops it.
    ///
    /// # Errors
    /// Returns an error if no header arrived. Later errors arrive among the chunks.
    pub async fn stream(&self, sha256: &str, cancel: &CancellationToken) -> Result<Download, DownloadError> {
        self.start(sha256, None, cancel).await
    }

    /// Facts of an image. `None`: the controller did not judge it, is too old to, did not answer in time, or `cancel`
    /// was raised. The installer asks again before it touches the card.
    pub async fn facts(&self, sha256: &str, cancel: &CancellationToken) -> Option<Facts> {
        cancel.run_until_cancelled(self.ask_until_answered(sha256)).await.flatten()
    }

    async fn ask_until_answered(&self, sha256: &str) -> Option<Facts> {
        let wait = FACTS_WAIT.min(self.policy.stall);
        for attempt in 0..FACTS_TRIES {
            if attempt > 0 {
                // Jitter: all nodes of an operation ask at once.
                tokio::time::sleep(full_jitter(self.policy.first_pause)).await;
            }
            match tokio::time::timeout(wait, self.ask_for_facts(sha256)).await {
                Ok(Ok(facts)) => return facts,
                Ok(Err(error)) => tracing::info!(artifact = sha256, error = %error, "facts of the image not read"),
                Err(_) => tracing::info!(artifact = sha256, "facts of the image not read in time"),
            }
        }
        None
    }

    async fn ask_for_facts(&self, sha256: &str) -> Result<Option<Facts>, ConnectError> {
        let channel = (self.connect)().await?;
        let request = GetArtifactRequest { name: format!("artifacts/sha256:{sha256}") };
        match ArtifactServiceClient::new(channel).get_artifact(request).await {
            Ok(artifact) => Ok(artifact.into_inner().facts.map(header::facts)),
            // Also an answer: an older controller does not know the call, or does not let nodes make it.
            Err(status) if fetch::is_final(status.code()) => {
                tracing::info!(artifact = sha256, error = %status, "controller does not tell the facts of the image");
                Ok(None)
            }
            Err(status) => Err(status.into()),
        }
    }

    async fn start(
        &self,
        sha256: &str,
        existing: Option<PathBuf>,
        cancel: &CancellationToken,
    ) -> Result<Download, DownloadError> {
        let (sender, chunks) = mpsc::channel(WAITING);
        let (opened, header) = tokio::sync::oneshot::channel();
        let fetch = Fetch::new(Arc::clone(&self.connect), self.policy, sha256, existing, opened, sender);
        let cancel = cancel.clone();
        // A task of its own: the next chunk arrives while the caller writes the last one.
        let task = AbortOnDropHandle::new(tokio::spawn(fetch.run(cancel)));
        match header.await {
            Ok(Ok(Opened { size_bytes, facts, packing })) => {
                Ok(Download { size_bytes, facts, packing, chunks, receiving: Receiving(task) })
            }
            Ok(Err(error)) => Err(error),
            Err(_) => Err(DownloadError::Corrupt("the download ended before it began".into())),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
