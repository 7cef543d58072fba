//! Users, API tokens, restrictions of join tokens, scopes of operations and schedules, and an append-only audit.

use sea_orm::{ConnectionTrait, DbBackend};
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, SchemaManager, async_trait};

pub(super) struct Access;

impl MigrationName for Access {
    fn name(&self) -> &str {
        "m0010_access"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for Access {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        let postgres = db.get_database_backend() == DbBackend::Postgres;
        let id = super::id_type(db.get_database_backend());
        let guards = if postgres { ON_POSTGRES } else { ON_SQLITE };
        for statement in STATEMENTS.iter().chain(guards) {
            db.execute_unprepared(&statement.replace("{ID}", id)).await?;
        }
        Ok(())
    }
}

const STATEMENTS: &[&str] = &[
    // A user's rights are stored here and not in the certificate, so that they can change.
    "CREATE TABLE users (
        id {ID} PRIMARY KEY,
        role TEXT NOT NULL,
        selector TEXT NOT NULL,
        create_time BIGINT NOT NULL,
        creator TEXT NOT NULL,
        revoke_time BIGINT
    )",
    "CREATE TABLE api_tokens (
        id {ID} PRIMARY KEY,
        secret_sha256 TEXT NOT NULL UNIQUE,
        role TEXT NOT NULL,
        selector TEXT NOT NULL,
        expire_time BIGINT NOT NULL,
        create_time BIGINT NOT NULL,
        creator TEXT NOT NULL,
        revoke_time BIGINT
    )",
    "CREATE INDEX certificates_subject ON certificates (subject)",
    "ALTER TABLE tokens ADD COLUMN cidrs TEXT NOT NULL DEFAULT '[]'",
    "ALTER TABLE tokens ADD COLUMN serials TEXT NOT NULL DEFAULT '[]'",
    "ALTER TABLE tokens ADD COLUMN nodes TEXT NOT NULL DEFAULT '[]'",
    // Labels that a node must carry. The empty object allows every node.
    "ALTER TABLE operations ADD COLUMN scope TEXT NOT NULL DEFAULT '{}'",
    "ALTER TABLE schedules ADD COLUMN scope TEXT NOT NULL DEFAULT '{}'",
    "ALTER TABLE audit ADD COLUMN credential TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE audit ADD COLUMN message TEXT NOT NULL DEFAULT ''",
];

// The code has no statement that changes the audit. The triggers also stop one that someone types by hand.
const ON_SQLITE: &[&str] = &[
    "CREATE TRIGGER audit_not_changed BEFORE UPDATE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit only grows'); END",
    "CREATE TRIGGER audit_not_deleted BEFORE DELETE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit only grows'); END",
];

const ON_POSTGRES: &[&str] = &[
    "CREATE FUNCTION audit_only_grows() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'the audit only grows'; END $$",
    "CREATE TRIGGER audit_not_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
        FOR EACH STATEMENT EXECUTE FUNCTION audit_only_grows()",
];
