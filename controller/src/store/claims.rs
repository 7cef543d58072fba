//! Giving executions to nodes.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};

use super::{Store, StoreError};
use crate::operation::{Action, ExecutionState};

/// A delivery of an execution to its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Which execution; its node is the receiver.
    pub execution: ExecutionId,
    /// The number of the delivery.
    pub attempt: u32,
    /// What to do.
    pub action: Action,
    /// The node's board family, for `Update::bootcode_for`; empty: unknown.
    pub family: String,
    /// The state that is stored.
    pub known_state: ExecutionState,
    /// Whether a cancel was asked for meanwhile.
    pub cancel_requested: bool,
}

impl Store {
    /// Assigns to each of these nodes, whose sessions this controller holds, its first due execution if it is free.
    pub async fn claim(
        &self,
        controller_id: &str,
        nodes: &[(NodeId, i64)],
        now: DateTime<Utc>,
    ) -> Result<Vec<Assignment>, StoreError> {
        let _ = (controller_id, nodes, now);
        todo!()
    }
}
