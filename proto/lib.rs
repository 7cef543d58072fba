//! The gRPC API of Marco Bootstrap (`marco.bootstrap.v1`), as compiled from `proto/`, with the words and numbers that
//! both ends of a connection must share.

pub mod codec;
pub mod names;
pub mod reasons;
pub mod secrets;

/// Messages, clients and servers of package `marco.bootstrap.v1`. Their documentation is that of the `.proto` files.
#[allow(missing_docs, clippy::all, clippy::as_conversions, unused_qualifications, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("marco.bootstrap.v1");
}

/// The serialized `google.protobuf.FileDescriptorSet` of the API and what it imports: for reflection, and for the JSON
/// mapping of messages whose type is known only by name.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
