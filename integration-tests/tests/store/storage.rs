//! A database whose disk is full, read-only or failing, under load. No acknowledged write is lost, the store names the
//! fault, and it recovers by itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use integration_tests::failing::Failing;
use integration_tests::ledger::{Dice, setting};
use integration_tests::mount::Mount;
use integration_tests::postgres::Postgres;
use integration_tests::{not_tested, seconds, wait_until};
use marco_controller::store::{AuditQuery, AuditRow, CreateOutcome, Fault, OperationQuery, Store, StoreError};
use marco_proto::names::NodeId;

use crate::support::*;

/// Size of the database's disk; the test fills it.
const ROOM: &str = "64m";
const WRITERS: u64 = 4;
/// Pause of each writer after a write, so that the load alone does not fill the disk.
const REST: Duration = Duration::from_millis(15);

/// Faults of one run.
const ROUNDS: usize = 6;
/// Acknowledged writes between two faults: at least and at most.
const BETWEEN: (usize, usize) = (5, 60);

/// Concurrent writers, and their results.
struct Load {
    store: Store,
    node: NodeId,
    acknowledged: Mutex<BTreeSet<String>>,
    next: AtomicU64,
    faults: Mutex<Vec<(Fault, String)>>,
    stop: AtomicBool,
}

impl Load {
    async fn new(store: Store, url: String) -> Arc<Self> {
        let f = Fixture { store, url, folder: None };
        let node = f.enrolled(&["pi-1"]).await.remove(0);
        Arc::new(Self {
            store: f.store,
            node,
            acknowledged: Mutex::default(),
            next: AtomicU64::new(0),
            faults: Mutex::default(),
            stop: AtomicBool::new(false),
        })
    }

    fn start(self: &Arc<Self>) -> Vec<tokio::task::JoinHandle<()>> {
        let write = |load: Arc<Self>| async move {
            while !load.stop.load(Ordering::SeqCst) {
                load.write().await;
            }
        };
        (0..WRITERS).map(|_| tokio::spawn(write(Arc::clone(self)))).collect()
    }

    async fn write(&self) {
        let number = self.next.fetch_add(1, Ordering::SeqCst);
        let written = match number % 4 {
            0 => self.create_operation().await,
            large => self.record_audit(number, large == 1).await,
        };
        match written {
            // Only acknowledged writes count. Others may or may not be stored.
            Ok(name) => {
                self.acknowledged.lock().unwrap().insert(name);
            }
            Err(error) => {
                assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
                if let Some(fault) = error.fault() {
                    let said = std::error::Error::source(&error).unwrap().to_string();
                    self.faults.lock().unwrap().push((fault, said));
                }
            }
        }
        tokio::time::sleep(REST).await;
    }

    /// Several statements in a transaction. Returns the operation's id.
    async fn create_operation(&self) -> Result<String, StoreError> {
        let new = new_operation(reboot(), std::slice::from_ref(&self.node));
        let outcome = self.store.create_operation(&new, start()).await?;
        assert!(matches!(outcome, CreateOutcome::Created(_)), "{outcome:?}");
        Ok(new.id.to_string())
    }

    /// One statement. Returns the row's actor.
    async fn record_audit(&self, number: u64, large: bool) -> Result<String, StoreError> {
        // Large and small rows: small ones still fit on a disk that is nearly full.
        let message = "x".repeat(if large { 8_000 } else { 10 });
        let row = AuditRow {
            time: start(),
            actor: format!("writer-{number}"),
            credential: String::new(),
            from: String::new(),
            method: "CreateUser".to_owned(),
            target: String::new(),
            result: "OK".to_owned(),
            message,
        };
        self.store.record_audit(&row).await?;
        Ok(row.actor)
    }

    fn count(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits until writes fail with this fault and the store reports it. The message must name the place.
    async fn fails(&self, fault: Fault, place: &str) {
        wait_until(seconds(30), &format!("writes fail: {fault}"), async || {
            let faults = std::mem::take(&mut *self.faults.lock().unwrap());
            let found = faults.iter().find(|(found, _)| *found == fault);
            assert!(
                found.is_none_or(|(_, said)| said.contains(&fault.to_string()) && said.contains(place)),
                "{found:?}"
            );
            // A small row may still fit, and then the store reports for a moment that all is well.
            Ok(found.filter(|_| self.store.ailment().is_some()).map(|_| ()))
        })
        .await
        .unwrap();
    }

    /// Waits until writes succeed, again by themselves, and the store reports no fault; then until a random number of
    /// them was acknowledged, so that the next fault comes at a random moment.
    async fn runs_for(&self, dice: &mut Dice) {
        let enough = self.count() + BETWEEN.0 + dice.below(BETWEEN.1 - BETWEEN.0);
        wait_until(seconds(30), "it serves", async || {
            Ok((self.count() > enough && self.store.ailment().is_none()).then_some(()))
        })
        .await
        .unwrap();
    }

    /// Ends the load once the store serves again, and checks that nothing is lost.
    async fn ends(&self, writers: Vec<tokio::task::JoinHandle<()>>) {
        self.runs_for(&mut Dice(0)).await;
        self.stop.store(true, Ordering::SeqCst);
        for writer in writers {
            writer.await.unwrap();
        }
        self.nothing_is_lost(&self.store).await;
    }

    /// Checks that each acknowledged write is in the database.
    async fn nothing_is_lost(&self, store: &Store) {
        let query = AuditQuery { limit: u32::MAX / 2, ..AuditQuery::default() };
        let mut stored: BTreeSet<String> =
            store.audit(&query).await.unwrap().into_iter().map(|(_, row)| row.actor).collect();
        let query = OperationQuery { limit: u32::MAX / 2, ..OperationQuery::default() };
        stored.extend(store.operations(&query).await.unwrap().into_iter().map(|row| row.id.to_string()));
        let acknowledged = self.acknowledged.lock().unwrap();
        let lost: Vec<&String> = acknowledged.difference(&stored).collect();
        assert!(lost.is_empty(), "{} of {} are lost: {lost:?}", lost.len(), acknowledged.len());
    }
}

/// The choices of a run, and prints how to repeat them: `STORAGE_SEED`.
#[allow(clippy::print_stdout, reason = "a failing run is repeated by its seed")]
fn dice() -> Dice {
    let seed = setting("STORAGE_SEED", u64::from(std::process::id()));
    println!("storage: STORAGE_SEED={seed}");
    Dice(seed)
}

/// Each kind once, then random ones: `count` in all.
fn in_random_order<T: Copy>(kinds: &[T], count: usize, dice: &mut Dice) -> Vec<T> {
    let mut left = kinds.to_vec();
    let mut order = Vec::new();
    while order.len() < count {
        if left.is_empty() {
            left.extend_from_slice(kinds);
        }
        order.push(left.swap_remove(dice.below(left.len())));
    }
    order
}

/// Fills the disk completely.
fn fill(folder: &Path) {
    let mut file = fs::File::create(folder.join("ballast")).unwrap();
    let block = vec![1; 4096];
    while std::io::Write::write_all(&mut file, &block).is_ok() {}
}

fn empty(folder: &Path) {
    fs::remove_file(folder.join("ballast")).unwrap();
}

/// A tmpfs; `None` if this process may not mount one.
async fn small_disk(folder: &Path) -> Option<Mount> {
    let mounted = Mount::tmpfs(folder.join("disk"), ROOM).await.ok();
    assert!(mounted.is_some() || !rustix::process::geteuid().is_root(), "root can mount a tmpfs");
    if mounted.is_none() {
        not_tested("a full disk: only root may mount one");
    }
    mounted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_on_a_disk_that_fills_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = small_disk(folder.path()).await else { return };
    let file = disk.folder().join("marco.db").display().to_string();
    let url = format!("sqlite://{file}");
    let load = Load::new(Store::open(&url).await.unwrap(), url).await;
    let writers = load.start();
    let mut dice = dice();
    for _ in 0..3 {
        load.runs_for(&mut dice).await;
        fill(disk.folder());
        load.fails(Fault::DiskFull, &file).await;
        empty(disk.folder());
    }
    load.ends(writers).await;
    // A new process sees only the files on the disk, so the test opens a copy of them.
    let copy = folder.path().join("copy");
    fs::create_dir(&copy).unwrap();
    // The latest transactions are in the write-ahead log until a checkpoint.
    for ending in ["", "-wal"] {
        fs::copy(format!("{file}{ending}"), copy.join(format!("marco.db{ending}"))).unwrap();
    }
    let next = Store::open(&format!("sqlite://{}/marco.db", copy.display())).await.unwrap();
    load.nothing_is_lost(&next).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_on_a_read_only_disk_names_its_file() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = small_disk(folder.path()).await else { return };
    let file = disk.folder().join("marco.db").display().to_string();
    let url = format!("sqlite://{file}");
    let store = Store::open(&url).await.unwrap();
    store.create_token(&token("kept"), start()).await.unwrap();
    drop(store);
    // The files are closed a moment after the store.
    wait_until(seconds(30), "it is read-only", async || Ok(disk.remount("ro").await.ok())).await.unwrap();
    let error = Store::open(&url).await.unwrap_err();
    let said = marco_controller::chain(&error);
    assert!(said.contains("Read-only") && said.contains(&file), "{said}");
    disk.remount("rw").await.unwrap();
    let store = Store::open(&url).await.unwrap();
    assert_eq!(store.tokens(None, 10).await.unwrap().len(), 1);
}

#[allow(clippy::disallowed_methods, reason = "the test runs itself once more, under a library that fails")]
fn command(program: &Path) -> Command {
    Command::new(program)
}

#[tokio::test]
async fn sqlite_on_a_disk_that_fails_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let failing = Failing::build(folder.path(), "marco.db").unwrap();
    let run = move || -> ExitStatus {
        command(&std::env::current_exe().unwrap())
            // In a process of its own, because LD_PRELOAD acts when a process starts.
            .args(["--exact", "storage::on_a_failing_disk", "--ignored", "--nocapture"])
            .envs(failing.environment())
            .status()
            .unwrap()
    };
    assert!(tokio::task::spawn_blocking(run).await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs in a process of its own, by the test above"]
async fn on_a_failing_disk() {
    let fault = Failing::file().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("marco.db").display().to_string();
    let url = format!("sqlite://{file}");
    let load = Load::new(Store::open(&url).await.unwrap(), url).await;
    let writers = load.start();
    let mut dice = dice();
    // A kernel that meets an error makes a file system read-only: writes to open files fail, and SQLite says "I/O error";
    // files that are opened from then on say so.
    let kinds = [("fsync", Fault::Io), ("write", Fault::Io), ("readonly", Fault::ReadOnly)];
    for (what, said) in in_random_order(&kinds, ROUNDS, &mut dice) {
        load.runs_for(&mut dice).await;
        fs::write(&fault, what).unwrap();
        load.fails(said, &file).await;
        fs::remove_file(&fault).unwrap();
    }
    load.ends(writers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_on_a_disk_that_fails_loses_nothing_that_was_acknowledged() {
    let (server, failing) = tokio::task::spawn_blocking(|| Postgres::start_own_failing().unwrap()).await.unwrap();
    let url = server.database().unwrap();
    let load = Load::new(Store::open(&url).await.unwrap(), url).await;
    let writers = load.start();
    let mut dice = dice();
    for what in in_random_order(&["fsync", "write", "readonly"], ROUNDS, &mut dice) {
        load.runs_for(&mut dice).await;
        failing.fail(what).unwrap();
        // A server that cannot write its log ends, and its clients hear that or nothing.
        wait_until(seconds(30), "writes fail", async || Ok(load.store.ailment().is_some().then_some(())))
            .await
            .unwrap();
        failing.heal().unwrap();
        // It recovers by itself, or gave up while the disk failed: whoever watches over it starts it.
        let _ = server.pause();
        server.resume().unwrap();
    }
    load.ends(writers).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_whose_disk_fills_or_takes_no_writes_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let server = tokio::task::spawn_blocking(|| Postgres::start_own().unwrap()).await.unwrap();
    let disk = small_disk(folder.path()).await;
    let url = match &disk {
        // The write-ahead log stays on the large disk: a server that cannot write its log ends.
        Some(disk) => server.database_in(disk.folder()).unwrap(),
        None => server.database().unwrap(),
    };
    let place = url.split('@').nth(1).unwrap().to_owned();
    let load = Load::new(Store::open(&url).await.unwrap(), url.clone()).await;
    let writers = load.start();
    let mut dice = dice();
    let set = |value: &str| {
        let set = format!("ALTER SYSTEM SET default_transaction_read_only = {value}");
        for statement in [set.as_str(), "SELECT pg_reload_conf()"] {
            server.by_hand(&url, statement).unwrap().unwrap();
        }
    };
    for what in in_random_order(&["full", "readonly", "away"], ROUNDS, &mut dice) {
        load.runs_for(&mut dice).await;
        match (what, &disk) {
            ("full", Some(disk)) => {
                fill(disk.folder());
                load.fails(Fault::DiskFull, &place).await;
                empty(disk.folder());
            }
            // A server that was demoted to a standby refuses writes with the same error.
            ("readonly", _) => {
                set("on");
                load.fails(Fault::ReadOnly, &place).await;
                set("off");
            }
            // A server that stops is another fault, from which the store must recover too.
            _ => {
                server.pause().unwrap();
                wait_until(seconds(30), "writes fail", async || Ok(load.store.ailment().is_some().then_some(())))
                    .await
                    .unwrap();
                server.resume().unwrap();
            }
        }
    }
    load.ends(writers).await;
}
