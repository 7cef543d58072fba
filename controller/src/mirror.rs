//! The file mirror of the 2015 system: images and boot files over HTTPS, as they were pushed, for clients with a
//! certificate. Installers of that time fetch from it with wget.

mod answer;
mod body;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use marco_proto::names::ArtifactId;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::limit::RequestBodyLimitLayer;
use tower_http::timeout::TimeoutLayer;

use crate::artifacts::{ArtifactError, Artifacts, BlobReader, Digest};
use crate::identity::access::Access;
use crate::identity::gate::record_refused_file;
use crate::identity::peer_log::{cut, of_peer};
use crate::identity::tls::places::MIRROR_PLACES;
use crate::identity::tls::{Acceptor, PeerInfo, TlsConn, incoming};
use crate::identity::{Caller, Denied};
use crate::store::{Allowance, ArtifactRow, Kind, Store, StoreError};
use answer::File;

/// Time until an answer begins; bytes may have to come from another controller first.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(300);
/// Headers of a request: wget sends six.
const MAX_HEADERS: usize = 64;
/// Bytes of a request's head, and of an answer that wait for the connection.
const MAX_BUFFER: usize = 64 << 10;
/// Largest request body. No request has one, but a client that sends a few bytes gets no error for it.
const MAX_BODY: usize = 4 << 10;
/// Time for downloads that are under way when the controller stops. Clients resume them at another controller.
const GRACE: Duration = Duration::from_secs(3);

/// Fetches bytes that this controller lacks; the error is a sentence for the client.
pub type Fetch = Arc<dyn Fn(ArtifactRow, Digest) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

type Connection = http1::Connection<TokioIo<Pin<Box<TimeoutStream<TlsConn>>>>, TowerToHyperService<Router>>;

/// Timeouts and limits of the mirror.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For a connection that sends no whole request.
    pub head: Duration,
    /// For a connection that takes no bytes.
    pub write: Duration,
    /// Interval at which a reader's permission is checked again.
    pub recheck: Duration,
    /// Connections with an accepted credential at a time; further ones wait until one ends.
    pub crowd: usize,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(20),
            write: Duration::from_secs(60),
            recheck: Duration::from_secs(3),
            crowd: MIRROR_PLACES,
        }
    }
}

/// The parts of the controller that the mirror uses.
#[derive(Clone)]
pub struct Mirror {
    /// Artifact names and certificates.
    pub store: Store,
    /// Admits callers and records refusals.
    pub access: Arc<Access>,
    /// The stored bytes.
    pub artifacts: Arc<Artifacts>,
    /// Fetches bytes that another controller has.
    pub fetch: Fetch,
    /// Timeouts and limits of connections.
    pub patience: Patience,
}

/// The reason why a request gets no file.
#[derive(Debug, thiserror::Error)]
enum Unserved {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("the node is held: an admin approves it")]
    Held,
    #[error(
        "nothing that this node does names these bytes; `marcoctl artifacts open NAME --mirror` lets every approved node \
         fetch them"
    )]
    NotAsked,
    #[error("{0}")]
    NotFound(String),
    #[error("the bytes are not here yet: {0}; ask again")]
    Elsewhere(String),
    #[error("the database is not there at the moment; ask again")]
    Database(#[source] StoreError),
    #[error("the controller cannot read the file")]
    Bytes(#[source] ArtifactError),
}

impl IntoResponse for Unserved {
    fn into_response(self) -> Response {
        let (status, retry) = match &self {
            Self::Denied(Denied::Unavailable) => (StatusCode::SERVICE_UNAVAILABLE, true),
            // The handshake verified the certificate, so 401, which asks for another one, would not help.
            Self::Denied(_) | Self::Held | Self::NotAsked => (StatusCode::FORBIDDEN, false),
            Self::NotFound(_) => (StatusCode::NOT_FOUND, false),
            Self::Elsewhere(_) | Self::Database(_) => (StatusCode::SERVICE_UNAVAILABLE, true),
            Self::Bytes(_) => (StatusCode::INTERNAL_SERVER_ERROR, false),
        };
        if matches!(self, Self::Database(_) | Self::Bytes(_)) {
            of_peer!(error, "the mirror", error = &*crate::chain(&self), "the mirror could not answer");
        }
        let mut response = (status, format!("{self}\n")).into_response();
        if status == StatusCode::FORBIDDEN {
            // The connection is closed, so that its place is free for others.
            response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
        }
        if retry {
            response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("5"));
        }
        response
    }
}

impl Mirror {
    /// Serves until `stop`; downloads under way then get `GRACE`.
    pub async fn serve(self, listener: TcpListener, acceptor: Acceptor, stop: CancellationToken) {
        let router = router(self.clone());
        let room = Arc::new(Semaphore::new(self.patience.crowd));
        let graceful = GracefulShutdown::new();
        let mut connections = JoinSet::new();
        let mut accepted = incoming(listener, acceptor);
        loop {
            // On a stop the pending `next` is dropped, and with it a connection that was not accepted yet.
            let next = tokio::select! {
                () = stop.cancelled() => break,
                next = accepted.next() => next,
            };
            let Some(connection) = next else { break };
            let Ok(connection) = connection else { continue };
            // Refused connections take no place here: the listener already limits those that wait for their answer.
            let room = connection.peer().connection.is_accepted().then(|| Arc::clone(&room));
            let served = graceful.watch(self.connection(connection, &router));
            connections.spawn(async move {
                // A task that still waits for its place is aborted on a stop.
                let _place = match room {
                    Some(room) => room.acquire_owned().await.ok(),
                    None => None,
                };
                if let Err(error) = served.await {
                    tracing::debug!(%error, "a connection of the mirror broke");
                }
            });
            // Ended tasks would otherwise stay in the set, with their results, until the stop.
            while connections.try_join_next().is_some() {}
        }
        drop(accepted);
        let _ = tokio::time::timeout(GRACE, graceful.shutdown()).await;
        connections.shutdown().await;
    }

    fn connection(&self, connection: TlsConn, router: &Router) -> Connection {
        let service = router.clone().layer(axum::Extension(connection.peer().clone()));
        // hyper has no timeout for writing: a client that stops reading would hold its place.
        let mut stream = TimeoutStream::new(connection);
        stream.set_write_timeout(Some(self.patience.write));
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.patience.head)
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_BUFFER)
            .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(service))
    }

    /// Checks if the caller may read these bytes. For people the role has decided already; a node needs work that names
    /// the bytes, or an artifact that is open to the mirror.
    async fn check(&self, caller: &Caller, row: &ArtifactRow) -> Result<(), Unserved> {
        let Some(node) = &caller.node else { return Ok(()) };
        match self.store.node_may_have(node, &row.sha256).await.map_err(Unserved::Database)? {
            Allowance::NotApproved => Err(Unserved::Held),
            Allowance::Granted => Ok(()),
            // An installer of 2015 has no operation; it asks by a name that is on its card.
            Allowance::NotAsked if row.open_to_mirror => Ok(()),
            Allowance::NotAsked => Err(Unserved::NotAsked),
        }
    }

    /// The file for this caller; a refusal is recorded in the audit.
    async fn file(&self, asked: &Asked, row: ArtifactRow, content_type: &'static str) -> Result<File, Unserved> {
        // Before the bytes are fetched from elsewhere, which costs another controller work.
        if let Err(refused) = self.check(&asked.caller, &row).await {
            if matches!(refused, Unserved::Held | Unserved::NotAsked) {
                let (why, path) = (refused.to_string(), row.id.name());
                record_refused_file(&self.access, Some(&asked.caller), Some(&asked.peer), &path, &why).await;
            }
            return Err(refused);
        }
        let digest = Digest::parse(&row.sha256).map_err(Unserved::Bytes)?;
        let reader = match self.artifacts.reader(digest).await {
            // Each controller may have a disk of its own; then the bytes are where they were pushed.
            Err(ArtifactError::NotFound(_)) => {
                (self.fetch)(row.clone(), digest).await.map_err(Unserved::Elsewhere)?;
                self.artifacts.reader(digest).await
            }
            found => found,
        };
        let reader: BlobReader = reader.map_err(Unserved::Bytes)?;
        Ok(File { reader, digest, modified: row.push_time.into(), content_type })
    }

    async fn find(&self, id: &str, kind: Kind) -> Result<Option<ArtifactRow>, Unserved> {
        // A text that cannot be an id names no artifact.
        let Ok(id) = ArtifactId::parse(id) else { return Ok(None) };
        let row = self.store.artifact(&id).await.map_err(Unserved::Database)?;
        Ok(row.filter(|row| row.kind == kind))
    }
}

/// The caller of a request and its connection.
#[derive(Clone)]
struct Asked {
    caller: Caller,
    peer: PeerInfo,
}

fn router(mirror: Mirror) -> Router {
    Router::new()
        .route("/tar/{file}", get(image))
        .route("/bootcode/download/{file}", get(bootcode))
        .fallback(|| async {
            Unserved::NotFound("there is /tar/IMAGE.tar.gz and /bootcode/download/BOOTCODE here".to_owned())
        })
        .layer(from_fn_with_state(mirror.clone(), gate))
        .layer(RequestBodyLimitLayer::new(MAX_BODY))
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, ANSWER_TIMEOUT))
        // A defect costs one answer, not the connection's task.
        .layer(CatchPanicLayer::new())
        .with_state(mirror)
}

/// Admits the caller before anything is looked up, by the same table as the API: a refused caller does not learn which
/// files exist.
async fn gate(State(mirror): State<Mirror>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<PeerInfo>().cloned();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let (response, name) = match mirror.access.admit_file(peer.as_ref()).await {
        Ok(caller) => {
            if let Some(peer) = &peer {
                peer.connection.accept(caller.role, &caller.name);
            }
            let name = caller.name.clone();
            // Callers are admitted only with a peer, so this is always set.
            if let Some(peer) = peer.clone() {
                request.extensions_mut().insert(Asked { caller, peer });
            }
            (next.run(request).await, Some(name))
        }
        Err((denied, caller)) => {
            // The store is away: that is no refusal, and the audit is in the store as well.
            if denied != Denied::Unavailable {
                let why = denied.to_string();
                record_refused_file(&mirror.access, caller.as_ref(), peer.as_ref(), &path, &why).await;
            }
            (Unserved::from(denied).into_response(), None)
        }
    };
    let status = response.status().as_u16();
    let caller = name.as_deref().unwrap_or_default();
    match (&name, &peer) {
        (Some(name), _) => of_peer!(info, name.as_str(), %method, path = %cut(&path), status, caller, "mirror"),
        (None, Some(peer)) => of_peer!(info, peer.addr, %method, path = %cut(&path), status, "mirror"),
        (None, None) => {}
    }
    response
}

/// An image, under its id with the suffix `.tar.gz`, which the 2015 installer appends.
async fn image(
    State(mirror): State<Mirror>,
    axum::Extension(asked): axum::Extension<Asked>,
    Path(file): Path<String>,
    request: Request,
) -> Result<Response, Unserved> {
    let unknown = |why: &str| Unserved::NotFound(format!("{why}; `marcoctl artifacts list` shows what there is"));
    let id = file.strip_suffix(".tar.gz").ok_or_else(|| unknown("an image is /tar/ID.tar.gz"))?;
    let row = mirror.find(id, Kind::Image).await?.ok_or_else(|| unknown("there is no image of this name"))?;
    // Installers of the 2015 system unpack gzip only.
    if row.compression != "gzip" {
        return Err(unknown("this image is no gzip tarball: push it as .tar.gz for installers of the 2015 system"));
    }
    let file = mirror.file(&asked, row.clone(), "application/gzip").await?;
    Ok(file.answer(request.headers(), body::Reader { mirror, asked, row }))
}

/// Boot files, under their id, with or without `.zip`.
async fn bootcode(
    State(mirror): State<Mirror>,
    axum::Extension(asked): axum::Extension<Asked>,
    Path(file): Path<String>,
    request: Request,
) -> Result<Response, Unserved> {
    let mut row = mirror.find(&file, Kind::Bootcode).await?;
    if let (None, Some(id)) = (&row, file.strip_suffix(".zip")) {
        row = mirror.find(id, Kind::Bootcode).await?;
    }
    let unknown = || "there are no boot files of this name; `marcoctl artifacts list` shows what there is".to_owned();
    let row = row.ok_or_else(|| Unserved::NotFound(unknown()))?;
    let file = mirror.file(&asked, row.clone(), "application/zip").await?;
    Ok(file.answer(request.headers(), body::Reader { mirror, asked, row }))
}

#[cfg(test)]
mod tests;
