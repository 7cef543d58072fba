//! The gate before every call: who calls and whether they may is decided before a byte of the body is read.

use std::collections::HashMap;
use std::future::{Ready, ready};
use std::task::{Context, Poll};

use futures_util::future::Either;
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::tls::PeerInfo;
use super::{Caller, Denied, authorize};

/// Domain of every reason that the controller gives.
const DOMAIN: &str = "marco.bootstrap";

/// Puts [`Caller`] into the extensions of requests that may pass, and answers the rest.
#[derive(Debug, Clone, Copy, Default)]
pub struct GateLayer;

impl<S> tower::Layer<S> for GateLayer {
    type Service = Gate<S>;
    fn layer(&self, inner: S) -> Gate<S> {
        Gate { inner }
    }
}

/// A service behind the gate.
#[derive(Debug, Clone)]
pub struct Gate<S> {
    inner: S,
}

impl<S, B> tower::Service<http::Request<B>> for Gate<S>
where
    S: tower::Service<http::Request<B>, Response = http::Response<Body>>,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = Either<Ready<Result<Self::Response, S::Error>>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let caller = request.extensions().get::<PeerInfo>().and_then(Caller::from_peer);
        match authorize(request.uri().path(), caller.as_ref()) {
            Ok(caller) => {
                let caller = caller.clone();
                request.extensions_mut().insert(caller);
                Either::Right(self.inner.call(request))
            }
            Err(denied) => {
                let method = request.uri().path();
                match &caller {
                    Some(caller) => tracing::info!(method, caller = caller.name, error = %denied, "call refused"),
                    // Whoever can reach the port can do this as often as he likes.
                    None => tracing::debug!(method, error = %denied, "call refused"),
                }
                Either::Left(ready(Ok(status(&denied).into_http())))
            }
        }
    }
}

/// The gRPC status of a refusal.
fn status(denied: &Denied) -> Status {
    let (code, reason) = match denied {
        Denied::Unauthenticated => (Code::Unauthenticated, "NO_CREDENTIALS"),
        Denied::Forbidden { .. } => (Code::PermissionDenied, "ROLE_NOT_ALLOWED"),
    };
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::<String, String>::new());
    Status::with_error_details(code, denied.to_string(), details)
}
