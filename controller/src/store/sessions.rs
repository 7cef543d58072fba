//! Sessions of nodes: the controller that holds each node's stream.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};

use serde::Serialize;

use super::connection::Connection;
use super::events::{self, Happened};
use super::keys::{self, CAME_BACK, KeyState, Shown};
use super::operations::lock;
use super::reports::hold_node;
use super::sql::sql;
use super::{Board, NodeRow, Store, StoreError, System, audit, nodes};
use crate::operation::{ExecutionState, NodeMode, NodeState};

/// The part of a Hello that the store needs, and the circumstances of its connection.
#[derive(Debug, Clone)]
pub struct SessionStart {
    /// The controller that holds the stream.
    pub controller_id: String,
    /// Time at which the connection was accepted; for a later session on the same connection, when it was asked for.
    pub accept_time: DateTime<Utc>,
    /// SHA-256 of the SubjectPublicKeyInfo of the node's key, in hex.
    pub key_sha256: String,
    /// IP address of the node.
    pub origin: String,
    /// Random value of this start of the agent; empty if the agent sends none.
    pub instance: String,
    /// Boot id of the node now.
    pub boot_id: String,
    /// Role of its agent: the installed system's, or the installer's.
    pub mode: NodeMode,
    /// The version of its agent.
    pub agent_version: String,
    /// Its hardware.
    pub board: Board,
    /// Facts of the running system.
    pub system: System,
}

/// Reason of the quarantine of a node whose identity two agents have, on one machine or on two.
pub const CLONED: &str = "two nodes have this identity: one that was superseded by the other came back";

/// Result of a Hello.
#[derive(Debug, Clone)]
pub enum SessionOutcome {
    /// The session is the node's only one. A node whose state is not APPROVED stays connected and gets no work. This
    /// Hello may have changed the state: the board has another serial number than the node enrolled with.
    Begun {
        /// Session epoch: every write for the session has it in its condition.
        epoch: i64,
        /// The node after the Hello.
        node: Box<NodeRow>,
        /// True if this Hello took its approval away, because its card is in another board.
        moved: bool,
    },
    /// Its key waits for approval. The node is unchanged.
    KeyHeld {
        /// True if this Hello made it wait. False if it waited before, or too many others do.
        just_now: bool,
    },
    /// Its key was revoked.
    KeyRevoked,
    /// The node was in quarantine before.
    Quarantined,
    /// The node is in quarantine from now on, because two agents have its identity.
    Cloned,
    /// The connection is older than the node's present session, and from an earlier boot or start of the agent: close
    /// it.
    Superseded,
    /// No such node. It was deleted.
    UnknownNode,
}

impl Store {
    /// Begins a session. This ends the node's previous one, on any controller.
    pub async fn begin_session(
        &self,
        node: &NodeId,
        start: &SessionStart,
        now: DateTime<Utc>,
    ) -> Result<SessionOutcome, StoreError> {
        self.again(|| self.begin_session_once(node, start, now)).await
    }

    async fn begin_session_once(
        &self,
        node: &NodeId,
        start: &SessionStart,
        now: DateTime<Utc>,
    ) -> Result<SessionOutcome, StoreError> {
        let tx = self.begin().await?;
        let row = sql("SELECT state, state_reason, serial, boot_id, previous_boot_id, instance, previous_instance, \
                       session_time FROM nodes WHERE id = ? {lock}")
        .bind(node.as_str())
        .one(&*tx)
        .await?;
        let Some(row) = row else { return Ok(SessionOutcome::UnknownNode) };
        let mut state = row.word("state", NodeState::parse)?;
        // Checked before the node's state: a caller with a key that is not the node's learns nothing about the node.
        let standing = keys::state(&*tx, node, &start.key_sha256).await?.unwrap_or(KeyState::Revoked);
        match standing {
            KeyState::InService | KeyState::Next => {}
            KeyState::Pending => return Ok(SessionOutcome::KeyHeld { just_now: false }),
            KeyState::Revoked => return Ok(SessionOutcome::KeyRevoked),
            KeyState::Previous => {
                let serial = nodes::normal_serial(&start.board.serial);
                let shown = Shown { serial: &serial, origin: &start.origin, reason: CAME_BACK };
                let just_now = keys::hold(&*tx, node, &start.key_sha256, shown, now).await?;
                if just_now {
                    audit::note("HOLD_KEY", &format!("an earlier key of it turned up: {}", start.key_sha256));
                    // Nothing is written if too many keys wait already: a flood must not fill the audit either.
                    self.commit(tx).await?;
                }
                return Ok(SessionOutcome::KeyHeld { just_now });
            }
        }
        if state == NodeState::Quarantined {
            return Ok(SessionOutcome::Quarantined);
        }
        let (boot_id, previous) = (row.text("boot_id")?, row.text("previous_boot_id")?);
        let new_boot = start.boot_id != boot_id;
        let (instance, previous_instance) = (row.text("instance")?, row.text("previous_instance")?);
        let new_instance = start.instance != instance;
        let begun = row.maybe_time("session_time")?;
        // The present session began while this connection waited for its Hello to be read, so it is a later start of the
        // node that has it. Taken, an old Hello would put that start away, and its return would look like a clone's. A
        // session of the future says that the clock was set back, and nothing about the order.
        if (new_boot || new_instance) && begun.is_some_and(|begun| start.accept_time < begun && begun <= now) {
            return Ok(SessionOutcome::Superseded);
        }
        let came_back = |new: bool, present: &str, before: &str| new && !before.is_empty() && present == before;
        if came_back(new_boot, &start.boot_id, &previous)
            || came_back(new_instance, &start.instance, &previous_instance)
        {
            // A boot id or an instance never comes back after another one. Either this connection was made before the
            // present session was known, or two agents have this identity.
            if begun.is_some_and(|begun| start.accept_time <= begun) {
                return Ok(SessionOutcome::Superseded);
            }
            shut_out(&*tx, node, CLONED, now).await?;
            audit::note("QUARANTINE", CLONED);
            self.commit(tx).await?;
            return Ok(SessionOutcome::Cloned);
        }
        let mut reason = row.text("state_reason")?;
        let (enrolled, serial) = (row.text("serial")?, nodes::normal_serial(&start.board.serial));
        let moved = state == NodeState::Approved && !serial.is_empty() && !enrolled.is_empty() && serial != enrolled;
        // The identity lies on the card, so another machine may have it now. An admin has to approve the node again.
        if moved {
            state = NodeState::AwaitingApproval;
            reason = format!("its card is in the board {serial}, it was enrolled on {enrolled}");
            audit::note("HOLD", &reason);
        }
        sql("UPDATE nodes SET session_epoch = session_epoch + 1, controller_id = ?, session_time = ?, last_seen = ?, \
                 disconnect_time = NULL, mode = ?, board = ?, family = ?, system = ?, agent_version = ?, state = ?, \
                 state_reason = ?, serial = CASE WHEN serial = '' THEN ? ELSE serial END, boot_id = ?, \
                 previous_boot_id = ?, instance = ?, previous_instance = ? WHERE id = ?")
        .bind(start.controller_id.as_str())
        .time(now)
        .time(now)
        .bind(start.mode.as_str())
        .json(&start.board)
        .bind(start.board.family.as_str())
        .json(&start.system)
        .bind(start.agent_version.as_str())
        .bind(state.as_str())
        .bind(reason)
        .bind(serial)
        .bind(start.boot_id.as_str())
        .bind(if new_boot { boot_id } else { previous })
        .bind(start.instance.as_str())
        .bind(if new_instance { instance } else { previous_instance })
        .bind(node.as_str())
        .run(&*tx)
        .await?;
        if standing == KeyState::Next {
            // The agent has proved that it holds the renewed key, so the one before is retired. Retiring it at the
            // renewal would lock out a node that lost its power before it had stored the new key.
            keys::put_in_service(&*tx, node, &start.key_sha256, now).await?;
        }
        let found = nodes::find(&*tx, node).await?;
        self.commit(tx).await?;
        Ok(match found {
            Some(row) => SessionOutcome::Begun { epoch: row.session_epoch, node: Box::new(row), moved },
            None => SessionOutcome::UnknownNode,
        })
    }

    /// Ends a session. Returns false if it has ended already or a later one has begun.
    pub async fn end_session(&self, node: &NodeId, epoch: i64, now: DateTime<Utc>) -> Result<bool, StoreError> {
        self.again(|| self.end_session_once(node, epoch, now)).await
    }

    async fn end_session_once(&self, node: &NodeId, epoch: i64, now: DateTime<Utc>) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        let ended = sql("UPDATE nodes SET controller_id = NULL, disconnect_time = ?, last_seen = ? WHERE id = ? \
                         AND session_epoch = ? AND controller_id IS NOT NULL")
        .time(now)
        .time(now)
        .bind(node.as_str())
        .bind(epoch)
        .run(&*tx)
        .await?;
        self.commit(tx).await?;
        Ok(ended == 1)
    }

    /// Stores that an agent ends because its machine powers off, under the session in which the agent said so. Returns
    /// false if the execution is not a power-off in REBOOTING, the session has said so before, or is no longer the
    /// node's.
    pub async fn say_goodbye(&self, id: &ExecutionId, epoch: i64, now: DateTime<Utc>) -> Result<bool, StoreError> {
        self.again(|| self.say_goodbye_once(id, epoch, now)).await
    }

    async fn say_goodbye_once(&self, id: &ExecutionId, epoch: i64, now: DateTime<Utc>) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        if hold_node(&tx, &id.node, epoch).await?.is_none() {
            return Ok(false);
        }
        lock(&*tx, [&id.operation]).await?;
        // A retry after a lost answer must not move the time, from which the node's silence counts. Any later session
        // has another epoch, which makes these last words void.
        let noted = sql("UPDATE executions SET goodbye_epoch = ?, goodbye_time = ? WHERE operation = ? AND node = ? \
                         AND state = 'REBOOTING' AND goodbye_epoch <> ? AND EXISTS \
                             (SELECT 1 FROM operations o WHERE o.id = executions.operation AND o.action_kind = 'power-off')")
        .bind(epoch)
        .time(now)
        .bind(id.operation.as_str())
        .bind(id.node.as_str())
        .bind(epoch)
        .run(&*tx)
        .await?;
        if noted == 1 {
            let rebooting = ExecutionState::Rebooting.as_str();
            let why = "the agent ends with the power-off";
            let event = Happened::to_node(&id.node, &id.node.name(), rebooting, rebooting, why);
            events::record(&*tx, &id.operation, vec![event], now).await?;
        }
        self.commit(tx).await?;
        Ok(noted == 1)
    }

    /// Updates the time of the last sign of life of these nodes. Skips those whose session this controller does not
    /// hold.
    pub async fn touch(&self, controller_id: &str, nodes: &[NodeId], now: DateTime<Utc>) -> Result<(), StoreError> {
        self.again(|| self.touch_once(controller_id, nodes, now)).await
    }

    async fn touch_once(&self, controller_id: &str, nodes: &[NodeId], now: DateTime<Utc>) -> Result<(), StoreError> {
        if nodes.is_empty() {
            return Ok(());
        }
        let tx = self.begin().await?;
        // Locked rows are skipped: another transaction is about to write them anyway.
        sql("UPDATE nodes SET last_seen = ? WHERE id IN \
             (SELECT id FROM nodes WHERE controller_id = ? AND id IN {each} {skip})")
        .time(now)
        .bind(controller_id)
        .each(nodes.iter().map(NodeId::as_str))
        .run(&*tx)
        .await?;
        // Without the hint of `Store::commit`: no work becomes due by it, and it would wake every dispatcher.
        tx.commit().await?;
        Ok(())
    }

    /// Those of these sessions that have to be closed: replaced, ended, or of a node in quarantine.
    pub async fn lost_sessions(
        &self,
        controller_id: &str,
        nodes: &[(NodeId, i64)],
    ) -> Result<Vec<(NodeId, i64)>, StoreError> {
        let sessions: Vec<Held<'_>> =
            nodes.iter().map(|(node, epoch)| Held { node: node.as_str(), epoch: *epoch }).collect();
        sql("SELECT r.node AS id, r.epoch AS epoch FROM {rows node TEXT, epoch BIGINT} WHERE NOT EXISTS \
             (SELECT 1 FROM nodes n WHERE n.id = r.node AND n.session_epoch = r.epoch AND n.controller_id = ? \
              AND n.state <> 'QUARANTINED')")
        .json(&sessions)
        .bind(controller_id)
        .all(self.reader())
        .await?
        .iter()
        .map(|row| Ok((nodes::read_id(row)?, row.int("epoch")?)))
        .collect()
    }

    /// Stores changed facts of the running system. Returns false if the session is no longer the node's.
    pub async fn update_system(
        &self,
        node: &NodeId,
        epoch: i64,
        system: &System,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        self.again(|| self.update_system_once(node, epoch, system, now)).await
    }

    async fn update_system_once(
        &self,
        node: &NodeId,
        epoch: i64,
        system: &System,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        let changed = sql("UPDATE nodes SET system = ?, last_seen = ? WHERE id = ? AND session_epoch = ? \
                           AND controller_id IS NOT NULL")
        .json(system)
        .time(now)
        .bind(node.as_str())
        .bind(epoch)
        .run(&*tx)
        .await?;
        self.commit(tx).await?;
        Ok(changed == 1)
    }
}

#[derive(Serialize)]
struct Held<'a> {
    node: &'a str,
    epoch: i64,
}

/// Quarantines a node and ends its session. The controller that holds the stream finds it with `lost_sessions`.
pub(super) async fn shut_out(
    tx: &impl Connection,
    node: &NodeId,
    reason: &str,
    now: DateTime<Utc>,
) -> Result<u64, StoreError> {
    sql("UPDATE nodes SET state = 'QUARANTINED', state_reason = ?, session_epoch = session_epoch + 1, \
             controller_id = NULL, disconnect_time = ? WHERE id = ?")
    .bind(reason)
    .time(now)
    .bind(node.as_str())
    .run(tx)
    .await
}
