//! A bad network: a TCP proxy that stalls, cuts, slows down and counts the traffic through it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Bytes of one read. Small, so that a cut falls at the byte that the test asked for.
const BLOCK: usize = 16 * 1024;

/// Direction of traffic through the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the client (agent) to the server (controller).
    Up,
    /// From the server (controller) to the client (agent).
    Down,
}

/// What happens at a marked request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Swallow {
    /// The request is lost with its connection.
    Request,
    /// Its answer is lost with the connection.
    Answer,
    /// It waits here, with all that clients send after it.
    Hold,
}

/// Faults and counters of one direction, for all connections.
#[derive(Debug)]
struct Lane {
    /// False: nothing is forwarded, and nothing is read.
    open: watch::Sender<bool>,
    bytes: AtomicU64,
    /// Bytes a second; 0: no limit.
    rate: AtomicU64,
    /// Latency in milliseconds.
    delay: AtomicU64,
    /// Byte counts: the first connection that has carried that many is cut, and the entry is used up.
    cuts: Mutex<VecDeque<u64>>,
    /// Byte strings that mark a request; see [`Proxy::swallow`], [`Proxy::swallow_answer_to`] and [`Proxy::hold_at`].
    swallows: Mutex<VecDeque<(Vec<u8>, Swallow)>>,
}

#[derive(Debug)]
struct State {
    target: Mutex<SocketAddr>,
    up: Lane,
    down: Lane,
    /// Cancels all present connections; replaced each time that happens.
    connections: Mutex<CancellationToken>,
}

/// A proxy on a free port; it ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    state: Arc<State>,
    _stop: DropGuard,
}

impl Lane {
    fn new() -> Self {
        Self {
            open: watch::Sender::new(true),
            bytes: AtomicU64::new(0),
            rate: AtomicU64::new(0),
            delay: AtomicU64::new(0),
            cuts: Mutex::default(),
            swallows: Mutex::default(),
        }
    }

    /// Bytes that a connection may still carry before the next cut; `None`: no cut is due.
    fn until_cut(&self, carried: u64) -> Option<u64> {
        let cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        cuts.front().map(|after| after.saturating_sub(carried))
    }

    /// Takes the first entry if `bytes` contain it: each entry is used once.
    fn swallows(&self, bytes: &[u8]) -> Option<Swallow> {
        let mut swallows = self.swallows.lock().unwrap_or_else(PoisonError::into_inner);
        swallows
            // Only the first entry, so that a test can order its faults.
            .pop_front_if(|(wanted, _)| bytes.windows(wanted.len()).any(|window| window == wanted))
            .map(|(_, what)| what)
    }

    fn take_cut(&self) {
        self.cuts.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    }
}

impl Proxy {
    /// Listens on a free port of the loopback interface and forwards to `target`.
    pub async fn start(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("a port for the proxy")?;
        let address = listener.local_addr()?;
        let stop = CancellationToken::new();
        let state = Arc::new(State {
            target: Mutex::new(target),
            up: Lane::new(),
            down: Lane::new(),
            connections: Mutex::new(CancellationToken::new()),
        });
        tokio::spawn(accept(listener, Arc::clone(&state), stop.clone()));
        Ok(Self { address, state, _stop: stop.drop_guard() })
    }

    /// Listen address of the proxy.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn lane(&self, direction: Direction) -> &Lane {
        match direction {
            Direction::Up => &self.state.up,
            Direction::Down => &self.state.down,
        }
    }

    /// Stops forwarding in one direction. Bytes wait, and connections stay open.
    pub fn hold(&self, direction: Direction) {
        self.lane(direction).open.send_replace(false);
    }

    /// Forwards in this direction again.
    pub fn release(&self, direction: Direction) {
        self.lane(direction).open.send_replace(true);
    }

    /// Limits each connection to so many bytes a second; 0: no limit.
    pub fn throttle(&self, direction: Direction, bytes_per_second: u64) {
        self.lane(direction).rate.store(bytes_per_second, Ordering::Relaxed);
    }

    /// Sets the latency of one direction.
    pub fn delay(&self, direction: Direction, by: Duration) {
        let millis = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
        self.lane(direction).delay.store(millis, Ordering::Relaxed);
    }

    /// Sends new connections to another server; present ones stay.
    pub fn retarget(&self, target: SocketAddr) {
        *self.state.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
    }

    /// Loses the answer to the next request that contains these bytes. The request reaches the server, then the
    /// connection is dropped, so the client cannot know the outcome.
    pub fn swallow_answer_to(&self, bytes: &[u8]) {
        self.push_swallow(bytes, Swallow::Answer);
    }

    /// Loses the next request that contains these bytes: its connection is dropped before it reaches the server.
    pub fn swallow(&self, bytes: &[u8]) {
        self.push_swallow(bytes, Swallow::Request);
    }

    /// Holds the upward direction, as [`Proxy::hold`] does, when the next request that contains these bytes comes by, and
    /// before it is forwarded.
    pub fn hold_at(&self, bytes: &[u8]) {
        self.push_swallow(bytes, Swallow::Hold);
    }

    /// Waits until the upward direction is held.
    pub async fn held(&self) {
        // The sender lives as long as this proxy.
        let _ = self.state.up.open.subscribe().wait_for(|open| !*open).await;
    }

    fn push_swallow(&self, bytes: &[u8], what: Swallow) {
        self.state.up.swallows.lock().unwrap_or_else(PoisonError::into_inner).push_back((bytes.to_vec(), what));
    }

    /// Number of requested losses that have not happened yet.
    pub fn swallows_left(&self) -> usize {
        self.state.up.swallows.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Forgets the losses that have not happened yet.
    pub fn forget_swallows(&self) {
        self.state.up.swallows.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Cuts connections: the first that has carried `after[0]` bytes, then the first that has carried `after[1]`, and
    /// so on.
    pub fn cut_after(&self, direction: Direction, after: impl IntoIterator<Item = u64>) {
        self.lane(direction).cuts.lock().unwrap_or_else(PoisonError::into_inner).extend(after);
    }

    /// Number of requested cuts that have not happened yet.
    pub fn cuts_left(&self, direction: Direction) -> usize {
        self.lane(direction).cuts.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Bytes forwarded in this direction, over all connections.
    pub fn bytes(&self, direction: Direction) -> u64 {
        self.lane(direction).bytes.load(Ordering::Relaxed)
    }

    /// Cuts all present connections; bytes that were held back are lost.
    pub fn drop_connections(&self) {
        // Connections that are accepted from now on belong to the new token and stay.
        let fresh = CancellationToken::new();
        let mut present = self.state.connections.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *present, fresh).cancel();
    }
}

async fn accept(listener: TcpListener, state: Arc<State>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            // Reaps finished connections, so that the set does not grow.
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((client, _)) = accepted else { return };
                // Taken at the accept: a cut that comes before the task runs still hits this connection.
                let dropped = state.connections.lock().unwrap_or_else(PoisonError::into_inner).child_token();
                connections.spawn(connection(client, Arc::clone(&state), dropped));
            }
        }
    }
}

async fn connection(client: TcpStream, state: Arc<State>, dropped: CancellationToken) {
    // If the controller is down, the agent sees a connection that closes at once.
    let target = *state.target.lock().unwrap_or_else(PoisonError::into_inner);
    let Ok(server) = TcpStream::connect(target).await else { return };
    // Without Nagle's algorithm, so that the proxy adds no latency that the test did not ask for.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (client_read, client_write) = client.into_split();
    let (server_read, server_write) = server.into_split();
    let swallow = AtomicBool::new(false);
    // The end of one direction ends the other, as a cut cable does.
    tokio::select! {
        () = dropped.cancelled() => {}
        () = forward(client_read, server_write, &state.up, &swallow) => {}
        () = forward(server_read, client_write, &state.down, &swallow) => {}
    }
}

/// Forwards one direction. The upward direction sets `swallow`; it makes the downward one end before it forwards an
/// answer.
async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, lane: &Lane, swallow: &AtomicBool) {
    let mut open = lane.open.subscribe();
    let mut carried = 0_u64;
    let mut block = vec![0_u8; BLOCK];
    loop {
        if open.wait_for(|open| *open).await.is_err() {
            return;
        }
        let Ok(read) = from.read(&mut block).await else { return };
        // The test may have called `hold` during the read: these bytes wait too.
        if read == 0 || open.wait_for(|open| *open).await.is_err() {
            return;
        }
        let room = lane.until_cut(carried).unwrap_or(u64::MAX);
        let taken = usize::try_from(room).unwrap_or(usize::MAX).min(read);
        let Some(bytes) = block.get(..taken) else { return };
        // Downwards this is the answer to the marked request: it is not forwarded.
        if swallow.load(Ordering::Relaxed) {
            return;
        }
        // The bytes must be in one block. These tests search for short words that a client sends in one write.
        match lane.swallows(bytes) {
            Some(Swallow::Request) => return,
            Some(Swallow::Answer) => swallow.store(true, Ordering::Relaxed),
            Some(Swallow::Hold) => {
                lane.open.send_replace(false);
                if open.wait_for(|open| *open).await.is_err() {
                    return;
                }
            }
            None => {}
        }
        let delay = lane.delay.load(Ordering::Relaxed);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        if to.write_all(bytes).await.is_err() {
            return;
        }
        let taken_bytes = u64::try_from(taken).unwrap_or(u64::MAX);
        carried = carried.saturating_add(taken_bytes);
        lane.bytes.fetch_add(taken_bytes, Ordering::Relaxed);
        // The loop ends here only for a cut: without one, `room` is larger than any read.
        if taken < read || room == taken_bytes {
            lane.take_cut();
            return;
        }
        // A rate of 0 makes the division fail, which means no limit.
        if let Some(nanos) = taken_bytes.saturating_mul(1_000_000_000).checked_div(lane.rate.load(Ordering::Relaxed)) {
            tokio::time::sleep(Duration::from_nanos(nanos)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Direction, Proxy};
    use crate::wait::{seconds, wait_until};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    /// A server that sends a million bytes to each client, behind a proxy.
    async fn proxy() -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let _ = stream.write_all(&vec![7; 1_000_000]).await;
                    let mut rest = Vec::new();
                    let _ = stream.read_to_end(&mut rest).await;
                });
            }
        });
        Proxy::start(target).await.unwrap()
    }

    /// Bytes received until the connection ends, or until the full million.
    async fn received(proxy: &Proxy) -> usize {
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        let (mut count, mut block) = (0, vec![0; 65536]);
        while count < 1_000_000 {
            match stream.read(&mut block).await {
                Ok(0) | Err(_) => break,
                Ok(read) => count += read,
            }
        }
        count
    }

    #[tokio::test]
    async fn each_cut_falls_where_it_was_asked_for_and_takes_one_connection() {
        let proxy = proxy().await;
        proxy.cut_after(Direction::Down, [123_457, 600_000]);
        assert_eq!(received(&proxy).await, 123_457);
        assert_eq!(received(&proxy).await, 600_000);
        assert_eq!(received(&proxy).await, 1_000_000);
        assert_eq!((proxy.cuts_left(Direction::Down), proxy.bytes(Direction::Down)), (0, 1_723_457));
        assert_eq!(proxy.bytes(Direction::Up), 0);
    }

    #[tokio::test]
    async fn answer_is_swallowed_after_the_request_arrived() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::start(listener.local_addr().unwrap()).await.unwrap();
        proxy.swallow_answer_to(b"COMMIT");
        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let mut heard = [0; 6];
        for (asked, answered) in [(b"SELECT", true), (b"COMMIT", false)] {
            client.write_all(asked).await.unwrap();
            server.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, asked);
            server.write_all(b"done").await.unwrap();
            let mut answer = Vec::new();
            let read = (&mut client).take(4).read_to_end(&mut answer).await;
            assert_eq!(read.is_ok() && answer == *b"done", answered, "{answer:?}");
        }
        assert_eq!(proxy.swallows_left(), 0);
    }

    #[tokio::test]
    async fn swallowed_request_does_not_arrive() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::start(listener.local_addr().unwrap()).await.unwrap();
        proxy.swallow(b"COMMIT");
        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        client.write_all(b"COMMIT").await.unwrap();
        let mut heard = Vec::new();
        let _ = server.read_to_end(&mut heard).await;
        assert!(heard.is_empty() && proxy.swallows_left() == 0, "{heard:?}");
    }

    #[tokio::test]
    async fn marked_request_waits_until_it_is_released() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::start(listener.local_addr().unwrap()).await.unwrap();
        proxy.hold_at(b"COMMIT");
        let mut client = TcpStream::connect(proxy.address()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        let mut heard = [0; 6];
        client.write_all(b"SELECT").await.unwrap();
        server.read_exact(&mut heard).await.unwrap();
        client.write_all(b"COMMIT").await.unwrap();
        proxy.held().await;
        assert!(server.try_read(&mut heard).is_err(), "{heard:?}");
        proxy.release(Direction::Up);
        server.read_exact(&mut heard).await.unwrap();
        assert_eq!((&heard, proxy.swallows_left()), (b"COMMIT", 0));
    }

    #[tokio::test]
    async fn what_is_held_arrives_when_it_is_released_and_is_lost_when_the_connections_are_dropped() {
        let proxy = proxy().await;
        proxy.hold(Direction::Down);
        let mut held = TcpStream::connect(proxy.address()).await.unwrap();
        let mut byte = [0];
        assert!(tokio::time::timeout(std::time::Duration::from_millis(200), held.read(&mut byte)).await.is_err());
        proxy.drop_connections();
        wait_until(seconds(5), "the connection is gone", async || {
            Ok(matches!(held.try_read(&mut [0]), Ok(0)).then_some(()))
        })
        .await
        .unwrap();
        assert_eq!(proxy.bytes(Direction::Down), 0);
        proxy.release(Direction::Down);
        assert_eq!(received(&proxy).await, 1_000_000);
    }
}
