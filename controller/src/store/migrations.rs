//! The tables. Times are microseconds since 1970, UTC. Enumerations and JSON are stored as text.

use sea_orm::{ConnectionTrait, DbBackend};
use sea_orm_migration::prelude::{DbErr, MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait};

mod m0002_schedules;
mod m0003_rollouts;
mod m0010_access;
mod m0020_instances;
mod m0030_execution_logs;
mod m0045_truth;
mod m0050_overdue;
mod m0055_schedule_failures;
mod m0060_open_artifacts;
mod m0065_node_keys;
mod m0070_image_facts;
mod m0075_paused_by;
mod m0083_stretches;

/// The migrations, oldest first. A released one is never changed.
pub(super) struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(Tables),
            Box::new(m0002_schedules::SCHEDULES),
            Box::new(m0003_rollouts::ROLLOUTS),
            Box::new(m0010_access::Access),
            Box::new(m0020_instances::INSTANCES),
            Box::new(m0030_execution_logs::EXECUTION_LOGS),
            Box::new(m0045_truth::Truth),
            Box::new(m0050_overdue::OVERDUE),
            Box::new(m0055_schedule_failures::SCHEDULE_FAILURES),
            Box::new(m0060_open_artifacts::OPEN_ARTIFACTS),
            Box::new(m0065_node_keys::NODE_KEYS),
            Box::new(m0070_image_facts::IMAGE_FACTS),
            Box::new(m0075_paused_by::PAUSED_BY),
            Box::new(m0083_stretches::STRETCHES),
        ]
    }
}

/// The type of ids. They are sorted by their bytes, not by the rules of the database's language. Pages depend on that order.
fn id_type(backend: DbBackend) -> &'static str {
    if backend == DbBackend::Postgres { "TEXT COLLATE \"C\"" } else { "TEXT" }
}

/// A migration of statements that both databases take. `{ID}` stands for the type of ids.
struct Statements {
    name: &'static str,
    statements: &'static [&'static str],
}

impl MigrationName for Statements {
    fn name(&self) -> &str {
        self.name
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for Statements {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        let id = id_type(db.get_database_backend());
        for statement in self.statements {
            db.execute_unprepared(&statement.replace("{ID}", id)).await?;
        }
        Ok(())
    }
}

struct Tables;

impl MigrationName for Tables {
    fn name(&self) -> &str {
        "m0001_tables"
    }
}

#[allow(elided_lifetimes_in_paths, reason = "the trait spells it so, and its macro takes no other")]
#[async_trait::async_trait]
impl MigrationTrait for Tables {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let db = manager.get_connection();
        let backend = db.get_database_backend();
        let id = id_type(backend);
        let (bytes, counter) = if backend == DbBackend::Postgres {
            ("BYTEA", "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY")
        } else {
            ("BLOB", "INTEGER PRIMARY KEY")
        };
        for statement in TABLES {
            let text = statement.replace("{ID}", id).replace("{BYTES}", bytes).replace("{COUNTER}", counter);
            db.execute_unprepared(&text).await?;
        }
        Ok(())
    }
}

const TABLES: &[&str] = &[
    "CREATE TABLE controllers (
        id {ID} PRIMARY KEY,
        address TEXT NOT NULL,
        beat_time BIGINT NOT NULL
    )",
    "CREATE TABLE nodes (
        id {ID} PRIMARY KEY,
        display_name TEXT NOT NULL DEFAULT '',
        labels TEXT NOT NULL DEFAULT '{}',
        state TEXT NOT NULL,
        state_reason TEXT NOT NULL DEFAULT '',
        serial TEXT NOT NULL DEFAULT '',
        key_sha256 TEXT NOT NULL,
        generation BIGINT NOT NULL DEFAULT 1,
        controller_id TEXT,
        session_epoch BIGINT NOT NULL DEFAULT 0,
        session_time BIGINT,
        disconnect_time BIGINT,
        mode TEXT,
        board TEXT NOT NULL DEFAULT '{}',
        family TEXT NOT NULL DEFAULT '',
        system TEXT NOT NULL DEFAULT '{}',
        boot_id TEXT NOT NULL DEFAULT '',
        previous_boot_id TEXT NOT NULL DEFAULT '',
        agent_version TEXT NOT NULL DEFAULT '',
        create_time BIGINT NOT NULL,
        last_seen BIGINT
    )",
    "CREATE INDEX nodes_serial ON nodes (serial)",
    "CREATE INDEX nodes_key ON nodes (key_sha256)",
    "CREATE INDEX nodes_controller ON nodes (controller_id)",
    // `UNIQUE (creator, request_id)`: a repeated request finds the operation of the first one.
    "CREATE TABLE operations (
        id {ID} PRIMARY KEY,
        action TEXT NOT NULL,
        action_kind TEXT NOT NULL,
        installs_image BOOLEAN NOT NULL,
        target TEXT NOT NULL,
        state TEXT NOT NULL,
        state_reason TEXT NOT NULL DEFAULT '',
        cancel_requested BOOLEAN NOT NULL DEFAULT FALSE,
        schedule_time BIGINT NOT NULL,
        expire_time BIGINT NOT NULL,
        creator TEXT NOT NULL,
        request_id TEXT,
        request_sha256 TEXT,
        retry_of TEXT,
        create_time BIGINT NOT NULL,
        update_time BIGINT NOT NULL,
        finish_time BIGINT,
        event_count BIGINT NOT NULL DEFAULT 0,
        UNIQUE (creator, request_id)
    )",
    // Partial, because rounds look for unfinished operations only, and ended ones accumulate.
    "CREATE INDEX operations_unfinished ON operations (state, schedule_time)
        WHERE state IN ('SCHEDULED', 'RUNNING', 'PAUSED', 'CANCELLING')",
    // `node` is no foreign key: the history of an operation outlives its nodes.
    "CREATE TABLE executions (
        operation {ID} NOT NULL REFERENCES operations (id),
        node {ID} NOT NULL,
        state TEXT NOT NULL,
        attempt BIGINT NOT NULL DEFAULT 0,
        sequence BIGINT NOT NULL DEFAULT 0,
        session_epoch BIGINT NOT NULL DEFAULT 0,
        phase TEXT NOT NULL DEFAULT '',
        bytes_done BIGINT NOT NULL DEFAULT 0,
        bytes_total BIGINT NOT NULL DEFAULT 0,
        error_reason TEXT,
        error_message TEXT,
        overdue BOOLEAN NOT NULL DEFAULT FALSE,
        deadline BIGINT,
        patience BIGINT NOT NULL DEFAULT 0,
        cancel_requested BOOLEAN NOT NULL DEFAULT FALSE,
        cancel_refused BOOLEAN NOT NULL DEFAULT FALSE,
        assign_boot_id TEXT NOT NULL DEFAULT '',
        boot_id TEXT NOT NULL DEFAULT '',
        update_time BIGINT NOT NULL,
        assign_time BIGINT,
        finish_time BIGINT,
        PRIMARY KEY (operation, node)
    )",
    // At most one active execution for each node. Claims rely on this index.
    "CREATE UNIQUE INDEX executions_active ON executions (node)
        WHERE state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')",
    "CREATE INDEX executions_pending ON executions (node) WHERE state = 'PENDING'",
    "CREATE INDEX executions_state ON executions (operation, state)",
    "CREATE INDEX executions_deadline ON executions (deadline) WHERE deadline IS NOT NULL",
    "CREATE INDEX executions_node ON executions (node, operation)",
    "CREATE TABLE events (
        operation {ID} NOT NULL REFERENCES operations (id),
        number BIGINT NOT NULL,
        time BIGINT NOT NULL,
        node TEXT,
        actor TEXT NOT NULL,
        from_state TEXT NOT NULL,
        to_state TEXT NOT NULL,
        reason TEXT NOT NULL,
        PRIMARY KEY (operation, number)
    )",
    "CREATE TABLE tokens (
        id {ID} PRIMARY KEY,
        secret_sha256 TEXT NOT NULL UNIQUE,
        max_uses BIGINT NOT NULL,
        uses BIGINT NOT NULL DEFAULT 0,
        expire_time BIGINT NOT NULL,
        create_time BIGINT NOT NULL,
        creator TEXT NOT NULL,
        require_approval BOOLEAN NOT NULL,
        labels TEXT NOT NULL,
        revoked BOOLEAN NOT NULL DEFAULT FALSE
    )",
    // One row for each key that a token enrolled: the same key again is no second use.
    "CREATE TABLE enrolments (
        token {ID} NOT NULL REFERENCES tokens (id),
        key_sha256 TEXT NOT NULL,
        node {ID} NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
        PRIMARY KEY (token, key_sha256)
    )",
    "CREATE TABLE certificates (
        serial TEXT PRIMARY KEY,
        node TEXT,
        subject TEXT NOT NULL,
        role TEXT NOT NULL,
        key_sha256 TEXT NOT NULL,
        not_before BIGINT NOT NULL,
        not_after BIGINT NOT NULL,
        generation BIGINT NOT NULL,
        revoke_time BIGINT
    )",
    "CREATE INDEX certificates_node ON certificates (node)",
    // Names and needs refer to the bytes, so their row cannot be deleted too early.
    "CREATE TABLE blobs (
        sha256 TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        purpose TEXT NOT NULL,
        size BIGINT NOT NULL,
        chunk_size BIGINT NOT NULL,
        chunk_sha256 {BYTES} NOT NULL,
        unpacked_bytes BIGINT NOT NULL,
        entries BIGINT NOT NULL,
        compression TEXT NOT NULL,
        push_time BIGINT NOT NULL,
        creator TEXT NOT NULL
    )",
    "CREATE TABLE artifacts (
        id {ID} PRIMARY KEY,
        sha256 TEXT NOT NULL REFERENCES blobs (sha256),
        kind TEXT NOT NULL,
        purpose TEXT NOT NULL,
        push_time BIGINT NOT NULL,
        creator TEXT NOT NULL
    )",
    "CREATE INDEX artifacts_sha256 ON artifacts (sha256)",
    "CREATE TABLE artifact_defaults (
        board TEXT NOT NULL,
        kind TEXT NOT NULL,
        purpose TEXT NOT NULL,
        artifact {ID} NOT NULL REFERENCES artifacts (id) ON DELETE CASCADE,
        PRIMARY KEY (board, kind, purpose)
    )",
    "CREATE INDEX artifact_defaults_artifact ON artifact_defaults (artifact)",
    // Bytes that unfinished operations need. The rows are deleted as the operation ends.
    "CREATE TABLE needs (
        operation {ID} NOT NULL REFERENCES operations (id),
        artifact {ID} NOT NULL,
        sha256 TEXT NOT NULL REFERENCES blobs (sha256),
        PRIMARY KEY (operation, artifact, sha256)
    )",
    "CREATE INDEX needs_sha256 ON needs (sha256)",
    // `number` gives pages an order that no clock can change.
    "CREATE TABLE audit (
        number {COUNTER},
        time BIGINT NOT NULL,
        actor TEXT NOT NULL,
        origin TEXT NOT NULL,
        method TEXT NOT NULL,
        target TEXT NOT NULL,
        result TEXT NOT NULL
    )",
];
