//! Whole agents on virtual Pis, against a controller with real TLS whose answers the test gives.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use marco_proto::names::PROTOCOL_VERSION;
use marco_proto::v1::execution::State as WireState;
use marco_proto::v1::{
    Assign, Cancel, ConnectResponse, Hello, NodeMode, PowerOff, Query, Reboot, Report, Update, Welcome, assign,
    connect_request, connect_response,
};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::Connection;
use crate::identity::JoinToken;
use crate::simulate::{SimulateError, Simulation};
use crate::system::System as _;
use crate::system::virtual_pi::{Options, VirtualPi};
use crate::testing::{Controller, Pki, TestSession, acceptance, acknowledgement};

const DEADLINE: Duration = Duration::from_secs(30);

struct Fleet {
    dir: tempfile::TempDir,
    controller: Controller,
    stop: CancellationToken,
    task: AbortOnDropHandle<Result<(), SimulateError>>,
}

impl Fleet {
    async fn start(connection: impl FnOnce(&Controller) -> Connection) -> Self {
        let controller = Controller::start(Pki::new("2026-01-01T00:00:00Z", "2126-01-01T00:00:00Z")).await;
        let dir = tempfile::tempdir().unwrap();
        let simulation = Simulation {
            count: 1,
            directory: dir.path().to_owned(),
            prefix: "pi-".into(),
            options: Options {
                boot_time: Duration::from_millis(20),
                shutdown_time: Duration::from_millis(20),
                blank: false,
                stock: false,
            },
            connection: connection(&controller),
        };
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { simulation.run(stop).await }
        });
        Self { dir, controller, stop, task: AbortOnDropHandle::new(task) }
    }

    async fn with_token() -> Self {
        Self::start(|controller| Connection {
            controllers: vec![controller.address.parse().unwrap()],
            enroll: vec![controller.address.parse().unwrap()],
            token: Some(JoinToken::parse(&controller.pki.token()).unwrap()),
            name: String::new(),
            search: None,
        })
        .await
    }

    fn pi(&self) -> PathBuf {
        self.dir.path().join("pi-01")
    }

    /// The lines of the Pi's log with this event.
    fn log(&self, event: &str) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.pi().join("log.jsonl")).unwrap_or_default();
        let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.filter(|line| line["event"] == event).collect()
    }

    async fn session(&mut self) -> (TestSession, Hello) {
        let mut session = self.controller.session().await;
        let Some(connect_request::Message::Hello(hello)) = session.next().await.unwrap().message else {
            panic!("the first message is no Hello");
        };
        session.welcome().await;
        (session, hello)
    }

    async fn end(self) {
        self.stop.cancel();
        tokio::time::timeout(DEADLINE, self.task).await.expect("it does not end").unwrap().unwrap();
    }
}

fn execution(number: u32) -> String {
    format!("operations/0198a6e0-0000-7000-8000-{number:012}/executions/pi-01")
}

async fn assign(session: &TestSession, number: u32, action: assign::Action) {
    let assign = Assign { execution: execution(number), attempt: 1, action: Some(action), ..Assign::default() };
    session.say(connect_response::Message::Assign(assign)).await;
}

async fn ack(session: &TestSession, report: &Report) {
    let verdict =
        (report.state() == WireState::Verifying).then(|| connect_response::Message::Verdict(acceptance(report)));
    for message in [Some(acknowledgement(report)), verdict].into_iter().flatten() {
        // The Pi may have gone down meanwhile.
        let _ = session.answers.send(Ok(ConnectResponse { message: Some(message) })).await;
    }
}

/// Acknowledges each report until one has this state.
async fn reported(session: &mut TestSession, state: WireState) -> Report {
    loop {
        let message = session.next().await.unwrap_or_else(|| panic!("the session ended before {state:?}"));
        if let Some(connect_request::Message::Report(report)) = message.message {
            ack(session, &report).await;
            if report.state() == state {
                return report;
            }
        }
    }
}

fn at_once() -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds: 0, nanos: 0 })
}

#[tokio::test]
async fn a_virtual_pi_enrols_reboots_once_and_proves_it_by_its_boot_id() {
    let mut fleet = Fleet::with_token().await;
    let (mut session, first) = fleet.session().await;
    assert!(!first.board.as_ref().unwrap().serial.is_empty());
    let asked = fleet.controller.enrolled();
    assert_eq!((asked.len(), asked[0].node_id.as_str()), (1, "pi-01"));

    assign(&session, 1, assign::Action::Reboot(Reboot { notice: at_once(), message: String::new() })).await;
    reported(&mut session, WireState::Running).await;
    reported(&mut session, WireState::Rebooting).await;
    let (mut session, second) = fleet.session().await;
    assert_ne!(first.boot_id, second.boot_id);
    assert_eq!(second.executions.len(), 1);
    assert_eq!(second.executions[0].state(), WireState::Succeeded);
    assert_eq!(second.executions[0].boot_id, second.boot_id);
    reported(&mut session, WireState::Succeeded).await;
    let reboots = fleet.log("reboot");
    assert_eq!(reboots.len(), 1);
    assert_eq!(reboots[0]["execution"], execution(1));
    fleet.end().await;
}

#[tokio::test]
async fn a_virtual_pi_that_was_powered_off_says_so_when_it_is_switched_on() {
    let mut fleet = Fleet::with_token().await;
    let (mut session, _) = fleet.session().await;
    assign(&session, 1, assign::Action::PowerOff(PowerOff { notice: at_once(), message: String::new() })).await;
    reported(&mut session, WireState::Rebooting).await;
    while session.next().await.is_some() {}
    std::fs::write(fleet.pi().join("power-on"), "").unwrap();
    let (mut session, _) = fleet.session().await;
    reported(&mut session, WireState::Succeeded).await;
    assert_eq!(fleet.log("power-off").len(), 1);
    fleet.end().await;
}

#[tokio::test]
async fn second_agent_of_a_machine_ends_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { boot_time: Duration::ZERO, shutdown_time: Duration::ZERO, blank: false, stock: false };
    let pi = VirtualPi::open(&dir.path().join("pi-01"), "pi-01", options).unwrap();
    let connection = Connection { controllers: vec!["localhost:1".parse().unwrap()], ..Connection::default() };
    let stop = CancellationToken::new();
    let nobody = || -> super::OnEnrolled { Arc::new(|_, _| {}) };
    let first = super::Lock::take(pi.as_ref()).unwrap();
    let error = super::run(pi.clone(), connection.clone(), nobody(), stop.clone()).await.unwrap_err();
    let process = format!("in use by another agent (process {}", std::process::id());
    assert!(error.to_string().contains(&process), "{error}");
    assert!(std::fs::read_dir(pi.identity_dir()).unwrap().all(|file| file.unwrap().file_name() == "agent.lock"));
    drop(first);
    stop.cancel();
    super::run(pi, connection, nobody(), stop).await.unwrap();
}

#[tokio::test]
async fn power_off_given_up_during_an_outage_never_happens() {
    let mut fleet = Fleet::with_token().await;
    let (mut session, _) = fleet.session().await;
    let notice = Some(prost_types::Duration { seconds: 3600, nanos: 0 });
    assign(&session, 1, assign::Action::PowerOff(PowerOff { notice, message: String::new() })).await;
    reported(&mut session, WireState::Running).await;
    std::fs::write(fleet.pi().join("power-cut"), "").unwrap();
    let (mut session, hello) = fleet.session().await;
    assert_eq!(hello.executions.first().unwrap().state(), WireState::Running);
    // The controller says so before it acknowledges anything.
    session.say(connect_response::Message::Cancel(Cancel { execution: execution(1) })).await;
    reported(&mut session, WireState::Cancelled).await;
    // Warned before the cut, and not again after it.
    let words = std::fs::read_to_string(fleet.pi().join("wall.log")).unwrap();
    assert_eq!(words.matches("powers off in").count(), 1, "{words}");
    assert_eq!(fleet.log("power-off").len(), 0);
    fleet.end().await;
}

/// Collects the agent's states and last words until its stream ends.
async fn last_words(session: &mut TestSession) -> Vec<String> {
    let mut said = Vec::new();
    while let Some(message) = session.next().await {
        match message.message {
            Some(connect_request::Message::Report(report)) => {
                ack(session, &report).await;
                said.push(report.state().as_str_name().to_owned());
            }
            Some(connect_request::Message::Leaving(leaving)) => said.push(format!("leaving {}", leaving.execution)),
            _ => {}
        }
    }
    said
}

#[tokio::test]
async fn only_an_agent_that_ends_with_its_power_off_says_goodbye() {
    let mut fleet = Fleet::with_token().await;
    let (mut session, _) = fleet.session().await;
    assign(&session, 1, assign::Action::Reboot(Reboot { notice: at_once(), message: String::new() })).await;
    let said = last_words(&mut session).await;
    assert!(!said.iter().any(|word| word.starts_with("leaving")), "{said:?}");
    let (mut session, _) = fleet.session().await;
    reported(&mut session, WireState::Succeeded).await;
    assign(&session, 2, assign::Action::PowerOff(PowerOff { notice: at_once(), message: String::new() })).await;
    let said = last_words(&mut session).await;
    assert_eq!(said.last(), Some(&format!("leaving {}", execution(2))), "{said:?}");
    assert!(said.iter().any(|word| word == "STATE_REBOOTING"));
    fleet.end().await;
}

#[tokio::test]
async fn a_machine_that_hangs_on_its_way_off_stays_connected_until_its_agent_is_ended() {
    let mut fleet = Fleet::with_token().await;
    let (mut session, first) = fleet.session().await;
    let hang = fleet.pi().join("hang");
    // The machine hangs before its shutdown ends the agent.
    std::fs::write(&hang, "agent").unwrap();
    assign(&session, 1, assign::Action::PowerOff(PowerOff { notice: at_once(), message: String::new() })).await;
    reported(&mut session, WireState::Rebooting).await;
    while fleet.log("power-off").is_empty() {
        tokio::task::yield_now().await;
    }
    // The stream breaks. The agent comes back and lists its unfinished jobs.
    drop(session);
    let (mut session, again) = fleet.session().await;
    assert_eq!(again.boot_id, first.boot_id);
    assert_eq!(again.executions.first().unwrap().state(), WireState::Rebooting);
    // Its answer says that the session is open on its side too: in one that is not, it has no last words.
    session.say(connect_response::Message::Query(Query { execution: execution(1) })).await;
    reported(&mut session, WireState::Rebooting).await;
    std::fs::remove_file(&hang).unwrap();
    let said = last_words(&mut session).await;
    assert_eq!(said.last(), Some(&format!("leaving {}", execution(1))), "{said:?}");
    fleet.end().await;
}

#[tokio::test]
async fn a_join_file_on_the_card_is_enough_and_loses_its_token() {
    let mut fleet = Fleet::start(|_| Connection::default()).await;
    let folder = fleet.pi().join("recovery/marco");
    let made = async {
        while fleet.log("boot").is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, made).await.expect("the Pi does not boot");
    let (address, token) = (&fleet.controller.address, fleet.controller.pki.token());
    let text = format!(
        "controllers = [\"{address}\"]\nenroll = [\"{address}\"]\ntoken = \"{token}\"\nname = \"from-a-card\"\n"
    );
    std::fs::write(folder.join("join.toml"), text).unwrap();
    fleet.session().await;
    assert_eq!(fleet.controller.enrolled()[0].node_id, "from-a-card");
    let left = std::fs::read_to_string(fleet.pi().join("recovery/marco/join.toml")).unwrap();
    assert!(left.contains("controllers") && !left.contains("mj1"), "{left}");
    fleet.end().await;
}

/// An image with boot files, and an init or none.
fn image(init: bool) -> Vec<u8> {
    let mut files = vec![
        ("boot/firmware/kernel8.img", "kernel of the image", 0o644),
        ("boot/firmware/cmdline.txt", "root=/dev/mmcblk0p2 rootwait init=/sbin/init", 0o644),
        ("boot/firmware/config.txt", "arm_64bit=1", 0o644),
        ("boot/firmware/bcm2711-rpi-4-b.dtb", "device tree of the image", 0o644),
        ("etc/os-release", "PRETTY_NAME=\"An image\"", 0o644),
    ];
    if init {
        files.push(("sbin/init", "#!/bin/true", 0o755));
    }
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gzip);
    for (path, text, mode) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len().try_into().unwrap());
        header.set_mode(mode);
        tar.append_data(&mut header, path, text.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

fn install(sha256: &str) -> assign::Action {
    assign::Action::Update(Update {
        image: "artifacts/raspios.tar.gz".into(),
        image_sha256: sha256.into(),
        notice: at_once(),
        ..Update::default()
    })
}

#[tokio::test]
async fn an_update_ends_in_the_new_system_and_leaves_nothing_behind() {
    let mut fleet = Fleet::with_token().await;
    let sha256 = fleet.controller.store(image(true));
    let (mut session, old) = fleet.session().await;
    assign(&session, 1, install(&sha256)).await;
    let armed = reported(&mut session, WireState::Rebooting).await;

    let (mut session, installer) = fleet.session().await;
    assert_eq!(installer.mode(), NodeMode::Installer);
    assert_ne!(installer.boot_id, old.boot_id);
    let installing = reported(&mut session, WireState::Running).await;
    assert!(installing.sequence > armed.sequence);
    reported(&mut session, WireState::Rebooting).await;

    let (mut session, new) = fleet.session().await;
    assert_eq!((new.mode(), new.system.as_ref().unwrap().os.as_str()), (NodeMode::Running, "An image"));
    let verifying = reported(&mut session, WireState::Verifying).await;
    let release = verifying.release.unwrap();
    assert_eq!((release.execution, release.image_sha256), (execution(1), sha256));
    reported(&mut session, WireState::Succeeded).await;

    assert_eq!(fleet.log("reboot").len(), 2, "into the installer, and into the new system");
    assert_eq!(std::fs::read_to_string(fleet.pi().join("boot/kernel8.img")).unwrap(), "kernel of the image");
    let autoboot = std::fs::read_to_string(fleet.pi().join("recovery/autoboot.txt")).unwrap();
    assert!(autoboot.contains("[all]\ntryboot_a_b=1\nboot_partition=4"), "{autoboot}");

    // The new system is the default now, so it comes back after any reset. (Once it has written down that the
    // controller knows.)
    let journal = fleet.pi().join("root/var/lib/marco-agent/journal.json");
    let acknowledged = || {
        let entries: serde_json::Value = serde_json::from_slice(&std::fs::read(&journal).ok()?).ok()?;
        let entry = entries.get("entries")?.get(0)?;
        (entry.get("acked")? == entry.get("sequence")?).then_some(())
    };
    tokio::time::timeout(Duration::from_secs(10), async {
        while acknowledged().is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the acknowledgement is written down");
    std::fs::write(fleet.pi().join("power-cut"), "").unwrap();
    let (_session, again) = fleet.session().await;
    assert_eq!((again.mode(), again.executions), (NodeMode::Running, vec![]));
    for left in ["install.json", "node.key", "journal.json"] {
        assert!(!fleet.pi().join("recovery/marco").join(left).exists(), "{left} is still on the card");
    }
    fleet.end().await;
}

#[tokio::test]
async fn controllers_that_were_taught_go_along_into_the_installer() {
    let mut fleet = Fleet::with_token().await;
    let sha256 = fleet.controller.store(image(true));
    let mut session = fleet.controller.session().await;
    session.next().await.unwrap();
    let protocol_version = PROTOCOL_VERSION;
    let welcome = Welcome { controllers: vec!["127.0.0.1:9".into()], protocol_version, ..Welcome::default() };
    session.say(connect_response::Message::Welcome(welcome)).await;
    assign(&session, 1, install(&sha256)).await;
    reported(&mut session, WireState::Rebooting).await;
    let job = std::fs::read(fleet.pi().join("recovery/marco/install.json")).unwrap();
    let job: serde_json::Value = serde_json::from_slice(&job).unwrap();
    let known: Vec<&str> = job["controllers"].as_array().unwrap().iter().filter_map(|known| known.as_str()).collect();
    assert_eq!(known, [fleet.controller.address.as_str(), "127.0.0.1:9"]);
    fleet.end().await;
}

#[tokio::test]
async fn an_image_that_does_not_come_up_fails_after_three_trials_and_the_next_one_is_installed() {
    let mut fleet = Fleet::with_token().await;
    let (bad, good) = (fleet.controller.store(image(false)), fleet.controller.store(image(true)));
    let (mut session, _) = fleet.session().await;
    assign(&session, 1, install(&bad)).await;
    reported(&mut session, WireState::Rebooting).await;
    let mut sequence = 0;
    for _ in 0..3 {
        let (opened, hello) = fleet.session().await;
        session = opened;
        assert_eq!(hello.mode(), NodeMode::Installer);
        let installing = reported(&mut session, WireState::Running).await;
        assert!(installing.sequence > sequence);
        sequence = reported(&mut session, WireState::Rebooting).await.sequence;
    }
    let (mut session, hello) = fleet.session().await;
    assert_eq!(hello.mode(), NodeMode::Installer);
    let failed = reported(&mut session, WireState::Failed).await;
    assert!(failed.sequence > sequence);
    assert_eq!(failed.error.unwrap().reason, "IMAGE_DID_NOT_COME_UP");

    assign(&session, 2, install(&good)).await;
    reported(&mut session, WireState::Rebooting).await;
    let (mut session, hello) = fleet.session().await;
    assert_eq!(hello.mode(), NodeMode::Running);
    let done = reported(&mut session, WireState::Succeeded).await;
    assert_eq!(done.execution, execution(2));
    fleet.end().await;
}

#[tokio::test]
async fn an_image_that_the_controller_does_not_have_brings_the_old_system_back_with_the_reason() {
    let mut fleet = Fleet::with_token().await;
    let (mut session, old) = fleet.session().await;
    assign(&session, 1, install(&"a".repeat(64))).await;
    reported(&mut session, WireState::Rebooting).await;
    let (mut installer, hello) = fleet.session().await;
    assert_eq!(hello.mode(), NodeMode::Installer);
    reported(&mut installer, WireState::Rebooting).await;
    let (mut session, hello) = fleet.session().await;
    assert_eq!(hello.mode(), NodeMode::Running);
    assert_eq!(hello.system, old.system);
    let back = reported(&mut session, WireState::RolledBack).await;
    assert_eq!(back.error.unwrap().reason, "DOWNLOAD_REFUSED");
    fleet.end().await;
}

#[tokio::test]
async fn boot_files_alone_are_replaced_with_the_root_left_as_it_is() {
    let mut fleet = Fleet::with_token().await;
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default();
    for (name, text) in [
        ("kernel8.img", "another kernel"),
        ("cmdline.txt", "root=/dev/mmcblk0p2 rootwait"),
        ("config.txt", "arm_64bit=1"),
        ("bcm2711-rpi-4-b.dtb", "another device tree"),
    ] {
        zip.start_file(name, options).unwrap();
        zip.write_all(text.as_bytes()).unwrap();
    }
    let sha256 = fleet.controller.store(zip.finish().unwrap().into_inner());
    let (mut session, old) = fleet.session().await;
    let mark = fleet.pi().join("root/etc/mark");
    std::fs::write(&mark, "mine").unwrap();
    let update = Update {
        bootcode: "artifacts/boot".into(),
        bootcode_sha256: sha256.clone(),
        notice: at_once(),
        ..Update::default()
    };
    assign(&session, 1, assign::Action::Update(update)).await;
    reported(&mut session, WireState::Rebooting).await;
    let (mut session, _) = fleet.session().await;
    reported(&mut session, WireState::Rebooting).await;
    let (mut session, new) = fleet.session().await;
    assert_eq!(new.mode(), NodeMode::Running);
    assert_eq!(new.system.as_ref().unwrap().os, old.system.unwrap().os);
    let verifying = reported(&mut session, WireState::Verifying).await;
    assert_eq!(verifying.release.unwrap().boot_sha256, sha256);
    reported(&mut session, WireState::Succeeded).await;
    assert_eq!(std::fs::read_to_string(mark).unwrap(), "mine");
    assert_eq!(std::fs::read_to_string(fleet.pi().join("boot/kernel8.img")).unwrap(), "another kernel");
    fleet.end().await;
}
