//! Uploads of artifacts, correct and faulty.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use marco_proto::names::MESSAGE_SIZE;
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::artifact_service_client::ArtifactServiceClient;
use marco_proto::v1::{
    Artifact, Chunk, UploadArtifactRequest, UploadArtifactResponse, UploadHeader, upload_artifact_request,
    upload_artifact_response,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::image::sha256;

/// A client of the artifact service.
pub type Artifacts = ArtifactServiceClient<Channel>;

/// The upload header that matches these bytes.
pub fn header(name: &str, kind: Kind, purpose: Purpose, bytes: &[u8]) -> UploadHeader {
    UploadHeader {
        name: name.to_owned(),
        kind: kind.into(),
        purpose: purpose.into(),
        size_bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        sha256: sha256(bytes),
    }
}

/// An upload after the controller's answer to its header.
#[derive(Debug)]
pub struct Upload {
    requests: mpsc::Sender<UploadArtifactRequest>,
    responses: Streaming<UploadArtifactResponse>,
    /// Offset from which the controller wants the bytes.
    pub offset: u64,
}

impl Upload {
    /// Sends the header and waits for the controller's offset.
    pub async fn begin(client: &mut Artifacts, header: UploadHeader) -> Result<Self, Status> {
        // Bounded, so that `send` feels the controller's flow control.
        let (requests, receiver) = mpsc::channel(4);
        let first = UploadArtifactRequest { part: Some(upload_artifact_request::Part::Header(header)) };
        requests.send(first).await.map_err(|_| Status::internal("the test's own channel is closed"))?;
        let mut responses = client.upload_artifact(ReceiverStream::new(receiver)).await?.into_inner();
        match responses.message().await?.and_then(|response| response.part) {
            Some(upload_artifact_response::Part::Offset(offset)) => Ok(Self { requests, responses, offset }),
            other => Err(Status::internal(format!("the first answer was not an offset but {other:?}"))),
        }
    }

    /// Sends one chunk; false if the controller has ended the call.
    pub async fn send(&self, offset: u64, data: Bytes) -> bool {
        let chunk = upload_artifact_request::Part::Chunk(Chunk { offset, data });
        self.requests.send(UploadArtifactRequest { part: Some(chunk) }).await.is_ok()
    }

    /// Ends the upload and waits for the controller's result.
    pub async fn finish(mut self) -> Result<Artifact, Status> {
        drop(self.requests);
        while let Some(response) = self.responses.message().await? {
            if let Some(upload_artifact_response::Part::Artifact(artifact)) = response.part {
                return Ok(artifact);
            }
        }
        Err(Status::internal("the answers ended without an artifact"))
    }
}

/// Uploads `bytes` under `header`; the two need not match.
pub async fn upload(client: &mut Artifacts, header: UploadHeader, bytes: &[u8]) -> Result<Artifact, Status> {
    let upload = Upload::begin(client, header).await?;
    let begin = usize::try_from(upload.offset).unwrap_or(usize::MAX).min(bytes.len());
    let mut offset = upload.offset;
    for piece in bytes.get(begin..).unwrap_or_default().chunks(MESSAGE_SIZE) {
        // The controller refused the upload early. `finish` returns its status.
        if !upload.send(offset, Bytes::copy_from_slice(piece)).await {
            break;
        }
        offset += u64::try_from(piece.len()).unwrap_or(u64::MAX);
    }
    upload.finish().await
}

/// Uploads a file under a name, and checks the digest that the controller stored.
pub async fn push(client: &mut Artifacts, name: &str, kind: Kind, purpose: Purpose, file: &Path) -> Result<Artifact> {
    let bytes = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let artifact = upload(client, header(name, kind, purpose, &bytes), &bytes).await?;
    if artifact.sha256 != sha256(&bytes) {
        bail!("{name} was stored under another digest: {artifact:?}");
    }
    Ok(artifact)
}
