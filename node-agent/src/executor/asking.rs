//! A job of an earlier process disturbs the machine only after a controller has confirmed it.

use super::{CALLED_OFF, Executor, NO_CONTROLLER, sentence};
use crate::job::{Failure, Resume};
use crate::journal::{Confirmation, Entry};

impl Executor {
    /// Asks a controller whether a job of an earlier process still stands, before a step that disturbs the machine. It
    /// may have been called off during an outage, which only the controller knows.
    pub(super) async fn ask_first(&self, entry: &Entry, decision: Resume) -> Result<(), Failure> {
        let execution = entry.execution.as_str();
        let confirmation = match decision {
            // Without a limit: a node compares no wall clocks, so it cannot tell how old the job is. Waiting loses
            // nothing, since the controller shows the job as overdue meanwhile.
            Resume::Begin | Resume::GoDown => self.journal.confirmation(execution).await,
            // It downloads from a controller, so it cannot go on without one anyway.
            Resume::Install if self.installer_boots().await => self.journal.confirmation(execution).await,
            // The old system is whole, and waits for this no longer than for the image. On a network of its own the
            // installer may never be heard.
            Resume::Install => {
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
}
