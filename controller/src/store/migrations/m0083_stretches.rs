//! How far an execution was in its state, and since when.

use sea_orm::ConnectionTrait as _;
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct Stretches;

impl MigrationName for Stretches {
    fn name(&self) -> &str {
        "m0083_stretches"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for Stretches {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for statement in STATEMENTS {
            manager.get_connection().execute_unprepared(statement).await?;
        }
        Ok(())
    }
}

const STATEMENTS: &[&str] = &[
    "ALTER TABLE executions ADD COLUMN furthest BIGINT NOT NULL DEFAULT 0",
    // NULL: nothing was heard of it since an earlier version stored it; then its assignment counts.
    "ALTER TABLE executions ADD COLUMN stretch_time BIGINT",
];
