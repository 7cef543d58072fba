//! The databases of histories, and what may happen to them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use integration_tests::mount::Mount;
use integration_tests::postgres::Postgres;
use integration_tests::proxy::Proxy;
use marco_controller::store::{CertificateQuery, Store};
use marco_proto::names::NodeId;

use super::PIS;
use super::bytes::{self, Content};
use crate::support::Fixture;

/// Room for the database of one history and its log.
const ROOM: &str = "32m";
const FILE: &str = "marco.db";

/// A folder in memory where there is one: a history commits hundreds of times, each time to the disk.
pub(super) fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// Databases with nodes enrolled, made once and copied for each history.
pub(super) struct Template {
    file: PathBuf,
    /// The name of the one on Postgres.
    name: String,
    /// The administrator's way to Postgres.
    admin: String,
    pub(super) nodes: Vec<NodeId>,
    /// The serial numbers of their certificates.
    pub(super) serials: Vec<String>,
    /// What is pushed.
    pub(super) contents: Arc<Vec<Content>>,
    /// A disk that can be filled, if this process may mount one; unmounted before its folder goes.
    disk: Option<Mount>,
    folder: tempfile::TempDir,
}

async fn enrolled(fixture: &Fixture) -> Vec<NodeId> {
    let ids: Vec<String> = (0..PIS).map(|number| format!("pi-{number}")).collect();
    fixture.enrolled(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await
}

/// By an administrator's hand.
fn administer(admin: &str, statement: &str) {
    Postgres::start().unwrap().by_hand(admin, statement).unwrap().unwrap();
}

impl Template {
    pub(super) async fn make() -> Self {
        let folder = folder();
        let disk = Mount::tmpfs(folder.path().join("disk"), ROOM).await.ok();
        assert!(disk.is_some() || !rustix::process::geteuid().is_root(), "root can mount a tmpfs");
        let url = format!("sqlite://{}", folder.path().join(FILE).display());
        let fixture = Fixture { store: Store::open(&url).await.unwrap(), url, folder: None };
        let nodes = enrolled(&fixture).await;
        let serials = serials(&fixture.store, &nodes).await;
        let file = folder.path().join("template.db");
        // A copy without a write-ahead log, whatever the pool of the first one does with its own.
        fixture.by_hand(&[&format!("VACUUM INTO '{}'", file.display())]).await.remove(0).unwrap();
        let url = Postgres::start().unwrap().database().unwrap();
        let (server, name) = url.rsplit_once('/').map(|(server, name)| (server.to_owned(), name.to_owned())).unwrap();
        let admin = format!("{server}/postgres");
        let fixture = Fixture { store: Store::open(&url).await.unwrap(), url, folder: None };
        enrolled(&fixture).await;
        assert_eq!(self::serials(&fixture.store, &nodes).await.len(), serials.len());
        drop(fixture);
        let end = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'");
        administer(&admin, &end);
        let contents = Arc::new(bytes::contents());
        Self { file, name, admin, nodes, serials, contents, disk, folder }
    }

    pub(super) fn has_small_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// The serial numbers of the nodes' certificates in a database: random in each of the two.
    pub(super) async fn serials_in(&self, store: &Store) -> Vec<String> {
        serials(store, &self.nodes).await
    }
}

async fn serials(store: &Store, nodes: &[NodeId]) -> Vec<String> {
    let mut serials = Vec::new();
    for node in nodes {
        let query = CertificateQuery { after: None, limit: 1, subject: node.to_string(), valid_at: None };
        let found = store.certificates(&query).await.unwrap();
        serials.push(found[0].certificate.serial.clone());
    }
    serials
}

/// Copies what is in one folder into another one.
pub(super) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)
        } else {
            fs::copy(entry.path(), target).map(drop).unwrap()
        }
    }
}

enum Kind {
    Sqlite { folder: PathBuf, restored: u32, is_full: bool },
    Postgres { proxy: Proxy, name: String, admin: String, armed: usize },
}

/// The database of one history.
pub(super) struct Database {
    kind: Kind,
    pub(super) url: String,
    can_fill: bool,
}

/// What an error of the database came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trouble {
    FullDisk,
    Connection,
}

impl Database {
    pub(super) async fn new(template: &Template, on_postgres: bool) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let can_fill = template.disk.is_some() && !on_postgres;
        if on_postgres {
            let name = format!("model_{number}");
            administer(&template.admin, &format!("CREATE DATABASE {name} TEMPLATE {}", template.name));
            let server = Postgres::start().unwrap().address();
            let proxy = Proxy::start(server).await.unwrap();
            let url = format!("postgres://postgres@{}/{name}", proxy.address());
            let kind = Kind::Postgres { proxy, name, admin: template.admin.clone(), armed: 0 };
            return Self { kind, url, can_fill };
        }
        let disk = template.disk.as_ref().map_or(template.folder.path(), Mount::folder);
        let folder = disk.join(format!("history-{number}"));
        fs::create_dir(&folder).unwrap();
        fs::copy(&template.file, folder.join(FILE)).unwrap();
        let url = format!("sqlite://{}", folder.join(FILE).display());
        Self { kind: Kind::Sqlite { folder, restored: 0, is_full: false }, url, can_fill }
    }

    pub(super) fn is_postgres(&self) -> bool {
        matches!(self.kind, Kind::Postgres { .. })
    }

    /// What may keep it from answering now.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        match &self.kind {
            Kind::Sqlite { is_full, .. } => is_full.then_some(Trouble::FullDisk),
            Kind::Postgres { armed, .. } => (*armed > 0).then_some(Trouble::Connection),
        }
    }

    /// An error was seen.
    pub(super) fn note_error(&mut self) {
        if let Kind::Postgres { proxy, armed, .. } = &mut self.kind {
            *armed = proxy.swallows_left();
        }
    }

    /// The next commit is stored and its answer is lost; or, `before`, it does not arrive.
    pub(super) fn cut(&mut self, before: bool) -> bool {
        let Kind::Postgres { proxy, armed, .. } = &mut self.kind else { return false };
        if before {
            proxy.swallow(b"COMMIT")
        } else {
            proxy.swallow_answer_to(b"COMMIT")
        }
        *armed += 1;
        true
    }

    pub(super) fn fill(&mut self) {
        let can_fill = self.can_fill;
        let Kind::Sqlite { folder, is_full, .. } = &mut self.kind else { return };
        if !can_fill || *is_full {
            return;
        }
        *is_full = true;
        let mut ballast = fs::File::create(folder.join("ballast")).unwrap();
        for size in [256 * 1024, 4096] {
            let block = vec![1; size];
            while std::io::Write::write_all(&mut ballast, &block).is_ok() {}
        }
    }

    /// Nothing happens to it any more.
    pub(super) fn heal(&mut self) {
        match &mut self.kind {
            Kind::Sqlite { folder, is_full, .. } => {
                if std::mem::take(is_full) {
                    fs::remove_file(folder.join("ballast")).unwrap();
                }
            }
            Kind::Postgres { proxy, armed, .. } => {
                proxy.forget_swallows();
                *armed = 0;
            }
        }
    }

    /// Copies it; nobody writes meanwhile. `None`: not this kind, or its disk is full.
    pub(super) fn save(&self, to: &Path) -> Option<()> {
        let Kind::Sqlite { is_full: false, .. } = &self.kind else { return None };
        fs::create_dir_all(to).unwrap();
        let file = PathBuf::from(self.url.strip_prefix("sqlite://")?);
        for ending in ["", "-wal"] {
            let from = file.with_file_name(format!("{FILE}{ending}"));
            if from.exists() {
                fs::copy(from, to.join(format!("{FILE}{ending}"))).unwrap();
            }
        }
        Some(())
    }

    /// Puts what was saved where it is opened next. The one before is forgotten, with whoever still has it open.
    pub(super) fn restore(&mut self, from: &Path) {
        let Kind::Sqlite { folder, restored, .. } = &mut self.kind else { return };
        *restored += 1;
        let next = folder.join(format!("restored-{restored}"));
        copy(from, &next);
        let before = PathBuf::from(self.url.trim_start_matches("sqlite://"));
        self.url = format!("sqlite://{}", next.join(FILE).display());
        for ending in ["", "-wal", "-shm", ".lock"] {
            // One that is not there takes no room.
            let _ = fs::remove_file(before.with_file_name(format!("{FILE}{ending}")));
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        match &self.kind {
            Kind::Sqlite { folder, .. } => {
                let _ = fs::remove_dir_all(folder);
            }
            // The server goes with this process, and so does what it does not drop.
            Kind::Postgres { name, admin, .. } => {
                let drop = format!("DROP DATABASE {name} WITH (FORCE)");
                let _ = Postgres::start().and_then(|server| server.by_hand(admin, &drop));
            }
        }
    }
}
