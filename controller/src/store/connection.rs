//! Connections, and transactions on them.
//!
//! A connection goes back to its pool only if it is known to be clean: its last statement was answered, and it is
//! outside of a transaction. All others are closed, so the database certainly rolls back.
//!
//! sqlx's own transactions are not used, because they count their depth on the client's side. After a COMMIT that
//! failed on a full disk that count was wrong. Later transactions were savepoints without a transaction around them:
//! acknowledged, and never stored.

use std::borrow::Cow;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sea_orm::QueryResult;
use sea_orm::sea_query::{Value, Values};
use sea_orm::sqlx::pool::PoolConnection;
use sea_orm::sqlx::{
    self, AssertSqlSafe, Database, Executor, PgConnection, PgPool, Postgres, Sqlite, SqliteConnection, SqlitePool,
};
use sea_query_sqlx::SqlxValues;
use tokio::sync::{Mutex, OwnedSemaphorePermit};

use super::order::Held;
use super::vitals::Vitals;
use super::{StoreError, deadline};

const COMMIT: &str = "COMMIT";
/// Deadline for a rollback and the return to the pool. A connection that takes longer is closed.
const GIVE_BACK: Duration = Duration::from_secs(2);

/// The part of a statement's result that the caller needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    /// The number of changed rows.
    Changes,
    /// The first row.
    First,
    /// Every row.
    All,
}

/// The answer to a statement.
#[derive(Default)]
pub(super) struct Answer {
    pub(super) changed: u64,
    pub(super) rows: Vec<QueryResult>,
}

/// A place to run statements: one transaction, or any connection of a pool.
pub(super) trait Connection: Sync {
    /// True for Postgres, false for SQLite.
    fn is_postgres(&self) -> bool;

    /// Runs a statement with its values.
    fn ask(
        &self,
        text: String,
        values: Vec<Value>,
        want: Want,
    ) -> impl Future<Output = Result<Answer, StoreError>> + Send;
}

/// Connections to the database.
#[derive(Clone)]
pub(super) struct Pool {
    kind: Kind,
    /// The database's file or address, for errors.
    pub(super) place: Arc<str>,
    pub(super) vitals: Arc<Vitals>,
}

#[derive(Clone)]
enum Kind {
    Sqlite(SqlitePool),
    Postgres {
        pool: PgPool,
        /// True behind a pooler in transaction mode, which gives each transaction another server. Outside of a
        /// transaction, a statement could be prepared on one server and run on the next. A named statement could
        /// collide with those of the pooler's other clients.
        pooler: bool,
    },
}

impl Pool {
    pub(super) fn sqlite(pool: SqlitePool, place: Arc<str>, vitals: Arc<Vitals>) -> Self {
        Self { kind: Kind::Sqlite(pool), place, vitals }
    }

    pub(super) fn postgres(pool: PgPool, pooler: bool, place: Arc<str>) -> Self {
        Self { kind: Kind::Postgres { pool, pooler }, place, vitals: Arc::default() }
    }

    /// The pool of Postgres, for notifications and migrations.
    pub(super) fn as_postgres(&self) -> Option<&PgPool> {
        match &self.kind {
            Kind::Postgres { pool, .. } => Some(pool),
            Kind::Sqlite(_) => None,
        }
    }

    /// The pool of SQLite, for migrations.
    pub(super) fn as_sqlite(&self) -> Option<&SqlitePool> {
        match &self.kind {
            Kind::Sqlite(pool) => Some(pool),
            Kind::Postgres { .. } => None,
        }
    }

    /// True if each transaction may run on another server.
    pub(super) fn is_behind_pooler(&self) -> bool {
        matches!(self.kind, Kind::Postgres { pooler: true, .. })
    }

    /// Begins a transaction. On SQLite it takes the write lock now, because a read that turns into a write later can
    /// fail at once. A raw BEGIN fails inside another transaction, so a connection wrongly taken for clean shows at
    /// once and is closed.
    pub(super) async fn begin(&self, turn: Option<OwnedSemaphorePermit>) -> Result<Transaction, StoreError> {
        let mut lease = self.lease(turn).await?;
        let word = match deadline::of_locks() {
            _ if !lease.is_postgres() => Cow::Borrowed("BEGIN IMMEDIATE"),
            None => Cow::Borrowed("BEGIN"),
            // One message, so that it costs no further round trip.
            Some(locks) => Cow::Owned(format!("BEGIN; SET LOCAL lock_timeout = {}", locks.as_millis())),
        };
        lease.control(word, State::InTransaction).await?;
        Ok(Transaction {
            postgres: lease.is_postgres(),
            lease: Mutex::new(lease),
            held: std::sync::Mutex::default(),
            failed: AtomicBool::new(false),
        })
    }

    async fn lease(&self, turn: Option<OwnedSemaphorePermit>) -> Result<Lease, StoreError> {
        let (begun, asked) = (Instant::now(), self.vitals.asked());
        // Cancelling `acquire` closes the connection that sqlx was testing, and keeps no place in the pool.
        let acquired = tokio::time::timeout(deadline::next(), async {
            Ok(match &self.kind {
                Kind::Sqlite(pool) => Line::Sqlite(pool.acquire().await?),
                Kind::Postgres { pool, .. } => Line::Postgres(pool.acquire().await?),
            })
        });
        let error = match acquired.await {
            Ok(Ok(line)) => {
                asked.answered();
                let (place, vitals) = (Arc::clone(&self.place), Arc::clone(&self.vitals));
                let named = !self.is_behind_pooler();
                return Ok(Lease { line: Some(line), state: State::Clean, named, place, vitals, turn });
            }
            Ok(Err(error)) => StoreError::of_driver(&error, &self.place),
            Err(_) => StoreError::silent(&self.place, begun.elapsed()),
        };
        // Only failed steps draw on a caller's budget; see `deadline`.
        deadline::in_vain(begun.elapsed());
        // Only writers have a permit.
        if turn.is_some() {
            self.vitals.write_failed(&error);
        }
        Err(error)
    }
}

impl Connection for Pool {
    fn is_postgres(&self) -> bool {
        matches!(self.kind, Kind::Postgres { .. })
    }

    async fn ask(&self, text: String, values: Vec<Value>, want: Want) -> Result<Answer, StoreError> {
        if self.is_behind_pooler() {
            // sqlx prepares and runs a statement in two round trips. Only a transaction keeps both on one server.
            let transaction = self.begin(None).await?;
            let answer = transaction.ask(text, values, want).await?;
            transaction.commit().await?;
            return Ok(answer);
        }
        self.lease(None).await?.ask(text, values, want).await
    }
}

/// A transaction. Dropping it rolls back.
pub(super) struct Transaction {
    postgres: bool,
    lease: Mutex<Lease>,
    /// Tables in which it holds rows.
    held: std::sync::Mutex<Held>,
    /// A statement failed, so COMMIT must not be sent. Postgres would answer it with ROLLBACK and call that success.
    /// SQLite rolls back by itself after some errors.
    failed: AtomicBool,
}

impl Transaction {
    /// Checks in debug builds that a statement takes its locks in the order that `order` lists.
    fn keeps_order(&self, text: &str) -> Result<(), StoreError> {
        // SQLite has a single writer, so there is nothing to order.
        if !cfg!(debug_assertions) || !self.postgres {
            return Ok(());
        }
        // A rule that stood in a comment alone was broken within a month.
        let mut held = self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        held.take(text).map_err(StoreError::out_of_order)
    }

    pub(super) async fn commit(self) -> Result<(), StoreError> {
        if self.failed.load(Ordering::Relaxed) {
            self.rollback().await?;
            return Err(StoreError::aborted());
        }
        self.lease.into_inner().control(COMMIT.into(), State::Clean).await
    }

    pub(super) async fn rollback(self) -> Result<(), StoreError> {
        self.lease.into_inner().control("ROLLBACK".into(), State::Clean).await
    }
}

impl Connection for Transaction {
    fn is_postgres(&self) -> bool {
        self.postgres
    }

    async fn ask(&self, text: String, values: Vec<Value>, want: Want) -> Result<Answer, StoreError> {
        let answer = match self.keeps_order(&text) {
            Ok(()) => self.lease.lock().await.ask(text, values, want).await,
            Err(error) => Err(error),
        };
        if answer.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        answer
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Outside of a transaction. Every statement was answered.
    Clean,
    /// Inside a transaction. Every statement was answered.
    InTransaction,
    /// An answer is outstanding, or a step failed. The connection will be closed.
    Unsure,
}

enum Line {
    Sqlite(PoolConnection<Sqlite>),
    Postgres(PoolConnection<Postgres>),
}

type Step<'a, T> = Pin<Box<dyn Future<Output = Result<T, sqlx::Error>> + Send + 'a>>;

/// A connection that is out of its pool.
struct Lease {
    line: Option<Line>,
    state: State,
    /// Prepared statements may have names. False behind a pooler.
    named: bool,
    place: Arc<str>,
    vitals: Arc<Vitals>,
    /// The permit to write, released after the connection went back.
    turn: Option<OwnedSemaphorePermit>,
}

impl Lease {
    fn is_postgres(&self) -> bool {
        matches!(self.line, Some(Line::Postgres(_)))
    }

    async fn ask(&mut self, text: String, values: Vec<Value>, want: Want) -> Result<Answer, StoreError> {
        let named = self.named;
        let before = self.state;
        self.step(before, |line| match line {
            Line::Sqlite(line) => Box::pin(on_sqlite(line, text, values, want)),
            Line::Postgres(line) => Box::pin(on_postgres(line, text, values, want, named)),
        })
        .await
    }

    /// Runs BEGIN, COMMIT or ROLLBACK. If it fails, the state of the connection is unknown, so it will be closed.
    async fn control(&mut self, word: Cow<'static, str>, after: State) -> Result<(), StoreError> {
        let commits = word == COMMIT;
        let word = AssertSqlSafe(word.into_owned());
        let done = self
            .step(after, |line| match line {
                Line::Sqlite(line) => Box::pin(async move { line.execute(word).await.map(|_| ()) }),
                Line::Postgres(line) => Box::pin(async move { line.execute(word).await.map(|_| ()) }),
            })
            .await;
        match &done {
            Err(_) => self.state = State::Unsure,
            // Behind a pooler, reads commit too. Only a commit with a permit proves that writes work.
            Ok(()) if commits && self.turn.is_some() => self.vitals.wrote(),
            Ok(()) => {}
        }
        done
    }

    /// Sends one statement and waits for its answer, under a deadline. If the future is dropped midway, the connection
    /// will be closed.
    async fn step<T>(
        &mut self,
        after: State,
        question: impl for<'a> FnOnce(&'a mut Line) -> Step<'a, T> + Send,
    ) -> Result<T, StoreError> {
        // `Unsure` until an answer proves otherwise: this future can be dropped at the await below.
        let before = std::mem::replace(&mut self.state, State::Unsure);
        let Some(line) = self.line.as_mut().filter(|_| before != State::Unsure) else {
            return Err(StoreError::aborted());
        };
        let (begun, asked) = (Instant::now(), self.vitals.asked());
        let error = match tokio::time::timeout(deadline::next(), question(line)).await {
            Ok(Ok(answer)) => {
                asked.answered();
                self.state = after;
                return Ok(answer);
            }
            Ok(Err(error)) => {
                // A refusal is an answer, so the connection is still in step. After a fault of the disk SQLite may have
                // rolled back by itself, so the state is unknown.
                let keeps = matches!(error, sqlx::Error::Database(_));
                let error = StoreError::of_driver(&error, &self.place);
                if keeps && error.fault().is_none() {
                    asked.answered();
                    self.state = before;
                }
                error
            }
            Err(_) => StoreError::silent(&self.place, begun.elapsed()),
        };
        deadline::in_vain(begun.elapsed());
        if self.turn.is_some() {
            self.vitals.write_failed(&error);
        }
        Err(error)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let (Some(line), state) = (self.line.take(), self.state) else { return };
        let turn = self.turn.take();
        // `ROLLBACK` needs a runtime to wait in. A connection in doubt may still run its last statement.
        let runtime = tokio::runtime::Handle::try_current();
        let (Ok(runtime), State::Clean | State::InTransaction) = (runtime, state) else {
            line.close();
            return;
        };
        // `return_to_pool` pings the connection without a deadline of its own. Dropping that future closes the
        // connection.
        runtime.spawn(async move {
            let given_back = async {
                match line {
                    Line::Sqlite(line) => give_back(line, state).await,
                    Line::Postgres(line) => give_back(line, state).await,
                }
            };
            if tokio::time::timeout(GIVE_BACK, given_back).await.is_err() {
                tracing::debug!("a connection to the database was closed: it did not answer");
            }
            // Released only now, so that the next writer finds the connection in the pool.
            drop(turn);
        });
    }
}

async fn give_back<DB: Database>(line: PoolConnection<DB>, state: State)
where
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
{
    let mut line = Closing(Some(line));
    let Some(connection) = line.0.as_mut() else { return };
    if state == State::InTransaction && (&mut **connection).execute("ROLLBACK").await.is_err() {
        return;
    }
    if let Some(mut connection) = line.0.take() {
        connection.return_to_pool().await;
    }
}

/// Closes the connection if dropped while it still holds it.
struct Closing<DB: Database>(Option<PoolConnection<DB>>);

impl<DB: Database> Drop for Closing<DB> {
    fn drop(&mut self) {
        drop(self.0.take().map(PoolConnection::detach));
    }
}

impl Line {
    /// Closes the connection without telling the database, which then rolls back. The pool opens another one.
    fn close(self) {
        match self {
            Self::Sqlite(line) => drop(line.detach()),
            Self::Postgres(line) => drop(line.detach()),
        }
    }
}

async fn on_sqlite(
    line: &mut SqliteConnection,
    text: String,
    values: Vec<Value>,
    want: Want,
) -> Result<Answer, sqlx::Error> {
    let query = sqlx::query_with(AssertSqlSafe(text), SqlxValues(Values(values)));
    Ok(match want {
        Want::Changes => Answer { changed: query.execute(line).await?.rows_affected(), rows: Vec::new() },
        Want::First => {
            Answer { changed: 0, rows: query.fetch_optional(line).await?.map(Into::into).into_iter().collect() }
        }
        Want::All => Answer { changed: 0, rows: query.fetch_all(line).await?.into_iter().map(Into::into).collect() },
    })
}

async fn on_postgres(
    line: &mut PgConnection,
    text: String,
    values: Vec<Value>,
    want: Want,
    named: bool,
) -> Result<Answer, sqlx::Error> {
    let query = sqlx::query_with(AssertSqlSafe(text), SqlxValues(Values(values))).persistent(named);
    Ok(match want {
        Want::Changes => Answer { changed: query.execute(line).await?.rows_affected(), rows: Vec::new() },
        Want::First => {
            Answer { changed: 0, rows: query.fetch_optional(line).await?.map(Into::into).into_iter().collect() }
        }
        Want::All => Answer { changed: 0, rows: query.fetch_all(line).await?.into_iter().map(Into::into).collect() },
    })
}
