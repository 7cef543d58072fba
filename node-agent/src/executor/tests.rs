//! The executor on a machine that only records its calls, with a real recovery partition.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use chrono::DateTime;
use marco_proto::v1::ImageFacts;
use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::{Addresses, DID_NOT_REBOOT, Executor, Settings};
use crate::bootpart::{BootPart, Instruction};
use crate::download::tests::{Wrong, serve_judged};
use crate::job::{Action, Artifact, DID_NOT_POWER_OFF, Failure, Notice, RELEASE_MISMATCH, State, Update};
use crate::journal::{Confirmation, FILE_NAME, Journal, Verdict};
use crate::system::virtual_pi::{Options, VirtualPi};
use crate::system::{Mode, Refusal, Release, System as _};
use machine::Machine;

mod console;
mod ill;
mod installer;
mod judged;
mod machine;
mod outage;
mod switch;
mod users;

const ONE: &str = "operations/0198a6e0-0000-7000-8000-000000000001/executions/pi-01";
const TWO: &str = "operations/0198a6e0-0000-7000-8000-000000000002/executions/pi-01";
const DEADLINE: Duration = Duration::from_secs(30);
/// Notice that is long enough for a cancel.
const LONG: Duration = Duration::from_secs(3600);
/// Notice that is over soon.
const SHORT: Duration = Duration::from_millis(30);
/// The image of every update; nothing unpacks it.
const IMAGE: &[u8] = b"raspios";

/// A machine with a card, and the limits and answers that its executor meets.
struct Bench {
    _dir: tempfile::TempDir,
    machine: Machine,
    verdict: Duration,
    confirmation: Duration,
    max_pause: Duration,
    /// Outcome of the image's download.
    fault: Wrong,
    /// The controller's answer about the image's facts.
    said: Option<ImageFacts>,
    /// A controller has confirmed the jobs of earlier processes.
    heard: bool,
}

/// Waits until the machine is told to go down.
async fn goes_down(machine: &Machine) {
    while machine.told().is_empty() {
        tokio::task::yield_now().await;
    }
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { boot_time: Duration::ZERO, shutdown_time: Duration::ZERO, blank: false, stock: false };
        let path = dir.path().join("pi-01");
        let pi = VirtualPi::open(&path, "pi-01", options).unwrap();
        let facts = pi.facts().unwrap();
        std::fs::create_dir_all(path.join("agent")).unwrap();
        for name in ["node.key", "node.crt", "ca.crt"] {
            std::fs::write(path.join("agent").join(name), name).unwrap();
        }
        let told = Mutex::default();
        let boot_id = "boot-a".to_owned();
        let mode = Mode::Running;
        let (release, refusal, unkept, patience) = (None, None, None, LONG);
        let machine =
            Machine { dir: path, boot_id, mode, facts, release, refusal, unkept, patience, told, broken: false };
        Self {
            _dir: dir,
            machine,
            verdict: LONG,
            confirmation: LONG,
            max_pause: Duration::from_secs(60),
            // No installation gets further than its download.
            fault: Wrong::Withheld,
            said: Some(judged::good()),
            heard: true,
        }
    }

    fn recovery(&self) -> BootPart {
        BootPart::new(self.machine.dir.join("recovery"), &self.machine.facts.board)
    }

    /// Boots the machine again, with no calls recorded yet.
    fn reboot(mut self, boot_id: &str, mode: Mode) -> Self {
        self.machine.boot_id = boot_id.to_owned();
        self.machine.mode = mode;
        self.machine.told = Mutex::default();
        self
    }

    fn journal(&self) -> Arc<Journal> {
        Arc::new(Journal::open(&self.machine.state_dir(), &self.machine.boot_id).unwrap())
    }

    /// Runs the executor until `done`, then kills it.
    async fn run(self, journal: &Arc<Journal>, done: impl AsyncFnOnce(&Arc<Journal>, &Machine)) -> Self {
        let Self { _dir, machine, verdict, confirmation, max_pause, fault, said, heard } = self;
        let machine = Arc::new(machine);
        let (downloader, _controller) = serve_judged(IMAGE.into(), Arc::new(move |_| fault), said.clone()).await;
        let executor = Executor::new(
            machine.clone(),
            journal.clone(),
            downloader,
            Settings {
                node: "pi-01".into(),
                addresses: Arc::new(|| Addresses {
                    controllers: vec!["controller:1346".into()],
                    enroll: "controller:1347".into(),
                }),
                farewell: Duration::ZERO,
                verdict,
                confirmation,
                max_pause,
                now: Arc::new(|| DateTime::UNIX_EPOCH),
                labels: tokio::sync::watch::channel(None).1,
            },
        )
        .unwrap();
        // As `run::run` does it: first the outcome of the boot, then the session.
        executor.settle().await;
        for entry in journal.entries().iter().filter(|_| heard) {
            journal.note_confirmation(&entry.execution, Confirmation::Stands);
        }
        let stop = CancellationToken::new();
        let task = tokio::spawn({
            let stop = stop.clone();
            async move { executor.run(stop).await }
        });
        tokio::time::timeout(DEADLINE, done(journal, &machine)).await.expect("it did not come to that");
        stop.cancel();
        task.await.unwrap();
        // Fails if the executor left a task or a thread behind that still holds the machine.
        let machine = Arc::into_inner(machine).unwrap();
        Self { _dir, machine, verdict, confirmation, max_pause, fault, said, heard }
    }
}

fn image_sha256() -> String {
    hex::encode(Sha256::digest(IMAGE))
}

fn notice(delay: Duration) -> Notice {
    Notice { delay, message: "maintenance".into() }
}

fn reboot(delay: Duration) -> Action {
    Action::Reboot(notice(delay))
}

fn update(delay: Duration) -> Action {
    let image = Artifact { id: "raspios.tar.gz".into(), sha256: image_sha256() };
    Action::Update(Update {
        image: Some(image),
        bootcode: None,
        notice: notice(delay),
        discard_home: false,
        raw: false,
    })
}

async fn reaches(journal: &Arc<Journal>, execution: &str, state: State) {
    let mut changes = journal.changes();
    let there = changes.wait_for(|all| all.get(execution).is_some_and(|entry| entry.state == state)).await;
    there.unwrap();
}

async fn phase(journal: &Arc<Journal>, phase: &str) {
    journal.progress().wait_for(|progress| progress.phase == phase).await.unwrap();
}

fn error(journal: &Journal, execution: &str) -> Failure {
    journal.entries().get(execution).unwrap().error.clone().unwrap()
}

#[tokio::test]
async fn a_machine_is_told_to_reboot_only_after_the_notice_and_with_armed_on_the_disk() {
    let bench = Bench::new();
    let journal = bench.journal();
    journal.accept(ONE, 1, reboot(SHORT)).await.unwrap();
    let began = tokio::time::Instant::now();
    let bench = bench
        .run(&journal, async |journal, machine| {
            phase(journal, "restarting").await;
            assert!(began.elapsed() >= SHORT);
            while machine.told().len() < 2 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    assert_eq!(bench.machine.told(), ["announce Reboot 30ms maintenance", "reboot Plain Armed"]);
}

#[tokio::test]
async fn a_machine_that_does_not_go_down_is_told_ever_more_strongly_and_then_the_job_failed() {
    let mut bench = Bench::new();
    bench.machine.patience = SHORT;
    let journal = bench.journal();
    journal.accept(ONE, 1, reboot(SHORT)).await.unwrap();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Failed).await).await;
    assert_eq!(error(&journal, ONE).reason, DID_NOT_REBOOT);
    let orders = ["reboot Plain Armed", "force Reboot Plain Services Armed", "force Reboot Plain Everything Armed"];
    assert_eq!(bench.machine.told()[1..4], orders);
}

#[tokio::test]
async fn a_reboot_that_is_cancelled_during_its_notice_never_happens() {
    let bench = Bench::new();
    let journal = bench.journal();
    journal.accept(ONE, 1, reboot(LONG)).await.unwrap();
    let bench = bench
        .run(&journal, async |journal, _| {
            phase(journal, "waiting for the notice to pass").await;
            journal.request_cancel(ONE).await.unwrap();
            reaches(journal, ONE, State::Cancelled).await;
        })
        .await;
    assert_eq!(bench.machine.told(), ["announce Reboot 3600s maintenance", "withdraw"]);
}

#[tokio::test]
async fn a_cancel_that_came_while_the_agent_was_dead_is_heeded_at_its_start() {
    let bench = Bench::new();
    let journal = bench.journal();
    journal.accept(ONE, 1, reboot(SHORT)).await.unwrap();
    journal.request_cancel(ONE).await.unwrap();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Cancelled).await).await;
    assert!(!bench.machine.told().iter().any(|told| told.starts_with("reboot")));
}

#[tokio::test]
async fn an_agent_killed_after_armed_repeats_the_command_under_the_same_boot_only() {
    let bench = Bench::new();
    let journal = bench.journal();
    journal.accept(ONE, 1, reboot(SHORT)).await.unwrap();
    journal.arm(ONE).await.unwrap();
    let journal = bench.journal();
    let bench = bench.run(&journal, async |_, machine| goes_down(machine).await).await;
    assert_eq!(bench.machine.told(), ["reboot Plain Armed"]);

    let bench = bench.reboot("boot-b", Mode::Running);
    let journal = bench.journal();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Succeeded).await).await;
    assert_eq!(bench.machine.told(), [""; 0]);
    assert_eq!(journal.entries().get(ONE).unwrap().boot_id, "boot-b");
}

#[tokio::test]
async fn a_power_off_that_did_not_happen_does_not_happen_later() {
    let bench = Bench::new();
    let journal = bench.journal();
    journal.accept(ONE, 1, Action::PowerOff(notice(Duration::ZERO))).await.unwrap();
    journal.arm(ONE).await.unwrap();
    let journal = bench.journal();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Failed).await).await;
    // The boot id is the same, so the command had no effect. A user may be at the machine by now.
    assert_eq!(error(&journal, ONE).reason, DID_NOT_POWER_OFF);
    assert_eq!(bench.machine.told(), [""; 0]);
}

#[tokio::test]
async fn the_next_job_is_done_after_the_one_before() {
    let mut bench = Bench::new();
    bench.machine.patience = SHORT;
    let journal = bench.journal();
    journal.accept(ONE, 1, reboot(LONG)).await.unwrap();
    let bench = bench
        .run(&journal, async |journal, _| {
            phase(journal, "waiting for the notice to pass").await;
            journal.request_cancel(ONE).await.unwrap();
            reaches(journal, ONE, State::Cancelled).await;
            journal.accept(TWO, 1, Action::PowerOff(notice(Duration::ZERO))).await.unwrap();
            phase(journal, "powering off").await;
            reaches(journal, TWO, State::Failed).await;
        })
        .await;
    assert_eq!(bench.machine.told().get(3).unwrap(), "power off Armed");
}

#[tokio::test]
async fn an_update_that_is_refused_by_preflight_writes_nothing() {
    let mut bench = Bench::new();
    bench.machine.refusal = Some(Refusal { reason: "UNDER_VOLTAGE", message: "the supply is too weak".into() });
    let journal = bench.journal();
    journal.accept(ONE, 1, update(SHORT)).await.unwrap();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Failed).await).await;
    assert_eq!(error(&journal, ONE).reason, "UNDER_VOLTAGE");
    assert_eq!(bench.recovery().read_job().unwrap(), None);
    assert_eq!(bench.machine.told(), [""; 0], "nothing was announced, so nothing is taken back");
}

/// Runs an update up to the command to boot the installer.
async fn armed_update() -> Bench {
    let bench = Bench::new();
    let journal = bench.journal();
    journal.accept(ONE, 7, update(SHORT)).await.unwrap();
    bench
        .run(&journal, async |journal, machine| {
            reaches(journal, ONE, State::Armed).await;
            while machine.told().len() < 2 {
                tokio::task::yield_now().await;
            }
        })
        .await
}

#[tokio::test]
async fn an_update_leaves_the_installer_all_it_needs_before_it_is_armed() {
    let bench = armed_update().await;
    assert_eq!(bench.machine.told(), ["announce Reboot 30ms maintenance", "reboot TryBoot Armed"]);
    let job = bench.recovery().read_job().unwrap().unwrap();
    assert_eq!(
        job.instruction,
        Instruction::Install { image: "raspios.tar.gz".into(), sha256: image_sha256(), raw: false }
    );
    // 2 is the sequence of ARMED, which is not journalled yet when the job is written.
    assert_eq!((job.execution.as_str(), job.attempt, job.sequence), (ONE, 7, 2));
    assert_eq!(job.controllers, ["controller:1346"]);
    let recovery = bench.machine.dir.join("recovery");
    let config = std::fs::read_to_string(recovery.join("installer-config.txt")).unwrap();
    assert_eq!(config, "export OS_IMG=raspios\n");
    for name in ["node.key", "node.crt", "ca.crt"] {
        assert!(recovery.join("marco").join(name).exists(), "{name}");
    }

    let bench = bench.reboot("boot-b", Mode::Installer);
    let entries = bench.journal().entries();
    let entry = entries.get(ONE).unwrap();
    assert_eq!((entry.state, entry.sequence, entry.attempt), (State::Armed, 2, 7));
}

#[tokio::test]
async fn the_old_system_that_comes_back_reports_a_rollback_and_cleans_the_card() {
    let bench = armed_update().await.reboot("boot-c", Mode::Running);
    let journal = bench.journal();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::RolledBack).await).await;
    assert_eq!(error(&journal, ONE).reason, "OLD_SYSTEM_CAME_BACK");
    assert_eq!(bench.recovery().read_job().unwrap(), None);
    assert!(!bench.machine.dir.join("recovery/marco/node.key").exists());
    assert!(!bench.machine.dir.join("recovery/marco").join(FILE_NAME).exists());
    assert_eq!(bench.machine.told(), [""; 0]);
}

#[tokio::test]
async fn the_key_is_not_on_the_card_while_the_notice_passes() {
    let bench = Bench::new();
    let journal = bench.journal();
    // A system on a stock card mounts this partition for every user to read.
    let folder = bench.machine.dir.join("recovery/marco");
    let on_card = || ["node.key", "node.crt", "next.key"].into_iter().find(|name| folder.join(name).exists());
    journal.accept(ONE, 1, update(LONG)).await.unwrap();
    bench
        .run(&journal, async |journal, _| {
            phase(journal, "waiting for the notice to pass").await;
            assert_eq!(on_card(), None, "every user of a stock card's system can read it there");
            journal.request_cancel(ONE).await.unwrap();
            reaches(journal, ONE, State::Cancelled).await;
        })
        .await;
    assert_eq!(on_card(), None);
}

#[tokio::test]
async fn an_update_that_is_cancelled_during_its_notice_leaves_no_job_on_the_card() {
    let bench = Bench::new();
    let journal = bench.journal();
    journal.accept(ONE, 1, update(LONG)).await.unwrap();
    let bench = bench
        .run(&journal, async |journal, _| {
            phase(journal, "waiting for the notice to pass").await;
            journal.request_cancel(ONE).await.unwrap();
            reaches(journal, ONE, State::Cancelled).await;
        })
        .await;
    assert_eq!(bench.recovery().read_job().unwrap(), None);
    assert_eq!(bench.machine.told(), ["announce Reboot 3600s maintenance", "withdraw"]);
}

/// Brings the machine into its new system, after the trial boot. The release names the execution `release`.
async fn on_trial(release: &str) -> Bench {
    let bench = armed_update().await.reboot("boot-b", Mode::Installer);
    let installer = bench.journal();
    installer.install(ONE).await.unwrap();
    let state = bench.machine.dir.join("root/var/lib/marco-agent");
    std::fs::write(state.join(FILE_NAME), installer.for_the_new_root(ONE).unwrap()).unwrap();
    installer.try_boot(ONE).await.unwrap();
    bench.recovery().set_boot_partition(crate::bootpart::DefaultBoot::Installer).unwrap();
    let mut bench = bench.reboot("boot-c", Mode::Running);
    bench.machine.release = Some(Release {
        execution: release.into(),
        image_sha256: image_sha256(),
        boot_sha256: String::new(),
        time: String::new(),
    });
    bench
}

#[tokio::test]
async fn the_new_system_becomes_the_default_only_when_the_controller_has_accepted_it() {
    let bench = on_trial(ONE).await;
    let journal = bench.journal();
    let autoboot = bench.machine.dir.join("recovery/autoboot.txt");
    let before = std::fs::read_to_string(&autoboot).unwrap();
    let bench = bench
        .run(&journal, async |journal, _| {
            phase(journal, "waiting for the controller to accept the new system").await;
            let entries = journal.entries();
            let entry = entries.get(ONE).unwrap();
            assert_eq!((entry.state, entry.sequence), (State::Verifying, 5));
            assert_eq!(entry.release.as_ref().unwrap().image_sha256, image_sha256());
            // An acknowledgement is no verdict.
            journal.ack(ONE, entry.attempt, 5, 1).await.unwrap();
            assert!(journal.entries().get(ONE).unwrap().is_acked());
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
            assert_eq!(std::fs::read_to_string(&autoboot).unwrap(), before, "confirmed without the controller");
            journal.judge(ONE, Verdict::Accepted);
            reaches(journal, ONE, State::Succeeded).await;
        })
        .await;
    assert_ne!(std::fs::read_to_string(&autoboot).unwrap(), before);
    // The next start tidies the card, at whatever point the last one was killed.
    let journal = bench.journal();
    let bench = bench.run(&journal, async |_, _| {}).await;
    assert_eq!(bench.recovery().read_job().unwrap(), None);
    assert!(!bench.machine.dir.join("recovery/marco/node.key").exists());
}

#[tokio::test]
async fn a_new_system_that_is_not_accepted_gives_the_machine_back_to_the_installer() {
    let mut bench = on_trial(ONE).await;
    bench.verdict = SHORT;
    let journal = bench.journal();
    let bench = bench.run(&journal, async |_, machine| goes_down(machine).await).await;
    assert_eq!(bench.machine.told(), ["reboot Plain Verifying"]);
}

#[tokio::test]
async fn refused_system_gives_the_machine_back_at_once() {
    let bench = on_trial(ONE).await;
    let journal = bench.journal();
    let bench = bench
        .run(&journal, async |journal, machine| {
            phase(journal, "waiting for the controller to accept the new system").await;
            journal.judge(ONE, Verdict::Refused(Failure::new("NOT_VERIFIED", "it is another one")));
            goes_down(machine).await;
        })
        .await;
    assert_eq!(bench.machine.told(), ["reboot Plain Verifying"]);
    assert_eq!(bench.recovery().default_boot().unwrap(), crate::bootpart::DefaultBoot::Installer);
}

#[tokio::test]
async fn another_system_than_the_one_installed_is_no_success() {
    let bench = on_trial(TWO).await;
    let journal = bench.journal();
    bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Failed).await).await;
    assert_eq!(error(&journal, ONE).reason, RELEASE_MISMATCH);
}
