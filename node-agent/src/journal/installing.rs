//! An installation that fails and is tried again, or gives way to another.

use std::time::Duration;

use super::{Entries, Entry, Journal, JournalError};
use crate::job::{Action, Failure, State, Tries};

/// Reason: the controller gave the installer another image.
pub const REPLACED: &str = "REPLACED";

impl Journal {
    /// Counts a failed try that took `spent`, and notes its failure. Returns all tries so far.
    pub async fn tried(&self, execution: &str, failure: Failure, spent: Duration) -> Result<Tries, JournalError> {
        self.conclude(execution, |entry, _| {
            entry.tries.count(&failure.reason, spent);
            entry.error = Some(failure);
            Ok(())
        })
        .await?;
        Ok(self.entries().get(execution).map(|entry| entry.tries.clone()).unwrap_or_default())
    }

    /// Pends until another image takes the place of this installation.
    pub(crate) async fn replaced(&self, execution: &str) {
        let replaced = |entry: &Entry| entry.error.as_ref().is_some_and(|error| error.reason == REPLACED);
        let mut changes = self.changes();
        if changes.wait_for(|entries| entries.get(execution).is_some_and(replaced)).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Pends until a controller calls this installation off.
    pub(crate) async fn called_off(&self, execution: &str) {
        let mut changes = self.changes();
        if changes.wait_for(|entries| entries.get(execution).is_some_and(|entry| entry.cancel_requested)).await.is_err()
        {
            std::future::pending::<()>().await;
        }
    }
}

impl Entries {
    /// Ends an installation for another image, and returns true if it did. The controller gives work only to a node
    /// that it takes for free, and an installer that cannot finish its image must be able to get another one.
    pub(super) fn make_way(&mut self, next: &Entry, boot_id: &str) -> bool {
        // The installer takes nothing but images, so nothing else may end an installation.
        let brings_image = matches!(&next.action, Action::Update(update) if update.image.is_some());
        let under_way = self.0.iter_mut().find(|entry| entry.state == State::Installing);
        let Some(entry) = under_way.filter(|_| brings_image) else { return false };
        let message = format!("the controller gave the installer another image ({})", next.execution);
        entry.error = Some(Failure::new(REPLACED, message));
        entry.step(State::Failed, 1, boot_id);
        true
    }
}
