//! The columns of rollouts and maintenance windows.

use super::Statements;

pub(super) const ROLLOUTS: Statements = Statements {
    name: "m0003_rollouts",
    statements: &[
        "ALTER TABLE operations ADD COLUMN rollout TEXT",
        // Number of failures that an operator has forgiven by resuming.
        "ALTER TABLE operations ADD COLUMN forgiven BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE operations ADD COLUMN maintenance_window TEXT",
        // Time until which the window is closed, as the dispatcher computed it last. NULL: open.
        "ALTER TABLE operations ADD COLUMN closed_until BIGINT",
        // True if the node had a stream as the operation began or was resumed.
        "ALTER TABLE executions ADD COLUMN present BOOLEAN NOT NULL DEFAULT FALSE",
    ],
};
