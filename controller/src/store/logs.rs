//! Log lines of nodes about executions that did not succeed.

use chrono::{DateTime, Utc};
use marco_proto::names::ExecutionId;

use super::connection::Transaction;
use super::sql::sql;
use super::{Store, StoreError};

/// Lines that a node sent with a report.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SentLog {
    /// Oldest first, each with a line feed at its end. Empty if the node sent none.
    pub lines: String,
    /// True if older lines were left out.
    pub cut: bool,
}

/// Stored lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRow {
    /// The lines as the node sent them.
    pub sent: SentLog,
    /// Time at which they were stored.
    pub time: DateTime<Utc>,
}

impl Store {
    /// Lines that the node sent about an execution, if any.
    pub async fn execution_log(&self, id: &ExecutionId) -> Result<Option<LogRow>, StoreError> {
        let row = sql("SELECT lines, cut, time FROM execution_logs WHERE operation = ? AND node = ?")
            .bind(id.operation.as_str())
            .bind(id.node.as_str())
            .one(self.reader())
            .await?;
        row.map(|row| {
            let sent = SentLog { lines: row.text("lines")?, cut: row.flag("cut")? };
            Ok(LogRow { sent, time: row.time("time")? })
        })
        .transpose()
    }

    /// True if the node sent lines about an execution. Does not read them.
    pub async fn has_log(&self, id: &ExecutionId) -> Result<bool, StoreError> {
        let row = sql("SELECT 1 AS found FROM execution_logs WHERE operation = ? AND node = ?")
            .bind(id.operation.as_str())
            .bind(id.node.as_str())
            .one(self.reader())
            .await?;
        Ok(row.is_some())
    }
}

/// Stores log lines of an execution, unless it has some. A node repeats its report until it is acknowledged, and must
/// not be able to change lines that an operator has read.
pub(super) async fn keep(
    tx: &Transaction,
    id: &ExecutionId,
    log: &SentLog,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    // The first row stays, so a report without lines must not take its place.
    if log.lines.is_empty() {
        return Ok(());
    }
    sql("INSERT INTO execution_logs (operation, node, time, lines, cut) VALUES (?, ?, ?, ?, ?) \
         ON CONFLICT (operation, node) DO NOTHING")
    .bind(id.operation.as_str())
    .bind(id.node.as_str())
    .time(now)
    .bind(log.lines.as_str())
    .bind(log.cut)
    .run(tx)
    .await?;
    Ok(())
}
