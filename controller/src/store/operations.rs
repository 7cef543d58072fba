//! Operations: storing and reading them.

use chrono::{DateTime, Utc};
use marco_proto::names::{NodeId, OperationId};

use super::{Store, StoreError};
use crate::operation::{Action, Counts, OperationState, Target};

/// An operation to be stored.
#[derive(Debug, Clone)]
pub struct NewOperation {
    /// Its id, a fresh UUID of version 7.
    pub id: OperationId,
    /// What to do, frozen.
    pub action: Action,
    /// On which nodes, as asked for.
    pub target: Target,
    /// On which nodes, resolved; each once.
    pub nodes: Vec<NodeId>,
    /// When it begins.
    pub schedule_time: DateTime<Utc>,
    /// After which nothing of it is begun.
    pub expire_time: DateTime<Utc>,
    /// Who asks.
    pub creator: String,
    /// By which the same request is known again.
    pub request: Option<RequestKey>,
    /// The operation that this one retries.
    pub retry_of: Option<OperationId>,
}

/// By which a repeated request is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestKey {
    /// Chosen by the caller.
    pub request_id: String,
    /// SHA-256 of the request's body, lower-case hexadecimal.
    pub body_sha256: String,
}

/// What became of a request to store an operation.
#[derive(Debug, Clone)]
pub enum CreateOutcome {
    /// It is stored.
    Created(OperationRow),
    /// It was stored by an earlier request of the same caller, id and body.
    Existing(OperationRow),
    /// The caller used the request id for another body.
    RequestReused,
}

/// A stored operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperationRow {
    /// Its id.
    pub id: OperationId,
    /// What to do.
    pub action: Action,
    /// On which nodes, as asked for.
    pub target: Target,
    /// Where it is.
    pub state: OperationState,
    /// Why it is paused, if it is and a reason was given; else empty.
    pub state_reason: String,
    /// When it begins.
    pub schedule_time: DateTime<Utc>,
    /// After which nothing of it is begun.
    pub expire_time: DateTime<Utc>,
    /// Who asked for it.
    pub creator: String,
    /// The operation that it retries.
    pub retry_of: Option<OperationId>,
    /// When it was stored.
    pub create_time: DateTime<Utc>,
    /// When it or one of its executions last changed its state.
    pub update_time: DateTime<Utc>,
    /// When it ended.
    pub finish_time: Option<DateTime<Utc>>,
    /// How many events it has; also the number of the last.
    pub event_count: u64,
    /// How many executions are in which state.
    pub counts: Counts,
}

/// Which operations to list; what is empty does not restrict.
#[derive(Debug, Clone, Default)]
pub struct OperationQuery {
    /// Only older ones than this.
    pub after: Option<OperationId>,
    /// How many at most.
    pub limit: u32,
    /// In one of these states.
    pub states: Vec<OperationState>,
    /// With an execution on this node.
    pub node: Option<NodeId>,
}

impl Store {
    /// Stores an operation, its executions and its first event, or finds the one that the same request stored.
    pub async fn create_operation(&self, new: &NewOperation, now: DateTime<Utc>) -> Result<CreateOutcome, StoreError> {
        let _ = (new, now);
        todo!()
    }

    /// An operation with its counts.
    pub async fn operation(&self, id: &OperationId) -> Result<Option<OperationRow>, StoreError> {
        let _ = id;
        todo!()
    }

    /// Operations, newest first.
    pub async fn operations(&self, query: &OperationQuery) -> Result<Vec<OperationRow>, StoreError> {
        let _ = query;
        todo!()
    }
}
