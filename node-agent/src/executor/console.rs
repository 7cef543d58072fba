//! A machine whose installation failed waits for its controller, or does what its card's settings say (`[failure]`).

use std::sync::{MutexGuard, PoisonError};

use tokio::time::Instant;

use super::{CONSOLE_IN_USE, Executor, FIRST_PAUSE, sentence};
use crate::cause::chain;
use crate::job::Failure;
use crate::journal::Entry;

impl Executor {
    pub(super) fn failed_since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pends until the time that the card's settings name is over after a failure. Pends forever if nothing failed, or
    /// if the machine is to wait for its controller.
    pub(super) async fn patience_is_over(&self) {
        let since = *self.failed_since();
        match (since, self.system.gives_up_after()) {
            (Some(since), Some(after)) => tokio::time::sleep_until(since + after).await,
            _ => std::future::pending().await,
        }
    }

    /// Does what the card's settings say for after a failure. That may be a shell: until it ends the card belongs to
    /// its user, and work that arrives ends with `CONSOLE_IN_USE`.
    pub(super) async fn give_up(&self) {
        let mut given_up = std::pin::pin!(self.system.give_up());
        loop {
            // Pinned outside of the loop, so the shell survives when the other arm wins. The journal keeps what that
            // one waits for.
            let ended = tokio::select! {
                ended = &mut given_up => ended,
                entry = self.arrived() => {
                    // Refused at once. Work that waited for the shell was shown as RUNNING while nothing happened.
                    self.refuse_beside_console(&entry).await;
                    continue;
                }
            };
            if let Err(error) = ended {
                tracing::error!(error = %chain(&error), "cannot do what is to be done after a failure");
            }
            return;
        }
    }

    /// Waits for an unfinished job.
    async fn arrived(&self) -> Entry {
        let mut changes = self.journal.changes();
        let entry = changes.wait_for(|entries| entries.unfinished().is_some()).await;
        match entry.ok().and_then(|entries| entries.unfinished().cloned()) {
            Some(entry) => entry,
            None => std::future::pending().await,
        }
    }

    async fn refuse_beside_console(&self, entry: &Entry) {
        let failure = Failure::new(CONSOLE_IN_USE, sentence(CONSOLE_IN_USE));
        if let Err(error) = self.journal.fail(&entry.execution, failure).await {
            tracing::error!(execution = %entry.execution, error = %chain(&error), "job not refused");
            // The job is still unfinished, so the caller comes back at once: do not spin.
            tokio::time::sleep(FIRST_PAUSE).await;
        }
    }
}
