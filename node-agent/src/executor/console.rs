//! A machine whose installation failed waits for its controller, or does what its owner wants.

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

    /// Never, unless an installation has failed and the machine has other plans than to wait.
    pub(super) async fn patience_is_over(&self) {
        let since = *self.failed_since();
        match (since, self.system.gives_up_after()) {
            (Some(since), Some(after)) => tokio::time::sleep_until(since + after).await,
            _ => std::future::pending().await,
        }
    }

    /// Does what the machine's owner wants after a failure. That may be a shell, for as long as somebody sits there: the
    /// card is theirs meanwhile, and work that arrives ends with the reason.
    pub(super) async fn give_up(&self) {
        let mut given_up = std::pin::pin!(self.system.give_up());
        loop {
            // Polled again after the other arm won: it outlives the loop. The journal keeps what the other one waits for.
            let ended = tokio::select! {
                ended = &mut given_up => ended,
                entry = self.arrived() => {
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

    /// The next job that is not over.
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
            tokio::time::sleep(FIRST_PAUSE).await;
        }
    }
}
