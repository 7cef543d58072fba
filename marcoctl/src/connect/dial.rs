//! Dials the controller: TCP, then mutual TLS 1.3 under the controller's own name.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::Uri;
use hyper_util::rt::TokioIo;
use marco_proto::names::CONTROLLER_TLS_NAME;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower::util::BoxCloneSyncService;

use super::CONNECT_TIMEOUT;
use crate::args::Global;
use crate::failure::Failure;

/// First data or error received from the controller. `None`: nothing yet.
pub(super) type Heard = Option<Result<(), String>>;

/// Reads the CA, and our certificate and key, from the certificates' folder. With `certificate` false, neither
/// certificate nor key is read, and none is sent.
///
/// # Errors
/// Names the file that is missing or unusable.
pub(super) fn config(global: &Global, certificate: bool) -> Result<ClientConfig, Failure> {
    let unusable = |what: String, error: &dyn std::fmt::Display| Failure::Usage {
        message: format!("cannot use {what}: {error}"),
        hint: "name the folder that the controller wrote its certificates to with --certs DIR or MARCO_CERTS, and \
               another certificate in it with --identity NAME"
            .to_owned(),
    };
    let shown = |path: &Path| path.display().to_string();
    let certificates = |path: &Path| -> Result<Vec<CertificateDer<'static>>, Failure> {
        let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        match read {
            Ok(found) if found.is_empty() => Err(unusable(shown(path), &"there is no certificate in it")),
            Ok(found) => Ok(found),
            Err(error) => Err(unusable(shown(path), &error)),
        }
    };
    let certs = &global.certs;
    let mut roots = RootCertStore::empty();
    let ca = certs.join("ca.crt");
    for certificate in certificates(&ca)? {
        roots.add(certificate).map_err(|error| unusable(shown(&ca), &error))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    // Only 1.3: the controller offers no older version.
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| Failure::Local(error.into()))?
        .with_root_certificates(roots);
    if !certificate {
        let mut config = builder.with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        // The controller prefers an API token to a certificate, and a wrong token does not fall back to it.
        return Ok(config);
    }
    let leaf_path = certs.join(format!("{}.crt", global.identity));
    let leaf = certificates(&leaf_path)?;
    let key_path = certs.join(format!("{}.key", global.identity));
    let key = PrivateKeyDer::from_pem_file(&key_path).map_err(|error| unusable(shown(&key_path), &error))?;

    let mut config = builder
        .with_client_auth_cert(leaf, key)
        .map_err(|error| unusable(format!("{} with {}", leaf_path.display(), key_path.display()), &error))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Returns a connector for repeated connections to one address, and a channel with the outcome of the first read.
pub(super) fn dialer(
    address: String,
    config: ClientConfig,
) -> (BoxCloneSyncService<Uri, TokioIo<Listening>, io::Error>, watch::Receiver<Heard>) {
    let connector = TlsConnector::from(Arc::new(config));
    let (heard, receiver) = watch::channel(None);
    let dial = tower::service_fn(move |_: Uri| {
        let (address, connector, heard) = (address.clone(), connector.clone(), heard.clone());
        async move {
            let open = async {
                // The certificate names the controller's role, not its host: a controller may be reached at any
                // address.
                let name = ServerName::try_from(CONTROLLER_TLS_NAME).map_err(io::Error::other)?;
                let tcp = TcpStream::connect(&address).await?;
                // Small HTTP/2 frames must not wait for an acknowledgement (Nagle's algorithm).
                tcp.set_nodelay(true)?;
                connector.connect(name, tcp).await
            };
            match tokio::time::timeout(CONNECT_TIMEOUT, open).await {
                Ok(opened) => opened.map(|stream| TokioIo::new(Listening { stream, heard })),
                Err(_) => Err(io::ErrorKind::TimedOut.into()),
            }
        }
    });
    (BoxCloneSyncService::new(dial), receiver)
}

/// A TLS connection that records the outcome of its first read.
#[derive(Debug)]
pub(super) struct Listening {
    stream: TlsStream<TcpStream>,
    heard: watch::Sender<Heard>,
}

impl AsyncRead for Listening {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer));
        self.heard.send_if_modified(|heard| {
            // Later reads are the connection's own business. Only the first one tells about the certificate.
            let is_first = heard.is_none();
            if is_first {
                *heard = Some(match &read {
                    Ok(()) if buffer.filled().len() > before => Ok(()),
                    // A read without bytes is the end of the stream.
                    Ok(()) => Err("the connection was closed at once".to_owned()),
                    Err(error) => Err(error.to_string()),
                });
            }
            is_first
        });
        Poll::Ready(read)
    }
}

impl AsyncWrite for Listening {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
