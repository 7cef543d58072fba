//! The end of a job that failed, and the way of an installer back to the old system, which is whole until the card is
//! touched.

use tokio::time::Instant;

use super::{Executor, StepError, WayDown};
use crate::job::{Failure, Mode, State};
use crate::journal::{Entry, JournalError};

impl Executor {
    /// Ends a job. An installer that has not touched the card leaves the end to the old system, which reports it.
    pub(super) async fn failed(&self, entry: &Entry, failure: Failure) -> Result<(), JournalError> {
        let execution = entry.execution.as_str();
        tracing::warn!(execution, reason = %failure.reason, error = %failure.message, "job failed");
        self.keep_failure(execution, &failure);
        if entry.state == State::Accepted {
            self.withdraw(execution).await;
        }
        let failure = if self.is_handed_over(entry).await { self.give_back(entry, failure).await? } else { failure };
        self.journal.fail(execution, failure).await?;
        *self.failed_since() = Some(Instant::now());
        self.tidy_after(entry).await;
        Ok(())
    }

    /// Whether the old system waits for the end of this job, and knows of it.
    async fn is_handed_over(&self, entry: &Entry) -> bool {
        self.mode() == Mode::Installer && entry.accept_boot_id != self.boot_id && !self.installer_boots().await
    }

    /// Leaves the machine to the old system. Returns only when the machine stays up, with what is to be said then.
    async fn give_back(&self, entry: &Entry, failure: Failure) -> Result<Failure, JournalError> {
        self.journal.note(&entry.execution, failure.clone()).await?;
        match self.go_down(entry, WayDown::Reboot).await {
            Err(StepError::Failed(stuck)) => Ok(stuck),
            Err(StepError::Journal(error)) => Err(error),
            Ok(()) | Err(StepError::Cancelled) => Ok(failure),
        }
    }

    /// Whether this installer has nothing to do, while the old system is whole and what boots otherwise: its job was lost,
    /// or has ended.
    async fn is_idle_on_trial(&self) -> bool {
        let idle = self.mode() == Mode::Installer && self.journal.entries().unfinished().is_none();
        idle && !self.installer_boots().await
    }

    /// Pends until an installer that has nothing to do has told its controller so, or has tried for long enough.
    pub(super) async fn old_system_waits(&self) {
        if !self.is_idle_on_trial().await {
            std::future::pending::<()>().await;
        }
        let mut changes = self.journal.changes();
        let told = changes.wait_for(|entries| entries.iter().all(|entry| !entry.state.is_final() || entry.is_acked()));
        if tokio::time::timeout(self.settings.confirmation, told).await.is_err() {
            tracing::info!("no controller heard what became of the installation");
        }
    }

    /// Starts the old system, unless there is something to do. Returns when the machine stays up.
    pub(super) async fn leave_when_idle(&self) {
        if self.is_idle_on_trial().await {
            tracing::warn!("nothing is to be installed, and the old system is whole: it is started again");
            self.system.keep_line("nothing is to be installed: the old system is started again");
            if let Some(error) = self.command_down(None, WayDown::Reboot, "").await {
                tracing::error!(error, "the machine does not go down");
            }
        }
    }
}
