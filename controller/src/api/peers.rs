//! Fetches bytes that this controller lacks from one that has them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use marco_proto::v1;
use marco_proto::v1::artifact_service_client::ArtifactServiceClient;
use marco_proto::v1::download_artifact_response::Part;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::Context;
use super::artifact::{BY_DIGEST, artifact_error};
use super::status::ApiError;
use crate::artifacts::{ArtifactError, Content, Digest};
use crate::identity::peer_log::{cut, of_peer};
use crate::identity::tls::dial;
use crate::store::{ArtifactRow, ControllerRow, Kind, Purpose};
use crate::watchdog::Others;

/// Time for which a caller waits for bytes. The fetch goes on without it, and the caller asks again.
const PATIENCE: Duration = Duration::from_secs(20);
/// Number of tries for callers that cannot ask again, and the pause between them.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_secs(1);
/// Time without data after which another controller is given up.
const IDLE: Duration = Duration::from_secs(30);
/// Interval at which addresses of other controllers are read, and time for one of them to report its health, or whether
/// it has some bytes.
const LOOK: Duration = Duration::from_secs(5);
const HEALTH: Duration = Duration::from_secs(2);

/// Fetches the bytes of an artifact from a live controller that has them; the digest is checked before they are stored.
///
/// # Errors
/// Returns an error if the bytes are not here yet, or if no live controller has them. With only this controller that is
/// final.
pub(super) async fn fetch(context: &Context, row: &ArtifactRow, digest: Digest) -> Result<(), ApiError> {
    let task = {
        let (context, row) = (context.clone(), row.clone());
        async move {
            let stop = context.stop.clone();
            // Dropped at any point, the received bytes are kept for another try.
            tokio::select! {
                () = stop.cancelled() => Err(later("the controller is stopping")),
                fetched = from_anyone(&context, &row, digest) => fetched,
            }
        }
    };
    let task = context.tasks.spawn(task);
    match tokio::time::timeout(PATIENCE, task).await {
        Ok(Ok(fetched)) => fetched,
        Ok(Err(_)) => Err(ApiError::Internal("fetching bytes from another controller failed".to_owned())),
        Err(_) => Err(later("the bytes are being fetched from another controller")),
    }
}

/// Fetches the bytes of an artifact; the error is a sentence.
type Fetcher = Arc<dyn Fn(ArtifactRow, Digest) -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// Fetches bytes for a client that cannot ask again, such as an installer that knows only HTTP. It waits, and then gets
/// the reason if there are none.
pub(crate) fn fetcher(context: &Context) -> Fetcher {
    let context = context.clone();
    Arc::new(move |row, digest| {
        let context = context.clone();
        Box::pin(async move {
            let mut tries: u32 = 1;
            loop {
                match fetch(&context, &row, digest).await {
                    Ok(()) => return Ok(()),
                    // ABORTED is "not yet"; any other error will not change.
                    Err(ApiError::Aborted { .. }) if tries < TRIES && !context.stop.is_cancelled() => {
                        tries += 1;
                        tokio::time::sleep(PAUSE).await;
                    }
                    Err(error) => return Err(error.to_string()),
                }
            }
        })
    })
}

/// Returns those of these artifacts that no other live controller has the bytes of. None are returned if a controller
/// does not answer, because it may have them.
///
/// # Errors
/// Returns the store's error.
pub(super) async fn nowhere(context: &Context, artifacts: Vec<ArtifactRow>) -> Result<Vec<ArtifactRow>, ApiError> {
    let mut missing = artifacts;
    let live = context.store.live_controllers(context.clock.now()).await?;
    for other in live.iter().filter(|other| other.id != context.controller) {
        if missing.is_empty() {
            break;
        }
        let Some(lacked) = lacked_by(context, other, missing).await else {
            tracing::info!(controller = other.id, "another controller does not say which bytes it has");
            return Ok(Vec::new());
        };
        missing = lacked;
    }
    Ok(missing)
}

/// Returns those of these artifacts that another controller has no bytes of; `None`: it does not answer.
async fn lacked_by(context: &Context, other: &ControllerRow, artifacts: Vec<ArtifactRow>) -> Option<Vec<ArtifactRow>> {
    let mut reached = None;
    for address in other.addresses() {
        reached = dial(&context.ca, &context.clock, address).await.ok();
        if reached.is_some() {
            break;
        }
    }
    let mut client = ArtifactServiceClient::new(reached?);
    let mut lacked = Vec::new();
    for row in artifacts {
        // From the end, so that only the header is sent.
        let request = v1::DownloadArtifactRequest { name: format!("{BY_DIGEST}{}", row.sha256), offset: row.size };
        match tokio::time::timeout(HEALTH, client.download_artifact(request)).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) if status.code() == Code::NotFound => lacked.push(row),
            Ok(Err(_)) | Err(_) => return None,
        }
    }
    Some(lacked)
}

/// Asks the health services of the other controllers that were alive when the database last answered.
pub(crate) fn others_serve(context: &Context) -> Others {
    let (context, known) = (context.clone(), Arc::new(Mutex::new(Vec::new())));
    let seen = Arc::clone(&known);
    let (store, clock, own) = (context.store.clone(), Arc::clone(&context.clock), context.controller.clone());
    let stop = context.stop.clone();
    // Read beforehand, because the question comes when the database is away.
    context.tasks.spawn(async move {
        loop {
            if let Ok(live) = store.live_controllers(clock.now()).await {
                let others = live.iter().filter(|other| other.id != own).flat_map(ControllerRow::addresses);
                *seen.lock().unwrap_or_else(PoisonError::into_inner) = others.map(str::to_owned).collect();
            }
            // Dropping the wait on a stop loses nothing.
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    });
    Arc::new(move || {
        let addresses: Vec<String> = known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let context = context.clone();
        Box::pin(async move {
            // All at once: one controller that hangs must not use up the time of the others.
            let asked = addresses.iter().map(|address| tokio::time::timeout(HEALTH, serves(&context, address)));
            futures_util::future::join_all(asked).await.into_iter().any(|answer| answer.unwrap_or(false))
        })
    })
}

async fn serves(context: &Context, address: &str) -> bool {
    let channel = match dial(&context.ca, &context.clock, address).await {
        Ok(channel) => channel,
        Err(error) => {
            let why = crate::chain(&error);
            of_peer!(warn, address, address, error = %cut(&why), "another controller is not reached");
            return false;
        }
    };
    match HealthClient::new(channel).check(HealthCheckRequest::default()).await {
        Ok(answer) => answer.into_inner().status() == ServingStatus::Serving,
        Err(status) => {
            let why = cut(status.message());
            of_peer!(warn, address, address, error = %why, "another controller does not say how it is");
            false
        }
    }
}

fn later(why: &str) -> ApiError {
    ApiError::Aborted { reason: "BYTES_ELSEWHERE", message: format!("{why}; ask again") }
}

async fn from_anyone(context: &Context, row: &ArtifactRow, digest: Digest) -> Result<(), ApiError> {
    let live = context.store.live_controllers(context.clock.now()).await?;
    let others = live.iter().filter(|other| other.id != context.controller);
    let mut failed = None;
    for address in others.flat_map(ControllerRow::addresses) {
        match from_one(context, row, digest, address).await {
            Ok(()) => {
                of_peer!(info, address, artifact = %digest, from = address, "bytes were fetched from another controller");
                return Ok(());
            }
            Err(error) => {
                let why = crate::chain(&error);
                of_peer!(info, address, artifact = %digest, from = address, error = %cut(&why), "bytes were not fetched");
                failed = Some(error);
            }
        }
    }
    // Without a shared database this is the only controller, so waiting cannot help.
    if failed.is_none() && !context.store.is_shared() {
        let message =
            format!("the bytes of {} are gone from the controller's disk; push the file again", row.id.name());
        return Err(ApiError::NotFound { reason: "BYTES_MISSING", message });
    }
    // A controller with the bytes may only be away, so no caller is told that they do not exist.
    Err(failed.unwrap_or_else(|| later("no live controller has the bytes")))
}

async fn from_one(context: &Context, row: &ArtifactRow, digest: Digest, address: &str) -> Result<(), ApiError> {
    let mut upload = match context.artifacts.begin(digest, row.size).await {
        // Another call fetches the same bytes, for this caller too.
        Err(ArtifactError::Busy) => return Err(later("the bytes are being fetched already")),
        begun => begun.map_err(artifact_error)?,
    };
    // A cut fetch continues at its offset, from any controller.
    if upload.offset() < row.size {
        let channel = dial(&context.ca, &context.clock, address).await.map_err(|error| later(&crate::chain(&error)))?;
        // By digest: the name may point at other bytes by now.
        let request = v1::DownloadArtifactRequest { name: format!("{BY_DIGEST}{digest}"), offset: upload.offset() };
        let refused = |status: tonic::Status| later(&format!("{address} says: {}", status.message()));
        let mut client = ArtifactServiceClient::new(channel);
        let mut answers = client.download_artifact(request).await.map_err(refused)?.into_inner();
        while upload.offset() < row.size {
            let answer = tokio::time::timeout(IDLE, answers.message());
            let answer = answer.await.map_err(|_| later("the other controller sends nothing"))?.map_err(refused)?;
            match answer.and_then(|answer| answer.part) {
                // The digest in our own row decides; the peer's header adds nothing.
                Some(Part::Header(_)) => {}
                Some(Part::Chunk(chunk)) => upload.append(chunk.offset, chunk.data).await.map_err(artifact_error)?,
                None => return Err(later("the other controller ended too early")),
            }
        }
    }
    let content = match (row.kind, row.purpose) {
        // It was examined at its push, possibly by older rules.
        (Kind::Image, _) => Content::KnownImage,
        (Kind::Bootcode, Purpose::System) => Content::SystemBootcode,
        (Kind::Bootcode, _) => Content::InstallerBootcode,
    };
    upload.finish(content, |_| {}).await.map_err(|error| later(&crate::chain(&error)))?;
    Ok(())
}
