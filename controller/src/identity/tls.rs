//! TLS of the listeners: our own acceptor, because tonic's offers neither reload nor a clock, and the HTTP/2 limits.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::Stream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::ca::Pki;
use crate::clock::Clock;

/// A client certificate that the CA issued, verified in the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// Common name of the subject.
    pub common_name: String,
    /// Organizational unit of the subject: the role's word.
    pub role: String,
    /// Serial number, lower-case hexadecimal without leading zeros beyond 32 digits.
    pub serial: String,
    /// SHA-256 of the SubjectPublicKeyInfo, lower-case hexadecimal.
    pub key_sha256: String,
}

/// Who is at the other end of a connection: the extension that tonic's requests carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerInfo {
    /// Its address.
    pub addr: SocketAddr,
    /// Its certificate, if it showed one.
    pub certificate: Option<Arc<PeerCertificate>>,
}

/// The TLS of one kind of listener. Cheap to clone; [`Acceptor::reload`] changes all clones.
#[derive(Clone)]
pub struct Acceptor {
    _todo: (),
}

/// The certificate cannot be used for TLS.
#[derive(Debug, thiserror::Error)]
#[error("the controller's certificate cannot be used for TLS")]
pub struct TlsError(#[from] rustls::Error);

impl Acceptor {
    /// For the API: a client certificate is optional, and verified when shown.
    ///
    /// # Errors
    /// When the certificate and its key do not fit.
    pub fn api(pki: &Pki, clock: Arc<dyn Clock>) -> Result<Self, TlsError> {
        let _ = (pki, clock);
        todo!()
    }

    /// For enrolment: no client certificate; the chain carries the CA, so that a node can compare it with its pin.
    ///
    /// # Errors
    /// When the certificate and its key do not fit.
    pub fn enrolment(pki: &Pki, clock: Arc<dyn Clock>) -> Result<Self, TlsError> {
        let _ = (pki, clock);
        todo!()
    }

    /// Presents the controller's present certificate from now on.
    ///
    /// # Errors
    /// When the certificate and its key do not fit; the old one stays.
    pub fn reload(&self, pki: &Pki) -> Result<(), TlsError> {
        let _ = pki;
        todo!()
    }
}

/// An open connection.
pub struct TlsConn {
    stream: TlsStream<TcpStream>,
    info: PeerInfo,
}

impl Connected for TlsConn {
    type ConnectInfo = PeerInfo;
    fn connect_info(&self) -> PeerInfo {
        self.info.clone()
    }
}

impl AsyncRead for TlsConn {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsConn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Accepts connections and shakes hands, many at a time: what `serve_with_incoming_shutdown` wants. Dropping the stream
/// stops accepting.
pub fn incoming(listener: TcpListener, acceptor: Acceptor) -> impl Stream<Item = io::Result<TlsConn>> + Send + Unpin {
    let _ = (listener, acceptor);
    tokio_stream::empty()
}

/// tonic's server with every HTTP/2 limit set.
pub fn server_builder() -> tonic::transport::Server {
    todo!()
}
