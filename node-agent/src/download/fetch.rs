//! The task behind a download: connects, receives, checks, and resumes.

use std::io::Read;
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use marco_archive::{Facts, Packing};
use marco_proto::names::CHUNK_SIZE;
use marco_proto::v1::artifact_service_client::ArtifactServiceClient;
use marco_proto::v1::download_artifact_response::Part;
use marco_proto::v1::{DownloadArtifactRequest, DownloadArtifactResponse};
use sha2::{Digest, Sha256};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, Streaming};

use super::header::{Header, facts};
use super::{Connect, DownloadError, Policy};
use crate::backoff::{doubled, full_jitter};

/// Wrong tries in a row after which a chunk counts as wrong at its source.
const WRONG_CHUNKS: u32 = 3;

/// Reason that a try ended.
enum Ended {
    /// Another try may succeed.
    Retry(String),
    /// No try can succeed.
    Failed(DownloadError),
    /// The receiver is gone.
    Unwanted,
}

impl From<DownloadError> for Ended {
    fn from(error: DownloadError) -> Self {
        Self::Failed(error)
    }
}

/// Contents of the first header.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) size_bytes: u64,
    pub(super) facts: Option<Facts>,
    pub(super) packing: Option<Packing>,
}

/// A chunk that is hashed on a thread of its own while the next one arrives.
struct Checking {
    chunk: u64,
    task: JoinHandle<Checked>,
}

/// True if the chunk is right, its bytes, and the digest of the whole up to here.
type Checked = (bool, Bytes, Sha256);

/// A download in progress.
pub(super) struct Fetch {
    connect: Connect,
    policy: Policy,
    sha256: String,
    /// File with the beginning of the artifact. `None` once it was checked.
    existing: Option<PathBuf>,
    opened: Option<oneshot::Sender<Result<Opened, DownloadError>>>,
    chunks: mpsc::Sender<Result<Bytes, DownloadError>>,
    /// Header of the first controller that answered. Those of the others must be equal.
    header: Option<Header>,
    /// Number of the chunk that is being received.
    chunk: u64,
    /// Its bytes so far, unchecked. After an interruption the download continues behind them.
    partial: BytesMut,
    /// The previous chunk, while it is checked.
    checking: Option<Checking>,
    /// Digest over all checked chunks.
    whole: Sha256,
    /// Times in a row that this chunk was wrong.
    wrong: u32,
    /// True if this try brought any data.
    advanced: bool,
}

impl Fetch {
    pub(super) fn new(
        connect: Connect,
        policy: Policy,
        sha256: &str,
        existing: Option<PathBuf>,
        opened: oneshot::Sender<Result<Opened, DownloadError>>,
        chunks: mpsc::Sender<Result<Bytes, DownloadError>>,
    ) -> Self {
        Self {
            connect,
            policy,
            sha256: sha256.to_owned(),
            existing,
            opened: Some(opened),
            chunks,
            header: None,
            chunk: 0,
            partial: BytesMut::new(),
            checking: None,
            whole: Sha256::new(),
            wrong: 0,
            advanced: false,
        }
    }

    /// Runs to the end. The receiver of the header or of the chunks gets the error.
    pub(super) async fn run(mut self, cancel: CancellationToken) {
        let chunks = self.chunks.clone();
        let ended = tokio::select! {
            // Cancel-safe: only checked chunks were handed on.
            ended = self.until_done() => ended,
            () = cancel.cancelled() => Err(DownloadError::Cancelled),
            () = chunks.closed() => Ok(()),
        };
        if let Err(error) = ended {
            match self.opened.take() {
                // A closed channel: no caller waits for the error.
                Some(opened) => drop(opened.send(Err(error))),
                None => drop(self.chunks.send(Err(error)).await),
            }
        }
    }

    async fn until_done(&mut self) -> Result<(), DownloadError> {
        let mut tries = 0_u32;
        loop {
            self.advanced = false;
            let last = match self.attempt().await {
                Ok(()) | Err(Ended::Unwanted) => return Ok(()),
                Err(Ended::Failed(error)) => return Err(error),
                Err(Ended::Retry(last)) => last,
            };
            // Progress resets the count: a slow but steady network must not end a long download.
            tries = if self.advanced { 1 } else { tries + 1 };
            if tries >= self.policy.tries {
                return Err(DownloadError::GivenUp { tries, last });
            }
            tracing::info!(artifact = %self.sha256, error = %last, tries, "download interrupted; trying again");
            let ceiling = doubled(self.policy.first_pause, tries - 1);
            sleep(full_jitter(ceiling.min(self.policy.longest_pause))).await;
        }
    }

    /// Downloads over one connection.
    async fn attempt(&mut self) -> Result<(), Ended> {
        // A chunk of the last connection may still be in its check.
        self.settle().await?;
        let late = |_| Ended::Retry(format!("nothing arrived for {} s", self.policy.stall.as_secs_f32()));
        let channel = timeout(self.policy.stall, (self.connect)())
            .await
            .map_err(late)?
            .map_err(|error| Ended::Retry(error.to_string()))?;
        let offset = self.offset().await;
        let request = DownloadArtifactRequest { name: format!("artifacts/sha256:{}", self.sha256), offset };
        let mut client = ArtifactServiceClient::new(channel);
        let answer = timeout(self.policy.stall, client.download_artifact(request)).await.map_err(late)?;
        let mut stream = match answer {
            Ok(answer) => answer.into_inner(),
            // At offset zero the same status refuses the artifact itself.
            Err(status) if offset > 0 && is_past_the_end(&status) => return Err(self.start_over(&status).await),
            Err(status) => return Err(judge(&status)),
        };

        match self.next(&mut stream).await? {
            Some(DownloadArtifactResponse { part: Some(Part::Header(mut sent)) }) => {
                // Not part of the comparison: controllers of different versions may describe an artifact differently.
                let (facts, packing) = (sent.facts.take().map(facts), Packing::parse(&sent.compression));
                let header = Header::check(sent, &self.sha256).map_err(DownloadError::Corrupt)?;
                let opened = Opened { size_bytes: header.size, facts, packing };
                self.accept(header, opened).await?;
            }
            _ => return Err(Ended::Retry("the controller did not begin with a header".into())),
        }
        if self.missing() > 0 && self.position() != offset {
            // The file held less than its length promised, and this stream begins behind that.
            self.advanced = true;
            return Err(Ended::Retry("the file that was there is not the beginning of this artifact".into()));
        }
        while self.missing() > 0 {
            match self.next(&mut stream).await? {
                Some(DownloadArtifactResponse { part: Some(Part::Chunk(sent)) }) => {
                    if sent.offset != self.position() {
                        return Err(Ended::Retry("bytes arrived out of order".into()));
                    }
                    self.take(sent.data).await?;
                }
                Some(_) => return Err(Ended::Retry("a message arrived that is no data".into())),
                None => return Err(Ended::Retry("the controller ended the download early".into())),
            }
        }
        self.settle().await?;
        let found = hex::encode(self.whole.clone().finalize());
        if found == self.sha256 {
            return Ok(());
        }
        Err(DownloadError::Corrupt(format!("the whole has the SHA-256 {found} instead of {}", self.sha256)).into())
    }

    /// Receives the next message. A chunk that is checked meanwhile is handed on.
    async fn next(
        &mut self,
        stream: &mut Streaming<DownloadArtifactResponse>,
    ) -> Result<Option<DownloadArtifactResponse>, Ended> {
        loop {
            tokio::select! {
                // Cancel-safe: a partial message stays in the stream, and a checked chunk in its task.
                message = timeout(self.policy.stall, stream.message()) => {
                    return match message {
                        Ok(Ok(message)) => Ok(message),
                        Ok(Err(status)) => Err(judge(&status)),
                        Err(_) => Err(Ended::Retry(format!(
                            "nothing arrived for {} s",
                            self.policy.stall.as_secs_f32()
                        ))),
                    };
                }
                checked = checked(&mut self.checking) => self.hand_on(checked).await?,
            }
        }
    }

    /// Offset to continue at. Before the first header it is a guess: the whole chunks of the usual size in the file.
    async fn offset(&self) -> u64 {
        let Some(existing) = &self.existing else { return self.position() };
        let length = tokio::fs::metadata(existing).await.map_or(0, |file| file.len());
        length - length % u64::from(CHUNK_SIZE)
    }

    /// A file that is longer than the artifact is not its beginning. It is removed and the download starts over: the
    /// controller refused the offset, not the artifact.
    async fn start_over(&mut self, status: &Status) -> Ended {
        let Some(existing) = self.existing.take() else { return judge(status) };
        match tokio::fs::remove_file(&existing).await {
            Ok(()) => Ended::Retry("the file that was there is longer than this artifact".into()),
            Err(error) => DownloadError::Io(error).into(),
        }
    }

    /// Bytes received, checked or not.
    fn position(&self) -> u64 {
        let start = self.header.as_ref().map_or(0, |header| header.start(self.chunk));
        start + u64::try_from(self.partial.len()).unwrap_or_default()
    }

    /// Bytes that the present chunk still lacks; 0 at the end of the artifact.
    fn missing(&self) -> usize {
        let length = self.header.as_ref().map_or(0, |header| header.length(self.chunk));
        length.saturating_sub(self.partial.len())
    }

    /// Stores the first header, and finds the correct part of an existing file by it. Every later header must be equal.
    async fn accept(&mut self, header: Header, said: Opened) -> Result<(), Ended> {
        if let Some(before) = &self.header {
            let same = *before == header;
            // Chunks of two different lists cannot be mixed in one download.
            let differs = || DownloadError::Corrupt("the controllers disagree about the artifact's chunks".into());
            return if same { Ok(()) } else { Err(differs().into()) };
        }
        if let Some(existing) = self.existing.take() {
            let (known, path) = (header.clone(), existing);
            let checked = tokio::task::spawn_blocking(move || check_file(&known, &path)).await;
            let checked = checked.map_err(|error| Ended::Retry(format!("checking the file did not end: {error}")))?;
            (self.chunk, self.whole) = checked.map_err(DownloadError::Io)?;
        }
        if let Some(opened) = self.opened.take()
            && opened.send(Ok(said)).is_err()
        {
            return Err(Ended::Unwanted);
        }
        self.header = Some(header);
        Ok(())
    }

    /// Adds bytes. A chunk that they complete goes into its check.
    async fn take(&mut self, mut data: Bytes) -> Result<(), Ended> {
        while !data.is_empty() {
            let missing = self.missing();
            if missing == 0 {
                return Err(Ended::Retry("more bytes arrived than the artifact has".into()));
            }
            if self.partial.capacity() < missing {
                // Once for each chunk: growing in steps would copy it several times.
                self.partial.reserve(missing);
            }
            self.advanced = true;
            self.partial.extend_from_slice(&data.split_to(missing.min(data.len())));
            if self.missing() == 0 {
                self.finish_chunk().await?;
            }
        }
        Ok(())
    }

    /// Starts the check of a complete chunk. The chunk before it must be checked by now.
    async fn finish_chunk(&mut self) -> Result<(), Ended> {
        // One check at a time: the digest of the whole needs the chunks in order, and memory is bounded.
        self.settle().await?;
        let Some(header) = self.header.clone() else { return Ok(()) };
        let (bytes, chunk, mut whole) = (self.partial.split().freeze(), self.chunk, std::mem::take(&mut self.whole));
        let task = tokio::task::spawn_blocking(move || {
            let right = header.matches(chunk, &bytes);
            if right {
                whole.update(&bytes);
            }
            (right, bytes, whole)
        });
        self.checking = Some(Checking { chunk, task });
        self.chunk += 1;
        Ok(())
    }

    /// Waits for the check of a chunk, and hands the chunk on.
    async fn settle(&mut self) -> Result<(), Ended> {
        if self.checking.is_none() {
            return Ok(());
        }
        let checked = checked(&mut self.checking).await;
        self.hand_on(checked).await
    }

    async fn hand_on(&mut self, checked: Result<Checked, JoinError>) -> Result<(), Ended> {
        let Some(Checking { chunk, .. }) = self.checking.take() else { return Ok(()) };
        // A thread that panicked took the digest of the whole with it, so the download cannot continue.
        let (right, bytes, whole) =
            checked.map_err(|error| DownloadError::Io(std::io::Error::other(format!("checking a chunk: {error}"))))?;
        self.whole = whole;
        if !right {
            // The next chunk's bytes are dropped and fetched again.
            self.chunk = chunk;
            self.partial.clear();
            self.wrong += 1;
            // A wrong chunk is no progress, although it brought bytes.
            self.advanced = false;
            let message = format!("chunk {chunk} does not have its SHA-256");
            // One wrong chunk may be the fault of one controller: the next try can take another.
            let give_up = self.wrong >= WRONG_CHUNKS;
            return Err(if give_up { DownloadError::Corrupt(message).into() } else { Ended::Retry(message) });
        }
        self.wrong = 0;
        self.chunks.send(Ok(bytes)).await.map_err(|_| Ended::Unwanted)
    }
}

/// Result of the running check. Pends forever if there is none.
async fn checked(checking: &mut Option<Checking>) -> Result<Checked, JoinError> {
    match checking {
        Some(checking) => (&mut checking.task).await,
        None => std::future::pending().await,
    }
}

/// Decides if another try, perhaps at another controller, can succeed.
fn judge(status: &Status) -> Ended {
    let said = format!("{:?}: {}", status.code(), status.message());
    if is_final(status.code()) { Ended::Failed(DownloadError::Refused(said)) } else { Ended::Retry(said) }
}

/// True for the answer to an offset past the end.
fn is_past_the_end(status: &Status) -> bool {
    matches!(status.code(), Code::InvalidArgument | Code::OutOfRange)
}

/// True for a refusal that every retry would meet.
pub(super) fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::NotFound
            | Code::PermissionDenied
            | Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
    )
}

/// Number of correct chunks at the file's beginning, and the digest over them. The rest is cut off.
fn check_file(header: &Header, path: &std::path::Path) -> std::io::Result<(u64, Sha256)> {
    let (mut chunk, mut whole, mut buffer) = (0, Sha256::new(), Vec::new());
    let mut file = std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    loop {
        let length = header.length(chunk);
        buffer.clear();
        let wanted = u64::try_from(length).unwrap_or_default();
        if length == 0 || (&mut file).take(wanted).read_to_end(&mut buffer)? < length || !header.matches(chunk, &buffer)
        {
            // The download continues with the first chunk that is missing or wrong.
            file.set_len(header.start(chunk))?;
            return Ok((chunk, whole));
        }
        whole.update(&buffer);
        chunk += 1;
    }
}
