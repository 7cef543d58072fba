//! Silence proves something only while a controller was listening.

use chrono::TimeDelta;
use marco_controller::operation::{ExecutionState, reason};
use marco_controller::rollout::{Limit, Rollout};
use marco_controller::store::NewOperation;
use marco_proto::names::NodeId;

use crate::support::*;

/// One round of all judgements by silence; returns how many nodes and operations each one found.
async fn judge(f: &Fixture, at: i64) -> [usize; 4] {
    [
        f.store.mark_overdue(after(at)).await.unwrap().len(),
        f.store.give_up(after(at)).await.unwrap().len(),
        f.store.power_off_done(start(), after(at)).await.unwrap().len(),
        f.store.pause_rollouts(after(at)).await.unwrap().len(),
    ]
}

/// Rounds at each second from `from` to before `until`.
fn listen(f: &Fixture, from: i64, until: i64) {
    for second in from..until {
        f.store.keep_watch(after(second));
    }
}

pub(crate) async fn nobody_is_judged_in_the_first_round_after_an_outage(f: Fixture) {
    let nodes = f.enrolled(&["pi-1", "pi-2", "pi-3", "pi-4", "off"]).await;
    let mut sessions = Vec::new();
    for id in &nodes {
        sessions.push((id.clone(), f.session(id, "boot-1", start()).await));
    }
    let rollout = Some(Rollout { max_failures: Some(Limit::Number(0)), ..Rollout::default() });
    let new = NewOperation { rollout, ..new_operation(reboot(), &nodes[..4]) };
    f.store.create_operation(&new, start()).await.unwrap();
    f.create(power_off(), &nodes[4..]).await;
    listen(&f, 0, 100);
    // The fourth node gets no work, so that there is something left to pause.
    let all = f.claim(&[&sessions[..3], &sessions[4..]].concat(), after(99)).await;
    assert_eq!(all.len(), 4);
    for assignment in &all {
        let epoch = sessions.iter().find(|(id, _)| *id == assignment.execution.node).unwrap().1;
        f.report(epoch, &report(assignment, 1, ExecutionState::Rebooting, "boot-1"), after(99)).await;
    }

    // The database is away for two days. Reports of that time are not stored.
    f.store.interrupt_watch();
    f.store.retire("c1", after(100)).await.unwrap();
    let back = 100 + 2 * 86_400;
    assert_eq!(judge(&f, back).await, [0; 4], "the database is back, and nobody listened yet");
    listen(&f, back, back + 75);
    assert_eq!(judge(&f, back + 74).await, [0; 4], "a node is back within its longest pause");
    // One node came back in time, and listed its execution.
    let epoch = f.session(&nodes[0], "boot-1", after(back + 60)).await;
    f.reconcile(&nodes[0], epoch, "boot-1", &[report(&all[0], 1, ExecutionState::Rebooting, "boot-1")], back + 60)
        .await;
    assert_eq!(f.operation_state(&new.id).await, marco_controller::operation::OperationState::Running);
    listen(&f, back + 75, back + 76);
    let [overdue, given_up, off, paused] = judge(&f, back + 75).await;
    assert!(overdue >= 2 && given_up == 0 && off <= 1 && paused == 1, "{:?}", [overdue, given_up, off, paused]);
}

pub(crate) async fn nothing_that_was_about_to_end_ends_with_an_outage(f: Fixture) {
    let nodes = f.enrolled(&["late", "off"]).await;
    let mut sessions = Vec::new();
    for id in &nodes {
        sessions.push((id.clone(), f.session(id, "boot-1", start()).await));
    }
    f.create(reboot(), &nodes[..1]).await;
    f.create(power_off(), &nodes[1..]).await;
    let all = f.claim(&sessions, start()).await;
    let of = |id: &NodeId| all.iter().find(|assignment| assignment.execution.node == *id).unwrap();
    let (late, off, epoch) = (of(&nodes[0]), of(&nodes[1]), sessions[1].1);
    f.report(epoch, &report(off, 1, ExecutionState::Rebooting, "boot-1"), after(1)).await;
    listen(&f, 0, 101);
    assert_eq!(judge(&f, 100).await, [1, 0, 0, 0]);
    assert!(f.execution(&late.execution).await.overdue);
    assert!(f.store.say_goodbye(&off.execution, epoch, after(100)).await.unwrap());
    assert!(f.store.end_session(&nodes[1], epoch, after(100)).await.unwrap());

    // Both nodes could have come back during the two days in which no controller listened.
    f.store.interrupt_watch();
    let back = 100 + 2 * 86_400;
    assert_eq!(judge(&f, back).await, [0; 4]);
    listen(&f, back, back + 75);
    assert_eq!(judge(&f, back + 74).await, [0; 4]);
    listen(&f, back + 75, back + 76);
    let [_, given_up, off, _] = judge(&f, back + 75).await;
    assert_eq!((given_up, off), (1, 1));
}

pub(crate) async fn a_node_has_its_day_from_when_it_was_found_overdue(f: Fixture) {
    let (_, _, assignment) = f.assigned(reboot()).await;
    // No controller ran for a month.
    let back = 30 * 86_400;
    listen(&f, back, back + 76);
    assert_eq!(judge(&f, back + 75).await, [1, 0, 0, 0]);
    assert!(f.execution(&assignment.execution).await.overdue);
    let day = back + 75 + 86_400;
    listen(&f, day - 100, day + 1);
    assert_eq!(judge(&f, day - 1).await, [0; 4]);
    assert_eq!(judge(&f, day).await, [0, 1, 0, 0]);
    assert!(failed_as(reason::NEVER_RETURNED, &f.execution(&assignment.execution).await));
}

pub(crate) async fn nobody_is_judged_while_a_report_waits(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    listen(&f, 0, 200);
    // Two waiting reports: the first one that is stored must not end the guard of the other.
    let waits = [f.store.backlog(), f.store.backlog()];
    assert_eq!(judge(&f, 199).await, [0; 4]);
    let [first, second] = waits;
    drop(first);
    assert_eq!(judge(&f, 199).await, [0; 4]);
    // The waiting report is stored, and shows that the node is working.
    f.report(epoch, &report(&assignment, 1, ExecutionState::Running, "boot-1"), after(199)).await;
    drop(second);
    assert_eq!(judge(&f, 199).await, [0; 4]);
    listen(&f, 200, 201);
    let past = f.execution(&assignment.execution).await.deadline.unwrap() - start() + TimeDelta::seconds(1);
    listen(&f, 201, past.num_seconds() + 1);
    assert_eq!(judge(&f, past.num_seconds()).await, [1, 0, 0, 0]);
}

pub(crate) async fn other_controllers_get_the_time_to_beat_again(f: Fixture) {
    let (id, _) = f.online("pi-1").await;
    f.store.beat("c1", "10.0.0.1:1346", start()).await.unwrap();
    listen(&f, 0, 60);
    // The database is away longer than a controller may be silent, and no controller can send its heartbeat.
    f.store.interrupt_watch();
    assert!(f.by_hand(&["UPDATE controllers SET beat_time = 0"]).await.iter().all(Result::is_ok));
    if f.store.is_shared() {
        assert!(f.store.end_dead_sessions(after(120)).await.unwrap().is_empty());
        listen(&f, 120, 135);
        assert!(f.store.end_dead_sessions(after(134)).await.unwrap().is_empty());
        listen(&f, 135, 136);
    }
    assert_eq!(f.store.end_dead_sessions(after(135)).await.unwrap(), [id]);
}
