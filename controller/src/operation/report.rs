//! What a report or a Hello of a node changes: decisions only, the store applies them.

use super::{Action, Conflict, ExecutionError, ExecutionState, NodeMode, reason};

/// How far ahead of the store a node is believed: a fail-over or an old backup loses deliveries, not thousands of them.
const MAX_AHEAD: u32 = 1_000;
/// The highest attempt that is ever given out or taken from a node.
pub const MAX_ATTEMPT: u32 = 1_000_000;

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
    /// The boot id under which the node accepted the execution; empty: the agent does not say.
    pub accept_boot_id: String,
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
    /// Nothing new; acknowledge again. Never said of VERIFYING without proof.
    Duplicate,
    /// This state change is stored; what is left is progress.
    Progress,
    /// The report is of an earlier delivery: answer with the delivery that counts, which is the store's.
    Stale,
    /// The node knows a later delivery than the store: store its attempt and this state, and acknowledge.
    Adopt(ExecutionState, Option<ExecutionError>),
    /// It can neither be taken nor proved wrong: it is kept for an operator.
    Conflict(Conflict),
    /// Neither stored nor acknowledged.
    Refuse(&'static str),
}

/// What to do about an active execution after a Hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HelloVerdict {
    /// Nothing.
    Keep,
    /// Ask the node what became of it.
    Ask,
    /// Store this state.
    Change(ExecutionState, Option<ExecutionError>),
}

/// What a report changes.
pub fn on_report(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> ReportVerdict {
    if matches!(reported.state, ExecutionState::Pending | ExecutionState::Assigned | ExecutionState::Expired) {
        return ReportVerdict::Refuse("a node does not report this state");
    }
    if stored.state.is_final() {
        return on_late_report(stored, reported, expected);
    }
    if reported.attempt > stored.attempt {
        return on_later_delivery(stored, reported, expected);
    }
    if stored.state == ExecutionState::Pending || reported.attempt != stored.attempt {
        return ReportVerdict::Stale;
    }
    if reported.sequence == stored.sequence && reported.state == stored.state {
        return match reported.state {
            // The acknowledgement is the verdict, and a Hello may have stored this state without proof.
            ExecutionState::Verifying if prove(stored, reported, expected).is_err() => {
                ReportVerdict::Refuse("what the node runs is not what was asked")
            }
            ExecutionState::Verifying => ReportVerdict::Duplicate,
            _ => ReportVerdict::Progress,
        };
    }
    if reported.sequence <= stored.sequence && !was_never_stored(reported.state) {
        return ReportVerdict::Duplicate;
    }
    judge(stored, reported, expected)
}

/// Whether a report below the stored sequence is news all the same: the node counts from an older copy of its journal, as
/// the newest was torn. The sequence tells nothing then, and the state does. An end of what has not ended was never
/// stored. VERIFYING asks for a verdict, which its acknowledgement is, so it is proved and stored first, each time.
fn was_never_stored(state: ExecutionState) -> bool {
    state.is_final() || state == ExecutionState::Verifying
}

/// A report of a delivery that the store does not know: it lost the latest ones (a fail-over, a backup), or the node lies.
/// What is taken is bounded by what was sent, and nothing fails because the store forgot.
fn on_later_delivery(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> ReportVerdict {
    let ahead = reported.attempt.saturating_sub(stored.attempt);
    if ahead > MAX_AHEAD || reported.attempt > MAX_ATTEMPT {
        return ReportVerdict::Conflict(Conflict::Ahead);
    }
    match reported.state {
        ExecutionState::Succeeded | ExecutionState::Verifying => match prove(stored, reported, expected) {
            Ok(()) => ReportVerdict::Adopt(reported.state, None),
            Err(_) => ReportVerdict::Conflict(Conflict::Unproved),
        },
        state => ReportVerdict::Adopt(state, reported.error.clone()),
    }
}

/// A report on what has ended. Only a node that was given up may still change its end, and only to another end.
fn on_late_report(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> ReportVerdict {
    let given_up = stored.error_reason.as_deref() == Some(reason::NEVER_RETURNED);
    // This state change was judged before, and perhaps not believed; attempt 0 is a cancel of what the node never had.
    let judged = reported.attempt == 0 || (reported.attempt == stored.attempt && reported.sequence <= stored.sequence);
    match reported.state {
        state if given_up && state.is_final() => judge(stored, reported, expected),
        // The acknowledgement of this report is the acceptance of the new system.
        ExecutionState::Verifying if given_up || stored.state == ExecutionState::Succeeded => {
            match prove(stored, reported, expected) {
                Ok(()) => ReportVerdict::Duplicate,
                Err(_) => ReportVerdict::Refuse("what the node runs is not what was asked"),
            }
        }
        ExecutionState::Verifying => ReportVerdict::Refuse("the execution has ended without success"),
        // It was believed to be off, and speaks under the boot that was to end.
        ExecutionState::Rebooting
            if stored.state == ExecutionState::Succeeded
                && matches!(expected.action, Action::PowerOff(_))
                && reported.boot_id == stored.assign_boot_id =>
        {
            ReportVerdict::Conflict(Conflict::Ended)
        }
        // Nothing was done, as what is stored says.
        ExecutionState::Cancelled if stored.state != ExecutionState::Succeeded => ReportVerdict::Duplicate,
        state if state.is_final() && state != stored.state && !judged => ReportVerdict::Conflict(Conflict::Ended),
        _ => ReportVerdict::Duplicate,
    }
}

fn judge(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> ReportVerdict {
    match reported.state {
        ExecutionState::Succeeded => match prove(stored, reported, expected) {
            Ok(()) => ReportVerdict::Change(ExecutionState::Succeeded, None),
            Err(error) => ReportVerdict::Change(ExecutionState::Failed, Some(error)),
        },
        ExecutionState::Verifying => match prove(stored, reported, expected) {
            Ok(()) => ReportVerdict::Change(ExecutionState::Verifying, None),
            Err(error) => ReportVerdict::Reject(error),
        },
        state => ReportVerdict::Change(state, reported.error.clone()),
    }
}

/// Success is not believed but proved: a new boot id, and for an update what the running system says it is.
fn prove(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> Result<(), ExecutionError> {
    let refuse = |message: String| Err(ExecutionError::new(reason::NOT_VERIFIED, message));
    if reported.boot_id.is_empty() {
        return refuse("the report carries no boot id".to_owned());
    }
    // An execution that was done before it was assigned again has the same boot id as the assignment: the node's own
    // record of when it accepted it tells the two apart.
    let before = match reported.accept_boot_id.as_str() {
        "" => stored.assign_boot_id.as_str(),
        accepted => accepted,
    };
    if before.is_empty() {
        return refuse("it is not known under which boot id the node accepted it".to_owned());
    }
    if reported.boot_id == before {
        return refuse(format!("the node still runs under boot id {before}"));
    }
    let Action::Update(update) = expected.action else { return Ok(()) };
    if reported.release_execution != expected.execution {
        return refuse(format!("the running system was installed by {:?}", reported.release_execution));
    }
    let (what, wanted, found) = match (&update.image, update.bootcode_for(expected.family)) {
        (Some(image), _) => ("image", &image.sha256, &reported.release_image),
        (None, Some(boot)) => ("boot files", &boot.sha256, &reported.release_boot),
        (None, None) => return Ok(()),
    };
    if found == wanted {
        Ok(())
    } else {
        refuse(format!("the node runs the {what} {found:?}, asked for was {wanted:?}"))
    }
}

/// Who says Hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting<'a> {
    /// The role of its agent.
    pub mode: NodeMode,
    /// Its boot id.
    pub boot_id: &'a str,
    /// It can be asked about an execution that it does not list.
    pub answers_queries: bool,
}

/// What a Hello changes of an active execution, after the Hello's own report of it (if `listed`) was applied.
pub fn on_hello(stored: &Stored, action: &Action, listed: bool, greeting: Greeting<'_>) -> HelloVerdict {
    let boot_id = greeting.boot_id;
    let new_boot = boot_id != stored.assign_boot_id;
    match (stored.state, action, greeting.mode) {
        (ExecutionState::Assigned, ..) if listed => HelloVerdict::Keep,
        // It was never accepted, so it can be given again, or dropped.
        (ExecutionState::Assigned, ..) if stored.cancel_requested => {
            HelloVerdict::Change(ExecutionState::Cancelled, None)
        }
        (ExecutionState::Assigned, ..) => HelloVerdict::Change(ExecutionState::Pending, None),
        // Off and on again is what was asked, whatever became of the journal.
        (ExecutionState::Rebooting, Action::PowerOff(_), _) if new_boot => {
            HelloVerdict::Change(ExecutionState::Succeeded, None)
        }
        // Its stream broke on its way down: it stays connected until it is killed.
        (ExecutionState::Rebooting, Action::PowerOff(_), _) if listed => HelloVerdict::Keep,
        (ExecutionState::Rebooting, Action::PowerOff(_), _) => HelloVerdict::Change(
            ExecutionState::Failed,
            Some(ExecutionError::new(
                reason::STILL_ON,
                format!("the node was to power off and is still on under boot id {boot_id}"),
            )),
        ),
        // A journal lists what is not settled: the node lost it, or it was settled and the store lost that.
        (state, ..) if state.is_active() && !listed && greeting.answers_queries => HelloVerdict::Ask,
        (state, ..) if state.is_active() && !listed => {
            HelloVerdict::Change(ExecutionState::Failed, Some(journal_lost()))
        }
        (ExecutionState::Rebooting, Action::Update(_), NodeMode::Installer) => {
            HelloVerdict::Change(ExecutionState::Running, None)
        }
        (ExecutionState::Rebooting, _, NodeMode::Running) if new_boot => {
            HelloVerdict::Change(ExecutionState::Verifying, None)
        }
        _ => HelloVerdict::Keep,
    }
}

/// What a node's answer that its journal does not hold an execution changes, if anything.
pub fn on_not_held(stored: &Stored) -> Option<(ExecutionState, Option<ExecutionError>)> {
    match stored.state {
        ExecutionState::Assigned if stored.cancel_requested => Some((ExecutionState::Cancelled, None)),
        ExecutionState::Assigned => Some((ExecutionState::Pending, None)),
        state if state.is_active() => Some((ExecutionState::Failed, Some(journal_lost()))),
        _ => None,
    }
}

fn journal_lost() -> ExecutionError {
    ExecutionError::new(reason::JOURNAL_LOST, "the node accepted the execution and no longer knows of it")
}

#[cfg(test)]
mod tests;
