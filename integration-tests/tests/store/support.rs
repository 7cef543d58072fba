//! Fixtures: a store on a fresh database, and shorthands that create nodes, sessions, operations and reports.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use integration_tests::postgres::Postgres;
use marco_controller::operation::{
    Action, ExecutionState, FrozenArtifact, Greeting, NodeMode, Notice, OperationState, Target, Update,
};
use marco_controller::store::{
    ApproveOutcome, ArtifactRow, Assignment, Board, CertificateRow, CreateOutcome, EnrolOutcome, Enrolment,
    ExecutionRow, Hello, Kind, NewOperation, NewToken, NodeRow, Purpose, Reconciled, RenewOutcome, Renewal,
    ReportOutcome, ReportRow, Scope, SentLog, SessionOutcome, SessionStart, Store, System,
};
use marco_proto::names::{ArtifactId, ExecutionId, JoinTokenId, NodeId, OperationId};

/// A store on a fresh database.
pub(crate) struct Fixture {
    pub(crate) store: Store,
    pub(crate) url: String,
    pub(crate) folder: Option<tempfile::TempDir>,
}

pub(crate) async fn sqlite() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}/marco.db", folder.path().display());
    Fixture { store: Store::open(&url).await.unwrap(), url, folder: Some(folder) }
}

pub(crate) async fn postgres() -> Fixture {
    // Starting a server blocks for seconds, which a runtime's thread must not.
    let url = tokio::task::spawn_blocking(|| Postgres::start().unwrap().database().unwrap()).await.unwrap();
    Fixture { store: Store::open(&url).await.unwrap(), url, folder: None }
}

pub(crate) fn start() -> DateTime<Utc> {
    // A fixed time (January 2027), so that failures print the same numbers in each run.
    DateTime::from_timestamp(1_800_000_000, 0).unwrap()
}

pub(crate) fn after(seconds: i64) -> DateTime<Utc> {
    start() + TimeDelta::seconds(seconds)
}

pub(crate) fn node(id: &str) -> NodeId {
    NodeId::parse(id).unwrap()
}

pub(crate) fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub(crate) fn reboot() -> Action {
    Action::Reboot(Notice { delay: Duration::ZERO, message: "hello".to_owned() })
}

pub(crate) fn power_off() -> Action {
    Action::PowerOff(Notice { delay: Duration::ZERO, message: String::new() })
}

fn frozen(id: &str) -> FrozenArtifact {
    FrozenArtifact { id: id.to_owned(), sha256: digest(id) }
}

/// A stand-in for the digest of this artifact's bytes.
pub(crate) fn digest(id: &str) -> String {
    format!("{:0>64}", hex::encode(id))
}

/// An update with an image. Without one: of the boot files only, with the defaults `boot4` for the family `pi4` and
/// `boot` for all others.
pub(crate) fn update(image: Option<&str>) -> Action {
    let mut bootcodes = BTreeMap::new();
    if image.is_none() {
        bootcodes.insert("pi4".to_owned(), frozen("boot4"));
        // `*` stands for all families without an entry of their own.
        bootcodes.insert("*".to_owned(), frozen("boot"));
    }
    Action::Update(Update {
        image: image.map(frozen),
        bootcode: None,
        bootcodes,
        notice: Notice { delay: Duration::ZERO, message: String::new() },
        discard_home: false,
        raw: false,
    })
}

pub(crate) fn artifact(id: &str, kind: Kind, purpose: Purpose) -> ArtifactRow {
    ArtifactRow {
        id: ArtifactId::parse(id).unwrap(),
        kind,
        purpose,
        sha256: digest(id),
        // Larger than 32 bits, so that a column that is too small would show.
        size: 5_000_000_000,
        chunk_size: 4 * 1024 * 1024,
        chunk_sha256: vec![7; 64],
        unpacked_bytes: 9,
        entries: 3,
        compression: "zstd".to_owned(),
        push_time: start(),
        creator: "pat".to_owned(),
        default_for: Vec::new(),
        open_to_mirror: false,
    }
}

pub(crate) fn new_operation(action: Action, nodes: &[NodeId]) -> NewOperation {
    NewOperation {
        // Version 7, as in production: ids sort by time.
        id: OperationId::parse(&uuid::Uuid::now_v7().to_string()).unwrap(),
        action,
        target: Target::Nodes(nodes.iter().map(NodeId::name).collect()),
        nodes: nodes.to_vec(),
        schedule_time: start(),
        expire_time: after(24 * 3600),
        creator: "pat".to_owned(),
        request: None,
        retry_of: None,
        origin: None,
        rollout: None,
        window: None,
        scope: Scope::everything(),
    }
}

pub(crate) fn board(serial: &str) -> Board {
    Board {
        model: "Raspberry Pi 4 Model B Rev 1.4".to_owned(),
        serial: serial.to_owned(),
        family: "pi4".to_owned(),
        memory_bytes: 4 << 30,
        ..Board::default()
    }
}

pub(crate) fn hello(boot_id: &str, serial: &str, accepted: DateTime<Utc>) -> SessionStart {
    SessionStart {
        controller_id: "c1".to_owned(),
        accept_time: accepted,
        // Empty: `say_hello` fills in the node's own key.
        key_sha256: String::new(),
        origin: "192.0.2.7".to_owned(),
        boot_id: boot_id.to_owned(),
        instance: String::new(),
        mode: NodeMode::Running,
        agent_version: "0.1.0".to_owned(),
        board: board(serial),
        system: System { os: "Marco OS".to_owned(), ..System::default() },
    }
}

/// The outcome of a first enrolment.
pub(crate) fn admitted(id: &str, held: bool, generation: i64) -> EnrolOutcome {
    EnrolOutcome::Admitted { node: node(id), held, generation, again: None }
}

pub(crate) fn serial_of(id: &str) -> String {
    format!("{:0>16}", hex::encode(id))
}

pub(crate) fn certificate(serial: &str, id: &NodeId, key: &str, generation: i64) -> CertificateRow {
    CertificateRow {
        serial: serial.to_owned(),
        node: Some(id.clone()),
        subject: id.to_string(),
        role: "node".to_owned(),
        key_sha256: key.to_owned(),
        not_before: start(),
        not_after: after(30 * 86400),
        generation,
        pem: format!("pem of {serial}"),
        given_for: String::new(),
    }
}

/// A join token, not stored yet.
pub(crate) fn token(secret: &str) -> NewToken {
    NewToken {
        id: JoinTokenId::parse(secret).unwrap(),
        secret_sha256: secret.to_owned(),
        max_uses: 1,
        expire_time: after(1800),
        require_approval: false,
        labels: labels(&[("room", "blue")]),
        creator: "pat".to_owned(),
        cidrs: Vec::new(),
        serials: Vec::new(),
        nodes: Vec::new(),
    }
}

pub(crate) fn report(assignment: &Assignment, sequence: u64, state: ExecutionState, boot_id: &str) -> ReportRow {
    ReportRow {
        execution: assignment.execution.clone(),
        attempt: assignment.attempt,
        sequence,
        state,
        phase: String::new(),
        bytes_done: 0,
        bytes_total: 0,
        error: None,
        boot_id: boot_id.to_owned(),
        accept_boot_id: String::new(),
        release: None,
        cancel_refused: false,
        log: SentLog::default(),
        journal_lost: false,
    }
}

/// True if the execution is FAILED for this reason, and consistent with that: it has a finish time and no deadline.
pub(crate) fn failed_as(reason: &str, row: &ExecutionRow) -> bool {
    row.state == ExecutionState::Failed
        && row.error.as_ref().is_some_and(|error| error.reason == reason)
        && row.finish_time.is_some()
        // An ended execution with a deadline would become overdue.
        && row.deadline.is_none()
}

fn greeting(boot_id: &str, answers_queries: bool) -> Greeting<'_> {
    Greeting { mode: NodeMode::Running, boot_id, answers_queries, journal_lost: false }
}

/// An empty Hello of the running system, from an agent that answers no queries.
pub(crate) fn said(boot_id: &str) -> Hello<'_> {
    Hello { greeting: greeting(boot_id, false), listed: &[] }
}

impl Fixture {
    /// Runs statements by hand, as an attacker with the database's password or file could. The errors are the
    /// database's messages.
    #[allow(clippy::disallowed_methods, reason = "a test that plays somebody with the file")]
    pub(crate) async fn by_hand(&self, statements: &[&str]) -> Vec<Result<(), String>> {
        let (url, statements) = (self.url.clone(), statements.iter().map(|&text| text.to_owned()).collect::<Vec<_>>());
        let run = move |statement: String| match url.strip_prefix("sqlite://") {
            // Python's sqlite3 ignores the store's own lock file, as an attacker would.
            Some(file) => {
                let script =
                    "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(sys.argv[2]); c.commit()";
                let arguments = ["-c", script, file, &statement];
                let output = std::process::Command::new("python3").args(arguments).output().unwrap();
                if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
            }
            None => Postgres::start().unwrap().by_hand(&url, &statement).unwrap(),
        };
        tokio::task::spawn_blocking(move || statements.into_iter().map(run).collect()).await.unwrap()
    }

    pub(crate) async fn token(&self, secret: &str, max_uses: u32) -> NewToken {
        let token = NewToken { max_uses, ..token(secret) };
        self.store.create_token(&token, start()).await.unwrap();
        token
    }

    pub(crate) async fn enrol(&self, token: &str, key: &str, wanted: Option<&str>, serial: &str) -> EnrolOutcome {
        let wish = wish(token, key, wanted, serial);
        // Each issue has its own serial number, also when the same key enrols twice.
        let serial = uuid::Uuid::now_v7().simple().to_string();
        let issue = |id: &NodeId, generation| Some(certificate(&serial, id, key, generation));
        self.store.enrol(&wish, after(1), issue).await.unwrap()
    }

    /// Enrols nodes and returns them: approved, without sessions.
    pub(crate) async fn enrolled(&self, ids: &[&str]) -> Vec<NodeId> {
        let token = format!("token-{}", ids[0]);
        // One token for all of them: the number of its uses is no part of these claims.
        self.token(&token, 1000).await;
        for id in ids {
            let outcome = self.enrol(&token, &format!("key-{id}"), Some(id), &serial_of(id)).await;
            assert_eq!(outcome, admitted(id, false, 1));
        }
        ids.iter().map(|id| node(id)).collect()
    }

    pub(crate) async fn session(&self, id: &NodeId, boot_id: &str, now: DateTime<Utc>) -> i64 {
        self.begin(id, &hello(boot_id, &serial_of(id.as_str()), now), now).await
    }

    /// Begins a session. `start.key_sha256` empty: the key of [`Fixture::enrolled`].
    pub(crate) async fn say_hello(&self, id: &NodeId, start: &SessionStart, now: DateTime<Utc>) -> SessionOutcome {
        let key_sha256 = if start.key_sha256.is_empty() { format!("key-{id}") } else { start.key_sha256.clone() };
        let start = SessionStart { key_sha256, ..start.clone() };
        self.store.begin_session(id, &start, now).await.unwrap()
    }

    /// Approves a node, or one of its pending keys.
    pub(crate) async fn approve(&self, id: &NodeId, fingerprint: Option<&str>, now: DateTime<Utc>) -> NodeRow {
        match self.store.approve(id, fingerprint, now).await.unwrap() {
            ApproveOutcome::Approved(row) => *row,
            other => panic!("{other:?}"),
        }
    }

    /// Renews the certificate with this serial number, from one key to another.
    pub(crate) async fn renew(
        &self,
        id: &NodeId,
        (serial, key): (&str, &str),
        (new_serial, new_key): (&str, &str),
        now: DateTime<Utc>,
    ) -> RenewOutcome {
        let wish = Renewal {
            node: id.clone(),
            serial: serial.to_owned(),
            key_sha256: key.to_owned(),
            new_key_sha256: new_key.to_owned(),
            origin: "192.0.2.7".to_owned(),
        };
        let issue = |generation| {
            let (not_before, not_after) = (now - TimeDelta::hours(24), now + TimeDelta::days(30));
            Some(CertificateRow { not_before, not_after, ..certificate(new_serial, id, new_key, generation) })
        };
        self.store.renew_certificate(&wish, now, issue).await.unwrap()
    }

    pub(crate) async fn begin(&self, id: &NodeId, start: &SessionStart, now: DateTime<Utc>) -> i64 {
        match self.say_hello(id, start, now).await {
            SessionOutcome::Begun { epoch, .. } => epoch,
            other => panic!("{other:?}"),
        }
    }

    /// Enrols a node and begins its session under the boot id `boot-1`.
    pub(crate) async fn online(&self, id: &str) -> (NodeId, i64) {
        let id = self.enrolled(&[id]).await.remove(0);
        let epoch = self.session(&id, "boot-1", start()).await;
        (id, epoch)
    }

    pub(crate) async fn create(&self, action: Action, nodes: &[NodeId]) -> OperationId {
        let new = new_operation(action, nodes);
        match self.store.create_operation(&new, start()).await.unwrap() {
            // Each creation of all tests checks this, because the counts are kept beside the rows.
            CreateOutcome::Created(row) => assert_eq!(row.counts.pending, u32::try_from(nodes.len()).unwrap()),
            other => panic!("{other:?}"),
        }
        new.id
    }

    pub(crate) async fn claim(&self, nodes: &[(NodeId, i64)], now: DateTime<Utc>) -> Vec<Assignment> {
        // The controller of all fixtures, whose sessions `hello` begins.
        self.store.claim("c1", nodes, now).await.unwrap()
    }

    /// The node `pi-1` with a session and an assignment.
    pub(crate) async fn assigned(&self, action: Action) -> (NodeId, i64, Assignment) {
        let (id, epoch) = self.online("pi-1").await;
        self.create(action, std::slice::from_ref(&id)).await;
        let assignment = self.claim(&[(id.clone(), epoch)], start()).await.remove(0);
        (id, epoch, assignment)
    }

    pub(crate) async fn report(&self, epoch: i64, report: &ReportRow, now: DateTime<Utc>) -> ReportOutcome {
        self.store.apply_report(&report.execution.node, epoch, report, now).await.unwrap()
    }

    /// Reconciles a Hello of the running system, from an agent that answers no queries.
    pub(crate) async fn reconcile(
        &self,
        id: &NodeId,
        epoch: i64,
        boot_id: &str,
        listed: &[ReportRow],
        at: i64,
    ) -> Reconciled {
        self.hello(id, epoch, boot_id, listed, false, at).await
    }

    /// Reconciles a Hello of the running system.
    pub(crate) async fn hello(
        &self,
        id: &NodeId,
        epoch: i64,
        boot_id: &str,
        listed: &[ReportRow],
        answers_queries: bool,
        at: i64,
    ) -> Reconciled {
        let said = Hello { greeting: greeting(boot_id, answers_queries), listed };
        self.store.reconcile(id, epoch, said, after(at)).await.unwrap()
    }

    pub(crate) async fn execution(&self, id: &ExecutionId) -> ExecutionRow {
        self.store.execution(id).await.unwrap().unwrap()
    }

    pub(crate) async fn state(&self, id: &ExecutionId) -> ExecutionState {
        self.execution(id).await.state
    }

    pub(crate) async fn operation_state(&self, id: &OperationId) -> OperationState {
        self.store.operation(id).await.unwrap().unwrap().state
    }
}

pub(crate) fn wish(token: &str, key: &str, wanted: Option<&str>, serial: &str) -> Enrolment {
    Enrolment {
        token_sha256: token.to_owned(),
        key_sha256: key.to_owned(),
        wanted_id: wanted.map(node),
        board: board(serial),
        address: std::net::IpAddr::from([192, 168, 7, 9]),
    }
}
