//! The states of operations and executions. Each change of state is a named method.

use std::fmt;

/// A closed set of words, stored as text and read back from it.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$word_doc:meta])* $word:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name { $($(#[$word_doc])* $word),+ }

        impl $name {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$word),+];

            /// The word as it is stored and shown.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$word => $text),+ }
            }

            /// The reverse of `as_str`.
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$word),)+ _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(super) use words;

words! {
    /// An operation's state.
    OperationState {
        /// Its scheduled time has not come.
        Scheduled = "SCHEDULED",
        /// Its executions are assigned or at work.
        Running = "RUNNING",
        /// No further execution is assigned.
        Paused = "PAUSED",
        /// A cancel was requested; some nodes have not answered yet.
        Cancelling = "CANCELLING",
        /// Every execution succeeded.
        Succeeded = "SUCCEEDED",
        /// At least one execution did not succeed, and not only because of a cancel.
        Failed = "FAILED",
        /// Cancelled, with no execution failed or rolled back.
        Cancelled = "CANCELLED",
    }
}

words! {
    /// An execution's state.
    ExecutionState {
        /// Not assigned.
        Pending = "PENDING",
        /// Sent to the node.
        Assigned = "ASSIGNED",
        /// Accepted by the node.
        Running = "RUNNING",
        /// Past the point of no return.
        Rebooting = "REBOOTING",
        /// The node is back and being checked.
        Verifying = "VERIFYING",
        /// Done and verified.
        Succeeded = "SUCCEEDED",
        /// Not done; `error` says why.
        Failed = "FAILED",
        /// Not done; the node runs what it ran before.
        RolledBack = "ROLLED_BACK",
        /// Cancelled before the point of no return.
        Cancelled = "CANCELLED",
        /// Not begun before the operation's expire time.
        Expired = "EXPIRED",
    }
}

/// Reasons of an `ExecutionError` that the controller itself sets.
pub mod reason {
    /// The node accepted the execution and later did not know it: its journal is gone.
    pub const JOURNAL_LOST: &str = "JOURNAL_LOST";
    /// The node reported success, but its boot id or release does not prove it.
    pub const NOT_VERIFIED: &str = "NOT_VERIFIED";
    /// The node was overdue for too long, or an operator gave it up; a late report with proof may still change this.
    pub const NEVER_RETURNED: &str = "NEVER_RETURNED";
    /// The node's labels were outside the scope of the user who asked for the operation, at the time when it was due.
    pub const OUTSIDE_SCOPE: &str = "OUTSIDE_SCOPE";
    /// The node was told to power off and came back under the same boot id.
    pub const STILL_ON: &str = "STILL_ON";
    /// The node was removed while it was at work.
    pub const NODE_DELETED: &str = "NODE_DELETED";
    /// The operation's expire_time passed before the execution was begun.
    pub const EXPIRED: &str = "EXPIRED";
    /// The stored operation cannot be turned into an assignment for this node.
    pub const NOT_ASSIGNABLE: &str = "NOT_ASSIGNABLE";
    /// An operator gave it up because the node and the controller disagreed about it.
    pub const CONFLICT_ABANDONED: &str = "CONFLICT_ABANDONED";
}

/// The reason why an execution did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutionError {
    /// A stable word, for programs.
    pub reason: String,
    /// A sentence, for people.
    pub message: String,
}

impl ExecutionError {
    /// Makes an error of a stable reason and a sentence.
    pub fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into() }
    }
}

/// An event that is not possible in this state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IllegalTransition {
    /// The state.
    pub from: &'static str,
    /// The event.
    pub event: &'static str,
}

impl fmt::Display for IllegalTransition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is not possible in state {}", self.event, self.from)
    }
}

impl std::error::Error for IllegalTransition {}

/// Numbers of executions of one operation, by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// All executions; the sum of the states, without `overdue`, which is part of `active`.
    pub total: u32,
    /// Not assigned.
    pub pending: u32,
    /// Between assignment and the final state.
    pub active: u32,
    /// Ended SUCCEEDED.
    pub succeeded: u32,
    /// Ended FAILED.
    pub failed: u32,
    /// Ended ROLLED_BACK.
    pub rolled_back: u32,
    /// Ended CANCELLED.
    pub cancelled: u32,
    /// Ended EXPIRED.
    pub expired: u32,
    /// Of the active ones, those past a deadline.
    pub overdue: u32,
}

/// The final state of an operation with these counts; `None`: an execution is unfinished.
pub fn final_state(counts: &Counts, cancel_requested: bool) -> Option<OperationState> {
    if counts.pending > 0 || counts.active > 0 {
        None
    } else if counts.succeeded == counts.total {
        Some(OperationState::Succeeded)
    // A node that failed is news for the operator, even if the rest was cancelled.
    } else if cancel_requested && counts.failed == 0 && counts.rolled_back == 0 {
        Some(OperationState::Cancelled)
    } else {
        Some(OperationState::Failed)
    }
}

impl OperationState {
    /// True if the state never changes again, except by a late report with proof from a node that was given up.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    const fn refuse(self, event: &'static str) -> IllegalTransition {
        IllegalTransition { from: self.as_str(), event }
    }

    /// Begins the operation at its scheduled time.
    pub fn begin(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Scheduled => Ok(Self::Running),
            _ => Err(self.refuse("begin")),
        }
    }

    /// Pauses it, by an operator or by the rollout's limits.
    pub fn pause(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Scheduled | Self::Running => Ok(Self::Paused),
            _ => Err(self.refuse("pause")),
        }
    }

    /// Resumes it; `due` is true if its scheduled time has come.
    pub fn resume(self, due: bool) -> Result<Self, IllegalTransition> {
        match self {
            Self::Paused if due => Ok(Self::Running),
            // Paused before its time: a resume must not start it early.
            Self::Paused => Ok(Self::Scheduled),
            _ => Err(self.refuse("resume")),
        }
    }

    /// Cancels it. Executions at work must still answer.
    pub fn cancel(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Scheduled | Self::Running | Self::Paused => Ok(Self::Cancelling),
            _ => Err(self.refuse("cancel")),
        }
    }

    /// Ends the operation with these counts. FAILED is accepted as a start: it changes when a node that was given up
    /// reports its end late.
    pub fn finish(self, counts: &Counts, cancel_requested: bool) -> Result<Self, IllegalTransition> {
        match (self, final_state(counts, cancel_requested)) {
            // These two stay: every execution of theirs has ended without a node that could still return.
            (Self::Succeeded | Self::Cancelled, _) | (_, None) => Err(self.refuse("finish")),
            (_, Some(end)) => Ok(end),
        }
    }
}

impl ExecutionState {
    /// True if the state never changes again, except FAILED with the reason `NEVER_RETURNED`.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::RolledBack | Self::Cancelled | Self::Expired)
    }

    /// True while a node holds the execution. A node holds at most one.
    pub const fn is_active(self) -> bool {
        // The partial unique index of the store has the same list: one active execution for each node.
        matches!(self, Self::Assigned | Self::Running | Self::Rebooting | Self::Verifying)
    }

    const fn refuse(self, event: &'static str) -> IllegalTransition {
        IllegalTransition { from: self.as_str(), event }
    }

    const fn while_active(self, to: Self, event: &'static str) -> Result<Self, IllegalTransition> {
        if self.is_active() { Ok(to) } else { Err(self.refuse(event)) }
    }

    /// Sent to the node.
    pub fn assign(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Pending => Ok(Self::Assigned),
            _ => Err(self.refuse("assign")),
        }
    }

    /// Returns to PENDING: a later Hello of the node does not list it, so the node never got it.
    pub fn take_back(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Assigned => Ok(Self::Pending),
            _ => Err(self.refuse("take back")),
        }
    }

    /// The node works on it: it accepted the execution, or its installer is at work, perhaps again after a failed trial
    /// boot.
    pub fn run(self) -> Result<Self, IllegalTransition> {
        // Any active state may come before: reports get lost on the way, and a failed trial boot leads back to RUNNING.
        self.while_active(Self::Running, "run")
    }

    /// The node passed the point of no return. It may be the first state reported: earlier reports can be lost on the
    /// way.
    pub fn arm(self) -> Result<Self, IllegalTransition> {
        self.while_active(Self::Rebooting, "arm")
    }

    /// The node is back under a new boot id.
    pub fn verify(self) -> Result<Self, IllegalTransition> {
        self.while_active(Self::Verifying, "verify")
    }

    /// Success is proved.
    pub fn succeed(self) -> Result<Self, IllegalTransition> {
        self.while_active(Self::Succeeded, "succeed")
    }

    /// The node refused it or failed, or an operator gave it up.
    pub fn fail(self) -> Result<Self, IllegalTransition> {
        self.while_active(Self::Failed, "fail")
    }

    /// The node runs what it ran before.
    pub fn roll_back(self) -> Result<Self, IllegalTransition> {
        self.while_active(Self::RolledBack, "roll back")
    }

    /// Cancelled before the point of no return. A PENDING execution needs no answer from the node.
    pub fn cancel(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Pending => Ok(Self::Cancelled),
            _ => self.while_active(Self::Cancelled, "cancel"),
        }
    }

    /// Not begun before the operation's expire time.
    pub fn expire(self) -> Result<Self, IllegalTransition> {
        // Only before the assignment: afterwards the node's report decides, because the node may already be at work.
        match self {
            Self::Pending => Ok(Self::Expired),
            _ => Err(self.refuse("expire")),
        }
    }

    /// Takes the state that a node reports for a delivery that the store had lost (fail-over, restored backup).
    pub fn adopt(self, to: Self) -> Result<Self, IllegalTransition> {
        match (self, to) {
            // The controller alone decides these three; no node reports them.
            (_, Self::Pending | Self::Assigned | Self::Expired) => Err(self.refuse("adopt")),
            (Self::Pending, _) => Ok(to),
            _ => self.while_active(to, "adopt"),
        }
    }

    /// Fails an execution that can never be given to its node, or that an operator gives up before its assignment.
    pub fn break_off(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Pending => Ok(Self::Failed),
            _ => self.fail(),
        }
    }

    /// A node that was given up reports its end. The caller has checked that the error's reason is
    /// `reason::NEVER_RETURNED`.
    pub fn return_late(self, end: Self) -> Result<Self, IllegalTransition> {
        match (self, end) {
            // EXPIRED is missing, because no node reports it.
            (Self::Failed, Self::Succeeded | Self::Failed | Self::RolledBack | Self::Cancelled) => Ok(end),
            _ => Err(self.refuse("return late")),
        }
    }

    /// Applies the named change that leads to `to`.
    pub fn change_to(self, to: Self) -> Result<Self, IllegalTransition> {
        match to {
            // First, because the late return is the only way out of FAILED.
            _ if self == Self::Failed => self.return_late(to),
            Self::Pending => self.take_back(),
            Self::Assigned => self.assign(),
            Self::Running => self.run(),
            Self::Rebooting => self.arm(),
            Self::Verifying => self.verify(),
            Self::Succeeded => self.succeed(),
            Self::Failed => self.fail(),
            Self::RolledBack => self.roll_back(),
            Self::Cancelled => self.cancel(),
            Self::Expired => self.expire(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ExecutionState as E;
    use OperationState as O;

    #[test]
    fn every_event_in_every_state_of_an_execution_is_a_named_change_or_refused() {
        const ACTIVE: &[E] = &[E::Assigned, E::Running, E::Rebooting, E::Verifying];
        type Event = fn(E) -> Result<E, IllegalTransition>;
        let events: [(Event, E, &[E]); 10] = [
            (E::assign, E::Assigned, &[E::Pending]),
            (E::take_back, E::Pending, &[E::Assigned]),
            (E::run, E::Running, ACTIVE),
            (E::arm, E::Rebooting, ACTIVE),
            (E::verify, E::Verifying, ACTIVE),
            (E::succeed, E::Succeeded, ACTIVE),
            (E::fail, E::Failed, ACTIVE),
            (E::roll_back, E::RolledBack, ACTIVE),
            (E::cancel, E::Cancelled, &[E::Pending, E::Assigned, E::Running, E::Rebooting, E::Verifying]),
            (E::expire, E::Expired, &[E::Pending]),
        ];
        for (event, to, from) in events {
            for state in E::ALL.iter().copied() {
                let expected = from.contains(&state);
                assert_eq!(event(state).ok(), expected.then_some(to), "{state} to {to}");
                if state != E::Failed {
                    assert_eq!(state.change_to(to), event(state), "{state} to {to}");
                }
            }
        }
    }

    #[test]
    fn only_a_failed_execution_returns_late_and_only_to_an_end_that_a_node_reports() {
        for state in E::ALL.iter().copied() {
            for end in E::ALL.iter().copied() {
                let possible = state == E::Failed && end.is_final() && end != E::Expired;
                assert_eq!(state.return_late(end).is_ok(), possible, "{state} to {end}");
            }
        }
    }

    #[test]
    fn what_has_ended_is_neither_adopted_nor_broken_off() {
        for state in E::ALL.iter().copied() {
            assert_eq!(state.break_off().ok(), (!state.is_final()).then_some(E::Failed), "{state}");
            for to in E::ALL.iter().copied() {
                let said_by_a_node = !matches!(to, E::Pending | E::Assigned | E::Expired);
                assert_eq!(
                    state.adopt(to).ok(),
                    (said_by_a_node && !state.is_final()).then_some(to),
                    "{state} to {to}"
                );
            }
        }
    }

    #[test]
    fn every_event_in_every_state_of_an_operation_is_a_named_change_or_refused() {
        let one_done = Counts { total: 1, succeeded: 1, ..Counts::default() };
        let one_left = Counts { total: 1, active: 1, ..Counts::default() };
        for state in O::ALL.iter().copied() {
            assert_eq!(state.begin().ok(), (state == O::Scheduled).then_some(O::Running));
            let open = matches!(state, O::Scheduled | O::Running);
            assert_eq!(state.pause().ok(), open.then_some(O::Paused));
            assert_eq!(state.resume(true).ok(), (state == O::Paused).then_some(O::Running));
            assert_eq!(state.resume(false).ok(), (state == O::Paused).then_some(O::Scheduled));
            let can_stop = open || state == O::Paused;
            assert_eq!(state.cancel().ok(), can_stop.then_some(O::Cancelling));
            let can_end = !matches!(state, O::Succeeded | O::Cancelled);
            assert_eq!(state.finish(&one_done, false).ok(), can_end.then_some(O::Succeeded));
            assert!(state.finish(&one_left, true).is_err());
        }
    }

    #[test]
    fn an_operation_succeeds_if_and_only_if_every_execution_did() {
        let with = |change: fn(&mut Counts)| {
            let mut counts = Counts { total: 3, succeeded: 2, ..Counts::default() };
            change(&mut counts);
            (final_state(&counts, false), final_state(&counts, true))
        };
        assert_eq!(with(|counts| counts.succeeded = 3), (Some(O::Succeeded), Some(O::Succeeded)));
        assert_eq!(with(|counts| counts.failed = 1), (Some(O::Failed), Some(O::Failed)));
        assert_eq!(with(|counts| counts.rolled_back = 1), (Some(O::Failed), Some(O::Failed)));
        assert_eq!(with(|counts| counts.cancelled = 1), (Some(O::Failed), Some(O::Cancelled)));
        assert_eq!(with(|counts| counts.expired = 1), (Some(O::Failed), Some(O::Cancelled)));
        assert_eq!(with(|counts| counts.pending = 1), (None, None));
        assert_eq!(with(|counts| counts.active = 1), (None, None));
    }

    #[test]
    fn words_are_read_back_as_they_are_written() {
        for state in E::ALL.iter().copied() {
            assert_eq!(E::parse(state.as_str()), Some(state));
            assert!(!(state.is_final() && state.is_active()));
        }
        for state in O::ALL.iter().copied() {
            assert_eq!(O::parse(state.as_str()), Some(state));
        }
        assert_eq!(E::parse("running"), None);
    }
}
