//! Operations: creating, claiming and steering them.

use futures_util::future::join_all;
use marco_controller::operation::{ExecutionError, ExecutionState, NodeMode, NodeState, OperationState, WaitReason};
use marco_controller::store::{
    CreateOutcome, EventRow, Kind, NewOperation, OperationQuery, Purpose, ReportOutcome, ReportRow, RequestKey,
    SessionOutcome, SessionStart, SteerOutcome,
};
use marco_proto::names::{ExecutionId, NodeId};

use crate::support::*;

pub(crate) async fn an_operation_is_read_back_as_it_was_stored(f: Fixture) {
    let nodes = f.enrolled(&["pi-1", "pi-2"]).await;
    let new = NewOperation { retry_of: Some(new_operation(reboot(), &[]).id), ..new_operation(reboot(), &nodes) };
    let CreateOutcome::Created(created) = f.store.create_operation(&new, after(5)).await.unwrap() else { panic!() };
    let read = f.store.operation(&new.id).await.unwrap().unwrap();
    assert_eq!(created, read);
    assert_eq!((read.action, read.target, read.retry_of), (new.action, new.target, new.retry_of));
    assert_eq!((read.schedule_time, read.expire_time, read.create_time), (start(), after(24 * 3600), after(5)));
    assert_eq!((read.state, read.counts.total, read.event_count), (OperationState::Running, 2, 1));
    // The cursor is the last node that was read, so the page begins after it.
    let page = f.store.executions(&new.id, Some(&node("pi-1")), 10, &[]).await.unwrap();
    assert_eq!(page.iter().map(|row| row.id.node.as_str()).collect::<Vec<_>>(), ["pi-2"]);
    assert!(f.store.executions(&new.id, None, 10, &[ExecutionState::Failed]).await.unwrap().is_empty());
    assert_eq!(f.store.executions(&new.id, None, 10, &[ExecutionState::Pending]).await.unwrap().len(), 2);
}

pub(crate) async fn the_same_request_makes_one_operation(f: Fixture) {
    let nodes = f.enrolled(&["pi-1"]).await;
    let key = |body: &str| Some(RequestKey { request_id: "r1".to_owned(), body_sha256: body.to_owned() });
    let first = NewOperation { request: key("a"), ..new_operation(reboot(), &nodes) };
    assert!(matches!(f.store.create_operation(&first, start()).await.unwrap(), CreateOutcome::Created(_)));
    let again = NewOperation { request: key("a"), ..new_operation(reboot(), &nodes) };
    match f.store.create_operation(&again, after(9)).await.unwrap() {
        CreateOutcome::Existing(row) => assert_eq!(row.id, first.id),
        other => panic!("{other:?}"),
    }
    let other_body = NewOperation { request: key("b"), ..new_operation(reboot(), &nodes) };
    assert!(matches!(f.store.create_operation(&other_body, after(9)).await.unwrap(), CreateOutcome::RequestReused));
    // Request ids belong to their caller, so two callers may use the same one.
    let other_user = NewOperation { creator: "kim".to_owned(), ..other_body };
    assert!(matches!(f.store.create_operation(&other_user, after(9)).await.unwrap(), CreateOutcome::Created(_)));
    let all = OperationQuery { limit: 10, ..OperationQuery::default() };
    assert_eq!(f.store.operations(&all).await.unwrap().len(), 2);
}

pub(crate) async fn concurrent_requests_with_one_id_make_one_operation(f: Fixture) {
    let nodes = f.enrolled(&["pi-1"]).await;
    let request = Some(RequestKey { request_id: "r1".to_owned(), body_sha256: "a".to_owned() });
    let calls = (0..8).map(|_| {
        let store = f.store.clone();
        let new = NewOperation { request: request.clone(), ..new_operation(reboot(), &nodes) };
        tokio::spawn(async move { store.create_operation(&new, start()).await.unwrap() })
    });
    // At once: a check before the insert alone would let several of them pass.
    let outcomes = join_all(calls).await;
    let created = outcomes.iter().filter(|made| matches!(made, Ok(CreateOutcome::Created(_)))).count();
    let existing = outcomes.iter().filter(|made| matches!(made, Ok(CreateOutcome::Existing(_)))).count();
    assert_eq!((created, existing), (1, 7));
}

pub(crate) async fn pages_of_operations_are_newest_first_without_gaps(f: Fixture) {
    let nodes = f.enrolled(&["pi-1", "pi-2"]).await;
    let mut made = Vec::new();
    for number in 0..5 {
        made.push(f.create(reboot(), &nodes[number % 2..=number % 2]).await);
    }
    // Ids are UUIDs of version 7, so their order is that of creation.
    made.sort();
    made.reverse();
    let mut read = Vec::new();
    let mut query = OperationQuery { limit: 2, ..OperationQuery::default() };
    loop {
        let page = f.store.operations(&query).await.unwrap();
        let Some(last) = page.last() else { break };
        query.after = Some(last.id.clone());
        read.extend(page.into_iter().map(|row| row.id));
    }
    assert_eq!(read, made);
    let of_node = OperationQuery { limit: 10, node: Some(node("pi-2")), ..OperationQuery::default() };
    assert_eq!(f.store.operations(&of_node).await.unwrap().len(), 2);
    let states = vec![OperationState::Cancelled];
    let cancelled = OperationQuery { limit: 10, states, ..OperationQuery::default() };
    assert!(f.store.operations(&cancelled).await.unwrap().is_empty());
}

pub(crate) async fn a_claim_takes_the_first_due_execution_of_each_free_node(f: Fixture) {
    let (a, epoch_a) = f.online("pi-a").await;
    let (b, epoch_b) = f.online("pi-b").await;
    let first = f.create(reboot(), &[a.clone(), b.clone()]).await;
    let second = f.create(power_off(), std::slice::from_ref(&a)).await;
    let sessions = [(a.clone(), epoch_a), (b.clone(), epoch_b)];
    let taken = f.claim(&sessions, start()).await;
    assert_eq!(taken.len(), 2);
    for assignment in &taken {
        assert_eq!((&assignment.execution.operation, assignment.attempt), (&first, 1));
        assert_eq!((&assignment.action, assignment.family.as_str()), (&reboot(), "pi4"));
        let row = f.execution(&assignment.execution).await;
        assert_eq!((row.state, row.assign_boot_id.as_str()), (ExecutionState::Assigned, "boot-1"));
        assert_eq!(row.deadline, Some(after(60)));
    }
    // A node runs one execution at a time. Another one waits, and its reason says so.
    assert!(f.claim(&sessions, start()).await.is_empty(), "both are busy");
    let waiting = ExecutionId { operation: second, node: a.clone() };
    assert_eq!(f.execution(&waiting).await.wait_reason, Some(WaitReason::NodeBusy));
    let active = f.store.node(&a).await.unwrap().unwrap().active_execution;
    assert_eq!(active, Some(ExecutionId { operation: first, node: a.clone() }));
    let of_a = taken.iter().find(|taken| taken.execution.node == a).unwrap();
    let failed = report(of_a, 1, ExecutionState::Failed, "boot-1");
    assert_eq!(f.report(epoch_a, &failed, after(1)).await, ReportOutcome::Acked);
    assert_eq!(f.claim(&sessions, after(1)).await.remove(0).execution, waiting);
}

pub(crate) async fn a_node_has_one_active_execution_whoever_claims(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    for _ in 0..4 {
        f.create(reboot(), std::slice::from_ref(&id)).await;
    }
    let claims = (0..8).map(|_| {
        let (store, sessions) = (f.store.clone(), [(id.clone(), epoch)]);
        tokio::spawn(async move { store.claim("c1", &sessions, start()).await.unwrap().len() })
    });
    let taken: usize = join_all(claims).await.into_iter().map(Result::unwrap).sum();
    // A partial unique index allows one active execution of a node, so seven of the claims lose.
    assert_eq!(taken, 1);
}

pub(crate) async fn nothing_is_claimed_for_a_session_that_is_not_held(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    let operation = f.create(reboot(), std::slice::from_ref(&id)).await;
    // Neither a later epoch nor another controller holds this session.
    assert!(f.claim(&[(id.clone(), epoch + 1)], start()).await.is_empty());
    assert!(f.store.claim("c2", &[(id.clone(), epoch)], start()).await.unwrap().is_empty());
    assert!(f.store.end_session(&id, epoch, after(1)).await.unwrap());
    assert!(f.claim(&[(id.clone(), epoch)], after(1)).await.is_empty());
    let execution = f.execution(&ExecutionId { operation, node: id }).await;
    assert_eq!(execution.wait_reason, Some(WaitReason::NodeOffline));
}

pub(crate) async fn an_installer_takes_only_an_update_with_an_image(f: Fixture) {
    f.store.put_artifact(&artifact("os", Kind::Image, Purpose::None)).await.unwrap();
    let id = f.enrolled(&["pi-1"]).await.remove(0);
    // The installer has no system that it could reboot into, so it takes only what gives it one.
    let installer = SessionStart { mode: NodeMode::Installer, ..hello("boot-1", &serial_of("pi-1"), start()) };
    let epoch = f.begin(&id, &installer, start()).await;
    let operation = f.create(reboot(), std::slice::from_ref(&id)).await;
    assert!(f.claim(&[(id.clone(), epoch)], start()).await.is_empty());
    let execution = f.execution(&ExecutionId { operation, node: id.clone() }).await;
    assert_eq!(execution.wait_reason, Some(WaitReason::NodeInstalling));
    let update = f.create(update(Some("os")), std::slice::from_ref(&id)).await;
    assert_eq!(f.claim(&[(id, epoch)], start()).await.remove(0).execution.operation, update);
}

pub(crate) async fn a_held_node_gets_no_work_and_is_told_so(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    let operation = f.create(reboot(), std::slice::from_ref(&id)).await;
    let execution = ExecutionId { operation, node: id.clone() };
    // A quarantine ends the session at once, and the node's stream is cut by the controller that holds it.
    let row = f.store.quarantine(&id, "smoke", after(1)).await.unwrap().unwrap();
    assert_eq!((row.state, row.state_reason.as_str(), row.connected), (NodeState::Quarantined, "smoke", false));
    let session = (id.clone(), epoch);
    let lost = f.store.lost_sessions("c1", std::slice::from_ref(&session)).await.unwrap();
    assert_eq!(lost, std::slice::from_ref(&session));
    assert!(f.claim(&[(id.clone(), epoch)], after(1)).await.is_empty());
    assert_eq!(f.execution(&execution).await.wait_reason, Some(WaitReason::NodeQuarantined));
    let again = hello("boot-1", &serial_of("pi-1"), after(2));
    assert!(matches!(f.say_hello(&id, &again, after(2)).await, SessionOutcome::Quarantined));
    f.approve(&id, None, after(3)).await;
    let epoch = f.session(&id, "boot-1", after(4)).await;
    assert_eq!(f.execution(&execution).await.wait_reason, Some(WaitReason::Due));
    assert!(f.store.lost_sessions("c1", &[(id.clone(), epoch)]).await.unwrap().is_empty());
    assert_eq!(f.claim(&[(id, epoch)], after(4)).await.len(), 1);
}

pub(crate) async fn a_scheduled_operation_begins_when_due_and_expires_later(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    let new = NewOperation {
        schedule_time: after(100),
        expire_time: after(200),
        ..new_operation(reboot(), std::slice::from_ref(&id))
    };
    f.store.create_operation(&new, start()).await.unwrap();
    let execution = ExecutionId { operation: new.id.clone(), node: id.clone() };
    assert_eq!(f.operation_state(&new.id).await, OperationState::Scheduled);
    assert_eq!(f.execution(&execution).await.wait_reason, Some(WaitReason::NotDue));
    assert!(f.store.begin_due(after(99)).await.unwrap().is_empty());
    assert!(f.claim(&[(id.clone(), epoch)], after(99)).await.is_empty());
    assert_eq!(f.store.begin_due(after(100)).await.unwrap(), std::slice::from_ref(&new.id));
    // The same call again changes nothing: another controller may have been first.
    assert!(f.store.begin_due(after(100)).await.unwrap().is_empty());
    assert!(f.store.expire(after(199)).await.unwrap().is_empty());
    // A claim at the moment of the expiry must not win, because the node would run expired work.
    assert!(f.claim(&[(id.clone(), epoch)], after(200)).await.is_empty(), "its time is over");
    let expired = f.store.expire(after(200)).await.unwrap();
    assert_eq!((expired.len(), &expired[0].execution, expired[0].to), (1, &execution, ExecutionState::Expired));
    assert_eq!(f.operation_state(&new.id).await, OperationState::Failed);
}

pub(crate) async fn a_cancelled_operation_is_never_assigned(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    let operation = f.create(reboot(), std::slice::from_ref(&id)).await;
    let SteerOutcome::Changed(row) = f.store.request_cancel(&operation, "pat", after(1)).await.unwrap() else {
        panic!()
    };
    assert_eq!((row.state, row.counts.cancelled), (OperationState::Cancelled, 1));
    assert_eq!(row.finish_time, Some(after(1)));
    assert!(f.claim(&[(id, epoch)], after(2)).await.is_empty());
    // A repeated cancel is no error: the caller may not have heard the first answer.
    let again = f.store.request_cancel(&operation, "pat", after(3)).await.unwrap();
    assert!(matches!(again, SteerOutcome::Unchanged(_)));
    assert!(matches!(f.store.pause(&operation, "pat", "", after(3)).await.unwrap(), SteerOutcome::Refused(_)));
    let unknown = new_operation(reboot(), &[]).id;
    assert!(matches!(f.store.request_cancel(&unknown, "pat", after(3)).await.unwrap(), SteerOutcome::NotFound));
}

pub(crate) async fn a_cancel_is_asked_of_the_node_until_it_answers(f: Fixture) {
    let (_, epoch, assignment) = f.assigned(reboot()).await;
    let operation = &assignment.execution.operation;
    assert!(f.store.cancels_due("c1", after(0)).await.unwrap().is_empty());
    let SteerOutcome::Changed(row) = f.store.request_cancel(operation, "pat", after(1)).await.unwrap() else {
        panic!()
    };
    assert_eq!(row.state, OperationState::Cancelling);
    assert_eq!(f.store.cancels_due("c1", after(0)).await.unwrap(), std::slice::from_ref(&assignment.execution));
    assert!(f.store.cancels_due("c2", after(0)).await.unwrap().is_empty());
    // The node had passed the point of no return. Its refusal ends the asking, and the reboot goes on.
    let too_late = ReportRow { cancel_refused: true, ..report(&assignment, 1, ExecutionState::Rebooting, "boot-1") };
    assert_eq!(f.report(epoch, &too_late, after(2)).await, ReportOutcome::Acked);
    assert!(f.store.cancels_due("c1", after(0)).await.unwrap().is_empty());
    let done = report(&assignment, 2, ExecutionState::Succeeded, "boot-2");
    assert_eq!(f.report(epoch, &done, after(3)).await, ReportOutcome::Acked);
    assert_eq!(f.operation_state(operation).await, OperationState::Succeeded, "the final state says what happened");
}

pub(crate) async fn a_paused_operation_assigns_nothing_until_resumed(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    let operation = f.create(reboot(), std::slice::from_ref(&id)).await;
    let SteerOutcome::Changed(row) = f.store.pause(&operation, "pat", "lunch", after(1)).await.unwrap() else {
        panic!()
    };
    assert_eq!((row.state, row.state_reason.as_str()), (OperationState::Paused, "lunch"));
    let execution = ExecutionId { operation: operation.clone(), node: id.clone() };
    assert_eq!(f.execution(&execution).await.wait_reason, Some(WaitReason::Paused));
    assert!(f.claim(&[(id.clone(), epoch)], after(2)).await.is_empty());
    let SteerOutcome::Changed(row) = f.store.resume(&operation, "pat", after(3)).await.unwrap() else { panic!() };
    assert_eq!((row.state, row.state_reason.as_str()), (OperationState::Running, ""));
    assert!(matches!(f.store.resume(&operation, "pat", after(3)).await.unwrap(), SteerOutcome::Unchanged(_)));
    assert_eq!(f.claim(&[(id, epoch)], after(4)).await.len(), 1);
}

pub(crate) async fn an_operation_ends_with_its_last_execution(f: Fixture) {
    let nodes = f.enrolled(&["pi-1", "pi-2"]).await;
    let operation = f.create(reboot(), &nodes).await;
    let sessions = all_online(&f, &nodes).await;
    let assignments = f.claim(&sessions, start()).await;
    for (number, assignment) in assignments.iter().enumerate() {
        assert_eq!(f.operation_state(&operation).await, OperationState::Running);
        let epoch = sessions.iter().find(|(id, _)| *id == assignment.execution.node).unwrap().1;
        let end = if number == 0 { ExecutionState::Succeeded } else { ExecutionState::RolledBack };
        let said = ReportRow {
            error: (number == 1).then(|| ExecutionError::new("TRIAL_FAILED", "it did not come up")),
            ..report(assignment, 1, end, "boot-2")
        };
        f.report(epoch, &said, after(9)).await;
    }
    let row = f.store.operation(&operation).await.unwrap().unwrap();
    assert_eq!((row.state, row.finish_time), (OperationState::Failed, Some(after(9))));
    assert_eq!((row.counts.succeeded, row.counts.rolled_back, row.counts.active), (1, 1, 0));
    assert_eq!(f.execution(&assignments[1].execution).await.error.unwrap().reason, "TRIAL_FAILED");
    // The last report has already ended the operation, so the sweep finds nothing.
    assert!(f.store.finish_operations(after(10)).await.unwrap().is_empty());
}

pub(crate) async fn events_are_numbered_without_gaps(f: Fixture) {
    let ids: Vec<String> = (0..20).map(|number| format!("pi-{number:02}")).collect();
    let nodes = f.enrolled(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let operation = f.create(reboot(), &nodes).await;
    let sessions = all_online(&f, &nodes).await;
    // Concurrent reports want event numbers of the same operation, which is where gaps would arise.
    let reports = f.claim(&sessions, start()).await.into_iter().map(|assignment| {
        let store = f.store.clone();
        let epoch = sessions.iter().find(|(id, _)| *id == assignment.execution.node).unwrap().1;
        tokio::spawn(async move {
            for (sequence, state, boot_id) in
                [(1, ExecutionState::Running, "boot-1"), (2, ExecutionState::Succeeded, "boot-2")]
            {
                let report = report(&assignment, sequence, state, boot_id);
                let outcome = store.apply_report(&assignment.execution.node, epoch, &report, after(1)).await;
                assert_eq!(outcome.unwrap(), ReportOutcome::Acked);
            }
        })
    });
    join_all(reports).await.into_iter().for_each(Result::unwrap);
    let mut events: Vec<EventRow> = Vec::new();
    loop {
        let page = f.store.events(&operation, events.last().map_or(0, |event| event.number), 7).await.unwrap();
        if page.is_empty() {
            break;
        }
        events.extend(page);
    }
    // The creation, 20 times assigned, running and succeeded, and the operation's end.
    assert_eq!(events.iter().map(|event| event.number).collect::<Vec<_>>(), (1..=62).collect::<Vec<_>>());
    let last = events.last().unwrap();
    assert_eq!((last.from.as_str(), last.to.as_str(), &last.node), ("RUNNING", "SUCCEEDED", &None));
    let of_node = events.iter().filter(|event| event.node.as_ref() == Some(&nodes[3]));
    assert_eq!(of_node.map(|event| event.to.as_str()).collect::<Vec<_>>(), ["ASSIGNED", "RUNNING", "SUCCEEDED"]);
}

async fn all_online(f: &Fixture, nodes: &[NodeId]) -> Vec<(NodeId, i64)> {
    let mut sessions = Vec::new();
    for id in nodes {
        sessions.push((id.clone(), f.session(id, "boot-1", start()).await));
    }
    sessions
}

/// Two controllers, operators, reports, Hellos and timeouts, all at once on the same rows.
pub(crate) async fn everything_at_once_neither_locks_up_nor_loses_anything(f: Fixture) {
    let ids: Vec<String> = (0..12).map(|number| format!("pi-{number:02}")).collect();
    let nodes = f.enrolled(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut operations = Vec::new();
    for _ in 0..4 {
        operations.push(f.create(reboot(), &nodes).await);
    }
    let mut tasks = tokio::task::JoinSet::new();
    for half in [&nodes[..6], &nodes[6..]] {
        let (store, half) = (f.store.clone(), half.to_vec());
        let controller = format!("c-{}", half[0]);
        store.beat(&controller, "host:1346", start()).await.unwrap();
        tasks.spawn(async move {
            for round in 1..=8 {
                let boot = format!("boot-{round}");
                let mut sessions = Vec::new();
                for id in &half {
                    let hello = SessionStart {
                        controller_id: controller.clone(),
                        key_sha256: format!("key-{id}"),
                        ..hello(&boot, &serial_of(id.as_str()), after(round))
                    };
                    let SessionOutcome::Begun { epoch, .. } =
                        store.begin_session(id, &hello, after(round)).await.unwrap()
                    else {
                        panic!()
                    };
                    assert!(store.reconcile(id, epoch, said(&boot), after(round)).await.unwrap().holder);
                    sessions.push((id.clone(), epoch));
                }
                for assignment in store.claim(&controller, &sessions, after(round)).await.unwrap() {
                    let epoch = sessions.iter().find(|(id, _)| *id == assignment.execution.node).unwrap().1;
                    // Straight to success, so that each round of claims ends with free nodes.
                    let done = report(&assignment, 1, ExecutionState::Succeeded, "another boot");
                    let outcome = store.apply_report(&assignment.execution.node, epoch, &done, after(round)).await;
                    assert_eq!(outcome.unwrap(), ReportOutcome::Acked);
                }
                store.touch(&controller, &half, after(round)).await.unwrap();
            }
        });
    }
    for seed in 0..2 {
        let (store, operations, nodes) = (f.store.clone(), operations.clone(), nodes.clone());
        tasks.spawn(async move {
            for round in 0..10 {
                let operation = &operations[(round + seed) % operations.len()];
                store.pause(operation, "pat", "", after(9)).await.unwrap();
                store.resume(operation, "pat", after(9)).await.unwrap();
                store.mark_overdue(after(70)).await.unwrap();
                store.expire(after(9)).await.unwrap();
                store.finish_operations(after(9)).await.unwrap();
                store.end_dead_sessions(after(1)).await.unwrap();
                store.update_node(&nodes[round], None, None, Some("x")).await.unwrap();
                store.cancels_due("c1", after(0)).await.unwrap();
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    for operation in &operations {
        f.store.request_cancel(operation, "pat", after(99)).await.unwrap();
        let row = f.store.operation(operation).await.unwrap().unwrap();
        assert!(row.state.is_final(), "{row:?}");
        assert_eq!(row.counts.succeeded + row.counts.cancelled, 12);
        let events = f.store.events(operation, 0, 1000).await.unwrap();
        assert_eq!(events.last().unwrap().number, row.event_count);
    }
}
