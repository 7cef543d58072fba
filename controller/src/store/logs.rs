//! What nodes logged of executions that did not succeed.

use chrono::{DateTime, Utc};
use marco_proto::names::ExecutionId;

use super::connection::Transaction;
use super::sql::sql;
use super::{Store, StoreError};

/// Lines that a node sent with a report.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SentLog {
    /// Oldest first, each with a line feed at its end; empty: it sent none.
    pub lines: String,
    /// Older lines were left out.
    pub cut: bool,
}

/// Lines as they are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRow {
    /// What the node sent.
    pub sent: SentLog,
    /// When they were stored.
    pub time: DateTime<Utc>,
}

impl Store {
    /// What the node logged of an execution.
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

    /// Whether the node logged anything of an execution; the lines are not read.
    pub async fn has_log(&self, id: &ExecutionId) -> Result<bool, StoreError> {
        let row = sql("SELECT 1 AS found FROM execution_logs WHERE operation = ? AND node = ?")
            .bind(id.operation.as_str())
            .bind(id.node.as_str())
            .one(self.reader())
            .await?;
        Ok(row.is_some())
    }
}

/// Keeps what a node logged of an execution. What is there stays: a node says the same again until it is heard, and must
/// not be able to change later what somebody has read.
pub(super) async fn keep(
    tx: &Transaction,
    id: &ExecutionId,
    log: &SentLog,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
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
