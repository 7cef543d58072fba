//! A TCP relay that breaks connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A relay to a controller that cuts the first connections after a number of bytes.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    cuts: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// Starts a relay. Each of the first `cuts` connections is cut after `after` bytes towards the controller.
    pub(crate) async fn cutting(to: SocketAddr, cuts: usize, after: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        let counter = Arc::clone(&done);
        tasks.spawn(async move {
            let mut relays = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = TcpStream::connect(to).await.unwrap();
                let counter = Arc::clone(&counter);
                relays.spawn(async move {
                    let cut = counter.load(Ordering::SeqCst) < cuts;
                    relay(client, server, cut.then_some(after)).await;
                    if cut {
                        counter.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        Self { address, cuts: done, _tasks: tasks }
    }

    /// Returns the number of cut connections.
    pub(crate) fn cuts(&self) -> usize {
        self.cuts.load(Ordering::SeqCst)
    }
}

async fn relay(client: TcpStream, server: TcpStream, limit: Option<usize>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = async {
        let mut left = limit.unwrap_or(usize::MAX);
        let mut block = vec![0; 16 * 1024];
        while left > 0 {
            let most = left.min(block.len());
            let Ok(read @ 1..) = from_client.read(&mut block[..most]).await else { return };
            if to_server.write_all(&block[..read]).await.is_err() {
                return;
            }
            left -= read;
        }
    };
    // The end of either direction ends both: the connection is cut, not closed in order.
    tokio::select! {
        () = up => {}
        _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
    }
}
