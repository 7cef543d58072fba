//! The columns of rollouts and maintenance windows.

use sea_orm::ConnectionTrait;
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct Rollouts;

impl MigrationName for Rollouts {
    fn name(&self) -> &str {
        "m0003_rollouts"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for Rollouts {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for statement in COLUMNS {
            manager.get_connection().execute_unprepared(statement).await?;
        }
        Ok(())
    }
}

const COLUMNS: &[&str] = &[
    "ALTER TABLE operations ADD COLUMN rollout TEXT",
    // Number of failures that an operator has forgiven by resuming.
    "ALTER TABLE operations ADD COLUMN forgiven BIGINT NOT NULL DEFAULT 0",
    "ALTER TABLE operations ADD COLUMN maintenance_window TEXT",
    // Time until which the window is closed, as the dispatcher computed it last. NULL: open.
    "ALTER TABLE operations ADD COLUMN closed_until BIGINT",
    // True if the node had a stream as the operation began or was resumed.
    "ALTER TABLE executions ADD COLUMN present BOOLEAN NOT NULL DEFAULT FALSE",
];
