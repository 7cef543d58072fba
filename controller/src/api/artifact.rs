//! `ArtifactService`.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use marco_archive::{Facts, Reason};
use marco_proto::names::{ArtifactId, CHUNK_SIZE};
use marco_proto::v1;
use marco_proto::v1::artifact_service_server::ArtifactService;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::downloads::{DOWNLOAD_QUEUE, Sending, check_node, send_blob};
use super::status::ApiError;
use super::{Context, caller, convert, page, peers};
use crate::artifacts::{ArtifactError, Content, Digest, Upload};
use crate::identity::Caller;
use crate::identity::peer_log::of_peer;
use crate::identity::roles::Role;
use crate::store::{ArtifactRow, DeleteArtifactOutcome, Kind, Purpose, recorded};

mod bytes;
mod judge;

pub(crate) use bytes::{remove_unneeded, sweep};
pub(super) use judge::facts_of;
pub(crate) use judge::judge_stored;

/// Time without data after which an upload is cut; received bytes are kept.
const UPLOAD_IDLE: Duration = Duration::from_secs(60);
/// Time for which the end of an upload is awaited after all announced bytes.
const UPLOAD_END: Duration = Duration::from_secs(2);
/// Interval at which an upload reports the progress of its check.
const CHECK_PROGRESS: Duration = Duration::from_millis(500);
/// Prefix of a name for bytes, independent of artifact names.
pub(super) const BY_DIGEST: &str = "artifacts/sha256:";

/// The service.
pub(super) struct ArtifactsApi {
    context: Context,
}

type Answers<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

impl ArtifactsApi {
    pub(super) fn new(context: Context) -> Self {
        Self { context }
    }

    async fn find(&self, name: &str) -> Result<ArtifactRow, ApiError> {
        let row = match name.strip_prefix(BY_DIGEST) {
            Some(digest) => self.context.store.artifact_by_sha256(digest).await?,
            None => self.context.store.artifact(&artifact_id("name", name)?).await?,
        };
        row.ok_or_else(|| not_found(name))
    }

    async fn list(&self, request: v1::ListArtifactsRequest) -> Result<v1::ListArtifactsResponse, ApiError> {
        const LIST: &str = "artifacts";
        let size = page::size(request.page_size)?;
        let after = match page::after(LIST, &request.page_token)? {
            Some(id) => Some(artifact_id("page_token", &id)?),
            None => None,
        };
        let kind = match request.filter.unwrap_or_default().kind {
            0 => None,
            kind => Some(convert::kind(kind).ok_or_else(|| ApiError::invalid("filter.kind", "is not a known kind"))?),
        };
        let rows = self.context.store.artifacts(after.as_ref(), size + 1, kind).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |row| row.id.as_str().to_owned());
        Ok(v1::ListArtifactsResponse { artifacts: rows.iter().map(convert::artifact).collect(), next_page_token })
    }

    async fn delete(&self, name: &str) -> Result<v1::DeleteArtifactResponse, ApiError> {
        let id = artifact_id("name", name)?;
        match self.context.store.delete_artifact(&id).await? {
            DeleteArtifactOutcome::Deleted { bytes_unused } => {
                // The row is gone already. Bytes without a row are harmless, a row without bytes is not.
                if let Some(digest) = bytes_unused {
                    bytes::remove(&self.context, &digest).await;
                }
                Ok(v1::DeleteArtifactResponse {})
            }
            DeleteArtifactOutcome::InUse(operations) => Err(ApiError::Precondition {
                reason: "ARTIFACT_IN_USE",
                message: format!(
                    "{} is needed by {}; wait for it or cancel it",
                    id.name(),
                    operations.iter().map(|id| id.name()).collect::<Vec<_>>().join(", ")
                ),
            }),
            DeleteArtifactOutcome::NotFound => Err(not_found(name)),
        }
    }

    async fn open(&self, request: &v1::OpenArtifactRequest) -> Result<v1::Artifact, ApiError> {
        let id = artifact_id("name", &request.name)?;
        let row = self.context.store.open_artifact(&id, request.open_to_mirror).await?;
        row.map(|row| convert::artifact(&row)).ok_or_else(|| not_found(&request.name))
    }

    async fn set_default(&self, request: &v1::SetDefaultArtifactRequest) -> Result<v1::Artifact, ApiError> {
        let id = artifact_id("name", &request.name)?;
        // A misspelt family would be a default that no node ever gets.
        if !matches!(request.board.as_str(), "" | "pi1" | "pi2" | "pi3" | "pi4" | "pi5") {
            return Err(ApiError::invalid("board", "must be pi1, pi2, pi3, pi4 or pi5, or empty for any board"));
        }
        let row = self.context.store.set_default(&id, &request.board).await?;
        row.map(|row| convert::artifact(&row)).ok_or_else(|| not_found(&request.name))
    }
}

fn artifact_id(field: &str, name: &str) -> Result<ArtifactId, ApiError> {
    ArtifactId::parse(name).map_err(|error| ApiError::invalid(field, error.to_string()))
}

fn not_found(name: &str) -> ApiError {
    // The text is the caller's and of any length.
    let shown: String = name.chars().take(160).collect();
    ApiError::NotFound {
        reason: "ARTIFACT_NOT_FOUND",
        message: format!("there is no artifact {shown}; `marcoctl artifacts list` shows those that exist"),
    }
}

pub(super) fn artifact_error(error: ArtifactError) -> ApiError {
    let message = error.to_string();
    match error {
        ArtifactError::InvalidDigest(_) => ApiError::invalid("header.sha256", message),
        ArtifactError::InvalidSize(_) | ArtifactError::WrongSize { .. } => {
            ApiError::invalid("header.size_bytes", message)
        }
        ArtifactError::NoSpace { .. } => ApiError::Exhausted { reason: "NO_SPACE", message },
        // ABORTED tells a client to retry: the other upload ends, or goes silent and is cut.
        ArtifactError::Busy => ApiError::Aborted { reason: "UPLOAD_UNDER_WAY", message },
        ArtifactError::WrongOffset { .. } => ApiError::invalid("chunk.offset", message),
        ArtifactError::TooLong(_) => ApiError::invalid("chunk.data", message),
        ArtifactError::Incomplete { .. } => ApiError::Aborted { reason: "UPLOAD_INCOMPLETE", message },
        ArtifactError::WrongDigest { .. } => ApiError::invalid("header.sha256", message),
        ArtifactError::Refused(refused) => match refused.reason {
            reason @ (Reason::NotASystem(_) | Reason::Foreign(_)) => ApiError::invalid("image", reason.to_string()),
            _ => ApiError::invalid("chunk.data", message),
        },
        ArtifactError::Format(_) => ApiError::invalid("chunk.data", message),
        ArtifactError::Stopping => ApiError::Aborted { reason: "STOPPING", message },
        ArtifactError::NotFound(_) => ApiError::NotFound { reason: "ARTIFACT_NOT_FOUND", message },
        // The system's error goes into the log. The caller learns the failed action.
        ArtifactError::Io { .. } => {
            of_peer!(error, "the artifact store", error = &*crate::chain(&error), "the artifact store failed");
            ApiError::Internal(message)
        }
    }
}

/// The first message of an upload, read and checked.
struct Header {
    id: ArtifactId,
    kind: Kind,
    purpose: Purpose,
    content: Content,
    size: u64,
    sha256: Digest,
}

fn header(message: Option<v1::UploadArtifactRequest>) -> Result<Header, ApiError> {
    let Some(v1::upload_artifact_request::Part::Header(header)) = message.and_then(|message| message.part) else {
        return Err(ApiError::invalid("header", "must be the first message of an upload"));
    };
    let id = artifact_id("header.name", &header.name)?;
    let sha256 = Digest::parse(&header.sha256).map_err(artifact_error)?;
    let (kind, purpose, content) = match (convert::kind(header.kind), header.purpose()) {
        (Some(Kind::Image), v1::artifact::Purpose::Unspecified) => (Kind::Image, Purpose::None, Content::Image),
        (Some(Kind::Image), _) => {
            return Err(ApiError::invalid("header.purpose", "is for a bootcode; an image has none"));
        }
        (Some(Kind::Bootcode), v1::artifact::Purpose::System) => {
            (Kind::Bootcode, Purpose::System, Content::SystemBootcode)
        }
        (Some(Kind::Bootcode), _) => (Kind::Bootcode, Purpose::Installer, Content::InstallerBootcode),
        (None, _) => return Err(ApiError::invalid("header.kind", "must be KIND_IMAGE or KIND_BOOTCODE")),
    };
    Ok(Header { id, kind, purpose, content, size: header.size_bytes, sha256 })
}

type UploadAnswers = mpsc::Sender<Result<v1::UploadArtifactResponse, Status>>;

async fn answer(answers: &UploadAnswers, part: v1::upload_artifact_response::Part) {
    // A client that is gone is noticed at its next message.
    let _ = answers.send(Ok(v1::UploadArtifactResponse { part: Some(part) })).await;
}

async fn next(
    messages: &mut Streaming<v1::UploadArtifactRequest>,
) -> Result<Option<v1::UploadArtifactRequest>, ApiError> {
    match tokio::time::timeout(UPLOAD_IDLE, messages.message()).await {
        Ok(Ok(message)) => Ok(message),
        // A retry of the same message would fail again, so it is no cut.
        Ok(Err(status)) if status.code() == Code::InvalidArgument => {
            Err(ApiError::invalid("message", status.message().to_owned()))
        }
        Ok(Err(status)) => Err(ApiError::Aborted {
            reason: "UPLOAD_CUT",
            message: format!("the upload was cut: {}; push again to go on", status.message()),
        }),
        Err(_) => Err(ApiError::Aborted {
            reason: "UPLOAD_IDLE",
            message: "the upload sent nothing for a minute; push again to go on".to_owned(),
        }),
    }
}

/// Bytes that are stored and checked. They cannot be removed while this lives.
struct Received {
    row: ArtifactRow,
    facts: Option<Facts>,
    _upload: Upload,
}

/// Receives the bytes and checks them; no name points at them yet.
async fn receive(
    context: &Context,
    caller: &Caller,
    target: &mut String,
    messages: &mut Streaming<v1::UploadArtifactRequest>,
    answers: &UploadAnswers,
) -> Result<Received, ApiError> {
    let header = header(next(messages).await?)?;
    *target = header.id.name();
    let mut upload = context.artifacts.begin(header.sha256, header.size).await.map_err(artifact_error)?;
    answer(answers, v1::upload_artifact_response::Part::Offset(upload.offset())).await;
    while upload.offset() < header.size {
        match next(messages).await?.map(|message| message.part) {
            Some(Some(v1::upload_artifact_request::Part::Chunk(chunk))) => {
                match upload.append(chunk.offset, chunk.data).await {
                    Ok(()) => {}
                    Err(error @ ArtifactError::TooLong(_)) => {
                        // Otherwise the next push would go on from bytes that are longer than they should be.
                        upload.discard().await.map_err(artifact_error)?;
                        return Err(artifact_error(error));
                    }
                    Err(error) => return Err(artifact_error(error)),
                }
            }
            Some(_) => return Err(ApiError::invalid("part", "must be a chunk after the header")),
            None => break,
        }
    }
    // An upload that goes on past its announced size is a mistake or an attack, so nothing of it is kept. A client that
    // leaves its side open and waits for the answer waits no longer than this.
    if upload.offset() == header.size
        && let Ok(more) = tokio::time::timeout(UPLOAD_END, next(messages)).await
        && more.is_ok_and(|message| message.is_some())
    {
        upload.discard().await.map_err(artifact_error)?;
        return Err(artifact_error(ArtifactError::TooLong(header.size)));
    }

    let checked = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&checked);
    let mut finish = Box::pin(upload.finish(header.content, move |bytes| counter.store(bytes, Ordering::Relaxed)));
    // The check of a large image takes minutes; without progress a client could not tell it from a hang.
    let mut ticks = tokio::time::interval(CHECK_PROGRESS);
    let blob = loop {
        // A tick only reports; the check goes on where it was.
        tokio::select! {
            blob = &mut finish => break blob.map_err(artifact_error)?,
            _ = ticks.tick() => {
                let bytes = checked.load(Ordering::Relaxed);
                answer(answers, v1::upload_artifact_response::Part::CheckedBytes(bytes)).await;
            }
        }
    };
    // The check borrows the upload, which must live on until the row is stored.
    drop(finish);
    let row = ArtifactRow {
        id: header.id,
        kind: header.kind,
        purpose: header.purpose,
        sha256: blob.sha256.to_string(),
        size: blob.size,
        chunk_size: blob.chunk_size,
        chunk_sha256: blob.chunk_sha256,
        unpacked_bytes: blob.unpacked_bytes,
        entries: blob.entries,
        compression: blob.packing.as_str().to_owned(),
        push_time: context.clock.now(),
        creator: caller.name.clone(),
        default_for: Vec::new(),
        open_to_mirror: false,
    };
    Ok(Received { row, facts: blob.facts, _upload: upload })
}

/// Points a name at the received bytes.
async fn keep(context: &Context, received: Received) -> Result<v1::Artifact, ApiError> {
    let row = &received.row;
    let unused = context.store.put_artifact(row).await?;
    // Without the facts the image is examined again at its first use.
    if let Some(facts) = &received.facts
        && let Err(error) = judge::keep(context, &row.sha256, facts).await
    {
        tracing::warn!(artifact = %row.id, error = &*crate::chain(&error), "facts of an image not stored");
    }
    if let Some(unused) = unused {
        bytes::remove(context, &unused).await;
    }
    let stored = context.store.artifact(&row.id).await?;
    Ok(convert::artifact(stored.as_ref().unwrap_or(row)))
}

#[tonic::async_trait]
impl ArtifactService for ArtifactsApi {
    type UploadArtifactStream = Answers<v1::UploadArtifactResponse>;

    async fn upload_artifact(
        &self,
        request: Request<Streaming<v1::UploadArtifactRequest>>,
    ) -> Result<Response<Self::UploadArtifactStream>, Status> {
        let caller = caller(&request)?;
        // The upload is recorded at its end.
        caller.leave_recording();
        let mut messages = request.into_inner();
        let (sender, receiver) = mpsc::channel(4);
        let context = self.context.clone();
        let stop = context.stop.clone();
        self.context.tasks.spawn(async move {
            let mut target = String::new();
            // If it is dropped here, the received bytes are kept for another try, and nothing else has changed.
            let received = tokio::select! {
                () = stop.cancelled() => Err(ApiError::Aborted {
                    reason: "STOPPING",
                    message: "the controller is stopping; push again to go on".to_owned(),
                }),
                received = receive(&context, &caller, &mut target, &mut messages, &sender) => received,
            };
            // From here on nothing stops it: a stop must not separate the name from its record.
            let result = match received {
                Ok(received) => {
                    recorded(context.record(&caller, "UploadArtifact", &target), keep(&context, received)).await
                }
                Err(error) => Err(error),
            };
            context.audit(&caller, "UploadArtifact", &target, &result).await;
            let last = result.map_err(Status::from).map(|artifact| v1::UploadArtifactResponse {
                part: Some(v1::upload_artifact_response::Part::Artifact(artifact)),
            });
            let _ = sender.send(last).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn get_artifact(&self, request: Request<v1::GetArtifactRequest>) -> Result<Response<v1::Artifact>, Status> {
        let caller = caller(&request)?;
        let row = self.find(&request.get_ref().name).await?;
        let facts = match &caller.node {
            // Facts contain some of the image's bytes, so a node gets those of its own work only.
            Some(node) if check_node(&self.context, node, &row.sha256).await.is_err() => None,
            _ => judge::known(&self.context, &row.sha256).await?,
        };
        Ok(Response::new(v1::Artifact { facts: facts.map(convert::facts), ..convert::artifact(&row) }))
    }

    async fn list_artifacts(
        &self,
        request: Request<v1::ListArtifactsRequest>,
    ) -> Result<Response<v1::ListArtifactsResponse>, Status> {
        Ok(Response::new(self.list(request.into_inner()).await?))
    }

    async fn delete_artifact(
        &self,
        request: Request<v1::DeleteArtifactRequest>,
    ) -> Result<Response<v1::DeleteArtifactResponse>, Status> {
        let caller = caller(&request)?;
        let name = request.into_inner().name;
        caller.note_target(&name);
        let result = self.delete(&name).await;
        self.context.audit(&caller, "DeleteArtifact", &name, &result).await;
        Ok(Response::new(result?))
    }

    async fn set_default_artifact(
        &self,
        request: Request<v1::SetDefaultArtifactRequest>,
    ) -> Result<Response<v1::Artifact>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        caller.note_target(&request.name);
        let result = self.set_default(&request).await;
        self.context.audit(&caller, "SetDefaultArtifact", &request.name, &result).await;
        Ok(Response::new(result?))
    }

    async fn open_artifact(&self, request: Request<v1::OpenArtifactRequest>) -> Result<Response<v1::Artifact>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        caller.note_target(&request.name);
        let result = self.open(&request).await;
        self.context.audit(&caller, "OpenArtifact", &request.name, &result).await;
        Ok(Response::new(result?))
    }

    type DownloadArtifactStream = Answers<v1::DownloadArtifactResponse>;

    async fn download_artifact(
        &self,
        request: Request<v1::DownloadArtifactRequest>,
    ) -> Result<Response<Self::DownloadArtifactStream>, Status> {
        let caller = caller(&request)?;
        let asked_by_controller = caller.role == Role::Controller;
        let request = request.into_inner();
        let row = self.find(&request.name).await?;
        if let Some(node) = &caller.node {
            check_node(&self.context, node, &row.sha256).await?;
        }
        // After the permission: a node that may not have the bytes must not take a place.
        let underway = self.context.downloads.begin(&caller).await?;
        // Equal is fine: the client has all bytes, and gets only the header.
        if request.offset > row.size {
            let message = format!("{} lies past the end of {} bytes", request.offset, row.size);
            return Err(ApiError::invalid("offset", message).into());
        }
        let digest = Digest::parse(&row.sha256).map_err(artifact_error)?;
        let reader = match self.context.artifacts.reader(digest).await {
            // A controller asks for a node, and is answered from local bytes only. Otherwise two controllers that lack
            // the bytes would ask each other without end.
            Err(ArtifactError::NotFound(_)) if !asked_by_controller => {
                peers::fetch(&self.context, &row, digest).await?;
                self.context.artifacts.reader(digest).await
            }
            found => found,
        };
        let reader = reader.map_err(artifact_error)?;
        // Only known ones: a download must not wait for an examination.
        let facts = judge::known(&self.context, &row.sha256).await?;
        let (sender, receiver) = mpsc::channel(DOWNLOAD_QUEUE);
        let node = caller.node.map(|node| (node, row.sha256.clone()));
        let header = v1::DownloadHeader {
            size_bytes: row.size,
            sha256: row.sha256,
            chunk_size: if row.chunk_size == 0 { CHUNK_SIZE } else { row.chunk_size },
            chunk_sha256: row.chunk_sha256.into(),
            facts: facts.map(convert::facts),
            compression: row.compression,
        };
        let first = v1::DownloadArtifactResponse { part: Some(v1::download_artifact_response::Part::Header(header)) };
        // The channel is new and empty, so this cannot fail.
        let _ = sender.try_send(Ok(first));
        let context = self.context.clone();
        let sending = Sending { context, reader, node, answers: sender, underway };
        self.context.tasks.spawn(send_blob(sending, request.offset));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
