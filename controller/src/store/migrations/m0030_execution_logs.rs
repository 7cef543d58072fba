//! Log lines of executions that did not succeed. They have a table of their own, so that lists do not read them.

use super::Statements;

pub(super) const EXECUTION_LOGS: Statements = Statements {
    name: "m0030_execution_logs",
    statements: &["CREATE TABLE execution_logs (
            operation {ID} NOT NULL,
            node {ID} NOT NULL,
            time BIGINT NOT NULL,
            lines TEXT NOT NULL,
            cut BOOLEAN NOT NULL,
            PRIMARY KEY (operation, node),
            FOREIGN KEY (operation, node) REFERENCES executions (operation, node)
        )"],
};
