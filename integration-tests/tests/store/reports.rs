//! Reports of nodes and their effects.

use marco_controller::operation::{ExecutionError, ExecutionState, NodeMode, OperationState, reason};
use marco_controller::store::{
    AbandonOutcome, Kind, ProgressRow, Purpose, Release, ReportOutcome, ReportRow, SentLog, SessionStart,
};
use marco_proto::names::ExecutionId;

use crate::support::*;

pub(crate) async fn a_reboot_succeeds_only_with_a_new_boot_id(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    // A success under the old boot id: the node did not reboot.
    let lie = report(&assignment, 1, ExecutionState::Succeeded, "boot-1");
    assert_eq!(f.report(epoch, &lie, after(1)).await, ReportOutcome::Acked);
    assert!(failed_as(reason::NOT_VERIFIED, &f.execution(&assignment.execution).await));
    f.create(reboot(), std::slice::from_ref(&id)).await;
    let assignment = f.claim(&[(id, epoch)], after(2)).await.remove(0);
    for (sequence, state, boot_id) in [
        (1, ExecutionState::Running, "boot-1"),
        (2, ExecutionState::Rebooting, "boot-1"),
        (3, ExecutionState::Succeeded, "boot-2"),
    ] {
        let outcome = f.report(epoch, &report(&assignment, sequence, state, boot_id), after(3)).await;
        assert_eq!((outcome, f.state(&assignment.execution).await), (ReportOutcome::Acked, state));
    }
    let row = f.execution(&assignment.execution).await;
    assert_eq!((row.boot_id.as_str(), row.finish_time, row.sequence), ("boot-2", Some(after(3)), 3));
}

pub(crate) async fn an_update_is_accepted_only_when_the_release_is_right(f: Fixture) {
    f.store.put_artifact(&artifact("os", Kind::Image, Purpose::None)).await.unwrap();
    f.store.put_artifact(&artifact("boot4", Kind::Bootcode, Purpose::System)).await.unwrap();
    f.store.put_artifact(&artifact("boot", Kind::Bootcode, Purpose::System)).await.unwrap();
    let (id, epoch) = f.online("pi-1").await;
    // Each action with a missing, a wrong, an empty and the right release.
    let sha = |id: &str| if id.is_empty() { String::new() } else { digest(id) };
    for (action, image, boot) in [(update(Some("os")), "os", ""), (update(None), "", "boot4")] {
        for (right, named, image, boot) in [
            (false, false, image, boot),
            (false, true, "another", "another"),
            (false, true, "", ""),
            (true, true, image, boot),
        ] {
            f.create(action.clone(), std::slice::from_ref(&id)).await;
            let assignment = f.claim(&[(id.clone(), epoch)], start()).await.remove(0);
            let execution = if named { assignment.execution.name() } else { "operations/x/executions/y".to_owned() };
            let release = Release { execution, image_sha256: sha(image), boot_sha256: sha(boot) };
            let back =
                ReportRow { release: Some(release), ..report(&assignment, 1, ExecutionState::Verifying, "boot-2") };
            let outcome = f.report(epoch, &back, after(1)).await;
            let row = f.execution(&assignment.execution).await;
            if right {
                assert_eq!((outcome, row.state), (ReportOutcome::Acked, ExecutionState::Verifying));
                let done = ReportRow { sequence: 2, state: ExecutionState::Succeeded, ..back };
                assert_eq!(f.report(epoch, &done, after(2)).await, ReportOutcome::Acked);
                assert_eq!(f.state(&assignment.execution).await, ExecutionState::Succeeded);
            } else {
                assert!(matches!(outcome, ReportOutcome::Rejected(_)), "an acknowledgement would accept the system");
                assert!(failed_as(reason::NOT_VERIFIED, &row));
                let again = f.reconcile(&id, epoch, "boot-2", &[back], 3).await;
                assert_eq!((again.acks.len(), again.rejected.len()), (0, 1));
            }
        }
    }
}

pub(crate) async fn a_report_that_was_stored_is_acknowledged_again_and_changes_nothing(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let running = report(&assignment, 1, ExecutionState::Running, "boot-1");
    let rebooting = report(&assignment, 2, ExecutionState::Rebooting, "boot-1");
    f.report(epoch, &running, after(1)).await;
    f.report(epoch, &rebooting, after(2)).await;
    let before = f.execution(&assignment.execution).await;
    let events = f.store.operation(&assignment.execution.operation).await.unwrap().unwrap().event_count;
    assert_eq!(f.report(epoch, &running, after(3)).await, ReportOutcome::Acked);
    assert_eq!(f.report(epoch, &rebooting, after(3)).await, ReportOutcome::Acked, "the answer to its commit was lost");
    let further = ReportRow { phase: "restarting".to_owned(), ..rebooting.clone() };
    assert_eq!(f.report(epoch, &further, after(3)).await, ReportOutcome::Progress);
    let again = f.reconcile(&id, epoch, "boot-1", std::slice::from_ref(&rebooting), 4).await;
    assert_eq!((again.acks, again.holder), (vec![(assignment.execution.clone(), 2)], true));
    assert_eq!(f.execution(&assignment.execution).await, before);
    let now = f.store.operation(&assignment.execution.operation).await.unwrap().unwrap().event_count;
    assert_eq!(events, now);
}

pub(crate) async fn a_report_of_another_delivery_is_answered_by_an_assignment(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let stale = ReportRow { attempt: 0, ..report(&assignment, 1, ExecutionState::Running, "boot-1") };
    let ReportOutcome::Stale(again) = f.report(epoch, &stale, after(1)).await else { panic!() };
    assert_eq!((again.attempt, again.known_state, &again.action), (1, ExecutionState::Assigned, &reboot()));
    let truth = report(&again, 1, ExecutionState::Running, "boot-1");
    assert_eq!(f.report(epoch, &truth, after(2)).await, ReportOutcome::Acked);
    assert_eq!(f.state(&assignment.execution).await, ExecutionState::Running);
    let nowhere = ExecutionId { operation: new_operation(reboot(), &[]).id, node: id.clone() };
    let unknown = ReportRow { execution: nowhere, ..truth.clone() };
    assert_eq!(f.report(epoch, &unknown, after(3)).await, ReportOutcome::Unknown);
    // A node must not end the work of another one.
    let elsewhere = ExecutionId { operation: again.execution.operation.clone(), node: node("pi-2") };
    let foreign = ReportRow { execution: elsewhere, ..truth };
    let outcome = f.store.apply_report(&id, epoch, &foreign, after(3)).await.unwrap();
    assert!(matches!(outcome, ReportOutcome::Refused(_)), "{outcome:?}");
}

pub(crate) async fn a_node_brings_about_a_thousand_deliveries_of_an_execution_at_most(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    let events = |f: &Fixture| {
        let (store, id) = (f.store.clone(), assignment.execution.operation.clone());
        async move { store.operation(&id).await.unwrap().unwrap().event_count }
    };
    let stale = |attempt| ReportRow { attempt, ..report(&assignment, 1, ExecutionState::Running, "boot-1") };
    // The execution has used up all its changes but one.
    f.by_hand(&["UPDATE executions SET changes = 999"]).await.remove(0).unwrap();
    assert_eq!(f.report(epoch, &stale(1), after(1)).await, ReportOutcome::Acked);
    let before = events(&f).await;
    let armed = report(&assignment, 2, ExecutionState::Rebooting, "boot-1");
    for said in [stale(0), armed, stale(2), stale(3)] {
        let outcome = f.report(epoch, &said, after(2)).await;
        assert!(matches!(outcome, ReportOutcome::Refused(_)), "{outcome:?}");
    }
    assert_eq!(events(&f).await, before);
}

pub(crate) async fn a_node_declines_an_execution_a_thousand_times_at_most(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let execution = &assignment.execution;
    let events = async || f.store.operation(&execution.operation).await.unwrap().unwrap().event_count;
    // The execution has used up all its changes but one.
    f.by_hand(&["UPDATE executions SET changes = 999"]).await.remove(0).unwrap();
    assert!(f.store.not_held(execution, None, epoch, after(1)).await.unwrap());
    assert_eq!(f.state(execution).await, ExecutionState::Pending);
    assert_eq!(f.claim(&[(id, epoch)], after(2)).await.len(), 1);
    let before = events().await;
    for at in 3..6 {
        assert!(f.store.not_held(execution, None, epoch, after(at)).await.unwrap());
        assert_eq!(f.state(execution).await, ExecutionState::Assigned);
    }
    assert_eq!(events().await, before);
}

pub(crate) async fn reports_of_an_earlier_delivery_get_one_and_the_same(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let running = report(&assignment, 1, ExecutionState::Running, "boot-1");
    assert_eq!(f.report(epoch, &running, after(1)).await, ReportOutcome::Acked);
    let events = async || f.store.operation(&assignment.execution.operation).await.unwrap().unwrap().event_count;
    // The store is ahead, as after a backup or a fail-over, or the execution was reset to pending.
    for (state, attempt) in [("RUNNING", 5), ("PENDING", 4)] {
        let set = format!("UPDATE executions SET state = '{state}', attempt = {attempt}");
        f.by_hand(&[&set]).await.remove(0).unwrap();
        let epoch = f.session(&id, "boot-1", after(2)).await;
        let before = events().await;
        let hello = f.reconcile(&id, epoch, "boot-1", std::slice::from_ref(&running), 2).await;
        assert_eq!(hello.assigns.iter().map(|given| given.attempt).collect::<Vec<_>>(), [5]);
        // The node repeats a report from its Hello until the answer arrives.
        for _ in 0..3 {
            let ReportOutcome::Stale(again) = f.report(epoch, &running, after(3)).await else { panic!() };
            assert_eq!(again.attempt, 5);
        }
        assert_eq!(events().await, before + 1, "one delivery");
        let truth = ReportRow { attempt: 5, ..running.clone() };
        let outcome = f.report(epoch, &truth, after(4)).await;
        let now = f.state(&assignment.execution).await;
        assert_eq!((outcome, now), (ReportOutcome::Acked, ExecutionState::Running));
    }
}

pub(crate) async fn a_report_under_a_lost_session_changes_nothing(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let later = f.session(&id, "boot-1", after(1)).await;
    let running = report(&assignment, 1, ExecutionState::Running, "boot-1");
    assert_eq!(f.report(epoch, &running, after(2)).await, ReportOutcome::NotHolder);
    assert!(!f.reconcile(&id, epoch, "boot-1", &[], 2).await.holder);
    assert_eq!(f.state(&assignment.execution).await, ExecutionState::Assigned);
    assert_eq!(f.report(later, &running, after(2)).await, ReportOutcome::Acked);
}

pub(crate) async fn an_assignment_that_never_arrived_is_given_again(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    // Within one session nothing is lost, so an empty Hello means that the assignment is still under way.
    f.reconcile(&id, epoch, "boot-1", &[], 1).await;
    assert_eq!(f.state(&assignment.execution).await, ExecutionState::Assigned, "it was sent in this session");
    // A new session that does not list it proves that it never arrived.
    let epoch = f.session(&id, "boot-1", after(2)).await;
    f.reconcile(&id, epoch, "boot-1", &[], 2).await;
    assert_eq!(f.state(&assignment.execution).await, ExecutionState::Pending);
    let again = f.claim(&[(id.clone(), epoch)], after(3)).await.remove(0);
    assert_eq!((again.execution, again.attempt), (assignment.execution.clone(), 2));
    f.store.request_cancel(&assignment.execution.operation, "pat", after(4)).await.unwrap();
    let epoch = f.session(&id, "boot-1", after(5)).await;
    f.reconcile(&id, epoch, "boot-1", &[], 5).await;
    assert_eq!(f.state(&assignment.execution).await, ExecutionState::Cancelled);
    assert_eq!(f.operation_state(&assignment.execution.operation).await, OperationState::Cancelled);
}

pub(crate) async fn an_assignment_is_never_taken_back_by_time(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    assert!(f.store.mark_overdue(after(59)).await.unwrap().is_empty());
    assert_eq!(f.store.mark_overdue(after(60)).await.unwrap().len(), 1);
    for at in [3600, 23 * 3600] {
        assert!(f.store.give_up(after(at)).await.unwrap().is_empty());
        assert!(f.claim(&[(id.clone(), epoch)], after(at)).await.is_empty());
        let row = f.execution(&assignment.execution).await;
        assert_eq!((row.state, row.overdue), (ExecutionState::Assigned, true));
    }
    // The node answers after all.
    f.report(epoch, &report(&assignment, 1, ExecutionState::Running, "boot-1"), after(23 * 3600)).await;
    let row = f.execution(&assignment.execution).await;
    assert_eq!((row.state, row.overdue), (ExecutionState::Running, false));
    // Each phase has its own deadline: half an hour without news, ten minutes for the reboot.
    assert_eq!(row.deadline, Some(after(23 * 3600 + 1800)));
    f.report(epoch, &report(&assignment, 2, ExecutionState::Rebooting, "boot-1"), after(23 * 3600 + 1)).await;
    assert_eq!(f.execution(&assignment.execution).await.deadline, Some(after(23 * 3600 + 601)));
}

pub(crate) async fn an_accepted_execution_that_the_node_forgot_fails(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    f.report(epoch, &report(&assignment, 1, ExecutionState::Running, "boot-1"), after(1)).await;
    let epoch = f.session(&id, "boot-2", after(2)).await;
    f.reconcile(&id, epoch, "boot-2", &[], 2).await;
    assert!(failed_as(reason::JOURNAL_LOST, &f.execution(&assignment.execution).await));
    assert_eq!(f.operation_state(&assignment.execution.operation).await, OperationState::Failed);
}

pub(crate) async fn a_hello_after_the_reboot_verifies_and_the_report_ends_it(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let armed = report(&assignment, 2, ExecutionState::Rebooting, "boot-1");
    f.report(epoch, &armed, after(1)).await;
    let same_boot = f.session(&id, "boot-1", after(2)).await;
    f.reconcile(&id, same_boot, "boot-1", std::slice::from_ref(&armed), 2).await;
    assert_eq!(f.state(&assignment.execution).await, ExecutionState::Rebooting, "it has not rebooted yet");
    let epoch = f.session(&id, "boot-2", after(3)).await;
    f.reconcile(&id, epoch, "boot-2", std::slice::from_ref(&armed), 3).await;
    let row = f.execution(&assignment.execution).await;
    assert_eq!((row.state, row.boot_id.as_str()), (ExecutionState::Verifying, "boot-2"));
    let done = report(&assignment, 3, ExecutionState::Succeeded, "boot-2");
    assert_eq!(f.report(epoch, &done, after(4)).await, ReportOutcome::Acked);
    assert_eq!(f.operation_state(&assignment.execution.operation).await, OperationState::Succeeded);
}

fn progress(id: &ExecutionId, attempt: u32, bytes_done: u64) -> ProgressRow {
    ProgressRow {
        execution: id.clone(),
        attempt,
        sequence: 1,
        phase: "unpacking image".to_owned(),
        bytes_done,
        bytes_total: 6_000_000_000,
        cancel_refused: false,
    }
}

/// Stores progress. Returns whether the execution is overdue, and its deadline in seconds.
async fn flush(f: &Fixture, id: &ExecutionId, phase: &str, bytes_done: u64, at: i64) -> (bool, Option<i64>) {
    let row = ProgressRow { phase: phase.to_owned(), ..progress(id, 1, bytes_done) };
    f.store.flush_progress(&[row], after(at)).await.unwrap();
    let row = f.execution(id).await;
    (row.overdue, row.deadline.map(|deadline| (deadline - after(0)).num_seconds()))
}

pub(crate) async fn a_phase_has_its_own_time_and_only_a_byte_that_moves_is_a_sign_of_life(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    let id = &assignment.execution;
    f.report(epoch, &report(&assignment, 1, ExecutionState::Running, "boot-1"), after(0)).await;
    // Progress that repeats the same bytes must not extend the deadline, or a stuck node would never be overdue.
    let flush = async |phase: &str, bytes_done: u64, at: i64| flush(&f, id, phase, bytes_done, at).await;
    assert_eq!(flush("partitioning", 0, 10).await, (false, Some(10 + 900)));
    assert_eq!(flush("partitioning", 0, 500).await, (false, Some(10 + 900)), "said again is no news");
    assert_eq!(flush("unpacking image", 0, 600).await, (false, Some(1200)));
    assert_eq!(flush("unpacking image", 7, 1100).await, (false, Some(1700)));
    assert_eq!(flush("unpacking image", 7, 1600).await, (false, Some(1700)));
    let marked = f.store.mark_overdue(after(1700)).await.unwrap();
    assert_eq!(marked.len(), 1);
    let why = "unpacking image: no byte has moved for 10m";
    assert_eq!((marked[0].why.as_str(), f.execution(id).await.overdue_reason.as_str()), (why, why));
    let events = f.store.events(&id.operation, 0, 100).await.unwrap();
    assert_eq!(events.last().unwrap().reason, format!("overdue: {why}"));
    assert_eq!(flush("unpacking image", 7, 1800).await, (true, Some(1700)));
    assert_eq!(flush("unpacking image", 8, 1900).await, (false, Some(2500)), "it lives");
    assert_eq!(f.execution(id).await.overdue_reason, "");
    // One day after its assignment it is late, in spite of its progress.
    let day = 86_400 + (f.execution(id).await.assign_time.unwrap() - after(0)).num_seconds();
    assert_eq!(flush("unpacking image", 9, day - 60).await, (false, Some(day)));
    assert_eq!(f.store.mark_overdue(after(day)).await.unwrap()[0].why, "it is not done 1day after it was assigned");
    assert_eq!(flush("unpacking image", 10, day + 60).await, (true, Some(day)));
}

pub(crate) async fn phases_that_come_round_again_are_no_sign_of_life(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    let id = &assignment.execution;
    f.report(epoch, &report(&assignment, 1, ExecutionState::Running, "boot-1"), after(0)).await;
    let flush = async |phase: &str, bytes_done: u64, at: i64| flush(&f, id, phase, bytes_done, at).await;
    // An installer that makes no file system: each phase is another than the one before, and none is further.
    let mut at = 10;
    let furthest = loop {
        for phase in ["connecting", "partitioning", "waiting to try the installation again"] {
            assert!(!flush(phase, 0, at).await.0, "{at}");
            at += 60;
        }
        if at > 6000 {
            break 70;
        }
    };
    let end = furthest + 2 * 3600;
    while at < end {
        flush("connecting", 0, at).await;
        flush("waiting to try the installation again", 0, at + 1).await;
        at += 60;
    }
    assert_eq!(f.execution(id).await.deadline, Some(after(end)));
    let marked = f.store.mark_overdue(after(end)).await.unwrap();
    let why = "it has not got any further for 2h (last: waiting to try the installation again)";
    assert_eq!(marked.iter().map(|overdue| overdue.why.as_str()).collect::<Vec<_>>(), [why]);
    assert_eq!(flush("connecting", 0, end + 60).await, (true, Some(end)), "it is late for as long as it does that");
    assert_eq!(
        f.execution(id).await.overdue_reason,
        why.replace("waiting to try the installation again", "connecting")
    );
    // Further than ever before: it lives. A power cut that undoes it leaves it the time to do it again.
    assert_eq!(flush("unpacking image", 1, end + 120).await, (false, Some(end + 720)));
    assert_eq!(flush("unpacking image", 900, end + 180).await, (false, Some(end + 780)));
    assert_eq!(flush("unpacking image", 5, end + 7000).await, (false, Some(end + 7380)));
    // Another state is another stretch.
    f.report(epoch, &report(&assignment, 2, ExecutionState::Rebooting, "boot-1"), after(end + 7100)).await;
    let row = ProgressRow { sequence: 2, phase: "trial boot".to_owned(), ..progress(id, 1, 0) };
    f.store.flush_progress(&[row], after(end + 7200)).await.unwrap();
    assert_eq!(f.execution(id).await.deadline, Some(after(end + 7800)));
}

pub(crate) async fn progress_is_kept_and_holds_off_the_deadline(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    let id = &assignment.execution;
    f.report(epoch, &report(&assignment, 1, ExecutionState::Running, "boot-1"), after(0)).await;
    assert_eq!(f.store.mark_overdue(after(1800)).await.unwrap().len(), 1);
    f.store.flush_progress(&[progress(id, 1, 5_000_000_000)], after(1900)).await.unwrap();
    let row = f.execution(id).await;
    assert_eq!(
        (row.phase.as_str(), row.bytes_done, row.bytes_total),
        ("unpacking image", 5_000_000_000, 6_000_000_000)
    );
    assert_eq!((row.overdue, row.deadline), (false, Some(after(2500))));
    // Progress is flushed once a second, so it may belong to a delivery that was replaced meanwhile.
    f.store.flush_progress(&[progress(id, 9, 1)], after(1901)).await.unwrap();
    assert_eq!(f.execution(id).await.bytes_done, 5_000_000_000, "of another delivery");
    f.store.flush_progress(&[], after(1902)).await.unwrap();
}

pub(crate) async fn progress_of_an_earlier_state_is_ignored(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    f.report(epoch, &report(&assignment, 2, ExecutionState::Rebooting, "boot-1"), after(1)).await;
    let before = f.execution(&assignment.execution).await;
    f.store.flush_progress(&[progress(&assignment.execution, 1, 1)], after(2)).await.unwrap();
    assert_eq!(f.execution(&assignment.execution).await, before);
}

pub(crate) async fn an_overdue_execution_can_be_abandoned_and_a_late_truth_still_counts(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    let (execution, operation) = (&assignment.execution, &assignment.execution.operation);
    let early = f.store.abandon(execution, "pat", after(30)).await.unwrap();
    assert!(matches!(early, AbandonOutcome::NotOverdue(_)));
    assert_eq!(f.store.mark_overdue(after(59)).await.unwrap().len(), 0);
    assert_eq!(f.store.mark_overdue(after(60)).await.unwrap().len(), 1);
    assert_eq!(f.store.mark_overdue(after(61)).await.unwrap().len(), 0);
    assert_eq!(f.store.operation(operation).await.unwrap().unwrap().counts.overdue, 1);
    let AbandonOutcome::Abandoned(row) = f.store.abandon(execution, "pat", after(70)).await.unwrap() else { panic!() };
    assert!(failed_as(reason::NEVER_RETURNED, &row));
    assert_eq!(f.operation_state(operation).await, OperationState::Failed);
    let again = f.store.abandon(execution, "pat", after(71)).await.unwrap();
    assert!(matches!(again, AbandonOutcome::Final(_)));
    let running = report(&assignment, 1, ExecutionState::Running, "boot-1");
    assert_eq!(f.report(epoch, &running, after(72)).await, ReportOutcome::Acked);
    assert_eq!(f.state(execution).await, ExecutionState::Failed);
    let done = report(&assignment, 3, ExecutionState::Succeeded, "boot-2");
    assert_eq!(f.report(epoch, &done, after(80)).await, ReportOutcome::Acked);
    let row = f.execution(execution).await;
    assert_eq!((row.state, row.error), (ExecutionState::Succeeded, None));
    assert_eq!(f.operation_state(operation).await, OperationState::Succeeded);
    let lie = report(&assignment, 4, ExecutionState::Failed, "boot-2");
    let outcome = f.report(epoch, &lie, after(81)).await;
    assert!(matches!(outcome, ReportOutcome::Conflict { acknowledge: true, .. }), "{outcome:?}");
    assert_eq!(f.state(execution).await, ExecutionState::Succeeded, "any other end is for good");
}

pub(crate) async fn what_a_node_logged_is_kept_once_and_only_of_what_did_not_succeed(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let execution = &assignment.execution;
    let said = |lines: &str| SentLog { lines: lines.to_owned(), cut: true };
    let with =
        |sequence, state, lines: &str| ReportRow { log: said(lines), ..report(&assignment, sequence, state, "boot-1") };
    assert_eq!(f.report(epoch, &with(1, ExecutionState::Running, "at work\n"), after(1)).await, ReportOutcome::Acked);
    assert_eq!(f.store.execution_log(execution).await.unwrap(), None);
    // A Hello without the log, then the report with it, twice, and one with another log.
    let silent = report(&assignment, 2, ExecutionState::Failed, "boot-1");
    let hello = f.reconcile(&id, epoch, "boot-1", std::slice::from_ref(&silent), 2).await;
    assert_eq!(hello.acks, [(execution.clone(), 2)]);
    assert!(!f.store.has_log(execution).await.unwrap());
    let failed = with(2, ExecutionState::Failed, "no room\n\u{e4}\n");
    for (at, report) in [(3, &failed), (4, &failed), (5, &with(2, ExecutionState::Failed, "other\n"))] {
        assert_eq!(f.report(epoch, report, after(at)).await, ReportOutcome::Acked);
    }
    let kept = f.store.execution_log(execution).await.unwrap().unwrap();
    assert_eq!((kept.sent, kept.time), (failed.log.clone(), after(3)));
    assert!(f.store.has_log(execution).await.unwrap());
    let events = f.store.events(&execution.operation, 0, 100).await.unwrap();
    assert_eq!(events.iter().filter(|event| event.to == "FAILED" && event.node.is_some()).count(), 1);

    // The log is removed with the events, also if it came after them.
    f.store.finish_operations(after(6)).await.unwrap();
    assert_eq!(f.store.prune_events(after(7)).await.unwrap(), 1);
    assert_eq!(f.store.execution_log(execution).await.unwrap(), None);
    assert_eq!(f.report(epoch, &failed, after(8)).await, ReportOutcome::Acked);
    assert!(f.store.has_log(execution).await.unwrap());
    assert_eq!(f.store.prune_events(after(7)).await.unwrap(), 1);
    assert!(!f.store.has_log(execution).await.unwrap());

    // Nothing is kept of a success, and a later failure does not change that.
    f.create(reboot(), std::slice::from_ref(&id)).await;
    let assignment = f.claim(&[(id, epoch)], after(9)).await.remove(0);
    let done = ReportRow { log: said("x\n"), ..report(&assignment, 1, ExecutionState::Succeeded, "boot-2") };
    let late = ReportRow { sequence: 2, state: ExecutionState::Failed, ..done.clone() };
    assert_eq!(f.report(epoch, &done, after(10)).await, ReportOutcome::Acked);
    let outcome = f.report(epoch, &late, after(10)).await;
    assert!(matches!(outcome, ReportOutcome::Conflict { acknowledge: true, .. }), "{outcome:?}");
    assert_eq!(f.state(&assignment.execution).await, ExecutionState::Succeeded);
    assert!(!f.store.has_log(&assignment.execution).await.unwrap());
}

pub(crate) async fn what_ended_during_an_outage_is_called_off(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let running = report(&assignment, 1, ExecutionState::Running, "boot-1");
    f.report(epoch, &running, after(0)).await;
    // While the execution is active, a returning node gets no cancel.
    let epoch = f.session(&id, "boot-2", after(1)).await;
    let again = f.reconcile(&id, epoch, "boot-2", std::slice::from_ref(&running), 1).await;
    assert_eq!((again.cancels, again.acks.len()), (vec![], 1));
    f.store.mark_overdue(after(1800)).await.unwrap();
    let abandoned = f.store.abandon(&assignment.execution, "pat", after(1801)).await.unwrap();
    assert!(matches!(abandoned, AbandonOutcome::Abandoned(_)));
    let epoch = f.session(&id, "boot-3", after(1802)).await;
    let back = f.reconcile(&id, epoch, "boot-3", std::slice::from_ref(&running), 1802).await;
    assert_eq!((back.cancels, back.acks.len()), (vec![assignment.execution.clone()], 1));
    // A returning node also hears of a cancel that it missed, but not once its execution has ended.
    let operation = f.create(reboot(), std::slice::from_ref(&id)).await;
    let other = f.claim(&[(id.clone(), epoch)], after(1803)).await.remove(0);
    let running = report(&other, 1, ExecutionState::Running, "boot-3");
    f.report(epoch, &running, after(1803)).await;
    f.store.request_cancel(&operation, "pat", after(1804)).await.unwrap();
    let epoch = f.session(&id, "boot-4", after(1805)).await;
    let back = f.reconcile(&id, epoch, "boot-4", &[running], 1805).await;
    assert_eq!(back.cancels, vec![other.execution.clone()]);
    let done = report(&other, 2, ExecutionState::Cancelled, "boot-4");
    let said = f.reconcile(&id, epoch, "boot-4", &[done], 1806).await;
    assert_eq!((said.cancels, f.state(&other.execution).await), (vec![], ExecutionState::Cancelled));
}

pub(crate) async fn execution_of_a_node_in_its_installer_can_always_be_abandoned(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let execution = &assignment.execution;
    f.report(epoch, &report(&assignment, 1, ExecutionState::Rebooting, "boot-1"), after(1)).await;
    let refused = f.store.abandon(execution, "pat", after(2)).await.unwrap();
    assert!(matches!(refused, AbandonOutcome::NotOverdue(_)), "it may just be restarting");
    let installer = SessionStart { mode: NodeMode::Installer, ..hello("boot-2", &serial_of(id.as_str()), after(3)) };
    let epoch = f.begin(&id, &installer, after(3)).await;
    f.report(epoch, &report(&assignment, 2, ExecutionState::Running, "boot-2"), after(4)).await;
    // In time, and lively.
    let AbandonOutcome::Abandoned(row) = f.store.abandon(execution, "pat", after(5)).await.unwrap() else { panic!() };
    assert!(failed_as(reason::NEVER_RETURNED, &row));
    // The node is told for a while, and is free for another image meanwhile.
    assert_eq!(f.store.cancels_due("c1", after(6)).await.unwrap(), std::slice::from_ref(execution));
    assert!(f.store.cancels_due("c1", after(66)).await.unwrap().is_empty(), "its next Hello tells it");
    assert!(f.store.at_work(&id).await.unwrap().is_none());
    // It says what it came to, and is not told any more.
    let called_off = report(&assignment, 3, ExecutionState::Failed, "boot-2");
    let error = Some(ExecutionError::new("CALLED_OFF", "it was called off"));
    f.report(epoch, &ReportRow { error, ..called_off }, after(7)).await;
    assert!(failed_as("CALLED_OFF", &f.execution(execution).await));
    assert!(f.store.cancels_due("c1", after(8)).await.unwrap().is_empty());
}

pub(crate) async fn a_node_that_is_overdue_for_a_day_is_given_up(f: Fixture) {
    let (_, _, assignment) = f.assigned(reboot()).await;
    f.store.mark_overdue(after(60)).await.unwrap();
    assert!(f.store.give_up(after(60 + 86_399)).await.unwrap().is_empty());
    assert_eq!(f.store.give_up(after(60 + 86_400)).await.unwrap().len(), 1);
    assert!(failed_as(reason::NEVER_RETURNED, &f.execution(&assignment.execution).await));
    assert_eq!(f.operation_state(&assignment.execution.operation).await, OperationState::Failed);
}
