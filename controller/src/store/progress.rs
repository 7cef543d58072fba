//! Progress: coalesced by the caller, written in one statement.

use chrono::{DateTime, Utc};
use marco_proto::names::ExecutionId;

use serde::Serialize;

use super::sql::{signed, sql};
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
        if rows.is_empty() {
            return Ok(());
        }
        let stored: Vec<Stored<'_>> = rows
            .iter()
            .map(|row| Stored {
                operation: row.execution.operation.as_str(),
                node: row.execution.node.as_str(),
                attempt: i64::from(row.attempt),
                sequence: signed(row.sequence),
                phase: &row.phase,
                done: signed(row.bytes_done),
                total: signed(row.bytes_total),
                refused: i64::from(row.cancel_refused),
            })
            .collect();
        let tx = self.begin().await?;
        sql("UPDATE executions SET phase = r.phase, bytes_done = r.done, bytes_total = r.total, overdue = FALSE, \
                 cancel_refused = cancel_refused OR r.refused = 1, \
                 deadline = CAST(? AS BIGINT) + patience, update_time = ? \
             FROM {rows operation TEXT, node TEXT, attempt BIGINT, sequence BIGINT, phase TEXT, done BIGINT, \
                   total BIGINT, refused BIGINT} \
             WHERE executions.operation = r.operation AND executions.node = r.node \
               AND executions.attempt = r.attempt AND executions.sequence = r.sequence \
               AND executions.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')")
        .time(now)
        .time(now)
        .json(&stored)
        .run(&*tx)
        .await?;
        self.commit(tx).await
    }
}

#[derive(Serialize)]
struct Stored<'a> {
    operation: &'a str,
    node: &'a str,
    attempt: i64,
    sequence: i64,
    phase: &'a str,
    done: i64,
    total: i64,
    refused: i64,
}
