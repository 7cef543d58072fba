//! A peer that takes all that the protocol lets it take: it opens connections and calls, sends what it may, leaves every
//! message half sent, and reads no answer.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::runtime::Runtime;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::client::Credentials;
use crate::frames::tls;

/// Bytes of a message of which the last one is never sent: the most that the API takes.
const HALF: usize = 1 << 20;
/// How long a connection is held before another one takes its place, unless it was ended sooner.
const HELD: Duration = Duration::from_secs(15);
/// Pause after a connection that was refused or gave way, and between the first ones of a peer: without it a test measures
/// its own handshakes.
const REFUSED: Duration = Duration::from_secs(1);
const NEXT: Duration = Duration::from_millis(5);

/// Threads on which greedy peers run: they take what processor time the controller and the test leave. Attackers bring
/// processors of their own; without this, a test on two processors measures how these are shared.
#[derive(Debug)]
pub struct Crowd(Option<Runtime>);

impl Crowd {
    /// # Errors
    ///
    /// Threads that cannot be started.
    pub fn new() -> std::io::Result<Self> {
        // Linux has a nice value for each thread, and 0 as the id means the thread that asks: sched(7), setpriority(2).
        let yielding = || {
            let _ = rustix::process::setpriority_process(None, 19);
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .on_thread_start(yielding)
            .build()?;
        Ok(Self(Some(runtime)))
    }

    /// Runs it there; what it returns comes when it ended.
    ///
    /// # Errors
    ///
    /// It panicked.
    pub async fn run<F>(&self, attack: F) -> Result<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let runtime = self.0.as_ref().context("it has ended")?;
        Ok(runtime.spawn(attack).await?)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // A runtime that waits for its threads must not be dropped inside of another one.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A call: its path, and its message; `None`: a message of [`HALF`] bytes that never comes whole.
#[derive(Debug, Clone)]
pub struct Call {
    /// `/package.Service/Method`.
    pub path: &'static str,
    /// The request.
    pub message: Option<Vec<u8>>,
}

/// Somebody who calls a listener.
#[derive(Debug, Clone)]
pub struct Greedy {
    /// The listener.
    pub address: SocketAddr,
    /// Certificate and key.
    pub who: Credentials,
    /// Connections at a time.
    pub connections: usize,
}

impl Greedy {
    /// Holds as many calls of HTTP/2 on each connection as it may, until then.
    pub async fn call(&self, calls: &[Call], streams: usize, until: Instant) {
        join_all((0..self.connections).map(|number| async move {
            sleep(NEXT * u32::try_from(number).unwrap_or_default()).await;
            while Instant::now() < until {
                let held = self.hold_calls(calls, streams, until.min(Instant::now() + HELD)).await;
                if held.is_err() {
                    sleep_until((Instant::now() + REFUSED).min(until)).await;
                }
            }
        }))
        .await;
    }

    async fn hold_calls(&self, calls: &[Call], streams: usize, until: Instant) -> Result<()> {
        let stream = timeout_at(until, tls(self.address, &self.who, b"h2")).await??;
        let mut client = h2::client::Builder::new();
        client.initial_window_size(65_535).max_send_buffer_size(64 << 10);
        let (send, connection) = timeout_at(until, client.handshake::<_, Bytes>(stream)).await??;
        let opened = join_all((0..streams).map(|number| {
            let (send, call) = (send.clone(), calls.get(number % calls.len().max(1)).cloned());
            async move {
                let Some(call) = call else { return };
                // Refused, it leaves the others to themselves.
                let _ = hold_call(send, call).await;
                std::future::pending::<()>().await;
            }
        }));
        tokio::select! {
            _ = opened => {}
            ended = connection => ended?,
            () = sleep_until(until) => {}
        }
        Ok(())
    }

    /// Asks for files over HTTP/1.1, again and again on each connection, and reads the first bytes of each answer only.
    pub async fn fetch(&self, path: &str, until: Instant) {
        join_all((0..self.connections).map(|number| async move {
            sleep(NEXT * u32::try_from(number).unwrap_or_default()).await;
            while Instant::now() < until {
                let held = self.hold_fetch(path, until.min(Instant::now() + HELD)).await;
                if held.is_err() {
                    sleep_until((Instant::now() + REFUSED).min(until)).await;
                }
            }
        }))
        .await;
    }

    async fn hold_fetch(&self, path: &str, until: Instant) -> Result<()> {
        let mut stream = timeout_at(until, tls(self.address, &self.who, b"http/1.1")).await??;
        let request = format!("GET {path} HTTP/1.1\r\nHost: mirror\r\n\r\n");
        let mut first = [0; 1024];
        loop {
            timeout_at(until, stream.write_all(request.as_bytes())).await??;
            let read = timeout_at(until, stream.read(&mut first)).await??;
            anyhow::ensure!(read > 0, "closed");
            if first.starts_with(b"HTTP/1.1 200") {
                // The rest stays with the server.
                sleep_until(until).await;
                return Ok(());
            }
        }
    }
}

async fn hold_call(send: h2::client::SendRequest<Bytes>, call: Call) -> Result<()> {
    let mut send = timeout(HELD, send.ready()).await??;
    let request = http::Request::post(format!("http://controller{}", call.path))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let whole = call.message.is_some();
    let (answer, mut body) = send.send_request(request, false)?;
    let length = u32::try_from(call.message.as_ref().map_or(HALF, Vec::len))?.to_be_bytes();
    let mut head = vec![0];
    head.extend(length);
    head.extend(call.message.unwrap_or_default());
    body.send_data(Bytes::from(head), whole)?;
    let mut left = if whole { 0 } else { HALF - 1 };
    while left > 0 {
        body.reserve_capacity(left.min(64 << 10));
        let Some(room) = std::future::poll_fn(|cx| body.poll_capacity(cx)).await else { break };
        let size = room?.min(left);
        body.send_data(Bytes::from(vec![0; size]), false)?;
        left -= size;
    }
    // Answered, its bytes are not read.
    let answer = answer.await?;
    std::future::pending::<()>().await;
    drop(answer);
    Ok(())
}
