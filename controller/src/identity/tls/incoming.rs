//! Accepts connections from a listening socket, and identifies their peers by a TLS handshake.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::Stream;
use rustls::ServerConfig;
use rustls::server::Acceptor as Hello;
use std::net::SocketAddr;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout_at};
use tokio_rustls::LazyConfigAcceptor;

use super::connection::TlsConn;
use super::guard::Guard;
use super::places::Limits;
use super::{Acceptor, Connection, PeerCertificate, PeerInfo};

/// Time limit of a handshake: a Pi 1 on a bad radio link needs seconds.
pub(crate) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit of concurrent handshakes, 12 KiB each. Further connections wait in the kernel's queue.
pub(crate) const MAX_HANDSHAKES: usize = 1024;
/// More concurrent handshakes than this are a crowd, until none of them is left. Either a fleet comes back at once, or
/// a client opens connections and sends nothing. Timeouts are shorter in a crowd.
pub(super) const CROWD: usize = 128;
/// Time limit for the ClientHello in a crowd. It costs the client no arithmetic.
const HELLO_IN_A_CROWD: Duration = Duration::from_millis(1500);
/// Time limit of a handshake in a crowd. A fleet that comes back at once waits for this machine's arithmetic.
const HANDSHAKE_IN_A_CROWD: Duration = Duration::from_secs(5);
/// Pause after the system had no room for another connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections and performs many handshakes at a time, for `serve_with_incoming_shutdown`. Dropping the stream
/// stops accepting, and drops unfinished handshakes.
pub fn incoming(listener: TcpListener, acceptor: Acceptor) -> impl Stream<Item = io::Result<TlsConn>> + Send + Unpin {
    let (crowd, _) = watch::channel(false);
    let limits = acceptor.guard.places.limits();
    Incoming {
        listener,
        tls: acceptor.tls,
        guard: acceptor.guard,
        limits,
        handshakes: JoinSet::new(),
        crowd,
        pause: None,
        short: false,
    }
}

struct Incoming {
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    guard: Guard,
    limits: Limits,
    /// Tasks of their own, so that public-key arithmetic runs on all cores and never holds up the accept loop.
    handshakes: JoinSet<io::Result<TlsConn>>,
    /// True while there is a crowd.
    crowd: watch::Sender<bool>,
    pause: Option<Pin<Box<Sleep>>>,
    /// True if the system had no room at the last try, so that this is logged once.
    short: bool,
}

impl Stream for Incoming {
    type Item = io::Result<TlsConn>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            let ended = this.handshakes.poll_join_next(cx);
            this.crowd.send_if_modified(|crowd| {
                let now = this.handshakes.len() > CROWD.min(this.limits.handshakes / 4)
                    || (*crowd && !this.handshakes.is_empty());
                std::mem::replace(crowd, now) != now
            });
            match ended {
                Poll::Ready(Some(Ok(Ok(conn)))) => return Poll::Ready(Some(Ok(conn))),
                Poll::Ready(Some(Ok(Err(error)))) => {
                    // Port scanners do this all day.
                    tracing::debug!(%error, "handshake failed");
                    continue;
                }
                Poll::Ready(Some(Err(error))) => {
                    tracing::error!(%error, "handshake panicked");
                    continue;
                }
                // `None`: no handshake is under way. Otherwise the end of one wakes this task.
                Poll::Ready(None) | Poll::Pending => {}
            }
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
            if this.handshakes.len() >= this.limits.handshakes {
                // The end of a handshake wakes this task. Meanwhile connections wait in the kernel's queue.
                return Poll::Pending;
            }
            match ready!(this.listener.poll_accept(cx)) {
                Ok((stream, addr)) => {
                    this.short = false;
                    let crowd = this.crowd.subscribe();
                    this.handshakes.spawn(shake_hands(Arc::clone(&this.tls), this.guard.clone(), stream, addr, crowd));
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    if !std::mem::replace(&mut this.short, true) {
                        tracing::warn!(%error, "cannot accept connections");
                    }
                    this.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

async fn shake_hands(
    tls: Arc<ServerConfig>,
    guard: Guard,
    stream: TcpStream,
    addr: SocketAddr,
    mut crowd: watch::Receiver<bool>,
) -> io::Result<TlsConn> {
    let begun = Instant::now();
    // Commands are small, and must not wait for more bytes (Nagle's algorithm).
    stream.set_nodelay(true)?;
    let hello = LazyConfigAcceptor::new(Hello::default(), stream);
    let hello = patiently(begun, HELLO_IN_A_CROWD, &mut crowd, hello).await?;
    let only_http2 = !tls.alpn_protocols.iter().any(|protocol| protocol == b"http/1.1");
    let stream = patiently(begun, HANDSHAKE_IN_A_CROWD, &mut crowd, hello.into_stream(tls)).await?;
    let (_, session) = stream.get_ref();
    let certificate = session.peer_certificates().and_then(|chain| chain.first()).and_then(PeerCertificate::read);
    // A client without ALPN is served as HTTP/2 on a listener that has nothing else, so its frames are counted too.
    let http2 = only_http2 || session.alpn_protocol() == Some(b"h2");
    // `begun` is the time of the accept: a slow handshake does not make a peer look younger.
    let connection = Arc::new(Connection::new(begun, guard.places.arrive(addr.ip())));
    let peer = PeerInfo { addr, certificate: certificate.map(Arc::new), connection };
    guard.look_at(&peer).await;
    // After the look-up: an accepted certificate never counts among the strangers.
    peer.connection.place.enter();
    Ok(TlsConn::new(stream, peer, http2))
}

/// Waits for a part of a handshake, with a shorter timeout in a crowd.
async fn patiently<T>(
    begun: Instant,
    in_a_crowd: Duration,
    crowd: &mut watch::Receiver<bool>,
    part: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    // The timeout is shorter only while there is a crowd: one that comes late shortens it too, one that is gone does
    // not.
    let impatience = async {
        sleep_until(begun + in_a_crowd).await;
        if crowd.wait_for(|crowd| *crowd).await.is_err() {
            // The listener is gone, and this task is about to be dropped.
            std::future::pending::<()>().await;
        }
    };
    let part = timeout_at(begun + HANDSHAKE_TIMEOUT, part);
    // Both ways, dropping the unfinished part drops the connection.
    tokio::select! {
        biased;
        done = part => done?,
        () = impatience => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// True if accepting failed because that connection is gone already, not for lack of resources.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}
