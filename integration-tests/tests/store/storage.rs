//! A database whose disk is full, read-only or failing, under load. No acknowledged write is lost, the store names the
//! fault, and it recovers by itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use integration_tests::mount::Mount;
use integration_tests::postgres::Postgres;
use integration_tests::{not_tested, seconds, wait_until};
use marco_controller::store::{AuditQuery, AuditRow, Fault, Store, StoreError};

use crate::support::*;

/// Size of the database's disk; the test fills it.
const ROOM: &str = "64m";
const WRITERS: u64 = 4;
/// Pause of each writer after a write, so that the load alone does not fill the disk.
const REST: Duration = Duration::from_millis(15);

/// Concurrent writers, and their results.
struct Load {
    store: Store,
    acknowledged: Mutex<BTreeSet<String>>,
    next: AtomicU64,
    faults: Mutex<Vec<(Fault, String)>>,
    stop: AtomicBool,
}

impl Load {
    fn new(store: Store) -> Arc<Self> {
        Arc::new(Self {
            store,
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
        // Large and small rows: small ones still fit on a disk that is nearly full.
        let message = "x".repeat(if number.is_multiple_of(3) { 8_000 } else { 10 });
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
        match self.store.record_audit(&row).await {
            Ok(_) => {
                // Only acknowledged rows count. Others may or may not be stored.
                self.acknowledged.lock().unwrap().insert(row.actor);
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

    /// Waits until writes succeed again by themselves, and the store reports no fault.
    async fn heals(&self) {
        let before = self.count();
        wait_until(seconds(30), "it serves again", async || {
            Ok((self.count() > before + 20 && self.store.ailment().is_none()).then_some(()))
        })
        .await
        .unwrap();
    }

    /// Checks that each acknowledged write is in the database.
    async fn nothing_is_lost(&self, store: &Store) {
        let query = AuditQuery { limit: u32::MAX / 2, ..AuditQuery::default() };
        let stored: BTreeSet<String> =
            store.audit(&query).await.unwrap().into_iter().map(|(_, row)| row.actor).collect();
        let acknowledged = self.acknowledged.lock().unwrap();
        let lost: Vec<&String> = acknowledged.difference(&stored).collect();
        assert!(lost.is_empty(), "{} of {} are lost: {lost:?}", lost.len(), acknowledged.len());
    }
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
    let load = Load::new(Store::open(&url).await.unwrap());
    let writers = load.start();
    for _ in 0..3 {
        load.heals().await;
        fill(disk.folder());
        load.fails(Fault::DiskFull, &file).await;
        empty(disk.folder());
    }
    load.heals().await;
    load.stop.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
    load.nothing_is_lost(&load.store).await;
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

/// Source of a library that is preloaded into a process of its own. While a file exists, the system calls that it names
/// fail on the database's files.
const FAILING: &str = r#"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
static int fails(int fd, const char *what, int error) {
    char link[64], path[4096], asked[16] = "";
    const char *fault = getenv("MARCO_FAULT_FILE");
    int file = fault ? syscall(SYS_openat, AT_FDCWD, fault, O_RDONLY) : -1;
    if (file < 0) return 0;
    syscall(SYS_read, file, asked, sizeof asked - 1);
    syscall(SYS_close, file);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strcmp(asked, what) != 0 || !strstr(path, "marco.db")) return 0;
    errno = error;
    return 1;
}
int fsync(int fd) { return fails(fd, "fsync", EIO) ? -1 : (int)syscall(SYS_fsync, fd); }
int fdatasync(int fd) { return fails(fd, "fsync", EIO) ? -1 : (int)syscall(SYS_fdatasync, fd); }
ssize_t write(int fd, const void *from, size_t count) {
    return fails(fd, "write", EROFS) ? -1 : syscall(SYS_write, fd, from, count);
}
ssize_t pwrite64(int fd, const void *from, size_t count, off_t at) {
    return fails(fd, "write", EROFS) ? -1 : syscall(SYS_pwrite64, fd, from, count, at);
}
ssize_t pwrite(int fd, const void *from, size_t count, off_t at) { return pwrite64(fd, from, count, at); }
"#;

#[allow(clippy::disallowed_methods, reason = "the test runs itself once more, under a library that fails")]
fn command(program: &Path) -> Command {
    Command::new(program)
}

#[tokio::test]
async fn sqlite_whose_fsync_or_writes_fail_loses_nothing_that_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let (source, library) = (folder.path().join("fault.c"), folder.path().join("fault.so"));
    fs::write(&source, FAILING).unwrap();
    // Only a library that is preloaded reaches the calls of SQLite, which is C.
    let built = command(Path::new("cc")).args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status().unwrap();
    assert!(built.success(), "the library cannot be compiled");
    let fault = folder.path().join("fault");
    let run = move || -> ExitStatus {
        command(&std::env::current_exe().unwrap())
            // In a process of its own, because LD_PRELOAD acts when a process starts.
            .args(["--exact", "storage::under_failing_system_calls", "--ignored", "--nocapture"])
            .env("LD_PRELOAD", &library)
            .env("MARCO_FAULT_FILE", &fault)
            .status()
            .unwrap()
    };
    assert!(tokio::task::spawn_blocking(run).await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs in a process of its own, by the test above"]
async fn under_failing_system_calls() {
    let fault = std::env::var("MARCO_FAULT_FILE").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("marco.db").display().to_string();
    let load = Load::new(Store::open(&format!("sqlite://{file}")).await.unwrap());
    let writers = load.start();
    for what in ["fsync", "write", "fsync"] {
        load.heals().await;
        fs::write(&fault, what).unwrap();
        load.fails(Fault::Io, &file).await;
        fs::remove_file(&fault).unwrap();
    }
    load.heals().await;
    load.stop.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
    load.nothing_is_lost(&load.store).await;
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
    let load = Load::new(Store::open(&url).await.unwrap());
    let writers = load.start();
    for _ in 0..2 {
        load.heals().await;
        if let Some(disk) = &disk {
            fill(disk.folder());
            load.fails(Fault::DiskFull, &place).await;
            empty(disk.folder());
            load.heals().await;
        }
        // A server that was demoted to a standby refuses writes with the same error.
        let set = |value: &str| {
            let set = format!("ALTER SYSTEM SET default_transaction_read_only = {value}");
            for statement in [set.as_str(), "SELECT pg_reload_conf()"] {
                server.by_hand(&url, statement).unwrap().unwrap();
            }
        };
        set("on");
        load.fails(Fault::ReadOnly, &place).await;
        set("off");
        load.heals().await;
        // A server that stops is another fault, from which the store must recover too.
        server.pause().unwrap();
        wait_until(seconds(30), "writes fail", async || Ok(load.store.ailment().is_some().then_some(())))
            .await
            .unwrap();
        server.resume().unwrap();
    }
    load.heals().await;
    load.stop.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
    load.nothing_is_lost(&load.store).await;
}
