//! Limits the calls on a connection without an accepted credential. Calls beyond a few at a time are refused before
//! anything of them is read. HTTP/2's own limit cannot do it: it is announced once for a connection, and a client with
//! an API token needs more later.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tonic::body::Body;

use super::{Connection, PeerInfo};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A call refused with `REFUSED_STREAM`: it was not processed, so the client may repeat it.
#[derive(Debug, thiserror::Error)]
#[error("too many calls before a credential was accepted")]
struct TooMany(
    // hyper takes the code of the reset from this source.
    #[source] h2::Error,
);

/// Limits the calls of strangers' connections.
#[derive(Debug, Clone, Copy, Default)]
pub struct StreamsLayer;

impl<S> tower::Layer<S> for StreamsLayer {
    type Service = Streams<S>;
    fn layer(&self, inner: S) -> Streams<S> {
        Streams { inner }
    }
}

/// A service that limits the calls of strangers.
#[derive(Debug, Clone)]
pub struct Streams<S> {
    inner: S,
}

/// A stranger's call, counted until it is answered or dropped.
struct Counted(Arc<Connection>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.place.end_call();
    }
}

impl<S> tower::Service<http::Request<Body>> for Streams<S>
where
    S: tower::Service<http::Request<Body>, Response = http::Response<Body>>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let connection = request.extensions().get::<PeerInfo>().map(|peer| Arc::clone(&peer.connection));
        let stranger = connection.filter(|connection| !connection.is_accepted());
        let counted = match stranger {
            Some(connection) if connection.place.begin_call() => Some(Counted(connection)),
            Some(_) => {
                let refused = TooMany(h2::Error::from(h2::Reason::REFUSED_STREAM));
                return Box::pin(async move { Err(refused.into()) });
            }
            None => None,
        };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let _counted = counted;
            answer.await.map_err(Into::into)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;

    use futures_util::FutureExt as _;
    use tonic::body::Body;
    use tower::{Layer as _, Service as _};

    use super::super::places::STRANGER_STREAMS;
    use super::super::{Connection, PeerInfo};
    use super::StreamsLayer;
    use crate::identity::roles::Role;

    #[tokio::test]
    async fn fifth_call_of_a_stranger_is_refused_until_a_credential_was_accepted() {
        let never = tower::service_fn(|_: http::Request<Body>| async {
            std::future::pending::<Result<http::Response<Body>, Infallible>>().await
        });
        let mut service = StreamsLayer.layer(never);
        let connection = Arc::new(Connection::default());
        let mut call = || {
            let mut request = http::Request::new(Body::empty());
            let addr = "127.0.0.1:1".parse().unwrap();
            request.extensions_mut().insert(PeerInfo { addr, certificate: None, connection: Arc::clone(&connection) });
            Box::pin(service.call(request))
        };
        let mut calls: Vec<_> = (0..STRANGER_STREAMS).map(|_| call()).collect();
        assert!(calls.iter_mut().all(|call| call.now_or_never().is_none()));
        let refused = call().now_or_never().unwrap().unwrap_err();
        let reason = refused.source().and_then(|source| source.downcast_ref::<h2::Error>()).and_then(h2::Error::reason);
        assert_eq!(reason, Some(h2::Reason::REFUSED_STREAM));
        calls.pop();
        assert!(call().now_or_never().is_none(), "one that ended makes room");
        connection.accept(Role::Viewer, "viewer");
        assert!((0..20).all(|_| call().now_or_never().is_none()));
    }
}
