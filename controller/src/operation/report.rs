//! Decisions about reports and Hellos of nodes. Pure: the store applies them.

use super::{Action, Conflict, ExecutionError, ExecutionState, NodeMode, reason};

/// Most deliveries that a node may be ahead of the store. A fail-over or an old backup loses fewer. A higher number is
/// defective or a lie, and attempt 4294967295 once stopped every dispatch round.
const MAX_AHEAD: u32 = 1_000;
/// Highest attempt that is ever assigned, or adopted from a node.
pub const MAX_ATTEMPT: u32 = 1_000_000;

/// The stored state of an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// State that the last accepted change led to.
    pub state: ExecutionState,
    /// Number of its delivery; 0: never assigned.
    pub attempt: u32,
    /// The node's sequence of the last stored change; 0: none.
    pub sequence: u64,
    /// Reason of its error. `None`: no error.
    pub error_reason: Option<String>,
    /// Boot id of the node when it was assigned; empty if unknown.
    pub assign_boot_id: String,
    /// True if a cancel was requested.
    pub cancel_requested: bool,
}

/// Facts that a success has to match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected<'a> {
    /// Name of the execution, `operations/{id}/executions/{node}`.
    pub execution: &'a str,
    /// Requested action.
    pub action: &'a Action,
    /// The node's board family, by which its bootcode was chosen; empty if unknown.
    pub family: &'a str,
}

/// A report of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reported {
    /// Number of the delivery that the node works on.
    pub attempt: u32,
    /// Number of the state change in the node's journal.
    pub sequence: u64,
    /// State in the node's journal.
    pub state: ExecutionState,
    /// Reason of a failure or rollback.
    pub error: Option<ExecutionError>,
    /// Boot id of the node now; empty if not reported.
    pub boot_id: String,
    /// Boot id under which the node accepted the execution; empty if the agent does not report it.
    pub accept_boot_id: String,
    /// True if the state counts from an older copy of a torn journal. `sequence` then cannot be compared.
    pub journal_lost: bool,
    /// Execution that installed the running system, from its /etc/marco-release; empty: none.
    pub release_execution: String,
    /// SHA-256 of the image that the running system was installed from, in hex; empty: none.
    pub release_image: String,
    /// SHA-256 of the boot files, in hex, if only they were replaced; empty: none.
    pub release_boot: String,
}

/// Decision about a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportVerdict {
    /// Store this state and acknowledge.
    Change(ExecutionState, Option<ExecutionError>),
    /// Store this end, and refuse the new system. Do not acknowledge: an agent of protocol 1 would take that for the
    /// acceptance.
    Reject(ExecutionError),
    /// Nothing new: acknowledge again. VERIFYING gets this verdict only with proof.
    Duplicate,
    /// The state change is stored already. The report only brings progress.
    Progress,
    /// The report belongs to an earlier delivery: answer with the stored one.
    Stale,
    /// The node knows a later delivery than the store: store its attempt and this state, and acknowledge.
    Adopt(ExecutionState, Option<ExecutionError>),
    /// Neither acceptable nor provably wrong: keep it for an operator.
    Conflict(Conflict),
    /// Neither store nor acknowledge it.
    Refuse(&'static str),
}

/// Decision about an active execution after a Hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HelloVerdict {
    /// No change.
    Keep,
    /// Ask the node for its state.
    Ask,
    /// Store this state.
    Change(ExecutionState, Option<ExecutionError>),
}

/// Decides about a report, by the stored state and the facts that a success has to match.
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
    if reported.state == stored.state && (reported.sequence == stored.sequence || reported.journal_lost) {
        return match reported.state {
            // The node makes its new system the default once this is accepted, and a Hello may have stored
            // VERIFYING without proof. So it is proved again each time.
            ExecutionState::Verifying if prove(stored, reported, expected).is_err() => {
                ReportVerdict::Refuse("what the node runs is not what was asked")
            }
            ExecutionState::Verifying => ReportVerdict::Duplicate,
            _ => ReportVerdict::Progress,
        };
    }
    // A report of a lost journal cannot cross with a newer one: the loss is found at a start of the agent, and the
    // session of that start is the only one that may report.
    if reported.sequence <= stored.sequence && !reported.journal_lost && !was_never_stored(reported.state) {
        return ReportVerdict::Duplicate;
    }
    judge(stored, reported, expected)
}

/// True if a report in this state is news even below the stored sequence. A node whose newest journal was torn counts
/// from an older copy, and agents of protocol 1 do not say so. Then only the state tells: an end of an execution that has
/// not ended here was never stored. VERIFYING asks for a verdict, so it is proved and stored first, each time.
fn was_never_stored(state: ExecutionState) -> bool {
    state.is_final() || state == ExecutionState::Verifying
}

/// Decides about a later delivery than the stored one: the store lost deliveries (a fail-over, a restored backup), or
/// the node lies. The number is bounded by `MAX_AHEAD` and success needs its proof, but nothing fails because the store
/// forgot.
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

/// Decides about an ended execution. Only that of a node that was given up (NEVER_RETURNED) may change, and only to
/// another end.
fn on_late_report(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> ReportVerdict {
    let given_up = stored.error_reason.as_deref() == Some(reason::NEVER_RETURNED);
    // Attempt 0 is the cancel of an execution that the node never had. An older copy of a torn journal knows less than
    // what the whole one told, whatever its sequence.
    let known = reported.sequence <= stored.sequence || reported.journal_lost;
    let again = reported.attempt == 0 || (reported.attempt == stored.attempt && known);
    // A success without proof was stored as a failure. That very report must not become a conflict. Any other end
    // contradicts the stored one, also below the stored sequence: the node may count from a torn journal.
    let unproved =
        reported.state == ExecutionState::Succeeded && stored.error_reason.as_deref() == Some(reason::NOT_VERIFIED);
    // The older copy does not dispute the end that the whole one told: the node fails by it what it may have done.
    let judged = reported.attempt == 0 || (again && (unproved || reported.journal_lost));
    // A step that was never stored, of this delivery or a later one: the node goes on with what has ended. A node that
    // was given up is expected to, until it tells its end.
    let goes_on = !again && !given_up && reported.attempt >= stored.attempt;
    match reported.state {
        state if given_up && state.is_final() => judge(stored, reported, expected),
        // An acknowledgement of this report accepts the new system, so it needs proof here too.
        ExecutionState::Verifying if given_up || stored.state == ExecutionState::Succeeded => {
            match prove(stored, reported, expected) {
                Ok(()) => ReportVerdict::Duplicate,
                Err(_) if goes_on => ReportVerdict::Conflict(Conflict::Ended),
                Err(_) => ReportVerdict::Refuse("what the node runs is not what was asked"),
            }
        }
        ExecutionState::Verifying if goes_on => ReportVerdict::Conflict(Conflict::Ended),
        ExecutionState::Verifying => ReportVerdict::Refuse("the execution has ended without success"),
        // The node was believed to be off, but reports under the boot id that the power-off was to end.
        ExecutionState::Rebooting
            if stored.state == ExecutionState::Succeeded
                && matches!(expected.action, Action::PowerOff(_))
                && reported.boot_id == stored.assign_boot_id =>
        {
            ReportVerdict::Conflict(Conflict::Ended)
        }
        // Agrees with the stored end: nothing was done.
        ExecutionState::Cancelled if stored.state != ExecutionState::Succeeded => ReportVerdict::Duplicate,
        state if state.is_final() && state != stored.state && !judged => ReportVerdict::Conflict(Conflict::Ended),
        ExecutionState::Running | ExecutionState::Rebooting if goes_on => ReportVerdict::Conflict(Conflict::Ended),
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

/// Proves a success by a new boot id and, for an update, by the running system's /etc/marco-release. Without
/// this proof SUCCEEDED is not believed.
fn prove(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> Result<(), ExecutionError> {
    let refuse = |message: String| Err(ExecutionError::new(reason::NOT_VERIFIED, message));
    if reported.boot_id.is_empty() {
        return refuse("the report carries no boot id".to_owned());
    }
    // The controller may have assigned an execution again after the node had done it. The boot id of that assignment is
    // the one after the restart, so the node's own record of its acceptance takes precedence.
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
    // For a reboot or a power-off the new boot id suffices.
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

/// Sender of a Hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting<'a> {
    /// Role of its agent: the installed system's, or the installer's.
    pub mode: NodeMode,
    /// Boot id of the node now.
    pub boot_id: &'a str,
    /// True if it answers queries about executions that it does not list. Older agents do not.
    pub answers_queries: bool,
    /// True if its journal was lost since the last Hello that the controller answered.
    pub journal_lost: bool,
}

/// Decides about an active execution after a Hello. If it is `listed`, the caller has applied the Hello's report of it.
pub fn on_hello(stored: &Stored, action: &Action, listed: bool, greeting: Greeting<'_>) -> HelloVerdict {
    let boot_id = greeting.boot_id;
    let new_boot = boot_id != stored.assign_boot_id;
    match (stored.state, action, greeting.mode) {
        (ExecutionState::Assigned, ..) if listed => HelloVerdict::Keep,
        // The lost journal may have held it, so the node may have done it: to assign it again would do it twice.
        (ExecutionState::Assigned, ..) if greeting.journal_lost => HelloVerdict::Change(
            ExecutionState::Failed,
            Some(ExecutionError::new(
                reason::JOURNAL_LOST,
                "the node's journal was lost after the assignment, so it is not known whether the node did it",
            )),
        ),
        // The node never journalled it, so it can be assigned again or cancelled without harm.
        (ExecutionState::Assigned, ..) if stored.cancel_requested => {
            HelloVerdict::Change(ExecutionState::Cancelled, None)
        }
        (ExecutionState::Assigned, ..) => HelloVerdict::Change(ExecutionState::Pending, None),
        // A new boot id proves that the machine was off, even if the journal is lost.
        (ExecutionState::Rebooting, Action::PowerOff(_), _) if new_boot => {
            HelloVerdict::Change(ExecutionState::Succeeded, None)
        }
        // The stream broke during the shutdown. The agent reconnects until it is killed.
        (ExecutionState::Rebooting, Action::PowerOff(_), _) if listed => HelloVerdict::Keep,
        (ExecutionState::Rebooting, Action::PowerOff(_), _) => HelloVerdict::Change(
            ExecutionState::Failed,
            Some(ExecutionError::new(
                reason::STILL_ON,
                format!("the node was to power off and is still on under boot id {boot_id}"),
            )),
        ),
        // A journal lists all that is unsettled. Either the node lost the execution, or the store lost its end, as
        // after a restored backup. Only the node's answer tells these apart.
        (state, ..) if state.is_active() && !listed && greeting.answers_queries => HelloVerdict::Ask,
        // An agent that answers no queries: its silence has to count as the answer.
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

/// Change that follows from a node's answer that its journal does not hold the execution. `None`: no change.
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
