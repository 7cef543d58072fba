//! A session against a controller with real TLS, whose answers the test gives.

use std::sync::Arc;
use std::time::Duration;

use marco_proto::v1::execution::State as WireState;
use marco_proto::v1::{
    Assign, Cancel, CardLayout, Goodbye, Hello, NodeMode, NotHeld, Query, Reboot, Report, assign, connect_request,
    connect_response, node_condition,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::{KeptLog, Layout, Node, Session};
use crate::discovery::{Controllers, Discovery};
use crate::identity::{Board, Enrollment, Identity, JoinToken, TlsTime, enroll};
use crate::job::{Action, Failure, Labels, Mode, Notice, State};
use crate::journal::{Journal, Progress};
use crate::system::Refusal;
use crate::testing::{Controller, Pki, TestSession, acknowledgement};

mod stored;

const ONE: &str = "operations/0198a6e0-0000-7000-8000-000000000001/executions/pi-01";

/// The machine's log.
const LOG: &str = "network up\noperations/0198a6e0-0000-7000-8000-000000000001/executions/pi-01 fails\n";

struct Bench {
    dir: tempfile::TempDir,
    controller: Controller,
    journal: Arc<Journal>,
    refusal: watch::Sender<Option<Refusal>>,
    labels: watch::Receiver<Option<Labels>>,
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let journal = Arc::new(Journal::open(dir.path(), "boot-a").unwrap());
        Self::with(dir, journal, Vec::new()).await
    }

    async fn with(dir: tempfile::TempDir, journal: Arc<Journal>, mut before: Vec<String>) -> Self {
        let controller = Controller::start(Pki::new("2026-01-01T00:00:00Z", "2126-01-01T00:00:00Z")).await;
        let time = Arc::new(TlsTime::starting_at(0));
        let enrollment = Enrollment {
            listeners: vec![controller.address.clone()],
            token: JoinToken::parse(&controller.pki.token()).unwrap(),
            name: "pi-01".into(),
            board: Board::default(),
        };
        enroll(dir.path(), &enrollment, &time).await.unwrap();
        before.push(controller.address.clone());
        let given = Discovery::Fixed(before.iter().map(|address| address.parse().unwrap()).collect());
        let (refusal, refused) = watch::channel(None);
        let (labels, known) = watch::channel(None);
        let session = Session {
            controllers: Arc::new(Controllers::given(given)),
            identity: Arc::new(Identity::load(dir.path(), time).unwrap().unwrap()),
            journal: journal.clone(),
            node: node(),
            refusal: refused,
            log: KeptLog::new(|| LOG.into()),
            labels,
        };
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let stop = stop.clone();
            // The tests of `run` check the reasons for which a session ends.
            async move { drop(session.run(stop).await) }
        });
        Self { dir, controller, journal, refusal, labels: known, stop, task: AbortOnDropHandle::new(task) }
    }

    /// The next session, welcomed, and its Hello.
    async fn welcomed(&mut self) -> (TestSession, Hello) {
        let mut session = self.controller.session().await;
        let Some(connect_request::Message::Hello(hello)) = session.next().await.unwrap().message else {
            panic!("the first message is no Hello");
        };
        session.welcome().await;
        (session, hello)
    }
}

fn node() -> Node {
    Node {
        instance: "1".to_owned(),
        boot_id: "boot-a".into(),
        mode: Mode::Running,
        board: Board::default(),
        kernel_arch: "aarch64".into(),
        userspace_arch: "arm".into(),
        page_size: 4096,
        kernel_release: "6.12".into(),
        os: "Test".into(),
        layout: Layout::Resident,
        image_sha256: String::new(),
        boot_sha256: String::new(),
        trial_lacks: "no watchdog".into(),
        card_is_blank: false,
        image: String::new(),
    }
}

async fn report(session: &mut TestSession) -> Report {
    match session.next().await.expect("the session ended").message {
        Some(connect_request::Message::Report(report)) => report,
        other => panic!("no report but {other:?}"),
    }
}

fn assign(attempt: u32) -> connect_response::Message {
    let notice = Some(prost_types::Duration { seconds: 0, nanos: 0 });
    connect_response::Message::Assign(Assign {
        execution: ONE.into(),
        attempt,
        action: Some(assign::Action::Reboot(Reboot { notice, message: "hello".into() })),
        known_state: WireState::Assigned.into(),
        labels: std::collections::HashMap::from([("room".to_owned(), format!("a{attempt}"))]),
    })
}

async fn until(journal: &Journal, mut is: impl FnMut(&crate::journal::Entry) -> bool) {
    let mut changes = journal.changes();
    let there = changes.wait_for(|all| all.get(ONE).is_some_and(&mut is));
    tokio::time::timeout(Duration::from_secs(10), there).await.expect("it did not come to that").unwrap();
}

#[tokio::test]
async fn whether_it_could_be_updated_is_said_in_hello_and_when_it_changes() {
    let mut bench = Bench::new().await;
    let (mut session, hello) = bench.welcomed().await;
    let system = hello.system.unwrap();
    assert_eq!((system.update_refusal, system.trial_lacks.as_str()), (None, "no watchdog"));
    let refusal = |message: &str| Some(Refusal { reason: "NOT_WIRED", message: message.into() });
    bench.refusal.send_replace(refusal("the cable is out"));
    let Some(connect_request::Message::Status(status)) = session.next().await.unwrap().message else {
        panic!("a change is not told");
    };
    let told = status.system.unwrap();
    assert_eq!((told.kernel_release.as_str(), told.layout()), ("6.12", CardLayout::Resident), "the facts are whole");
    assert_eq!(told.update_refusal.unwrap().message, "the cable is out");
    drop(session);
    let (_session, hello) = bench.welcomed().await;
    assert_eq!(hello.system.unwrap().update_refusal.unwrap().reason, "NOT_WIRED");
}

#[tokio::test]
async fn an_assignment_is_journalled_before_it_is_reported_and_kept_until_acknowledged() {
    let mut bench = Bench::new().await;
    let (mut session, hello) = bench.welcomed().await;
    assert_eq!((hello.boot_id.as_str(), hello.mode()), ("boot-a", NodeMode::Running));
    assert_eq!(hello.executions, []);
    session.say(assign(1)).await;
    let first = report(&mut session).await;
    assert_eq!((first.execution.as_str(), first.attempt, first.sequence), (ONE, 1, 1));
    assert_eq!(first.state(), WireState::Running);
    let stored = Journal::open(bench.dir.path(), "reader").unwrap().entries();
    let notice = Notice { delay: Duration::ZERO, message: "hello".into() };
    assert_eq!(stored.get(ONE).unwrap().action, Action::Reboot(notice));

    // The controller dies before it stores the report.
    drop(session);
    let (mut session, hello) = bench.welcomed().await;
    assert_eq!(hello.executions.len(), 1);
    let again = report(&mut session).await;
    assert_eq!(again, first);
    session.say(acknowledgement(&again)).await;
    until(&bench.journal, |entry| entry.is_acked()).await;
    assert!(bench.journal.entries().get(ONE).unwrap().acked_at.unwrap() >= 4_000_000_000_000_000);
}

#[tokio::test]
async fn what_was_acknowledged_as_final_is_not_told_again_until_it_is_assigned_again() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Arc::new(Journal::open(dir.path(), "boot-a").unwrap());
    let action = Action::Reboot(Notice { delay: Duration::ZERO, message: String::new() });
    journal.accept(ONE, 1, action).await.unwrap();
    journal.arm(ONE).await.unwrap();
    journal.succeed(ONE).await.unwrap();
    journal.ack(ONE, 1, 3, 1).await.unwrap();
    let mut bench = Bench::with(dir, journal, Vec::new()).await;
    let (mut session, hello) = bench.welcomed().await;
    assert_eq!(hello.executions, []);
    session.say(assign(2)).await;
    let report = report(&mut session).await;
    // The store lost the end and assigned again; the job must not run twice.
    assert_eq!((report.attempt, report.sequence, report.state()), (2, 3, WireState::Succeeded));
    assert_eq!(bench.journal.entries().get(ONE).unwrap().state, State::Succeeded);
}

#[tokio::test]
async fn progress_is_told_under_the_sequence_of_the_state() {
    let mut bench = Bench::new().await;
    let (mut session, _) = bench.welcomed().await;
    session.say(assign(1)).await;
    report(&mut session).await;
    // Progress changes no state, so it has the sequence of the last one.
    let progress = Progress { execution: ONE.into(), phase: "unpacking image".into(), done: 5, total: 9 };
    bench.journal.set_progress(progress);
    let told = report(&mut session).await;
    assert_eq!((told.sequence, told.phase.as_str(), told.bytes_done, told.bytes_total), (1, "unpacking image", 5, 9));
}

#[tokio::test]
async fn a_cancel_reaches_the_journal_and_one_that_is_too_late_is_answered() {
    let mut bench = Bench::new().await;
    let (mut session, _) = bench.welcomed().await;
    session.say(assign(1)).await;
    report(&mut session).await;
    bench.journal.arm(ONE).await.unwrap();
    let armed = report(&mut session).await;
    assert_eq!((armed.state(), armed.sequence), (WireState::Rebooting, 2));
    session.say(acknowledgement(&armed)).await;
    session.say(connect_response::Message::Cancel(Cancel { execution: ONE.into() })).await;
    let refused = report(&mut session).await;
    assert!(refused.cancel_refused);
    assert_eq!((refused.state(), refused.sequence), (WireState::Rebooting, 2));
}

#[tokio::test]
async fn an_action_that_the_agent_does_not_know_fails_with_its_reason() {
    let mut bench = Bench::new().await;
    let (mut session, _) = bench.welcomed().await;
    let assign = Assign { execution: ONE.into(), attempt: 1, ..Assign::default() };
    session.say(connect_response::Message::Assign(assign)).await;
    let failed = report(&mut session).await;
    assert_eq!(failed.state(), WireState::Failed);
    assert_eq!(failed.error.unwrap().reason, "UNKNOWN_ACTION");
}

#[tokio::test]
async fn the_next_controller_is_tried_when_one_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Arc::new(Journal::open(dir.path(), "boot-a").unwrap());
    // Bound and dropped: nobody listens.
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let mut bench = Bench::with(dir, journal, vec![nobody]).await;
    bench.welcomed().await;
}

#[tokio::test]
async fn after_a_goodbye_the_agent_stays_away_as_long_as_it_was_asked_to() {
    let mut bench = Bench::new().await;
    let (session, _) = bench.welcomed().await;
    let began = tokio::time::Instant::now();
    let retry_delay = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    session.say(connect_response::Message::Goodbye(Goodbye { reason: "restart".into(), retry_delay })).await;
    bench.welcomed().await;
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_session_that_is_stopped_ends_its_half_of_the_stream() {
    let mut bench = Bench::new().await;
    let (mut session, _) = bench.welcomed().await;
    bench.stop.cancel();
    assert_eq!(session.next().await, None);
    drop(session);
    bench.task.await.unwrap();
}

#[tokio::test]
async fn what_was_logged_of_a_job_goes_with_its_failure_and_again_until_it_is_heard() {
    let mut bench = Bench::new().await;
    let (mut session, _) = bench.welcomed().await;
    session.say(assign(1)).await;
    let running = report(&mut session).await;
    assert_eq!((running.state(), running.log.as_str()), (WireState::Running, ""), "nothing has failed");
    let failure = Failure::new("NO_ROOM", "the card has no room");
    bench.journal.note(ONE, failure.clone()).await.unwrap();
    bench.journal.fail(ONE, failure).await.unwrap();
    let failed = report(&mut session).await;
    assert_eq!((failed.state(), failed.log.as_str(), failed.log_cut), (WireState::Failed, LOG, false));

    // The controller was away before it could store it.
    drop(session);
    let (mut session, hello) = bench.welcomed().await;
    assert_eq!(hello.executions.iter().map(|report| report.log.as_str()).collect::<Vec<_>>(), [LOG]);
    assert_eq!(report(&mut session).await, failed);
    session.say(acknowledgement(&failed)).await;
    until(&bench.journal, |entry| entry.is_acked()).await;
}

#[tokio::test]
async fn the_labels_are_those_that_a_controller_said_last() {
    let mut bench = Bench::new().await;
    assert_eq!(*bench.labels.borrow(), None, "nobody has said any");
    let (mut session, _) = bench.welcomed().await;
    // The Welcome has none, and the assignment has some.
    let said = async |labels: &mut watch::Receiver<Option<Labels>>, wanted: Option<Labels>| {
        let there = labels.wait_for(|labels| *labels == wanted);
        tokio::time::timeout(Duration::from_secs(10), there).await.expect("other labels").unwrap();
    };
    said(&mut bench.labels, Some(Labels::new())).await;
    session.say(assign(1)).await;
    report(&mut session).await;
    said(&mut bench.labels, Some(Labels::from([("room".to_owned(), "a1".to_owned())]))).await;
}

#[tokio::test]
async fn assignment_that_cannot_be_journalled_ends_with_the_reason() {
    let mut bench = Bench::new().await;
    let (mut session, hello) = bench.welcomed().await;
    assert_eq!(hello.conditions, []);
    let blocked = bench.dir.path().join("journal.json.new");
    // A folder that is not empty cannot be replaced by a file.
    std::fs::create_dir_all(blocked.join("in the way")).unwrap();
    for attempt in [1, 2] {
        session.say(assign(attempt)).await;
        let (mut failed, mut conditions) = (None, None);
        // They come in any order. In the second round only the end is new.
        while failed.is_none() || (attempt == 1 && conditions.is_none()) {
            match session.next().await.expect("the session goes on").message {
                Some(connect_request::Message::Report(report)) => failed = Some(report),
                Some(connect_request::Message::Status(status)) => conditions = Some(status.conditions),
                other => panic!("{other:?}"),
            }
        }
        let failed = failed.unwrap();
        assert_eq!((failed.state(), failed.attempt, failed.sequence), (WireState::Failed, attempt, 1));
        // The journal holds no such execution, and the session goes on.
        session.say(acknowledgement(&failed)).await;
        assert_eq!(failed.error.unwrap().reason, "JOURNAL_NOT_WRITABLE");
        if let Some(conditions) = conditions {
            assert_eq!(conditions.first().map(|ill| ill.r#type()), Some(node_condition::Type::Journal));
        }
    }
    // The disk takes writes again: the ailment is over, and the node takes work.
    std::fs::remove_dir_all(blocked).unwrap();
    session.say(assign(3)).await;
    let mut said = Vec::new();
    while said.len() < 2 {
        said.push(match session.next().await.expect("the session goes on").message {
            Some(connect_request::Message::Report(report)) => report.state() == WireState::Running,
            Some(connect_request::Message::Status(status)) => status.conditions.is_empty(),
            other => panic!("{other:?}"),
        });
    }
    assert_eq!(said, [true, true]);
}

async fn not_held(session: &mut TestSession) -> NotHeld {
    match session.next().await.expect("the session ended").message {
        Some(connect_request::Message::NotHeld(answer)) => answer,
        other => panic!("no answer but {other:?}"),
    }
}

#[tokio::test]
async fn query_is_answered_from_the_journal_and_changes_nothing() {
    const TWO: &str = "operations/0198a6e0-0000-7000-8000-000000000002/executions/pi-01";
    let mut bench = Bench::new().await;
    let (mut session, hello) = bench.welcomed().await;
    assert!(hello.answers_queries);
    let query = |execution: &str| connect_response::Message::Query(Query { execution: execution.to_owned() });
    session.say(query(ONE)).await;
    let answer = not_held(&mut session).await;
    assert_eq!((answer.execution.as_str(), answer.busy_with), (ONE, None));
    assert!(bench.journal.entries().get(ONE).is_none());
    // An acknowledged end is reported again.
    session.say(assign(3)).await;
    let running = report(&mut session).await;
    assert_eq!(running.accept_boot_id, "boot-a");
    bench.journal.fail(ONE, Failure::new("X", "y")).await.unwrap();
    let failed = report(&mut session).await;
    bench.journal.ack(ONE, failed.attempt, failed.sequence, 1).await.unwrap();
    session.say(query(ONE)).await;
    assert_eq!(report(&mut session).await.state(), WireState::Failed);
    // An assignment with a lower attempt is answered with the node's state.
    session.say(assign(2)).await;
    let answer = report(&mut session).await;
    assert_eq!((answer.attempt, answer.state()), (3, WireState::Failed));
    // A busy node refuses other work, and names its job.
    bench
        .journal
        .accept(TWO, 1, Action::Reboot(Notice { delay: Duration::ZERO, message: String::new() }))
        .await
        .unwrap();
    assert_eq!(report(&mut session).await.execution, TWO);
    let three = "operations/0198a6e0-0000-7000-8000-000000000003/executions/pi-01";
    let connect_response::Message::Assign(mut other) = assign(1) else { panic!() };
    other.execution = three.to_owned();
    session.say(connect_response::Message::Assign(other)).await;
    let answer = not_held(&mut session).await;
    assert_eq!(answer.execution, three);
    assert_eq!(answer.busy_with.map(|at| (at.execution, at.attempt)), Some((TWO.to_owned(), 1)));
    assert!(bench.journal.entries().get(three).is_none());
}
