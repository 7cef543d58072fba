//! The furthest point of an execution in its state, and the time at which it was reached.

use super::Statements;

pub(super) const STRETCHES: Statements = Statements {
    name: "m0083_stretches",
    statements: &[
        "ALTER TABLE executions ADD COLUMN furthest BIGINT NOT NULL DEFAULT 0",
        // NULL: nothing was heard of it since an earlier version stored it; then its assignment counts.
        "ALTER TABLE executions ADD COLUMN stretch_time BIGINT",
    ],
};
