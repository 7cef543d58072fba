//! Name of the user who paused an operation.

use sea_orm::ConnectionTrait as _;
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct PausedBy;

impl MigrationName for PausedBy {
    fn name(&self) -> &str {
        "m0075_paused_by"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for PausedBy {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        db.execute_unprepared("ALTER TABLE operations ADD COLUMN paused_by TEXT NOT NULL DEFAULT ''").await?;
        Ok(())
    }
}
