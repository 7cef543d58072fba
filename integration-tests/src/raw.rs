//! Calls of any method by its path, with arbitrary bytes and credentials: what a foreign client could send.

use std::time::Duration;

use bytes::{Buf as _, BufMut as _, Bytes};
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

/// Deadline for the first answer of a call.
const PATIENCE: Duration = Duration::from_secs(20);

/// A codec that passes bytes through.
#[derive(Debug, Clone, Copy, Default)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        *self
    }
    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, message: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(message);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// Calls a method (`/package.Service/Method`) of any kind with one message, and returns its first answer; empty if it
/// ended without one.
///
/// # Errors
/// The status with which the call was refused; `DEADLINE_EXCEEDED` if no answer came.
pub async fn call(channel: &Channel, path: &str, message: Vec<u8>, bearer: Option<&str>) -> Result<Bytes, Status> {
    let mut request = Request::new(tokio_stream::once(Bytes::from(message)));
    if let Some(token) = bearer {
        let shown = format!("Bearer {token}").parse().map_err(|_| Status::internal("no metadata"))?;
        request.metadata_mut().insert("authorization", shown);
    }
    let path = path.parse().map_err(|_| Status::internal("no path"))?;
    let first = async {
        let mut grpc = Grpc::new(channel.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        // A bidirectional call fits each kind of method: on the wire a unary call is a stream of one message.
        let mut answers = grpc.streaming(request, path, RawCodec).await?.into_inner();
        Ok(answers.message().await?.unwrap_or_default())
    };
    tokio::time::timeout(PATIENCE, first).await.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")))
}

/// Opens a bidirectional stream (`/package.Service/Method`) of raw messages.
///
/// # Errors
/// The status with which the call was refused.
pub async fn open(
    channel: &Channel,
    path: &str,
    messages: impl tokio_stream::Stream<Item = Bytes> + Send + 'static,
) -> Result<Streaming<Bytes>, Status> {
    let path = path.parse().map_err(|_| Status::internal("no path"))?;
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    Ok(grpc.streaming(Request::new(messages), path, RawCodec).await?.into_inner())
}
