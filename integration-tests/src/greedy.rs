//! Greedy peers. One opens all connections and calls that the protocol allows, leaves each message half sent, and reads
//! no answer. Another one makes whole calls without end, each of which may be stored, and a connection for every few.

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

/// Bytes of a message whose last byte is never sent: the API's maximum.
const HALF: usize = 1 << 20;
/// Lifetime of a connection before another one replaces it.
const HELD: Duration = Duration::from_secs(15);
/// Pauses: after a connection that was refused or displaced, and between the first ones of a peer. Without them a test
/// measures its own handshakes.
const REFUSED: Duration = Duration::from_secs(1);
const NEXT: Duration = Duration::from_millis(5);

/// Calls that [`Greedy::repeat`] makes on a connection.
const ON_ONE: usize = 8;

/// Threads for greedy peers, at the lowest priority. Real attackers bring processors of their own; at normal priority a
/// test on two processors would measure how these are shared.
#[derive(Debug)]
pub struct Crowd(Option<Runtime>);

impl Crowd {
    /// Starts two threads.
    ///
    /// Returns an error if the threads cannot be started.
    pub fn new() -> std::io::Result<Self> {
        // Linux has a nice value for each thread, and id 0 means the calling thread: sched(7), setpriority(2).
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

    /// Runs a future on these threads, and returns its output.
    ///
    /// # Errors
    ///
    /// Returns an error if the future panicked.
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
        // Tokio panics if a runtime that waits for its threads is dropped inside another runtime.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// A gRPC call. A `message` of `None` stands for one of [`HALF`] bytes that is never completed.
#[derive(Debug, Clone)]
pub struct Call {
    /// `/package.Service/Method`.
    pub path: &'static str,
    /// The request.
    pub message: Option<Vec<u8>>,
}

/// A gRPC call with all its messages.
#[derive(Debug, Clone)]
pub struct Whole {
    /// `/package.Service/Method`.
    pub path: &'static str,
    /// The requests, in their order.
    pub messages: Vec<Vec<u8>>,
}

/// A greedy client of one listener.
#[derive(Debug, Clone)]
pub struct Greedy {
    /// Address of the listener.
    pub address: SocketAddr,
    /// Certificate and key of the client.
    pub who: Credentials,
    /// Number of simultaneous connections.
    pub connections: usize,
}

impl Greedy {
    /// Holds `streams` HTTP/2 calls on each connection until `until`.
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

    /// Makes these calls in turn on each connection until `until`, each with its messages whole, and reads the answers.
    /// Every connection is replaced after a few calls. Returns the number of calls that were answered.
    pub async fn repeat(&self, calls: &[Whole], until: Instant) -> usize {
        let made = join_all((0..self.connections).map(|number| async move {
            let mut made = 0;
            let mut next = number;
            while Instant::now() < until && !calls.is_empty() {
                // A refused connection is opened again at once: that is this peer's greed.
                made += self.repeat_on_one(calls, &mut next, until).await.unwrap_or_default();
                sleep(NEXT).await;
            }
            made
        }));
        made.await.into_iter().sum()
    }

    async fn repeat_on_one(&self, calls: &[Whole], next: &mut usize, until: Instant) -> Result<usize> {
        let stream = timeout_at(until, tls(self.address, &self.who, b"h2")).await??;
        let (send, connection) = timeout_at(until, h2::client::handshake(stream)).await??;
        let made = async {
            let mut made = 0;
            for _ in 0..ON_ONE {
                let Some(call) = calls.get(*next % calls.len().max(1)) else { break };
                *next += 1;
                // A refused call ends alone, unless the connection ends with it.
                if whole_call(send.clone(), call).await.is_ok() {
                    made += 1;
                }
            }
            made
        };
        tokio::select! {
            made = made => Ok(made),
            _ = connection => Ok(0),
            () = sleep_until(until) => Ok(0),
        }
    }

    async fn hold_calls(&self, calls: &[Call], streams: usize, until: Instant) -> Result<()> {
        let stream = timeout_at(until, tls(self.address, &self.who, b"h2")).await??;
        let mut client = h2::client::Builder::new();
        // The smallest window and buffer: the server must keep its answers, and the test must not use up its own
        // memory.
        client.initial_window_size(65_535).max_send_buffer_size(64 << 10);
        let (send, connection) = timeout_at(until, client.handshake::<_, Bytes>(stream)).await??;
        let opened = join_all((0..streams).map(|number| {
            let (send, call) = (send.clone(), calls.get(number % calls.len().max(1)).cloned());
            async move {
                let Some(call) = call else { return };
                // A refused call ends alone; the others stay open.
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

    /// Requests a file over HTTP/1.1 on each connection until `until`, and reads only the first bytes of each answer.
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
            // After any other answer it asks again on the same connection, if that is still open.
            if first.starts_with(b"HTTP/1.1 200") {
                // The rest of the answer fills the server's buffers.
                sleep_until(until).await;
                return Ok(());
            }
        }
    }
}

/// Makes a call and reads its answer, for at most a second: a session stays open until its caller goes.
async fn whole_call(send: h2::client::SendRequest<Bytes>, call: &Whole) -> Result<()> {
    let mut send = timeout(HELD, send.ready()).await??;
    let request = http::Request::post(format!("http://controller{}", call.path))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (answer, mut body) = send.send_request(request, false)?;
    let mut bytes = Vec::new();
    for message in &call.messages {
        bytes.push(0);
        bytes.extend(u32::try_from(message.len())?.to_be_bytes());
        bytes.extend(message);
    }
    body.send_data(Bytes::from(bytes), true)?;
    timeout(REFUSED, async {
        let mut answer = answer.await?.into_body();
        while let Some(part) = answer.data().await {
            let length = part?.len();
            answer.flow_control().release_capacity(length)?;
        }
        anyhow::Ok(())
    })
    .await?
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
        // Sending waits for the server's window, so the message grows as fast as the server lets it.
        body.reserve_capacity(left.min(64 << 10));
        let Some(room) = std::future::poll_fn(|cx| body.poll_capacity(cx)).await else { break };
        let size = room?.min(left);
        body.send_data(Bytes::from(vec![0; size]), false)?;
        left -= size;
    }
    // Holds the answer without reading it.
    let answer = answer.await?;
    std::future::pending::<()>().await;
    drop(answer);
    Ok(())
}
