//! A journalled job, and the list of all.

use serde::{Deserialize, Serialize};

use super::JournalError;
use crate::job::{Action, Failure, Kind, Release, State, Tries};

/// A job as it is journalled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Name of the execution.
    pub execution: String,
    /// Number of the delivery (attempt) that reports name; 0: cancelled before it was ever assigned.
    pub attempt: u32,
    /// Number of the last state change, from 1. It rises by more than 1 where two systems may count on from one entry.
    pub sequence: u64,
    /// The action, with its artifacts and notice.
    pub action: Action,
    /// State as of `sequence`.
    pub state: State,
    /// Id of the boot under which that state was journalled.
    pub boot_id: String,
    /// Id of the boot under which it was accepted; empty in an entry of an older agent. It goes with the entry to the
    /// installer and into the new root.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub accept_boot_id: String,
    /// Reason of a job that did not succeed; of an unfinished one its last obstacle. `None`: nothing failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    /// Trial boots that did not come up.
    #[serde(default)]
    pub trials: u32,
    /// Failed tries of the installation.
    #[serde(default, skip_serializing_if = "Tries::is_none")]
    pub tries: Tries,
    /// The new system's release; `None` before VERIFYING.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<Release>,
    /// Highest sequence that the controller has stored; 0: none of this attempt.
    #[serde(default)]
    pub acked: u64,
    /// Time of the last acknowledgement: the controller's clock, microseconds since 1970; `None`: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acked_at: Option<i64>,
    /// A cancel arrived in time.
    #[serde(default)]
    pub cancel_requested: bool,
    /// A cancel arrived too late.
    #[serde(default)]
    pub cancel_refused: bool,
    /// It was read from an older copy after the newest one was lost: later states may have been journalled, done and
    /// reported.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub torn: bool,
}

impl Entry {
    /// Returns true if the controller has stored the present state.
    pub fn is_acked(&self) -> bool {
        self.acked >= self.sequence
    }

    pub(super) fn kind(&self) -> Kind {
        self.action.kind()
    }

    pub(super) fn step(&mut self, to: State, leap: u64, boot_id: &str) {
        self.state = to;
        // Saturating: a damaged number must not stop the node. Its reports are then repetitions.
        self.sequence = self.sequence.saturating_add(leap);
        boot_id.clone_into(&mut self.boot_id);
    }
}

/// Every job that the journal holds, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries(pub(super) Vec<Entry>);

impl Entries {
    /// The job of this execution.
    pub fn get(&self, execution: &str) -> Option<&Entry> {
        self.0.iter().find(|entry| entry.execution == execution)
    }

    /// The job that is not over; there is at most one.
    pub fn unfinished(&self) -> Option<&Entry> {
        self.0.iter().find(|entry| !entry.state.is_final())
    }

    /// All jobs, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.0.iter()
    }

    /// True if nothing in it waits for anything.
    pub(super) fn are_settled(&self) -> bool {
        self.0.iter().all(|entry| entry.state.is_final() && entry.is_acked())
    }

    pub(super) fn get_mut(&mut self, execution: &str) -> Result<&mut Entry, JournalError> {
        self.0
            .iter_mut()
            .find(|entry| entry.execution == execution)
            .ok_or_else(|| JournalError::NotFound(execution.to_owned()))
    }
}

/// Creates the first entry of a job, with sequence 1.
pub fn new_entry(execution: &str, attempt: u32, action: Action, state: State, boot_id: &str) -> Entry {
    Entry {
        execution: execution.to_owned(),
        attempt,
        sequence: 1,
        action,
        state,
        boot_id: boot_id.to_owned(),
        accept_boot_id: boot_id.to_owned(),
        error: None,
        trials: 0,
        tries: Tries::default(),
        release: None,
        acked: 0,
        acked_at: None,
        cancel_requested: false,
        cancel_refused: false,
        torn: false,
    }
}
