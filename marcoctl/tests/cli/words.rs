//! Situations of a new user: several names, questions, empty lists, selectors, and waits that stand still.

use marco_proto::v1::execution::{State, WaitReason};
use marco_proto::v1::{Execution, ExecutionError, Node, Operation, WatchOperationResponse, node, operation};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::controller::{Controller, Ending, Facts};
use crate::running::{at_terminal, marcoctl};

fn node(id: &str, state: node::State) -> Node {
    Node { name: format!("nodes/{id}"), state: state.into(), ..Default::default() }
}

async fn three() -> Controller {
    let held = node::State::AwaitingApproval;
    let nodes = vec![node("a", held), node("b", held), node("c", node::State::Quarantined)];
    Controller::start(Facts { nodes, ..Default::default() }).await
}

#[tokio::test]
async fn several_names_are_done_as_far_as_they_can_be() {
    let controller = three().await;
    let run = controller.run(&["nodes", "approve", "a", "typo", "b"]).await;
    assert_eq!((run.code, run.stdout.as_str()), (1, "a  approved\nb  approved\n"), "{run:?}");
    assert!(run.stderr.starts_with("typo  not approved: there is no node typo (NODE_NOT_FOUND)\n"), "{run:?}");
    assert!(run.stderr.contains("error: 1 of 3 not approved: typo\n"), "{run:?}");
    let run = controller.run(&["-o", "json", "nodes", "quarantine", "a", "typo"]).await;
    assert_eq!((run.code, run.json()["nodes"].as_array().unwrap().len()), (1, 1), "{run:?}");
    // A single name gives the node itself, not a list.
    let run = controller.run(&["-o", "json", "nodes", "approve", "a"]).await;
    assert_eq!((run.code, run.json()["name"].as_str()), (0, Some("nodes/a")), "{run:?}");
}

#[tokio::test]
async fn all_approves_those_that_are_held_and_not_the_quarantined() {
    let controller = three().await;
    let run = controller.run(&["nodes", "approve", "--all"]).await;
    assert_eq!((run.code, run.stdout.as_str()), (0, "a  approved\nb  approved\n"), "{run:?}");
    // The second time no node is held any more, and c stays in quarantine.
    let run = controller.run(&["nodes", "approve", "--all"]).await;
    assert!(run.code == 1 && run.stderr.contains("no node matches"), "{run:?}");
    let run = controller.run(&["nodes", "quarantine", "--all", "--reason", "smoke"]).await;
    assert_eq!((run.code, run.stdout.lines().count()), (0, 2), "{run:?}");
    let run = controller.run(&["nodes", "label", "--all", "room=a1"]).await;
    assert_eq!((run.code, run.stdout.lines().count()), (0, 3), "{run:?}");
    let run = controller.run(&["-o", "json", "nodes", "delete", "--selector", "room=a1"]).await;
    // A delete has an empty response, so the names are listed.
    assert_eq!((run.code, run.json()), (0, serde_json::json!({ "deleted": ["nodes/a", "nodes/b", "nodes/c"] })));
}

#[tokio::test]
async fn empty_list_says_so() {
    let controller = Controller::start(Facts::default()).await;
    let run = controller.run(&["nodes", "list"]).await;
    assert_eq!((run.code, run.stdout.as_str()), (0, "no nodes\n"), "{run:?}");
}

#[tokio::test]
async fn selector_that_is_not_key_value_is_explained() {
    let controller = Controller::start(Facts::default()).await;
    for (selector, said) in [("room", "has no \"=\""), ("room!=a1", "only equality"), ("room=a1,kiosk", "\"kiosk\"")] {
        let run = controller.run(&["operations", "reboot", "--selector", selector]).await;
        assert!(run.code == 2 && run.stderr.contains(said) && run.stderr.contains("room=a1"), "{run:?}");
    }
}

#[tokio::test]
async fn what_looks_like_a_mistake_is_refused_without_a_terminal_and_done_by_force() {
    let controller = Controller::start(Facts::default()).await;
    let run = controller.run(&["operations", "reboot", "pi-out"]).await;
    assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{run:?}");
    assert!(run.stderr.contains("warning: NODE_QUARANTINED\n") && run.stderr.contains("--force"), "{run:?}");
    assert!(controller.facts.lock().unwrap().created.is_empty());
    assert_eq!(controller.run(&["operations", "reboot", "pi-out", "--force"]).await.code, 0);
    // A warning that needs no answer is only printed.
    let run = controller.run(&["operations", "reboot", "pi-alone"]).await;
    assert!(run.code == 0 && run.stderr.contains("note: NO_GROUP"), "{run:?}");
    assert_eq!(controller.facts.lock().unwrap().created.len(), 2);
}

#[tokio::test]
async fn on_a_terminal_the_operator_is_asked() {
    let controller = Controller::start(Facts::default()).await;
    let (address, certs) = (controller.address.to_string(), controller.certs().display().to_string());
    let line = ["--controller", &address, "--certs", &certs, "operations", "reboot", "pi-out"];
    let run = at_terminal(&[("go on all the same", "no")], &line).await;
    assert!(run.code == 1 && run.stdout.contains("nothing was done"), "{run:?}");
    assert!(controller.facts.lock().unwrap().created.is_empty());
    let run = at_terminal(&[("go on all the same", "yes")], &line).await;
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(controller.facts.lock().unwrap().created.len(), 1);
}

fn executions(all: &[(&str, State, WaitReason)]) -> Vec<Execution> {
    let execution = |(id, state, reason): &(&str, State, WaitReason)| Execution {
        node: format!("nodes/{id}"),
        state: (*state).into(),
        wait_reason: (*reason).into(),
        ..Default::default()
    };
    all.iter().map(execution).collect()
}

fn paused(by: &str) -> WatchOperationResponse {
    let operation = Operation {
        name: "operations/one".to_owned(),
        state: operation::State::Paused.into(),
        state_reason: "max_failures passed: 1 failed or overdue, 0 may be".to_owned(),
        paused_by: by.to_owned(),
        ..Default::default()
    };
    let none = WaitReason::Unspecified;
    let executions = executions(&[("pi-01", State::Failed, none), ("pi-02", State::Pending, WaitReason::Paused)]);
    WatchOperationResponse { operation: Some(operation), executions }
}

const WAIT: &[&str] = &["operations", "reboot", "pi-01", "pi-02", "--notice", "0s", "--wait"];

#[tokio::test]
async fn wait_for_an_operation_that_paused_by_itself_ends_1_and_says_what_can_be_done() {
    let watches = [(vec![paused("controller")], Ending::Hang)].into();
    let controller = Controller::start(Facts { watches, ..Default::default() }).await;
    let run = controller.run(WAIT).await;
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.stderr.contains("paused by itself: max_failures passed: 1 failed"), "{run:?}");
    for command in ["marcoctl operations resume operations/one", "marcoctl operations cancel operations/one"] {
        assert!(run.stderr.contains(command), "{run:?}");
    }
}

/// A watch of an update that ended, with these failures on its nodes.
fn ended(failures: &[&str]) -> WatchOperationResponse {
    let operation = Operation {
        name: "operations/one".to_owned(),
        state: operation::State::Failed.into(),
        finish_time: Some(prost_types::Timestamp::default()),
        ..Default::default()
    };
    let failed = failures.iter().enumerate().map(|(number, reason)| Execution {
        node: format!("nodes/pi-0{number}"),
        state: State::Failed.into(),
        error: Some(ExecutionError { reason: (*reason).to_owned(), message: "why".to_owned() }),
        ..Default::default()
    });
    WatchOperationResponse { operation: Some(operation), executions: failed.collect() }
}

#[tokio::test]
async fn wait_offers_a_retry_only_where_one_can_help() {
    for (failures, retried) in [
        (&["NOT_A_SYSTEM", "IMAGE_DID_NOT_COME_UP"][..], false),
        (&["NOT_A_SYSTEM", "DOWNLOAD_FAILED"], true),
        (&["DOWNLOAD_FAILED"], true),
    ] {
        let watches = [(vec![ended(failures)], Ending::Ok)].into();
        let controller = Controller::start(Facts { watches, ..Default::default() }).await;
        let run = controller.run(WAIT).await;
        assert_eq!(run.code, 1, "{run:?}");
        assert_eq!(run.stderr.contains("marcoctl operations retry operations/one"), retried, "{failures:?}: {run:?}");
        assert_eq!(run.stderr.contains("which image to put back"), !retried, "{failures:?}: {run:?}");
    }
}

#[tokio::test]
async fn page_of_a_node_says_what_happened_and_which_image_to_put_back() {
    let mut pi = node("a", node::State::Approved);
    pi.trouble = "The update to bad failed with NOT_A_SYSTEM: no kernel. Put back good.".to_owned();
    let controller = Controller::start(Facts { nodes: vec![pi.clone()], ..Default::default() }).await;
    let run = controller.run(&["nodes", "get", "a"]).await;
    assert!(run.code == 0 && run.stdout.contains(&pi.trouble), "{run:?}");
}

#[tokio::test]
async fn operation_that_an_operator_paused_is_waited_for_and_not_said_to_go_on() {
    let watches = [(vec![paused("users/kim")], Ending::Hang)].into();
    let controller = Controller::start(Facts { watches, ..Default::default() }).await;
    let run = controller.run(&[WAIT, &["--timeout", "1s"]].concat()).await;
    assert_eq!(run.code, 4, "{run:?}");
    // It goes on only if an operator resumes it.
    assert!(run.stderr.contains("it is paused: max_failures") && run.stderr.contains("operations resume"), "{run:?}");
    assert!(!run.stderr.contains("goes on"), "{run:?}");
}

#[tokio::test]
async fn wait_that_stands_still_says_how_many_are_done_and_who_is_away() {
    let operation =
        Operation { name: "operations/one".to_owned(), state: operation::State::Running.into(), ..Default::default() };
    let away = WaitReason::NodeOffline;
    let all = [
        ("pi-01", State::Succeeded, WaitReason::Unspecified),
        ("pi-02", State::Pending, away),
        ("pi-03", State::Pending, away),
    ];
    let message = WatchOperationResponse { operation: Some(operation), executions: executions(&all) };
    let last_seen_time = Some(prost_types::Timestamp { seconds: 1_900_000_000, nanos: 0 });
    let away = Node { last_seen_time, ..node("pi-02", node::State::Approved) };
    let off = Node { powered_off_by: "operations/off".to_owned(), ..node("pi-03", node::State::Approved) };
    let facts = Facts { nodes: vec![away, off], watches: [(vec![message], Ending::Hang)].into(), ..Default::default() };
    let controller = Controller::start(facts).await;
    let run = controller.run(&[WAIT, &["--timeout", "2s"]].concat()).await;
    assert_eq!(run.code, 4, "{run:?}");
    // Once during the wait on stdout, and once in the final error on stderr.
    for said in [&run.stdout, &run.stderr] {
        assert!(said.contains("1 of 3 done, 1 offline since 2030-03-17"), "{run:?}");
        assert!(said.contains("1 powered off on purpose (pi-03)"), "{run:?}");
    }
}

/// Starts a server that answers any request with these bytes and closes.
async fn answering(bytes: &'static [u8]) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut read = [0; 64];
            let _ = stream.read(&mut read).await;
            let _ = stream.write_all(bytes).await;
        }
    });
    address
}

#[tokio::test]
async fn hints_for_a_wrong_port_are_true() {
    let controller = Controller::start(Facts::default()).await;
    // A TLS alert: level 2 (fatal), description 120 (no_application_protocol). The file mirror answers like this,
    // because it speaks HTTP/1.1.
    let mirror = answering(&[0x15, 3, 3, 0, 2, 2, 120]).await;
    let run = marcoctl(mirror, &controller.certs(), &["nodes", "list"]).await;
    assert!(run.code == 3 && run.stderr.contains("file mirror") && run.stderr.contains("1346"), "{run:?}");
    assert!(!run.stderr.contains("expired"), "{run:?}");
    let plain = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    let run = marcoctl(plain, &controller.certs(), &["nodes", "list"]).await;
    assert!(run.code == 3 && run.stderr.contains("speaks no TLS"), "{run:?}");
    // The enrolment listener does not implement these calls.
    let run = controller.run(&["tokens", "list"]).await;
    assert!(run.code == 1 && run.stderr.contains("enrolment (1347)"), "{run:?}");
}
