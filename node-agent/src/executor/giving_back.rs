//! The end of a failed job, and the installer's way back to the old system, which is whole until the card is touched.

use tokio::time::Instant;

use super::update::off_runtime;
use super::{Executor, StepError, WayDown};
use crate::cause::chain;
use crate::job::{Failure, Mode, State};
use crate::journal::{Entry, JournalError};

impl Executor {
    /// Ends a job. An installer that has not touched the card leaves the end to the old system, which reports it.
    pub(super) async fn failed(&self, entry: &Entry, failure: Failure) -> Result<(), JournalError> {
        let execution = entry.execution.as_str();
        tracing::warn!(execution, reason = %failure.reason, error = %failure.message, "job failed");
        self.keep_failure(execution, &failure);
        if entry.state == State::Accepted {
            // Users may have been warned of a shutdown that does not come.
            self.withdraw(execution).await;
        }
        let failure = if self.is_handed_over(entry).await { self.give_back(entry, failure).await? } else { failure };
        self.journal.fail(execution, failure).await?;
        *self.failed_since() = Some(Instant::now());
        self.tidy_after(entry).await;
        Ok(())
    }

    /// Returns true if the old system is whole and holds this job, so that it reports the end.
    async fn is_handed_over(&self, entry: &Entry) -> bool {
        // A job that was accepted under this boot came to the installer itself: the old system does not know it.
        self.mode() == Mode::Installer && entry.accept_boot_id != self.boot_id && self.can_go_back().await
    }

    /// Returns true if a plain restart of this installer leads to the old system. Not from a card that cannot be read.
    async fn can_go_back(&self) -> bool {
        let (booted, boot_id) = (self.system.booted(), self.boot_id.clone());
        let Some(recovery) = self.recovery() else { return booted.is_none_or(|booted| booted.tryboot) };
        let found = off_runtime(move || Ok(recovery.can_go_back(booted, &boot_id)?)).await;
        if let Err(error) = &found {
            tracing::warn!(error = %chain(error), "cannot read what boots by default");
        }
        found.unwrap_or(false)
    }

    /// Marks the card before the installer goes back. Without the mark it goes, too: the old system is whole.
    async fn mark_going_back(&self) {
        let Some(recovery) = self.recovery() else { return };
        let boot_id = self.boot_id.clone();
        if let Err(error) = off_runtime(move || Ok(recovery.note_going_back(&boot_id)?)).await {
            tracing::warn!(error = %chain(&error), "way back not marked on the card");
        }
    }

    /// Notes the failure and restarts into the old system. Returns only if the machine stays up, with the failure to
    /// report.
    async fn give_back(&self, entry: &Entry, failure: Failure) -> Result<Failure, JournalError> {
        // The old system reads the reason from this journal (`why_rolled_back`); its own journal ends at ARMED.
        self.journal.note(&entry.execution, failure.clone()).await?;
        self.mark_going_back().await;
        match self.go_down(entry, WayDown::Reboot).await {
            Err(StepError::Failed(stuck)) => Ok(stuck),
            Err(StepError::Journal(error)) => Err(error),
            Ok(()) | Err(StepError::Cancelled) => Ok(failure),
        }
    }

    /// Returns true for an installer that has nothing to do (its job was lost, or has ended) while the old system is
    /// whole and boots by default.
    async fn is_idle_on_trial(&self) -> bool {
        let idle = self.mode() == Mode::Installer && self.journal.entries().unfinished().is_none();
        idle && self.can_go_back().await
    }

    /// Pends until an idle installer has told its controller so, at most for `Settings::confirmation`. Pends forever
    /// elsewhere.
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

    /// Starts the old system if this installer has nothing to do. Returns if the machine stays up.
    pub(super) async fn leave_when_idle(&self) {
        if self.is_idle_on_trial().await {
            tracing::warn!("nothing is to be installed, and the old system is whole: it is started again");
            self.system.keep_line("nothing is to be installed: the old system is started again");
            self.mark_going_back().await;
            if let Some(error) = self.command_down(None, WayDown::Reboot, "").await {
                tracing::error!(error, "the machine does not go down");
            }
        }
    }
}
