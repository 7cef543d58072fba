//! Facts found in an image, stored with its digest. NULL until it was examined.

use sea_orm::ConnectionTrait as _;
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct ImageFacts;

impl MigrationName for ImageFacts {
    fn name(&self) -> &str {
        "m0070_image_facts"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for ImageFacts {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // No later check can read the image again: it is gigabytes, compressed, and may be at another controller.
        manager.get_connection().execute_unprepared("ALTER TABLE blobs ADD COLUMN facts TEXT").await?;
        Ok(())
    }
}
