//! The states of operations and executions, and the changes between them, each a named method.

use std::fmt;
use std::time::Duration;

use super::Action;

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
    /// Where an operation is.
    OperationState {
        /// Its time has not come.
        Scheduled = "SCHEDULED",
        /// Its executions are assigned or at work.
        Running = "RUNNING",
        /// Nothing further is assigned.
        Paused = "PAUSED",
        /// A cancel was asked for; some nodes have not answered.
        Cancelling = "CANCELLING",
        /// Every execution succeeded.
        Succeeded = "SUCCEEDED",
        /// At least one did not, and it was no plain cancellation.
        Failed = "FAILED",
        /// Cancelled, none failed or rolled back.
        Cancelled = "CANCELLED",
    }
}

words! {
    /// Where an execution is.
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
        /// Not done.
        Failed = "FAILED",
        /// Not done; the node runs what it ran before.
        RolledBack = "ROLLED_BACK",
        /// Cancelled before the point of no return.
        Cancelled = "CANCELLED",
        /// Not begun in time.
        Expired = "EXPIRED",
    }
}

/// Reasons of `ExecutionError` that the controller itself gives.
pub mod reason {
    /// The node accepted the execution, and later did not know of it.
    pub const JOURNAL_LOST: &str = "JOURNAL_LOST";
    /// The node said that it succeeded, and what it runs says otherwise.
    pub const NOT_VERIFIED: &str = "NOT_VERIFIED";
    /// The node was overdue for too long, or was given up by hand; a late true report may still change this.
    pub const NEVER_RETURNED: &str = "NEVER_RETURNED";
    /// The node was told to power off and came back under the same boot id.
    pub const STILL_ON: &str = "STILL_ON";
    /// The node was removed while it was at work.
    pub const NODE_DELETED: &str = "NODE_DELETED";
    /// The operation's expire_time passed before the execution was begun.
    pub const EXPIRED: &str = "EXPIRED";
}

/// Why an execution ended as it did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutionError {
    /// A stable word, for programs.
    pub reason: String,
    /// A sentence, for people.
    pub message: String,
}

impl ExecutionError {
    /// An error of these two parts.
    pub fn new(reason: &str, message: impl Into<String>) -> Self {
        Self { reason: reason.to_owned(), message: message.into() }
    }
}

/// An event that a state does not know.
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

/// How many executions of an operation are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// All.
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

/// The final state of an operation with these executions; `None` while one is unfinished.
pub fn final_state(counts: &Counts, cancel_requested: bool) -> Option<OperationState> {
    if counts.pending > 0 || counts.active > 0 {
        None
    } else if counts.succeeded == counts.total {
        Some(OperationState::Succeeded)
    } else if cancel_requested && counts.failed == 0 && counts.rolled_back == 0 {
        Some(OperationState::Cancelled)
    } else {
        Some(OperationState::Failed)
    }
}

impl OperationState {
    /// Whether it never changes again (but for a late true report of a node that was given up).
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    const fn refuse(self, event: &'static str) -> IllegalTransition {
        IllegalTransition { from: self.as_str(), event }
    }

    /// Its time has come.
    pub fn begin(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Scheduled => Ok(Self::Running),
            _ => Err(self.refuse("begin")),
        }
    }

    /// An operator holds it back.
    pub fn pause(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Scheduled | Self::Running => Ok(Self::Paused),
            _ => Err(self.refuse("pause")),
        }
    }

    /// An operator lets it go on; `due` tells whether its time has come.
    pub fn resume(self, due: bool) -> Result<Self, IllegalTransition> {
        match self {
            Self::Paused if due => Ok(Self::Running),
            Self::Paused => Ok(Self::Scheduled),
            _ => Err(self.refuse("resume")),
        }
    }

    /// An operator asks that it stop.
    pub fn cancel(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Scheduled | Self::Running | Self::Paused => Ok(Self::Cancelling),
            _ => Err(self.refuse("cancel")),
        }
    }

    /// Every execution has ended, with these counts. A FAILED operation can still become another when a node that was
    /// given up returns.
    pub fn finish(self, counts: &Counts, cancel_requested: bool) -> Result<Self, IllegalTransition> {
        match (self, final_state(counts, cancel_requested)) {
            (Self::Succeeded | Self::Cancelled, _) | (_, None) => Err(self.refuse("finish")),
            (_, Some(end)) => Ok(end),
        }
    }
}

impl ExecutionState {
    /// Whether it never changes again (but for FAILED with `NEVER_RETURNED`).
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::RolledBack | Self::Cancelled | Self::Expired)
    }

    /// Whether a node holds it: of these a node has at most one.
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Assigned | Self::Running | Self::Rebooting | Self::Verifying)
    }

    const fn refuse(self, event: &'static str) -> IllegalTransition {
        IllegalTransition { from: self.as_str(), event }
    }

    const fn from_active(self, to: Self, event: &'static str) -> Result<Self, IllegalTransition> {
        if self.is_active() { Ok(to) } else { Err(self.refuse(event)) }
    }

    /// Given to the node.
    pub fn assign(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Pending => Ok(Self::Assigned),
            _ => Err(self.refuse("assign")),
        }
    }

    /// The node never got it: a later Hello does not list it.
    pub fn take_back(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Assigned => Ok(Self::Pending),
            _ => Err(self.refuse("take back")),
        }
    }

    /// The node works on it: accepted, or its installer is at work, perhaps again after a trial that failed.
    pub fn run(self) -> Result<Self, IllegalTransition> {
        self.from_active(Self::Running, "run")
    }

    /// The node passed a point of no return. It may be the first state reported, when those before were lost on the way.
    pub fn arm(self) -> Result<Self, IllegalTransition> {
        self.from_active(Self::Rebooting, "arm")
    }

    /// The node is back under a new boot id.
    pub fn verify(self) -> Result<Self, IllegalTransition> {
        self.from_active(Self::Verifying, "verify")
    }

    /// Proved to be done.
    pub fn succeed(self) -> Result<Self, IllegalTransition> {
        self.from_active(Self::Succeeded, "succeed")
    }

    /// Refused, or went wrong, or was given up.
    pub fn fail(self) -> Result<Self, IllegalTransition> {
        self.from_active(Self::Failed, "fail")
    }

    /// The node runs what it ran before.
    pub fn roll_back(self) -> Result<Self, IllegalTransition> {
        self.from_active(Self::RolledBack, "roll back")
    }

    /// Stopped before the point of no return; what is not assigned needs no answer of the node.
    pub fn cancel(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Pending => Ok(Self::Cancelled),
            _ => self.from_active(Self::Cancelled, "cancel"),
        }
    }

    /// Not begun in time.
    pub fn expire(self) -> Result<Self, IllegalTransition> {
        match self {
            Self::Pending => Ok(Self::Expired),
            _ => Err(self.refuse("expire")),
        }
    }

    /// A node that was given up returned, and says how it ended. Whether it was given up is told by the error's reason
    /// (`reason::NEVER_RETURNED`), which the caller has looked at.
    pub fn return_late(self, end: Self) -> Result<Self, IllegalTransition> {
        match (self, end) {
            (Self::Failed, Self::Succeeded | Self::Failed | Self::RolledBack | Self::Cancelled) => Ok(end),
            _ => Err(self.refuse("return late")),
        }
    }

    /// The change that leads to `to`, whichever of the named ones it is.
    pub fn change_to(self, to: Self) -> Result<Self, IllegalTransition> {
        match to {
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

/// An assignment is answered at once by a node that has it.
const ASSIGNED_LIMIT: Duration = Duration::from_secs(60);
/// A node that is at work reports progress far more often; a Pi that writes to a slow card may be quiet for minutes.
const RUNNING_LIMIT: Duration = Duration::from_secs(30 * 60);
/// Shutting down, starting and, for an update, a file system check.
const REBOOTING_LIMIT: Duration = Duration::from_secs(10 * 60);
/// From the first report of the new system to its last.
const VERIFYING_LIMIT: Duration = Duration::from_secs(10 * 60);

/// How long after the last news a node in this state is overdue; `None` where nothing is awaited of it. The notice
/// counts, since a node that waits for it is in RUNNING and says nothing.
pub fn deadline_after(state: ExecutionState, action: &Action) -> Option<Duration> {
    match state {
        ExecutionState::Assigned => Some(ASSIGNED_LIMIT),
        ExecutionState::Running => Some(RUNNING_LIMIT.saturating_add(action.notice().delay)),
        ExecutionState::Rebooting => Some(REBOOTING_LIMIT),
        ExecutionState::Verifying => Some(VERIFYING_LIMIT),
        _ => None,
    }
}
