//! Opening a database.

use std::fs::{File, TryLockError};
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chrono::{DateTime, Utc};
use sea_orm::sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sea_orm::sqlx::{self, ConnectOptions as _};
use sea_orm::{
    ConnectionTrait as _, DatabaseConnection, SqliteTransactionMode, SqlxPostgresConnector, SqlxSqliteConnector,
    TransactionOptions, TransactionTrait as _,
};
use sea_orm_migration::MigratorTrait as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::connection::{Connection as _, Pool, Transaction};
use super::migrations::Migrator;
use super::sql::sql;
use super::vitals::Vitals;
use super::{Shared, Store, StoreError, audit, deadline, postgres};

/// Longest wait for a free or a new connection. sqlx's default of 30 s would hold up every RPC while the database is
/// away.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// Interval at which a writer in the queue checks if the database is away. If so, it stops waiting.
const QUEUE_LOOK: Duration = Duration::from_millis(250);
/// Longest wait of SQLite for a lock. It may be held by another process (a backup, for example), or by a connection of
/// ours that was closed while its last statement still ran. Shorter than a caller waits.
const BUSY_TIMEOUT: Duration = Duration::from_millis(1500);
/// Connections to Postgres that may write. The rest is left to reads, which never wait for a lock.
const POSTGRES_WRITERS: usize = 12;
/// Connections that read from SQLite. It works on local files, so more would only wait for the processor.
const SQLITE_READERS: u32 = 4;
/// Pauses before a transaction is retried that the database aborted in favour of another one: 10, 30 and 90 ms. Each
/// varies by up to half, so that the two do not collide again. A caller is still answered within 2 s.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_millis(90);
/// Key of the advisory lock for migrations: "Marco" in ASCII.
const MIGRATION_LOCK: i64 = 0x004d_6172_636f;
/// Limits while migrating. Migrations take longer than other statements, and so does waiting for another controller's.
const MIGRATION_LIMITS: &str = "SET LOCAL statement_timeout = '10min'; SET LOCAL lock_timeout = '10min'; \
     SET LOCAL idle_in_transaction_session_timeout = '1min'";
/// Drops sea-orm's named statements. Behind a pooler they would stay on a server that other clients get next.
const FORGET_STATEMENTS: &str = "DO $$ DECLARE statement text; BEGIN \
     FOR statement IN SELECT name FROM pg_prepared_statements WHERE name LIKE 'sqlx\\_s\\_%' LOOP \
         EXECUTE format('DEALLOCATE %I', statement); END LOOP; END $$";

impl Store {
    /// Opens the database at `url` and brings its tables up to date. `sqlite:///dir/marco.db` is created if it is
    /// missing, and only one process can hold it. `postgres://` serves several controllers.
    pub async fn open(url: &str) -> Result<Self, StoreError> {
        let (writer, reader, lock, turns) = if let Some(path) = url.strip_prefix("sqlite://") {
            let path = path.split('?').next().unwrap_or_default();
            if path.is_empty() || path == ":memory:" {
                return Err(StoreError::Url(url.to_owned()));
            }
            let (writer, reader, lock) = open_sqlite(Path::new(path)).await?;
            (writer, reader, Some(lock), 1)
        } else if url.starts_with("postgres://") || url.starts_with("postgresql://") {
            let pool = postgres::open(url).await?;
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
                watch: super::silence::Watch::default(),
                _lock: lock,
            }),
        };
        store.migrate().await?;
        Ok(store)
    }

    /// Checks that the database answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        sql("SELECT 1").one(self.reader()).await.map(|_| ())
    }

    /// The database's clock, by which several controllers agree. `None` on SQLite, which has no clock of its own.
    pub async fn database_time(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        if !self.is_postgres() {
            return Ok(None);
        }
        let row = sql("SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT) AS now")
            .one(self.reader())
            .await?;
        row.map(|row| row.time("now")).transpose()
    }

    /// Time of the last written row, by the writer's clock: of the audit, or of a controller's beat. `None` if there is
    /// neither.
    pub async fn last_row(&self) -> Result<Option<DateTime<Utc>>, StoreError> {
        // The audit's last row by number, not by time. If a clock was ahead for a while, the next row corrects it.
        let row = sql(
            "SELECT MAX(t.time) AS last FROM (SELECT time FROM audit WHERE number = (SELECT MAX(number) FROM audit) \
                       UNION ALL SELECT MAX(beat_time) AS time FROM controllers) t",
        )
        .one(self.reader())
        .await?;
        row.map_or(Ok(None), |row| row.maybe_time("last"))
    }

    async fn migrate(&self) -> Result<(), StoreError> {
        // The migrator works only on connections of sea-orm. If it fails, the store is not opened, and its connections
        // are dropped.
        let pooler = self.shared.writer.is_behind_pooler();
        let tx = match (self.shared.writer.as_postgres(), self.shared.writer.as_sqlite()) {
            (Some(pool), _) => begin(SqlxPostgresConnector::from_sqlx_postgres_pool(pool.clone())).await?,
            (None, Some(pool)) => begin(SqlxSqliteConnector::from_sqlx_sqlite_pool(pool.clone())).await?,
            (None, None) => return Ok(()),
        };
        if self.is_postgres() {
            tx.execute_unprepared(MIGRATION_LIMITS).await?;
            // Several controllers may start at once, and the migrator takes no lock itself.
            tx.execute_unprepared(&format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")).await?;
        }
        if pooler {
            // A migration that was cut off may have left statements under the names that sea-orm is about to use.
            tx.execute_unprepared(FORGET_STATEMENTS).await?;
        }
        Migrator::up(&tx, None).await?;
        if pooler {
            tx.execute_unprepared(FORGET_STATEMENTS).await?;
        }
        if !self.is_postgres() {
            // The file's lock proves that no other controller is alive, so the sessions of earlier processes have
            // ended.
            tx.execute_unprepared("DELETE FROM controllers").await?;
        }
        Ok(tx.commit().await?)
    }

    /// True if several controllers may share the database.
    pub fn is_shared(&self) -> bool {
        self.is_postgres()
    }

    pub(super) fn is_postgres(&self) -> bool {
        self.shared.writer.is_postgres()
    }

    pub(super) fn reader(&self) -> &Pool {
        &self.shared.reader
    }

    /// Why writes fail at present, for the health service. `None` if they succeed.
    pub fn ailment(&self) -> Option<String> {
        self.shared.writer.vitals.ailment()
    }

    /// Begins a transaction that writes. Dropping it rolls back.
    pub(super) async fn begin(&self) -> Result<Tx, StoreError> {
        let turn = self.turn().await?;
        let begun = self.shared.writer.begin(Some(turn)).await;
        // Read by the writers that wait in `turn`.
        self.shared.away.store(matches!(begun, Err(StoreError::Unavailable(_))), Ordering::Relaxed);
        Ok(Tx { tx: begun? })
    }

    /// Waits for the permit to write: a caller within its budget, all others for longer than for a connection, because a
    /// queue behind a busy database (a whole fleet that says hello at once) is no outage.
    async fn turn(&self) -> Result<OwnedSemaphorePermit, StoreError> {
        let busy = || StoreError::busy(&self.shared.writer.place);
        let turn = Arc::clone(&self.shared.turns).acquire_owned();
        tokio::pin!(turn);
        let (begun, longest) = (tokio::time::Instant::now(), deadline::of_queue());
        let turn = loop {
            // The time that is left, so that a caller is answered to the moment.
            let left = longest.saturating_sub(begun.elapsed());
            match tokio::time::timeout(QUEUE_LOOK.min(left), &mut turn).await {
                Ok(turn) => break turn.map_err(|_| busy()),
                // The holder of the permit waits for a database that is away. The others need not queue to find that
                // out.
                Err(_) if self.shared.away.load(Ordering::Relaxed) || self.shared.writer.vitals.is_silent() => {
                    break Err(busy());
                }
                Err(_) if begun.elapsed() >= longest => break Err(busy()),
                Err(_) => {}
            }
        };
        // Paid for even if the permit came: the statements that follow must end within the rest.
        deadline::in_vain(begun.elapsed());
        turn
    }

    /// Runs a transaction, and runs it again if the database aborted it in favour of another one.
    pub(super) async fn again<T, F>(&self, transaction: impl Fn() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut pause = FIRST_PAUSE;
        loop {
            match transaction().await {
                Err(error) if error.is_conflict() && pause <= LAST_PAUSE => {
                    // Only `debug`: a conflict is expected under load, and the last error is returned.
                    tracing::debug!(error = &*crate::chain(&error), "a transaction is done again");
                    tokio::time::sleep(jittered(pause)).await;
                    pause *= 3;
                }
                done => return done,
            }
        }
    }

    /// Commits if `wrote`, else rolls back, so that a call that changed nothing is not audited as done.
    pub(super) async fn commit_if(&self, wrote: bool, tx: Tx) -> Result<(), StoreError> {
        if wrote { self.commit(tx).await } else { tx.rollback().await }
    }

    /// Commits with the audit record of the call behind it, then hints that something changed.
    pub(super) async fn commit(&self, tx: Tx) -> Result<(), StoreError> {
        // One transaction for both: a record written afterwards could be lost with the process or the connection.
        let record = audit::due();
        if let Some(record) = &record {
            audit::insert(&*tx, &record.row()).await?;
        }
        tx.commit().await?;
        if let Some(record) = record {
            record.note_stored();
        }
        for changes in [&self.shared.own_changes, &self.shared.changes] {
            changes.send_modify(|changes| *changes = changes.wrapping_add(1));
        }
        Ok(())
    }
}

/// A transaction that writes. Its connection holds the permit.
pub(super) struct Tx {
    tx: Transaction,
}

impl Deref for Tx {
    type Target = Transaction;

    fn deref(&self) -> &Transaction {
        &self.tx
    }
}

impl Tx {
    /// Commits without a hint, for changes that nobody waits for.
    pub(super) async fn commit(self) -> Result<(), StoreError> {
        self.tx.commit().await
    }

    /// Rolls back now. A dropped transaction is rolled back some time later.
    pub(super) async fn rollback(self) -> Result<(), StoreError> {
        self.tx.rollback().await
    }
}

/// Varies a pause by up to half in either direction.
fn jittered(pause: Duration) -> Duration {
    let mut random = [0u8; 1];
    // If there is no randomness, only the variation is lost.
    let _ = getrandom::fill(&mut random);
    pause.mul_f64(0.5 + f64::from(u8::from_ne_bytes(random)) / 255.0)
}

/// Begins the transaction of the migrations.
async fn begin(database: DatabaseConnection) -> Result<sea_orm::DatabaseTransaction, StoreError> {
    let options = TransactionOptions {
        sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate),
        ..TransactionOptions::default()
    };
    Ok(database.begin_with_options(options).await?)
}

async fn open_sqlite(path: &Path) -> Result<(Pool, Pool, File), StoreError> {
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(unusable(folder))?;
    }
    let lock = lock_file(path)?;
    // SQLite gives its `-wal` and `-shm` files the mode of the database's file.
    File::options().create(true).append(true).mode(0o600).open(path).map_err(unusable(path))?;
    for ending in ["", "-wal", "-shm", ".lock"] {
        crate::folders::keep_private(&beside(path, ending));
    }
    let place: Arc<str> = Arc::from(path.display().to_string());
    let failed = |error: sqlx::Error| StoreError::of_driver(&error, &place);
    let pool = |connections: u32| {
        // Reopening an idle connection would bring nothing: its file and its settings stay the same.
        let options = SqlitePoolOptions::new().idle_timeout(None).max_lifetime(None);
        options.max_connections(connections).acquire_timeout(CONNECT_TIMEOUT)
    };
    let writer = pool(1).connect_with(sqlite_options(path)).await.map_err(failed)?;
    // Guards the rule that all writes go through the one writer.
    let reader_options = sqlite_options(path).pragma("query_only", "ON");
    let reader = pool(SQLITE_READERS).connect_with(reader_options).await.map_err(failed)?;
    let vitals: Arc<Vitals> = Arc::default();
    let writer = Pool::sqlite(writer, Arc::clone(&place), Arc::clone(&vitals));
    Ok((writer, Pool::sqlite(reader, place, vitals), lock))
}

fn sqlite_options(file: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        // NORMAL, the default in WAL mode, may lose the last commits in a power cut, though they were acknowledged.
        .synchronous(SqliteSynchronous::Full)
        .foreign_keys(true)
        .busy_timeout(BUSY_TIMEOUT)
        .disable_statement_logging()
}

/// An error about this file or folder.
fn unusable(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |error| StoreError::File(path, error)
}

/// The path of a file next to the database, such as `-wal`.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// Takes the lock file next to the database. The lock ends with the process.
fn lock_file(path: &Path) -> Result<File, StoreError> {
    let mut options = File::options();
    options.create(true).truncate(false).write(true).mode(0o600);
    let place = beside(path, ".lock");
    let file = options.open(&place).map_err(unusable(&place))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StoreError::Locked(path.to_owned())),
        Err(TryLockError::Error(error)) => Err(unusable(&place)(error)),
    }
}

/// The URL without user and password, for messages.
fn without_password(url: &str) -> String {
    // The last `@`, because a password may contain one.
    match (url.find("://"), url.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => {
            let (head, tail) = (url.get(..scheme).unwrap_or_default(), url.get(at..).unwrap_or_default());
            format!("{head}://...{tail}")
        }
        (Some(_), _) => url.to_owned(),
        // Postgres' other form (`host=... password=...`), or a typo: a secret may stand anywhere, so nothing is shown.
        (None, _) => "...".to_owned(),
    }
}
