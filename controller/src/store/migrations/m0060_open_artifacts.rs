//! Artifacts that the file mirror serves by name.

use sea_orm::ConnectionTrait as _;
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct OpenArtifacts;

impl MigrationName for OpenArtifacts {
    fn name(&self) -> &str {
        "m0060_open_artifacts"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for OpenArtifacts {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        // Closed by default, because images hold Wi-Fi keys and password hashes.
        db.execute_unprepared("ALTER TABLE artifacts ADD COLUMN open_to_mirror BOOLEAN NOT NULL DEFAULT FALSE").await?;
        Ok(())
    }
}
