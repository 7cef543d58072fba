//! Limits on concurrent downloads. Each holds a file, and data that is read ahead of a slow reader.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use marco_proto::names::{MESSAGE_SIZE, NodeId};
use marco_proto::v1;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tonic::Status;

use super::Context;
use super::artifact::artifact_error;
use super::status::ApiError;
use crate::artifacts::BlobReader;
use crate::identity::Caller;
use crate::identity::roles::Role;
use crate::store::Allowance;

/// Downloads in all. Each holds at most about 1 MiB: one message that is read ahead, one that waits, and the data that
/// HTTP/2 has buffered for the connection.
pub(crate) const ALL: usize = 1024;
/// Downloads of one node: one, and those of connections that broke silently.
pub(crate) const OF_A_NODE: usize = 4;
/// Downloads of one person or service.
pub(crate) const OF_A_PERSON: usize = 8;
/// Downloads of one other controller, which fetches for its nodes.
pub(crate) const OF_A_CONTROLLER: usize = 64;
/// Time without progress of the reader after which a download is cut.
const DOWNLOAD_IDLE: Duration = Duration::from_secs(60);
/// Messages of a download that wait for the connection, 256 KiB each.
pub(crate) const DOWNLOAD_QUEUE: usize = 1;
/// Interval at which a node's permission to download is checked again.
const RECHECK: Duration = Duration::from_secs(3);
/// Time for which a caller waits for a place before it must ask again.
const PATIENCE: Duration = Duration::from_secs(20);

/// The downloads of this controller.
#[derive(Debug, Clone)]
pub struct Downloads {
    all: Arc<Semaphore>,
    callers: Arc<Mutex<HashMap<String, usize>>>,
}

impl Downloads {
    /// The limit follows the number of open files that the system allows.
    pub fn new(open_files: usize) -> Self {
        Self { all: Arc::new(Semaphore::new((open_files / 16).clamp(1, ALL))), callers: Arc::default() }
    }

    fn callers(&self) -> MutexGuard<'_, HashMap<String, usize>> {
        self.callers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a download.
    ///
    /// # Errors
    /// Returns an error if the caller has too many downloads, or if no place was free in time.
    pub(super) async fn begin(&self, caller: &Caller) -> Result<Underway, ApiError> {
        self.begin_within(caller, PATIENCE).await
    }

    async fn begin_within(&self, caller: &Caller, patience: Duration) -> Result<Underway, ApiError> {
        let most = match caller.role {
            Role::Node => OF_A_NODE,
            Role::Controller => OF_A_CONTROLLER,
            Role::Viewer | Role::Operator | Role::Publisher | Role::Admin => OF_A_PERSON,
        };
        // With the role, because callers of different roles may share a name.
        let key = format!("{}/{}", caller.role, caller.name);
        // Counted before the wait for a place, so that one caller cannot fill the queue.
        let counted = {
            let mut callers = self.callers();
            let count = callers.entry(key.clone()).or_default();
            if *count >= most {
                return Err(ApiError::Exhausted {
                    reason: "TOO_MANY_DOWNLOADS",
                    message: format!("{} has {most} downloads under way; wait until one of them ends", caller.name),
                });
            }
            *count += 1;
            Counted { downloads: self.clone(), key }
        };
        let place = tokio::time::timeout(patience, Arc::clone(&self.all).acquire_owned()).await;
        let Ok(Ok(place)) = place else {
            return Err(ApiError::Aborted {
                reason: "DOWNLOADS_BUSY",
                message: "as many downloads are under way as there may be; ask again".to_owned(),
            });
        };
        Ok(Underway { _counted: counted, _place: place })
    }
}

#[derive(Debug)]
struct Counted {
    downloads: Downloads,
    key: String,
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut callers = self.downloads.callers();
        if let Some(count) = callers.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                // Otherwise the map would keep every caller that ever downloaded.
                callers.remove(&self.key);
            }
        }
    }
}

/// A download under way, until this is dropped.
#[derive(Debug)]
pub(super) struct Underway {
    _counted: Counted,
    _place: OwnedSemaphorePermit,
}

/// Returns an error unless the node's work names the bytes, or they are a default of its board.
pub(super) async fn check_node(context: &Context, node: &NodeId, sha256: &str) -> Result<(), ApiError> {
    // An image holds Wi-Fi keys and password hashes: a node reads only the bytes of its own work.
    match context.store.node_may_have(node, sha256).await? {
        Allowance::Granted => Ok(()),
        Allowance::NotAsked => Err(ApiError::Forbidden {
            reason: "ARTIFACT_NOT_ASKED",
            message: format!(
                "nothing that {} does names these bytes, and they are not its board's default",
                node.name()
            ),
        }),
        Allowance::NotApproved => Err(ApiError::Forbidden {
            reason: "NODE_NOT_APPROVED",
            message: format!("{} is held or quarantined and gets no bytes; an admin approves it", node.name()),
        }),
    }
}

/// A download under way.
pub(super) struct Sending {
    pub(super) context: Context,
    pub(super) reader: BlobReader,
    /// The reading node and the digest; `None`: a person or another controller, whose call the gate checks.
    pub(super) node: Option<(NodeId, String)>,
    pub(super) answers: mpsc::Sender<Result<v1::DownloadArtifactResponse, Status>>,
    pub(super) underway: Underway,
}

/// Sends the bytes from an offset on, as fast as they are taken.
pub(super) async fn send_blob(sending: Sending, mut offset: u64) {
    let Sending { context, reader, node, answers, underway: _underway } = sending;
    let stop = context.stop.clone();
    let mut checked = Instant::now();
    while offset < reader.size() {
        if let Some((node, sha256)) = &node
            && checked.elapsed() >= RECHECK
        {
            checked = Instant::now();
            // While the database is away, an admitted node goes on.
            if let Err(refused @ ApiError::Forbidden { .. }) = check_node(&context, node, sha256).await {
                let _ = tokio::time::timeout(DOWNLOAD_IDLE, answers.send(Err(refused.into()))).await;
                return;
            }
        }
        let message = match reader.read_chunk(offset, MESSAGE_SIZE).await {
            Ok(data) if data.is_empty() => Err(Status::from(ApiError::Internal("stored bytes are missing".to_owned()))),
            Ok(data) => Ok(data),
            Err(error) => Err(Status::from(artifact_error(error))),
        };
        let failed = message.is_err();
        let length = message.as_ref().map_or(0, Bytes::len);
        let message = message.map(|data| v1::DownloadArtifactResponse {
            part: Some(v1::download_artifact_response::Part::Chunk(v1::Chunk { offset, data })),
        });
        // Dropping the send on cancellation loses one message of a download that ends anyway and is resumed by offset.
        tokio::select! {
            () = stop.cancelled() => {
                let _ = answers.try_send(Err(Status::unavailable("the controller is stopping; resume at the offset reached")));
                return;
            }
            sent = tokio::time::timeout(DOWNLOAD_IDLE, answers.send(message)) => {
                if !matches!(sent, Ok(Ok(()))) || failed {
                    return;
                }
            }
        }
        offset += u64::try_from(length).unwrap_or(u64::MAX);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use futures_util::FutureExt as _;

    use super::{Downloads, OF_A_CONTROLLER, OF_A_NODE, OF_A_PERSON, Underway};
    use crate::api::status::ApiError;
    use crate::identity::roles::Role;
    use crate::identity::{Caller, Pass};
    use crate::store::Scope;

    fn caller(role: Role, name: &str) -> Caller {
        Caller {
            name: name.to_owned(),
            role,
            node: None,
            from: "127.0.0.1:1".parse().unwrap(),
            serial: String::new(),
            api_token: None,
            pass: Arc::new(Pass::new(Scope::everything())),
        }
    }

    fn reason(begun: Result<Underway, ApiError>) -> &'static str {
        match begun {
            Err(ApiError::Exhausted { reason, .. } | ApiError::Aborted { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn downloads_in_all_are_bounded() {
        // A sixteenth of the open files: two places.
        let downloads = Downloads::new(32);
        let nodes = ["a", "b", "c", "d"].map(|name| caller(Role::Node, name));
        let first = downloads.begin(&nodes[0]).await.unwrap();
        let _second = downloads.begin(&nodes[1]).await.unwrap();
        let mut third = Box::pin(downloads.begin(&nodes[2]));
        assert!(third.as_mut().now_or_never().is_none(), "a third place was given");
        assert_eq!(reason(downloads.begin_within(&nodes[3], Duration::ZERO).await), "DOWNLOADS_BUSY");
        drop(first);
        // The place goes to the one that waits.
        let third = third.await.unwrap();
        assert_eq!(reason(downloads.begin_within(&nodes[3], Duration::ZERO).await), "DOWNLOADS_BUSY");
        drop(third);
        drop(downloads.begin(&nodes[3]).await.unwrap());
        // Those that ended or gave up are not counted any more.
        assert_eq!(downloads.callers().len(), 1, "{downloads:?}");
    }

    #[tokio::test]
    async fn each_kind_of_caller_has_so_many_downloads() {
        let downloads = Downloads::new(1 << 20);
        for (role, most) in [
            (Role::Node, OF_A_NODE),
            (Role::Publisher, OF_A_PERSON),
            (Role::Admin, OF_A_PERSON),
            (Role::Controller, OF_A_CONTROLLER),
        ] {
            let greedy = caller(role, "greedy");
            let mut begun = Vec::new();
            for _ in 0..most {
                begun.push(downloads.begin(&greedy).await.unwrap());
            }
            assert_eq!(reason(downloads.begin(&greedy).await), "TOO_MANY_DOWNLOADS");
            downloads.begin(&caller(role, "other")).await.unwrap();
            begun.pop();
            downloads.begin(&greedy).await.unwrap();
        }
    }
}
