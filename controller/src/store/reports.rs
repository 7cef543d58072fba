//! Reports of nodes.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};

use super::{Assignment, Store, StoreError};
use crate::operation::{ExecutionError, ExecutionState};

/// A report of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportRow {
    /// On which execution.
    pub execution: ExecutionId,
    /// Under which delivery.
    pub attempt: u32,
    /// The number of the state change.
    pub sequence: u64,
    /// The state.
    pub state: ExecutionState,
    /// What the node is doing.
    pub phase: String,
    /// Bytes of the phase that are done.
    pub bytes_done: u64,
    /// Bytes of the phase in all; 0: unknown.
    pub bytes_total: u64,
    /// Why it did not succeed.
    pub error: Option<ExecutionError>,
    /// The boot id under which it is said.
    pub boot_id: String,
    /// What the running system says it is.
    pub release: Option<Release>,
    /// It was too late for a cancel.
    pub cancel_refused: bool,
}

/// What a running system says it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Release {
    /// The name of the execution that installed it.
    pub execution: String,
    /// SHA-256 of its image; empty: none.
    pub image_sha256: String,
    /// SHA-256 of its boot files; empty: none.
    pub boot_sha256: String,
}

/// What became of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportOutcome {
    /// It is stored, now or before: acknowledge its sequence.
    Acked,
    /// It only carries progress: keep it for `flush_progress`.
    Progress,
    /// It is of another delivery: answer with this one.
    Stale(Box<Assignment>),
    /// There is no such execution of this node: acknowledge, so that the node forgets it.
    Unknown,
    /// The session is not the node's any more: end it.
    NotHolder,
    /// Not accepted and not to be acknowledged; the text says why.
    Refused(String),
}

impl Store {
    /// Stores a report, if it is news.
    pub async fn apply_report(
        &self,
        node: &NodeId,
        epoch: i64,
        report: &ReportRow,
        now: DateTime<Utc>,
    ) -> Result<ReportOutcome, StoreError> {
        let _ = (node, epoch, report, now);
        todo!()
    }
}
