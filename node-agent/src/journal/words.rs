//! Jobs of earlier processes stand or fall by a controller's word.

use super::{Entry, Journal};
use crate::job::State;

/// A controller's word on a job, since this process began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// It stands.
    Go,
    /// It was called off.
    Stop,
}

impl Journal {
    /// Notes what a controller says of a job; the first word counts. Tells whether this is the first one.
    pub(crate) fn hear(&self, execution: &str, word: Word) -> bool {
        let entries = self.entries();
        self.words.send_if_modified(|words| {
            if words.contains_key(execution) {
                return false;
            }
            words.retain(|known, _| entries.get(known).is_some());
            words.insert(execution.to_owned(), word);
            true
        })
    }

    /// Waits for a controller's word on a job, without a limit.
    pub async fn word(&self, execution: &str) -> Word {
        let called_off = async {
            let mut changes = self.changes();
            let off = |entry: &Entry| entry.state == State::Accepted && entry.cancel_requested;
            // An error: the journal is gone, and with it whoever waits.
            drop(changes.wait_for(|entries| entries.get(execution).is_none_or(off)).await);
        };
        let heard = async {
            let mut words = self.words.subscribe();
            let heard = words.wait_for(|words| words.contains_key(execution)).await;
            heard.ok().and_then(|words| words.get(execution).copied()).unwrap_or(Word::Stop)
        };
        // Neither wait holds anything.
        tokio::select! {
            biased;
            () = called_off => Word::Stop,
            word = heard => word,
        }
    }
}
