//! Instances: the start of an agent that opened the node's present session, and the one before.

use sea_orm::ConnectionTrait as _;
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct Instances;

impl MigrationName for Instances {
    fn name(&self) -> &str {
        "m0020_instances"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for Instances {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        // Boot ids alone miss a folder that was copied on one machine, and containers that share a kernel.
        for column in ["instance", "previous_instance"] {
            db.execute_unprepared(&format!("ALTER TABLE nodes ADD COLUMN {column} TEXT NOT NULL DEFAULT ''")).await?;
        }
        Ok(())
    }
}
