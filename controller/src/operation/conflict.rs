//! Reports of a node about an execution that the controller can neither accept nor refute.

use super::state::{ExecutionState, words};

words! {
    /// The reason why a report was not accepted.
    Conflict {
        /// The store knows no such execution.
        Unknown = "UNKNOWN",
        /// The node's attempt is more than `MAX_AHEAD` above the stored one.
        Ahead = "AHEAD",
        /// The store had lost the delivery, and the reported success comes without proof.
        Unproved = "UNPROVED",
        /// The stored execution had ended in another state.
        Ended = "ENDED",
        /// The node is at work on it; in the store it has ended, or the node has other work.
        Busy = "BUSY",
    }
}

impl Conflict {
    /// True if the node gets no work while it reports this state: it would refuse the work, or the controller could not
    /// tell which delivery its answers belong to.
    pub const fn holds(self, reported: ExecutionState) -> bool {
        match self {
            // The stored end stays, and the node is done with it.
            Self::Ended => false,
            // The store cannot tell which delivery the node's next answer is about.
            Self::Ahead | Self::Unproved => true,
            // After its end the node takes other work, whatever the store says.
            Self::Unknown | Self::Busy => !reported.is_final(),
        }
    }

    /// True if the report is acknowledged without a verdict. UNKNOWN needs none, because this controller never asked
    /// for it; ENDED needs none, because the stored end stays. For the others an acknowledgement would accept the
    /// report. That of VERIFYING always would.
    pub const fn is_acknowledged(self, reported: ExecutionState) -> bool {
        match self {
            Self::Unknown => true,
            Self::Ended => !matches!(reported, ExecutionState::Verifying),
            Self::Ahead | Self::Unproved | Self::Busy => false,
        }
    }

    /// A sentence for people: the node's report (`reported`: its state and perhaps its error) and the stored state.
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

/// An operator's decision about the conflicts of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Take the node's report.
    Accept,
    /// Give up the executions that the reports are about.
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
            assert!(!conflict.is_acknowledged(ExecutionState::Succeeded));
        }
        // Nobody decides about these two, and a node without an acknowledgement repeats its report with no limit.
        for state in [ExecutionState::Running, ExecutionState::Succeeded] {
            assert!(Conflict::Unknown.is_acknowledged(state) && Conflict::Ended.is_acknowledged(state));
        }
        // The node would make its new system the default.
        assert!(!Conflict::Ended.is_acknowledged(ExecutionState::Verifying));
        assert!(Conflict::Ahead.sentence("RUNNING", 7, None).contains("under attempt 7"));
    }
}
