//! Instances: the start of an agent that opened the node's present session, and the one before.

use super::Statements;

pub(super) const INSTANCES: Statements = Statements {
    name: "m0020_instances",
    statements: &[
        // Boot ids alone miss a folder that was copied on one machine, and containers that share a kernel.
        "ALTER TABLE nodes ADD COLUMN instance TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE nodes ADD COLUMN previous_instance TEXT NOT NULL DEFAULT ''",
    ],
};
