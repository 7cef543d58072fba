//! A controller's verdict about a new system. Kept in memory only: an agent that starts again asks again.

use super::{Entry, Journal};
use crate::job::{Failure, State};

/// A verdict about a new system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It becomes the default.
    Accepted,
    /// The installer gets the machine back.
    Refused(Failure),
}

impl Journal {
    /// Notes the verdict about the job of this execution.
    pub fn judge(&self, execution: &str, verdict: Verdict) {
        let entries = self.entries();
        self.verdicts.send_modify(|verdicts| {
            // Only a job that waits for one needs one: this keeps the map small.
            let waits = |name: &str| entries.get(name).is_some_and(|entry: &Entry| entry.state == State::Verifying);
            verdicts.retain(|known, _| waits(known));
            if waits(execution) {
                verdicts.insert(execution.to_owned(), verdict);
            }
        });
    }

    /// Waits for the verdict, without a limit. An acknowledgement is none.
    pub async fn verdict(&self, execution: &str) -> Verdict {
        let mut verdicts = self.verdicts.subscribe();
        let heard = verdicts.wait_for(|known| known.contains_key(execution)).await;
        match heard.ok().and_then(|known| known.get(execution).cloned()) {
            Some(verdict) => verdict,
            // The journal is gone, and every waiter with it.
            None => std::future::pending().await,
        }
    }
}
