//! Encoding and decoding of messages: by prost, with a status that blames the sender.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{self, BufferSettings, DecodeBuf};
use tonic::{Code, Status};
use tonic_prost::{ProstDecoder, ProstEncoder};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::names::ERROR_DOMAIN;

/// `ErrorInfo.reason` for bytes that are no message of the method's type.
pub const UNDECODABLE: &str = "UNDECODABLE";

/// prost's codec, except that undecodable bytes are INVALID_ARGUMENT. tonic answers INTERNAL, which tells the caller
/// that the controller is broken, and load balancers and retry policies believe it.
#[derive(Debug, Clone)]
pub struct Codec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Codec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> codec::Codec for Codec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = Decoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::default()
    }

    fn decoder(&mut self) -> Self::Decoder {
        Decoder(ProstDecoder::default())
    }
}

/// Decodes messages of one type.
#[derive(Debug, Clone, Default)]
pub struct Decoder<U>(ProstDecoder<U>);

impl<U: Message + Default> codec::Decoder for Decoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        self.0.decode(buffer).map_err(|status| undecodable(status.message()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        codec::Decoder::buffer_settings(&self.0)
    }
}

/// The status for bytes that are no message of the method's type; `why` is the decoder's sentence.
pub fn undecodable(why: &str) -> Status {
    let details = ErrorDetails::with_error_info(UNDECODABLE, ERROR_DOMAIN, []);
    Status::with_error_details(Code::InvalidArgument, format!("the request cannot be decoded: {why}"), details)
}
