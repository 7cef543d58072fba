//! Artifacts that the file mirror serves by name.

use super::Statements;

pub(super) const OPEN_ARTIFACTS: Statements = Statements {
    name: "m0060_open_artifacts",
    statements: &[
        // Closed by default, because images hold Wi-Fi keys and password hashes.
        "ALTER TABLE artifacts ADD COLUMN open_to_mirror BOOLEAN NOT NULL DEFAULT FALSE",
    ],
};
