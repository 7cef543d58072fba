#![expect(clippy::as_conversions, reason = "sizes of a few megabytes fit every integer type")]

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use marco_archive::Facts;
use marco_proto::v1::artifact_service_server::{ArtifactService, ArtifactServiceServer};
use marco_proto::v1::download_artifact_response::Part;
use marco_proto::v1::{
    Artifact, Chunk, DeleteArtifactRequest, DeleteArtifactResponse, DownloadArtifactRequest, DownloadArtifactResponse,
    DownloadHeader, GetArtifactRequest, ImageFacts, ListArtifactsRequest, ListArtifactsResponse, OpenArtifactRequest,
    SetDefaultArtifactRequest, UploadArtifactRequest, UploadArtifactResponse,
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use super::{Connect, DownloadError, Downloader, Policy, Progress};

pub(crate) const CHUNK: usize = 64 * 1024;
const MESSAGE: usize = 10_000;

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Fault of a test's controller, by the number of the request.
pub(crate) type Fault = Arc<dyn Fn(usize) -> Wrong + Send + Sync>;

#[derive(Clone, Copy)]
pub(crate) enum Wrong {
    Nothing,
    /// Ends with an error after this many bytes.
    CutAfter(usize),
    /// Ends without an error after this many bytes.
    EndAfter(usize),
    /// Flips this byte when it is sent.
    Flip(usize),
    /// Names another digest in the header.
    OtherDigest,
    /// Lists another digest for the last chunk.
    OtherList,
    /// Sends one byte too many.
    Endless,
    /// Sends nothing.
    Silent,
    /// Sends the header and no data.
    Withheld,
    /// Has no such artifact.
    Missing,
}

#[derive(Clone)]
pub(crate) struct Controller {
    bytes: Bytes,
    fault: Fault,
    asked: Arc<Mutex<Vec<(String, u64)>>>,
    sent: Arc<AtomicU64>,
    facts: Option<ImageFacts>,
    /// Packing by the push; empty, as an older controller sends it.
    packing: &'static str,
}

impl Controller {
    /// A controller that knows only the digests of the artifact.
    fn new(bytes: Bytes, fault: Fault) -> Self {
        Self { bytes, fault, asked: Arc::default(), sent: Arc::default(), facts: None, packing: "" }
    }

    /// Number of earlier requests.
    fn round(&self, name: String, offset: u64) -> usize {
        let mut asked = self.asked.lock().unwrap();
        asked.push((name, offset));
        asked.len() - 1
    }

    fn header(&self) -> DownloadHeader {
        let digests: Vec<u8> = self.bytes.chunks(CHUNK).flat_map(|chunk| Sha256::digest(chunk).to_vec()).collect();
        DownloadHeader {
            size_bytes: self.bytes.len() as u64,
            sha256: hex::encode(Sha256::digest(&self.bytes)),
            chunk_size: CHUNK as u32,
            chunk_sha256: digests.into(),
            facts: self.facts.clone(),
            compression: self.packing.to_owned(),
        }
    }
}

#[tonic::async_trait]
impl ArtifactService for Controller {
    type UploadArtifactStream = Answers<UploadArtifactResponse>;
    type DownloadArtifactStream = Answers<DownloadArtifactResponse>;

    async fn download_artifact(
        &self,
        request: Request<DownloadArtifactRequest>,
    ) -> Result<Response<Self::DownloadArtifactStream>, Status> {
        let DownloadArtifactRequest { name, offset } = request.into_inner();
        let round = self.round(name, offset);
        if offset > self.bytes.len() as u64 {
            return Err(Status::invalid_argument("offset: it lies past the end"));
        }
        let (mut header, mut bytes) = (self.header(), self.bytes.to_vec());
        let (mut limit, mut end) = (usize::MAX, None);
        match (self.fault)(round) {
            Wrong::Nothing => {}
            Wrong::CutAfter(count) => (limit, end) = (count, Some(Status::unavailable("cut"))),
            Wrong::EndAfter(count) => limit = count,
            Wrong::Flip(at) => bytes[at] ^= 1,
            Wrong::OtherDigest => header.sha256 = "0".repeat(64),
            Wrong::OtherList => {
                let mut list = header.chunk_sha256.to_vec();
                *list.last_mut().unwrap() ^= 1;
                header.chunk_sha256 = list.into();
            }
            Wrong::Endless => bytes.push(0),
            Wrong::Silent | Wrong::Withheld => return std::future::pending().await,
            Wrong::Missing => return Err(Status::not_found("no such artifact")),
        }
        let mut messages = vec![Ok(DownloadArtifactResponse { part: Some(Part::Header(header)) })];
        let mut at = offset as usize;
        let stop = bytes.len().min(at.saturating_add(limit));
        while at < stop {
            let data = bytes[at..stop.min(at + MESSAGE)].to_vec();
            let chunk = Chunk { offset: at as u64, data: data.into() };
            at += MESSAGE;
            // Messages do not end at the borders of chunks, as on the wire.
            messages.push(Ok(DownloadArtifactResponse { part: Some(Part::Chunk(chunk)) }));
        }
        messages.extend(end.map(Err));
        let sent = Arc::clone(&self.sent);
        let counted = stream::iter(messages).inspect(move |message| {
            if let Ok(DownloadArtifactResponse { part: Some(Part::Chunk(chunk)) }) = message {
                sent.fetch_add(chunk.data.len() as u64, Ordering::Relaxed);
            }
        });
        Ok(Response::new(Box::pin(counted)))
    }

    async fn upload_artifact(
        &self,
        _: Request<Streaming<UploadArtifactRequest>>,
    ) -> Result<Response<Self::UploadArtifactStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn get_artifact(&self, request: Request<GetArtifactRequest>) -> Result<Response<Artifact>, Status> {
        let name = request.into_inner().name;
        let DownloadHeader { sha256, size_bytes, .. } = self.header();
        let known = name == format!("artifacts/sha256:{sha256}");
        match (self.fault)(self.round(name.clone(), 0)) {
            Wrong::Silent => std::future::pending().await,
            Wrong::CutAfter(_) => Err(Status::unavailable("cut")),
            fault if !known || matches!(fault, Wrong::Missing) => Err(Status::not_found("no such artifact")),
            _ => {
                let facts = self.facts.clone();
                Ok(Response::new(Artifact { name, sha256, size_bytes, facts, ..Artifact::default() }))
            }
        }
    }
    async fn list_artifacts(
        &self,
        _: Request<ListArtifactsRequest>,
    ) -> Result<Response<ListArtifactsResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn delete_artifact(
        &self,
        _: Request<DeleteArtifactRequest>,
    ) -> Result<Response<DeleteArtifactResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn open_artifact(&self, _: Request<OpenArtifactRequest>) -> Result<Response<Artifact>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn set_default_artifact(&self, _: Request<SetDefaultArtifactRequest>) -> Result<Response<Artifact>, Status> {
        Err(Status::unimplemented(""))
    }
}

struct Bed {
    controller: Controller,
    downloader: Downloader,
    sha256: String,
    dir: TempDir,
    _server: AbortOnDropHandle<()>,
}

impl Bed {
    async fn new(size: usize, fault: impl Fn(usize) -> Wrong + Send + Sync + 'static) -> Self {
        let bytes: Bytes = (0..size).map(|at| (at * 7 + at / 251) as u8).collect::<Vec<_>>().into();
        let sha256 = hex::encode(Sha256::digest(&bytes));
        let controller = Controller::new(bytes, Arc::new(fault));
        let (connect, server) = serve(controller.clone()).await;
        let downloader = Downloader::with_policy(connect, QUICK);
        Self { controller, downloader, sha256, dir: TempDir::new().unwrap(), _server: server }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("file")
    }

    async fn to_file(&self) -> Result<(), DownloadError> {
        let nothing: Progress = Arc::new(|_, _| {});
        self.downloader.to_file(&self.sha256, &self.path(), nothing, &CancellationToken::new()).await
    }

    fn offsets(&self) -> Vec<u64> {
        self.controller.asked.lock().unwrap().iter().map(|(_, offset)| *offset).collect()
    }

    fn sent(&self) -> u64 {
        self.controller.sent.load(Ordering::Relaxed)
    }

    fn assert_right(&self) {
        assert!(std::fs::read(self.path()).unwrap() == self.controller.bytes, "the file differs");
    }
}

/// A downloader of these bytes, and the handle that keeps their controller alive.
pub(crate) async fn serve_bytes(bytes: Bytes, fault: Fault) -> (Downloader, AbortOnDropHandle<()>) {
    serve_judged(bytes, fault, None).await
}

/// Same, for an image with these facts.
pub(crate) async fn serve_judged(
    bytes: Bytes,
    fault: Fault,
    facts: Option<ImageFacts>,
) -> (Downloader, AbortOnDropHandle<()>) {
    let (connect, server) = serve(Controller { facts, ..Controller::new(bytes, fault) }).await;
    (Downloader::with_policy(connect, QUICK), server)
}

/// Same, for an image with this packing, by the API's word.
pub(crate) async fn serve_packed(bytes: Bytes, packing: &'static str) -> (Downloader, AbortOnDropHandle<()>) {
    let controller = Controller { packing, ..Controller::new(bytes, Arc::new(|_| Wrong::Nothing)) };
    let (connect, server) = serve(controller).await;
    (Downloader::with_policy(connect, QUICK), server)
}

const QUICK: Policy = Policy {
    first_pause: Duration::from_millis(1),
    longest_pause: Duration::from_millis(5),
    tries: 4,
    stall: Duration::from_millis(500),
};

async fn serve(controller: Controller) -> (Connect, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server::builder()
        .add_service(ArtifactServiceServer::new(controller))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let task = AbortOnDropHandle::new(tokio::spawn(async move { server.await.unwrap() }));
    let connect: Connect = Arc::new(move || {
        Box::pin(async move { Ok(Endpoint::from_shared(format!("http://{address}"))?.connect().await?) })
    });
    (connect, task)
}

#[tokio::test]
async fn a_whole_download_is_named_by_its_digest() {
    let bed = Bed::new(5 * CHUNK + 17, |_| Wrong::Nothing).await;
    bed.to_file().await.unwrap();
    bed.assert_right();
    assert_eq!(*bed.controller.asked.lock().unwrap(), [(format!("artifacts/sha256:{}", bed.sha256), 0)]);
}

#[tokio::test]
async fn file_that_is_longer_than_the_artifact_is_no_beginning_of_it() {
    let bed = Bed::new(CHUNK + 17, |_| Wrong::Nothing).await;
    let more = 2 * usize::try_from(marco_proto::names::CHUNK_SIZE).unwrap();
    std::fs::write(bed.path(), vec![7; more]).unwrap();
    bed.to_file().await.unwrap();
    bed.assert_right();
    // The controller refuses the offset past the end, so the second request starts at zero.
    assert_eq!(bed.offsets(), [more as u64, 0]);
}

#[test]
fn rests_of_downloads_are_swept_and_nothing_else() {
    let dir = TempDir::new().unwrap();
    let (present, other) = (super::file_in(dir.path(), "aa"), super::file_in(dir.path(), "bb"));
    // An agent before digests in names left `boot.zip`.
    let (before, key) = (dir.path().join("boot.zip"), dir.path().join("node.key"));
    for path in [&present, &other, &before, &key] {
        std::fs::write(path, "x").unwrap();
    }
    super::sweep(dir.path(), Some("aa"));
    assert!(present.exists() && key.exists() && !other.exists() && !before.exists());
    super::sweep(dir.path(), None);
    assert!(!present.exists() && key.exists());
    super::sweep(&dir.path().join("nowhere"), None);
}

#[tokio::test]
async fn an_empty_artifact_is_downloaded() {
    let bed = Bed::new(0, |_| Wrong::Nothing).await;
    bed.to_file().await.unwrap();
    bed.assert_right();
}

#[tokio::test]
async fn ten_cuts_send_at_most_a_chunk_each_again() {
    let cuts = |round| if round < 10 { Wrong::CutAfter(50_003 + 7 * round) } else { Wrong::Nothing };
    let bed = Bed::new(20 * CHUNK + 1, cuts).await;
    bed.to_file().await.unwrap();
    bed.assert_right();
    // Each of the ten cuts brought data, so none counts as a try without progress.
    assert_eq!(bed.offsets().len(), 11);
    let again = bed.sent() - bed.controller.bytes.len() as u64;
    assert!(again <= 10 * CHUNK as u64, "{again} bytes were sent again");
}

#[tokio::test]
async fn a_stream_that_ends_without_an_error_is_a_cut() {
    let bed = Bed::new(3 * CHUNK, |round| if round == 0 { Wrong::EndAfter(CHUNK + 5) } else { Wrong::Nothing }).await;
    bed.to_file().await.unwrap();
    bed.assert_right();
    // A clean end of the stream does not prove completeness.
    assert_eq!(bed.offsets(), [0, (CHUNK + 5) as u64]);
}

#[tokio::test]
async fn a_silent_controller_is_a_cut() {
    let bed = Bed::new(CHUNK, |round| if round == 0 { Wrong::Silent } else { Wrong::Nothing }).await;
    bed.to_file().await.unwrap();
    bed.assert_right();
}

#[tokio::test]
async fn a_flipped_bit_is_never_handed_on() {
    let bed = Bed::new(4 * CHUNK, |round| if round == 0 { Wrong::Flip(2 * CHUNK + 9) } else { Wrong::Nothing }).await;
    bed.to_file().await.unwrap();
    bed.assert_right();
    assert_eq!(bed.offsets(), [0, (2 * CHUNK) as u64], "the chunk, and nothing before it, is asked for again");

    let bed = Bed::new(4 * CHUNK, |_| Wrong::Flip(2 * CHUNK + 9)).await;
    let mut download = bed.downloader.stream(&bed.sha256, &CancellationToken::new()).await.unwrap();
    let mut right = Vec::new();
    let error = loop {
        match download.chunks.recv().await.unwrap() {
            Ok(chunk) => right.extend_from_slice(&chunk),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, DownloadError::Corrupt(_)), "{error}");
    assert!(right == bed.controller.bytes[..2 * CHUNK], "exactly the chunks before it were handed on");
}

#[tokio::test]
async fn a_header_for_something_else_is_refused() {
    let bed = Bed::new(CHUNK, |_| Wrong::OtherDigest).await;
    assert!(matches!(bed.to_file().await, Err(DownloadError::Corrupt(_))));
}

#[tokio::test]
async fn a_header_that_changes_is_refused() {
    let bed = Bed::new(4 * CHUNK, |round| if round == 0 { Wrong::CutAfter(CHUNK) } else { Wrong::OtherList }).await;
    assert!(matches!(bed.to_file().await, Err(DownloadError::Corrupt(_))));
    // Some chunk in the file may be of the wrong list, so none of it is kept.
    assert!(!bed.path().exists());
}

#[tokio::test]
async fn more_than_was_promised_is_not_taken() {
    let bed = Bed::new(CHUNK + 1, |_| Wrong::Endless).await;
    // The chunks are all right, so the bytes behind them are not read.
    bed.to_file().await.unwrap();
    bed.assert_right();
}

#[tokio::test]
async fn what_does_not_exist_is_not_tried_again() {
    let bed = Bed::new(CHUNK, |_| Wrong::Missing).await;
    let error = bed.to_file().await.unwrap_err();
    // One request: a retry would get the same refusal.
    assert_eq!((error.reason(), bed.offsets().len()), ("DOWNLOAD_REFUSED", 1));
}

#[tokio::test]
async fn it_is_given_up_after_tries_without_a_byte() {
    let bed = Bed::new(CHUNK, |_| Wrong::CutAfter(0)).await;
    let error = bed.to_file().await.unwrap_err();
    assert_eq!((error.reason(), bed.offsets().len()), ("DOWNLOAD_FAILED", 4));
}

#[tokio::test]
async fn a_file_that_was_begun_is_gone_on_with() {
    let bed = Bed::new(10 * CHUNK, |_| Wrong::Nothing).await;
    // A complete file, one that ends within a chunk, and one with a flipped bit.
    for (kept, damaged) in [(10 * CHUNK, None), (3 * CHUNK + 100, None), (4 * CHUNK, Some(2 * CHUNK))] {
        let mut begun = bed.controller.bytes[..kept].to_vec();
        if let Some(at) = damaged {
            begun[at] ^= 1;
        }
        std::fs::write(bed.path(), begun).unwrap();
        bed.to_file().await.unwrap();
        bed.assert_right();
    }
}

#[tokio::test]
async fn a_cancelled_download_ends_and_keeps_what_is_right() {
    let bed = Bed::new(4 * CHUNK, |round| if round == 0 { Wrong::CutAfter(2 * CHUNK) } else { Wrong::Silent }).await;
    let cancel = CancellationToken::new();
    let (at_two, token) = (cancel.clone(), cancel.clone());
    let progress: Progress = Arc::new(move |done, _| {
        if done == 2 * CHUNK as u64 {
            at_two.cancel();
        }
    });
    let error = bed.downloader.to_file(&bed.sha256, &bed.path(), progress, &token).await.unwrap_err();
    assert_eq!(error.reason(), "CANCELLED");
    // The next try continues behind these chunks.
    assert_eq!(std::fs::metadata(bed.path()).unwrap().len(), 2 * CHUNK as u64);
}

impl Bed {
    /// The facts it learns, the number of requests, and the time that took.
    async fn facts(&self, cancel: &CancellationToken) -> (Option<Facts>, usize, Duration) {
        let began = Instant::now();
        let facts = self.downloader.facts(&self.sha256, cancel).await;
        (facts, self.offsets().len(), began.elapsed())
    }
}

#[tokio::test]
async fn facts_are_those_of_the_controller() {
    let bed = Bed::new(CHUNK, |_| Wrong::Nothing).await;
    let (facts, asked, _) = bed.facts(&CancellationToken::new()).await;
    assert_eq!((facts, asked), (None, 1), "it does not judge images");
    let said = ImageFacts { refusal: "it has no init".into(), ..ImageFacts::default() };
    let bytes = bed.controller.bytes.clone();
    let (downloader, _server) = serve_judged(bytes, Arc::new(|_| Wrong::Nothing), Some(said)).await;
    let facts = downloader.facts(&bed.sha256, &CancellationToken::new()).await;
    assert_eq!(facts.unwrap().refusal.unwrap(), "it has no init");
}

#[tokio::test]
async fn facts_are_asked_for_again_only_where_that_helps() {
    // A refusal is an answer. An unavailable controller may be back at the next try.
    for (fault, tries) in [(Wrong::Missing, 1), (Wrong::CutAfter(0), 3)] {
        let bed = Bed::new(CHUNK, move |_| fault).await;
        let (facts, asked, _) = bed.facts(&CancellationToken::new()).await;
        assert_eq!((facts, asked), (None, tries));
    }
}

#[tokio::test]
async fn silent_controller_does_not_hold_up_the_facts() {
    let bed = Bed::new(CHUNK, |_| Wrong::Silent).await;
    let (facts, asked, took) = bed.facts(&CancellationToken::new()).await;
    assert_eq!((facts, asked), (None, 3));
    assert!(took < Duration::from_secs(10), "{took:?}");

    let cancel = CancellationToken::new();
    cancel.cancel();
    // A cancelled update must not wait for a connection either.
    let never: Connect = Arc::new(|| Box::pin(std::future::pending()));
    assert_eq!(Downloader::new(never).facts(&bed.sha256, &cancel).await, None);
}
