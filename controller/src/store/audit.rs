//! Append-only audit of calls. No statement here changes or removes a row, and the database refuses one.
//!
//! A change and its row are one transaction. The call carries its record as a value of its task, and the commit stores
//! it. So neither a broken connection nor the end of the process leaves a change without a row. Refused and failed
//! calls change nothing; their rows are written by themselves.

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
    /// Time of the call.
    pub time: DateTime<Utc>,
    /// Name of the caller; empty if it is not known.
    pub actor: String,
    /// Credential that it showed: `certificates/SERIAL` or `apiTokens/ID`; empty if none.
    pub credential: String,
    /// Address of the caller.
    pub from: String,
    /// The RPC, or a word for an action of the controller itself, such as `HOLD_KEY`.
    pub method: String,
    /// Resource that the call names.
    pub target: String,
    /// gRPC status by name.
    pub result: String,
    /// Reason if the result is not OK, or the controller's reason for its own action.
    pub message: String,
}

/// Filter for a list of calls. An empty field does not restrict.
#[derive(Debug, Clone, Default)]
pub struct AuditQuery {
    /// Only calls with a lower number, for the next page.
    pub before: Option<u64>,
    /// Largest number of rows.
    pub limit: u32,
    /// Only calls of this caller.
    pub actor: String,
    /// Only calls of this method.
    pub method: String,
    /// Only calls on this resource.
    pub target: String,
    /// Only calls at this time or later.
    pub since: Option<DateTime<Utc>>,
    /// True: only calls whose result is not OK.
    pub refused: bool,
}

tokio::task_local! {
    /// Record of the call that this task carries out.
    static RECORD: Arc<Record>;
}

/// The row of a call in progress. The first transaction that the call commits stores it.
#[derive(Debug)]
pub struct Record {
    row: Mutex<AuditRow>,
    stored: AtomicBool,
}

impl Record {
    /// Takes the row as it reads if the call succeeds.
    pub fn new(row: AuditRow) -> Arc<Self> {
        Arc::new(Self { row: Mutex::new(row), stored: AtomicBool::new(false) })
    }

    /// Changes the row, until it is stored.
    pub fn edit(&self, edit: impl FnOnce(&mut AuditRow)) {
        edit(&mut self.lock());
    }

    /// A copy of the row.
    pub fn row(&self) -> AuditRow {
        self.lock().clone()
    }

    /// True if it was committed together with a change.
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

/// Runs `work`. The first change that it commits is stored together with `record`.
pub async fn recorded<F: Future>(record: Arc<Record>, work: F) -> F::Output {
    RECORD.scope(record, work).await
}

/// Describes an action of the controller itself in the record of this task. Without a record nothing is noted.
pub(super) fn note(method: &str, message: &str) {
    // Outside of a call, for instance in a round of the dispatcher, there is no record.
    let _ = RECORD.try_with(|record| {
        record.edit(|row| {
            method.clone_into(&mut row.method);
            message.clone_into(&mut row.message);
        });
    });
}

/// The record that the present commit has to store. `None` if there is none, it is stored already, or it has no method:
/// then the call has done nothing worth a row so far.
pub(super) fn due() -> Option<Arc<Record>> {
    let record = RECORD.try_with(Arc::clone).ok()?;
    (!record.is_stored() && !record.lock().method.is_empty()).then_some(record)
}

/// Appends a row, inside a transaction.
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
    /// Appends the row of a call that changed nothing.
    pub async fn record_audit(&self, row: &AuditRow) -> Result<(), StoreError> {
        self.again(|| self.record_audit_once(row)).await
    }

    async fn record_audit_once(&self, row: &AuditRow) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        insert(&*tx, row).await?;
        // No hint: nobody waits for it.
        tx.commit().await
    }

    /// Calls with their numbers, newest first.
    pub async fn audit(&self, query: &AuditQuery) -> Result<Vec<(u64, AuditRow)>, StoreError> {
        // By number, not by time: the times come from the clocks of several controllers.
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
