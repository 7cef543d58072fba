//! The reason why an execution is not assigned yet.

use super::state::{OperationState, words};

words! {
    /// A node's admission. Only an approved node gets work.
    NodeState {
        /// Admitted; gets work.
        Approved = "APPROVED",
        /// Held until an admin approves it.
        AwaitingApproval = "AWAITING_APPROVAL",
        /// Shut out by an operator.
        Quarantined = "QUARANTINED",
    }
}

words! {
    /// The role in which a node's agent runs.
    NodeMode {
        /// As a daemon of the installed system.
        Running = "RUNNING",
        /// As the pre-boot installer.
        Installer = "INSTALLER",
    }
}

words! {
    /// The obstacle that keeps a PENDING execution waiting.
    WaitReason {
        /// The scheduled time of its operation, or its own.
        NotDue = "NOT_DUE",
        /// The maintenance window is closed.
        WindowClosed = "WINDOW_CLOSED",
        /// The node has no open stream.
        NodeOffline = "NODE_OFFLINE",
        /// An admin has not approved the node yet.
        AwaitingApproval = "AWAITING_APPROVAL",
        /// The operation is paused.
        Paused = "PAUSED",
        /// The node has another active execution.
        NodeBusy = "NODE_BUSY",
        /// The node is in its installer, which takes only an update with an image.
        NodeInstalling = "NODE_INSTALLING",
        /// The node is quarantined.
        NodeQuarantined = "NODE_QUARANTINED",
        /// The node reports something that the controller cannot accept; an operator must decide.
        NodeConflict = "NODE_CONFLICT",
        /// The rollout has no free slot.
        NoSlot = "NO_SLOT",
        /// Nothing; the dispatcher's next round assigns it.
        Due = "DUE",
    }
}

/// Facts from which `wait_reason` chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitContext {
    /// The operation's state.
    pub operation: OperationState,
    /// True if the operation installs an image.
    pub installs_image: bool,
    /// True if the execution's own time within the operation has not come.
    pub early: bool,
    /// The node's admission.
    pub node: NodeState,
    /// True if the node has an open stream.
    pub connected: bool,
    /// The role of the node's agent.
    pub mode: NodeMode,
    /// True if the node has another active execution.
    pub busy: bool,
    /// True if the node has a conflict that keeps it from work.
    pub conflict: bool,
    /// True if the operation's maintenance window is closed.
    pub window_closed: bool,
}

/// The first obstacle of a PENDING execution: operators' decisions come before the node's condition.
pub fn wait_reason(context: &WaitContext) -> WaitReason {
    // Only the first match is shown. The operation comes first: while it is paused, no change of the node helps.
    if context.operation == OperationState::Scheduled {
        WaitReason::NotDue
    } else if context.operation == OperationState::Paused {
        WaitReason::Paused
    // Jitter of a schedule: the operation is due, and this node is not yet.
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
