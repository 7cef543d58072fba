//! Streams that follow the store: a snapshot, then each changed resource whole, coalesced. They survive an outage of
//! the store; the next message is then a snapshot again.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::Duration;

use marco_proto::names::{ExecutionId, NodeId, OperationId};
use marco_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::status::ApiError;
use super::{Context, convert, outbox};
use crate::identity::Caller;
use crate::store::{NodeQuery, StoreError};

/// A response stream.
pub(super) type Stream<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

/// Shortest time between two messages of a stream. Changes in between are sent together.
const COALESCE: Duration = Duration::from_millis(100);
/// Interval at which the store is read even without a hint: another controller may have changed it.
const TICK: Duration = Duration::from_secs(1);
/// Time after which a client that takes no message is cut.
const SLOW: Duration = Duration::from_secs(30);

/// Runs `look` at each change of the store, until it reports the last message or the controller stops. Its last
/// argument is true if everything must be sent, not only changes.
fn follow<T, S, F>(context: Context, mut state: S, look: F) -> Stream<T>
where
    T: Send + 'static,
    S: Send + 'static,
    F: for<'a> Fn(&'a Context, &'a mut S, bool) -> Pin<Box<dyn Future<Output = Result<Look<T>, ApiError>> + Send + 'a>>
        + Send
        + Sync
        + 'static,
{
    // Short, so that a slow client gets newer states instead of many old ones.
    let (sender, receiver) = mpsc::channel(2);
    let tasks = context.tasks.clone();
    tasks.spawn(async move {
        // Before the first look, so that no change falls between the two.
        let mut changes = context.store.subscribe_changes();
        let (mut begun, mut whole) = (false, true);
        loop {
            // Before the look: a change during it must wake the loop again.
            changes.mark_unchanged();
            match look(&context, &mut state, whole).await {
                Ok(Look { message, last }) => {
                    (begun, whole) = (true, false);
                    if let Some(message) = message
                        && outbox::send(&sender, Ok(message), SLOW).await.is_err()
                    {
                        return;
                    }
                    if last {
                        return;
                    }
                }
                // An open stream survives the outage; a new one gets the error at once.
                Err(ApiError::Store(StoreError::Unavailable(_))) if begun => whole = true,
                Err(error) => {
                    // Best effort: a client that does not read is not waited for.
                    let _ = sender.try_send(Err(error.into()));
                    return;
                }
            }
            // Each arm only wakes; the store tells the changes.
            tokio::select! {
                () = context.stop.cancelled() => {
                    let _ = sender.try_send(Err(Status::unavailable("the controller is stopping; watch again")));
                    return;
                }
                () = sender.closed() => return,
                _ = tokio::time::timeout(TICK, changes.changed()) => {}
            }
            // After the wake-up: a burst of changes becomes one message.
            tokio::time::sleep(COALESCE).await;
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

struct Look<T> {
    message: Option<T>,
    last: bool,
}

#[derive(Default)]
struct Seen {
    operation: Option<v1::Operation>,
    executions: BTreeMap<ExecutionId, v1::Execution>,
}

/// Follows an operation until its final state was sent.
pub(super) fn operation(context: Context, caller: Caller, id: OperationId) -> Stream<v1::WatchOperationResponse> {
    follow(context, Seen::default(), move |context, seen, whole| {
        let id = id.clone();
        // The caller's scope can change while it watches.
        let scope = caller.scope();
        Box::pin(async move {
            let row = context.operation_within(&scope, &id).await?;
            let operation = convert::operation(&row);
            let mut changed = Vec::new();
            for row in context.store.executions_within(&scope, &id, None, u32::MAX, &[]).await? {
                let execution = convert::execution(&row);
                if whole || seen.executions.get(&row.id) != Some(&execution) {
                    seen.executions.insert(row.id, execution.clone());
                    changed.push(execution);
                }
            }
            let news = whole || !changed.is_empty() || seen.operation.as_ref() != Some(&operation);
            seen.operation = Some(operation.clone());
            let message =
                news.then_some(v1::WatchOperationResponse { operation: Some(operation), executions: changed });
            Ok(Look { message, last: row.state.is_final() })
        })
    })
}

/// Follows the nodes that a query matches.
pub(super) fn nodes(context: Context, caller: Caller, query: NodeQuery) -> Stream<v1::WatchNodesResponse> {
    follow(context, BTreeMap::<NodeId, v1::Node>::new(), move |context, seen, whole| {
        let query = NodeQuery { scope: caller.scope(), ..query.clone() };
        Box::pin(async move {
            let mut now = BTreeMap::new();
            let mut changed = Vec::new();
            for row in context.store.nodes(&query).await? {
                let node = convert::node(&row);
                // A new `last_seen_time` alone is no change worth a message.
                let differs = seen.get(&row.id).is_none_or(|old| {
                    v1::Node { last_seen_time: None, ..old.clone() }
                        != v1::Node { last_seen_time: None, ..node.clone() }
                });
                if whole || differs {
                    changed.push(node.clone());
                }
                now.insert(row.id, node);
            }
            let deleted: Vec<String> = seen.keys().filter(|id| !now.contains_key(*id)).map(NodeId::name).collect();
            let news = whole || !changed.is_empty() || !deleted.is_empty();
            *seen = now;
            // A node that no longer matches the filter is gone for this client, like a deleted one.
            let message = news.then_some(v1::WatchNodesResponse { nodes: changed, deleted });
            Ok(Look { message, last: false })
        })
    })
}
