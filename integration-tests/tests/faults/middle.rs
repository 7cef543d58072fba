//! A controller of another version, played between the agents and the real one: it leaves out fields that the version
//! before did not have, or adds fields and values that only the version after has.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use bytes::{Bytes, BytesMut};
use h2::{RecvStream, SendStream};
use http::{Request, Response};
use integration_tests::client::Credentials;
use integration_tests::frames;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::wire::{self, Side};
use crate::world::World;

pub(crate) use crate::wire::Version;

/// Bytes that a stream may carry before they are taken: more than any message here.
const WINDOW: u32 = 4 << 20;

/// The other version; it ends when dropped.
pub(crate) struct Middle {
    address: SocketAddr,
    target: Arc<Mutex<SocketAddr>>,
    _stop: DropGuard,
}

#[derive(Clone)]
struct Way {
    target: Arc<Mutex<SocketAddr>>,
    /// Folder of the node's identity, by which the real controller is spoken to.
    node: std::path::PathBuf,
    version: Version,
}

impl Middle {
    pub(crate) async fn start(world: &World, version: Version) -> Result<Self> {
        let read = |name: &str| std::fs::read(world.dir().join("certs").join(name)).context("the controller's files");
        let chain = CertificateDer::pem_slice_iter(&read("controller.crt")?).collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(&read("controller.key")?)?;
        let mut config =
            rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])?
                .with_no_client_auth()
                .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let target = Arc::new(Mutex::new(world.address()));
        let way = Way { target: Arc::clone(&target), node: world.pi_dir(), version };
        let stop = CancellationToken::new();
        let until = stop.clone();
        tokio::spawn(async move {
            while let Some(Ok((tcp, _))) = until.run_until_cancelled(listener.accept()).await {
                let (way, acceptor, until) = (way.clone(), acceptor.clone(), until.clone());
                // A connection that fails is the agent's to make again.
                tokio::spawn(async move { until.run_until_cancelled(connection(tcp, &acceptor, way)).await.map(drop) });
            }
        });
        Ok(Self { address, target, _stop: stop.drop_guard() })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn retarget(&self, target: SocketAddr) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }
}

async fn connection(tcp: TcpStream, acceptor: &TlsAcceptor, way: Way) -> Result<()> {
    let tls = acceptor.accept(tcp).await?;
    let target = *way.target.lock().unwrap_or_else(PoisonError::into_inner);
    let upstream = frames::tls(target, &identity(&way.node)?, b"h2").await?;
    let mut down: h2::server::Connection<_, Bytes> = h2::server::Builder::new()
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .handshake(tls)
        .await?;
    let (up, upstream) = h2::client::Builder::new()
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .handshake::<_, Bytes>(upstream)
        .await?;
    let mut calls = tokio::task::JoinSet::new();
    let mut upstream = std::pin::pin!(upstream);
    loop {
        tokio::select! {
            ended = &mut upstream => return Ok(ended?),
            accepted = down.accept() => {
                let Some(accepted) = accepted else { return Ok(()) };
                let (request, respond) = accepted?;
                calls.spawn(call(request, respond, up.clone(), way.version));
            }
        }
    }
}

/// The node's identity where it lies now: the installer's is a copy.
fn identity(pi: &std::path::Path) -> Result<Credentials> {
    let read = |name: &str| {
        let found = std::fs::read_to_string(pi.join("agent").join(name));
        found.with_context(|| format!("the node's {name}"))
    };
    Ok(Credentials { ca: read("ca.crt")?, identity: Some((read("node.crt")?, read("node.key")?)) })
}

async fn call(
    request: Request<RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    up: h2::client::SendRequest<Bytes>,
    version: Version,
) -> Result<()> {
    let (parts, body) = request.into_parts();
    let is_session = parts.uri.path().ends_with("AgentService/Connect");
    let mut up = up.ready().await?;
    let (response, sending) = up.send_request(Request::from_parts(parts, ()), false)?;
    let asking = tokio::spawn(pump(body, sending, is_session.then_some((version, Side::Node))));
    let (parts, body) = response.await?.into_parts();
    let ends = body.is_end_stream();
    let sending = respond.send_response(Response::from_parts(parts, ()), ends)?;
    let told = if ends { Ok(()) } else { pump(body, sending, is_session.then_some((version, Side::Controller))).await };
    asking.abort();
    told
}

/// Forwards messages, each changed if `change` says how.
async fn pump(mut from: RecvStream, mut to: SendStream<Bytes>, change: Option<(Version, Side)>) -> Result<()> {
    let mut buffer = BytesMut::new();
    while let Some(data) = from.data().await {
        let data = data?;
        drop(from.flow_control().release_capacity(data.len()));
        let Some((version, side)) = change else {
            to.send_data(data, false)?;
            continue;
        };
        buffer.extend_from_slice(&data);
        // A gRPC message: a flag, four bytes of length, and the bytes.
        while let Some(length) = buffer.get(1..5).and_then(|length| length.try_into().ok()).map(u32::from_be_bytes) {
            let length = usize::try_from(length)?;
            if buffer.len() < 5 + length {
                break;
            }
            let message = buffer.split_to(5 + length).freeze();
            let Some(changed) = wire::change(&message.slice(5..), version, side) else { continue };
            let mut framed = BytesMut::from(message.get(..1).unwrap_or_default());
            framed.extend_from_slice(&u32::try_from(changed.len())?.to_be_bytes());
            framed.extend_from_slice(&changed);
            to.send_data(framed.freeze(), false)?;
        }
    }
    match from.trailers().await? {
        Some(trailers) => to.send_trailers(trailers)?,
        None => to.send_data(Bytes::new(), true)?,
    }
    Ok(())
}
