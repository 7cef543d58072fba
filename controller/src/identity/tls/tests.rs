//! The listeners from outside: a real server behind the acceptor and the gate, and real handshakes.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::StreamExt as _;
use marco_proto::names::{CONTROLLER_TLS_NAME, NodeId};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;
use tower::{Service as _, ServiceExt as _};

mod limits;

use super::incoming::{CROWD, MAX_HANDSHAKES};
use super::streams::StreamsLayer;
use super::{Acceptor, PeerInfo, incoming, server_builder};
use crate::clock::{Clock, ManualClock};
use crate::identity::access::Access;
use crate::identity::ca::Pki;
use crate::identity::gate::GateLayer;
use crate::identity::roles::Role;
use crate::store::Store;

/// Time limit of every wait; reached only by a failure.
const DEADLINE: Duration = Duration::from_secs(20);

struct House {
    _dir: TempDir,
    pki: Pki,
    clock: Arc<ManualClock>,
}

fn house() -> House {
    let start: DateTime<Utc> = "2026-05-01T12:00:00Z".parse().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let pki = Pki::open(&dir.path().join("data"), &dir.path().join("certs"), &[], start, DateTime::UNIX_EPOCH).unwrap();
    House { _dir: dir, pki, clock: Arc::new(ManualClock::new(start)) }
}

impl House {
    fn client(&self, identity: Option<(String, String)>) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.pki.ca.certificate_der().clone()).unwrap();
        // The server's clock is what is tested: the client's stands at the same time.
        let builder = ClientConfig::builder_with_details(
            Arc::new(default_provider()),
            Arc::new(super::TlsTime(self.clock.clone())),
        );
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots);
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => builder
                .with_client_auth_cert(
                    vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                    PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
                )
                .unwrap(),
        };
        config.alpn_protocols = vec![b"h2".to_vec()];
        Arc::new(config)
    }

    fn user(&self, role: Role) -> Option<(String, String)> {
        let (issued, key) = self.pki.ca.issue_user("somebody", role, self.clock.now()).unwrap();
        Some((issued.pem, key))
    }

    fn api(&self) -> Acceptor {
        Acceptor::api(&self.pki, self.clock.clone()).unwrap()
    }
}

async fn listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    (listener, addr)
}

async fn connect(addr: SocketAddr, config: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(addr).await?;
    let name = ServerName::try_from(CONTROLLER_TLS_NAME).unwrap();
    TlsConnector::from(config).connect(name, tcp).await
}

/// One connection's peer, as the server saw it, and the server's certificates, as the client saw them.
async fn meet(
    addr: SocketAddr,
    connections: &mut (impl futures_util::Stream<Item = io::Result<super::TlsConn>> + Unpin),
    config: Arc<ClientConfig>,
) -> (PeerInfo, Vec<CertificateDer<'static>>) {
    let (client, server) =
        tokio::time::timeout(DEADLINE, async { tokio::join!(connect(addr, config), connections.next()) })
            .await
            .unwrap();
    let client = client.unwrap();
    let chain = client.get_ref().1.peer_certificates().unwrap_or_default();
    (server.unwrap().unwrap().peer().clone(), chain.iter().map(|der| der.clone().into_owned()).collect())
}

/// True if the server lets a client in. In TLS 1.3 a client learns only from the first answer that it was refused.
async fn is_refused(addr: SocketAddr, config: Arc<ClientConfig>) -> bool {
    tokio::time::timeout(DEADLINE, async {
        let Ok(mut stream) = connect(addr, config).await else { return true };
        let _ = stream.write_all(b"hello").await;
        stream.read(&mut [0; 16]).await.is_err()
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn a_certificate_is_optional_and_tells_who_calls() {
    let house = house();
    let (listener, addr) = listener().await;
    let mut connections = incoming(listener, house.api());
    let (peer, chain) = meet(addr, &mut connections, house.client(None)).await;
    assert_eq!((peer.certificate, chain.len()), (None, 1));
    let (peer, _) = meet(addr, &mut connections, house.client(house.user(Role::Operator))).await;
    let certificate = peer.certificate.unwrap();
    assert_eq!((certificate.common_name.as_str(), certificate.role.as_str()), ("somebody", "operator"));
}

#[tokio::test]
async fn a_strangers_or_expired_certificate_ends_the_handshake() {
    let (house, strangers) = (house(), house());
    let (listener, addr) = listener().await;
    let mut connections = incoming(listener, house.api());
    let server = tokio::spawn(async move { connections.next().await.is_some() });
    assert!(is_refused(addr, house.client(strangers.user(Role::Admin))).await);
    let mine = house.user(Role::Admin);
    house.clock.advance(TimeDelta::days(366));
    // The controller's own certificate has expired as well. The client's clock is behind, so that it does not mind.
    let behind = House {
        _dir: tempfile::tempdir().unwrap(),
        clock: Arc::new(ManualClock::new(house.clock.now() - TimeDelta::days(300))),
        pki: house.pki,
    };
    assert!(is_refused(addr, behind.client(mine)).await);
    assert!(!server.is_finished(), "no connection came through");
    let (fresh, key) = behind.pki.ca.issue_user("somebody", Role::Admin, house.clock.now()).unwrap();
    let client = connect(addr, behind.client(Some((fresh.pem, key)))).await;
    assert!(tokio::time::timeout(DEADLINE, server).await.unwrap().unwrap(), "a valid one does");
    drop(client);
}

#[tokio::test]
async fn a_reloaded_certificate_is_presented_at_once() {
    let mut house = house();
    let acceptor = house.api();
    let (listener, addr) = listener().await;
    let mut connections = incoming(listener, acceptor.clone());
    let (_, before) = meet(addr, &mut connections, house.client(None)).await;
    house.clock.advance(TimeDelta::days(340));
    assert!(house.pki.refresh(house.clock.now()).unwrap());
    acceptor.reload(&house.pki).unwrap();
    let (_, after) = meet(addr, &mut connections, house.client(None)).await;
    assert_ne!(before, after);
}

#[tokio::test]
async fn the_enrolment_listener_sends_the_ca_and_asks_for_nothing() {
    let house = house();
    let (listener, addr) = listener().await;
    let acceptor = Acceptor::enrolment(&house.pki, house.clock.clone()).unwrap();
    let mut connections = incoming(listener, acceptor);
    let (peer, chain) = meet(addr, &mut connections, house.client(house.user(Role::Admin))).await;
    assert_eq!(peer.certificate, None);
    assert_eq!(chain.get(1), Some(house.pki.ca.certificate_der()));
}

#[tokio::test]
async fn silent_connections_hold_up_nobody() {
    let house = house();
    let (listener, addr) = listener().await;
    let mut connections = incoming(listener, house.api());
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    let (peer, _) = meet(addr, &mut connections, house.client(None)).await;
    assert_eq!(peer.certificate, None);
}

/// Silent connections, and how long until each of them was closed.
async fn how_long_until_closed(addr: SocketAddr, count: usize) -> Vec<Duration> {
    let mut silent = Vec::new();
    for _ in 0..count {
        silent.push(TcpStream::connect(addr).await.unwrap());
    }
    let begun = std::time::Instant::now();
    let ends = silent.into_iter().map(|mut tcp| async move {
        assert_eq!(tcp.read(&mut [0; 1]).await.unwrap_or_default(), 0);
        begun.elapsed()
    });
    futures_util::future::join_all(ends).await
}

/// Ten seconds, on a machine that has much else to do.
const TEN_SECONDS: std::ops::Range<Duration> = Duration::from_millis(9_900)..Duration::from_secs(15);

#[tokio::test]
async fn a_handshake_that_does_not_end_is_cut_after_ten_seconds() {
    let house = house();
    let (listener, addr) = listener().await;
    let mut connections = incoming(listener, house.api());
    let server = tokio::spawn(async move { connections.next().await.is_some() });
    // Half a handshake: the ClientHello, and then nothing.
    let mut half = TcpStream::connect(addr).await.unwrap();
    half.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc").await.unwrap();
    for waited in how_long_until_closed(addr, 3).await {
        assert!(TEN_SECONDS.contains(&waited), "{waited:?}");
    }
    assert!(tokio::time::timeout(Duration::from_secs(2), half.read(&mut [0; 1])).await.is_ok());
    assert!(!server.is_finished());
}

#[tokio::test]
async fn a_crowd_that_says_nothing_is_sent_away_within_two_seconds() {
    let house = house();
    let (listener, addr) = listener().await;
    let mut connections = incoming(listener, house.api());
    let server = tokio::spawn(async move { connections.next().await.is_some() });
    let waits = how_long_until_closed(addr, CROWD + 50).await;
    assert!(waits.iter().all(|waited| *waited < Duration::from_secs(3)), "{:?}", waits.iter().max());
    assert!(!server.is_finished());
}

#[tokio::test]
async fn more_half_open_handshakes_than_there_may_be_delay_an_honest_one_by_seconds_at_most() {
    let house = house();
    let (listener, addr) = listener().await;
    let mut connections = incoming(listener, house.api());
    let mut silent = Vec::new();
    for _ in 0..MAX_HANDSHAKES + 100 {
        silent.push(TcpStream::connect(addr).await.unwrap());
        // Lets the server accept what has come so far, so that the kernel's queue never is the limit.
        assert!(futures_util::poll!(connections.next()).is_pending());
    }
    let begun = std::time::Instant::now();
    meet(addr, &mut connections, house.client(None)).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_connection_without_a_first_frame_ends_after_ten_seconds() {
    let house = house();
    let (addr, server) = served(&house).await;
    let mut stream = connect(addr, house.client(None)).await.unwrap();
    stream.write_all(&PREFACE[..24]).await.unwrap();
    let begun = std::time::Instant::now();
    let mut read = Vec::new();
    let _ = stream.read_to_end(&mut read).await;
    assert!(TEN_SECONDS.contains(&begun.elapsed()), "{:?}", begun.elapsed());
    server.abort();
}

/// A server with health behind the gate, as `serve` builds it.
async fn served(house: &House) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    served_by(house, server_builder()).await
}

async fn served_by(house: &House, server: tonic::transport::Server) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let (listener, addr) = listener().await;
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
    let url = format!("sqlite://{}", house._dir.path().join("gate.db").display());
    let access = Access::new(Store::open(&url).await.unwrap(), house.clock.clone());
    let router = { server }.layer(StreamsLayer).layer(GateLayer::new(access, TaskTracker::new())).add_service(health);
    let connections = incoming(listener, house.api());
    let task = tokio::spawn(async move { router.serve_with_incoming(connections).await.unwrap() });
    (addr, task)
}

async fn channel(addr: SocketAddr, config: Arc<ClientConfig>) -> Channel {
    let connector = tower::service_fn(move |_: http::Uri| {
        let config = Arc::clone(&config);
        async move { connect(addr, config).await.map(hyper_util::rt::TokioIo::new) }
    });
    Endpoint::from_static("http://controller").connect_with_connector(connector).await.unwrap()
}

async fn check(addr: SocketAddr, config: Arc<ClientConfig>) -> Result<(), Status> {
    let mut client = HealthClient::new(channel(addr, config).await);
    let call = client.check(HealthCheckRequest::default());
    tokio::time::timeout(DEADLINE, call).await.unwrap().map(|_| ())
}

fn reason(status: &Status) -> String {
    let info = status.get_error_details().error_info().cloned().unwrap();
    assert_eq!(info.domain, "marco.bootstrap");
    info.reason
}

#[tokio::test]
async fn without_credentials_not_even_health_answers() {
    let house = house();
    let (addr, server) = served(&house).await;
    let status = check(addr, house.client(None)).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unauthenticated, "NO_CREDENTIALS"));
    for role in [Role::Viewer, Role::Operator, Role::Publisher, Role::Admin] {
        check(addr, house.client(house.user(role))).await.unwrap();
    }
    // The CA signed it, and the store knows of no such node: it was deleted.
    let status = check(addr, house.client(house.user(Role::Node))).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unauthenticated, "CERTIFICATE_REVOKED"));
    server.abort();
}

#[tokio::test]
async fn a_role_that_may_not_call_is_told_which_may() {
    let house = house();
    let (addr, server) = served(&house).await;
    // Neither is the service there nor a message in the body: the gate answers first.
    let mut channel = channel(addr, house.client(house.user(Role::Viewer))).await;
    let request = http::Request::post("http://controller/marco.bootstrap.v1.NodeService/ApproveNode")
        .header("content-type", "application/grpc")
        .body(Body::empty())
        .unwrap();
    let response = tokio::time::timeout(DEADLINE, channel.ready().await.unwrap().call(request)).await.unwrap().unwrap();
    let status = Status::from_header_map(response.headers()).unwrap();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::PermissionDenied, "ROLE_NOT_ALLOWED"));
    assert!(status.message().contains("viewer") && status.message().contains("admin"), "{}", status.message());
    server.abort();
}

#[test]
fn a_node_is_who_its_certificate_says() {
    let peer = |name: &str, role: &str| PeerInfo {
        addr: "127.0.0.1:1".parse().unwrap(),
        certificate: Some(Arc::new(super::PeerCertificate {
            common_name: name.to_owned(),
            role: role.to_owned(),
            serial: "01".to_owned(),
            key_sha256: String::new(),
            not_before: DateTime::UNIX_EPOCH,
            not_after: DateTime::UNIX_EPOCH,
        })),
        connection: Arc::default(),
    };
    let caller = |name, role| crate::identity::Caller::from_peer(&peer(name, role));
    assert_eq!(caller("pi-01", "node").unwrap().node, Some(NodeId::parse("pi-01").unwrap()));
    assert_eq!(caller("admin", "admin").unwrap().node, None);
    assert!(caller("no node's id", "node").is_none() && caller("admin", "root").is_none());
}

/// A frame's type, and its payload.
async fn frame(stream: &mut TlsStream<TcpStream>) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]).try_into().unwrap()];
    stream.read_exact(&mut payload).await?;
    Ok((head[3], payload))
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";

#[tokio::test]
async fn every_limit_is_announced() {
    let house = house();
    let (addr, server) = served(&house).await;
    let mut stream = connect(addr, house.client(None)).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    let (kind, payload) = tokio::time::timeout(DEADLINE, frame(&mut stream)).await.unwrap().unwrap();
    assert_eq!(kind, 4, "the first frame has the settings");
    let settings: Vec<(u8, u32)> =
        payload.chunks(6).map(|setting| (setting[1], u32::from_be_bytes(setting[2..].try_into().unwrap()))).collect();
    // RFC 9113, section 6.5.2.
    for (id, value) in
        [(3, super::MAX_CONCURRENT_STREAMS), (4, super::WINDOW), (5, super::MAX_FRAME), (6, super::MAX_HEADER_LIST)]
    {
        assert!(settings.contains(&(id, value)), "setting {id} is not {value}: {settings:?}");
    }
    server.abort();
}

#[tokio::test]
async fn a_flood_of_malformed_requests_ends_the_connection() {
    let house = house();
    let (addr, server) = served(&house).await;
    let mut stream = connect(addr, house.client(None)).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    let flood = async {
        let mut headers = Vec::new();
        for id in (1_u32..400).step_by(2) {
            // HEADERS, complete: POST, http, `/`, and the field `connection: x`, which HTTP/2 forbids: the server has
            // to reset each stream.
            headers.extend(b"\x00\x00\x11\x01\x05");
            headers.extend(id.to_be_bytes());
            headers.extend(b"\x83\x86\x84\x00\x0aconnection\x01x");
        }
        stream.write_all(&headers).await.unwrap();
        let mut resets = 0;
        loop {
            match frame(&mut stream).await {
                // GOAWAY, with the error code behind the last stream's number.
                Ok((7, payload)) => return (resets, payload[7]),
                Ok((3, _)) => resets += 1,
                Ok(_) => {}
                Err(error) => panic!("no GOAWAY came: {error}"),
            }
        }
    };
    let (resets, code) = tokio::time::timeout(DEADLINE, flood).await.expect("the server says no GOAWAY");
    assert_eq!((resets <= super::MAX_LOCAL_RESETS, code), (true, 11), "{resets} resets; 11 is ENHANCE_YOUR_CALM");
    server.abort();
}
