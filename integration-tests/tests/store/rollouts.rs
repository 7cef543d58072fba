//! Rollouts: limits of concurrency, and automatic pauses.

use std::collections::{BTreeMap, BTreeSet};

use marco_controller::operation::{Action, ExecutionError, ExecutionState, OperationState, WaitReason, reason};
use marco_controller::rollout::{Limit, Rollout};
use marco_controller::store::{Assignment, NewOperation, SteerOutcome};
use marco_proto::names::{ExecutionId, NodeId, OperationId};

use crate::support::{Fixture, after, labels, new_operation, power_off, reboot, report, start};

/// A fleet whose nodes are all online, and an operation on all of them.
struct Fleet {
    f: Fixture,
    sessions: Vec<(NodeId, i64)>,
    operation: OperationId,
}

impl Fleet {
    async fn start(f: Fixture, count: usize, action: Action, rollout: Option<Rollout>) -> Self {
        let ids: Vec<String> = (0..count).map(|number| format!("pi-{number:03}")).collect();
        let nodes = f.enrolled(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
        let mut sessions = Vec::new();
        for id in &nodes {
            sessions.push((id.clone(), f.session(id, "boot-1", start()).await));
        }
        let new = NewOperation { rollout, ..new_operation(action, &nodes) };
        f.store.create_operation(&new, start()).await.unwrap();
        Self { f, sessions, operation: new.id }
    }

    /// The part of a dispatcher's round that rollouts need, at this second.
    async fn round(&self, at: i64) -> Vec<Assignment> {
        self.f.store.mark_overdue(after(at)).await.unwrap();
        self.f.store.pause_rollouts(after(at)).await.unwrap();
        self.f.claim(&self.sessions, after(at)).await
    }

    fn epoch(&self, node: &NodeId) -> i64 {
        self.sessions.iter().find(|(id, _)| id == node).unwrap().1
    }

    async fn say(&self, assignment: &Assignment, sequence: u64, state: ExecutionState, at: i64) {
        let mut said = report(assignment, sequence, state, if sequence > 1 { "boot-2" } else { "boot-1" });
        if state == ExecutionState::Failed {
            said.error = Some(ExecutionError::new("BROKEN", "a card that is worn out"));
        }
        self.f.report(self.epoch(&assignment.execution.node), &said, after(at)).await;
    }

    async fn succeeds(&self, assignment: &Assignment, at: i64) {
        self.say(assignment, 1, ExecutionState::Rebooting, at).await;
        self.say(assignment, 2, ExecutionState::Succeeded, at).await;
    }

    async fn fails(&self, assignment: &Assignment, at: i64) {
        self.say(assignment, 1, ExecutionState::Failed, at).await;
    }

    /// Records the goodbyes of agents before their power-off.
    async fn say_goodbye(&self, numbers: std::ops::Range<usize>, at: i64) {
        for (id, epoch) in &self.sessions[numbers] {
            let execution = ExecutionId { operation: self.operation.clone(), node: id.clone() };
            assert!(self.f.store.say_goodbye(&execution, *epoch, after(at)).await.unwrap());
        }
    }

    async fn disconnect(&mut self, numbers: std::ops::Range<usize>, at: i64) {
        for (id, epoch) in self.sessions.drain(numbers).collect::<Vec<_>>() {
            assert!(self.f.store.end_session(&id, epoch, after(at)).await.unwrap());
        }
    }

    async fn state(&self) -> (OperationState, String) {
        let row = self.f.store.operation(&self.operation).await.unwrap().unwrap();
        (row.state, row.state_reason)
    }

    async fn resume(&self, at: i64) {
        assert!(matches!(
            self.f.store.resume(&self.operation, "pat", after(at)).await.unwrap(),
            SteerOutcome::Changed(_)
        ));
    }

    async fn wait_reason(&self, number: usize) -> Option<WaitReason> {
        let id =
            ExecutionId { operation: self.operation.clone(), node: NodeId::parse(&format!("pi-{number:03}")).unwrap() };
        self.f.execution(&id).await.wait_reason
    }
}

fn at_once(limit: u32) -> Rollout {
    Rollout { max_in_flight: Some(limit), ..Rollout::default() }
}

pub(crate) async fn a_hundred_nodes_ten_at_once_pause_when_too_many_fail(f: Fixture) {
    let rollout = Rollout { max_failures: Some(Limit::Percent(5)), ..at_once(10) };
    let fleet = Fleet::start(f, 100, reboot(), Some(rollout.clone())).await;
    assert_eq!(fleet.wait_reason(99).await, Some(WaitReason::Due));
    let (mut flying, mut done, mut failed) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
    let mut at = 0;
    let mut pauses = 0;
    // Every eighth node fails: twelve of a hundred.
    while done.len() < 100 {
        at += 1;
        for assignment in fleet.round(at).await {
            assert!(flying.insert(assignment.execution.node.clone(), assignment).is_none());
        }
        assert!(flying.len() <= 10, "{} are in flight", flying.len());
        let row = fleet.f.store.operation(&fleet.operation).await.unwrap().unwrap();
        assert_eq!(usize::try_from(row.counts.active).unwrap(), flying.len());
        assert_eq!(row.rollout.as_ref(), Some(&rollout));
        let Some((node, assignment)) = flying.pop_first() else {
            assert_eq!(row.state, OperationState::Paused);
            assert_eq!(row.state_reason, "max_failures passed: 6 failed or overdue, 5 may be");
            assert_eq!(fleet.wait_reason(99).await, Some(WaitReason::Paused));
            pauses += 1;
            fleet.resume(at).await;
            continue;
        };
        let number: usize = node.as_str().trim_start_matches("pi-").parse().unwrap();
        if number.is_multiple_of(8) && failed.len() < 12 {
            fleet.fails(&assignment, at).await;
            failed.insert(node.clone());
        } else {
            fleet.succeeds(&assignment, at).await;
        }
        done.insert(node);
    }
    // It paused at the sixth failure. The operator who resumed it had seen those that failed while the last ones ended.
    assert_eq!((pauses, failed.len()), (1, 12));
    let row = fleet.f.store.operation(&fleet.operation).await.unwrap().unwrap();
    assert_eq!((row.state, row.counts.succeeded, row.counts.failed), (OperationState::Failed, 88, 12));
    let events = fleet.f.store.events(&fleet.operation, 0, 1000).await.unwrap();
    let pause = events.iter().find(|event| event.to == "PAUSED").unwrap();
    assert_eq!((pause.actor.as_str(), pause.reason.contains("max_failures")), ("controller", true));
}

pub(crate) async fn several_controllers_never_exceed_the_limit(f: Fixture) {
    let fleet = Fleet::start(f, 40, reboot(), Some(at_once(3))).await;
    // Each chunk is claimed twice at once, as two controllers would.
    let claims = fleet.sessions.chunks(10).flat_map(|chunk| [chunk.to_vec(), chunk.to_vec()]).map(|chunk| {
        let store = fleet.f.store.clone();
        tokio::spawn(async move { store.claim("c1", &chunk, start()).await.unwrap().len() })
    });
    let taken: usize = futures_util::future::join_all(claims).await.into_iter().map(Result::unwrap).sum();
    assert!((1..=3).contains(&taken), "{taken}");
    // Claims that lost the race may have left slots free, so one more round fills them.
    let rest = fleet.round(0).await.len();
    assert_eq!(taken + rest, 3);
}

pub(crate) async fn an_overdue_node_holds_no_slot_and_counts_as_failed(f: Fixture) {
    let rollout = Rollout { max_failures: Some(Limit::Number(1)), ..at_once(1) };
    let fleet = Fleet::start(f, 4, reboot(), Some(rollout)).await;
    let first = fleet.round(0).await;
    assert_eq!(first.len(), 1);
    assert_eq!(fleet.wait_reason(1).await, Some(WaitReason::NoSlot));
    let waiting = ExecutionId { operation: fleet.operation.clone(), node: fleet.sessions[1].0.clone() };
    let holders = fleet.f.store.slot_holders(&waiting, after(1)).await.unwrap();
    assert_eq!(holders, std::slice::from_ref(&first[0].execution));
    assert!(fleet.round(59).await.is_empty());
    // The deadline for the answer to an assignment is a minute.
    assert_eq!(fleet.round(61).await.len(), 1);
    assert_eq!(fleet.state().await.0, OperationState::Running);
    assert!(fleet.round(122).await.is_empty());
    assert_eq!(fleet.state().await.0, OperationState::Paused);
}

pub(crate) async fn a_node_without_a_stream_holds_no_slot(f: Fixture) {
    let mut fleet = Fleet::start(f, 4, reboot(), Some(at_once(1))).await;
    // The first node in order is offline, so the next one takes the slot.
    fleet.disconnect(0..1, 0).await;
    let next = fleet.round(1).await;
    assert_eq!(next[0].execution.node.as_str(), "pi-001");
    fleet.say(&next[0], 1, ExecutionState::Running, 1).await;
    // A node that loses its stream during its work keeps the slot for a minute.
    fleet.disconnect(0..1, 10).await;
    assert!(fleet.round(69).await.is_empty());
    assert_eq!(fleet.round(70).await[0].execution.node.as_str(), "pi-002");
}

pub(crate) async fn never_more_than_the_limit_of_a_group_at_once(f: Fixture) {
    let ids: Vec<String> = (0..12).map(|number| format!("pi-{number:03}")).collect();
    let rollout = Rollout { group_by: Some("switch".to_owned()), max_in_flight_per_group: Some(2), ..at_once(5) };
    let fleet = Fleet::start(f, 12, reboot(), None).await;
    for (number, (id, _)) in fleet.sessions.iter().enumerate() {
        let switch = if number < 8 { "a" } else { "b" };
        fleet.f.store.update_node(id, None, Some(&labels(&[("switch", switch)])), None).await.unwrap();
    }
    // Labels come after the enrolment, so the fixture's operation ends here and a new one begins.
    fleet.f.store.request_cancel(&fleet.operation, "pat", start()).await.unwrap();
    let nodes: Vec<NodeId> = fleet.sessions.iter().map(|(id, _)| id.clone()).collect();
    let new = NewOperation { rollout: Some(rollout), ..new_operation(reboot(), &nodes) };
    fleet.f.store.create_operation(&new, start()).await.unwrap();
    let fleet = Fleet { operation: new.id, ..fleet };
    let first = fleet.round(0).await;
    let names: Vec<&str> = first.iter().map(|assignment| assignment.execution.node.as_str()).collect();
    assert_eq!(names, ["pi-000", "pi-001", "pi-008", "pi-009"]);
    assert_eq!(fleet.wait_reason(2).await, Some(WaitReason::NoSlot));
    let waiting = ExecutionId { operation: fleet.operation.clone(), node: nodes[2].clone() };
    let holders = fleet.f.store.slot_holders(&waiting, after(1)).await.unwrap();
    assert_eq!(holders.iter().map(|id| id.node.as_str()).collect::<Vec<_>>(), ["pi-000", "pi-001"]);
    let (mut flying, mut done, mut at) = (first, 0, 0);
    while !flying.is_empty() {
        at += 1;
        fleet.succeeds(&flying.remove(0), at).await;
        done += 1;
        flying.extend(fleet.round(at).await);
        let on = |switch: &str| {
            let of = |id: &str| if id < "pi-008" { "a" } else { "b" };
            flying.iter().filter(|assignment| of(assignment.execution.node.as_str()) == switch).count()
        };
        assert!(on("a") <= 2 && on("b") <= 2);
    }
    assert_eq!((done, ids.len()), (12, 12));
    assert_eq!(fleet.state().await.0, OperationState::Succeeded);
}

pub(crate) async fn the_rest_waits_for_the_canaries(f: Fixture) {
    let fleet = Fleet::start(f, 8, reboot(), Some(Rollout { canary: 2, ..at_once(4) })).await;
    let first = fleet.round(0).await;
    assert_eq!(first.len(), 2);
    fleet.succeeds(&first[0], 1).await;
    assert!(fleet.round(2).await.is_empty());
    fleet.fails(&first[1], 3).await;
    assert!(fleet.round(4).await.is_empty());
    let (state, why) = fleet.state().await;
    assert_eq!(state, OperationState::Paused);
    assert!(why.starts_with("canary failed"), "{why}");
    // After an operator's resume one more node has to succeed as a canary.
    fleet.resume(5).await;
    let more = fleet.round(6).await;
    assert_eq!(more.len(), 1);
    fleet.succeeds(&more[0], 7).await;
    assert_eq!(fleet.round(8).await.len(), 4);
}

pub(crate) async fn a_reboot_of_all_nodes_does_not_pause_itself(f: Fixture) {
    let mut fleet = Fleet::start(f, 10, reboot(), Some(Rollout::default())).await;
    // One node is away, so there is work left that a pause could hold back.
    fleet.disconnect(9..10, 0).await;
    let all = fleet.round(0).await;
    assert_eq!(all.len(), 9);
    for assignment in &all {
        fleet.say(assignment, 1, ExecutionState::Rebooting, 1).await;
    }
    fleet.disconnect(0..9, 2).await;
    assert!(fleet.f.store.pause_rollouts(after(500)).await.unwrap().is_empty());
    assert_eq!(fleet.state().await.0, OperationState::Running);
}

pub(crate) async fn it_pauses_when_a_third_of_the_targets_vanish(f: Fixture) {
    let mut fleet = Fleet::start(f, 12, reboot(), Some(at_once(2))).await;
    let first = fleet.round(0).await;
    for assignment in &first {
        // These two are rebooting within their deadline of ten minutes.
        fleet.say(assignment, 1, ExecutionState::Rebooting, 1).await;
    }
    fleet.disconnect(0..5, 10).await;
    assert!(fleet.f.store.pause_rollouts(after(300)).await.unwrap().is_empty(), "three of twelve");
    fleet.disconnect(0..1, 300).await;
    assert!(fleet.f.store.pause_rollouts(after(359)).await.unwrap().is_empty(), "they may be back within a minute");
    let paused = fleet.f.store.pause_rollouts(after(360)).await.unwrap();
    assert_eq!(paused.len(), 1);
    let (state, why) = fleet.state().await;
    assert_eq!(state, OperationState::Paused);
    assert_eq!(why, "nodes vanished: 4 of 12 lost their streams and were not restarting");
    // The operator who resumes it has seen which nodes are away, so they do not count again.
    fleet.resume(400).await;
    assert!(fleet.f.store.pause_rollouts(after(500)).await.unwrap().is_empty());
    assert_eq!(fleet.state().await.0, OperationState::Running);
}

pub(crate) async fn who_was_away_at_the_start_does_not_vanish(f: Fixture) {
    let mut fleet = Fleet::start(f, 9, reboot(), None).await;
    // The operation is created after these nodes left.
    fleet.disconnect(0..6, 1).await;
    let nodes: Vec<NodeId> = (0..9).map(|number| NodeId::parse(&format!("pi-{number:03}")).unwrap()).collect();
    let new = NewOperation { rollout: Some(at_once(1)), ..new_operation(reboot(), &nodes) };
    fleet.f.store.create_operation(&new, after(2)).await.unwrap();
    assert!(fleet.f.store.pause_rollouts(after(300)).await.unwrap().is_empty());
    fleet.disconnect(0..3, 301).await;
    assert_eq!(fleet.f.store.pause_rollouts(after(400)).await.unwrap().len(), 1);
}

pub(crate) async fn nobody_vanished_while_the_controller_was_stopped(f: Fixture) {
    let fleet = Fleet::start(f, 6, reboot(), Some(at_once(1))).await;
    // The controller was stopped, so every session ended at once. The nodes get time to reconnect before they count as
    // vanished.
    fleet.f.store.retire("c1", after(1)).await.unwrap();
    fleet.f.store.keep_watch(after(1000));
    assert!(fleet.f.store.pause_rollouts(after(1074)).await.unwrap().is_empty());
    assert_eq!(fleet.f.store.pause_rollouts(after(1075)).await.unwrap().len(), 1);
}

pub(crate) async fn nodes_that_were_powered_off_did_not_vanish(f: Fixture) {
    let mut fleet = Fleet::start(f, 6, power_off(), Some(at_once(3))).await;
    for assignment in fleet.round(0).await {
        fleet.say(&assignment, 1, ExecutionState::Rebooting, 1).await;
    }
    fleet.say_goodbye(0..3, 2).await;
    fleet.disconnect(0..3, 2).await;
    assert_eq!(fleet.f.store.power_off_done(start(), after(62)).await.unwrap().len(), 3);
    assert!(fleet.f.store.pause_rollouts(after(100)).await.unwrap().is_empty());
    assert_eq!(fleet.round(100).await.len(), 3);
}

pub(crate) async fn without_a_rollout_nothing_pauses(f: Fixture) {
    let mut fleet = Fleet::start(f, 8, reboot(), None).await;
    let node = fleet.sessions.pop().unwrap();
    let all = fleet.round(0).await;
    assert_eq!(all.len(), 7);
    for assignment in &all {
        fleet.fails(assignment, 1).await;
    }
    fleet.disconnect(0..6, 2).await;
    assert!(fleet.f.store.pause_rollouts(after(500)).await.unwrap().is_empty());
    assert_eq!(fleet.f.claim(&[node], after(500)).await.len(), 1);
}

pub(crate) async fn an_operation_without_room_keeps_a_node_from_nothing_else(f: Fixture) {
    let fleet = Fleet::start(f, 3, reboot(), Some(at_once(1))).await;
    let nodes: Vec<NodeId> = fleet.sessions.iter().map(|(id, _)| id.clone()).collect();
    let other = fleet.f.create(reboot(), &nodes[1..]).await;
    let first = fleet.round(0).await;
    // The nodes that the rollout keeps waiting are free for the other operation.
    let of_other = first.iter().filter(|assignment| assignment.execution.operation == other).count();
    assert_eq!((first.len(), of_other), (3, 2));
}

pub(crate) async fn an_abandoned_node_stays_a_failure(f: Fixture) {
    let rollout = Rollout { max_failures: Some(Limit::Number(0)), ..at_once(1) };
    let fleet = Fleet::start(f, 3, reboot(), Some(rollout)).await;
    let first = fleet.round(0).await.remove(0);
    assert!(fleet.round(61).await.is_empty());
    assert_eq!(fleet.state().await.0, OperationState::Paused);
    fleet.resume(62).await;
    fleet.f.store.abandon(&first.execution, "pat", after(63)).await.unwrap();
    let row = fleet.f.execution(&first.execution).await;
    assert_eq!(row.error.unwrap().reason, reason::NEVER_RETURNED);
    assert_eq!(fleet.round(64).await.len(), 1, "it was let pass already");
    assert_eq!(fleet.state().await.0, OperationState::Running);
}

/// Seven nodes of which none may fail. The first one is overdue, and an operator has resumed the operation in spite of
/// it.
async fn one_was_let_pass(f: Fixture) -> (Fleet, Assignment, Assignment) {
    let rollout = Rollout { max_failures: Some(Limit::Number(0)), ..at_once(1) };
    let fleet = Fleet::start(f, 7, reboot(), Some(rollout)).await;
    let late = fleet.round(0).await.remove(0);
    assert!(fleet.round(61).await.is_empty());
    assert_eq!(fleet.state().await.0, OperationState::Paused);
    fleet.resume(62).await;
    let next = fleet.round(63).await.remove(0);
    (fleet, late, next)
}

pub(crate) async fn a_forgiven_node_that_succeeds_leaves_no_room_for_failures(f: Fixture) {
    let (fleet, late, next) = one_was_let_pass(f).await;
    fleet.succeeds(&late, 64).await;
    fleet.fails(&next, 65).await;
    assert!(fleet.round(66).await.is_empty(), "a node failed, and none may");
    let (state, why) = fleet.state().await;
    assert_eq!((state, why.as_str()), (OperationState::Paused, "max_failures passed: 1 failed or overdue, 0 may be"));
    // The second resume forgives only that one failure.
    fleet.resume(67).await;
    let third = fleet.round(68).await.remove(0);
    fleet.fails(&third, 69).await;
    assert!(fleet.round(70).await.is_empty());
    assert_eq!(fleet.state().await.0, OperationState::Paused);
}

pub(crate) async fn a_late_node_that_was_forgiven_leaves_no_room(f: Fixture) {
    let rollout = Rollout { max_failures: Some(Limit::Number(0)), ..at_once(1) };
    let fleet = Fleet::start(f, 7, reboot(), Some(rollout)).await;
    let late = fleet.round(0).await.remove(0);
    fleet.say(&late, 1, ExecutionState::Rebooting, 1).await;
    let past = (fleet.f.execution(&late.execution).await.deadline.unwrap() - start()).num_seconds() + 1;
    assert!(fleet.round(past).await.is_empty());
    assert_eq!(fleet.state().await.0, OperationState::Paused);
    fleet.resume(past + 1).await;
    let next = fleet.round(past + 2).await.remove(0);
    fleet.say(&late, 2, ExecutionState::Succeeded, past + 3).await;
    fleet.fails(&next, past + 4).await;
    assert!(fleet.round(past + 5).await.is_empty(), "a node failed, and none may");
    assert_eq!(fleet.state().await.0, OperationState::Paused);
}

pub(crate) async fn a_forgiven_node_that_fails_in_the_end_is_not_counted_twice(f: Fixture) {
    let (fleet, late, next) = one_was_let_pass(f).await;
    fleet.fails(&late, 64).await;
    fleet.succeeds(&next, 65).await;
    assert_eq!(fleet.round(66).await.len(), 1, "an operator let it pass");
    assert_eq!(fleet.state().await.0, OperationState::Running);
}

pub(crate) async fn a_forgiven_node_that_is_at_work_again_can_fail_again(f: Fixture) {
    let (fleet, late, next) = one_was_let_pass(f).await;
    fleet.say(&late, 1, ExecutionState::Running, 64).await;
    fleet.succeeds(&next, 65).await;
    // The forgiven node works again and holds the only slot.
    assert!(fleet.round(66).await.is_empty());
    fleet.say(&late, 2, ExecutionState::Failed, 67).await;
    assert!(fleet.round(68).await.is_empty());
    assert_eq!(fleet.state().await.0, OperationState::Paused);
}
