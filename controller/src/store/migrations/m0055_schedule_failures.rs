//! Failures of schedules, and an index by creation time, because ids of operations no longer tell their order.

use super::Statements;

pub(super) const SCHEDULE_FAILURES: Statements = Statements {
    name: "m0055_schedule_failures",
    statements: &[
        "ALTER TABLE schedules ADD COLUMN failures BIGINT NOT NULL DEFAULT 0",
        "ALTER TABLE schedules ADD COLUMN failure TEXT NOT NULL DEFAULT ''",
        // The id of a scheduled operation carries its fire time, so lists are ordered by creation.
        "CREATE INDEX operations_create_time ON operations (create_time, id)",
    ],
};
