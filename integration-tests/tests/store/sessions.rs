//! Sessions of nodes, and the nodes themselves.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use marco_controller::operation::{ExecutionState, NodeState, OperationState, reason};
use marco_controller::store::{
    DeleteNodeOutcome, NodeQuery, ReportOutcome, SessionOutcome, SessionStart, System, UpdateNodeOutcome,
};
use marco_proto::names::ExecutionId;

use crate::support::*;

pub(crate) async fn a_second_session_ends_the_first(f: Fixture) {
    let (id, first) = f.online("pi-1").await;
    let elsewhere = SessionStart { controller_id: "c2".to_owned(), ..hello("boot-1", &serial_of("pi-1"), after(1)) };
    let second = f.begin(&id, &elsewhere, after(1)).await;
    assert!(second > first);
    let lost = f.store.lost_sessions("c1", &[(id.clone(), first)]).await.unwrap();
    assert_eq!(lost, [(id.clone(), first)], "the old session is named, not the node");
    // A stream that ends late must not disconnect its node's new session.
    assert!(!f.store.end_session(&id, first, after(2)).await.unwrap(), "a loser must not end the winner's");
    assert!(!f.store.update_system(&id, first, &System::default(), after(2)).await.unwrap());
    let row = f.store.node(&id).await.unwrap().unwrap();
    assert_eq!((row.connected, row.controller_id.as_deref(), row.system.os.as_str()), (true, Some("c2"), "Marco OS"));
    // Only the controller that holds the session may refresh it.
    f.store.touch("c1", std::slice::from_ref(&id), after(50)).await.unwrap();
    assert_eq!(f.store.node(&id).await.unwrap().unwrap().last_seen, Some(after(1)));
    f.store.touch("c2", std::slice::from_ref(&id), after(50)).await.unwrap();
    assert_eq!(f.store.node(&id).await.unwrap().unwrap().last_seen, Some(after(50)));
    assert!(f.store.end_session(&id, second, after(60)).await.unwrap());
    assert!(!f.store.node(&id).await.unwrap().unwrap().connected);
    let stranger = hello("boot-1", "x", after(1));
    let outcome = f.say_hello(&node("nobody"), &stranger, after(1)).await;
    assert!(matches!(outcome, SessionOutcome::UnknownNode));
}

pub(crate) async fn a_session_is_lost_to_a_later_one_of_its_node(f: Fixture) {
    let (id, first) = f.online("pi-1").await;
    let second = f.session(&id, "boot-1", after(1)).await;
    let both = [(id.clone(), first), (id.clone(), second)];
    assert_eq!(f.store.lost_sessions("c1", &both).await.unwrap(), [(id, first)]);
}

pub(crate) async fn two_nodes_with_one_identity_are_quarantined(f: Fixture) {
    let (id, _) = f.online("pi-1").await;
    let serial = serial_of("pi-1");
    f.session(&id, "boot-2", after(10)).await;
    // A controller that stood still may read an old Hello late. That is no clone: its connection is older.
    let late = f.say_hello(&id, &hello("boot-1", &serial, after(9)), after(11)).await;
    assert!(matches!(late, SessionOutcome::Superseded), "its connection is older than the second boot");
    assert_eq!(f.store.node(&id).await.unwrap().unwrap().state, NodeState::Approved);
    let back = f.say_hello(&id, &hello("boot-1", &serial, after(12)), after(12)).await;
    assert!(matches!(back, SessionOutcome::Cloned));
    let again = f.say_hello(&id, &hello("boot-2", &serial, after(13)), after(13)).await;
    assert!(matches!(again, SessionOutcome::Quarantined));
    let row = f.store.node(&id).await.unwrap().unwrap();
    assert_eq!((row.state, row.connected), (NodeState::Quarantined, false));
}

pub(crate) async fn hello_that_is_read_late_takes_no_session_from_a_later_start(f: Fixture) {
    let (id, _) = f.online("pi-1").await;
    let start = |instance: &str, accepted| SessionStart {
        instance: instance.to_owned(),
        ..hello("boot-1", &serial_of("pi-1"), after(accepted))
    };
    // The second start never had a session: its Hello waited in a controller that stood still, and the third was faster.
    f.begin(&id, &start("third", 10), after(10)).await;
    let late = f.say_hello(&id, &start("second", 5), after(12)).await;
    assert!(matches!(late, SessionOutcome::Superseded), "{late:?}");
    // The same of a boot.
    let late = SessionStart { boot_id: "boot-0".to_owned(), ..start("third", 5) };
    let late = f.say_hello(&id, &late, after(12)).await;
    assert!(matches!(late, SessionOutcome::Superseded), "{late:?}");
    f.begin(&id, &start("third", 13), after(13)).await;
    assert_eq!(f.store.node(&id).await.unwrap().unwrap().state, NodeState::Approved);
    // The clock was set back: a session that begins in the future keeps no new start out.
    f.begin(&id, &start("third", 5000), after(5000)).await;
    f.begin(&id, &start("fourth", 20), after(20)).await;
}

pub(crate) async fn two_agents_of_one_boot_are_told_apart_by_their_starts(f: Fixture) {
    let (id, _) = f.online("pi-1").await;
    let start = |instance: &str, second| SessionStart {
        instance: instance.to_owned(),
        ..hello("boot-1", &serial_of("pi-1"), after(second))
    };
    // One agent that restarts a hundred times, or that loses its stream again and again, is no clone.
    for number in 0..100 {
        f.begin(&id, &start(&number.to_string(), number), after(number)).await;
        f.begin(&id, &start(&number.to_string(), number), after(number)).await;
    }
    f.begin(&id, &start("a", 200), after(200)).await;
    f.begin(&id, &start("b", 201), after(201)).await;
    let late = f.say_hello(&id, &start("a", 200), after(202)).await;
    assert!(matches!(late, SessionOutcome::Superseded), "its connection is older than the second start");
    let back = f.say_hello(&id, &start("a", 203), after(203)).await;
    assert!(matches!(back, SessionOutcome::Cloned));
    // An admin who has found the clone approves this one.
    f.approve(&id, None, after(204)).await;
    f.begin(&id, &start("a", 205), after(205)).await;
    f.begin(&id, &start("a", 206), after(206)).await;
}

pub(crate) async fn a_card_in_another_board_waits_for_approval(f: Fixture) {
    let (id, _) = f.online("pi-1").await;
    // A card in another board keeps its key, so only the serial number of the board shows the move.
    let moved = f.say_hello(&id, &hello("boot-2", "00000000ffffffff", after(5)), after(5)).await;
    let SessionOutcome::Begun { node: row, .. } = moved else { panic!() };
    assert_eq!((row.state, row.connected), (NodeState::AwaitingApproval, true));
    assert!(row.state_reason.contains("00000000ffffffff"), "{}", row.state_reason);
    f.approve(&id, None, after(6)).await;
    let again = f.say_hello(&id, &hello("boot-2", "00000000FFFFFFFF", after(7)), after(7)).await;
    let SessionOutcome::Begun { node: row, .. } = again else { panic!() };
    assert_eq!(row.state, NodeState::Approved, "the approval was for this board");
}

pub(crate) async fn sessions_of_a_dead_controller_end(f: Fixture) {
    let (id, epoch) = f.online("pi-1").await;
    f.store.beat("c1", "10.0.0.1:1346", after(0)).await.unwrap();
    f.store.beat("c2", "10.0.0.2:1346", after(10)).await.unwrap();
    f.store.beat("c2", "10.0.0.3:1346", after(12)).await.unwrap();
    if f.store.is_shared() {
        // A controller whose clock is an hour ahead declares no other one dead, because Postgres' clock decides.
        assert!(f.store.end_dead_sessions(after(3600)).await.unwrap().is_empty());
        assert_eq!(f.store.live_controllers(after(3600)).await.unwrap().len(), 2);
        age(&f, "c1", 14).await;
    }
    let live = f.store.live_controllers(after(14)).await.unwrap();
    assert_eq!(live.iter().map(|row| row.address.as_str()).collect::<Vec<_>>(), ["10.0.0.1:1346", "10.0.0.3:1346"]);
    assert!(f.store.end_dead_sessions(after(14)).await.unwrap().is_empty());
    if f.store.is_shared() {
        age(&f, "c1", 2).await;
    }
    assert_eq!(f.store.end_dead_sessions(after(15)).await.unwrap(), std::slice::from_ref(&id));
    assert_eq!(f.store.lost_sessions("c1", &[(id.clone(), epoch)]).await.unwrap(), [(id.clone(), epoch)]);
    let elsewhere = SessionStart { controller_id: "c2".to_owned(), ..hello("boot-1", &serial_of("pi-1"), after(16)) };
    f.begin(&id, &elsewhere, after(16)).await;
    f.store.retire("c2", after(17)).await.unwrap();
    assert!(!f.store.node(&id).await.unwrap().unwrap().connected);
    assert!(f.store.live_controllers(after(17)).await.unwrap().is_empty());
}

/// Backdates a controller's last heartbeat by so many seconds.
async fn age(f: &Fixture, controller: &str, seconds: u64) {
    let micros = seconds * 1_000_000;
    let statement = format!("UPDATE controllers SET beat_time = beat_time - {micros} WHERE id = '{controller}'");
    f.by_hand(&[&statement]).await.pop().unwrap().unwrap();
}

pub(crate) async fn a_fleet_that_comes_back_at_once_is_served(f: Fixture) {
    // All sessions at once, as after a power failure of a building.
    let ids: Vec<String> = (0..200).map(|number| format!("pi-{number:03}")).collect();
    let nodes = f.enrolled(&ids.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let operation = f.create(reboot(), &nodes).await;
    let sessions = join_all(nodes.iter().map(|id| f.session(id, "boot-1", start()))).await;
    let sessions: Vec<_> = nodes.into_iter().zip(sessions).collect();
    let assignments = f.claim(&sessions, start()).await;
    assert_eq!(assignments.len(), 200);
    for (sequence, state) in [(1, ExecutionState::Running), (2, ExecutionState::Rebooting)] {
        let reports: Vec<_> = assignments.iter().map(|given| report(given, sequence, state, "boot-1")).collect();
        let outcomes = sessions.iter().zip(&reports).map(|((_, epoch), report)| f.report(*epoch, report, after(1)));
        assert!(join_all(outcomes).await.iter().all(|outcome| *outcome == ReportOutcome::Acked));
    }
    join_all(assignments.iter().map(|assignment| async {
        let (id, armed) = (&assignment.execution.node, report(assignment, 2, ExecutionState::Rebooting, "boot-1"));
        let epoch = f.session(id, "boot-2", after(2)).await;
        assert!(f.reconcile(id, epoch, "boot-2", &[armed], 2).await.holder);
        let done = report(assignment, 3, ExecutionState::Succeeded, "boot-2");
        assert_eq!(f.report(epoch, &done, after(3)).await, ReportOutcome::Acked);
    }))
    .await;
    assert_eq!(f.operation_state(&operation).await, OperationState::Succeeded);
}

pub(crate) async fn nodes_are_found_by_label(f: Fixture) {
    let nodes = f.enrolled(&["pi-1", "pi-2", "pi-3"]).await;
    let (blue, red) = (labels(&[("room", "blue")]), labels(&[("room", "red"), ("row.a", "1")]));
    f.store.update_node(&nodes[0], None, Some(&red), None).await.unwrap();
    let named = match f.store.update_node(&nodes[1], None, None, Some("the second")).await.unwrap() {
        UpdateNodeOutcome::Updated(row) => row,
        other => panic!("{other:?}"),
    };
    // The change names the labels that it read, so that two operators do not overwrite each other.
    let late = f.store.update_node(&nodes[0], Some(&labels(&[("room", "blue")])), Some(&red), None).await.unwrap();
    assert_eq!(late, UpdateNodeOutcome::ChangedMeanwhile);
    assert_eq!((named.display_name.as_str(), &named.labels), ("the second", &blue));
    let nobody = f.store.update_node(&node("nobody"), None, None, Some("x")).await.unwrap();
    assert_eq!(nobody, UpdateNodeOutcome::NotFound);
    assert_eq!(f.store.approved_nodes(&BTreeMap::new()).await.unwrap(), nodes);
    assert_eq!(f.store.approved_nodes(&blue).await.unwrap(), nodes[1..]);
    assert_eq!(f.store.approved_nodes(&red).await.unwrap(), nodes[..1]);
    let no_node = labels(&[("room", "red"), ("row.a", "2")]);
    assert!(f.store.approved_nodes(&no_node).await.unwrap().is_empty());
    f.store.quarantine(&nodes[2], "x", start()).await.unwrap();
    assert_eq!(f.store.approved_nodes(&blue).await.unwrap(), nodes[1..2]);
    f.session(&nodes[1], "boot-1", start()).await;
    let connected = NodeQuery { limit: 10, connected: true, ..NodeQuery::default() };
    assert_eq!(f.store.nodes(&connected).await.unwrap().len(), 1);
    let page = NodeQuery { limit: 1, after: Some(nodes[0].clone()), ..NodeQuery::default() };
    assert_eq!(f.store.nodes(&page).await.unwrap()[0].id, nodes[1]);
    let held = NodeQuery { limit: 10, states: vec![NodeState::Quarantined], labels: blue, ..NodeQuery::default() };
    assert_eq!(f.store.nodes(&held).await.unwrap()[0].id, nodes[2]);
    assert_eq!(f.store.nodes_by_id(&[nodes[2].clone(), node("x")]).await.unwrap().len(), 1);
}

pub(crate) async fn a_node_with_work_is_deleted_only_by_force(f: Fixture) {
    let (id, _, assignment) = f.assigned(reboot()).await;
    let waiting = ExecutionId { operation: f.create(reboot(), std::slice::from_ref(&id)).await, node: id.clone() };
    let DeleteNodeOutcome::Busy(work) = f.store.delete_node(&id, false, "pat", after(1)).await.unwrap() else {
        panic!()
    };
    assert_eq!(work.len(), 2);
    assert_eq!(f.store.delete_node(&id, true, "pat", after(2)).await.unwrap(), DeleteNodeOutcome::Deleted);
    assert!(failed_as(reason::NODE_DELETED, &f.execution(&assignment.execution).await));
    assert_eq!(f.state(&waiting).await, ExecutionState::Cancelled);
    assert_eq!(f.operation_state(&waiting.operation).await, OperationState::Failed, "no cancel was asked for");
    assert!(f.store.node(&id).await.unwrap().is_none());
    assert_eq!(f.store.delete_node(&id, true, "pat", after(3)).await.unwrap(), DeleteNodeOutcome::NotFound);
}

pub(crate) async fn what_was_assigned_and_not_answered_is_found_by_its_controller(f: Fixture) {
    let (id, epoch, assignment) = f.assigned(reboot()).await;
    let found = f.store.unanswered("c1").await.unwrap();
    assert_eq!(found, [(assignment.clone(), epoch)], "a claim whose outcome was not known is looked up");
    assert!(f.store.unanswered("c2").await.unwrap().is_empty(), "it is not another controller's");
    let running = report(&assignment, 1, ExecutionState::Running, "boot-1");
    f.report(epoch, &running, after(1)).await;
    assert!(f.store.unanswered("c1").await.unwrap().is_empty(), "it was answered");
    f.session(&id, "boot-1", after(2)).await;
    assert!(f.store.unanswered("c1").await.unwrap().is_empty());
}
