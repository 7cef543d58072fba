//! Creating operations, waiting for them, and watching them.

use marco_proto::v1::execution::State;
use marco_proto::v1::operation::{self, Action, Target};
use marco_proto::v1::rollout::FailureLimit;
use marco_proto::v1::{Execution, ExecutionCounts, ExecutionError, Operation, WatchOperationResponse};
use tonic::Status;

use crate::controller::{Controller, Ending, Facts, Script};

fn message(state: operation::State, executions: &[(&str, State, bool)]) -> WatchOperationResponse {
    let succeeded = executions.iter().filter(|(_, state, _)| *state == State::Succeeded).count();
    let counts = ExecutionCounts {
        total: i32::try_from(executions.len()).unwrap(),
        succeeded: i32::try_from(succeeded).unwrap(),
        ..Default::default()
    };
    let executions = executions.iter().map(|(node, state, overdue)| Execution {
        name: format!("operations/one/executions/{node}"),
        node: format!("nodes/{node}"),
        state: (*state).into(),
        overdue: *overdue,
        error: (*state == State::Failed)
            .then(|| ExecutionError { reason: "DIGEST_MISMATCH".to_owned(), message: "wrong bytes".to_owned() }),
        ..Default::default()
    });
    let operation = Operation {
        name: "operations/one".to_owned(),
        state: state.into(),
        counts: Some(counts),
        ..Default::default()
    };
    WatchOperationResponse { operation: Some(operation), executions: executions.collect() }
}

async fn watched(scripts: impl IntoIterator<Item = Script>) -> Controller {
    Controller::start(Facts { watches: scripts.into_iter().collect(), ..Default::default() }).await
}

const WAIT: &[&str] = &["operations", "reboot", "pi-01", "pi-02", "--notice", "0s", "--wait"];

fn running() -> WatchOperationResponse {
    message(operation::State::Running, &[("pi-01", State::Running, false), ("pi-02", State::Assigned, false)])
}

fn succeeded() -> WatchOperationResponse {
    message(operation::State::Succeeded, &[("pi-01", State::Succeeded, false), ("pi-02", State::Succeeded, false)])
}

#[tokio::test]
async fn what_a_node_logged_is_printed_line_by_line_and_steers_no_terminal() {
    let controller = Controller::start(Facts::default()).await;
    let line = ["operations", "log", "0198a6e0-0000-7000-8000-000000000001", "pi-01"];
    let run = controller.run(&line).await;
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.stdout, "(older lines were left out)\nfirst\n\\u{1b}[2Jsecond\n");
    let run = controller.run(&[&line[..], &["-o", "json"]].concat()).await;
    // JSON is for programs and has the original text.
    assert_eq!(run.json()["log"], "first\n\u{1b}[2Jsecond\n");
    assert_eq!(run.json()["cut"], true);
}

#[tokio::test]
async fn a_dry_run_creates_nothing_and_fails_when_a_node_would_refuse() {
    let controller = Controller::start(Facts::default()).await;
    let line = ["operations", "update", "--image", "kiosk", "--dry-run"];
    let run = controller.run(&[&line[..], &["pi-01"]].concat()).await;
    assert!(run.code == 0 && run.stdout.contains("READY"), "{run:?}");
    let run = controller.run(&[&line[..], &["pi-01", "pi-bad"]].concat()).await;
    assert!(run.code == 1 && run.stderr.contains("1 of 2 nodes would be refused"), "{run:?}");
    assert!(run.stdout.contains("NOT_WIRED") && run.stdout.contains("the cable is out"), "{run:?}");
    let run = controller.run(&[&line[..], &["pi-bad", "-o", "json"]].concat()).await;
    assert_eq!(run.code, 1, "{run:?}");
    assert_eq!(run.json()["checks"][0]["verdict"], "VERDICT_REFUSED");
    assert!(controller.facts.lock().unwrap().created.is_empty());
    // Waiting for an operation that was not created makes no sense.
    let run = controller.run(&[&line[..], &["pi-01", "--wait"]].concat()).await;
    assert_eq!(run.code, 2, "{run:?}");
}

#[tokio::test]
async fn what_is_asked_for_is_what_the_command_line_says() {
    let controller = Controller::start(Facts::default()).await;
    let line = ["operations", "update", "--selector", "room=a1,role=kiosk", "--image", "kiosk", "--notice", "1m"];
    let run = controller.run(&[&line[..], &["--message", "soon", "--discard-home", "-o", "json"]].concat()).await;
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.json()["name"], "operations/one");
    assert_eq!(run.json()["update"]["notice"], "60s");
    let facts = controller.facts.lock().unwrap();
    let request = &facts.created[0];
    assert!(!request.request_id.is_empty());
    let operation = request.operation.as_ref().unwrap();
    let Some(Action::Update(update)) = &operation.action else { panic!("{operation:?}") };
    assert_eq!((update.image.as_str(), update.message.as_str()), ("kiosk", "soon"));
    assert!(update.preserve.unwrap().discard_home && !update.raw);
    let Some(Target::Labels(selector)) = &operation.target else { panic!("{operation:?}") };
    assert_eq!(selector.match_labels.len(), 2);
}

#[tokio::test]
async fn an_image_is_written_raw_only_when_that_is_asked() {
    let controller = Controller::start(Facts::default()).await;
    let run = controller.run(&["operations", "update", "pi-01", "--raw"]).await;
    assert_eq!(run.code, 2, "only with an image: {run:?}");
    let run = controller.run(&["operations", "update", "pi-01", "--image", "kiosk", "--raw"]).await;
    assert_eq!(run.code, 0, "{run:?}");
    let facts = controller.facts.lock().unwrap();
    let Some(Action::Update(update)) = &facts.created[0].operation.as_ref().unwrap().action else {
        panic!("no update")
    };
    assert!(update.raw && update.preserve.is_none());
}

#[tokio::test]
async fn a_notice_that_was_not_given_is_not_sent() {
    let controller = Controller::start(Facts::default()).await;
    assert_eq!(controller.run(&["operations", "power-off", "--all"]).await.code, 0);
    let facts = controller.facts.lock().unwrap();
    let operation = facts.created[0].operation.as_ref().unwrap();
    let Some(Action::PowerOff(power_off)) = &operation.action else { panic!("{operation:?}") };
    // Unset means the controller's default. Zero would mean no notice.
    assert_eq!(power_off.notice, None);
    assert!(matches!(operation.target, Some(Target::All(_))));
}

#[tokio::test]
async fn rollout_and_window_are_sent_only_when_they_are_given() {
    let controller = Controller::start(Facts::default()).await;
    assert_eq!(controller.run(&["operations", "reboot", "--all"]).await.code, 0);
    let flags = ["--max-in-flight", "10", "--canary", "2", "--max-failures", "5%", "--group-by", "switch"];
    let more = ["--max-per-group", "1", "--window-cron", "0 22 * * *", "--window-duration", "6h"];
    let run = controller.run(&[&["operations", "reboot", "--all"][..], &flags, &more].concat()).await;
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(controller.run(&["operations", "reboot", "--all", "--group-by", "switch"]).await.code, 2);
    assert_eq!(controller.run(&["operations", "reboot", "--all", "--max-failures", "many"]).await.code, 2);
    let facts = controller.facts.lock().unwrap();
    let [plain, full] = [0, 1].map(|place: usize| facts.created[place].operation.clone().unwrap());
    assert_eq!((plain.rollout, plain.window), (None, None));
    let rollout = full.rollout.unwrap();
    assert_eq!((rollout.max_in_flight, rollout.canary, rollout.max_in_flight_per_group), (10, 2, 1));
    assert_eq!(rollout.failure_limit, Some(FailureLimit::MaxFailuresPercent(5)));
    assert_eq!(full.window.unwrap().duration.unwrap().seconds, 6 * 3600);
}

#[tokio::test]
async fn a_creation_that_is_asked_again_has_the_same_request_id() {
    let controller = Controller::start(Facts { unavailable: 2, ..Default::default() }).await;
    assert_eq!(controller.run(&["operations", "reboot", "pi-01"]).await.code, 0);
    let facts = controller.facts.lock().unwrap();
    assert_eq!(facts.created.len(), 3);
    // Equal requests include equal ids, by which the controller recognises a repetition.
    assert!(facts.created.iter().all(|request| request == &facts.created[0]));
}

#[tokio::test]
async fn bad_input_is_refused_with_its_reason() {
    let controller = Controller::start(Facts::default()).await;
    let run = controller.run(&["operations", "reboot", "pi-01", "--at", "2001-01-01T00:00:00Z"]).await;
    assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{run:?}");
    assert!(run.stderr.contains("operation.schedule_time is in the past (TIME_IN_THE_PAST)\n"), "{run:?}");
}

#[tokio::test]
async fn a_wait_ends_0_when_every_node_succeeded() {
    let controller = watched([(vec![running(), succeeded()], Ending::Ok)]).await;
    let run = controller.run(WAIT).await;
    assert_eq!(run.code, 0, "{run:?}");
    for node in ["pi-01", "pi-02"] {
        let last = run.stdout.lines().rfind(|line| line.starts_with(node)).unwrap();
        assert!(last.ends_with("SUCCEEDED"), "{run:?}");
    }
}

#[tokio::test]
async fn a_wait_goes_on_over_a_broken_stream() {
    let cut = || Ending::Status(Status::unavailable("the controller stops"));
    // The second stream breaks before its first message.
    let controller = watched([(vec![running()], cut()), (vec![], cut()), (vec![succeeded()], Ending::Ok)]).await;
    let run = controller.run(&[WAIT, &["--output", "json"]].concat()).await;
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(run.json()["state"], "STATE_SUCCEEDED");
}

#[tokio::test]
async fn a_wait_for_what_failed_ends_1_and_names_the_node_and_the_reason() {
    let failed =
        message(operation::State::Failed, &[("pi-01", State::Succeeded, false), ("pi-02", State::Failed, false)]);
    let controller = watched([(vec![running(), failed], Ending::Ok)]).await;
    let run = controller.run(WAIT).await;
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.stdout.contains("DIGEST_MISMATCH: wrong bytes"), "{run:?}");
    assert!(run.stderr.contains("1 of 2 nodes succeeded"), "{run:?}");
}

#[tokio::test]
async fn an_overdue_node_ends_the_wait_only_when_nothing_else_is_at_work() {
    let with =
        |other| message(operation::State::Running, &[("pi-01", State::Rebooting, true), ("pi-02", other, false)]);
    let controller = watched([(vec![with(State::Running), with(State::Succeeded)], Ending::Hang)]).await;
    let run = controller.run(WAIT).await;
    // The stream hangs: the client must end the wait by itself.
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.stderr.contains("one node is overdue"), "{run:?}");
    let controller = watched([(vec![with(State::Running)], Ending::Hang)]).await;
    let run = controller.run(&[WAIT, &["--timeout", "1s"]].concat()).await;
    assert_eq!(run.code, 4, "{run:?}");
}

#[tokio::test]
async fn a_wait_that_runs_out_of_time_ends_4_with_what_is_known() {
    let controller = watched([(vec![running()], Ending::Hang)]).await;
    let run = controller.run(&[WAIT, &["--timeout", "1s", "--output", "json"]].concat()).await;
    assert_eq!(run.code, 4, "{run:?}");
    assert_eq!(run.json()["state"], "STATE_RUNNING");
}

#[tokio::test]
async fn a_wait_that_is_refused_still_prints_what_was_created() {
    // Without a script the watch is refused. The operation exists nevertheless.
    let controller = watched([]).await;
    let run = controller.run(&[WAIT, &["--output", "json"]].concat()).await;
    assert_eq!(run.code, 1, "{run:?}");
    assert_eq!(run.json()["name"], "operations/one");
}

#[tokio::test]
async fn a_watch_in_json_is_one_line_per_message() {
    let controller = watched([(vec![running(), running(), succeeded()], Ending::Ok)]).await;
    let run = controller.run(&["operations", "watch", "one", "--output", "json"]).await;
    assert_eq!(run.code, 0, "{run:?}");
    // Two equal messages are two lines: a program gets everything that was sent.
    let states: Vec<String> = run
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["operation"]["state"].to_string())
        .collect();
    assert_eq!(states, ["\"STATE_RUNNING\"", "\"STATE_RUNNING\"", "\"STATE_SUCCEEDED\""]);
}

#[tokio::test]
async fn a_watch_elsewhere_than_on_a_terminal_is_a_line_per_change() {
    let controller = watched([(vec![running(), running(), succeeded()], Ending::Ok)]).await;
    let run = controller.run(&["operations", "watch", "one"]).await;
    let of_node = |line: &&str| line.contains("  pi-01  ");
    // Here the repeated message gives no line, because nothing changed.
    assert_eq!(run.stdout.lines().filter(of_node).count(), 2, "{run:?}");
}

#[tokio::test]
async fn watching_what_does_not_exist_ends_1() {
    let controller = watched([]).await;
    let run = controller.run(&["operations", "watch", "one"]).await;
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.stderr.contains("no such operation"), "{run:?}");
}
