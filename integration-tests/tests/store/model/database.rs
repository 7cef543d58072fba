//! Databases of histories, and the faults that are injected into them.

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

/// Size of the disk: room for the database of one history and its write-ahead log.
const ROOM: &str = "32m";
const FILE: &str = "marco.db";

/// A folder, in memory if possible: a history commits hundreds of times, each with an fsync.
pub(super) fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory).unwrap() } else { tempfile::tempdir().unwrap() }
}

/// Databases with enrolled nodes. Made once and copied for each history, to save time.
pub(super) struct Template {
    file: PathBuf,
    /// Name of the template database on Postgres.
    name: String,
    /// URL of the administrator's database on Postgres.
    admin: String,
    pub(super) nodes: Vec<NodeId>,
    /// Serial numbers of their certificates.
    pub(super) serials: Vec<String>,
    /// Contents of pushes.
    pub(super) contents: Arc<Vec<Content>>,
    /// A disk that can be filled. `None`: this process may not mount one. Before `folder`, so that it is unmounted
    /// first.
    disk: Option<Mount>,
    folder: tempfile::TempDir,
}

async fn enrolled(fixture: &Fixture) -> Vec<NodeId> {
    let ids: Vec<String> = (0..PIS).map(|number| format!("pi-{number}")).collect();
    fixture.enrolled(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await
}

/// Runs a statement as the administrator of Postgres.
fn administer(admin: &str, statement: &str) {
    Postgres::start().unwrap().by_hand(admin, statement).unwrap().unwrap();
}

impl Template {
    pub(super) async fn make() -> Self {
        let folder = folder();
        let disk = Mount::tmpfs(folder.path().join("disk"), ROOM).await.ok();
        // Otherwise the histories with a full disk could vanish without notice.
        assert!(disk.is_some() || !rustix::process::geteuid().is_root(), "root can mount a tmpfs");
        let url = format!("sqlite://{}", folder.path().join(FILE).display());
        let fixture = Fixture { store: Store::open(&url).await.unwrap(), url, folder: None };
        let nodes = enrolled(&fixture).await;
        let serials = serials(&fixture.store, &nodes).await;
        let file = folder.path().join("template.db");
        // One complete file. The original may still have commits in its write-ahead log only.
        fixture.by_hand(&[&format!("VACUUM INTO '{}'", file.display())]).await.remove(0).unwrap();
        let url = Postgres::start().unwrap().database().unwrap();
        let (server, name) = url.rsplit_once('/').map(|(server, name)| (server.to_owned(), name.to_owned())).unwrap();
        let admin = format!("{server}/postgres");
        let fixture = Fixture { store: Store::open(&url).await.unwrap(), url, folder: None };
        enrolled(&fixture).await;
        assert_eq!(self::serials(&fixture.store, &nodes).await.len(), serials.len());
        drop(fixture);
        // Postgres copies no template that has connections, and a dropped pool closes its own only some time later.
        let end = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'");
        administer(&admin, &end);
        let contents = Arc::new(bytes::contents());
        Self { file, name, admin, nodes, serials, contents, disk, folder }
    }

    pub(super) fn has_small_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Serial numbers of the nodes' certificates in a database. Random, so they differ between the two templates.
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

/// Copies a folder with all that it contains.
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

/// Injected fault that explains an error of the database.
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
            // Through a proxy, which can lose a commit or its answer.
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

    /// Fault that may keep the database from answering now. `None`: an error would be a defect.
    pub(super) fn trouble(&self) -> Option<Trouble> {
        match &self.kind {
            Kind::Sqlite { is_full, .. } => is_full.then_some(Trouble::FullDisk),
            Kind::Postgres { armed, .. } => (*armed > 0).then_some(Trouble::Connection),
        }
    }

    /// Notes an error, which may have used up an injected fault.
    pub(super) fn note_error(&mut self) {
        if let Kind::Postgres { proxy, armed, .. } = &mut self.kind {
            *armed = proxy.swallows_left();
        }
    }

    /// Loses the next commit's answer after the commit is stored. `before`: loses the commit itself. Returns false on
    /// SQLite.
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
        // Large blocks first, then small ones into the rest: otherwise a commit of a few pages would still fit.
        for size in [256 * 1024, 4096] {
            let block = vec![1; size];
            while std::io::Write::write_all(&mut ballast, &block).is_ok() {}
        }
    }

    /// Takes back all injected faults.
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

    /// Backs the database up. There are no writers meanwhile. `None`: it is on Postgres, or its disk is full.
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

    /// Restores a backup under a new path. The previous files are deleted; stores that still have them open see the old
    /// data.
    pub(super) fn restore(&mut self, from: &Path) {
        let Kind::Sqlite { folder, restored, .. } = &mut self.kind else { return };
        *restored += 1;
        let next = folder.join(format!("restored-{restored}"));
        copy(from, &next);
        let before = PathBuf::from(self.url.trim_start_matches("sqlite://"));
        self.url = format!("sqlite://{}", next.join(FILE).display());
        for ending in ["", "-wal", "-shm", ".lock"] {
            // Best effort: a missing file takes no room on the small disk.
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
            // Best effort: the server ends with this process, and its databases with it.
            Kind::Postgres { name, admin, .. } => {
                let drop = format!("DROP DATABASE {name} WITH (FORCE)");
                let _ = Postgres::start().and_then(|server| server.by_hand(admin, &drop));
            }
        }
    }
}
