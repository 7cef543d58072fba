//! Lists, single resources, errors, and unreachable controllers.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::UNIX_EPOCH;

use marco_proto::v1::{Node, node};
use prost_types::Timestamp;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::TcpListener;

use crate::certificates::Certificates;
use crate::controller::{Controller, Facts};
use crate::running::{command, marcoctl};

fn nodes(count: usize) -> Facts {
    let node = |number: usize| Node {
        name: format!("nodes/pi-{number:02}"),
        state: node::State::Approved.into(),
        labels: [("room".to_owned(), "a1".to_owned()), ("role".to_owned(), "kiosk".to_owned())].into(),
        ..Default::default()
    };
    Facts { nodes: (0..count).map(node).collect(), ..Default::default() }
}

/// Returns an address at which nothing listens.
async fn nobody() -> SocketAddr {
    // The listener is dropped at once, which frees its port.
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn a_list_has_every_page_in_one_document() {
    let controller = Controller::start(nodes(5)).await;
    let run = controller.run(&["--output", "json", "nodes", "list", "--page-size", "2"]).await;
    assert_eq!(run.code, 0, "{run:?}");
    let json = run.json();
    assert_eq!(json.as_object().unwrap().keys().collect::<Vec<_>>(), ["nodes"]);
    assert_eq!(json["nodes"].as_array().unwrap().len(), 5);
    assert_eq!(json["nodes"][4]["name"], "nodes/pi-04");
    assert_eq!(json["nodes"][4]["state"], "STATE_APPROVED");
    assert_eq!(json["nodes"][4]["connected"], false);
}

#[tokio::test]
async fn an_empty_list_is_an_empty_array() {
    let controller = Controller::start(Facts::default()).await;
    let run = controller.run(&["nodes", "list", "-o", "json"]).await;
    assert_eq!(run.json(), serde_json::json!({ "nodes": [] }));
}

#[tokio::test]
async fn a_table_has_a_line_per_node() {
    let controller = Controller::start(nodes(2)).await;
    let run = controller.run(&["nodes", "list"]).await;
    let lines: Vec<&str> = run.stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{run:?}");
    assert!(lines[0].starts_with("NODE "), "{run:?}");
    assert!(lines[2].starts_with("pi-01 ") && lines[2].ends_with("role=kiosk,room=a1"), "{run:?}");
}

#[tokio::test]
async fn list_of_nodes_warns_before_a_certificate_expires() {
    let mut facts = nodes(3);
    let now = i64::try_from(UNIX_EPOCH.elapsed().unwrap().as_secs()).unwrap();
    // One hour more, so that the number of full days does not change during the test.
    for (node, days) in facts.nodes.iter_mut().zip([90, 5, -5]) {
        node.certificate_expire_time = Some(Timestamp { seconds: now + days * 86_400 + 3600, nanos: 0 });
    }
    let controller = Controller::start(facts).await;
    let run = controller.run(&["nodes", "list"]).await;
    let lines: Vec<&str> = run.stdout.lines().collect();
    assert!(!lines[1].contains("certificate"), "{run:?}");
    assert!(lines[2].contains("certificate expires in 5 days"), "{run:?}");
    assert!(lines[3].contains("certificate expired 4 days ago"), "{run:?}");
}

#[tokio::test]
async fn only_the_token_is_on_stdout() {
    let controller = Controller::start(Facts::default()).await;
    let run = controller.run(&["tokens", "create", "--max-uses", "3"]).await;
    assert_eq!((run.code, run.stdout.as_str()), (0, "the-secret\n"));
    assert!(run.stderr.contains("3 Pis"), "{run:?}");
    let run = controller.run(&["tokens", "create", "--output", "json"]).await;
    assert_eq!(run.json()["token"], "the-secret");
}

#[tokio::test]
async fn labels_that_were_not_named_stay() {
    let controller = Controller::start(nodes(1)).await;
    let run = controller.run(&["nodes", "label", "pi-00", "room=b2", "shelf=3", "role-"]).await;
    assert_eq!(run.code, 0, "{run:?}");
    let facts = controller.facts.lock().unwrap();
    let update = &facts.updates[0];
    // The display name is not in the mask, so it stays.
    assert_eq!(update.update_mask.as_ref().unwrap().paths, ["labels"]);
    let labels = &update.node.as_ref().unwrap().labels;
    assert_eq!(labels.len(), 2);
    assert_eq!((labels["room"].as_str(), labels["shelf"].as_str()), ("b2", "3"));
}

#[tokio::test]
async fn what_is_not_there_is_said_with_its_reason() {
    let controller = Controller::start(Facts::default()).await;
    let run = controller.run(&["--output", "json", "nodes", "get", "pi-09"]).await;
    assert_eq!((run.code, run.stdout.as_str()), (1, ""));
    assert!(run.stderr.starts_with("error: there is no node pi-09 (NODE_NOT_FOUND)\n"), "{run:?}");
}

#[tokio::test]
async fn a_wrong_command_line_is_2() {
    let controller = Controller::start(Facts::default()).await;
    for wrong in [
        &["nodes", "lsit"][..],
        &["operations", "reboot"],
        // The operator decides which side is right; neither is the default.
        &["nodes", "resolve", "pi-01"],
        &["nodes", "resolve", "pi-01", "--accept", "--abandon"],
        &["operations", "reboot", "--all", "--at", "tomorrow"],
        &["artifacts", "push", "/no/such/file", "--kind", "image"],
        &["--identity", "nobody", "nodes", "list"],
    ] {
        let run = controller.run(wrong).await;
        assert_eq!(run.code, 2, "{run:?}");
        assert!(run.stderr.starts_with("error: "), "{run:?}");
    }
}

#[tokio::test]
async fn nobody_there_is_3_with_or_without_certificates() {
    let certificates = Certificates::mint();
    let empty = tempfile::TempDir::new().unwrap();
    for certs in [certificates.path().as_path(), empty.path()] {
        // Even without certificates: the missing controller is the first thing to fix.
        let run = marcoctl(nobody().await, certs, &["nodes", "list"]).await;
        assert_eq!((run.code, run.stdout.as_str()), (3, ""), "{run:?}");
        assert!(run.stderr.contains("Connection refused") && run.stderr.contains("hint: "), "{run:?}");
    }
}

#[tokio::test]
async fn a_controller_of_another_ca_is_not_believed() {
    let controller = Controller::start(Facts::default()).await;
    let others = Certificates::mint();
    let run = marcoctl(controller.address, &others.path(), &["nodes", "list"]).await;
    // Exit code 3, not 1: the right controller was not reached.
    assert_eq!(run.code, 3, "{run:?}");
    assert!(run.stderr.contains("ca.crt"), "{run:?}");
}

#[tokio::test]
async fn a_certificate_that_the_controller_does_not_take_is_said_to_be_that() {
    let controller = Controller::start(Facts::default()).await;
    let others = Certificates::mint();
    // This client trusts the controller, but not the other way round.
    std::fs::copy(controller.certs().join("ca.crt"), others.path().join("ca.crt")).unwrap();
    let run = marcoctl(controller.address, &others.path(), &["nodes", "list"]).await;
    assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{run:?}");
    assert!(run.stderr.contains("does not take "), "{run:?}");
}

#[tokio::test]
async fn certificates_that_cannot_be_used_are_named() {
    let controller = Controller::start(Facts::default()).await;
    let others = Certificates::mint();
    let mixed = Certificates::mint();
    // The certificate and the key do not belong together.
    std::fs::copy(others.path().join("admin.key"), mixed.path().join("admin.key")).unwrap();
    let run = marcoctl(controller.address, &mixed.path(), &["nodes", "list"]).await;
    assert_eq!(run.code, 2, "{run:?}");
    assert!(run.stderr.contains("admin.key"), "{run:?}");
    std::fs::write(mixed.path().join("ca.crt"), "nothing").unwrap();
    let run = marcoctl(controller.address, &mixed.path(), &["nodes", "list"]).await;
    assert!(run.code == 2 && run.stderr.contains("ca.crt"), "{run:?}");
}

#[tokio::test]
async fn a_reader_that_leaves_is_no_error() {
    // More output than a pipe holds, so that the writer meets the closed pipe.
    let controller = Controller::start(nodes(3000)).await;
    let mut child = command(controller.address, &controller.certs(), &["nodes", "list"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.next_line().await.unwrap().unwrap().starts_with("NODE"));
    drop(lines);
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert_eq!(output.status.code(), Some(0));
}
