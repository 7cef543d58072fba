//! The store: the only truth. SQLite and Postgres share one set of statements. No type of sea-orm leaves this module.
//!
//! On SQLite every write goes through one connection, in transactions that take the write lock at once. On Postgres a
//! transaction locks nodes first, then operations, then executions, each in the order of their ids, so that two
//! transactions never wait for each other. `order` lists the full order, and debug builds refuse a statement that
//! breaks it. A transaction that the database still aborts in favour of another one is retried (`Store::again`).

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use chrono::{DateTime, Utc};
use tokio::sync::{Semaphore, watch};

use crate::calendar;

mod api_tokens;
mod approval;
mod artifacts;
mod audit;
mod certificates;
mod claims;
mod conflicts;
mod connection;
mod controllers;
pub mod deadline;
mod dispatch;
mod enrolment;
mod events;
mod executions;
mod expiry;
mod fault;
mod fires;
mod keys;
mod logs;
mod migrations;
mod moves;
mod names;
mod nodes;
mod notify;
mod open;
mod operations;
mod order;
mod postgres;
mod powered_off;
mod probe;
mod progress;
mod reach;
mod reconcile;
mod renewals;
mod reports;
mod rollouts;
mod schedules;
mod scope;
mod sessions;
mod silence;
mod sql;
mod steering;
mod tokens;
mod updates;
mod users;
mod vitals;
mod windows;

pub use api_tokens::ApiTokenRow;
pub use approval::ApproveOutcome;
pub use artifacts::{Allowance, ArtifactRow, DeleteArtifactOutcome, Kind, Purpose};
pub use audit::{AuditQuery, AuditRow, Record, recorded};
pub use certificates::{CertificateQuery, CertificateRow, Standing, StoredCertificate};
pub use claims::Assignment;
pub use conflicts::{ConflictRow, ResolveOutcome};
pub use controllers::ControllerRow;
pub use dispatch::{Changed, Overdue};
pub use enrolment::{EnrolOutcome, EnrolRefusal, Enrolment};
pub use events::EventRow;
pub use executions::ExecutionRow;
pub use expiry::Expiring;
pub use fault::{DatabaseError, Fault};
pub use fires::{AdvanceOutcome, FailedFire, FireQuery, FireRow, LastFire};
pub use keys::{KeyState, PendingKey};
pub use logs::{LogRow, SentLog};
pub use nodes::{
    Ailment, Board, CardLayout, Condition, DeleteNodeOutcome, NodeQuery, NodeRow, System, UpdateNodeOutcome,
    UpdateRefusal,
};
pub use operations::{CreateOutcome, NewOperation, OperationQuery, OperationRow, Origin, RequestKey};
pub use powered_off::PoweredOff;
pub use progress::ProgressRow;
pub use reach::Reach;
pub use reconcile::{Hello, Reconciled};
pub use renewals::{RenewOutcome, Renewal};
pub use reports::{Release, ReportOutcome, ReportRow};
pub use schedules::{ScheduleRow, Template};
pub use scope::Scope;
pub use sessions::{CLONED, SessionOutcome, SessionStart};
pub use silence::Backlog;
pub use steering::{AbandonOutcome, SteerOutcome};
pub use tokens::{NewToken, Stranded, TokenRow};
pub use updates::LastUpdate;
pub use users::{CreateUserOutcome, UpdateUserOutcome, UserRow};

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be reached, did not answer in time, or its disk failed. A retry later may help.
    #[error("the database is not available")]
    Unavailable(#[source] DatabaseError),
    /// The database rejected the statement: a defect of this program or of the database.
    #[error("the database refused a statement")]
    Refused(#[source] DatabaseError),
    /// A stored value that this version does not know.
    #[error("the database holds a {what} that this version does not know: {value:?}")]
    Unknown {
        /// The kind of value, or the column.
        what: &'static str,
        /// The stored text.
        value: String,
    },
    /// The URL names no supported database. Its password is left out.
    #[error("{0:?} is no database URL: sqlite:///path/to/file.db or postgres://user@host/database")]
    Url(String),
    /// Postgres refused the first connection, or did not answer.
    #[error("Postgres at {place}: {why}")]
    Postgres {
        /// Host and port, or the socket.
        place: String,
        /// The driver's cause alone, so that the message names it once.
        why: String,
    },
    /// Another controller holds the file of the SQLite database.
    #[error("another controller holds the database {0}; several controllers need Postgres")]
    Locked(std::path::PathBuf),
    /// The database is behind a connection pooler whose setup cannot work.
    #[error("the database at {place} cannot be used: {why}")]
    Pooler {
        /// Host, port and database.
        place: String,
        /// The problem, and how to solve it.
        why: String,
    },
    /// The file of an SQLite database, its folder or its lock file cannot be created or opened.
    #[error("the database's file {0} cannot be used")]
    File(std::path::PathBuf, #[source] std::io::Error),
}

/// The database of operations, nodes, artifacts and the rest. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    /// All writes; on SQLite a single connection.
    writer: connection::Pool,
    /// Reads; on Postgres the same pool.
    reader: connection::Pool,
    /// Permits to write: 1 on SQLite, fewer than there are connections on Postgres.
    turns: Arc<Semaphore>,
    /// Counts the writes of this process, and those of other controllers that notified us.
    changes: watch::Sender<u64>,
    /// Counts the writes of this process alone. Only these are notified to other controllers.
    own_changes: watch::Sender<u64>,
    /// True after a writer got no connection. Writers in the queue then give up instead of finding out one by one.
    away: AtomicBool,
    /// Since when this process has listened without a break. Silence of a node proves nothing before that.
    watch: silence::Watch,
    /// The lock of an SQLite file, held as long as the store lives.
    _lock: Option<std::fs::File>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Returns a counter of writes: those of this process, and of other controllers that notified us. It is a hint to
    /// look again and has no other meaning.
    pub fn subscribe_changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }
}

/// Microseconds since 1970, the stored form of every time. Times beyond the year 9999 are clamped.
fn micros(time: DateTime<Utc>) -> i64 {
    // One stored date at the end of chrono's calendar once ended every controller on the database, at each start.
    calendar::bounded(time).timestamp_micros()
}
