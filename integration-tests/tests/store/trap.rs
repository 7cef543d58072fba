//! A proxy to Postgres that fails at a chosen statement.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// Time that the server gets to work on the statement before the connection is cut.
const AT_WORK: Duration = Duration::from_millis(200);

/// Fault of a connection that carries the word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Snap {
    /// The server gets the statement; its answer is lost with the connection.
    Cut,
    /// The server gets the statement, and the connection stays open; nothing that the server says arrives any more.
    Mute,
    /// The server gets the statement and the message after it, and then hears nothing: the controller froze, or its
    /// host is gone.
    Freeze,
}

/// A proxy in front of a Postgres.
pub(crate) struct Trap {
    address: SocketAddr,
    left: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Trap {
    /// Starts a proxy to the server of `url`. It fails at `word` as often as [`Trap::set`] says.
    pub(crate) async fn lay(url: &str, word: &'static str, snap: Snap) -> Self {
        let target: SocketAddr = url.split('@').nth(1).unwrap().split('/').next().unwrap().parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, left) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let counter = Arc::clone(&left);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(target).await.unwrap();
                tokio::spawn(pass(client, server, word, snap, Arc::clone(&counter)));
            }
        });
        Self { address, left, task }
    }

    /// The URL of the same database through this proxy.
    pub(crate) fn url(&self, url: &str) -> String {
        let (user, rest) = url.split_once('@').unwrap();
        format!("{user}@{}/{}", self.address, rest.split_once('/').unwrap().1)
    }

    pub(crate) fn set(&self, times: usize) {
        self.left.store(times, Ordering::SeqCst);
    }

    pub(crate) fn left(&self) -> usize {
        self.left.load(Ordering::SeqCst)
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(client: TcpStream, server: TcpStream, word: &'static str, snap: Snap, left: Arc<AtomicUsize>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let mute = Arc::new(Notify::new());
    let muted = Arc::clone(&mute);
    let down = tokio::spawn(async move {
        tokio::select! {
            // Asked first, so that no answer slips through after it. The halves live on: to drop them is to hang up.
            biased;
            () = muted.notified() => std::future::pending().await,
            _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
        }
    });
    let mut block = vec![0; 64 * 1024];
    let mut seen = false;
    while let Ok(count @ 1..) = from_client.read(&mut block).await {
        let sent = &block[..count];
        let take = |left: usize| left.checked_sub(1);
        // A statement of these tests fits into one read of the proxy.
        let snaps = sent.windows(word.len()).any(|part| part == word.as_bytes())
            && left.try_update(Ordering::SeqCst, Ordering::SeqCst, take).is_ok();
        if snap == Snap::Mute && snaps {
            mute.notify_one();
        }
        if snap == Snap::Cut && snaps {
            // Stops forwarding answers before the statement is sent, so that its answer cannot slip through.
            down.abort();
        }
        if to_server.write_all(sent).await.is_err() {
            break;
        }
        match snap {
            Snap::Cut if snaps => {
                tokio::time::sleep(AT_WORK).await;
                break;
            }
            // A statement is prepared first; the next message executes it.
            Snap::Freeze if seen => {
                down.abort();
                std::future::pending::<()>().await;
            }
            _ => seen |= snaps,
        }
    }
    down.abort();
}
