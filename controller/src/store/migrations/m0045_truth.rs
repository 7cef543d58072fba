//! Conflicting reports of nodes, and the last words of nodes that power off.

use sea_orm::ConnectionTrait as _;
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct Truth;

impl MigrationName for Truth {
    fn name(&self) -> &str {
        "m0045_truth"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for Truth {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        let id = super::id_type(db.get_database_backend());
        for column in
            ["goodbye_epoch BIGINT NOT NULL DEFAULT 0", "goodbye_time BIGINT", "changes BIGINT NOT NULL DEFAULT 0"]
        {
            db.execute_unprepared(&format!("ALTER TABLE executions ADD COLUMN {column}")).await?;
        }
        // No foreign key, because the store may not know the operation.
        let table = "CREATE TABLE conflicts (
            node {ID} NOT NULL,
            operation {ID} NOT NULL,
            kind TEXT NOT NULL,
            attempt BIGINT NOT NULL,
            sequence BIGINT NOT NULL,
            state TEXT NOT NULL,
            known TEXT,
            error_reason TEXT,
            error_message TEXT,
            boot_id TEXT NOT NULL,
            holds BOOLEAN NOT NULL,
            resolution TEXT NOT NULL DEFAULT '',
            time BIGINT NOT NULL,
            PRIMARY KEY (node, operation)
        )";
        db.execute_unprepared(&table.replace("{ID}", id)).await?;
        Ok(())
    }
}
