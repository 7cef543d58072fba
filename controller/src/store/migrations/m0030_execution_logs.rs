//! Log lines of executions that did not succeed. They have a table of their own, so that lists do not read them.

use sea_orm::{ConnectionTrait, DbBackend};
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct ExecutionLogs;

impl MigrationName for ExecutionLogs {
    fn name(&self) -> &str {
        "m0030_execution_logs"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for ExecutionLogs {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        let id = if db.get_database_backend() == DbBackend::Postgres { "TEXT COLLATE \"C\"" } else { "TEXT" };
        db.execute_unprepared(&TABLE.replace("{ID}", id)).await?;
        Ok(())
    }
}

const TABLE: &str = "CREATE TABLE execution_logs (
    operation {ID} NOT NULL,
    node {ID} NOT NULL,
    time BIGINT NOT NULL,
    lines TEXT NOT NULL,
    cut BOOLEAN NOT NULL,
    PRIMARY KEY (operation, node),
    FOREIGN KEY (operation, node) REFERENCES executions (operation, node)
)";
