//! What a Hello changes of a node's executions.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};

use super::{Assignment, ReportRow, Store, StoreError};
use crate::operation::NodeMode;

/// What to send to a node after its Hello.
#[derive(Debug, Clone, Default)]
pub struct Reconciled {
    /// Deliveries that answer stale reports.
    pub assigns: Vec<Assignment>,
    /// Reports that are stored: execution and sequence.
    pub acks: Vec<(ExecutionId, u64)>,
    /// Reports that are not accepted, and why.
    pub refused: Vec<(ExecutionId, String)>,
    /// False when the session is not the node's any more: end it.
    pub holder: bool,
}

impl Store {
    /// Applies what a Hello lists, and what it does not.
    pub async fn reconcile(
        &self,
        node: &NodeId,
        epoch: i64,
        mode: NodeMode,
        boot_id: &str,
        listed: &[ReportRow],
        now: DateTime<Utc>,
    ) -> Result<Reconciled, StoreError> {
        let _ = (node, epoch, mode, boot_id, listed, now);
        todo!()
    }
}
