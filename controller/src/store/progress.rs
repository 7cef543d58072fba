//! Progress: coalesced by the caller, written in one statement.

use chrono::{DateTime, Utc};
use marco_proto::names::ExecutionId;

use super::{Store, StoreError};

/// The last progress of an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgressRow {
    /// Of which execution.
    pub execution: ExecutionId,
    /// Under which delivery.
    pub attempt: u32,
    /// Within which state change of the node: progress of an earlier one changes nothing.
    pub sequence: u64,
    /// What the node is doing.
    pub phase: String,
    /// Bytes of the phase that are done.
    pub bytes_done: u64,
    /// Bytes of the phase in all; 0: unknown.
    pub bytes_total: u64,
    /// The node said that it is too late for a cancel.
    pub cancel_refused: bool,
}

impl Store {
    /// Stores progress, one row for each execution; counts as news of the node, so that it is not overdue.
    pub async fn flush_progress(&self, rows: &[ProgressRow], now: DateTime<Utc>) -> Result<(), StoreError> {
        let _ = (rows, now);
        todo!()
    }
}
