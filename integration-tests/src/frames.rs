//! HTTP/2 frame by frame over real TLS, because libraries refuse to send an attacker's frames.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use marco_proto::names::CONTROLLER_TLS_NAME;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::client::Credentials;

/// Frame types (RFC 9113, section 6).
pub mod kind {
    #![allow(missing_docs, reason = "the names are the standard's")]
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const PRIORITY: u8 = 2;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const PING: u8 = 6;
    pub const GOAWAY: u8 = 7;
    pub const CONTINUATION: u8 = 9;
}

/// Flag END_HEADERS: the header block ends with this frame.
pub const END_HEADERS: u8 = 4;
/// Flag END_STREAM: the sender's half of the stream ends.
pub const END_STREAM: u8 = 1;

/// Encodes a frame (RFC 9113, section 4.1). `length` in the header counts the payload only.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut bytes = length.get(1..).unwrap_or_default().to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The header block of a gRPC call, in HPACK without compression: POST, http, the path and the content type.
pub fn call(path: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x04, u8::try_from(path.len()).unwrap_or_default()];
    block.extend(path.as_bytes());
    block.extend([0x0f, 0x10, 16]);
    block.extend(b"application/grpc");
    block
}

/// A header field with a literal name, in HPACK without compression.
pub fn field(name: &str, value: &str) -> Vec<u8> {
    let mut block = vec![0];
    for text in [name, value] {
        number(&mut block, text.len());
        block.extend(text.as_bytes());
    }
    block
}

/// Appends an HPACK integer (RFC 7541, section 5.1) with a prefix of 7 bits.
fn number(block: &mut Vec<u8>, value: usize) {
    let Some(mut rest) = value.checked_sub(127) else {
        block.push(u8::try_from(value).unwrap_or_default());
        return;
    };
    block.push(127);
    while rest >= 128 {
        block.push(u8::try_from(rest % 128).unwrap_or_default() | 128);
        rest /= 128;
    }
    block.push(u8::try_from(rest).unwrap_or_default());
}

/// Opens a TLS connection with these credentials. `protocol`: the only one offered by ALPN.
///
/// # Errors
/// Returns an error if the listener refuses the handshake or cannot be reached.
pub async fn tls(address: SocketAddr, who: &Credentials, protocol: &[u8]) -> Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(who.ca.as_bytes())?)?;
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut config = match &who.identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder.with_client_auth_cert(
            vec![CertificateDer::from_pem_slice(certificate.as_bytes())?],
            PrivateKeyDer::from_pem_slice(key.as_bytes())?,
        )?,
    };
    // The listeners refuse a client that offers no protocol they speak.
    config.alpn_protocols = vec![protocol.to_vec()];
    let tcp = TcpStream::connect(address).await?;
    let name = ServerName::try_from(CONTROLLER_TLS_NAME)?;
    Ok(TlsConnector::from(Arc::new(config)).connect(name, tcp).await?)
}

/// An HTTP/2 connection after preface and SETTINGS.
#[derive(Debug)]
pub struct Raw {
    stream: TlsStream<TcpStream>,
}

/// The end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Time from the start of the flood.
    pub after: Duration,
    /// Error code of the peer's GOAWAY; `None`: it closed without one.
    pub goaway: Option<u32>,
    /// Number of streams that the peer reset before.
    pub resets: usize,
}

impl Raw {
    /// Connects with these credentials, and sends preface and SETTINGS.
    pub async fn connect(address: SocketAddr, who: &Credentials) -> Result<Self> {
        let mut stream = tls(address, who, b"h2").await?;
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        stream.write_all(&frame(kind::SETTINGS, 0, 0, &[])).await?;
        Ok(Self { stream })
    }

    /// Opens `calls` calls whose messages never come. Returns the error codes of the resets within `limit`, and the
    /// connection's lifetime if it ended by then.
    ///
    /// # Errors
    /// Returns an error if the frames could not be sent.
    pub async fn open_calls(mut self, path: &str, calls: u32, limit: Duration) -> Result<(Vec<u32>, Option<Duration>)> {
        let begun = Instant::now();
        let opened: Vec<u8> =
            // Clients use odd stream ids (RFC 9113, section 5.1.1).
            (0..calls).flat_map(|number| frame(kind::HEADERS, END_HEADERS, 2 * number + 1, &call(path))).collect();
        self.stream.write_all(&opened).await?;
        let mut resets = Vec::new();
        let reading = async {
            let mut head = [0; 9];
            while self.stream.read_exact(&mut head).await.is_ok() {
                let [a, b, c, kind, ..] = head;
                let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or_default()];
                if self.stream.read_exact(&mut payload).await.is_err() {
                    break;
                }
                if kind == kind::RST_STREAM
                    && let Ok(code) = <[u8; 4]>::try_from(payload.as_slice())
                {
                    resets.push(u32::from_be_bytes(code));
                }
            }
        };
        // A connection that is still open at the limit is a result and no error: an admitted caller may keep it.
        let ended = tokio::time::timeout(limit, reading).await.is_ok();
        Ok((resets, ended.then(|| begun.elapsed())))
    }

    /// Sends the blocks that `next` makes until the peer ends the connection, and reads its answers. An empty block
    /// ends the sending.
    ///
    /// # Errors
    /// Returns an error if the connection is still open after `limit`.
    pub async fn flood(self, limit: Duration, mut next: impl FnMut() -> Vec<u8>) -> Result<Ended> {
        let begun = Instant::now();
        // Both at once: a peer whose answers are not read would stop reading the flood.
        let (mut reader, mut writer) = tokio::io::split(self.stream);
        let mut ended = Ended { after: Duration::ZERO, goaway: None, resets: 0 };
        let reading = async {
            let mut head = [0; 9];
            // A reset connection reads as an error, a closed one as an early end: either is its end.
            while reader.read_exact(&mut head).await.is_ok() {
                let [a, b, c, kind, ..] = head;
                let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or_default()];
                if reader.read_exact(&mut payload).await.is_err() {
                    break;
                }
                match kind {
                    kind::RST_STREAM => ended.resets += 1,
                    kind::GOAWAY => {
                        let code = payload.get(4..8).and_then(|code| <[u8; 4]>::try_from(code).ok());
                        ended.goaway = code.map(u32::from_be_bytes);
                    }
                    _ => {}
                }
            }
        };
        let writing = async {
            loop {
                let block = next();
                if block.is_empty() || writer.write_all(&block).await.is_err() || writer.flush().await.is_err() {
                    // The reader decides about the end: it may still have the peer's GOAWAY to read.
                    return std::future::pending::<()>().await;
                }
            }
        };
        let flooding = async {
            tokio::select! {
                () = reading => {}
                () = writing => {}
            }
        };
        tokio::time::timeout(limit, flooding).await.with_context(|| format!("still open after {limit:?}"))?;
        ended.after = begun.elapsed();
        Ok(ended)
    }
}
