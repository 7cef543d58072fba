//! Time at which an execution was found overdue, and the failures that an operator has forgiven.

use super::Statements;

pub(super) const OVERDUE: Statements = Statements {
    name: "m0050_overdue",
    statements: &[
        // Time at which it was found overdue. NULL: never, or by an earlier release.
        "ALTER TABLE executions ADD COLUMN overdue_time BIGINT",
        // Time at which an operator resumed the operation although this execution had failed or was overdue. NULL: never.
        "ALTER TABLE executions ADD COLUMN forgiven_time BIGINT",
        // Replaces the number in operations.forgiven, which is no longer read: the earliest failures are the forgiven ones.
        "UPDATE executions SET forgiven_time = update_time
            WHERE (state IN ('FAILED', 'ROLLED_BACK') OR overdue)
                AND (SELECT COUNT(*) FROM executions b WHERE b.operation = executions.operation
                     AND (b.state IN ('FAILED', 'ROLLED_BACK') OR b.overdue)
                     AND (b.update_time < executions.update_time
                          OR (b.update_time = executions.update_time AND b.node < executions.node)))
                    < (SELECT o.forgiven FROM operations o WHERE o.id = executions.operation
                       AND o.state IN ('SCHEDULED', 'RUNNING', 'PAUSED', 'CANCELLING'))",
    ],
};
