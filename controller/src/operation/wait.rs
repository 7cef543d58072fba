//! Why an execution is not assigned yet.

use super::state::{OperationState, words};

words! {
    /// Whether a node is obeyed and given work.
    NodeState {
        /// Admitted.
        Approved = "APPROVED",
        /// Held until an admin approves it.
        AwaitingApproval = "AWAITING_APPROVAL",
        /// Shut out.
        Quarantined = "QUARANTINED",
    }
}

words! {
    /// In which role the agent of a node runs.
    NodeMode {
        /// As a daemon of the installed system.
        Running = "RUNNING",
        /// As the pre-boot installer.
        Installer = "INSTALLER",
    }
}

words! {
    /// What a PENDING execution waits for.
    WaitReason {
        /// Its time.
        NotDue = "NOT_DUE",
        /// The next opening of the maintenance window.
        WindowClosed = "WINDOW_CLOSED",
        /// The node's stream.
        NodeOffline = "NODE_OFFLINE",
        /// An admin's approval of the node.
        AwaitingApproval = "AWAITING_APPROVAL",
        /// The end of a pause.
        Paused = "PAUSED",
        /// The node's other execution.
        NodeBusy = "NODE_BUSY",
        /// The end of the installation: an installer takes only an update with an image.
        NodeInstalling = "NODE_INSTALLING",
        /// The end of the quarantine.
        NodeQuarantined = "NODE_QUARANTINED",
        /// An operator's word on what the node says and the controller cannot take.
        NodeConflict = "NODE_CONFLICT",
        /// A free slot of the rollout.
        NoSlot = "NO_SLOT",
        /// Nothing but the next round.
        Due = "DUE",
    }
}

/// What the reason is told from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitContext {
    /// The operation's state.
    pub operation: OperationState,
    /// Whether the operation installs an image.
    pub installs_image: bool,
    /// Whether its own time within the operation has not come.
    pub early: bool,
    /// The node's state.
    pub node: NodeState,
    /// Whether the node has an open stream.
    pub connected: bool,
    /// The role of its agent.
    pub mode: NodeMode,
    /// Whether it holds another execution.
    pub busy: bool,
    /// Whether it says something that the controller cannot take.
    pub conflict: bool,
    /// Whether the operation's maintenance window is closed.
    pub window_closed: bool,
}

/// What a PENDING execution waits for: first what an operator decided, then what the node lacks.
pub fn wait_reason(context: &WaitContext) -> WaitReason {
    if context.operation == OperationState::Scheduled {
        WaitReason::NotDue
    } else if context.operation == OperationState::Paused {
        WaitReason::Paused
    } else if context.early {
        WaitReason::NotDue
    } else if context.window_closed {
        WaitReason::WindowClosed
    } else if context.node == NodeState::Quarantined {
        WaitReason::NodeQuarantined
    } else if context.node == NodeState::AwaitingApproval {
        WaitReason::AwaitingApproval
    } else if !context.connected {
        WaitReason::NodeOffline
    } else if context.busy {
        WaitReason::NodeBusy
    } else if context.conflict {
        WaitReason::NodeConflict
    } else if context.mode == NodeMode::Installer && !context.installs_image {
        WaitReason::NodeInstalling
    } else {
        WaitReason::Due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_names_the_first_thing_that_stands_in_the_way() {
        let due = WaitContext {
            operation: OperationState::Running,
            installs_image: false,
            early: false,
            node: NodeState::Approved,
            connected: true,
            mode: NodeMode::Running,
            busy: false,
            conflict: false,
            window_closed: false,
        };
        assert_eq!(wait_reason(&due), WaitReason::Due);
        let installing = WaitContext { mode: NodeMode::Installer, ..due };
        assert_eq!(wait_reason(&installing), WaitReason::NodeInstalling);
        assert_eq!(wait_reason(&WaitContext { installs_image: true, ..installing }), WaitReason::Due);
        let torn = WaitContext { conflict: true, ..installing };
        assert_eq!(wait_reason(&torn), WaitReason::NodeConflict);
        let busy = WaitContext { busy: true, ..torn };
        assert_eq!(wait_reason(&busy), WaitReason::NodeBusy);
        let offline = WaitContext { connected: false, ..busy };
        assert_eq!(wait_reason(&offline), WaitReason::NodeOffline);
        let held = WaitContext { node: NodeState::AwaitingApproval, ..offline };
        assert_eq!(wait_reason(&held), WaitReason::AwaitingApproval);
        let out = WaitContext { node: NodeState::Quarantined, ..offline };
        assert_eq!(wait_reason(&out), WaitReason::NodeQuarantined);
        let early = WaitContext { early: true, ..out };
        assert_eq!(wait_reason(&early), WaitReason::NotDue);
        assert_eq!(wait_reason(&WaitContext { operation: OperationState::Paused, ..early }), WaitReason::Paused);
        let closed = WaitContext { window_closed: true, ..out };
        assert_eq!(wait_reason(&closed), WaitReason::WindowClosed);
        assert_eq!(wait_reason(&WaitContext { operation: OperationState::Paused, ..closed }), WaitReason::Paused);
        assert_eq!(wait_reason(&WaitContext { operation: OperationState::Scheduled, ..out }), WaitReason::NotDue);
    }
}
