//! What happened to operations, numbered.

use chrono::{DateTime, Utc};
use marco_proto::names::{NodeId, OperationId};

use super::{Store, StoreError};

/// Something that happened to an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// Within the operation, from 1, without gaps.
    pub number: u64,
    /// When.
    pub time: DateTime<Utc>,
    /// The node that it concerns; `None`: the operation itself.
    pub node: Option<NodeId>,
    /// Who or what caused it: `controller`, a node's name or a user.
    pub actor: String,
    /// The state before; empty at creation.
    pub from: String,
    /// The state after.
    pub to: String,
    /// Why.
    pub reason: String,
}

impl Store {
    /// Events of an operation after a number, oldest first.
    pub async fn events(&self, operation: &OperationId, after: u64, limit: u32) -> Result<Vec<EventRow>, StoreError> {
        let _ = (operation, after, limit);
        todo!()
    }
}
