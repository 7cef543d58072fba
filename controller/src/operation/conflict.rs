//! What a node says of an execution when the controller can neither take it nor prove it wrong.

use super::state::{ExecutionState, words};

words! {
    /// Why a report was not taken.
    Conflict {
        /// There is no such execution.
        Unknown = "UNKNOWN",
        /// The node was given it more than `MAX_AHEAD` times more often than the store knows of.
        Ahead = "AHEAD",
        /// The store had lost the delivery, and what the node says of its success proves nothing.
        Unproved = "UNPROVED",
        /// It had ended otherwise.
        Ended = "ENDED",
        /// The node is at work on it, and the store takes it for ended or has given the node other work.
        Busy = "BUSY",
    }
}

impl Conflict {
    /// Whether the node gets no work because of it, when it says that it is in this state: it would refuse the work, or
    /// the controller cannot tell what it would answer to.
    pub const fn holds(self, reported: ExecutionState) -> bool {
        match self {
            Self::Ended => false,
            Self::Ahead | Self::Unproved => true,
            Self::Unknown | Self::Busy => !reported.is_final(),
        }
    }

    /// Whether the report is acknowledged all the same. What was never asked for here needs no verdict, and an end that
    /// is kept need not be said again; of all else the acknowledgement would be an acceptance.
    pub const fn is_acknowledged(self) -> bool {
        matches!(self, Self::Unknown | Self::Ended)
    }

    /// For people: what the node reports (a state and perhaps its error), and what is stored.
    pub fn sentence(self, reported: &str, attempt: u32, known: Option<ExecutionState>) -> String {
        let known = known.map_or("unknown", ExecutionState::as_str);
        match self {
            Self::Unknown => format!("the node reports {reported}, and this controller knows no such execution"),
            Self::Ahead => format!(
                "the node reports {reported} under attempt {attempt}, far ahead of what the controller knows; its own \
                 state is {known}"
            ),
            Self::Unproved => format!(
                "the node reports {reported} under attempt {attempt}, which the controller had lost, and does not \
                 prove it; its own state is {known}"
            ),
            Self::Ended => format!("the node reports {reported}, and it had ended {known}"),
            Self::Busy => {
                format!(
                    "the node is at work on it ({reported}) and refuses other work; the controller's state is {known}"
                )
            }
        }
    }
}

/// What an operator decides about the conflicts of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// What the node says is taken.
    Accept,
    /// What it speaks of is given up.
    Abandon,
}

#[cfg(test)]
mod tests {
    use super::Conflict;
    use crate::operation::ExecutionState;

    #[test]
    fn only_what_ended_otherwise_never_keeps_a_node_from_work() {
        for conflict in Conflict::ALL.iter().copied() {
            assert_eq!(conflict.holds(ExecutionState::Running), conflict != Conflict::Ended, "{conflict}");
        }
        assert!(!Conflict::Unknown.holds(ExecutionState::Succeeded));
    }

    #[test]
    fn acknowledgement_is_never_an_acceptance_of_what_was_asked_here() {
        for conflict in [Conflict::Ahead, Conflict::Unproved, Conflict::Busy] {
            assert!(!conflict.is_acknowledged());
        }
        // Nothing waits for a verdict on these, and a node that is not acknowledged says them for ever.
        assert!(Conflict::Unknown.is_acknowledged() && Conflict::Ended.is_acknowledged());
        assert!(Conflict::Ahead.sentence("RUNNING", 7, None).contains("under attempt 7"));
    }
}
