//! The journal over crashes, deliveries and cancels.

use std::time::Duration;

use super::{Accepted, FILE_NAME, Journal, JournalError, KEEP_MICROS};
use crate::health::Ailment;
use crate::job::{Action, FORK_LEAP, Failure, Notice, Release, State, UNKNOWN_ACTION, Update};

mod recorded;

const ONE: &str = "operations/0198a6e0-0000-7000-8000-000000000001/executions/pi-01";
const TWO: &str = "operations/0198a6e0-0000-7000-8000-000000000002/executions/pi-01";

fn reboot() -> Action {
    Action::Reboot(Notice { delay: Duration::ZERO, message: String::new() })
}

fn update() -> Action {
    let notice = Notice { delay: Duration::ZERO, message: String::new() };
    Action::Update(Update { image: None, bootcode: None, notice, discard_home: false, raw: false })
}

fn state(journal: &Journal, execution: &str) -> State {
    journal.entries().get(execution).unwrap().state
}

#[tokio::test]
async fn what_was_accepted_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "boot-a").unwrap();
    assert_eq!(journal.accept(ONE, 1, reboot()).await.unwrap(), Accepted::New);
    journal.arm(ONE).await.unwrap();
    drop(journal);

    let journal = Journal::open(dir.path(), "boot-b").unwrap();
    let entries = journal.entries();
    let entry = entries.get(ONE).unwrap();
    assert_eq!((entry.state, entry.sequence, entry.boot_id.as_str()), (State::Armed, 2, "boot-a"));
}

#[tokio::test]
async fn a_crash_before_the_rename_leaves_the_old_state() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    journal.accept(ONE, 1, reboot()).await.unwrap();
    // Contents that differ from the journal's, as a crash before the rename leaves them.
    let armed = journal.for_the_installer(ONE);
    assert!(armed.is_ok());
    std::fs::write(dir.path().join("journal.json.new"), armed.unwrap()).unwrap();
    assert_eq!(state(&Journal::open(dir.path(), "a").unwrap(), ONE), State::Accepted);

    std::fs::write(dir.path().join("journal.json.new"), "{\"version\":1,\"ent").unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    assert_eq!(state(&journal, ONE), State::Accepted);
    // The leftover does not keep the next write from its place.
    journal.arm(ONE).await.unwrap();
    assert_eq!(state(&Journal::open(dir.path(), "a").unwrap(), ONE), State::Armed);
}

#[tokio::test]
async fn a_rename_that_lost_the_name_still_finds_the_contents() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    journal.accept(ONE, 1, reboot()).await.unwrap();
    std::fs::rename(dir.path().join(FILE_NAME), dir.path().join("journal.json.new")).unwrap();
    assert_eq!(state(&Journal::open(dir.path(), "a").unwrap(), ONE), State::Accepted);
}

#[tokio::test]
async fn a_torn_journal_is_set_aside_and_not_fatal() {
    let dir = tempfile::tempdir().unwrap();
    for number in 1..=2 {
        std::fs::write(dir.path().join(FILE_NAME), [0_u8; 40]).unwrap();
        let journal = Journal::open(dir.path(), "a").unwrap();
        assert!(journal.entries().iter().next().is_none());
        assert!(journal.is_lost() && journal.health().has(Ailment::JournalLost));
        assert!(dir.path().join(format!("journal.json.bad-{number}")).exists());
    }
}

/// A journal in which one job has ended and another is armed, and whose newest copy is torn: the older one still holds
/// that other job as accepted.
async fn torn(dir: &std::path::Path) -> Journal {
    let journal = Journal::open(dir, "a").unwrap();
    journal.accept(TWO, 1, reboot()).await.unwrap();
    journal.arm(TWO).await.unwrap();
    journal.succeed(TWO).await.unwrap();
    journal.ack(TWO, 1, 3, 1).await.unwrap();
    journal.accept(ONE, 1, reboot()).await.unwrap();
    let older = std::fs::read(dir.join(FILE_NAME)).unwrap();
    journal.arm(ONE).await.unwrap();
    let whole = std::fs::read(dir.join(FILE_NAME)).unwrap();
    std::fs::write(dir.join("journal.json.new"), older).unwrap();
    std::fs::write(dir.join(FILE_NAME), &whole[..whole.len() / 2]).unwrap();
    Journal::open(dir, "b").unwrap()
}

#[tokio::test]
async fn loss_is_told_once_and_shown_until_everything_is_settled() {
    let dir = tempfile::tempdir().unwrap();
    let journal = torn(dir.path()).await;
    assert!(journal.entries().iter().all(|entry| entry.torn));
    // An agent that is killed before it could say so says so after its next start.
    drop(journal);
    let journal = Journal::open(dir.path(), "b").unwrap();
    assert!(journal.is_lost());
    journal.loss_told().await.unwrap();
    assert!(!journal.is_lost() && journal.health().has(Ailment::JournalLost));
    let journal = Journal::open(dir.path(), "b").unwrap();
    assert!(!journal.is_lost() && journal.health().has(Ailment::JournalLost), "a job still waits");
    assert!(journal.entries().get(ONE).unwrap().torn, "its sequence still counts from the older copy");
    journal.fail(ONE, Failure::new("JOURNAL_LOST", "it was")).await.unwrap();
    let sequence = journal.entries().get(ONE).unwrap().sequence;
    journal.ack(ONE, 1, sequence, 1).await.unwrap();
    let journal = Journal::open(dir.path(), "b").unwrap();
    assert!(!journal.health().has(Ailment::JournalLost));
}

#[tokio::test]
async fn acknowledgement_of_another_report_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    journal.accept(ONE, 2, reboot()).await.unwrap();
    journal.arm(ONE).await.unwrap();
    for (attempt, sequence) in [(1, 2), (2, 1), (2, 3), (3, 2)] {
        journal.ack(ONE, attempt, sequence, 1).await.unwrap();
        assert!(!journal.entries().get(ONE).unwrap().is_acked(), "{attempt} {sequence}");
    }
    journal.ack(ONE, 2, 2, 1).await.unwrap();
    assert!(journal.entries().get(ONE).unwrap().is_acked());
}

#[tokio::test]
async fn a_known_execution_is_answered_under_the_new_attempt_and_not_begun_again() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    journal.accept(ONE, 2, reboot()).await.unwrap();
    journal.arm(ONE).await.unwrap();
    journal.succeed(ONE).await.unwrap();
    journal.ack(ONE, 2, 3, 1).await.unwrap();

    // The controller lost the end and delivers again.
    assert_eq!(journal.accept(ONE, 3, reboot()).await.unwrap(), Accepted::Known);
    let entries = journal.entries();
    let entry = entries.get(ONE).unwrap();
    assert_eq!((entry.state, entry.attempt, entry.sequence), (State::Succeeded, 3, 3));
    assert!(!entry.is_acked(), "the controller must hear of it again");
    assert!(matches!(journal.accept(ONE, 2, reboot()).await, Err(JournalError::Stale { have: 3, got: 2 })));
}

#[tokio::test]
async fn an_unknown_action_fails_and_a_second_job_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    assert_eq!(journal.accept(TWO, 1, Action::Unknown).await.unwrap(), Accepted::Refused);
    journal.accept(ONE, 1, reboot()).await.unwrap();
    let three = "operations/0198a6e0-0000-7000-8000-000000000003/executions/pi-01";
    assert!(matches!(journal.accept(three, 1, reboot()).await, Err(JournalError::Busy(other)) if other == ONE));
    let entries = journal.entries();
    let reason = |name| entries.get(name).unwrap().error.clone().unwrap().reason;
    assert_eq!(reason(TWO), UNKNOWN_ACTION);
    assert!(entries.get(three).is_none(), "it can be given again");
    assert_eq!(entries.unfinished().unwrap().execution, ONE);
}

#[tokio::test]
async fn a_cancelled_job_is_never_armed() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    journal.accept(ONE, 1, reboot()).await.unwrap();
    journal.request_cancel(ONE).await.unwrap();
    assert!(matches!(journal.arm(ONE).await, Err(JournalError::CancelRequested)));
    journal.cancelled(ONE).await.unwrap();
    assert_eq!(state(&Journal::open(dir.path(), "a").unwrap(), ONE), State::Cancelled);
}

#[tokio::test]
async fn a_cancel_after_the_point_of_no_return_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    journal.accept(ONE, 1, reboot()).await.unwrap();
    journal.arm(ONE).await.unwrap();
    journal.request_cancel(ONE).await.unwrap();
    let entries = journal.entries();
    let entry = entries.get(ONE).unwrap();
    assert!(entry.cancel_refused && !entry.cancel_requested);
    assert_eq!(entry.state, State::Armed);
}

#[tokio::test]
async fn a_cancel_that_overtakes_its_assignment_wins() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    journal.request_cancel(ONE).await.unwrap();
    // Known, not new: the assignment that comes late is answered with CANCELLED.
    assert_eq!(journal.accept(ONE, 1, reboot()).await.unwrap(), Accepted::Known);
    assert_eq!(state(&journal, ONE), State::Cancelled);
}

#[tokio::test]
async fn what_was_settled_thirty_days_ago_is_dropped_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    journal.accept(ONE, 1, reboot()).await.unwrap();
    journal.arm(ONE).await.unwrap();
    journal.succeed(ONE).await.unwrap();
    journal.ack(ONE, 1, 3, 1000).await.unwrap();
    journal.accept(TWO, 1, reboot()).await.unwrap();
    journal.ack(TWO, 1, 1, 1000 + KEEP_MICROS).await.unwrap();
    assert!(journal.entries().get(ONE).is_some());
    // A microsecond more than thirty days.
    journal.ack(TWO, 1, 1, 1001 + KEEP_MICROS).await.unwrap();
    assert!(journal.entries().get(ONE).is_none());
    assert!(journal.entries().get(TWO).is_some(), "an unfinished job was dropped");
}

#[tokio::test]
async fn an_update_is_handed_from_system_to_installer_to_system_with_rising_numbers() {
    // Each system of an update has a journal of its own, on a file system of its own.
    let [old, recovery, new] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let running = Journal::open(old.path(), "a").unwrap();
    running.accept(ONE, 1, update()).await.unwrap();
    std::fs::write(recovery.path().join(FILE_NAME), running.for_the_installer(ONE).unwrap()).unwrap();
    running.arm(ONE).await.unwrap();

    let installer = Journal::open(recovery.path(), "b").unwrap();
    assert_eq!(installer.entries().get(ONE), running.entries().get(ONE));
    installer.install(ONE).await.unwrap();
    // A restarted installer begins again, and that is no new state.
    installer.install(ONE).await.unwrap();
    std::fs::write(new.path().join(FILE_NAME), installer.for_the_new_root(ONE).unwrap()).unwrap();
    installer.try_boot(ONE).await.unwrap();

    let trial = Journal::open(new.path(), "c").unwrap();
    trial.verify(ONE, Release::default()).await.unwrap();
    trial.succeed(ONE).await.unwrap();
    assert_eq!(trial.entries().get(ONE).unwrap().sequence, 6);

    // The power failed before the new system was confirmed: the installer is ahead of what that one reported.
    let installer = Journal::open(recovery.path(), "d").unwrap();
    installer.trial_failed(ONE).await.unwrap();
    let entries = installer.entries();
    let entry = entries.get(ONE).unwrap();
    assert_eq!((entry.state, entry.trials, entry.sequence), (State::Installing, 1, 4 + FORK_LEAP));
}

#[tokio::test]
async fn a_rolled_back_job_is_ahead_of_what_the_installer_reported() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    journal.accept(ONE, 1, update()).await.unwrap();
    journal.arm(ONE).await.unwrap();
    journal.roll_back(ONE, Failure::new("OLD_SYSTEM_CAME_BACK", "it did")).await.unwrap();
    assert_eq!(journal.entries().get(ONE).unwrap().sequence, 2 + FORK_LEAP);
}
