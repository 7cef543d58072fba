//! Acknowledgements and verdicts of the controller. Each names what it is about, and counts for nothing else.

use marco_proto::names::FIRST_PROTOCOL;
use marco_proto::v1::{Ack, Verdict};

use super::{Open, SessionError, wire};
use crate::cause::chain;
use crate::job::State;
use crate::journal::{self, JournalError};

impl Open<'_> {
    /// Notes that a controller knows of the loss of the journal: it has answered a Hello that says so.
    pub(super) async fn hello_is_stored(&self) {
        let journal = &self.session.journal;
        if self.protocol > FIRST_PROTOCOL
            && journal.is_lost()
            && let Err(error) = journal.loss_told().await
        {
            tracing::warn!(error = %chain(&error), "report of the journal's loss is known in memory only");
        }
    }

    /// Takes an acknowledgement of the journal's present state. It is no verdict, except in protocol 1.
    pub(super) async fn acknowledged(&self, ack: Ack) -> Result<(), SessionError> {
        let journal = &self.session.journal;
        let (execution, sequence) = (ack.execution.as_str(), ack.sequence);
        let entries = journal.entries();
        let Some(entry) = entries.get(execution) else {
            tracing::warn!(execution, "acknowledgement of what is not in the journal");
            return Ok(());
        };
        let first = self.protocol == FIRST_PROTOCOL;
        let is_for_it = match first {
            // All that it names.
            true => sequence >= entry.sequence,
            false => wire::acknowledges(&ack, entry, &self.session.node.boot_id),
        };
        if !is_for_it {
            tracing::debug!(execution, sequence, "acknowledgement of another report");
            return Ok(());
        }
        let now = self.session.identity.time().now_micros();
        match journal.ack(execution, entry.attempt, entry.sequence, now).await {
            // Dropped meanwhile.
            Ok(()) | Err(JournalError::NotFound(_)) => {}
            Err(error) => return Err(error.into()),
        }
        // The number of an older copy may have been acknowledged before, for what the whole journal said.
        if first && entry.state == State::Verifying && sequence == entry.sequence && !entry.torn {
            tracing::info!(execution, "accepted by a controller of protocol 1");
            journal.judge(execution, journal::Verdict::Accepted);
        }
        Ok(())
    }

    /// Takes a verdict about the system that runs.
    pub(super) fn judged(&self, verdict: Verdict) {
        let (execution, decision) = (verdict.execution.clone(), verdict.decision().as_str_name());
        let entries = self.session.journal.entries();
        let boot_id = self.session.node.boot_id.as_str();
        let taken = entries.get(&execution).and_then(|entry| wire::verdict(verdict, entry, boot_id));
        match taken {
            Some(verdict) => {
                tracing::info!(execution, decision, "verdict");
                self.session.journal.judge(&execution, verdict);
            }
            None => tracing::warn!(execution, decision, "verdict about another system, or an unknown one, not taken"),
        }
    }
}
