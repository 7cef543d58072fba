//! A job of an earlier process goes on only when a controller has confirmed it.

use super::{Entry, Journal};
use crate::job::State;

/// A controller's answer about a job, since this process began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confirmation {
    /// The job goes on.
    Stands,
    /// The job was cancelled or given up.
    CalledOff,
}

impl Journal {
    /// Notes a controller's answer about a job; the first one counts. Returns true for the first one.
    pub(crate) fn note_confirmation(&self, execution: &str, confirmation: Confirmation) -> bool {
        let entries = self.entries();
        self.confirmations.send_if_modified(|confirmations| {
            // A controller says Cancel before Ack, so a later Ack must not revive the job.
            if confirmations.contains_key(execution) {
                return false;
            }
            // Dropped entries need no answers: this keeps the map as small as the journal.
            confirmations.retain(|known, _| entries.get(known).is_some());
            confirmations.insert(execution.to_owned(), confirmation);
            true
        })
    }

    /// Waits for a controller's answer about a job, without a limit.
    pub async fn confirmation(&self, execution: &str) -> Confirmation {
        let called_off = async {
            let mut changes = self.changes();
            let off = |entry: &Entry| entry.state == State::Accepted && entry.cancel_requested;
            // An error: the journal is gone, and every waiter with it.
            drop(changes.wait_for(|entries| entries.get(execution).is_none_or(off)).await);
        };
        let heard = async {
            let mut confirmations = self.confirmations.subscribe();
            let heard = confirmations.wait_for(|known| known.contains_key(execution)).await;
            heard.ok().and_then(|known| known.get(execution).copied()).unwrap_or(Confirmation::CalledOff)
        };
        // Cancel-safe: neither wait holds anything. A cancel wins over an acknowledgement that came with it.
        tokio::select! {
            biased;
            () = called_off => Confirmation::CalledOff,
            confirmation = heard => confirmation,
        }
    }
}
