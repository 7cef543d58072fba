//! Executions: reading them.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId, OperationId};

use super::{Store, StoreError};
use crate::operation::{ExecutionError, ExecutionState, WaitReason};

/// A stored execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutionRow {
    /// Its id.
    pub id: ExecutionId,
    /// Where it is.
    pub state: ExecutionState,
    /// What it waits for, when PENDING.
    pub wait_reason: Option<WaitReason>,
    /// What the node is doing.
    pub phase: String,
    /// Bytes of the phase that are done.
    pub bytes_done: u64,
    /// Bytes of the phase in all; 0: unknown.
    pub bytes_total: u64,
    /// Why it did not succeed.
    pub error: Option<ExecutionError>,
    /// How often it was delivered.
    pub attempt: u32,
    /// The last sequence of the node that was committed.
    pub sequence: u64,
    /// Past its deadline.
    pub overdue: bool,
    /// When it becomes overdue.
    pub deadline: Option<DateTime<Utc>>,
    /// A cancel was asked for.
    pub cancel_requested: bool,
    /// The node said that it is too late for a cancel.
    pub cancel_refused: bool,
    /// When it last changed.
    pub update_time: DateTime<Utc>,
    /// When it was last assigned.
    pub assign_time: Option<DateTime<Utc>>,
    /// When it ended.
    pub finish_time: Option<DateTime<Utc>>,
    /// The node's boot id when it was assigned; empty before.
    pub assign_boot_id: String,
    /// The boot id with which the node came back; empty before.
    pub boot_id: String,
}

impl Store {
    /// Executions of an operation, by node.
    pub async fn executions(
        &self,
        operation: &OperationId,
        after: Option<&NodeId>,
        limit: u32,
        states: &[ExecutionState],
    ) -> Result<Vec<ExecutionRow>, StoreError> {
        let _ = (operation, after, limit, states);
        todo!()
    }

    /// One execution.
    pub async fn execution(&self, id: &ExecutionId) -> Result<Option<ExecutionRow>, StoreError> {
        let _ = id;
        todo!()
    }
}
