//! The choice between the two systems of a card, and the last step of an update, which makes it.

use std::sync::Arc;

use super::update::off_runtime;
use super::{Executor, StepError, WayDown};
use crate::bootpart::{BootError, DefaultBoot, Writable};
use crate::cause::chain;
use crate::install;
use crate::job::{Failure, Kind};
use crate::journal::Entry;
use crate::system::System;

/// Tries of the switch to the new system. A card that is busy with itself fails for seconds, not for longer.
const TRIES: u32 = 5;

/// Ends the supervision of the trial, whose parameters are gone. Only after the switch: a card that hangs there must not be
/// left without a supervisor. A failure is only logged: the system is accepted. At worst the supervisor restarts it once, by
/// default into this very system.
fn end_supervision(system: &dyn System) {
    let ended = system.end_supervision().and_then(|()| install::remove_supervisor(&system.root()));
    if let Err(error) = ended {
        tracing::warn!(error = %error, "supervision of the trial not ended");
    }
}

impl Executor {
    /// Makes the new system the default boot, and reads that back. Until then the installer is, so its files stay.
    pub(super) async fn make_system_default(&self, execution: &str) -> Result<(), StepError> {
        let mut tries = 1;
        loop {
            let recovery = self.recovery_or_fail()?;
            let (system, board) = (Arc::clone(&self.system), self.system.facts()?.board);
            let switched = off_runtime(move || {
                // Before the switch: an accepted system must not keep `panic=` of its trial. Its owner decides that.
                if let Some(card) = system.card() {
                    let _writable = Writable::open(&card.boot)?;
                    let ended = install::end_trial(&card.boot, &board);
                    ended.map_err(BootError::io("end the trial in", &card.boot))?;
                }
                recovery.set_boot_partition(DefaultBoot::System)?;
                // Read past the page cache: a card may acknowledge a write that it has not kept.
                match recovery.default_boot()? {
                    DefaultBoot::System => end_supervision(system.as_ref()),
                    DefaultBoot::Installer => {
                        let path = recovery.marco_dir().with_file_name("autoboot.txt");
                        return Err(BootError::NotWritten { path }.into());
                    }
                }
                Ok(())
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

    /// Returns true if the card boots the installer by default. An unreadable card counts as such, so that nothing is
    /// removed that an installer may need.
    pub(super) async fn installer_boots(&self) -> bool {
        let Some(recovery) = self.recovery() else { return false };
        let found = off_runtime(move || Ok(recovery.default_boot()?)).await;
        if let Err(error) = &found {
            tracing::warn!(error = %chain(error), "cannot read what boots by default");
        }
        !matches!(found, Ok(DefaultBoot::System))
    }

    /// Selects the way down from a running system. A trial boot starts the system that is not the default. After a
    /// failed switch that is this very system, so the machine restarts plainly.
    pub(super) async fn way_down(&self, entry: &Entry) -> WayDown {
        match entry.action.kind() {
            Kind::Update if self.installer_boots().await => WayDown::Reboot,
            Kind::Update => WayDown::TryBoot,
            Kind::PowerOff => WayDown::PowerOff,
            Kind::Reboot | Kind::Unknown => WayDown::Reboot,
        }
    }
}
