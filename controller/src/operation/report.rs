//! What a report or a Hello of a node changes: decisions only, the store applies them.

use super::{Action, ExecutionError, ExecutionState, NodeMode, reason};

/// What the controller has stored of an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its state.
    pub state: ExecutionState,
    /// Its delivery.
    pub attempt: u32,
    /// The last sequence that was committed.
    pub sequence: u64,
    /// The reason of its error, if it has one.
    pub error_reason: Option<String>,
    /// The node's boot id when it was assigned.
    pub assign_boot_id: String,
    /// Whether a cancel was asked for.
    pub cancel_requested: bool,
}

/// What makes a success true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected<'a> {
    /// The execution's name.
    pub execution: &'a str,
    /// What was asked.
    pub action: &'a Action,
    /// The node's board family, by which its bootcode was chosen.
    pub family: &'a str,
}

/// What the node says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reported {
    /// Under which delivery.
    pub attempt: u32,
    /// The number of the state change.
    pub sequence: u64,
    /// The state.
    pub state: ExecutionState,
    /// Why it did not succeed.
    pub error: Option<ExecutionError>,
    /// The boot id under which it is said.
    pub boot_id: String,
    /// The execution that the running system says it was installed by; empty: none.
    pub release_execution: String,
    /// The digest of the image that it says it was installed from.
    pub release_image: String,
    /// The digest of the boot files that were booted.
    pub release_boot: String,
}

/// What to do about a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportVerdict {
    /// Store this state and acknowledge.
    Change(ExecutionState, Option<ExecutionError>),
    /// Store this end; the report is not acknowledged, since the node would take that for its acceptance.
    Reject(ExecutionError),
    /// Nothing new; acknowledge again.
    Duplicate,
    /// Only progress.
    Progress,
    /// The report is of another delivery: answer with an Assign, under a new attempt.
    Stale,
    /// Neither stored nor acknowledged.
    Refuse(&'static str),
}

/// What to do about an active execution after a Hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HelloVerdict {
    /// Nothing.
    Keep,
    /// Store this state.
    Change(ExecutionState, Option<ExecutionError>),
}

/// What a report changes.
pub fn on_report(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> ReportVerdict {
    let _ = (stored, reported, expected);
    todo!()
}

/// What a Hello changes of an active execution, after the Hello's own report of it (if `listed`) was applied.
pub fn on_hello(stored: &Stored, action: &Action, listed: bool, mode: NodeMode, boot_id: &str) -> HelloVerdict {
    let _ = (stored, action, listed, mode, boot_id);
    todo!()
}
