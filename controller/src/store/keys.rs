//! Keys of nodes. The key in service is in the node's row; every other key has a row here. A key is identified by its
//! fingerprint, the SHA-256 of its SubjectPublicKeyInfo.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::connection::Connection;
use super::sql::{Row, sql};
use super::{Store, StoreError, nodes};

/// Limit of a node's keys that wait for approval. Each costs its sender a use of a token.
const WAITING_MAX: i64 = 16;
/// Limit of a node's keys that are remembered.
const REMEMBERED_MAX: i64 = 64;

/// State of a key at its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    /// The node's present key.
    InService,
    /// Issued by a renewal and not used yet. The key before it stays in service until then.
    Next,
    /// Shown by a caller that has to be approved first.
    Pending,
    /// Another key replaced it.
    Previous,
    /// An admin revoked it.
    Revoked,
}

impl KeyState {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::InService => "IN_SERVICE",
            Self::Next => "NEXT",
            Self::Pending => "PENDING",
            Self::Previous => "PREVIOUS",
            Self::Revoked => "REVOKED",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Next, Self::Pending, Self::Previous, Self::Revoked].into_iter().find(|state| state.as_str() == text)
    }

    /// True if the node may open sessions, download and renew under this key.
    pub fn serves(self) -> bool {
        matches!(self, Self::InService | Self::Next)
    }
}

/// A key that waits for approval.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PendingKey {
    /// SHA-256 of its SubjectPublicKeyInfo, lower-case hexadecimal.
    pub key_sha256: String,
    /// Time at which it was shown first.
    pub create_time: DateTime<Utc>,
    /// Serial number of the board that showed it; empty if it gave none.
    pub serial: String,
    /// Address from which it was shown.
    pub origin: String,
    /// Reason to wait, for operators.
    pub reason: String,
}

/// Origin of a pending key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown<'a> {
    pub(super) serial: &'a str,
    pub(super) origin: &'a str,
    pub(super) reason: &'a str,
}

/// Reason for a key that the node had before.
pub(super) const CAME_BACK: &str =
    "an earlier key of the node: its card or its root was put back to an earlier state, or somebody kept the key";
/// Reason for a new key that a board of a known node enrolled with.
pub(super) const NEW_KEY: &str = "the board of this node enrolled again with another key";

impl Store {
    /// State of a key at a node. `None` if there is no such node.
    pub async fn key_state(&self, node: &NodeId, key: &str) -> Result<Option<KeyState>, StoreError> {
        state(self.reader(), node, key).await
    }
}

/// State of a key at a node. `None` if there is no such node.
pub(super) async fn state(db: &impl Connection, node: &NodeId, key: &str) -> Result<Option<KeyState>, StoreError> {
    let row = sql("SELECT n.key_sha256 AS present, k.state AS state FROM nodes n \
         LEFT JOIN node_keys k ON k.node = n.id AND k.key_sha256 = ? WHERE n.id = ?")
    .bind(key)
    .bind(node.as_str())
    .one(db)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.text("present")? == key {
        return Ok(Some(KeyState::InService));
    }
    // Keys that were replaced before this table existed have no row, and neither have forgotten ones.
    Ok(Some(row.maybe_word("state", KeyState::parse)?.unwrap_or(KeyState::Previous)))
}

/// Finds the node that knows a key, and the key's state there. A node with the key in service comes first.
pub(super) async fn owner(db: &impl Connection, key: &str) -> Result<Option<(NodeId, KeyState)>, StoreError> {
    // The key in service counts first, because another node may remember the same key.
    if let Some(row) = sql("SELECT id FROM nodes WHERE key_sha256 = ?").bind(key).one(db).await? {
        return Ok(Some((nodes::read_id(&row)?, KeyState::InService)));
    }
    let row = sql("SELECT node AS id, state FROM node_keys WHERE key_sha256 = ? ORDER BY node LIMIT 1")
        .bind(key)
        .one(db)
        .await?;
    row.map(|row| Ok((nodes::read_id(&row)?, row.word("state", KeyState::parse)?))).transpose()
}

/// Stores the state of a key. The caller's transaction holds the node.
pub(super) async fn note(
    tx: &impl Connection,
    node: &NodeId,
    key: &str,
    state: KeyState,
    shown: Shown<'_>,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    sql("INSERT INTO node_keys (node, key_sha256, state, reason, serial, origin, create_time) \
             VALUES (?, ?, ?, ?, ?, ?, ?) \
         ON CONFLICT (node, key_sha256) DO UPDATE SET state = excluded.state, reason = excluded.reason, \
             serial = excluded.serial, origin = excluded.origin, create_time = excluded.create_time")
    .bind(node.as_str())
    .bind(key)
    .bind(state.as_str())
    .bind(shown.reason)
    .bind(shown.serial)
    .bind(shown.origin)
    .time(now)
    .run(tx)
    .await?;
    // A forgotten key counts as a previous one, so it is held as well if it is shown. A revoked key must not be
    // forgotten, because it would be held instead of refused.
    sql("DELETE FROM node_keys WHERE node = ? AND state = 'PREVIOUS' AND key_sha256 NOT IN \
         (SELECT key_sha256 FROM node_keys WHERE node = ? ORDER BY create_time DESC, key_sha256 LIMIT ?)")
    .bind(node.as_str())
    .bind(node.as_str())
    .bind(REMEMBERED_MAX)
    .run(tx)
    .await?;
    Ok(())
}

/// Holds a key for approval. Returns false if too many wait already. The caller's transaction holds the node.
pub(super) async fn hold(
    tx: &impl Connection,
    node: &NodeId,
    key: &str,
    shown: Shown<'_>,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let waiting = sql("SELECT COUNT(*) AS waiting FROM node_keys WHERE node = ? AND state = 'PENDING'");
    let waiting = waiting.bind(node.as_str()).one(tx).await?.map_or(Ok(0), |row| row.int("waiting"))?;
    // Anyone with a token can show keys for a node, and must not fill the table.
    if waiting >= WAITING_MAX {
        return Ok(false);
    }
    note(tx, node, key, KeyState::Pending, shown, now).await?;
    Ok(true)
}

/// Puts a key in service. The key before it, and a key from a renewal of that, become previous ones. The caller's
/// transaction holds the node.
pub(super) async fn put_in_service(
    tx: &impl Connection,
    node: &NodeId,
    key: &str,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    let before = sql("SELECT key_sha256 FROM nodes WHERE id = ?").bind(node.as_str()).one(tx).await?;
    let before = before.map_or_else(|| Ok(String::new()), |row| row.text("key_sha256"))?;
    // The key in service is in the node's row only.
    sql("DELETE FROM node_keys WHERE node = ? AND key_sha256 = ?").bind(node.as_str()).bind(key).run(tx).await?;
    retire_next(tx, node).await?;
    if !before.is_empty() && before != key {
        note(tx, node, &before, KeyState::Previous, Shown { serial: "", origin: "", reason: "" }, now).await?;
    }
    sql("UPDATE nodes SET key_sha256 = ? WHERE id = ?").bind(key).bind(node.as_str()).run(tx).await?;
    Ok(())
}

/// Turns keys that a renewal issued and nobody has used into previous ones.
pub(super) async fn retire_next(tx: &impl Connection, node: &NodeId) -> Result<(), StoreError> {
    sql("UPDATE node_keys SET state = 'PREVIOUS' WHERE node = ? AND state = 'NEXT'")
        .bind(node.as_str())
        .run(tx)
        .await?;
    Ok(())
}

/// Revokes a key. A key that a renewal gave its holder is held for approval. The caller's transaction holds the node.
pub(super) async fn shut_out(
    tx: &impl Connection,
    node: &NodeId,
    key: &str,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    if state(tx, node, key).await? == Some(KeyState::InService) {
        // Empty matches no key, so the node has none in service until an admin approves one.
        sql("UPDATE nodes SET key_sha256 = '' WHERE id = ?").bind(node.as_str()).run(tx).await?;
        // The holder of the revoked key asked for it, so it may be an attacker's.
        sql("UPDATE node_keys SET state = 'PENDING', reason = ? WHERE node = ? AND state = 'NEXT'")
            .bind("a renewal gave it to the holder of a key that was shut out since")
            .bind(node.as_str())
            .run(tx)
            .await?;
    }
    note(tx, node, key, KeyState::Revoked, Shown { serial: "", origin: "", reason: "" }, now).await?;
    sql("UPDATE certificates SET revoke_time = ? WHERE node = ? AND key_sha256 = ? AND revoke_time IS NULL")
        .time(now)
        .bind(node.as_str())
        .bind(key)
        .run(tx)
        .await?;
    Ok(())
}

/// Keys of these nodes that wait for approval, oldest first.
pub(super) async fn pending(db: &impl Connection, ids: &[NodeId]) -> Result<Vec<(NodeId, PendingKey)>, StoreError> {
    sql("SELECT node AS id, key_sha256, create_time, serial, origin, reason FROM node_keys \
         WHERE state = 'PENDING' AND node IN {each} ORDER BY node, create_time, key_sha256")
    .each(ids.iter().map(NodeId::as_str))
    .all(db)
    .await?
    .iter()
    .map(|row| Ok((nodes::read_id(row)?, read(row)?)))
    .collect()
}

fn read(row: &Row) -> Result<PendingKey, StoreError> {
    Ok(PendingKey {
        key_sha256: row.text("key_sha256")?,
        create_time: row.time("create_time")?,
        serial: row.text("serial")?,
        origin: row.text("origin")?,
        reason: row.text("reason")?,
    })
}
