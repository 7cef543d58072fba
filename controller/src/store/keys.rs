//! The keys of a node. One is in service: that of the node's row. The others have a row here. A key is named by its
//! fingerprint, the SHA-256 of its SubjectPublicKeyInfo.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::connection::Connection;
use super::sql::{Row, sql};
use super::{Store, StoreError, nodes};

/// The most keys of a node that wait for approval: each costs its sender a use of a token.
const WAITING_MAX: i64 = 16;
/// The most keys of a node that are remembered.
const REMEMBERED_MAX: i64 = 64;

/// How a key stands to its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyState {
    /// The node is known by it.
    InService,
    /// Given by a renewal and not used yet: the one before is in service until it is.
    Next,
    /// Somebody shows it who is to be approved first.
    Pending,
    /// Another one took its place.
    Previous,
    /// An admin shut it out.
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

    /// Whether the node is obeyed and served under this key.
    pub fn serves(self) -> bool {
        matches!(self, Self::InService | Self::Next)
    }
}

/// A key that waits for approval.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PendingKey {
    /// SHA-256 of its SubjectPublicKeyInfo, lower-case hexadecimal.
    pub key_sha256: String,
    /// When it was shown first.
    pub create_time: DateTime<Utc>,
    /// The serial number of the board that showed it; empty: not said.
    pub serial: String,
    /// From which address.
    pub origin: String,
    /// Why it waits.
    pub reason: String,
}

/// Where a pending key came from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown<'a> {
    pub(super) serial: &'a str,
    pub(super) origin: &'a str,
    pub(super) reason: &'a str,
}

/// Why a key waits that the node had before.
pub(super) const CAME_BACK: &str =
    "an earlier key of the node: its card or its root was put back to an earlier state, or somebody kept the key";
/// Why a key waits that a board of a known node enrolled with.
pub(super) const NEW_KEY: &str = "the board of this node enrolled again with another key";

impl Store {
    /// How a key stands to a node.
    pub async fn key_state(&self, node: &NodeId, key: &str) -> Result<Option<KeyState>, StoreError> {
        state(self.reader(), node, key).await
    }
}

/// How a key stands to a node; `None`: no such node.
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
    // A key without a row is from before there were rows.
    Ok(Some(row.maybe_word("state", KeyState::parse)?.unwrap_or(KeyState::Previous)))
}

/// The nodes that know a key, and how it stands to each.
pub(super) async fn owner(db: &impl Connection, key: &str) -> Result<Option<(NodeId, KeyState)>, StoreError> {
    if let Some(row) = sql("SELECT id FROM nodes WHERE key_sha256 = ?").bind(key).one(db).await? {
        return Ok(Some((nodes::read_id(&row)?, KeyState::InService)));
    }
    let row = sql("SELECT node AS id, state FROM node_keys WHERE key_sha256 = ? ORDER BY node LIMIT 1")
        .bind(key)
        .one(db)
        .await?;
    row.map(|row| Ok((nodes::read_id(&row)?, row.word("state", KeyState::parse)?))).transpose()
}

/// Notes how a key stands to a node, in a transaction that holds the node.
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
    // What was forgotten is taken for a previous key, and held too.
    sql("DELETE FROM node_keys WHERE node = ? AND state = 'PREVIOUS' AND key_sha256 NOT IN \
         (SELECT key_sha256 FROM node_keys WHERE node = ? ORDER BY create_time DESC, key_sha256 LIMIT ?)")
    .bind(node.as_str())
    .bind(node.as_str())
    .bind(REMEMBERED_MAX)
    .run(tx)
    .await?;
    Ok(())
}

/// Holds a key for approval, in a transaction that holds the node; false: too many wait already.
pub(super) async fn hold(
    tx: &impl Connection,
    node: &NodeId,
    key: &str,
    shown: Shown<'_>,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let waiting = sql("SELECT COUNT(*) AS waiting FROM node_keys WHERE node = ? AND state = 'PENDING'");
    let waiting = waiting.bind(node.as_str()).one(tx).await?.map_or(Ok(0), |row| row.int("waiting"))?;
    if waiting >= WAITING_MAX {
        return Ok(false);
    }
    note(tx, node, key, KeyState::Pending, shown, now).await?;
    Ok(true)
}

/// Puts a key in service, in a transaction that holds the node. The one before, and what a renewal gave it, become
/// previous ones.
pub(super) async fn put_in_service(
    tx: &impl Connection,
    node: &NodeId,
    key: &str,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    let before = sql("SELECT key_sha256 FROM nodes WHERE id = ?").bind(node.as_str()).one(tx).await?;
    let before = before.map_or_else(|| Ok(String::new()), |row| row.text("key_sha256"))?;
    sql("DELETE FROM node_keys WHERE node = ? AND key_sha256 = ?").bind(node.as_str()).bind(key).run(tx).await?;
    retire_next(tx, node).await?;
    if !before.is_empty() && before != key {
        note(tx, node, &before, KeyState::Previous, Shown { serial: "", origin: "", reason: "" }, now).await?;
    }
    sql("UPDATE nodes SET key_sha256 = ? WHERE id = ?").bind(key).bind(node.as_str()).run(tx).await?;
    Ok(())
}

/// Makes previous ones of keys that a renewal gave and nobody has used.
pub(super) async fn retire_next(tx: &impl Connection, node: &NodeId) -> Result<(), StoreError> {
    sql("UPDATE node_keys SET state = 'PREVIOUS' WHERE node = ? AND state = 'NEXT'")
        .bind(node.as_str())
        .run(tx)
        .await?;
    Ok(())
}

/// Shuts a key out, in a transaction that holds the node. What a renewal gave its holder is held for approval.
pub(super) async fn shut_out(
    tx: &impl Connection,
    node: &NodeId,
    key: &str,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    if state(tx, node, key).await? == Some(KeyState::InService) {
        sql("UPDATE nodes SET key_sha256 = '' WHERE id = ?").bind(node.as_str()).run(tx).await?;
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

/// The keys of these nodes that wait for approval, oldest first.
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
