//! Schedules, the outcomes of their fire times, and the columns that link operations and executions to them.

use super::Statements;

pub(super) const SCHEDULES: Statements = Statements {
    name: "m0002_schedules",
    statements: &[
        "CREATE TABLE schedules (
            id {ID} PRIMARY KEY,
            cron TEXT NOT NULL,
            time_zone TEXT NOT NULL,
            template TEXT NOT NULL,
            missed_fire TEXT NOT NULL,
            overlap TEXT NOT NULL,
            jitter BIGINT NOT NULL,
            expire_after BIGINT NOT NULL,
            paused BOOLEAN NOT NULL DEFAULT FALSE,
            pause_reason TEXT NOT NULL DEFAULT '',
            creator TEXT NOT NULL,
            create_time BIGINT NOT NULL,
            update_time BIGINT NOT NULL,
            revision BIGINT NOT NULL DEFAULT 1,
            next_fire BIGINT,
            last_fire BIGINT
        )",
        "CREATE INDEX schedules_next_fire ON schedules (next_fire) WHERE next_fire IS NOT NULL",
        // One row for each fire time. Its insertion is the decision.
        "CREATE TABLE fires (
            schedule {ID} NOT NULL REFERENCES schedules (id) ON DELETE CASCADE,
            fire_time BIGINT NOT NULL,
            outcome TEXT NOT NULL,
            reason TEXT NOT NULL,
            operation TEXT,
            record_time BIGINT NOT NULL,
            PRIMARY KEY (schedule, fire_time)
        )",
        "ALTER TABLE operations ADD COLUMN schedule TEXT",
        "ALTER TABLE operations ADD COLUMN fire_time BIGINT",
        "CREATE INDEX operations_schedule ON operations (schedule, state) WHERE schedule IS NOT NULL",
        // 0: nothing holds it back, or no longer.
        "ALTER TABLE executions ADD COLUMN not_before BIGINT NOT NULL DEFAULT 0",
        "CREATE INDEX executions_not_before ON executions (not_before) WHERE not_before > 0",
    ],
};
