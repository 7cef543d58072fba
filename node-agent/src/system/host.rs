//! The machine that the agent runs on: a Raspberry Pi, or any other Linux host, under systemd.
//!
//! It reboots and powers off. It is updated if [`Host::card`] finds a card that an installer can work on. Its recovery
//! partition is mounted read-only except while it is written. The installer's operations are unsupported here.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};

use super::rooted::Rooted;
use super::scheduled::{Schedule, Standing};
use super::test_firmware::TestFirmware;
use super::{
    Booted, Card, Down, Erase, Facts, Force, LOG_FILE, Layout, Mode, OwnLog, Reboot, Refusal, STARTED_AGAIN, System,
    SystemError, SystemFacts, Target,
};

use crate::health::{Ailment, Condition};

pub(super) mod board;
mod card;
mod preflight;

use card::FoundCard;

/// Time limit of a command, which only talks to logind.
const COMMAND_TIME: Duration = Duration::from_secs(30);
/// systemd reads the argument of reboot(2) from here (systemd-reboot.service(8)).
const REBOOT_PARAM: &str = "run/systemd/reboot-param";
/// logind's file with the announced shutdown.
const SCHEDULED: &str = "run/systemd/shutdown/scheduled";
/// A copy of it, if the agent announced it.
const SCHEDULED_BY_US: &str = "run/marco-agent/scheduled";
/// The firmware's word for a trial boot, after the partition number 0, "the default".
const TRYBOOT: &str = "0 tryboot";
/// From util-linux: warns users if logind cannot be asked to.
const WALL: &str = "/usr/bin/wall";
/// logind's scheduled warnings count in minutes.
const MINUTE: Duration = Duration::from_secs(60);

/// Paths and commands of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostOptions {
    /// Root under which `/proc`, `/sys`, `/etc` and `/run` are read; `/` except in tests.
    pub sysroot: PathBuf,
    /// The journal's folder.
    pub state_dir: PathBuf,
    /// The identity's folder.
    pub identity_dir: PathBuf,
    /// Mount points for the recovery partition, and for the boot partition if nothing else mounts it.
    pub mounts: PathBuf,
    /// shutdown(8) by its absolute path, and arguments that precede the agent's.
    pub shutdown_command: Vec<String>,
    /// systemctl(1) and arguments, for a shutdown that needs force. Empty: the shutdown command is repeated, since a
    /// machine with a command of its own may have no systemd.
    pub force_command: Vec<String>,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            sysroot: "/".into(),
            state_dir: "/var/lib/marco-agent".into(),
            identity_dir: "/var/lib/marco-agent".into(),
            mounts: "/run/marco-agent".into(),
            shutdown_command: vec!["/sbin/shutdown".into()],
            force_command: vec!["/bin/systemctl".into()],
        }
    }
}

/// Kind of the last warning to users.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Warned {
    /// No warning, or it was taken back.
    #[default]
    Not,
    /// By a shutdown in logind, which every user can see.
    Visibly,
    /// By a shutdown command that leaves no visible record.
    Blindly,
    /// By text on their terminals.
    ByWall,
}

/// This machine.
#[derive(Debug)]
pub struct Host {
    options: HostOptions,
    warned: Mutex<Warned>,
    test: Option<TestFirmware>,
    card: FoundCard,
    log: OwnLog,
}

impl Host {
    /// Opens this machine with these paths and commands.
    ///
    /// # Errors
    /// The shutdown command is empty or not an absolute path.
    pub fn new(options: HostOptions) -> Result<Self, SystemError> {
        if options.shutdown_command.first().is_none_or(|program| !program.starts_with('/')) {
            return Err(SystemError::Invalid("shutdown_command must begin with the absolute path of a program".into()));
        }
        let test = TestFirmware::find(&options.sysroot);
        Ok(Self { options, warned: Mutex::default(), test, card: FoundCard::default(), log: OwnLog::default() })
    }

    /// Sets the source of this agent's log.
    pub fn log_is_from(&self, read: impl Fn() -> Vec<u8> + Send + Sync + 'static) {
        self.log.is_from(read);
    }

    fn schedule(&self) -> Schedule {
        Schedule { file: self.path(SCHEDULED), ours: self.path(SCHEDULED_BY_US) }
    }

    /// Records how users were warned. Returns the record before.
    fn set_warned(&self, warned: Warned) -> Warned {
        std::mem::replace(&mut *self.warned.lock().unwrap_or_else(PoisonError::into_inner), warned)
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.options.sysroot.join(relative)
    }

    async fn shutdown(&self, arguments: &[&str]) -> Result<(), SystemError> {
        let prefix = self.options.shutdown_command.iter().map(String::as_str);
        run(&prefix.chain(arguments.iter().copied()).collect::<Vec<_>>()).await
    }

    /// Runs a reboot command. Its argument goes into systemd's file first, which every way to reboot reads.
    async fn with_argument(
        &self,
        how: Reboot,
        command: impl Future<Output = Result<(), SystemError>>,
    ) -> Result<(), SystemError> {
        let parameter = self.path(REBOOT_PARAM);
        match how {
            // Without systemd, an emulated machine tells its firmware by `announce` below.
            Reboot::TryBoot if self.test.is_some() && !self.path(REBOOT_PARAM).parent().is_some_and(Path::exists) => {}
            Reboot::TryBoot => std::fs::write(&parameter, TRYBOOT).map_err(SystemError::io("write", &parameter))?,
            Reboot::Plain => remove(&parameter)?,
        }
        if let Some(test) = &self.test {
            test.announce(how);
        }
        let done = command.await;
        if done.is_err() {
            // The next reboot, by any user, must not be a trial boot.
            remove(&parameter)?;
        }
        done
    }

    fn layout(&self) -> Layout {
        if self.card().is_some_and(|card| card.recovery != card.boot) {
            return Layout::Resident;
        }
        let stock = ["boot/firmware/config.txt", "boot/config.txt"];
        if stock.iter().any(|config| self.path(config).is_file()) { Layout::Single } else { Layout::Unknown }
    }
}

#[async_trait]
impl System for Host {
    fn boot_id(&self) -> Result<String, SystemError> {
        boot_id(&self.options.sysroot)
    }

    fn facts(&self) -> Result<Facts, SystemError> {
        let root = Rooted::open(&self.options.sysroot).map_err(SystemError::io("open", &self.options.sysroot))?;
        let os = super::facts::pretty_name(&root).unwrap_or_default();
        let system = SystemFacts { os, layout: self.layout(), ..kernel_facts() };
        let board = board::read(&self.options.sysroot);
        let board = self.test.as_ref().map_or(board.clone(), |test| test.board(board));
        Ok(Facts { board, system })
    }

    fn mode(&self) -> Mode {
        Mode::Running
    }

    fn booted(&self) -> Option<Booted> {
        self.test.as_ref().map_or_else(|| board::booted(&self.options.sysroot), |test| Some(test.booted))
    }

    fn card(&self) -> Option<Card> {
        // Another sysroot is a test's, which has no disk.
        if self.options.sysroot == Path::new("/") { self.card.get(&self.options.mounts) } else { None }
    }

    fn disk_to_name(&self) -> Option<String> {
        self.card().and_then(|_| card::disk_to_name())
    }

    fn root(&self) -> PathBuf {
        self.options.sysroot.clone()
    }

    fn state_dir(&self) -> PathBuf {
        self.options.state_dir.clone()
    }

    fn identity_dir(&self) -> PathBuf {
        self.options.identity_dir.clone()
    }

    fn trial_lacks(&self) -> Option<&'static str> {
        preflight::trial_lacks(&self.options.sysroot)
    }

    fn end_supervision(&self) -> std::io::Result<()> {
        let told = crate::supervise::accept();
        // The supervisor left it for restarts during the trial. The next one must boot the system by default.
        let parameter = self.path(REBOOT_PARAM);
        if std::fs::read_to_string(&parameter).is_ok_and(|text| text.trim() == TRYBOOT) {
            std::fs::remove_file(&parameter)?;
        }
        told.map(|supervised| tracing::info!(supervised, "trial ended"))
    }

    async fn announce(&self, down: Down, delay: Duration, message: &str) -> Result<bool, SystemError> {
        let text = super::announcement(down, delay, message);
        // logind keeps one shutdown only: the agent's would replace the user's.
        let theirs = matches!(self.standing(), Standing::Theirs(_));
        // With -k logind schedules a dry run: it warns again and again, and in the end does nothing (shutdown(8)). A
        // real `shutdown +N` could not be cancelled honestly: it would go down whatever the journal says. logind counts
        // in minutes and does not schedule a delay of zero.
        let minutes = delay.as_secs().div_ceil(MINUTE.as_secs());
        let may_schedule = delay >= MINUTE && !theirs;
        if may_schedule && self.shutdown(&["-k", flag(down), &format!("+{minutes}"), &text]).await.is_ok() {
            let stands = self.schedule().remember();
            self.set_warned(if stands { Warned::Visibly } else { Warned::Blindly });
            return Ok(stands);
        }
        self.set_warned(Warned::ByWall);
        run(&[WALL, &text]).await?;
        Ok(false)
    }

    fn standing(&self) -> Standing {
        self.schedule().standing()
    }

    async fn withdraw(&self) -> Result<(), SystemError> {
        let parameter = self.path(REBOOT_PARAM);
        if std::fs::read_to_string(&parameter).is_ok_and(|text| text.trim() == TRYBOOT) {
            remove(&parameter)?;
        }
        let (standing, warned) = (self.standing(), self.set_warned(Warned::Not));
        self.schedule().forget();
        // `-c` cancels any shutdown, so never while a user's stands.
        match (standing, warned) {
            // Covers an announcement that a killed process of this agent left.
            (Standing::Ours, _) | (Standing::Nothing, Warned::Blindly) => {
                self.shutdown(&["-c", super::WITHDRAWN]).await
            }
            (_, Warned::ByWall) => run(&[WALL, super::WITHDRAWN]).await,
            // A user cancelled the agent's shutdown or replaced it, and so knows.
            (_, Warned::Not | Warned::Visibly | Warned::Blindly) => Ok(()),
        }
    }

    async fn reboot(&self, how: Reboot, _execution: Option<&str>, message: &str) -> Result<(), SystemError> {
        let text = super::announcement(Down::Reboot, Duration::ZERO, message);
        self.with_argument(how, self.shutdown(&[flag(Down::Reboot), "now", &text])).await
    }

    async fn force(&self, down: Down, how: Reboot, force: Force, execution: Option<&str>) -> Result<(), SystemError> {
        if self.options.force_command.is_empty() {
            return match down {
                Down::Reboot => self.reboot(how, execution, "").await,
                Down::PowerOff => self.power_off(execution, "").await,
            };
        }
        let verb = match down {
            Down::Reboot => "reboot",
            Down::PowerOff => "poweroff",
        };
        let mut command: Vec<&str> = self.options.force_command.iter().map(String::as_str).collect();
        // systemctl(1): once skips the services' stop, twice also the unmounting.
        command.extend([verb, "--force"]);
        if force == Force::Everything {
            command.push("--force");
        }
        match down {
            Down::Reboot => self.with_argument(how, run(&command)).await,
            Down::PowerOff => run(&command).await,
        }
    }

    async fn power_off(&self, _execution: Option<&str>, message: &str) -> Result<(), SystemError> {
        let text = super::announcement(Down::PowerOff, Duration::ZERO, message);
        self.shutdown(&[flag(Down::PowerOff), "now", &text]).await
    }

    fn kept_log(&self) -> Vec<u8> {
        let of_installer = self.card().map(|card| std::fs::read(card.recovery.join(LOG_FILE)).unwrap_or_default());
        [of_installer.unwrap_or_default(), STARTED_AGAIN.into(), self.log.read()].concat()
    }

    fn conditions(&self) -> Vec<Condition> {
        // An emulated board has no firmware that reports its power.
        let weak = preflight::under_voltage(&self.options.sysroot).err().filter(|_| self.test.is_none());
        let weak = weak.map(|refusal| Condition { ailment: Ailment::UnderVoltage, message: refusal.message });
        let settings = self.card().and_then(|card| super::wrong_settings(&card.recovery));
        super::ailing_disk(&self.options.state_dir).into_iter().chain(weak).chain(settings).collect()
    }

    fn clock(&self) -> Option<DateTime<Utc>> {
        Some(std::time::SystemTime::now().into())
    }

    async fn preflight_update(&self) -> Result<(), Refusal> {
        let board = self.facts().unwrap_or_default().board;
        let card = self.card();
        let stock = card.as_ref().filter(|card| card.recovery == card.boot).map(|_| card::can_be_laid_out());
        preflight::check(&self.options.sysroot, &board, card.as_ref(), stock, self.test.is_some())
    }

    async fn check_kept(&self, erase: Erase) -> Result<(), Refusal> {
        // Without a card there is nothing to keep; the preflight refuses it.
        if self.card().is_some() { card::keeps_the_rest(erase).await } else { Ok(()) }
    }

    async fn prepare_target(&self, _erase: Erase) -> Result<Target, SystemError> {
        Err(SystemError::Unsupported("a card is installed only by the installer, not by what runs on it"))
    }

    async fn finish_target(&self, _target: Target) -> Result<(), SystemError> {
        Err(SystemError::Unsupported("a card is installed only by the installer, not by what runs on it"))
    }
}

fn flag(down: Down) -> &'static str {
    match down {
        Down::Reboot => "-r",
        Down::PowerOff => "-P",
    }
}

fn remove(path: &Path) -> Result<(), SystemError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(SystemError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Runs a program that only talks to logind.
async fn run(command: &[&str]) -> Result<(), SystemError> {
    super::command::run(command, COMMAND_TIME).await
}

/// Id of this boot, from the kernel.
pub(super) fn boot_id(sysroot: &Path) -> Result<String, SystemError> {
    let path = sysroot.join("proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(&path).map_err(SystemError::io("read", path))?;
    Ok(text.trim().to_owned())
}

/// Facts from the kernel. The other fields are empty.
pub(super) fn kernel_facts() -> SystemFacts {
    let uname = rustix::system::uname();
    SystemFacts {
        kernel_arch: uname.machine().to_string_lossy().into_owned(),
        userspace_arch: std::env::consts::ARCH.to_owned(),
        page_size: u32::try_from(rustix::param::page_size()).unwrap_or_default(),
        kernel_release: uname.release().to_string_lossy().into_owned(),
        ..SystemFacts::default()
    }
}

#[cfg(test)]
mod tests;
