//! Torn journals. The node counts from an older copy, so its sequences are below the stored ones.

use marco_controller::operation::{Action, ExecutionState, Greeting, NodeMode, reason};
use marco_controller::store::{Assignment, Hello, Kind, Purpose, Release, ReportOutcome, ReportRow};
use marco_proto::names::NodeId;

use crate::support::*;

async fn assigned(f: &Fixture, node: &str, action: Action) -> (NodeId, i64, Assignment) {
    let (id, epoch) = f.online(node).await;
    f.create(action, std::slice::from_ref(&id)).await;
    let assignment = f.claim(&[(id.clone(), epoch)], start()).await.remove(0);
    (id, epoch, assignment)
}

/// Reports of the node before its journal is torn. All of them are stored.
async fn says(f: &Fixture, epoch: i64, assignment: &Assignment, way: &[(u64, ExecutionState, &str)]) {
    for (sequence, state, boot_id) in way {
        let outcome = f.report(epoch, &report(assignment, *sequence, *state, boot_id), after(1)).await;
        assert_eq!((outcome, f.state(&assignment.execution).await), (ReportOutcome::Acked, *state));
    }
}

/// States of a reboot until the restart: sequence, state and boot id.
const WAY_DOWN: &[(u64, ExecutionState, &str)] =
    &[(1, ExecutionState::Running, "boot-1"), (4, ExecutionState::Rebooting, "boot-1")];

/// States of an update until the trial boot, with the sequences of agents of protocol 1: 1 and 2 from the running
/// system, 3 and 4 from the installer. Without a torn journal the new system then sends VERIFYING with 5 and SUCCEEDED
/// with 6.
const TO_THE_TRIAL: &[(u64, ExecutionState, &str)] = &[
    (1, ExecutionState::Running, "boot-1"),
    (2, ExecutionState::Rebooting, "boot-1"),
    (3, ExecutionState::Running, "boot-2"),
    (4, ExecutionState::Rebooting, "boot-2"),
];

pub(crate) async fn torn_journal_gets_its_verdict_once_that_is_stored(f: Fixture) {
    f.store.put_artifact(&artifact("os", Kind::Image, Purpose::None)).await.unwrap();
    for (node, sequence, in_hello) in
        [("pi-1", 2, true), ("pi-2", 2, false), ("pi-3", 4, true), ("pi-4", 4, false), ("pi-5", 5, true)]
    {
        let (id, epoch, assignment) = assigned(&f, node, update(Some("os"))).await;
        says(&f, epoch, &assignment, TO_THE_TRIAL).await;
        let execution = &assignment.execution;
        let release = Release { execution: execution.name(), image_sha256: digest("os"), boot_sha256: String::new() };
        let asks =
            ReportRow { release: Some(release), ..report(&assignment, sequence, ExecutionState::Verifying, "boot-3") };
        if in_hello {
            let hello = f.reconcile(&id, epoch, "boot-3", std::slice::from_ref(&asks), 2).await;
            assert_eq!(hello.acks, vec![(execution.clone(), sequence)]);
        } else {
            assert_eq!(f.report(epoch, &asks, after(2)).await, ReportOutcome::Acked);
        }
        // An agent of protocol 1 takes the acknowledgement as its verdict. An unstored VERIFYING once left it waiting
        // forever.
        assert_eq!(f.state(execution).await, ExecutionState::Verifying, "{node}: acknowledged and not stored");
        let stored = f.execution(execution).await;
        assert_eq!(f.report(epoch, &asks, after(3)).await, ReportOutcome::Acked);
        assert_eq!(f.execution(execution).await, stored, "{node}: said again, it is no news");
        let done = ReportRow { sequence: sequence + 1, state: ExecutionState::Succeeded, ..asks };
        assert_eq!(f.report(epoch, &done, after(4)).await, ReportOutcome::Acked);
        assert_eq!(f.state(execution).await, ExecutionState::Succeeded, "{node} says so");
    }
}

pub(crate) async fn torn_journal_gets_no_verdict_without_proof(f: Fixture) {
    let (_, epoch, assignment) = assigned(&f, "pi-1", reboot()).await;
    says(&f, epoch, &assignment, WAY_DOWN).await;
    let lie = report(&assignment, 2, ExecutionState::Verifying, "boot-1");
    let outcome = f.report(epoch, &lie, after(2)).await;
    assert!(matches!(outcome, ReportOutcome::Rejected(_)), "{outcome:?}");
    assert!(failed_as(reason::NOT_VERIFIED, &f.execution(&assignment.execution).await));
}

pub(crate) async fn end_told_from_a_torn_journal_is_the_end(f: Fixture) {
    for (node, sequence, state) in [
        ("pi-1", 1, ExecutionState::Failed),
        ("pi-2", 3, ExecutionState::RolledBack),
        ("pi-3", 4, ExecutionState::Succeeded),
    ] {
        let (_, epoch, assignment) = assigned(&f, node, reboot()).await;
        says(&f, epoch, &assignment, WAY_DOWN).await;
        let end = report(&assignment, sequence, state, "boot-2");
        assert_eq!(f.report(epoch, &end, after(2)).await, ReportOutcome::Acked);
        assert_eq!(f.state(&assignment.execution).await, state, "{node} and its controller disagree");
    }
}

pub(crate) async fn step_told_from_a_torn_journal_takes_nothing_back(f: Fixture) {
    let (_, epoch, assignment) = assigned(&f, "pi-1", reboot()).await;
    says(&f, epoch, &assignment, WAY_DOWN).await;
    // RUNNING below the stored sequence may cross with a newer report, so it must not take the execution back.
    let earlier = report(&assignment, 2, ExecutionState::Running, "boot-1");
    assert_eq!(f.report(epoch, &earlier, after(2)).await, ReportOutcome::Acked);
    let row = f.execution(&assignment.execution).await;
    assert_eq!((row.state, row.sequence), (ExecutionState::Rebooting, 4));
}

pub(crate) async fn step_of_a_journal_that_says_it_was_torn_is_believed(f: Fixture) {
    let (_, epoch, assignment) = assigned(&f, "pi-1", reboot()).await;
    says(&f, epoch, &assignment, WAY_DOWN).await;
    let execution = &assignment.execution;
    // The journal lost ARMED, so the node is at work again. Its sequence says nothing.
    let earlier = ReportRow { journal_lost: true, ..report(&assignment, 2, ExecutionState::Running, "boot-1") };
    assert_eq!(f.report(epoch, &earlier, after(2)).await, ReportOutcome::Acked);
    let row = f.execution(execution).await;
    assert_eq!((row.state, row.sequence), (ExecutionState::Running, 2));
    let events = f.store.events(&execution.operation, 0, 100).await.unwrap();
    let told = events.iter().any(|event| event.reason.contains("older copy"));
    assert!(told, "{events:?}");
    // A state that is stored under another sequence is no change.
    let again = ReportRow { sequence: 1, ..earlier };
    let changes = f.store.operation(&execution.operation).await.unwrap().unwrap().event_count;
    assert!(matches!(f.report(epoch, &again, after(3)).await, ReportOutcome::Acked | ReportOutcome::Progress));
    assert_eq!(f.store.operation(&execution.operation).await.unwrap().unwrap().event_count, changes);
    let armed = ReportRow { sequence: 2, state: ExecutionState::Rebooting, ..again };
    assert_eq!(f.report(epoch, &armed, after(4)).await, ReportOutcome::Acked);
    assert_eq!(f.state(execution).await, ExecutionState::Rebooting);
}

pub(crate) async fn assignment_that_a_lost_journal_may_have_held_is_not_given_again(f: Fixture) {
    for (node, journal_lost, ends) in [("pi-1", false, ExecutionState::Pending), ("pi-2", true, ExecutionState::Failed)]
    {
        let (id, _, assignment) = assigned(&f, node, reboot()).await;
        let epoch = f.session(&id, "boot-2", after(1)).await;
        let greeting = Greeting { mode: NodeMode::Running, boot_id: "boot-2", answers_queries: true, journal_lost };
        f.store.reconcile(&id, epoch, Hello { greeting, listed: &[] }, after(1)).await.unwrap();
        let row = f.execution(&assignment.execution).await;
        assert_eq!(row.state, ends, "{node}");
        assert!(!journal_lost || failed_as(reason::JOURNAL_LOST, &row));
    }
}

pub(crate) async fn older_copy_does_not_dispute_the_end_that_the_whole_one_told(f: Fixture) {
    let (_, epoch, assignment) = assigned(&f, "pi-1", reboot()).await;
    says(&f, epoch, &assignment, WAY_DOWN).await;
    let done = report(&assignment, 5, ExecutionState::Succeeded, "boot-2");
    assert_eq!(f.report(epoch, &done, after(2)).await, ReportOutcome::Acked);
    // The node counts on from RUNNING and cannot know whether it rebooted. The sequence is higher by chance.
    let unsure = ReportRow { sequence: 9, state: ExecutionState::Failed, journal_lost: true, ..done };
    assert_eq!(f.report(epoch, &unsure, after(3)).await, ReportOutcome::Acked);
    assert_eq!(f.state(&assignment.execution).await, ExecutionState::Succeeded);
    assert!(f.store.conflict(&assignment.execution).await.unwrap().is_none());
}
