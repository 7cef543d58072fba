//! Failures of schedules, and an index by creation time, because ids of operations no longer tell their order.

use sea_orm::ConnectionTrait;
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct ScheduleFailures;

impl MigrationName for ScheduleFailures {
    fn name(&self) -> &str {
        "m0055_schedule_failures"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for ScheduleFailures {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for statement in STATEMENTS {
            manager.get_connection().execute_unprepared(statement).await?;
        }
        Ok(())
    }
}

const STATEMENTS: &[&str] = &[
    "ALTER TABLE schedules ADD COLUMN failures BIGINT NOT NULL DEFAULT 0",
    "ALTER TABLE schedules ADD COLUMN failure TEXT NOT NULL DEFAULT ''",
    // The id of a scheduled operation carries its fire time, so lists are ordered by creation.
    "CREATE INDEX operations_create_time ON operations (create_time, id)",
];
