//! Approval of nodes and of their keys.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::connection::Connection;
use super::nodes::{find, normal_serial};
use super::sql::sql;
use super::{NodeRow, Store, StoreError, keys};
use crate::operation::NodeState;

/// Result of an approval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApproveOutcome {
    /// Approved; the node as it is now.
    Approved(Box<NodeRow>),
    /// More than one key could be meant. These fingerprints wait.
    Choose(Vec<String>),
    /// No key with this fingerprint waits. These do.
    NoSuchKey(Vec<String>),
    /// No such node.
    NotFound,
}

impl Store {
    /// Approves a node: with the key of this fingerprint, or the only one that can be meant, and with the board that
    /// showed it. Its session ends, so that the node opens one under its new state.
    pub async fn approve(
        &self,
        id: &NodeId,
        fingerprint: Option<&str>,
        now: DateTime<Utc>,
    ) -> Result<ApproveOutcome, StoreError> {
        self.again(|| self.approve_once(id, fingerprint, now)).await
    }

    async fn approve_once(
        &self,
        id: &NodeId,
        fingerprint: Option<&str>,
        now: DateTime<Utc>,
    ) -> Result<ApproveOutcome, StoreError> {
        let tx = self.begin().await?;
        // Locked before it is read, so that no other key begins to wait in between.
        let found = sql("SELECT id FROM nodes WHERE id = ? {lock}").bind(id.as_str()).one(&*tx).await?;
        let Some(row) = (if found.is_some() { find(&*tx, id).await? } else { None }) else {
            return Ok(ApproveOutcome::NotFound);
        };
        let pending = |key: &str| row.pending_keys.iter().find(|pending| pending.key_sha256 == key);
        // Several keys are never guessed between: serial numbers are public, so one of them may be an attacker's.
        let key = match fingerprint {
            None => match row.pending_keys.as_slice() {
                [] if !row.key_sha256.is_empty() => row.key_sha256.clone(),
                [only] if row.key_sha256.is_empty() => only.key_sha256.clone(),
                _ => return Ok(ApproveOutcome::Choose(row.waiting())),
            },
            Some(key) if (key == row.key_sha256 && !key.is_empty()) || pending(key).is_some() => key.to_owned(),
            Some(_) => return Ok(ApproveOutcome::NoSuchKey(row.waiting())),
        };
        if let Some(pending) = pending(&key) {
            replace_key(&*tx, id, &key, &pending.serial, now).await?;
            sql("UPDATE nodes SET state = 'APPROVED', state_reason = '' WHERE id = ?")
                .bind(id.as_str())
                .run(&*tx)
                .await?;
        } else {
            // Earlier boot ids and instances tell clones apart. The approved node begins without them.
            let serial = normal_serial(&row.board.serial);
            sql("UPDATE nodes SET state = 'APPROVED', state_reason = '', previous_boot_id = '', \
                     previous_instance = '', serial = CASE WHEN ? = '' THEN serial ELSE ? END WHERE id = ?")
            .bind(serial.as_str())
            .bind(serial.as_str())
            .bind(id.as_str())
            .run(&*tx)
            .await?;
            if row.state != NodeState::Approved {
                end_any_session(&*tx, id, now).await?;
            }
        }
        let row = find(&*tx, id).await?;
        self.commit(tx).await?;
        Ok(row.map_or(ApproveOutcome::NotFound, |row| ApproveOutcome::Approved(Box::new(row))))
    }
}

impl NodeRow {
    /// Fingerprints of the keys that an approval may name.
    fn waiting(&self) -> Vec<String> {
        let own = Some(&self.key_sha256).filter(|key| self.state != NodeState::Approved && !key.is_empty());
        own.into_iter().chain(self.pending_keys.iter().map(|key| &key.key_sha256)).cloned().collect()
    }
}

/// Gives a node another key. The holder of the key before is no longer the node, so its session and its open calls end.
/// A node that waited for approval is approved. The caller's transaction holds the node.
pub(super) async fn replace_key(
    tx: &impl Connection,
    id: &NodeId,
    key: &str,
    serial: &str,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    keys::put_in_service(tx, id, key, now).await?;
    // A new key may be renewed at once, and a quarantined node stays out: only `approve` lets it in. A board that gives
    // no serial number does not erase the known one.
    sql("UPDATE nodes SET generation = generation + 1, previous_boot_id = '', previous_instance = '', \
             renew_time = NULL, serial = CASE WHEN ? = '' THEN serial ELSE ? END, \
             state = CASE WHEN state = 'AWAITING_APPROVAL' THEN 'APPROVED' ELSE state END, \
             state_reason = CASE WHEN state = 'AWAITING_APPROVAL' THEN '' ELSE state_reason END WHERE id = ?")
    .bind(serial)
    .bind(serial)
    .bind(id.as_str())
    .run(tx)
    .await?;
    // The key got its certificate while it waited. Under the old generation its calls would end as well.
    sql("UPDATE certificates SET generation = (SELECT generation FROM nodes WHERE id = ?) \
         WHERE node = ? AND key_sha256 = ?")
    .bind(id.as_str())
    .bind(id.as_str())
    .bind(key)
    .run(tx)
    .await?;
    end_any_session(tx, id, now).await
}

/// Ends the session of a node. Its controller finds out by `lost_sessions`.
async fn end_any_session(tx: &impl Connection, id: &NodeId, now: DateTime<Utc>) -> Result<(), StoreError> {
    sql("UPDATE nodes SET session_epoch = session_epoch + 1, controller_id = NULL, disconnect_time = ? \
         WHERE id = ? AND controller_id IS NOT NULL")
    .time(now)
    .bind(id.as_str())
    .run(tx)
    .await?;
    Ok(())
}
