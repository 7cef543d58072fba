//! Who asked what: append-only. There is no statement here that changes or removes a row, and the database refuses one.

use chrono::{DateTime, Utc};

use super::sql::{Row, signed, sql};
use super::{Store, StoreError, micros};

/// A call of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    /// When.
    pub time: DateTime<Utc>,
    /// Who; empty: nobody known.
    pub actor: String,
    /// What it showed: `certificates/SERIAL` or `apiTokens/ID`; empty: nothing.
    pub credential: String,
    /// From which address.
    pub from: String,
    /// Which RPC.
    pub method: String,
    /// On what.
    pub target: String,
    /// With which result: a gRPC status by name.
    pub result: String,
    /// Why not, unless it is OK.
    pub message: String,
}

/// Which calls to list; what is empty does not restrict.
#[derive(Debug, Clone, Default)]
pub struct AuditQuery {
    /// Only those before this number.
    pub before: Option<u64>,
    /// How many at most.
    pub limit: u32,
    /// By this caller.
    pub actor: String,
    /// Of this method.
    pub method: String,
    /// On this resource.
    pub target: String,
    /// At this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Only those whose result is not OK.
    pub refused: bool,
}

impl Store {
    /// Appends a call.
    pub async fn record_audit(&self, row: &AuditRow) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        sql("INSERT INTO audit (time, actor, credential, origin, method, target, result, message) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?)")
        .time(row.time)
        .bind(row.actor.as_str())
        .bind(row.credential.as_str())
        .bind(row.from.as_str())
        .bind(row.method.as_str())
        .bind(row.target.as_str())
        .bind(row.result.as_str())
        .bind(row.message.as_str())
        .run(&*tx)
        .await?;
        // Nobody waits for it, so there is no hint.
        tx.commit().await
    }

    /// Calls with their numbers, newest first.
    pub async fn audit(&self, query: &AuditQuery) -> Result<Vec<(u64, AuditRow)>, StoreError> {
        sql("SELECT * FROM audit WHERE number < ? AND (? OR actor = ?) AND (? OR method = ?) AND (? OR target = ?) \
             AND time >= ? AND (? OR result <> 'OK') ORDER BY number DESC LIMIT ?")
        .bind(query.before.map_or(i64::MAX, signed))
        .bind(query.actor.is_empty())
        .bind(query.actor.as_str())
        .bind(query.method.is_empty())
        .bind(query.method.as_str())
        .bind(query.target.is_empty())
        .bind(query.target.as_str())
        .bind(query.since.map_or(i64::MIN, micros))
        .bind(!query.refused)
        .bind(i64::from(query.limit))
        .all(self.reader())
        .await?
        .iter()
        .map(read)
        .collect()
    }
}

fn read(row: &Row) -> Result<(u64, AuditRow), StoreError> {
    let call = AuditRow {
        time: row.time("time")?,
        actor: row.text("actor")?,
        credential: row.text("credential")?,
        from: row.text("origin")?,
        method: row.text("method")?,
        target: row.text("target")?,
        result: row.text("result")?,
        message: row.text("message")?,
    };
    Ok((row.number("number")?, call))
}
