//! The commands that take the machine down, and the phases that are reported with them.

use super::{DID_NOT_REBOOT, Executor, StepError};
use crate::cause::chain;
use crate::job::{self, Action, Failure, phase};
use crate::journal::Entry;
use crate::system::{Down, Force, Reboot, effect};

/// Commands to go down, each stronger than the one before, until the job fails.
const MAX_COMMANDS: u32 = 3;

/// The ways to go down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WayDown {
    Reboot,
    TryBoot,
    PowerOff,
}

impl WayDown {
    /// Returns the phase to report with a command; `command` counts from 1.
    pub(super) fn phase(self, command: u32) -> &'static str {
        match (self, command) {
            (Self::Reboot, 1) => phase::RESTARTING,
            (Self::Reboot, _) => phase::FORCED_RESTART,
            (Self::TryBoot, 1) => phase::TRIAL_BOOT,
            (Self::TryBoot, _) => phase::FORCED_TRIAL_BOOT,
            (Self::PowerOff, 1) => phase::POWERING_OFF,
            (Self::PowerOff, _) => phase::FORCED_POWER_OFF,
        }
    }
}

impl Executor {
    /// Gives the command, and stronger ones if the machine is still up after `System::patience`. Returns only with an
    /// error.
    pub(super) async fn go_down(&self, entry: &Entry, way: WayDown) -> Result<(), StepError> {
        let execution = entry.execution.as_str();
        let message = match &entry.action {
            Action::Reboot(notice) | Action::PowerOff(notice) => notice.message.as_str(),
            Action::Update(update) => update.notice.message.as_str(),
            Action::Unknown => "",
        };
        self.phase(execution, way.phase(1));
        self.say_farewell(execution, way).await;
        let last = self.command_down(Some(execution), way, message).await;
        let reason = match way {
            WayDown::PowerOff => job::DID_NOT_POWER_OFF,
            WayDown::Reboot | WayDown::TryBoot => DID_NOT_REBOOT,
        };
        let cause = last.map(|last| format!("; the last command failed: {last}")).unwrap_or_default();
        let message = format!("the machine was told to go down {MAX_COMMANDS} times and is still up{cause}");
        Err(StepError::Failed(Failure::new(reason, message)))
    }

    /// Gives the commands, one after the other. Returns if the machine stays up, with the last error (`None`: no
    /// command failed).
    pub(super) async fn command_down(&self, execution: Option<&str>, way: WayDown, message: &str) -> Option<String> {
        let mut last = None;
        for command in 1..=MAX_COMMANDS {
            tracing::info!(execution, ?way, command, "going down");
            if let Some(execution) = execution {
                self.phase(execution, way.phase(command));
            }
            let (down, how) = match way {
                WayDown::Reboot => (Down::Reboot, Reboot::Plain),
                WayDown::TryBoot => (Down::Reboot, Reboot::TryBoot),
                WayDown::PowerOff => (Down::PowerOff, Reboot::Plain),
            };
            // Before the command: the agent may be told to end before the command returns, and must say `Leaving`.
            self.journal.set_powering_off(way == WayDown::PowerOff);
            let issued = async {
                effect(self.system.as_ref(), way.phase(command))?;
                match (command, down) {
                    (1, Down::Reboot) => self.system.reboot(how, execution, message).await,
                    (1, Down::PowerOff) => self.system.power_off(execution, message).await,
                    (2, _) => self.system.force(down, how, Force::Services, execution).await,
                    _ => self.system.force(down, how, Force::Everything, execution).await,
                }
            };
            if let Err(error) = issued.await {
                // The command had no effect: an agent that ends now must not claim a power-off.
                self.journal.set_powering_off(false);
                tracing::error!(execution, error = %chain(&error), "command to go down failed");
                last = Some(chain(&error));
            }
            tokio::time::sleep(self.system.patience()).await;
        }
        self.journal.set_powering_off(false);
        last
    }

    /// Waits, best effort, until the controller has acknowledged that the machine goes down.
    async fn say_farewell(&self, execution: &str, way: WayDown) {
        let patience = match way {
            // Longer for a power-off: nothing is heard afterwards, while a restarted node reports by itself.
            WayDown::PowerOff => self.settings.farewell,
            WayDown::Reboot | WayDown::TryBoot => self.settings.farewell / 5,
        };
        let mut changes = self.journal.changes();
        let known = changes.wait_for(|entries| entries.get(execution).is_none_or(Entry::is_acked));
        if tokio::time::timeout(patience, known).await.is_err() {
            tracing::info!(execution, "controller does not know yet that the machine goes down");
        }
    }
}
