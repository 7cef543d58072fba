//! Calls that run to their end even if their caller leaves. HTTP/2 drops the work of a stream that is reset and of a
//! connection that closes, and a change must not be stored without its record.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tonic::body::Body;
use tonic_types::{ErrorDetails, StatusExt as _};

use marco_proto::codec::undecodable;

use super::gate::DOMAIN;
use crate::store::deadline;

/// Largest message of a caller. Bodies are small except for artifacts, whose chunks are 256 KiB.
pub const MAX_MESSAGE: usize = 1024 * 1024;
/// Bytes before a gRPC message: a flag and its length.
const MESSAGE_HEAD: usize = 5;
/// Calls at work at a time. Others wait, and are dropped with their callers. Without a bound a client that calls and
/// leaves again and again would fill the memory. The database has a dozen connections for writing.
const ROOM: usize = 256;

/// Runs such calls as tasks, which the server awaits at its end.
#[derive(Debug, Clone)]
pub struct Calls {
    tasks: TaskTracker,
    room: Arc<Semaphore>,
}

impl Calls {
    /// Calls of one listener, as tasks of the server.
    pub fn new(tasks: TaskTracker) -> Self {
        Self { tasks, room: Arc::new(Semaphore::new(ROOM)) }
    }

    /// Runs the work as a task of its own. Dropping the wait for a place loses nothing, because nothing has begun.
    /// Dropping the wait for the answer loses only the answer.
    pub(super) async fn finish(
        &self,
        work: impl Future<Output = http::Response<Body>> + Send + 'static,
    ) -> http::Response<Body> {
        let Ok(room) = Arc::clone(&self.room).acquire_owned().await else { return failed().into_http() };
        // A task of the tracker, which the server awaits when it stops.
        let task = self.tasks.spawn(deadline::carried(async move {
            let _room = room;
            work.await
        }));
        task.await.unwrap_or_else(|error| {
            tracing::error!(error = &*crate::chain(&error), "a call ended before its time");
            failed().into_http()
        })
    }

    /// Runs short work, which is bounded elsewhere, as a task of its own.
    pub(super) async fn note(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Err(error) = self.tasks.spawn(deadline::carried(work)).await {
            tracing::error!(error = &*crate::chain(&error), "a call could not be recorded");
        }
    }
}

fn failed() -> Status {
    let details = ErrorDetails::with_error_info("INTERNAL", DOMAIN, []);
    Status::with_error_details(tonic::Code::Internal, "the call failed within the controller", details)
}

/// Reads a request's one message whole, so that half a message begins no work and takes no place.
///
/// # Errors
/// Returns the status to answer with if the message is too large or did not arrive.
pub(super) async fn whole(request: http::Request<Body>, most: usize) -> Result<http::Request<Body>, Status> {
    let (parts, body) = request.into_parts();
    let bytes = match Limited::new(body, most + MESSAGE_HEAD).collect().await {
        Ok(collected) => collected.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            return Err(Status::out_of_range(format!("a message may have {most} bytes, and this one has more")));
        }
        Err(error) => {
            let status = error.downcast::<Status>().map(|status| *status);
            return Err(status.unwrap_or_else(|_| Status::cancelled("the request ended before its message did")));
        }
    };
    framed(&bytes)?;
    Ok(http::Request::from_parts(parts, Body::new(Full::new(bytes))))
}

/// Checks that the body is exactly one message (gRPC over HTTP/2, "Length-Prefixed-Message"). tonic answers INTERNAL
/// otherwise, as if the controller were broken.
fn framed(body: &[u8]) -> Result<(), Status> {
    let Some(([flag, length @ ..], message)) = body.split_first_chunk::<MESSAGE_HEAD>() else {
        return Err(undecodable("the body holds no message"));
    };
    // 1 is a compressed message, which tonic refuses with its own status.
    if *flag > 1 {
        return Err(undecodable("the byte before the message's length is neither 0 nor 1"));
    }
    if usize::try_from(u32::from_be_bytes(*length)).ok() != Some(message.len()) {
        return Err(undecodable("the body is longer or shorter than its message says"));
    }
    Ok(())
}

/// Runs every call of a listener to its end.
#[derive(Clone)]
pub struct CallsLayer {
    calls: Calls,
    most: usize,
}

impl CallsLayer {
    /// Calls run as tasks of the server; messages may have `most` bytes.
    pub fn new(tasks: TaskTracker, most: usize) -> Self {
        Self { calls: Calls::new(tasks), most }
    }
}

impl<S> tower::Layer<S> for CallsLayer {
    type Service = Finished<S>;
    fn layer(&self, inner: S) -> Finished<S> {
        Finished { inner, calls: self.calls.clone(), most: self.most }
    }
}

/// A service whose calls run to their end.
#[derive(Clone)]
pub struct Finished<S> {
    inner: S,
    calls: Calls,
    most: usize,
}

impl<S> tower::Service<http::Request<Body>> for Finished<S>
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

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        // Only the instance that was polled ready may be called; its clone is made ready for the next call.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        let (calls, most) = (self.calls.clone(), self.most);
        Box::pin(deadline::of_caller(async move {
            // Before the task: a client that never completes its message must not hold one of the places.
            let request = match whole(request, most).await {
                Ok(request) => request,
                Err(status) => return Ok(status.into_http()),
            };
            Ok(calls.finish(async move { inner.call(request).await.unwrap_or_else(|never| match never {}) }).await)
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt as _;
    use tokio::sync::watch;

    use super::*;

    #[test]
    fn bodies_that_are_no_message_blame_the_caller() {
        for body in [&b""[..], b"\0\0\0", b"\0\0\0\0\x02a", b"\0\0\0\0\x01ab", b"\x02\0\0\0\0", b"\0\xff\xff\xff\xffa"]
        {
            assert_eq!(framed(body).unwrap_err().code(), tonic::Code::InvalidArgument, "{body:?}");
        }
        for body in [&b"\0\0\0\0\0"[..], b"\x01\0\0\0\x01a"] {
            framed(body).unwrap();
        }
    }

    #[tokio::test]
    async fn whoever_asks_and_leaves_again_and_again_has_no_more_at_work_than_there_is_room_for() {
        let calls = Calls::new(TaskTracker::new());
        let (let_go, held) = watch::channel(false);
        let done = Arc::new(AtomicUsize::new(0));
        for _ in 0..2 * ROOM {
            let (mut held, done) = (held.clone(), Arc::clone(&done));
            let call = calls.finish(async move {
                held.wait_for(|go| *go).await.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
                http::Response::new(Body::empty())
            });
            // Dropped before it is answered.
            assert!(call.now_or_never().is_none());
            tokio::task::yield_now().await;
        }
        assert_eq!(calls.tasks.len(), ROOM);
        let_go.send(true).unwrap();
        calls.tasks.close();
        calls.tasks.wait().await;
        // The calls that had begun are done all the same.
        assert_eq!(done.load(Ordering::Relaxed), ROOM);
        let answered = calls.finish(async { http::Response::new(Body::empty()) }).await;
        assert!(answered.headers().is_empty(), "there is room again");
        assert!(calls.finish(async { panic!("a handler that does") }).await.headers().contains_key("grpc-status"));
    }
}
