//! The warning before a machine goes down. Its users may cancel the shutdown.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{CALLED_OFF_ON_NODE, Executor, StepError};
use crate::cause::chain;
use crate::job::{Failure, Notice, phase};
use crate::system::{Down, Standing, effect};

/// Interval at which the announcement is checked.
const LOOK: Duration = Duration::from_secs(1);

impl Executor {
    /// Warns logged-in users and waits until the notice has passed, by monotonic time.
    pub(super) async fn give_notice(
        &self,
        execution: &str,
        down: Down,
        notice: &Notice,
        cancel: &CancellationToken,
    ) -> Result<(), StepError> {
        // Users must not be warned of a shutdown that was cancelled already.
        if cancel.is_cancelled() {
            return Err(StepError::Cancelled);
        }
        match self.system.standing() {
            // logind keeps one shutdown, so ours would replace the user's. Users are warned by `wall` only.
            Standing::Theirs(other) => {
                tracing::warn!(execution, %other, "another user has announced a shutdown, which stays");
                self.phase(execution, &format!("{}, beside {other} that somebody else announced", phase::NOTICE));
            }
            Standing::Ours | Standing::Nothing => self.phase(execution, phase::NOTICE),
        }
        // Taken before the announcement, which then never ends earlier than the notice.
        let end = Instant::now() + notice.delay;
        let announced = async {
            effect(self.system.as_ref(), "announce")?;
            self.system.announce(down, notice.delay, &notice.message).await
        };
        let stands = announced.await.unwrap_or_else(|error| {
            // Without a user or a writable terminal the node still does its work.
            tracing::warn!(execution, error = %chain(&error), "users could not be warned");
            false
        });
        // Cancel-safe: none of the waits holds anything.
        tokio::select! {
            () = cancel.cancelled() => Err(StepError::Cancelled),
            () = tokio::time::sleep_until(end) => Ok(()),
            failure = self.called_off_here(end), if stands => Err(StepError::Failed(failure)),
        }
    }

    /// Returns if a user of the machine cancels or replaces the announced shutdown before `end`.
    async fn called_off_here(&self, end: Instant) -> Failure {
        loop {
            tokio::time::sleep(LOOK).await;
            let standing = self.system.standing();
            // Close to the end the announcement may be gone because its time has come.
            if standing == Standing::Ours || Instant::now() + LOOK >= end {
                continue;
            }
            let what = match standing {
                Standing::Theirs(other) => format!("replaced the announced shutdown by {other}"),
                Standing::Ours | Standing::Nothing => "cancelled the announced shutdown (shutdown -c)".to_owned(),
            };
            return Failure::new(CALLED_OFF_ON_NODE, format!("somebody on the node {what}"));
        }
    }

    /// Withdraws the agent's own announcement; another user's shutdown stays.
    pub(super) async fn withdraw(&self, execution: &str) {
        let withdrawn = async {
            effect(self.system.as_ref(), "withdraw")?;
            self.system.withdraw().await
        };
        if let Err(error) = withdrawn.await {
            tracing::warn!(execution, error = %chain(&error), "users could not be told that it was called off");
        }
    }
}
