//! Which controller holds the stream of which node.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::{Board, NodeRow, Store, StoreError, System};
use crate::operation::NodeMode;

/// A Hello, as far as the store needs it.
#[derive(Debug, Clone)]
pub struct SessionStart {
    /// The controller that holds the stream.
    pub controller_id: String,
    /// When it accepted the connection.
    pub accept_time: DateTime<Utc>,
    /// The node's boot id.
    pub boot_id: String,
    /// The role of its agent.
    pub mode: NodeMode,
    /// The version of its agent.
    pub agent_version: String,
    /// Its hardware.
    pub board: Board,
    /// What it runs.
    pub system: System,
}

/// What became of a Hello.
#[derive(Debug, Clone)]
pub enum SessionOutcome {
    /// The session is the node's only one. A node whose state is not APPROVED stays connected and gets no work; it may
    /// have become so just now, because its board has another serial number than it enrolled with.
    Begun {
        /// The number of the session, a condition of every write for it.
        epoch: i64,
        /// The node, as it is now.
        node: Box<NodeRow>,
    },
    /// The node is shut out, perhaps just now, because two nodes have its identity.
    Quarantined,
    /// The connection is older than the node's present session and of an earlier boot: close it.
    Superseded,
    /// No such node: it was deleted.
    UnknownNode,
}

impl Store {
    /// Begins a session and thereby ends the node's last one, wherever it was.
    pub async fn begin_session(
        &self,
        node: &NodeId,
        start: &SessionStart,
        now: DateTime<Utc>,
    ) -> Result<SessionOutcome, StoreError> {
        let _ = (node, start, now);
        todo!()
    }

    /// Ends a session, unless a later one has begun; tells whether it did.
    pub async fn end_session(&self, node: &NodeId, epoch: i64, now: DateTime<Utc>) -> Result<bool, StoreError> {
        let _ = (node, epoch, now);
        todo!()
    }

    /// Notes that these nodes, whose sessions the controller holds, were heard of.
    pub async fn touch(&self, controller_id: &str, nodes: &[NodeId], now: DateTime<Utc>) -> Result<(), StoreError> {
        let _ = (controller_id, nodes, now);
        todo!()
    }

    /// Of these sessions, the nodes whose session is another one by now, or that may have none: to be closed.
    pub async fn lost_sessions(&self, controller_id: &str, nodes: &[(NodeId, i64)]) -> Result<Vec<NodeId>, StoreError> {
        let _ = (controller_id, nodes);
        todo!()
    }

    /// Stores changed facts of the system of a node; tells whether the session is still the node's.
    pub async fn update_system(
        &self,
        node: &NodeId,
        epoch: i64,
        system: &System,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        let _ = (node, epoch, system, now);
        todo!()
    }
}
