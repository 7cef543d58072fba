//! The gate before every call. It admits the caller before a byte of the body is read, and ends the bodies of an open
//! call when its caller is no longer admitted.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio_util::sync::WaitForCancellationFutureOwned;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::access::{Access, Entered, Refused};
use super::calls::{Calls, MAX_MESSAGE, whole};
use super::record::{self, OK};
use super::roles;
use super::tls::PeerInfo;
use super::{Caller, Denied, Pass};
use crate::store::{AuditRow, Record, deadline, recorded};

/// Method name in the audit for a file of the mirror.
pub const FILE_MIRROR: &str = "FileMirror";

/// Domain of every error reason that the controller gives.
pub(super) const DOMAIN: &str = marco_proto::names::ERROR_DOMAIN;

/// Puts [`Caller`] into the extensions of admitted requests, and answers the others.
#[derive(Clone)]
pub struct GateLayer {
    access: Arc<Access>,
    calls: Calls,
}

impl GateLayer {
    /// A gate that asks `access`. Calls that change something run as tasks of the server.
    pub fn new(access: Arc<Access>, tasks: TaskTracker) -> Self {
        Self { access, calls: Calls::new(tasks) }
    }
}

impl<S> tower::Layer<S> for GateLayer {
    type Service = Gate<S>;
    fn layer(&self, inner: S) -> Gate<S> {
        Gate { inner, access: Arc::clone(&self.access), calls: self.calls.clone() }
    }
}

/// A service behind the gate.
#[derive(Clone)]
pub struct Gate<S> {
    inner: S,
    access: Arc<Access>,
    calls: Calls,
}

impl<S> tower::Service<http::Request<Body>> for Gate<S>
where
    S: tower::Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        // Only the instance that was polled ready may be called; its clone is made ready for the next call.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        let (access, calls) = (Arc::clone(&self.access), self.calls.clone());
        Box::pin(deadline::of_caller(async move {
            let method = request.uri().path().to_owned();
            // Put there by the acceptor, so it cannot be forged by a header.
            let peer = request.extensions().get::<PeerInfo>().cloned();
            // A header that is not text counts as a wrong token. Counting it as none would let the certificate decide
            // instead.
            let authorization = request
                .headers()
                .get(http::header::AUTHORIZATION)
                .map(|value| value.to_str().unwrap_or_default().to_owned());
            let caller = match access.admit(&method, peer.as_ref(), authorization.as_deref()).await {
                Ok(caller) => caller,
                Err(Refused { denied, caller }) => {
                    if let Some(peer) = &peer {
                        close_if_useless(peer, &denied);
                    }
                    let status = status(&denied);
                    let mut row = row(&access, caller.as_ref(), &method, status.code(), status.message());
                    if let Some(peer) = &peer {
                        row.from = super::shown(peer.addr).to_string();
                    }
                    // Recorded even if the client leaves; the recorder bounds their number.
                    calls
                        .note(async move { access.recorder().record(row, peer.map(|peer| peer.addr.ip())).await })
                        .await;
                    return Ok(status.into_http());
                }
            };
            request.extensions_mut().insert(caller.clone());
            if roles::is_session(&method) {
                // The session's handler decides by the first message; its sweep checks it afterwards and says good-bye.
                return inner.call(request).await;
            }
            if let Some(peer) = &peer {
                peer.connection.accept(caller.role, &caller.name);
            }
            let pass = Arc::clone(&caller.pass);
            let Some(entered) = access.enter_call(&method, caller.clone()).await else {
                // Recorded only if the method would have changed something.
                return Ok(noted(&calls, access, &caller, &method, too_many().into_http()).await);
            };
            let request = request.map(|body| Body::new(Cuttable::new(body, &pass, None)));
            let request = if roles::is_streamed(&method) {
                Ok(request)
            } else {
                // One caller may send only a few messages at a time: each is held in memory until it is whole.
                let _receiving = entered.call.receiving().await;
                whole(request, MAX_MESSAGE).await
            };
            let response = match request {
                Err(status) => noted(&calls, access, &caller, &method, status.into_http()).await,
                Ok(request) if roles::runs_to_its_end(&method) => {
                    let work = async move {
                        // The handler's change and this record are committed together.
                        let stored = Record::new(record::cleaned(row(&access, Some(&caller), &method, Code::Ok, "")));
                        caller.record_with_change(Arc::clone(&stored));
                        let response = recorded(stored, inner.call(request)).await;
                        let response = response.unwrap_or_else(|never| match never {});
                        if let Some(row) = unrecorded(&access, &caller, &method, &response) {
                            access.recorder().record(row, Some(caller.from.ip())).await;
                        }
                        response
                    };
                    calls.finish(work).await
                }
                Ok(request) => {
                    let response = inner.call(request).await?;
                    noted(&calls, access, &caller, &method, response).await
                }
            };
            Ok(response.map(|body| Body::new(Cuttable::new(body, &pass, Some(entered)))))
        }))
    }
}

/// Closes a connection whose credential was refused. One with an accepted credential stays open: a proxy may pass on
/// the calls of several clients.
fn close_if_useless(peer: &PeerInfo, denied: &Denied) {
    let useless = match denied {
        Denied::Revoked | Denied::Quarantined | Denied::KeyHeld(_) => true,
        Denied::Unauthenticated | Denied::BadToken => !peer.connection.is_accepted(),
        // The credential itself is good.
        Denied::Forbidden { .. } | Denied::Unavailable => false,
    };
    if useless {
        peer.connection.refuse();
    }
}

/// Records the answer, even if the client has left, and returns it.
async fn noted(
    calls: &Calls,
    access: Arc<Access>,
    caller: &Caller,
    method: &str,
    response: http::Response<Body>,
) -> http::Response<Body> {
    if let Some(row) = unrecorded(&access, caller, method, &response) {
        let address = caller.from.ip();
        calls.note(async move { access.recorder().record(row, Some(address)).await }).await;
    }
    response
}

fn row(access: &Access, caller: Option<&Caller>, method: &str, code: Code, message: &str) -> AuditRow {
    AuditRow {
        time: access.now(),
        actor: caller.map(|caller| caller.name.clone()).unwrap_or_default(),
        credential: caller.map(Caller::credential).unwrap_or_default(),
        from: caller.map(|caller| super::shown(caller.from).to_string()).unwrap_or_default(),
        method: roles::short(method).to_owned(),
        target: caller.map(|caller| caller.pass.target()).unwrap_or_default(),
        result: code_word(code).to_owned(),
        message: if code == Code::Ok { String::new() } else { message.to_owned() },
    }
}

/// Records a request to the file mirror that got no file.
pub async fn record_refused_file(
    access: &Access,
    caller: Option<&Caller>,
    peer: Option<&PeerInfo>,
    path: &str,
    why: &str,
) {
    let mut row = row(access, caller, FILE_MIRROR, Code::PermissionDenied, why);
    path.clone_into(&mut row.target);
    if let Some(peer) = peer {
        row.from = super::shown(peer.addr).to_string();
    }
    access.recorder().record(row, peer.map(|peer| peer.addr.ip())).await;
}

/// The audit row of a call that its handler has not recorded: a change or a refusal. An answer without a status in its
/// headers succeeded, or has begun.
fn unrecorded(access: &Access, caller: &Caller, method: &str, response: &http::Response<Body>) -> Option<AuditRow> {
    let status = Status::from_header_map(response.headers());
    let code = status.as_ref().map_or(Code::Ok, Status::code);
    let refused = matches!(code, Code::PermissionDenied | Code::Unauthenticated);
    if caller.pass.is_recorded() || !(refused || roles::changes_something(method)) {
        return None;
    }
    let message = status.as_ref().map(Status::message).unwrap_or_default();
    Some(row(access, Some(caller), method, code, message))
}

/// A gRPC status code as the audit spells it.
pub fn code_word(code: Code) -> &'static str {
    match code {
        Code::Ok => OK,
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The gRPC status of a refusal.
fn status(denied: &Denied) -> Status {
    let (code, reason) = match denied {
        Denied::Unauthenticated => (Code::Unauthenticated, "NO_CREDENTIALS"),
        Denied::BadToken => (Code::Unauthenticated, "API_TOKEN_REFUSED"),
        Denied::Revoked => (Code::Unauthenticated, "CERTIFICATE_REVOKED"),
        Denied::Quarantined => (Code::PermissionDenied, "NODE_QUARANTINED"),
        Denied::KeyHeld(_) => (Code::PermissionDenied, "KEY_AWAITS_APPROVAL"),
        Denied::Forbidden { .. } => (Code::PermissionDenied, "ROLE_NOT_ALLOWED"),
        Denied::Unavailable => (Code::Unavailable, "STORE_UNAVAILABLE"),
    };
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::<String, String>::new());
    Status::with_error_details(code, denied.to_string(), details)
}

/// The answer to a caller with too many open calls.
fn too_many() -> Status {
    let details = ErrorDetails::with_error_info("TOO_MANY_CALLS", DOMAIN, HashMap::<String, String>::new());
    let message = "this caller has as many calls open as it may have; end some of them";
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

/// A body that ends when its call is cut: an answer with the reason, a request with an error.
struct Cuttable {
    inner: Body,
    pass: Arc<Pass>,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Keeps an answer in the list of open calls; `None`: a request.
    entered: Option<Entered>,
    ended: bool,
}

impl Cuttable {
    fn new(inner: Body, pass: &Arc<Pass>, entered: Option<Entered>) -> Self {
        let cut = Box::pin(pass.token().cancelled_owned());
        Self { inner, pass: Arc::clone(pass), cut, entered, ended: false }
    }
}

impl http_body::Body for Cuttable {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        if self.cut.as_mut().poll(cx).is_pending() {
            return Pin::new(&mut self.inner).poll_frame(cx);
        }
        self.ended = true;
        // Dropped at once: what the handler holds for the stream must not wait for a slow reader.
        self.inner = Body::empty();
        let status = status(&self.pass.why());
        // A request has no trailers; its handler sees the error.
        if self.entered.is_none() {
            return Poll::Ready(Some(Err(status)));
        }
        let mut trailers = http::HeaderMap::new();
        Poll::Ready(Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
