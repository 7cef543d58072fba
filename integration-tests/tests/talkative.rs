//! A compromised node: limits on the content and rate of its messages.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use integration_tests::certs::NodeKey;
use integration_tests::client::{Credentials, bad_fields, reason};
use integration_tests::fleet::{Database, execution_name, reboot};
use integration_tests::postgres::Postgres;
use integration_tests::process::{Output, binary, run};
use integration_tests::{Fleet, seconds, wait_until};
use marco_controller::operation::ExecutionState;
use marco_controller::store::{ReportOutcome, ReportRow, SentLog, Store};
use marco_proto::names::{ExecutionId, PROTOCOL_VERSION};
use marco_proto::v1::agent_service_client::AgentServiceClient;
use marco_proto::v1::connect_request::Message;
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::resolve_node_request::Decision;
use marco_proto::v1::{
    Assign, Board, ConnectRequest, ConnectResponse, EnrollRequest, ExplainExecutionRequest, Hello, Leaving,
    ListEventsRequest, NodeMode, NotHeld, Report, ResolveNodeRequest, connect_response, execution, operation,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// Documented limits of a session: burst of messages, and messages a second after that.
const AT_ONCE: u32 = 200;
const A_SECOND: u32 = 20;

/// A node's session, played by this test.
struct Session {
    says: mpsc::Sender<ConnectRequest>,
    hears: Streaming<ConnectResponse>,
}

impl Session {
    async fn say(&self, message: Message) -> Result<()> {
        self.says.send(ConnectRequest { message: Some(message) }).await.context("the stream is gone")
    }

    /// Waits for the end of the session, and returns its status.
    async fn end(mut self) -> Result<Status> {
        let ended = tokio::time::timeout(seconds(30), async {
            loop {
                match self.hears.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return Status::ok("ended"),
                    Err(status) => return status,
                }
            }
        });
        ended.await.context("it goes on")
    }
}

struct Node {
    credentials: Credentials,
}

impl Node {
    async fn enrol(fleet: &Fleet) -> Result<Self> {
        let key = NodeKey::generate()?;
        let channel = fleet.admin().anonymous().channel(fleet.addresses().enroll)?;
        let request = EnrollRequest {
            token: fleet.token(1).await?,
            certificate_request: key.request(&key)?.pem,
            node_id: "talkative".to_owned(),
            board: Some(Board::default()),
        };
        let enrolled = EnrollmentServiceClient::new(channel).enroll(request).await?.into_inner();
        let identity = Some((enrolled.certificate, key.pem()));
        Ok(Self { credentials: Credentials { ca: enrolled.ca_certificate, identity } })
    }

    async fn session(&self, fleet: &Fleet) -> Result<Session> {
        let (says, said) = mpsc::channel(1000);
        let mut client = AgentServiceClient::new(self.credentials.channel(fleet.addresses().api)?);
        Ok(Session { says, hears: client.connect(ReceiverStream::new(said)).await?.into_inner() })
    }
}

fn hello() -> Hello {
    Hello {
        protocol_version: PROTOCOL_VERSION,
        boot_id: "7f2c0e56-0f0c-4c8b-9a3e-0d1f5a7b9c11".to_owned(),
        mode: NodeMode::Running.into(),
        agent_version: "0".to_owned(),
        ..Hello::default()
    }
}

/// A report about an unknown execution. The controller acknowledges it, so that the node forgets it.
fn report(sequence: u64) -> Report {
    Report {
        execution: "operations/01a21325-85a1-72ed-97de-94f7f1cf4a51/executions/talkative".to_owned(),
        attempt: 1,
        sequence,
        state: execution::State::Running.into(),
        boot_id: hello().boot_id,
        ..Report::default()
    }
}

#[tokio::test]
async fn a_node_that_says_nothing_or_too_much_at_first_is_not_let_in() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let node = Node::enrol(&fleet).await?;
    // Opened first: it must be kept for its whole time although others are refused meanwhile.
    let silent = node.session(&fleet).await?;
    let begun = Instant::now();
    for (wrong, field) in [
        (Hello { executions: (0..257).map(report).collect(), ..hello() }, "hello.executions"),
        (Hello { instance: "x".repeat(65), ..hello() }, "hello.instance"),
        (Hello { boot_id: "x".repeat(2000), ..hello() }, "boot_id"),
    ] {
        let session = node.session(&fleet).await?;
        session.say(Message::Hello(wrong)).await?;
        let status = session.end().await?;
        assert_eq!((status.code(), bad_fields(&status)), (Code::InvalidArgument, vec![field.to_owned()]));
    }
    let status = silent.end().await?;
    assert_eq!((status.code(), bad_fields(&status)), (Code::InvalidArgument, vec!["hello".to_owned()]));
    // The controller waits about ten seconds for a Hello.
    let waited = begun.elapsed();
    assert!(waited >= seconds(9), "it was sent away after {waited:?}");
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_node_that_talks_without_end_is_heard_so_often_a_second() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let node = Node::enrol(&fleet).await?;
    let mut session = node.session(&fleet).await?;
    session.say(Message::Hello(hello())).await?;
    let welcome = session.hears.message().await?.and_then(|answer| answer.message);
    assert!(matches!(welcome, Some(connect_response::Message::Welcome(_))), "{welcome:?}");
    // As many as three seconds allow, in addition to the burst.
    let reports = AT_ONCE + 3 * A_SECOND;
    let begun = Instant::now();
    for sequence in 1..=reports {
        session.say(Message::Report(report(sequence.into()))).await?;
    }
    for _ in 1..=reports {
        let answer =
            tokio::time::timeout(seconds(60), session.hears.message()).await.context("no acknowledgement")??;
        let answer = answer.context("the stream ended")?.message;
        assert!(matches!(answer, Some(connect_response::Message::Ack(_))), "{answer:?}");
    }
    // The last twenty are read in the third second at the earliest.
    assert!(begun.elapsed() > Duration::from_secs(2), "{reports} reports were read within {:?}", begun.elapsed());
    fleet.went_well();
    Ok(())
}

impl Session {
    /// Waits for the next assignment.
    async fn assignment(&mut self) -> Result<Assign> {
        let next = async {
            loop {
                match self.hears.message().await?.context("the stream ended")?.message {
                    Some(connect_response::Message::Assign(assign)) => return Ok(assign),
                    _ => continue,
                }
            }
        };
        tokio::time::timeout(seconds(30), next).await.context("no assignment")?
    }

    /// Waits for the next acknowledgement, and returns its execution and sequence.
    async fn acknowledged(&mut self) -> Result<(String, u64)> {
        let next = async {
            loop {
                match self.hears.message().await?.context("the stream ended")?.message {
                    Some(connect_response::Message::Ack(ack)) => return Ok((ack.execution, ack.sequence)),
                    _ => continue,
                }
            }
        };
        tokio::time::timeout(seconds(10), next).await.context("no acknowledgement")?
    }
}

#[tokio::test]
async fn report_whose_commit_was_stored_unanswered_is_acknowledged_once() -> Result<()> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    let mut fleet = Fleet::builder().database(Database::Url(url.clone())).pis(0).start().await?;
    let node = Node::enrol(&fleet).await?;
    let mut session = node.session(&fleet).await?;
    session.say(Message::Hello(hello())).await?;
    fleet.create(reboot(&["talkative"], Duration::ZERO)).await?;
    let assign = session.assignment().await?;
    // Does the controller's work on the report behind its back, so that the session never learns that it is stored.
    let store = Store::open(&url).await?;
    let execution = ExecutionId::parse(&assign.execution)?;
    let epoch = store.node(&execution.node).await?.context("no node")?.session_epoch;
    let stored = ReportRow {
        execution: execution.clone(),
        attempt: assign.attempt,
        sequence: 1,
        state: ExecutionState::Running,
        phase: String::new(),
        bytes_done: 0,
        bytes_total: 0,
        error: None,
        boot_id: hello().boot_id,
        accept_boot_id: String::new(),
        release: None,
        cancel_refused: false,
        log: SentLog::default(),
        journal_lost: false,
    };
    let now = store.execution(&execution).await?.context("no execution")?.update_time;
    assert_eq!(store.apply_report(&execution.node, epoch, &stored, now).await?, ReportOutcome::Acked);
    // The node repeats the report, and has made progress since.
    let said = |done| Report {
        execution: assign.execution.clone(),
        attempt: assign.attempt,
        phase: "unpacking image".to_owned(),
        bytes_done: done,
        ..report(1)
    };
    session.say(Message::Report(said(1))).await?;
    assert_eq!(session.acknowledged().await?, (assign.execution.clone(), 1));
    // From now on this is mere progress, which is not acknowledged. The next acknowledgement is that of another report.
    session.say(Message::Report(said(2))).await?;
    session.say(Message::Report(report(1))).await?;
    assert_eq!(session.acknowledged().await?.0, report(1).execution);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn earlier_delivery_converges_in_one_exchange() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let node = Node::enrol(&fleet).await?;
    let mut session = node.session(&fleet).await?;
    session.say(Message::Hello(hello())).await?;
    fleet.create(reboot(&["talkative"], Duration::ZERO)).await?;
    let assign = session.assignment().await?;
    drop(session);
    // The node comes back with its state from before, and repeats it until it hears something else.
    let said = |attempt, sequence| Report { execution: assign.execution.clone(), attempt, ..report(sequence) };
    let mut session = node.session(&fleet).await?;
    let boot_id = "7f2c0e56-0f0c-4c8b-9a3e-0d1f5a7b9c12".to_owned();
    session.say(Message::Hello(Hello { executions: vec![said(0, 1)], boot_id, ..hello() })).await?;
    for _ in 0..20 {
        session.say(Message::Report(said(0, 1))).await?;
    }
    let again = session.assignment().await?;
    assert_eq!((&again.execution, again.attempt), (&assign.execution, assign.attempt));
    session.say(Message::Report(said(again.attempt, 1))).await?;
    // About another execution, so that its answer comes last.
    session.say(Message::Report(report(7))).await?;
    let mut heard = Vec::new();
    loop {
        match session.hears.message().await?.and_then(|answer| answer.message) {
            Some(connect_response::Message::Ack(ack)) if ack.execution != assign.execution => break,
            Some(connect_response::Message::Ack(ack)) => heard.push(format!("ack {}", ack.sequence)),
            other => heard.push(format!("{other:?}")),
        }
    }
    assert_eq!(heard, ["ack 1"], "to one assignment, 21 repetitions and one report that is right");
    drop(session);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn node_with_an_absurd_attempt_keeps_nobody_from_work() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let other = fleet.ids().await?.remove(0);
    let node = Node::enrol(&fleet).await?;
    let mut session = node.session(&fleet).await?;
    session.say(Message::Hello(hello())).await?;
    let operation = fleet.create(reboot(&["talkative"], Duration::ZERO)).await?;
    let assign = session.assignment().await?;
    let absurd = Report { execution: assign.execution.clone(), attempt: u32::MAX, ..report(1) };
    session.say(Message::Report(absurd)).await?;
    wait_until(seconds(30), "the conflict is shown", async || {
        Ok((fleet.node("talkative").await?.conflicts.len() == 1).then_some(()))
    })
    .await?;
    // The next Hello does not list the execution, so the controller would assign it again.
    drop(session);
    let session = node.session(&fleet).await?;
    session
        .say(Message::Hello(Hello { boot_id: "7f2c0e56-0f0c-4c8b-9a3e-0d1f5a7b9c12".to_owned(), ..hello() }))
        .await?;
    fleet.succeeds(reboot(&[&other], Duration::ZERO), seconds(60)).await?;
    let request = ExplainExecutionRequest { name: assign.execution.clone() };
    let explained = fleet.operations().explain_execution(request).await?.into_inner();
    assert!(explained.explanation.contains("attempt 4294967295"), "{explained:?}");
    assert!(explained.suggestions.iter().any(|what| what.contains("marcoctl nodes resolve nodes/talkative")));
    let abandon = ResolveNodeRequest { name: "talkative".to_owned(), decision: Decision::Abandon.into() };
    let resolved = NodeServiceClient::new(fleet.admin_channel()).resolve_node(abandon.clone()).await?.into_inner();
    assert!(resolved.conflicts.is_empty(), "{resolved:?}");
    fleet.ends(&operation.name, seconds(30), operation::State::Failed).await?;
    let error = fleet.execution(&operation.name, "talkative").await?.error.context("no error")?;
    assert_eq!(error.reason, "CONFLICT_ABANDONED");
    let again =
        NodeServiceClient::new(fleet.admin_channel()).resolve_node(abandon).await.err().context("no conflict")?;
    assert_eq!(again.code(), Code::FailedPrecondition);
    drop(session);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn node_busy_with_absurd_or_foreign_work_harms_nobody() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let other = fleet.ids().await?.remove(0);
    let node = Node::enrol(&fleet).await?;
    let mut session = node.session(&fleet).await?;
    session.say(Message::Hello(hello())).await?;
    let operation = fleet.create(reboot(&["talkative"], Duration::ZERO)).await?;
    let assign = session.assignment().await?;
    let busy_with = |execution: &str, attempt| {
        let report = Report { execution: execution.to_owned(), attempt, ..report(1) };
        Message::NotHeld(NotHeld { execution: assign.execution.clone(), busy_with: Some(report) })
    };
    session.say(busy_with(&assign.execution, u32::MAX)).await?;
    let kept =
        wait_until(seconds(30), "the conflict is shown", async || Ok(fleet.node("talkative").await?.conflicts.pop()))
            .await?;
    assert_eq!((&kept.execution, kept.attempt), (&assign.execution, u32::MAX));
    // The attempt is not taken over: the next claim would count on from it.
    let stored = fleet.execution(&operation.name, "talkative").await?;
    assert!(stored.attempt < 10, "{stored:?}");
    fleet.succeeds(reboot(&[&other], Duration::ZERO), seconds(60)).await?;

    // Long enough that it still runs at the end.
    let foreign = fleet.create(reboot(&[&other], seconds(600))).await?;
    fleet.execution_is(&foreign.name, &other, seconds(30), execution::State::Running).await?;
    let theirs = execution_name(&foreign, &other);
    session.say(busy_with(&theirs, 1)).await?;
    let status = session.end().await?;
    assert_eq!((status.code(), reason(&status)), (Code::PermissionDenied, "NOT_YOURS".to_owned()));
    for (message, field) in [
        (Message::NotHeld(NotHeld { execution: theirs.clone(), busy_with: None }), "not_held.execution"),
        (Message::Leaving(Leaving { execution: theirs.clone() }), "leaving.execution"),
    ] {
        let session = node.session(&fleet).await?;
        session.say(Message::Hello(hello())).await?;
        session.say(message).await?;
        let status = session.end().await?;
        assert_eq!((status.code(), bad_fields(&status)), (Code::InvalidArgument, vec![field.to_owned()]));
    }
    fleet.execution_is(&foreign.name, &other, seconds(30), execution::State::Running).await?;
    fleet.cancel(&foreign.name).await?;
    fleet.succeeds(reboot(&[&other], Duration::ZERO), seconds(60)).await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn operator_accepts_at_the_command_line_what_a_node_says() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let resolve = async |flag: &str| -> Result<Output> {
        let (address, certs) = (fleet.addresses().api.to_string(), fleet.certs().display().to_string());
        let command = ["--controller", &address, "--certs", &certs, "nodes", "resolve", "sure", flag];
        run(&binary("marcoctl")?, &command, seconds(60)).await
    };
    let node = Node { credentials: fleet.enrol_by_hand("sure", false).await? };
    let mut session = node.session(&fleet).await?;
    session.say(Message::Hello(hello())).await?;
    let operation = fleet.create(reboot(&["sure"], Duration::ZERO)).await?;
    let assign = session.assignment().await?;
    // More deliveries ahead than a store can have lost.
    let ahead = Report {
        execution: assign.execution.clone(),
        attempt: assign.attempt + 5000,
        state: execution::State::Succeeded.into(),
        ..report(9)
    };
    session.say(Message::Report(ahead.clone())).await?;
    wait_until(seconds(30), "the conflict is shown", async || {
        Ok((fleet.node("sure").await?.conflicts.len() == 1).then_some(()))
    })
    .await?;
    let accepted = resolve("--accept").await?;
    assert_eq!(accepted.status.code(), Some(0), "{accepted:?}");
    let ended = fleet.ends(&operation.name, seconds(30), operation::State::Succeeded).await?;
    assert!(fleet.node("sure").await?.conflicts.is_empty());
    let request = ListEventsRequest { parent: ended.name, page_size: 1000, ..ListEventsRequest::default() };
    let events = fleet.operations().list_events(request).await?.into_inner().events;
    let told = events.iter().find(|event| event.to == "SUCCEEDED" && event.node == "nodes/sure").context("no event")?;
    assert!(told.actor.ends_with("admin") && told.reason.contains("accepted what the node says"), "{told:?}");
    // From now on the node's report is acknowledged.
    session.say(Message::Report(ahead)).await?;
    assert_eq!(session.acknowledged().await?, (assign.execution, 9));
    let again = resolve("--accept").await?;
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    assert!(again.stderr.contains("NO_CONFLICT"), "{again:?}");
    drop(session);
    fleet.went_well();
    Ok(())
}
