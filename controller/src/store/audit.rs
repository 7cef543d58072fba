//! Who asked what: append-only.

use chrono::{DateTime, Utc};

use super::sql::sql;
use super::{Store, StoreError};

/// A call of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    /// When.
    pub time: DateTime<Utc>,
    /// Who.
    pub actor: String,
    /// From which address.
    pub from: String,
    /// Which RPC.
    pub method: String,
    /// On what.
    pub target: String,
    /// With which result.
    pub result: String,
}

impl Store {
    /// Appends a call.
    pub async fn record_audit(&self, row: &AuditRow) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        sql("INSERT INTO audit (time, actor, origin, method, target, result) VALUES (?, ?, ?, ?, ?, ?)")
            .time(row.time)
            .bind(row.actor.as_str())
            .bind(row.from.as_str())
            .bind(row.method.as_str())
            .bind(row.target.as_str())
            .bind(row.result.as_str())
            .run(&*tx)
            .await?;
        // Nobody waits for it, so there is no hint.
        tx.commit().await?;
        Ok(())
    }
}
