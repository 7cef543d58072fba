//! Opening a database.

use std::fs::{File, TryLockError};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use sea_orm::sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sea_orm::{
    ConnAcquireErr, ConnectOptions, Database, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr,
    SqliteTransactionMode, TransactionOptions, TransactionTrait,
};
use sea_orm_migration::MigratorTrait as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::migrations::Migrator;
use super::sql::sql;
use super::{Shared, Store, StoreError};

/// How long a caller waits for a free connection, or for a new one. sqlx's own 30 s would hold up every RPC while the
/// database is away.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long a write waits for its turn. Separate from the above, because a queue behind a busy database (a whole fleet that
/// says hello at once) is no outage.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);
/// A writer that waits for its turn looks this often whether the database is away: then it waits no longer.
const QUEUE_LOOK: Duration = Duration::from_millis(250);
/// How long a statement may take on Postgres: above the longest of ours by far.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long SQLite waits for another process' lock (a backup, for example).
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections to Postgres of one controller; its default limit is 100 for all.
const POSTGRES_CONNECTIONS: u32 = 16;
/// Of these, for writes; the rest is left to reads, which never wait for a lock.
const POSTGRES_WRITERS: usize = 12;
/// Readers of SQLite: it works on local files, more would only wait for the processor.
const SQLITE_READERS: u32 = 4;
/// Says "Marco" to the advisory locks of Postgres.
const MIGRATION_LOCK: i64 = 0x004d_6172_636f;

impl Store {
    /// Opens the database at `url` and brings its tables up to date. `sqlite:///dir/marco.db` is created if it is
    /// missing; one process can hold it. `postgres://` serves several controllers.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        let (writer, reader, lock, turns) = if let Some(path) = url.strip_prefix("sqlite://") {
            let path = path.split('?').next().unwrap_or_default();
            if path.is_empty() || path == ":memory:" {
                return Err(StoreError::Url(url.to_owned()));
            }
            let (writer, reader, lock) = open_sqlite(Path::new(path)).await?;
            (writer, reader, Some(lock), 1)
        } else if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            let mut options = connect_options(url, POSTGRES_CONNECTIONS);
            options.statement_timeout(STATEMENT_TIMEOUT).set_application_name("marco-controller");
            let pool = Database::connect(options).await?;
            (pool.clone(), pool, None, POSTGRES_WRITERS)
        } else {
            return Err(StoreError::Url(without_password(url)));
        };
        let ((changes, _), (own_changes, _)) = (watch::channel(0), watch::channel(0));
        let turns = Arc::new(Semaphore::new(turns));
        let store = Self {
            shared: Arc::new(Shared {
                writer,
                reader,
                turns,
                changes,
                own_changes,
                away: AtomicBool::new(false),
                watched_since: std::sync::OnceLock::new(),
                _lock: lock,
            }),
        };
        store.migrate().await?;
        Ok(store)
    }

    /// Asks the database for a sign of life.
    pub async fn ping(&self) -> Result<(), StoreError> {
        sql("SELECT 1").one(self.reader()).await.map(|_| ())
    }

    /// The database's time, by which several controllers agree; `None` on SQLite, which has none of its own.
    pub async fn database_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        if !self.is_postgres() {
            return Ok(None);
        }
        let row = sql("SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT) AS now")
            .one(self.reader())
            .await?;
        row.map(|row| row.time("now")).transpose()
    }

    async fn migrate(&self) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        if self.is_postgres() {
            // Several controllers may start at once; the migrator itself takes no lock.
            sql("SELECT pg_advisory_xact_lock(?)").bind(MIGRATION_LOCK).one(&*tx).await?;
        }
        Migrator::up(&*tx, None).await?;
        if !self.is_postgres() {
            // The file's lock says that nobody else is alive, so the sessions of earlier processes can be ended.
            sql("DELETE FROM controllers").run(&*tx).await?;
        }
        self.commit(tx).await
    }

    /// Whether several controllers may share it.
    pub fn is_shared(&self) -> bool {
        self.is_postgres()
    }

    pub(super) fn is_postgres(&self) -> bool {
        self.shared.writer.get_database_backend() == DbBackend::Postgres
    }

    pub(super) fn reader(&self) -> &DatabaseConnection {
        &self.shared.reader
    }

    /// Begins a transaction that writes; when it is dropped, nothing of it remains. On SQLite it takes the write lock
    /// now, because a read that turned into a write later could fail at once.
    pub(super) async fn begin(&self) -> Result<Tx, StoreError> {
        let turn = self.turn().await?;
        let options = TransactionOptions {
            sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        };
        let begun = self.shared.writer.begin_with_options(options).await.map_err(StoreError::from);
        self.shared.away.store(matches!(begun, Err(StoreError::Unavailable(_))), Ordering::Relaxed);
        Ok(Tx { tx: begun?, _turn: turn })
    }

    /// Waits for the turn to write.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, StoreError> {
        let busy = || StoreError::from(DbErr::ConnectionAcquire(ConnAcquireErr::Timeout));
        let turn = Arc::clone(&self.shared.turns).acquire_owned();
        tokio::pin!(turn);
        let begun = tokio::time::Instant::now();
        loop {
            match tokio::time::timeout(QUEUE_LOOK, &mut turn).await {
                Ok(turn) => return turn.map_err(|_| busy()),
                Err(_) if self.shared.away.load(Ordering::Relaxed) || begun.elapsed() >= QUEUE_TIMEOUT => {
                    return Err(busy());
                }
                Err(_) => {}
            }
        }
    }

    /// Commits, and hints that something changed.
    pub(super) async fn commit(&self, tx: Tx) -> Result<(), StoreError> {
        tx.commit().await?;
        for changes in [&self.shared.own_changes, &self.shared.changes] {
            changes.send_modify(|changes| *changes = changes.wrapping_add(1));
        }
        Ok(())
    }
}

/// A transaction that writes, with its turn at it.
pub(super) struct Tx {
    tx: DatabaseTransaction,
    /// Given back after the transaction's connection: fields are dropped in their order.
    _turn: OwnedSemaphorePermit,
}

impl Deref for Tx {
    type Target = DatabaseTransaction;

    fn deref(&self) -> &DatabaseTransaction {
        &self.tx
    }
}

impl Tx {
    /// Commits without a hint: for what nobody waits for.
    pub(super) async fn commit(self) -> Result<(), StoreError> {
        Ok(self.tx.commit().await?)
    }

    /// Ends it with nothing done, now rather than some time after it is dropped.
    pub(super) async fn rollback(self) -> Result<(), StoreError> {
        Ok(self.tx.rollback().await?)
    }
}

fn connect_options(url: impl Into<String>, connections: u32) -> ConnectOptions {
    let mut options = ConnectOptions::new(url.into());
    options
        .max_connections(connections)
        .connect_timeout(CONNECT_TIMEOUT)
        .acquire_timeout(CONNECT_TIMEOUT)
        .sqlx_logging(false);
    options
}

async fn open_sqlite(path: &Path) -> Result<(DatabaseConnection, DatabaseConnection, File), StoreError> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(StoreError::File)?;
    }
    let lock = lock_file(path)?;
    let file = path.to_owned();
    let mut options = connect_options("sqlite://", 1);
    // A connection that is closed would be opened again with the same settings, but there is no reason to.
    options.idle_timeout(None::<Duration>).max_lifetime(None::<Duration>);
    let for_writer = file.clone();
    options.map_sqlx_sqlite_opts(move |_| sqlite_options(&for_writer));
    let writer = Database::connect(options).await?;

    let mut options = connect_options("sqlite://", SQLITE_READERS);
    options.map_sqlx_sqlite_opts(move |_| sqlite_options(&file).pragma("query_only", "ON"));
    let reader = Database::connect(options).await?;
    Ok((writer, reader, lock))
}

fn sqlite_options(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        // In WAL mode the default, NORMAL, may lose the last commits in a power cut: they were acknowledged.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT)
}

/// Takes the lock beside the database's file; it dies with the process.
fn lock_file(path: &Path) -> Result<File, StoreError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file =
        File::options().create(true).truncate(false).write(true).open(PathBuf::from(name)).map_err(StoreError::File)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked(path.to_owned())),
        Err(TryLockError::Error(error)) => Err(StoreError::File(error)),
    }
}

/// A URL as it may be shown.
fn without_password(url: &str) -> String {
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => {
            let (head, tail) = (url.get(..scheme).unwrap_or_default(), url.get(at..).unwrap_or_default());
            format!("{head}://...{tail}")
        }
        _ => url.to_owned(),
    }
}
