//! The machine that the agent runs on: a Raspberry Pi, or any other Linux host, under systemd.
//!
//! It reboots and powers off. It refuses an update: a card gets the layout that makes updates safe from the installer
//! only, so [`Host::card`] is none and what belongs to the installer is unsupported here.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use tokio::process::Command;

use super::rooted::Rooted;
use super::{
    Booted, Card, Down, Erase, Facts, Force, Layout, Mode, Reboot, Refusal, System, SystemError, SystemFacts, Target,
};

mod board;

/// No command that only talks to logind takes longer.
const COMMAND_TIME: Duration = Duration::from_secs(30);
/// From here systemd takes the argument of reboot(2) (systemd-reboot.service(8)).
const REBOOT_PARAM: &str = "run/systemd/reboot-param";
/// The firmware's word for a trial boot, after the partition number 0, "the default".
const TRYBOOT: &str = "0 tryboot";
/// From util-linux; when logind cannot be asked to warn.
const WALL: &str = "/usr/bin/wall";
/// logind's scheduled warnings count in minutes.
const MINUTE: Duration = Duration::from_secs(60);

/// Where things are on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostOptions {
    /// Where `/proc`, `/sys`, `/etc` and `/run` are looked for.
    pub sysroot: PathBuf,
    /// The journal's folder.
    pub state_dir: PathBuf,
    /// The identity's folder.
    pub identity_dir: PathBuf,
    /// The program for shutdown(8) and arguments that go before ours; the program by its absolute path.
    pub shutdown_command: Vec<String>,
    /// The program for systemctl(1), when shutdown(8) was not enough; empty: the shutdown command once more, which is
    /// all that is known of a machine with a command of its own.
    pub force_command: Vec<String>,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            sysroot: "/".into(),
            state_dir: "/var/lib/marco-agent".into(),
            identity_dir: "/var/lib/marco-agent".into(),
            shutdown_command: vec!["/sbin/shutdown".into()],
            force_command: vec!["/bin/systemctl".into()],
        }
    }
}

/// This machine.
#[derive(Debug)]
pub struct Host {
    options: HostOptions,
}

impl Host {
    /// With these paths and commands.
    ///
    /// # Errors
    /// The shutdown command is empty or not an absolute path.
    pub fn new(options: HostOptions) -> Result<Self, SystemError> {
        if options.shutdown_command.first().is_none_or(|program| !program.starts_with('/')) {
            return Err(SystemError::Invalid("shutdown_command must begin with the absolute path of a program".into()));
        }
        Ok(Self { options })
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.options.sysroot.join(relative)
    }

    async fn shutdown(&self, arguments: &[&str]) -> Result<(), SystemError> {
        let prefix = self.options.shutdown_command.iter().map(String::as_str);
        run(&prefix.chain(arguments.iter().copied()).collect::<Vec<_>>()).await
    }

    /// Gives a command to reboot, with its argument where systemd looks for it, however it is told to reboot.
    async fn with_argument(
        &self,
        how: Reboot,
        command: impl Future<Output = Result<(), SystemError>>,
    ) -> Result<(), SystemError> {
        let parameter = self.path(REBOOT_PARAM);
        match how {
            Reboot::TryBoot => std::fs::write(&parameter, TRYBOOT).map_err(SystemError::io("write", &parameter))?,
            Reboot::Plain => remove(&parameter)?,
        }
        let done = command.await;
        if done.is_err() {
            // Whoever reboots next must not find a trial boot prepared.
            remove(&parameter)?;
        }
        done
    }

    fn layout(&self) -> Layout {
        let stock = ["boot/firmware/config.txt", "boot/config.txt"];
        if stock.iter().any(|config| self.path(config).is_file()) { Layout::Single } else { Layout::Unknown }
    }
}

#[async_trait]
impl System for Host {
    fn boot_id(&self) -> Result<String, SystemError> {
        let path = self.path("proc/sys/kernel/random/boot_id");
        let text = std::fs::read_to_string(&path).map_err(SystemError::io("read", path))?;
        Ok(text.trim().to_owned())
    }

    fn facts(&self) -> Result<Facts, SystemError> {
        let uname = rustix::system::uname();
        let root = Rooted::open(&self.options.sysroot).map_err(SystemError::io("open", &self.options.sysroot))?;
        let system = SystemFacts {
            kernel_arch: uname.machine().to_string_lossy().into_owned(),
            userspace_arch: std::env::consts::ARCH.to_owned(),
            page_size: u32::try_from(rustix::param::page_size()).unwrap_or_default(),
            kernel_release: uname.release().to_string_lossy().into_owned(),
            os: super::facts::pretty_name(&root).unwrap_or_default(),
            layout: self.layout(),
        };
        Ok(Facts { board: board::read(&self.options.sysroot), system })
    }

    fn mode(&self) -> Mode {
        Mode::Running
    }

    fn booted(&self) -> Option<Booted> {
        let number = |name| board::cell(&self.path("proc/device-tree/chosen/bootloader").join(name));
        Some(Booted { partition: number("partition")?, tryboot: number("tryboot")? != 0 })
    }

    fn card(&self) -> Option<Card> {
        None
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

    async fn announce(&self, down: Down, delay: Duration, message: &str) -> Result<(), SystemError> {
        let text = super::announcement(down, delay, message);
        // With -k logind schedules a dry run: it warns, again and again, and in the end does nothing (shutdown(8)).
        // Not with a delay of zero, which would not be scheduled.
        let minutes = delay.as_secs().div_ceil(MINUTE.as_secs());
        if delay >= MINUTE && self.shutdown(&["-k", flag(down), &format!("+{minutes}"), &text]).await.is_ok() {
            return Ok(());
        }
        run(&[WALL, &text]).await
    }

    async fn withdraw(&self) -> Result<(), SystemError> {
        remove(&self.path(REBOOT_PARAM))?;
        self.shutdown(&["-c", super::WITHDRAWN]).await
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

    async fn preflight_update(&self) -> Result<(), Refusal> {
        let message = "this card has one boot partition or none: only a card that the Marco installer has laid out can \
                       be updated without the risk of losing the node; install it with the installer first";
        Err(Refusal { reason: "LAYOUT_NOT_RESIDENT", message: message.into() })
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

/// Runs a program by its absolute path, with no shell, no input, and a time-out.
async fn run(command: &[&str]) -> Result<(), SystemError> {
    let Some((program, arguments)) = command.split_first() else { return Ok(()) };
    let failed = |message: String| SystemError::Command { program: (*program).to_owned(), message };
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let output = tokio::time::timeout(COMMAND_TIME, child.wait_with_output())
        .await
        .map_err(|_| failed(format!("no end within {} s", COMMAND_TIME.as_secs())))?
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let words: String = String::from_utf8_lossy(&output.stderr).trim().chars().take(300).collect();
    Err(failed(format!("{}: {words}", output.status)))
}

#[cfg(test)]
mod tests;
