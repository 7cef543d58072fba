//! An open connection: its TLS stream, its peer, and the HTTP/2 frames that pass.

use std::future::Future as _;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::transport::server::Connected;

use super::PeerInfo;
use super::frames::{ENHANCE_YOUR_CALM, Flood, Frames};
use super::places::{LAST_WORDS, STRANGER_AGE};
use crate::identity::peer_log::{cut, of_peer};

/// Time from the handshake to a peer's first frame, which it sends without being asked.
const FIRST_FRAME: Duration = Duration::from_secs(10);

/// An open connection.
pub struct TlsConn {
    stream: TlsStream<TcpStream>,
    info: PeerInfo,
    /// Frame counters; `None`: the connection speaks HTTP/1.1.
    http2: Option<Watched>,
    life: Life,
}

/// The lifetime of a connection.
struct Life {
    gives_way: Pin<Box<WaitForCancellationFutureOwned>>,
    /// The stranger's deadline; `None`: a credential was accepted, so nothing ends it.
    end: Option<Pin<Box<Sleep>>>,
    refused: bool,
}

/// State that is watched on a connection with HTTP/2.
struct Watched {
    frames: Frames,
    /// Deadline for the first frame; `None`: it has come.
    first: Option<Pin<Box<Sleep>>>,
    flood: Option<Flood>,
}

impl TlsConn {
    pub(super) fn new(stream: TlsStream<TcpStream>, info: PeerInfo, http2: bool) -> Self {
        let watched =
            || Watched { frames: Frames::new(Instant::now()), first: Some(Box::pin(sleep(FIRST_FRAME))), flood: None };
        let life = Life {
            gives_way: Box::pin(info.connection.place.gives_way()),
            end: Some(Box::pin(sleep(STRANGER_AGE))),
            refused: false,
        };
        Self { stream, info, http2: http2.then(watched), life }
    }

    /// Returns an error if the connection gave its place to another one, if no credential was accepted in time, or soon
    /// after one was refused. Checked before reads and writes: a peer that reads nothing keeps HTTP/2 from reading.
    fn end_if_over(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.life.gives_way.as_mut().poll(cx).is_ready() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let place = &self.info.connection.place;
        // A refusal counts even after another credential was accepted.
        if !self.life.refused && place.is_refused() {
            self.life.refused = true;
            self.life.end = Some(Box::pin(sleep(LAST_WORDS)));
        }
        if let Some(end) = &mut self.life.end {
            if !self.life.refused && place.is_accepted() {
                self.life.end = None;
            } else if end.as_mut().poll(cx).is_ready() {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// The peer at the other end.
    pub fn peer(&self) -> &PeerInfo {
        &self.info
    }

    /// Returns an error after a flood. The peer gets the reason, if it can be sent at once.
    fn end_if_flooded(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(watched) = &mut self.http2 else { return Ok(()) };
        let Some(Flood(what)) = watched.flood else { return Ok(()) };
        // Between two frames only: in the middle of one the peer would read it as a payload.
        if watched.frames.may_send() {
            // Best effort: the peer is hostile or broken, and waiting for it would keep its place taken.
            let _ = Pin::new(&mut self.stream).poll_write(cx, &ENHANCE_YOUR_CALM);
            let _ = Pin::new(&mut self.stream).poll_flush(cx);
        }
        let peer = self.info.certificate.as_ref().map_or("", |certificate| certificate.common_name.as_str());
        let from = self.info.addr;
        of_peer!(warn, from, %from, peer = %cut(peer), what, "a connection was closed: too many");
        Err(io::Error::other("too many frames of a kind"))
    }
}

impl Connected for TlsConn {
    type ConnectInfo = PeerInfo;
    fn connect_info(&self) -> PeerInfo {
        self.info.clone()
    }
}

impl AsyncRead for TlsConn {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.end_if_flooded(cx)?;
        this.end_if_over(cx)?;
        let before = buf.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buf);
        let Some(watched) = &mut this.http2 else { return read };
        if read.is_pending() {
            if let Some(first) = &mut watched.first
                && first.as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            return Poll::Pending;
        }
        let bytes = buf.filled().get(before..).unwrap_or_default();
        if let Err(flood) = watched.frames.received(bytes, Instant::now()) {
            watched.flood = Some(flood);
        }
        if watched.frames.begun() {
            watched.first = None;
        }
        // At once: h2 must not see the frames of a flood.
        this.end_if_flooded(cx)?;
        read
    }
}

impl TlsConn {
    fn wrote(&mut self, written: Poll<io::Result<usize>>, bytes: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if let (Poll::Ready(Ok(count)), Some(watched)) = (&written, &mut self.http2) {
            let mut left = *count;
            for slice in bytes {
                let part = slice.get(..left.min(slice.len())).unwrap_or_default();
                left -= part.len();
                // The next read ends the connection.
                if let Err(flood) = watched.frames.sent(part) {
                    watched.flood = Some(flood);
                }
            }
        }
        written
    }
}

impl AsyncWrite for TlsConn {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.end_if_over(cx)?;
        let written = Pin::new(&mut this.stream).poll_write(cx, data);
        this.wrote(written, &[IoSlice::new(data)])
    }
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.end_if_over(cx)?;
        let written = Pin::new(&mut this.stream).poll_write_vectored(cx, data);
        this.wrote(written, data)
    }
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.end_if_over(cx)?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Without `end_if_over`: a connection that is over is being closed anyway.
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
