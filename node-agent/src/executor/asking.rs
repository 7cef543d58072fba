//! A job of an earlier process disturbs the machine only after a controller has confirmed it.

use super::{CALLED_OFF, Executor, NO_CONTROLLER, StepError, WayDown, sentence};
use crate::job::{self, Failure, Resume};
use crate::journal::{Confirmation, Entry};

impl Executor {
    /// Asks a controller whether a job of an earlier process still stands, before a step that disturbs the machine. It may
    /// have been called off during an outage, and nobody but the controller can know.
    pub(super) async fn ask_first(&self, entry: &Entry, decision: Resume) -> Result<(), Failure> {
        let execution = entry.execution.as_str();
        let confirmation = match decision {
            Resume::Begin | Resume::GoDown => self.journal.confirmation(execution).await,
            // Later the card holds no system that could be gone back to. Until then the installer does not wait for
            // longer than for the image: on a network of its own it may never be heard.
            Resume::Install
                if entry.state == job::State::Armed && self.system.booted().is_some_and(|booted| booted.tryboot) =>
            {
                let heard =
                    tokio::time::timeout(self.settings.confirmation, self.journal.confirmation(execution)).await;
                heard.map_err(|_| Failure::new(NO_CONTROLLER, sentence(NO_CONTROLLER)))?
            }
            _ => Confirmation::Stands,
        };
        match confirmation {
            Confirmation::Stands => Ok(()),
            Confirmation::CalledOff => Err(Failure::new(CALLED_OFF, sentence(CALLED_OFF))),
        }
    }

    /// Leaves the machine to the old system, which is whole, without having installed anything.
    pub(super) async fn give_back(&self, entry: &Entry, failure: Failure) -> Result<(), StepError> {
        self.keep_failure(&entry.execution, &failure);
        self.journal.note(&entry.execution, failure).await?;
        self.go_down(entry, WayDown::Reboot).await
    }
}
