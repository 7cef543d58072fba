//! Keys of nodes other than the one in service, names that are taken, and answers of renewals.

use super::Statements;

pub(super) const NODE_KEYS: Statements = Statements {
    name: "m0065_node_keys",
    statements: &[
        "CREATE TABLE node_keys (
            node {ID} NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
            key_sha256 TEXT NOT NULL,
            state TEXT NOT NULL,
            reason TEXT NOT NULL DEFAULT '',
            serial TEXT NOT NULL DEFAULT '',
            origin TEXT NOT NULL DEFAULT '',
            create_time BIGINT NOT NULL,
            PRIMARY KEY (node, key_sha256)
        )",
        "CREATE INDEX node_keys_key ON node_keys (key_sha256)",
        // Names of nodes and users in lower case, so that no two differ only by case.
        "CREATE TABLE taken_names (
            folded {ID} PRIMARY KEY,
            kind TEXT NOT NULL,
            id {ID} NOT NULL
        )",
        "INSERT INTO taken_names (folded, kind, id) SELECT lower(id), 'users', id FROM users WHERE TRUE
            ON CONFLICT (folded) DO NOTHING",
        "INSERT INTO taken_names (folded, kind, id) SELECT lower(id), 'nodes', id FROM nodes WHERE TRUE
            ON CONFLICT (folded) DO NOTHING",
        // Time of the node's last renewal. NULL: never.
        "ALTER TABLE nodes ADD COLUMN renew_time BIGINT",
        // The answer to a repeated request: the certificate as PEM, and the request.
        "ALTER TABLE certificates ADD COLUMN pem TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE certificates ADD COLUMN given_for TEXT NOT NULL DEFAULT ''",
        // Time at which its expiry was reported. NULL: not yet.
        "ALTER TABLE certificates ADD COLUMN warn_time BIGINT",
        "ALTER TABLE api_tokens ADD COLUMN warn_time BIGINT",
        "CREATE INDEX certificates_not_after ON certificates (not_after)",
    ],
};
