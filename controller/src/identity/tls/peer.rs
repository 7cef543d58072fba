//! Calls to another controller that shares the database and the CA.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use marco_proto::names::CONTROLLER_TLS_NAME;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use super::{TlsTime, WINDOW};
use crate::clock::Clock;
use crate::identity::ca::Ca;

/// Time limit of connecting. A controller that is alive but slow is asked again later.
const CONNECT: Duration = Duration::from_secs(3);
/// Interval of pings, so that both sides notice a peer that died on the way.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Another controller cannot be called.
#[derive(Debug, thiserror::Error)]
#[error("the controller at {address} cannot be called")]
pub struct PeerError {
    address: String,
    #[source]
    cause: Box<dyn std::error::Error + Send + Sync>,
}

/// Opens a connection to another controller, with a certificate that is issued for it.
///
/// # Errors
/// Returns an error if it cannot be opened.
pub async fn dial(ca: &Ca, clock: &Arc<dyn Clock>, address: &str) -> Result<Channel, PeerError> {
    let failed = |cause| PeerError { address: address.to_owned(), cause };
    let connector = TlsConnector::from(Arc::new(config(ca, clock).map_err(failed)?));
    let dialled = address.to_owned();
    let connect = tower::service_fn(move |_: http::Uri| {
        let (connector, address) = (connector.clone(), dialled.clone());
        async move {
            let open = async {
                let name = ServerName::try_from(CONTROLLER_TLS_NAME).map_err(io::Error::other)?;
                let tcp = TcpStream::connect(&address).await?;
                tcp.set_nodelay(true)?;
                connector.connect(name, tcp).await
            };
            match tokio::time::timeout(CONNECT, open).await {
                Ok(opened) => opened.map(TokioIo::new),
                Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
            }
        }
    });
    // The URI only names the host in the requests; the connector dials the address.
    let endpoint =
        Endpoint::from_shared(format!("http://{CONTROLLER_TLS_NAME}")).map_err(|error| failed(error.into()))?;
    endpoint
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .connect_with_connector(connect)
        .await
        .map_err(|error| failed(error.into()))
}

fn config(ca: &Ca, clock: &Arc<dyn Clock>) -> Result<ClientConfig, Box<dyn std::error::Error + Send + Sync>> {
    // A fresh one for each connection: it need not be stored, renewed or revoked.
    let (issued, key) = ca.issue_peer(clock.now())?;
    let certificate = CertificateDer::from_pem_slice(issued.pem.as_bytes())?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())?;
    let mut roots = RootCertStore::empty();
    roots.add(ca.certificate_der().clone())?;
    let mut config =
        ClientConfig::builder_with_details(Arc::new(default_provider()), Arc::new(TlsTime(Arc::clone(clock))))
            // The other side is a controller of ours.
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}
