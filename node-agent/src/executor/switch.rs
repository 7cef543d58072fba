//! Between the two systems of a card: which of them boots, and the last step of an update, which decides that.

use super::update::off_runtime;
use super::{Executor, StepError, WayDown};
use crate::bootpart::{BootError, DefaultBoot, Writable};
use crate::cause::chain;
use crate::install;
use crate::job::{Failure, Kind};
use crate::journal::Entry;

/// How often the switch to the new system is tried. A card that is busy with itself fails for seconds, not for longer.
const TRIES: u32 = 5;

impl Executor {
    /// Makes the new system what boots, and reads that back. Until then the installer is, so nothing that it needs goes.
    pub(super) async fn make_system_default(&self, execution: &str) -> Result<(), StepError> {
        let mut tries = 1;
        loop {
            let recovery = self.recovery_or_fail()?;
            let (system, board) = (self.system.card().map(|card| card.boot), self.system.facts()?.board);
            let switched = off_runtime(move || {
                // Before the switch: a system that stays must not keep the words of its trial.
                if let Some(boot) = system {
                    let _writable = Writable::open(&boot)?;
                    install::end_trial(&boot, &board).map_err(BootError::io("end the trial in", &boot))?;
                }
                recovery.set_boot_partition(DefaultBoot::System)?;
                match recovery.default_boot()? {
                    DefaultBoot::System => Ok(()),
                    DefaultBoot::Installer => {
                        Err(BootError::NotWritten { path: recovery.marco_dir().with_file_name("autoboot.txt") }.into())
                    }
                }
            });
            match switched.await {
                Ok(()) => return Ok(()),
                Err(StepError::Failed(failure)) if tries >= TRIES => {
                    let message = format!(
                        "the new system runs, but cannot be made what boots ({}); the next boot is the installer, which \
                         still has its identity and can be given an image",
                        failure.message
                    );
                    return Err(StepError::Failed(Failure::new(failure.reason, message)));
                }
                Err(error) => {
                    tracing::warn!(execution, tries, error = %chain(&error), "new system is not the default yet");
                    tokio::time::sleep(self.pause(tries)).await;
                    tries += 1;
                }
            }
        }
    }

    /// Whether every boot is the installer, by what the card says. A card that does not say it boots the installer, too.
    pub(super) async fn installer_boots(&self) -> bool {
        let Some(recovery) = self.recovery() else { return false };
        let found = off_runtime(move || Ok(recovery.default_boot()?)).await;
        if let Err(error) = &found {
            tracing::warn!(error = %chain(error), "cannot read what boots by default");
        }
        !matches!(found, Ok(DefaultBoot::System))
    }

    /// How the machine leaves a running system for this job. A trial boot takes the one that is not the default: after a
    /// switch that failed, that would be this very system.
    pub(super) async fn way_down(&self, entry: &Entry) -> WayDown {
        match entry.action.kind() {
            Kind::Update if self.installer_boots().await => WayDown::Reboot,
            Kind::Update => WayDown::TryBoot,
            Kind::PowerOff => WayDown::PowerOff,
            Kind::Reboot | Kind::Unknown => WayDown::Reboot,
        }
    }
}
