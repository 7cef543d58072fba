//! A machine that only records its calls.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;

use crate::journal::Journal;
use crate::system::scheduled::Schedule;
use crate::system::{
    Booted, Card, Down, Erase, Facts, Force, Mode, Reboot, Refusal, Release, Standing, System, SystemError, Target,
};

/// A machine that stays up after every command.
pub(super) struct Machine {
    pub(super) dir: PathBuf,
    pub(super) boot_id: String,
    pub(super) mode: Mode,
    pub(super) facts: Facts,
    pub(super) release: Option<Release>,
    pub(super) refusal: Option<Refusal>,
    /// Refusal of an update that keeps the home; `None`: it can be kept.
    pub(super) unkept: Option<Refusal>,
    pub(super) patience: Duration,
    /// No file system can be made on its card.
    pub(super) broken: bool,
    /// Calls in order; a command to go down with the state that was in the journal then.
    pub(super) told: Mutex<Vec<String>>,
}

impl Machine {
    fn tell(&self, what: impl Into<String>) {
        self.told.lock().unwrap().push(what.into());
    }

    pub(super) fn told(&self) -> Vec<String> {
        self.told.lock().unwrap().clone()
    }

    /// While this file exists, a user sits at the console after a failure.
    pub(super) fn shell(&self) -> PathBuf {
        self.dir.join("shell")
    }

    pub(super) fn schedule(&self) -> Schedule {
        Schedule { file: self.dir.join("scheduled"), ours: self.dir.join("scheduled-by-agent") }
    }

    /// The job's state in the journal on the disk, as a power cut would leave it.
    fn journalled(&self, execution: Option<&str>) -> String {
        let Some(execution) = execution else { return "idle".to_owned() };
        let journal = Journal::open(&self.state_dir(), "reader").unwrap();
        format!("{:?}", journal.entries().get(execution).unwrap().state)
    }
}

#[async_trait]
impl System for Machine {
    fn boot_id(&self) -> Result<String, SystemError> {
        Ok(self.boot_id.clone())
    }
    fn facts(&self) -> Result<Facts, SystemError> {
        Ok(self.facts.clone())
    }
    fn mode(&self) -> Mode {
        self.mode
    }
    fn booted(&self) -> Option<Booted> {
        // The tests get no further than the first trial boot of the installer.
        (self.mode == Mode::Installer).then_some(Booted { partition: 1, tryboot: true })
    }
    fn card(&self) -> Option<Card> {
        let part = |name| self.dir.join(name);
        Some(Card { recovery: part("recovery"), boot: part("boot"), root: part("root"), home: part("home") })
    }
    fn root(&self) -> PathBuf {
        self.dir.join("root")
    }
    fn state_dir(&self) -> PathBuf {
        match self.mode {
            Mode::Running => self.dir.join("root/var/lib/marco-agent"),
            Mode::Installer => self.dir.join("recovery/marco"),
        }
    }
    fn identity_dir(&self) -> PathBuf {
        self.dir.join("agent")
    }
    fn release(&self) -> Result<Option<Release>, SystemError> {
        Ok(self.release.clone())
    }
    async fn announce(&self, down: Down, delay: Duration, message: &str) -> Result<bool, SystemError> {
        self.tell(format!("announce {down:?} {delay:?} {message}"));
        Ok(self.schedule().announce(down, delay, message).unwrap())
    }
    fn standing(&self) -> Standing {
        self.schedule().standing()
    }
    async fn withdraw(&self) -> Result<(), SystemError> {
        if self.schedule().withdraw().unwrap() {
            self.tell("withdraw");
        }
        Ok(())
    }
    async fn reboot(&self, how: Reboot, execution: Option<&str>, _message: &str) -> Result<(), SystemError> {
        self.tell(format!("reboot {how:?} {}", self.journalled(execution)));
        Ok(())
    }
    async fn power_off(&self, execution: Option<&str>, _message: &str) -> Result<(), SystemError> {
        self.tell(format!("power off {}", self.journalled(execution)));
        Ok(())
    }
    async fn force(&self, down: Down, how: Reboot, force: Force, execution: Option<&str>) -> Result<(), SystemError> {
        self.tell(format!("force {down:?} {how:?} {force:?} {}", self.journalled(execution)));
        Ok(())
    }
    fn gives_up_after(&self) -> Option<Duration> {
        self.shell().exists().then_some(Duration::ZERO)
    }
    async fn give_up(&self) -> Result<(), SystemError> {
        self.tell("shell");
        while self.shell().exists() {
            tokio::task::yield_now().await;
        }
        Ok(())
    }
    fn patience(&self) -> Duration {
        self.patience
    }
    async fn preflight_update(&self) -> Result<(), Refusal> {
        self.refusal.clone().map_or(Ok(()), Err)
    }
    async fn check_kept(&self, erase: Erase) -> Result<(), Refusal> {
        if erase.home { Ok(()) } else { self.unkept.clone().map_or(Ok(()), Err) }
    }
    async fn prepare_target(&self, _erase: Erase) -> Result<Target, SystemError> {
        self.tell("prepare");
        if self.broken {
            return Err(SystemError::io("make", "/dev/mmcblk0p2")(std::io::Error::other("mkfs ended with status 1")));
        }
        Err(SystemError::Unsupported("not here"))
    }
    async fn finish_target(&self, _target: Target) -> Result<(), SystemError> {
        Err(SystemError::Unsupported("not here"))
    }
}
