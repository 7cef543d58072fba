//! Connections that never become a request: real handshakes, with short timeouts.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use super::{Mirror, Patience};
use crate::artifacts::Artifacts;
use crate::clock::{Clock, SystemClock};
use crate::identity::access::Access;
use crate::identity::ca::Pki;
use crate::identity::roles::Role;
use crate::identity::tls::Acceptor;
use crate::identity::tls::places::Limits;
use crate::store::Store;

/// Time limit of every wait; reached only by a failure.
const DEADLINE: Duration = Duration::from_secs(20);

struct House {
    dir: tempfile::TempDir,
    tls: TlsConnector,
    address: std::net::SocketAddr,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

async fn house(head: Duration) -> House {
    house_with(Patience { head, ..Patience::default() }).await
}

async fn house_with(patience: Patience) -> House {
    let dir = tempfile::tempdir().unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let pki = Pki::open(dir.path(), &dir.path().join("certs"), &[], clock.now(), chrono::DateTime::UNIX_EPOCH).unwrap();
    let (issued, key) = pki.ca.issue_user("reader", Role::Publisher, clock.now()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(pki.ca.certificate_der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certificate = CertificateDer::from_pem_slice(issued.pem.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)
        .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let store = Store::open(&format!("sqlite://{}", dir.path().join("marco.db").display())).await.unwrap();
    let access = Access::new(store.clone(), Arc::clone(&clock));
    let mirror = Mirror {
        store,
        access: Arc::clone(&access),
        artifacts: Arc::new(Artifacts::open(dir.path()).unwrap()),
        fetch: Arc::new(|_, _| Box::pin(async { Err("there is no other controller".to_owned()) })),
        patience,
    };
    let stop = CancellationToken::new();
    let acceptor = Acceptor::mirror(&pki, clock).unwrap().guarded(Limits::of_files(1024), Some(access.look()));
    let serving = tokio::spawn(mirror.serve(listener, acceptor, stop.clone()));
    House { dir, tls: TlsConnector::from(Arc::new(config)), address, stop, serving }
}

impl House {
    async fn connect(&self) -> TlsStream<TcpStream> {
        let tcp = TcpStream::connect(self.address).await.unwrap();
        self.tls.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap()
    }

    async fn ends(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.serving).await.unwrap().unwrap();
        self.dir.close().unwrap();
    }
}

/// The bytes that arrive until the other side closes.
async fn rest(stream: &mut TlsStream<TcpStream>) -> String {
    let mut bytes = Vec::new();
    // A connection that is cut says nothing more either.
    let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut bytes)).await.unwrap();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn a_connection_that_sends_no_whole_request_is_closed() {
    let house = house(Duration::from_millis(300)).await;
    let mut silent = house.connect().await;
    assert_eq!(rest(&mut silent).await, "");
    let mut half = house.connect().await;
    half.write_all(b"GET /tar/os.tar.gz HTTP/1.1\r\nHost: a\r\n").await.unwrap();
    let answer = rest(&mut half).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 408"), "{answer}");
    // A connection that was kept open after an answer is treated the same.
    let mut idle = house.connect().await;
    idle.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    assert!(rest(&mut idle).await.starts_with("HTTP/1.1 404 Not Found\r\n"));
    house.ends().await;
}

#[tokio::test]
async fn a_request_that_is_too_large_is_refused() {
    let house = house(DEADLINE).await;
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(100));
    let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "a".repeat(400_000));
    let body = "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n".to_owned();
    for (request, status) in [(many, "431"), (long, "4"), (body, "413")] {
        let mut connection = house.connect().await;
        // It may be closed before everything is written.
        let _ = connection.write_all(request.as_bytes()).await;
        let mut head = [0; 12];
        let read = tokio::time::timeout(DEADLINE, connection.read(&mut head)).await.unwrap().unwrap_or(0);
        let head = String::from_utf8_lossy(head.get(..read).unwrap()).into_owned();
        assert!(head.is_empty() || head.starts_with(&format!("HTTP/1.1 {status}")), "{head}");
    }
    house.ends().await;
}

#[tokio::test]
async fn a_connection_too_many_waits_until_another_one_ends() {
    let house = house_with(Patience { crowd: 1, ..Patience::default() }).await;
    let mut first = house.connect().await;
    first.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut head = [0; 12];
    tokio::time::timeout(DEADLINE, first.read_exact(&mut head)).await.unwrap().unwrap();
    assert_eq!(&head, b"HTTP/1.1 404");
    // It may wait as early as in its handshake.
    let mut second = Box::pin(async {
        let mut second = house.connect().await;
        second.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
        rest(&mut second).await
    });
    let early = tokio::time::timeout(Duration::from_millis(300), &mut second).await;
    assert!(early.is_err(), "it was answered though the other one is open: {early:?}");
    drop(first);
    assert!((&mut second).await.starts_with("HTTP/1.1 404"));
    drop(second);
    house.ends().await;
}
