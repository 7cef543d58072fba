//! A connection that notices refusals of a certificate because of the time. In TLS 1.3 the server judges the client's
//! certificate after the client considers the handshake complete, so the refusal arrives with the first read.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use rustls::pki_types::CertificateDer;
use rustls::{AlertDescription, CertificateError, Error};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

/// The last refusal because of the time, with the certificate that this node showed.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    told: Notify,
    shown: Mutex<Option<CertificateDer<'static>>>,
}

impl Refusals {
    fn add(&self, shown: &CertificateDer<'static>) {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = Some(shown.clone());
        self.told.notify_one();
    }

    /// Waits for the next refusal. Cancel-safe.
    pub(super) async fn next(&self) {
        self.told.notified().await;
    }

    /// True if the last refusal concerns a connection with `certificate`. A certificate that was replaced since needs
    /// no renewal.
    pub(super) fn concern(&self, certificate: &CertificateDer<'_>) -> bool {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).as_ref() == Some(certificate)
    }

    /// Forgets the last refusal: a controller accepted the node.
    pub(super) fn clear(&self) {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Receiver of refusals on a connection.
#[derive(Debug, Clone)]
pub(super) struct Told {
    pub(super) refusals: Arc<Refusals>,
    /// Certificate that the connection shows.
    pub(super) shown: CertificateDer<'static>,
}

/// A stream and the receiver of its refusals. `None`: the connection shows no certificate.
pub(super) struct Watched<S> {
    stream: S,
    told: Option<Told>,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, told: Option<Told>) -> Self {
        Self { stream, told }
    }
}

/// Reports an error that means "not valid at this time": our certificate by the other side's clock, or the other way
/// round.
pub(super) fn note(error: &io::Error, told: Option<&Told>) {
    let refused = match error.get_ref().and_then(|cause| cause.downcast_ref::<Error>()) {
        // TLS has one alert for both: expired and not yet valid.
        Some(Error::AlertReceived(alert)) => *alert == AlertDescription::CertificateExpired,
        Some(Error::InvalidCertificate(why)) => matches!(
            why,
            CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. }
        ),
        _ => false,
    };
    if let (true, Some(told)) = (refused, told) {
        told.refusals.add(&told.shown);
    }
}

impl<S: AsyncRead + Unpin> Watched<S> {
    /// Looks for a refusal that arrived before a write failed: the server sends the alert and closes, and a write that
    /// meets the closed connection would be all that its owner sees.
    fn look(&mut self, cx: &mut Context<'_>) {
        let mut byte = [0];
        let read = Pin::new(&mut self.stream).poll_read(cx, &mut ReadBuf::new(&mut byte));
        if let Poll::Ready(Err(error)) = read {
            note(&error, self.told.as_ref());
        }
    }

    /// Passes the result of a write on.
    fn written<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if let Poll::Ready(Err(_)) = result {
            self.look(cx);
        }
        result
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buf));
        Poll::Ready(read.inspect_err(|error| note(error, self.told.as_ref())))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.written(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection that the other side refused and closed: nothing can be written, and the refusal can be read.
    struct Closed;

    impl AsyncRead for Closed {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            let alert = Error::AlertReceived(AlertDescription::CertificateExpired);
            Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, alert)))
        }
    }

    impl AsyncWrite for Closed {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn refusal_is_heard_also_when_a_write_fails_first() {
        use tokio::io::AsyncWriteExt as _;
        let shown = CertificateDer::from(vec![1, 2, 3]);
        for flushes in [false, true] {
            let refusals = Arc::new(Refusals::default());
            let told = Told { refusals: Arc::clone(&refusals), shown: shown.clone() };
            let mut stream = Watched::new(Closed, Some(told));
            let written = if flushes { stream.flush().await } else { stream.write_all(b"hello").await };
            assert!(written.is_err() && refusals.concern(&shown), "{written:?}");
        }
    }
}
