//! Who asked what: append-only. There is no statement here that changes or removes a row, and the database refuses one.
//!
//! A change and its row are one transaction: the call that asks for the change carries its record with it as a value of its
//! task, and the commit takes it along. So neither a connection that breaks nor a process that ends leaves a change without
//! a row. Refused and failing calls change nothing; their rows are written by themselves.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::{DateTime, Utc};

use super::connection::Connection;
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

tokio::task_local! {
    /// The record of what this task was asked for.
    static RECORD: Arc<Record>;
}

/// The row of a call that is being carried out; the first transaction that the call commits appends it.
#[derive(Debug)]
pub struct Record {
    row: Mutex<AuditRow>,
    stored: AtomicBool,
}

impl Record {
    /// The row as it is if the call succeeds.
    pub fn new(row: AuditRow) -> Arc<Self> {
        Arc::new(Self { row: Mutex::new(row), stored: AtomicBool::new(false) })
    }

    /// Changes the row, as long as it is not stored.
    pub fn edit(&self, edit: impl FnOnce(&mut AuditRow)) {
        edit(&mut self.lock());
    }

    /// The row.
    pub fn row(&self) -> AuditRow {
        self.lock().clone()
    }

    /// Whether it was committed together with a change.
    pub fn is_stored(&self) -> bool {
        self.stored.load(Ordering::Acquire)
    }

    pub(super) fn note_stored(&self) {
        self.stored.store(true, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, AuditRow> {
        self.row.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does `work`; the first change that it commits is recorded with `record`.
pub async fn recorded<F: Future>(record: Arc<Record>, work: F) -> F::Output {
    RECORD.scope(record, work).await
}

/// Notes what the controller does by itself in a transaction that this task commits; without a record nothing is noted.
pub(super) fn note(method: &str, message: &str) {
    let _ = RECORD.try_with(|record| {
        record.edit(|row| {
            method.clone_into(&mut row.method);
            message.clone_into(&mut row.message);
        });
    });
}

/// The record that the transaction which this task commits has to take along. One without a method is of a call that
/// did nothing worth a row so far.
pub(super) fn due() -> Option<Arc<Record>> {
    let record = RECORD.try_with(Arc::clone).ok()?;
    (!record.is_stored() && !record.lock().method.is_empty()).then_some(record)
}

/// Appends a row.
pub(super) async fn insert(tx: &impl Connection, row: &AuditRow) -> Result<(), StoreError> {
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
    .run(tx)
    .await?;
    Ok(())
}

impl Store {
    /// Appends a call that changed nothing.
    pub async fn record_audit(&self, row: &AuditRow) -> Result<(), StoreError> {
        self.again(|| self.record_audit_once(row)).await
    }

    async fn record_audit_once(&self, row: &AuditRow) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        insert(&*tx, row).await?;
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
