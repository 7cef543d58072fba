//! HTTP/2 frame by frame over real TLS, because libraries refuse to send what an attacker sends.

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

/// Types of frames (RFC 9113, section 6).
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

/// The flag that ends a list of headers.
pub const END_HEADERS: u8 = 4;
/// The flag that ends a stream.
pub const END_STREAM: u8 = 1;

/// A frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut bytes = length.get(1..).unwrap_or_default().to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The headers of a gRPC call, in HPACK without compression: POST, http, the path and the content type.
pub fn call(path: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86, 0x04, u8::try_from(path.len()).unwrap_or_default()];
    block.extend(path.as_bytes());
    block.extend([0x0f, 0x10, 16]);
    block.extend(b"application/grpc");
    block
}

/// A header field of one's own, in HPACK without compression.
pub fn field(name: &str, value: &str) -> Vec<u8> {
    let mut block = vec![0];
    for text in [name, value] {
        number(&mut block, text.len());
        block.extend(text.as_bytes());
    }
    block
}

/// HPACK's numbers (RFC 7541, section 5.1) with a prefix of 7 bits.
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

/// A TLS connection with these credentials, on which this protocol is spoken.
///
/// # Errors
/// The listener refuses it, or is not there.
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
    config.alpn_protocols = vec![protocol.to_vec()];
    let tcp = TcpStream::connect(address).await?;
    let name = ServerName::try_from(CONTROLLER_TLS_NAME)?;
    Ok(TlsConnector::from(Arc::new(config)).connect(name, tcp).await?)
}

/// A connection with its preface and settings sent.
#[derive(Debug)]
pub struct Raw {
    stream: TlsStream<TcpStream>,
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// After how long.
    pub after: Duration,
    /// The error code of the peer's GOAWAY; none: it just closed.
    pub goaway: Option<u32>,
    /// How many streams it had reset.
    pub resets: usize,
}

impl Raw {
    /// Connects with these credentials.
    pub async fn connect(address: SocketAddr, who: &Credentials) -> Result<Self> {
        let mut stream = tls(address, who, b"h2").await?;
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        stream.write_all(&frame(kind::SETTINGS, 0, 0, &[])).await?;
        Ok(Self { stream })
    }

    /// Opens so many calls whose messages never come, and answers the codes with which they were reset within `limit`, and
    /// how long the connection lived if it ended by then.
    ///
    /// # Errors
    /// The frames could not be sent.
    pub async fn open_calls(mut self, path: &str, calls: u32, limit: Duration) -> Result<(Vec<u32>, Option<Duration>)> {
        let begun = Instant::now();
        let opened: Vec<u8> =
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
        let ended = tokio::time::timeout(limit, reading).await.is_ok();
        Ok((resets, ended.then(|| begun.elapsed())))
    }

    /// Sends the blocks that `next` makes until the peer ends the connection, and reads what it answers.
    ///
    /// # Errors
    /// It has not ended after `limit`.
    pub async fn flood(self, limit: Duration, mut next: impl FnMut() -> Vec<u8>) -> Result<Ended> {
        let begun = Instant::now();
        let (mut reader, mut writer) = tokio::io::split(self.stream);
        let mut ended = Ended { after: Duration::ZERO, goaway: None, resets: 0 };
        let reading = async {
            let mut head = [0; 9];
            // What is read after a reset of the connection is an error; either is its end.
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
                    // The end is what the reader sees.
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
