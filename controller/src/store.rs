//! The store: the only truth. One set of statements for SQLite and Postgres; nothing of sea-orm leaves this module.
//!
//! On SQLite every write goes through one connection, in transactions that take the write lock at once. On Postgres a
//! transaction that locks rows locks nodes first, then operations, then executions, each in the order of their ids, so
//! that two of them never wait for each other: `order` has all of it, and debug builds refuse a statement that breaks it.
//! What the database ends all the same for the sake of another transaction is done again (`Store::again`).

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
mod rollouts_table;
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

/// What keeps the store from answering.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be reached, or did not answer in time; trying again later may help.
    #[error("the database is not available")]
    Unavailable(#[source] DatabaseError),
    /// The database answered that the statement cannot be done: a defect of this program or of the database.
    #[error("the database refused a statement")]
    Refused(#[source] DatabaseError),
    /// A stored value is none that this version knows.
    #[error("the database holds a {what} that this version does not know: {value:?}")]
    Unknown {
        /// What it should have been.
        what: &'static str,
        /// What it is.
        value: String,
    },
    /// The URL names no database that is supported.
    #[error("{0:?} is no database URL: sqlite:///path/to/file.db or postgres://user@host/database")]
    Url(String),
    /// Postgres refused the first connection, or did not answer.
    #[error("Postgres at {place}: {why}")]
    Postgres {
        /// Host and port, or the socket.
        place: String,
        /// Why, once.
        why: String,
    },
    /// The file of an SQLite database is held by another controller.
    #[error("another controller holds the database {0}; several controllers need Postgres")]
    Locked(std::path::PathBuf),
    /// A pooler is between, and does not do as it is.
    #[error("the database at {place} cannot be used: {why}")]
    Pooler {
        /// Host, port and database.
        place: String,
        /// What to do.
        why: String,
    },
    /// The folder of an SQLite database cannot be used.
    #[error("the database's file cannot be used")]
    File(#[source] std::io::Error),
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
    /// Who may write: on SQLite one, on Postgres as many as have connections.
    turns: Arc<Semaphore>,
    /// Changes of this process, and of others as far as they are heard of.
    changes: watch::Sender<u64>,
    /// Changes of this process alone: what others are told.
    own_changes: watch::Sender<u64>,
    /// The last writer found no connection: others need not queue to find out.
    away: AtomicBool,
    /// Whether silence means something.
    watch: silence::Watch,
    /// Holds the lock of an SQLite file as long as the store lives.
    _lock: Option<std::fs::File>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

impl Store {
    /// Counts up with each write of this process, and with those of others that are heard of: a hint to look again, with no other meaning.
    pub fn subscribe_changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }
}

/// Microseconds since 1970, as every time is stored. Nothing beyond the year 9999 is.
fn micros(time: DateTime<Utc>) -> i64 {
    calendar::bounded(time).timestamp_micros()
}
