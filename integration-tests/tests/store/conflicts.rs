//! Contradictions: a node reports work that the store does not know, because a fail-over or a backup lost it, or
//! because the node lies.

use marco_controller::operation::{Conflict, Decision, ExecutionState as E, WaitReason, reason};
use marco_controller::rollout::{Limit, Rollout};
use marco_controller::store::{NewOperation, NodeRow, ProgressRow, ReportOutcome, ReportRow, ResolveOutcome};
use marco_proto::names::{ExecutionId, NodeId};

use crate::support::*;

/// An agent's report of a finished job, with the boot ids before the reboot and after it.
fn done(execution: &ExecutionId, attempt: u32, before: &str, now: &str) -> ReportRow {
    ReportRow {
        execution: execution.clone(),
        attempt,
        sequence: 3,
        state: E::Succeeded,
        phase: String::new(),
        bytes_done: 0,
        bytes_total: 0,
        error: None,
        boot_id: now.to_owned(),
        accept_boot_id: before.to_owned(),
        release: None,
        cancel_refused: false,
        log: marco_controller::store::SentLog::default(),
        journal_lost: false,
    }
}

async fn node_row(f: &Fixture, id: &NodeId) -> NodeRow {
    f.store.node(id).await.unwrap().unwrap()
}

async fn event_count(f: &Fixture, id: &ExecutionId) -> u64 {
    f.store.operation(&id.operation).await.unwrap().unwrap().event_count
}

pub(crate) async fn later_delivery_is_taken_as_the_node_says(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let execution = &assignment.execution;
    // The largest lead that the store still explains by a fail-over.
    let ahead = ReportRow { attempt: 1 + 1000, ..report(&assignment, 1, E::Running, "boot-1") };
    assert_eq!(f.report(epoch, &ahead, after(1)).await, ReportOutcome::Acked);
    let row = f.execution(execution).await;
    assert_eq!((row.state, row.attempt), (E::Running, 1001));
    let done = done(execution, 1001, "boot-1", "boot-2");
    assert_eq!(f.report(epoch, &done, after(2)).await, ReportOutcome::Acked);
    assert_eq!(f.state(execution).await, E::Succeeded);
    // The store takes this execution for waiting, but the node is working on it. It must keep the node from other work.
    let waiting = f.create(reboot(), std::slice::from_ref(&id)).await;
    let lost = ExecutionId { operation: waiting, node: id.clone() };
    let other = f.create(reboot(), std::slice::from_ref(&id)).await;
    let running = ReportRow { execution: lost.clone(), attempt: 3, ..report(&assignment, 1, E::Running, "boot-2") };
    assert_eq!(f.report(epoch, &running, after(3)).await, ReportOutcome::Acked);
    let row = f.execution(&lost).await;
    assert_eq!((row.state, row.attempt, row.assign_time), (E::Running, 3, Some(after(3))));
    assert!(f.claim(&[(id.clone(), epoch)], after(4)).await.is_empty());
    let other = ExecutionId { operation: other, node: id.clone() };
    assert_eq!(f.execution(&other).await.wait_reason, Some(WaitReason::NodeBusy));
    assert!(node_row(&f, &id).await.conflicts.is_empty());
}

pub(crate) async fn lost_assignment_that_was_done_succeeds(f: Fixture) {
    let (id, _) = f.online("pi-1").await;
    let operation = f.create(reboot(), std::slice::from_ref(&id)).await;
    let execution = ExecutionId { operation, node: id.clone() };
    // The store has lost that the execution was assigned and done. After the reboot it assigns it again.
    let epoch = f.session(&id, "boot-2", after(5)).await;
    let again = f.claim(&[(id.clone(), epoch)], after(6)).await.remove(0);
    assert_eq!((again.attempt, &again.execution), (1, &execution));
    // The node's own record proves the reboot. A node that still has the old boot id proves nothing.
    let lie = done(&execution, 2, "boot-2", "boot-2");
    let outcome = f.report(epoch, &lie, after(7)).await;
    assert!(matches!(outcome, ReportOutcome::Conflict { acknowledge: false, .. }), "{outcome:?}");
    assert_eq!(f.state(&execution).await, E::Assigned, "nothing fails because the store forgot");
    assert_eq!(node_row(&f, &id).await.conflicts[0].kind, Conflict::Unproved);
    assert_eq!(f.report(epoch, &done(&execution, 1, "boot-1", "boot-2"), after(8)).await, ReportOutcome::Acked);
    assert_eq!(f.state(&execution).await, E::Succeeded);
    assert!(node_row(&f, &id).await.conflicts.is_empty(), "it is settled");
}

pub(crate) async fn settled_execution_that_the_store_lost_is_asked_for(f: Fixture) {
    for (answers, knows, end) in [(true, true, E::Succeeded), (true, false, E::Failed), (false, true, E::Failed)] {
        let (id, epoch) = f.online(&format!("pi-{answers}-{knows}")).await;
        f.create(reboot(), std::slice::from_ref(&id)).await;
        let assignment = f.claim(&[(id.clone(), epoch)], start()).await.remove(0);
        let execution = &assignment.execution;
        f.report(epoch, &report(&assignment, 1, E::Running, "boot-1"), after(1)).await;
        // All later reports were acknowledged, and then lost with the database's last seconds.
        let epoch = f.session(&id, "boot-2", after(5)).await;
        let hello = f.hello(&id, epoch, "boot-2", &[], answers, 5).await;
        assert_eq!(hello.queries, if answers { vec![execution.clone()] } else { Vec::new() });
        if answers && knows {
            assert_eq!(f.state(execution).await, E::Running, "the node is asked first");
            f.report(epoch, &done(execution, 1, "boot-1", "boot-2"), after(6)).await;
        } else if answers {
            assert!(f.store.not_held(execution, None, epoch, after(6)).await.unwrap());
        }
        let row = f.execution(execution).await;
        assert_eq!(row.state, end);
        assert!(end == E::Succeeded || failed_as(reason::JOURNAL_LOST, &row));
    }
}

pub(crate) async fn absurd_attempt_is_held_for_an_operator(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let (other, other_epoch) = f.online("pi-2").await;
    let execution = &assignment.execution;
    let absurd = ReportRow { attempt: u32::MAX, ..report(&assignment, 1, E::Running, "boot-1") };
    let before = event_count(&f, execution).await;
    for at in 1..4 {
        let outcome = f.report(epoch, &absurd, after(at)).await;
        assert!(matches!(outcome, ReportOutcome::Conflict { acknowledge: false, .. }), "{outcome:?}");
    }
    assert_eq!(event_count(&f, execution).await, before + 1, "the same again is no news");
    let row = f.execution(execution).await;
    assert_eq!((row.state, row.attempt), (E::Assigned, 1));
    let shown = node_row(&f, &id).await.conflicts;
    assert_eq!((shown.len(), shown[0].kind, shown[0].attempt, shown[0].holds), (1, Conflict::Ahead, u32::MAX, true));
    // Other work continues, for other nodes and for this one.
    f.create(reboot(), std::slice::from_ref(&other)).await;
    assert_eq!(f.claim(&[(id.clone(), epoch), (other, other_epoch)], after(5)).await.len(), 1);
    let resolved = f.store.resolve(&id, Decision::Accept, "pat", after(6)).await.unwrap();
    assert!(matches!(resolved, ResolveOutcome::Resolved(_)), "{resolved:?}");
    let row = f.execution(execution).await;
    assert_eq!((row.state, row.attempt), (E::Running, u32::MAX));
    assert_eq!(f.report(epoch, &absurd, after(7)).await, ReportOutcome::Acked);
    assert!(node_row(&f, &id).await.conflicts.is_empty());
    assert_eq!(f.store.resolve(&id, Decision::Accept, "pat", after(8)).await.unwrap(), ResolveOutcome::NoConflict);
    let nobody = f.store.resolve(&node("pi-9"), Decision::Accept, "pat", after(8)).await.unwrap();
    assert_eq!(nobody, ResolveOutcome::NotFound);
    // The node forgets the execution. It cannot be delivered again, because there is no larger attempt number.
    let epoch = f.session(&id, "boot-2", after(9)).await;
    f.hello(&id, epoch, "boot-2", &[], true, 9).await;
    assert!(f.store.not_held(execution, None, epoch, after(10)).await.unwrap());
    assert!(failed_as(reason::JOURNAL_LOST, &f.execution(execution).await));
}

pub(crate) async fn abandoned_conflict_ends_failed_and_is_cancelled(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let execution = &assignment.execution;
    let ahead = ReportRow { attempt: 5000, ..report(&assignment, 1, E::Running, "boot-1") };
    f.report(epoch, &ahead, after(1)).await;
    f.store.resolve(&id, Decision::Abandon, "pat", after(2)).await.unwrap();
    assert!(failed_as(reason::CONFLICT_ABANDONED, &f.execution(execution).await));
    assert!(node_row(&f, &id).await.conflicts.is_empty());
    assert_eq!(f.store.cancels_due("c1", after(0)).await.unwrap(), std::slice::from_ref(execution));
    // The node would refuse other work until it answers.
    f.create(reboot(), std::slice::from_ref(&id)).await;
    assert!(f.claim(&[(id.clone(), epoch)], after(3)).await.is_empty());
    let before = event_count(&f, execution).await;
    let cancelled = ReportRow { sequence: 2, state: E::Cancelled, ..ahead };
    let outcome = f.report(epoch, &cancelled, after(4)).await;
    assert!(matches!(outcome, ReportOutcome::Acked | ReportOutcome::Conflict { acknowledge: true, .. }), "{outcome:?}");
    assert!(f.store.cancels_due("c1", after(0)).await.unwrap().is_empty());
    assert_eq!(event_count(&f, execution).await, before, "that was decided");
    assert!(node_row(&f, &id).await.conflicts.is_empty());
    assert_eq!(f.claim(&[(id, epoch)], after(5)).await.len(), 1);
}

pub(crate) async fn unknown_execution_is_shown_and_keeps_a_busy_node_free(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    let lost = ExecutionId { operation: new_operation(reboot(), &[]).id, node: id.clone() };
    let running = ReportRow { state: E::Running, sequence: 1, ..done(&lost, 1, "boot-1", "boot-1") };
    assert_eq!(f.report(epoch, &running, after(1)).await, ReportOutcome::Unknown);
    let shown = node_row(&f, &id).await.conflicts;
    assert_eq!((shown.len(), shown[0].known, shown[0].holds), (1, None, true));
    let waiting = f.create(reboot(), std::slice::from_ref(&id)).await;
    assert!(f.claim(&[(id.clone(), epoch)], after(2)).await.is_empty(), "it would refuse the work");
    let waiting = ExecutionId { operation: waiting, node: id.clone() };
    assert_eq!(f.execution(&waiting).await.wait_reason, Some(WaitReason::NodeConflict));
    assert_eq!(f.report(epoch, &done(&lost, 1, "boot-1", "boot-2"), after(3)).await, ReportOutcome::Unknown);
    let shown = node_row(&f, &id).await.conflicts;
    assert_eq!((shown.len(), shown[0].reported, shown[0].holds), (1, E::Succeeded, false));
    assert_eq!(f.claim(&[(id.clone(), epoch)], after(4)).await.len(), 1);
    // Work that a later Hello does not list has ended.
    let other = ExecutionId { operation: new_operation(reboot(), &[]).id, node: id.clone() };
    f.report(epoch, &ReportRow { execution: other, ..running }, after(5)).await;
    let epoch = f.session(&id, "boot-3", after(6)).await;
    f.hello(&id, epoch, "boot-3", &[], true, 6).await;
    assert!(node_row(&f, &id).await.conflicts.iter().all(|conflict| !conflict.holds));
    f.store.resolve(&id, Decision::Accept, "pat", after(7)).await.unwrap();
    assert!(node_row(&f, &id).await.conflicts.is_empty());
}

pub(crate) async fn refused_assignment_waits_for_what_the_node_is_at(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    let lost = f.create(reboot(), std::slice::from_ref(&id)).await;
    let lost = ExecutionId { operation: lost, node: id.clone() };
    let later = f.create(reboot(), std::slice::from_ref(&id)).await;
    // The store has lost that the first execution was assigned. It is paused, and the node gets the second one.
    f.store.pause(&lost.operation, "pat", "", after(1)).await.unwrap();
    let second = f.claim(&[(id.clone(), epoch)], after(2)).await.remove(0);
    assert_eq!(second.execution.operation, later);
    let busy = ReportRow { state: E::Running, sequence: 1, ..done(&lost, 1, "boot-1", "boot-1") };
    assert!(f.store.not_held(&second.execution, Some(&busy), epoch, after(3)).await.unwrap());
    assert_eq!(f.state(&second.execution).await, E::Pending, "nothing is wrong with it");
    assert_eq!(f.state(&lost).await, E::Running, "it is taken from the node");
    assert!(f.claim(&[(id.clone(), epoch)], after(4)).await.is_empty());
    f.report(epoch, &done(&lost, 1, "boot-1", "boot-2"), after(5)).await;
    assert_eq!(f.state(&lost).await, E::Succeeded);
    assert_eq!(f.claim(&[(id.clone(), epoch)], after(6)).await.len(), 1);
    // The store takes the execution for ended, but the node is working on it. The node gets nothing else until it
    // reports the end.
    let busy = ReportRow { state: E::Running, sequence: 9, ..busy };
    f.store.not_held(&second.execution, Some(&busy), epoch, after(7)).await.unwrap();
    assert!(f.claim(&[(id.clone(), epoch)], after(8)).await.is_empty());
    assert_eq!(node_row(&f, &id).await.conflicts[0].kind, Conflict::Busy);
    f.report(epoch, &ReportRow { sequence: 10, ..done(&lost, 1, "boot-1", "boot-2") }, after(9)).await;
    assert!(node_row(&f, &id).await.conflicts.is_empty());
    assert_eq!(f.claim(&[(id, epoch)], after(10)).await.len(), 1);
}

pub(crate) async fn conflicts_of_a_node_are_bounded(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    for _ in 0..40 {
        let invented = ExecutionId { operation: new_operation(reboot(), &[]).id, node: id.clone() };
        f.report(epoch, &done(&invented, 1, "boot-1", "boot-2"), after(1)).await;
    }
    // A compromised node invents executions without end, and each would be a row.
    assert_eq!(node_row(&f, &id).await.conflicts.len(), 32);
    f.store.resolve(&id, Decision::Abandon, "pat", after(2)).await.unwrap();
    let invented = ExecutionId { operation: new_operation(reboot(), &[]).id, node: id.clone() };
    f.report(epoch, &done(&invented, 1, "boot-1", "boot-2"), after(3)).await;
    assert_eq!(node_row(&f, &id).await.conflicts.len(), 1, "what was decided makes room");
}

pub(crate) async fn broken_record_fails_alone(f: Fixture) {
    let mut sessions = Vec::new();
    for id in ["pi-1", "pi-2", "pi-3"] {
        sessions.push(f.online(id).await);
    }
    let [first, second, third] = [0, 1, 2].map(|at: usize| sessions[at].0.clone());
    let attempt = f.create(reboot(), std::slice::from_ref(&first)).await;
    let action = f.create(reboot(), std::slice::from_ref(&second)).await;
    let sound = f.create(reboot(), std::slice::from_ref(&third)).await;
    for statement in f
        .by_hand(&[
            &format!("UPDATE executions SET attempt = 4294967295 WHERE operation = '{attempt}'"),
            &format!("UPDATE operations SET action = '{{\"juggle\":1}}' WHERE id = '{action}'"),
        ])
        .await
    {
        statement.unwrap();
    }
    // One claim for all nodes: a row that cannot be read must not fail the others.
    let claimed = f.claim(&sessions, after(1)).await;
    assert_eq!(claimed.len(), 1, "{claimed:?}");
    assert_eq!(claimed[0].execution.operation, sound);
    let row = f.execution(&ExecutionId { operation: attempt, node: first }).await;
    assert!(failed_as(reason::NOT_ASSIGNABLE, &row), "{row:?}");
    assert!(row.error.unwrap().message.contains("4294967295"));
    let broken = ExecutionId { operation: action, node: second };
    let row = f.execution(&broken).await;
    assert!(failed_as(reason::NOT_ASSIGNABLE, &row), "{row:?}");
    assert!(f.claim(&sessions[..2], after(2)).await.is_empty());
}

/// A limit of a release that this one does not know.
const NEWER: &str = "{\"max_failures\":{\"tenths\":1}}";

pub(crate) async fn unreadable_rollout_holds_up_no_other(f: Fixture) {
    let mut sessions = Vec::new();
    for id in ["pi-1", "pi-2", "pi-3", "pi-4"] {
        sessions.push(f.online(id).await);
    }
    let node_at = |at: usize| sessions[at].0.clone();
    let away = f.enrolled(&["pi-9"]).await.remove(0);
    let paced = |nodes: &[NodeId]| NewOperation {
        rollout: Some(Rollout { max_in_flight: Some(1), max_failures: Some(Limit::Number(0)), ..Rollout::default() }),
        ..new_operation(reboot(), nodes)
    };
    // The node that is away keeps it RUNNING, whatever becomes of the others.
    let (broken, sound) = (paced(&[node_at(0), node_at(3), away.clone()]), paced(&[node_at(1), node_at(2)]));
    for new in [&broken, &sound] {
        f.store.create_operation(new, start()).await.unwrap();
    }
    let plain = f.create(reboot(), &[node_at(3)]).await;
    f.by_hand(&[&format!("UPDATE operations SET rollout = '{NEWER}' WHERE id = '{}'", broken.id)])
        .await
        .remove(0)
        .unwrap();
    let claimed = f.claim(&sessions, after(1)).await;
    let given: Vec<_> = claimed.iter().map(|one| (&one.execution.operation, &one.execution.node)).collect();
    assert_eq!(given, [(&sound.id, &node_at(1)), (&plain, &node_at(3))], "the others have work");
    let row = f.execution(&ExecutionId { operation: broken.id.clone(), node: node_at(0) }).await;
    assert!(failed_as(reason::NOT_ASSIGNABLE, &row), "{row:?}");
    assert!(row.error.unwrap().message.contains("tenths"), "the reason is told");
    assert_eq!(f.state(&ExecutionId { operation: broken.id.clone(), node: away }).await, E::Pending);
    // Rollouts that can be read still pause by themselves.
    let failed = report(&claimed[0], 1, E::Failed, "boot-1");
    f.report(sessions[1].1, &failed, after(2)).await;
    let paused = f.store.pause_rollouts(after(3)).await.unwrap();
    assert_eq!(paused.iter().map(|(id, _)| id).collect::<Vec<_>>(), [&sound.id]);
}

pub(crate) async fn unreadable_action_keeps_no_assignment_and_no_progress(f: Fixture) {
    let (first, second) = (f.online("pi-1").await, f.online("pi-2").await);
    let broken = f.create(reboot(), std::slice::from_ref(&first.0)).await;
    f.create(reboot(), std::slice::from_ref(&second.0)).await;
    let claimed = f.claim(&[first, second], after(1)).await;
    f.by_hand(&[&format!("UPDATE operations SET action = '{{\"juggle\":1}}' WHERE id = '{broken}'")])
        .await
        .remove(0)
        .unwrap();
    let unanswered = f.store.unanswered("c1").await.unwrap();
    assert_eq!(unanswered.iter().map(|(one, _)| one).collect::<Vec<_>>(), [&claimed[1]], "the other is sent");
    // One batch: an error would keep all of it, and it would be tried again forever.
    let rows: Vec<ProgressRow> = claimed
        .iter()
        .map(|one| ProgressRow {
            phase: "downloading".to_owned(),
            bytes_done: 7,
            ..report(one, 0, E::Running, "").into()
        })
        .collect();
    f.store.flush_progress(&rows, after(2)).await.unwrap();
    let row = f.execution(&claimed[1].execution).await;
    assert_eq!((row.phase.as_str(), row.bytes_done), ("downloading", 7));
}

pub(crate) async fn repeated_state_writes_no_event(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    let id = &assignment.execution;
    f.report(epoch, &report(&assignment, 1, E::Running, "boot-1"), after(1)).await;
    let (before, deadline) = (event_count(&f, id).await, f.execution(id).await.deadline);
    for sequence in 2..50 {
        let again = report(&assignment, sequence, E::Running, "boot-1");
        assert_eq!(f.report(epoch, &again, after(60)).await, ReportOutcome::Acked);
    }
    assert_eq!(event_count(&f, id).await, before);
    let row = f.execution(id).await;
    assert_eq!((row.sequence, row.deadline), (49, deadline), "said again is no sign of life");
    let further = ReportRow { phase: "partitioning".to_owned(), ..report(&assignment, 50, E::Running, "boot-1") };
    f.report(epoch, &further, after(70)).await;
    assert_eq!(f.execution(id).await.deadline, Some(after(70 + 900)));
    assert_eq!(event_count(&f, id).await, before);
    // Alternating between two states writes events, but only up to the limit.
    f.by_hand(&["UPDATE executions SET changes = 998"]).await.remove(0).unwrap();
    for sequence in 51..60 {
        let state = if sequence % 2 == 0 { E::Running } else { E::Rebooting };
        f.report(epoch, &report(&assignment, sequence, state, "boot-1"), after(80)).await;
    }
    assert_eq!(event_count(&f, id).await, before + 2);
}

pub(crate) async fn late_cancel_is_kept_when_it_comes_as_progress(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    let id = &assignment.execution;
    let armed = report(&assignment, 2, E::Rebooting, "boot-1");
    f.report(epoch, &armed, after(1)).await;
    f.store.request_cancel(&id.operation, "pat", after(2)).await.unwrap();
    assert_eq!(f.store.cancels_due("c1", after(0)).await.unwrap().len(), 1);
    let refused = ReportRow { cancel_refused: true, phase: "restarting".to_owned(), ..armed };
    // Progress is buffered in memory and may be replaced by newer progress, so the refusal must be stored at once.
    assert_eq!(f.report(epoch, &refused, after(3)).await, ReportOutcome::Progress);
    assert!(f.execution(id).await.cancel_refused);
    assert!(f.store.cancels_due("c1", after(0)).await.unwrap().is_empty(), "the node has answered");
}

pub(crate) async fn execution_of_a_deleted_node_ends_at_once(f: Fixture) {
    let (gone, _) = f.online("pi-1").await;
    let (stays, _) = f.online("pi-2").await;
    f.store.delete_node(&gone, false, "pat", after(1)).await.unwrap();
    // The targets were resolved before the node was deleted.
    let operation = f.create(reboot(), &[gone.clone(), stays.clone()]).await;
    let ended = f.store.cancel_orphans(after(2)).await.unwrap();
    assert_eq!(ended.iter().map(|ended| &ended.execution.node).collect::<Vec<_>>(), [&gone]);
    let row = f.execution(&ExecutionId { operation: operation.clone(), node: gone }).await;
    assert_eq!((row.state, row.error.unwrap().reason.as_str()), (E::Cancelled, reason::NODE_DELETED));
    assert_eq!(f.state(&ExecutionId { operation, node: stays }).await, E::Pending);
    assert!(f.store.cancel_orphans(after(3)).await.unwrap().is_empty());
}
