//! Acknowledgements, verdicts and losses of the journal.

use std::sync::Arc;

use marco_proto::v1::execution::State as WireState;
use marco_proto::v1::verdict::Decision;
use marco_proto::v1::{
    Ack, ExecutionError, Query, Report, Verdict as WireVerdict, Welcome, connect_request, connect_response,
    node_condition,
};

use super::{Bench, ONE, report, until};
use crate::job::{Action, Artifact, Failure, Notice, Release, State, Update};
use crate::journal::{FILE_NAME, Journal, Verdict};
use crate::testing::{TestSession, acceptance, acknowledgement};

/// A journal with an update whose new system is up.
async fn on_trial(dir: &std::path::Path) -> Arc<Journal> {
    let journal = Journal::open(dir, "boot-a").unwrap();
    let notice = Notice { delay: std::time::Duration::ZERO, message: String::new() };
    let image = Some(Artifact { id: "os".into(), sha256: "a".repeat(64) });
    let update = Update { image, bootcode: None, notice, discard_home: false, raw: false };
    journal.accept(ONE, 1, Action::Update(update)).await.unwrap();
    journal.install(ONE).await.unwrap();
    journal.try_boot(ONE).await.unwrap();
    let release = Release { execution: ONE.into(), image_sha256: "a".repeat(64), boot_sha256: String::new() };
    journal.verify(ONE, release).await.unwrap();
    Arc::new(journal)
}

/// The same journal, torn: an older copy of it is left.
async fn torn(dir: &std::path::Path) -> Arc<Journal> {
    drop(on_trial(dir).await);
    let path = dir.join(FILE_NAME);
    std::fs::copy(&path, dir.join("journal.json.new")).unwrap();
    std::fs::write(&path, "{").unwrap();
    Arc::new(Journal::open(dir, "boot-a").unwrap())
}

/// Waits until the agent has handled everything that was sent to it: it answers in order.
async fn handled(session: &mut TestSession) {
    let query = Query { execution: ONE.to_owned() };
    session.say(connect_response::Message::Query(query)).await;
    report(session).await;
}

async fn verifying() -> (Bench, TestSession, Report) {
    let dir = tempfile::tempdir().unwrap();
    let journal = on_trial(dir.path()).await;
    let mut bench = Bench::with(dir, journal, Vec::new()).await;
    let (mut session, _) = bench.welcomed().await;
    let said = report(&mut session).await;
    assert_eq!(said.state(), WireState::Verifying);
    (bench, session, said)
}

#[tokio::test]
async fn acknowledgement_counts_for_the_report_that_it_names() {
    let (bench, mut session, said) = verifying().await;
    let connect_response::Message::Ack(right) = acknowledgement(&said) else { panic!() };
    let other = said.release.clone().map(|release| marco_proto::v1::Release { boot_sha256: "b".into(), ..release });
    for wrong in [
        // As a controller of protocol 1 says it.
        Ack { execution: right.execution.clone(), sequence: right.sequence, ..Ack::default() },
        Ack { attempt: 2, ..right.clone() },
        Ack { sequence: right.sequence - 1, ..right.clone() },
        Ack { sequence: right.sequence + 1, ..right.clone() },
        Ack { state: WireState::Rebooting.into(), ..right.clone() },
        Ack { boot_id: "boot-b".into(), ..right.clone() },
        Ack { release: other, ..right.clone() },
        Ack { release: None, ..right.clone() },
    ] {
        session.say(connect_response::Message::Ack(wrong.clone())).await;
        handled(&mut session).await;
        assert!(!bench.journal.entries().get(ONE).unwrap().is_acked(), "{wrong:?}");
    }
    session.say(connect_response::Message::Ack(right)).await;
    until(&bench.journal, |entry| entry.is_acked()).await;
}

#[tokio::test]
async fn verdict_counts_for_the_system_that_it_names() {
    let (bench, mut session, said) = verifying().await;
    session.say(acknowledgement(&said)).await;
    let right = acceptance(&said);
    for wrong in [
        WireVerdict { attempt: 2, ..right.clone() },
        WireVerdict { boot_id: "boot-b".into(), ..right.clone() },
        WireVerdict { release: None, ..right.clone() },
        WireVerdict { decision: Decision::Unspecified.into(), ..right.clone() },
        // Of a newer controller.
        WireVerdict { decision: 99, ..right.clone() },
    ] {
        session.say(connect_response::Message::Verdict(wrong.clone())).await;
        handled(&mut session).await;
        let heard = tokio::time::timeout(std::time::Duration::ZERO, bench.journal.verdict(ONE)).await;
        assert!(heard.is_err(), "{wrong:?}");
    }
    let error = Some(ExecutionError { reason: "NOT_VERIFIED".into(), message: "another".into() });
    let refused = WireVerdict { decision: Decision::Refused.into(), error, ..right.clone() };
    session.say(connect_response::Message::Verdict(refused)).await;
    assert_eq!(bench.journal.verdict(ONE).await, Verdict::Refused(Failure::new("NOT_VERIFIED", "another")));
    session.say(connect_response::Message::Verdict(right)).await;
    handled(&mut session).await;
    assert_eq!(bench.journal.verdict(ONE).await, Verdict::Accepted);
    assert_eq!(bench.journal.entries().get(ONE).unwrap().state, State::Verifying, "the executor goes on with it");
}

#[tokio::test]
async fn lost_journal_is_said_until_a_controller_has_answered() {
    let dir = tempfile::tempdir().unwrap();
    let journal = torn(dir.path()).await;
    let mut bench = Bench::with(dir, journal, Vec::new()).await;
    for _ in 0..2 {
        let (mut session, hello) = bench.welcomed().await;
        assert!(hello.journal_lost && hello.executions.iter().all(|report| report.journal_lost));
        assert_eq!(hello.conditions.first().map(|ill| ill.r#type()), Some(node_condition::Type::JournalLost));
        assert!(report(&mut session).await.journal_lost);
        // The session breaks before the controller answers.
    }
    let (mut session, hello) = bench.welcomed().await;
    assert!(hello.journal_lost);
    let said = report(&mut session).await;
    session.say(acknowledgement(&said)).await;
    until(&bench.journal, |entry| entry.is_acked()).await;
    drop(session);
    let (_session, hello) = bench.welcomed().await;
    assert!(!hello.journal_lost, "it is known");
    assert!(hello.executions.iter().all(|report| report.journal_lost), "the sequence is still that of the older copy");
    assert_eq!(hello.conditions.len(), 1, "the job still waits");
}

#[tokio::test]
async fn controller_of_another_protocol_is_left_and_tried_again() {
    let mut bench = Bench::new().await;
    let mut session = bench.controller.session().await;
    let Some(connect_request::Message::Hello(hello)) = session.next().await.unwrap().message else { panic!() };
    // A controller of protocol 1 reads the first field alone, and refuses a number that it does not know.
    assert_eq!((hello.protocol_version, hello.protocol_versions), (1, vec![1, 2]));
    let refusal = tonic::Status::failed_precondition("the agent speaks version 2 of the protocol, this controller 3");
    session.answers.send(Err(refusal)).await.unwrap();
    drop(session);
    let mut session = bench.controller.session().await;
    session.next().await.unwrap();
    session.say(connect_response::Message::Welcome(Welcome { protocol_version: 3, ..Welcome::default() })).await;
    assert_eq!(session.next().await, None, "the agent goes on in a protocol that it does not know");
    drop(session);
    bench.welcomed().await;
}

/// Says Welcome as a controller of protocol 1 does, and returns the report after it.
async fn welcomed_in_protocol_1(bench: &mut Bench) -> (TestSession, Report) {
    let mut session = bench.controller.session().await;
    session.next().await.unwrap();
    session.say(connect_response::Message::Welcome(Welcome::default())).await;
    let said = report(&mut session).await;
    (session, said)
}

#[tokio::test]
async fn acknowledgement_of_protocol_1_is_the_verdict() {
    let dir = tempfile::tempdir().unwrap();
    let journal = on_trial(dir.path()).await;
    let mut bench = Bench::with(dir, journal, Vec::new()).await;
    let (mut session, said) = welcomed_in_protocol_1(&mut bench).await;
    let ack = |sequence| Ack { execution: ONE.to_owned(), sequence, ..Ack::default() };
    session.say(connect_response::Message::Ack(ack(said.sequence - 1))).await;
    handled(&mut session).await;
    assert!(!bench.journal.entries().get(ONE).unwrap().is_acked());
    session.say(connect_response::Message::Ack(ack(said.sequence))).await;
    assert_eq!(bench.journal.verdict(ONE).await, Verdict::Accepted);
    assert!(bench.journal.entries().get(ONE).unwrap().is_acked());
}

#[tokio::test]
async fn acknowledgement_of_protocol_1_accepts_nothing_by_a_torn_journal() {
    let dir = tempfile::tempdir().unwrap();
    let journal = torn(dir.path()).await;
    let mut bench = Bench::with(dir, journal, Vec::new()).await;
    let (mut session, said) = welcomed_in_protocol_1(&mut bench).await;
    let ack = Ack { execution: ONE.to_owned(), sequence: said.sequence, ..Ack::default() };
    session.say(connect_response::Message::Ack(ack)).await;
    until(&bench.journal, |entry| entry.is_acked()).await;
    handled(&mut session).await;
    let heard = tokio::time::timeout(std::time::Duration::ZERO, bench.journal.verdict(ONE)).await;
    assert!(heard.is_err(), "{heard:?}");
    assert!(bench.journal.is_lost(), "a controller of protocol 1 does not hear that");
}
