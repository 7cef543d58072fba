//! Name of the user who paused an operation.

use super::Statements;

pub(super) const PAUSED_BY: Statements = Statements {
    name: "m0075_paused_by",
    statements: &["ALTER TABLE operations ADD COLUMN paused_by TEXT NOT NULL DEFAULT ''"],
};
