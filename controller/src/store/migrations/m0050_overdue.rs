//! Since when an execution is overdue, and which failures an operator has let pass.

use sea_orm::ConnectionTrait;
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct Overdue;

impl MigrationName for Overdue {
    fn name(&self) -> &str {
        "m0050_overdue"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for Overdue {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for statement in STATEMENTS {
            manager.get_connection().execute_unprepared(statement).await?;
        }
        Ok(())
    }
}

const STATEMENTS: &[&str] = &[
    // When it was found overdue; NULL: it never was, or an earlier version found it.
    "ALTER TABLE executions ADD COLUMN overdue_time BIGINT",
    // When an operator resumed the operation though this execution had failed or was overdue; NULL: nobody did.
    "ALTER TABLE executions ADD COLUMN forgiven_time BIGINT",
    // What was remembered as a number (operations.forgiven, not read any more): the failures that came first.
    "UPDATE executions SET forgiven_time = update_time
        WHERE (state IN ('FAILED', 'ROLLED_BACK') OR overdue)
            AND (SELECT COUNT(*) FROM executions b WHERE b.operation = executions.operation
                 AND (b.state IN ('FAILED', 'ROLLED_BACK') OR b.overdue)
                 AND (b.update_time < executions.update_time
                      OR (b.update_time = executions.update_time AND b.node < executions.node)))
                < (SELECT o.forgiven FROM operations o WHERE o.id = executions.operation
                   AND o.state IN ('SCHEDULED', 'RUNNING', 'PAUSED', 'CANCELLING'))",
];
