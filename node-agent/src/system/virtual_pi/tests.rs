use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::log::{Event, Line};
use super::{Options, VirtualPi};
use crate::bootpart::{BootPart, DefaultBoot};
use crate::system::{Down, Erase, Force, Mode, Reboot, System};

const SOON: Duration = Duration::from_secs(20);
const FAST: Options = Options {
    boot_time: Duration::from_millis(5),
    shutdown_time: Duration::from_millis(5),
    blank: false,
    stock: false,
};

/// A powered Pi. Its agent hands over its `System` and then does nothing.
pub(crate) struct Powered {
    pub(crate) pi: Arc<VirtualPi>,
    boots: mpsc::Receiver<Arc<dyn System>>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Powered {
    pub(crate) fn new(dir: &Path) -> Self {
        let pi = VirtualPi::open(dir, "pi-01", FAST).unwrap();
        let (sender, boots) = mpsc::channel(16);
        let stop = CancellationToken::new();
        let (driven, stopped) = (Arc::clone(&pi), stop.clone());
        let task = tokio::spawn(async move {
            let agent = move |system: Arc<dyn System>,
                              terminate: CancellationToken|
                  -> futures_util::future::BoxFuture<'static, ()> {
                let sender = sender.clone();
                Box::pin(async move {
                    sender.send(system).await.unwrap();
                    terminate.cancelled().await;
                })
            };
            // The agent of these tests never returns by itself, so it is not waited for.
            let power = driven.power(agent, CancellationToken::new());
            tokio::select! {
                ended = power => ended.unwrap(),
                () = stopped.cancelled() => {}
            }
        });
        Self { pi, boots, stop, task }
    }

    pub(crate) async fn boot(&mut self) -> Arc<dyn System> {
        timeout(SOON, self.boots.recv()).await.expect("the Pi boots in time").unwrap()
    }

    pub(crate) async fn kill(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    pub(crate) fn bootpart(&self) -> BootPart {
        BootPart::new(self.pi.card().recovery, &self.pi.facts().unwrap().board)
    }
}

fn log(dir: &Path) -> Vec<Line> {
    let text = fs::read_to_string(dir.join("log.jsonl")).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn events(dir: &Path) -> Vec<Event> {
    log(dir).iter().map(|line| line.event).collect()
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = timeout(SOON, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

#[tokio::test]
async fn a_fresh_pi_runs_its_system() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    let system = powered.boot().await;
    assert_eq!(system.mode(), Mode::Running);
    assert_eq!(system.booted().map(|booted| (booted.partition, booted.tryboot)), Some((4, false)));
    assert_eq!(system.facts().unwrap().system.os, "Marco virtual system");
    assert_eq!(log(dir.path())[0].boot_id, system.boot_id().unwrap());
    powered.kill().await;
}

#[tokio::test]
async fn a_reboot_changes_the_boot_id_and_is_logged_once() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    let first = powered.boot().await.boot_id().unwrap();
    powered.pi.reboot(Reboot::Plain, Some("operations/x/executions/pi-01"), "now").await.unwrap();
    // A second command while the Pi goes down must leave no second line.
    powered.pi.reboot(Reboot::Plain, Some("operations/y/executions/pi-01"), "again").await.unwrap();
    assert_ne!(powered.boot().await.boot_id().unwrap(), first);
    let lines = log(dir.path());
    assert_eq!(events(dir.path()), [Event::Boot, Event::Reboot, Event::Boot]);
    assert_eq!(
        (lines[1].boot_id.as_str(), lines[1].execution.as_str()),
        (first.as_str(), "operations/x/executions/pi-01")
    );
    powered.kill().await;
}

#[tokio::test]
async fn a_pi_that_hangs_on_its_way_down_needs_the_stronger_command_and_keeps_the_argument() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    let first = powered.boot().await.boot_id().unwrap();
    // The file stands for a service that does not stop.
    fs::write(powered.pi.dir().join("stuck"), "").unwrap();
    powered.pi.reboot(Reboot::TryBoot, Some("operations/x/executions/pi-01"), "").await.unwrap();
    assert_eq!(powered.pi.boot_id().unwrap(), first);
    assert_eq!(events(dir.path()), [Event::Boot]);
    let by = Some("operations/x/executions/pi-01");
    powered.pi.force(Down::Reboot, Reboot::TryBoot, Force::Services, by).await.unwrap();
    assert_eq!(powered.boot().await.mode(), Mode::Installer);
    assert_eq!(events(dir.path()), [Event::Boot, Event::Reboot, Event::Boot]);
    powered.kill().await;
}

#[tokio::test]
async fn a_trial_boot_starts_the_installer_once() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    powered.boot().await;
    powered.pi.reboot(Reboot::TryBoot, None, "").await.unwrap();
    let system = powered.boot().await;
    assert_eq!((system.mode(), system.booted().unwrap().tryboot), (Mode::Installer, true));
    assert!(system.state_dir().ends_with("recovery/marco"));
    // The trial flag is one-shot: this reboot returns to the default.
    system.reboot(Reboot::Plain, None, "").await.unwrap();
    assert_eq!(powered.boot().await.mode(), Mode::Running);
    powered.kill().await;
}

#[tokio::test]
async fn a_power_cut_boots_anew_and_forgets_the_trial() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    let first = powered.boot().await.boot_id().unwrap();
    powered.pi.reboot(Reboot::TryBoot, None, "").await.unwrap();
    let trial = powered.boot().await.boot_id().unwrap();
    fs::write(dir.path().join("power-cut"), "").unwrap();
    let system = powered.boot().await;
    assert_eq!(system.mode(), Mode::Running);
    assert!(![first, trial].contains(&system.boot_id().unwrap()));
    assert_eq!(events(dir.path()), [Event::Boot, Event::Reboot, Event::Boot, Event::PowerCut, Event::Boot]);
    assert_eq!(log(dir.path())[4].after, "power-cut");
    assert!(!dir.path().join("power-cut").exists());
    powered.kill().await;
}

#[tokio::test]
async fn a_pi_that_is_off_starts_at_the_button() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    powered.boot().await;
    powered.pi.power_off(None, "").await.unwrap();
    until("off", || powered.pi.boot_id().is_err()).await;
    fs::write(dir.path().join("power-on"), "").unwrap();
    powered.boot().await;
    assert_eq!(events(dir.path()), [Event::Boot, Event::PowerOff, Event::Boot]);
    powered.kill().await;
}

#[tokio::test]
async fn a_killed_agent_finds_the_same_boot() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    let boot_id = powered.boot().await.boot_id().unwrap();
    powered.kill().await;
    let mut powered = Powered::new(dir.path());
    assert_eq!(powered.boot().await.boot_id().unwrap(), boot_id);
    assert_eq!(events(dir.path()), [Event::Boot]);
    powered.kill().await;
}

#[tokio::test]
async fn a_line_that_a_kill_left_out_is_written_at_the_next_start() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    powered.boot().await;
    powered.kill().await;
    // As after a kill between the commit of the state and the line of the log.
    fs::remove_file(dir.path().join("log.jsonl")).unwrap();
    let mut powered = Powered::new(dir.path());
    powered.boot().await;
    assert_eq!(events(dir.path()), [Event::Boot]);
    powered.kill().await;
}

#[tokio::test]
async fn two_processes_cannot_drive_one_pi() {
    let dir = TempDir::new().unwrap();
    let _first = VirtualPi::open(dir.path(), "pi-01", FAST).unwrap();
    assert!(VirtualPi::open(dir.path(), "pi-01", FAST).is_err());
}

#[tokio::test]
async fn with_the_installer_as_default_a_system_that_does_not_come_up_brings_it_back() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    powered.boot().await;
    powered.bootpart().set_boot_partition(DefaultBoot::Installer).unwrap();
    powered.pi.reboot(Reboot::Plain, None, "").await.unwrap();
    let installer = powered.boot().await;
    assert_eq!(installer.mode(), Mode::Installer);
    let target = installer.prepare_target(Erase { root: true, home: false }).await.unwrap();
    assert_eq!(fs::read_dir(&target.root).unwrap().count() + fs::read_dir(&target.boot).unwrap().count(), 0);
    drop(target);
    // p4 is empty now, so the trial fails and the watchdog resets the board.
    installer.reboot(Reboot::TryBoot, None, "").await.unwrap();
    let back = powered.boot().await;
    assert_eq!((back.mode(), back.booted().unwrap().tryboot), (Mode::Installer, false));
    assert_eq!(log(dir.path()).last().unwrap().after, "watchdog");
    powered.kill().await;
}

#[tokio::test]
async fn a_pi_that_never_comes_up_stays_off_in_the_end() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    powered.boot().await;
    fs::remove_file(dir.path().join("root/sbin/init")).unwrap();
    powered.pi.reboot(Reboot::Plain, None, "").await.unwrap();
    until("off", || fs::read_to_string(dir.path().join("pi.json")).unwrap().contains("\"power\": \"off\"")).await;
    assert_eq!(events(dir.path()), [Event::Boot, Event::Reboot]);
    powered.kill().await;
}

#[tokio::test]
async fn a_second_installation_waits_until_nothing_writes_any_more() {
    let dir = TempDir::new().unwrap();
    let mut powered = Powered::new(dir.path());
    powered.boot().await;
    powered.bootpart().set_boot_partition(DefaultBoot::Installer).unwrap();
    powered.pi.reboot(Reboot::Plain, None, "").await.unwrap();
    let installer = powered.boot().await;
    let erase = Erase { root: true, home: true };
    let first = installer.prepare_target(erase).await.unwrap();
    // The first target's lease stands for a thread that still writes.
    let second = tokio::spawn(async move { installer.prepare_target(erase).await.unwrap() });
    tokio::task::yield_now().await;
    assert!(!second.is_finished());
    drop(first);
    timeout(SOON, second).await.unwrap().unwrap();
    powered.kill().await;
}

#[test]
fn the_same_id_is_always_the_same_board() {
    let (one, two) = (super::board("pi-01"), super::board("pi-02"));
    assert_eq!(one, super::board("pi-01"));
    assert_ne!(one.serial, two.serial);
    assert_eq!(one.serial.len(), 16);
    assert_eq!(one.macs[0].len(), 17);
}
