//! Downloads of artifacts: resumable at the byte where they stopped, from any controller, each chunk checked before
//! anything else sees it.

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

/// Verified chunks that wait for whoever writes them, besides the one being received.
const WAITING: usize = 1;
/// Tries to get the facts of an image, one controller after the other, before the node goes on without them.
const FACTS_TRIES: u32 = 3;
/// Longest wait for one of them. A Pi 1 needs a second for TLS; an update must not stand still for a silent controller,
/// since the installer judges the image again.
const FACTS_WAIT: Duration = Duration::from_secs(5);

/// Prefix of the names of downloads.
const PREFIX: &str = "download-";
/// The name that one had in earlier agents, whatever it was a download of.
const BEFORE: &str = "boot.zip";

/// File of the download with this digest. Under one name for all, the rest of an interrupted download would be taken for
/// the beginning of the next.
pub(crate) fn file_in(folder: &Path, sha256: &str) -> PathBuf {
    folder.join(format!("{PREFIX}{sha256}"))
}

/// True when downloads left something in a folder.
pub(crate) fn is_to_sweep(folder: &Path) -> bool {
    !left_in(folder, None).is_empty()
}

/// Removes what downloads left in a folder, except the one with this digest. Best effort: what stays only takes room.
pub(crate) fn sweep(folder: &Path, keep: Option<&str>) {
    for path in left_in(folder, keep) {
        match std::fs::remove_file(&path) {
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

/// When to try again, and when not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Ceiling of the first pause; doubled with each further try.
    pub first_pause: Duration,
    /// Ceiling of every pause.
    pub longest_pause: Duration,
    /// Given up after so many tries in a row that brought no byte.
    pub tries: u32,
    /// A connection on which nothing arrives for so long is given up for another.
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

/// Downloads artifacts.
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

/// A download whose header is here; its chunks arrive in order, each checked.
#[derive(Debug)]
pub struct Download {
    /// Size of the whole in bytes.
    pub size_bytes: u64,
    /// What an image says about itself; `None`: the controller did not say.
    pub facts: Option<Facts>,
    /// The push's verdict; `None`: the controller did not say.
    pub packing: Option<Packing>,
    /// The chunks. They end after the last one, when the digest of the whole was right too; or with an error.
    pub chunks: mpsc::Receiver<Result<Bytes, DownloadError>>,
    /// Ends with this value; to be kept while chunks are wanted.
    pub receiving: Receiving,
}

/// The task that receives; it ends when this is dropped.
#[derive(Debug)]
pub struct Receiving(#[expect(dead_code, reason = "held for its Drop only")] AbortOnDropHandle<()>);

impl Downloader {
    /// With the default policy.
    pub fn new(connect: Connect) -> Self {
        Self::with_policy(connect, Policy::default())
    }

    /// With a policy.
    pub fn with_policy(connect: Connect, policy: Policy) -> Self {
        Self { connect, policy }
    }

    /// Downloads the bytes with this digest to a file; goes on from what an interrupted try left there, as far as that
    /// is right. The file is synced. One that turns out to be wrong in the end is removed.
    ///
    /// # Errors
    /// As [`DownloadError`]; except when the whole is corrupt, what is there is kept for the next try.
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
        // The task has cut the file back to the chunks that are right.
        let mut done = file.metadata().await?.len();
        progress(done, size_bytes);
        while let Some(chunk) = chunks.recv().await {
            match chunk {
                Ok(chunk) => {
                    file.write_all(&chunk).await?;
                    done += u64::try_from(chunk.len()).unwrap_or_default();
                    progress(done, size_bytes);
                }
                Err(error) => {
                    file.flush().await?;
                    if matches!(error, DownloadError::Corrupt(_)) {
                        tokio::fs::remove_file(path).await?;
                    }
                    return Err(error);
                }
            }
        }
        file.flush().await?;
        file.sync_all().await?;
        if done == size_bytes { Ok(()) } else { Err(DownloadError::Corrupt("the download ended early".into())) }
    }

    /// Starts to download the bytes with this digest. Returns with the header; dropping the result ends it.
    ///
    /// # Errors
    /// No header could be had. What goes wrong later arrives among the chunks.
    pub async fn stream(&self, sha256: &str, cancel: &CancellationToken) -> Result<Download, DownloadError> {
        self.start(sha256, None, cancel).await
    }

    /// Facts of an image. `None`: the controller did not judge it, is too old to, or does not answer soon,
    /// or `cancel` came. The installer asks again before it touches the card.
    pub async fn facts(&self, sha256: &str, cancel: &CancellationToken) -> Option<Facts> {
        cancel.run_until_cancelled(self.ask_until_answered(sha256)).await.flatten()
    }

    async fn ask_until_answered(&self, sha256: &str) -> Option<Facts> {
        let wait = FACTS_WAIT.min(self.policy.stall);
        for attempt in 0..FACTS_TRIES {
            if attempt > 0 {
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
            // An answer, too: an older controller does not know the call, or does not let nodes make it.
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
