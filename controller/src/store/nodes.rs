//! Nodes.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId, OperationId};
use serde::{Deserialize, Serialize};

use super::conflicts::{self, ConflictRow};
use super::connection::Connection;
use super::keys::{self, PendingKey};
use super::moves::{self, End, read_found};
use super::names;
use super::operations::lock;
use super::sessions::shut_out;
use super::sql::{Row, Sql, sql};
use super::{Scope, Store, StoreError};
use crate::operation::{ExecutionError, ExecutionState, NodeMode, NodeState, reason};

/// Facts of the hardware.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Board {
    /// From the device tree.
    pub model: String,
    /// The revision code, hexadecimal.
    pub revision: String,
    /// The serial number, 16 hexadecimal digits.
    pub serial: String,
    /// Of its interfaces.
    pub mac_addresses: Vec<String>,
    /// That the kernel sees.
    pub memory_bytes: u64,
    /// `pi1` to `pi5`; empty: unknown.
    pub family: String,
}

/// Facts of the system that a node runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct System {
    /// As `uname -m` prints it.
    pub kernel_arch: String,
    /// That the agent was built for.
    pub userspace_arch: String,
    /// In bytes.
    pub page_size: u32,
    /// As `uname -r` prints it.
    pub kernel_release: String,
    /// PRETTY_NAME of /etc/os-release.
    pub os: String,
    /// How the card is laid out.
    pub layout: CardLayout,
    /// SHA-256 of the image it was installed from; empty: unknown.
    pub image_sha256: String,
    /// SHA-256 of the boot files; empty: unknown.
    pub boot_sha256: String,
    /// Why it would refuse an update.
    pub update_refusal: Option<UpdateRefusal>,
    /// Its illnesses, as it said last.
    pub conditions: Vec<Condition>,
}

/// Something that ails a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Of which kind.
    pub ailment: Ailment,
    /// A sentence for people.
    pub message: String,
}

/// A kind of illness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ailment {
    /// The journal cannot be written: the node takes no work.
    Journal,
    /// The file system of the agent's state is read-only or full.
    Disk,
    /// The system's clock is wrong.
    Clock,
    /// The power supply is too weak.
    UnderVoltage,
    /// Of a newer agent, or read by an older controller than the one that stored it.
    #[serde(other)]
    Unknown,
}

/// Why a node would refuse an update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateRefusal {
    /// A stable word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

/// How a card is laid out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CardLayout {
    /// Not known.
    #[default]
    Unknown,
    /// One boot partition.
    Single,
    /// A recovery partition with installer sets, and the system's own.
    Resident,
}

/// A stored node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRow {
    /// Its id.
    pub id: NodeId,
    /// A name for people.
    pub display_name: String,
    /// For selectors.
    pub labels: BTreeMap<String, String>,
    /// Whether it is admitted.
    pub state: NodeState,
    /// Why it is not, else empty.
    pub state_reason: String,
    /// It has an open stream.
    pub connected: bool,
    /// The role of its agent at its last hello; `None`: it never said one.
    pub mode: Option<NodeMode>,
    /// Its hardware.
    pub board: Board,
    /// What it runs.
    pub system: System,
    /// Of its last hello; empty: none.
    pub boot_id: String,
    /// Of its last hello; empty: none.
    pub agent_version: String,
    /// When it enrolled.
    pub create_time: DateTime<Utc>,
    /// When it was last heard of.
    pub last_seen: Option<DateTime<Utc>>,
    /// The unfinished execution that it holds.
    pub active_execution: Option<ExecutionId>,
    /// The number of its last session.
    pub session_epoch: i64,
    /// The controller that holds its stream.
    pub controller_id: Option<String>,
    /// How often an operator let it have another key.
    pub generation: i64,
    /// What it says of executions and is not taken, oldest first.
    pub conflicts: Vec<ConflictRow>,
    /// SHA-256 of the SubjectPublicKeyInfo of its key, lower-case hexadecimal; empty: its key was shut out.
    pub key_sha256: String,
    /// Keys that wait for approval, oldest first.
    pub pending_keys: Vec<PendingKey>,
    /// Until when the newest certificate of its key is valid; `None`: it has none.
    pub certificate_expire_time: Option<DateTime<Utc>>,
}

/// Which nodes to list; what is empty does not restrict.
#[derive(Debug, Clone, Default)]
pub struct NodeQuery {
    /// Only those with a greater id.
    pub after: Option<NodeId>,
    /// How many at most.
    pub limit: u32,
    /// In one of these states.
    pub states: Vec<NodeState>,
    /// With all of these labels.
    pub labels: BTreeMap<String, String>,
    /// Only connected ones.
    pub connected: bool,
    /// Only those within it.
    pub scope: Scope,
}

/// What became of forgetting a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeleteNodeOutcome {
    /// It is forgotten and its certificates are revoked.
    Deleted,
    /// It has unfinished work, and force was not asked for.
    Busy(Vec<ExecutionId>),
    /// No such node.
    NotFound,
}

/// What became of changing a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpdateNodeOutcome {
    /// The node as it is now.
    Updated(Box<NodeRow>),
    /// Its labels are not any more what they were; nothing is changed.
    ChangedMeanwhile,
    /// No such node.
    NotFound,
}

impl Store {
    /// One node.
    pub async fn node(&self, id: &NodeId) -> Result<Option<NodeRow>, StoreError> {
        find(self.reader(), id).await
    }

    /// Nodes, by id.
    pub async fn nodes(&self, query: &NodeQuery) -> Result<Vec<NodeRow>, StoreError> {
        let which = sql(SELECT)
            .and(" WHERE n.id > ? AND (? OR n.state IN {each}) AND (? OR n.controller_id IS NOT NULL)")
            .bind(query.after.as_ref().map_or("", NodeId::as_str))
            .bind(query.states.is_empty())
            .each(query.states.iter().map(|state| state.as_str()))
            .bind(!query.connected);
        let rows = Self::with_labels(Self::with_labels(which, &query.labels), query.scope.labels())
            .and(" ORDER BY n.id LIMIT ?")
            .bind(i64::from(query.limit))
            .all(self.reader())
            .await?;
        read_all(self.reader(), &rows).await
    }

    /// Those of these nodes that exist, by id.
    pub async fn nodes_by_id(&self, ids: &[NodeId]) -> Result<Vec<NodeRow>, StoreError> {
        let rows = sql(SELECT)
            .and(" WHERE n.id IN {each} ORDER BY n.id")
            .each(ids.iter().map(NodeId::as_str))
            .all(self.reader())
            .await?;
        read_all(self.reader(), &rows).await
    }

    /// The ids of the approved nodes with all of these labels; no labels: of all approved nodes.
    pub async fn approved_nodes(&self, labels: &BTreeMap<String, String>) -> Result<Vec<NodeId>, StoreError> {
        let which = sql("SELECT n.id AS id FROM nodes n WHERE n.state = 'APPROVED'");
        Self::with_labels(which, labels).and(" ORDER BY n.id").all(self.reader()).await?.iter().map(read_id).collect()
    }

    /// Restricts a selection of `n` to nodes that carry these labels.
    fn with_labels(which: Sql, labels: &BTreeMap<String, String>) -> Sql {
        if labels.is_empty() { which } else { which.and(" AND {within n.labels}").json(labels) }
    }

    /// Changes labels, display name, or both, and only while the labels are as they were, if `before` says so.
    pub async fn update_node(
        &self,
        id: &NodeId,
        before: Option<&BTreeMap<String, String>>,
        labels: Option<&BTreeMap<String, String>>,
        display_name: Option<&str>,
    ) -> Result<UpdateNodeOutcome, StoreError> {
        self.again(|| self.update_node_once(id, before, labels, display_name)).await
    }

    async fn update_node_once(
        &self,
        id: &NodeId,
        before: Option<&BTreeMap<String, String>>,
        labels: Option<&BTreeMap<String, String>>,
        display_name: Option<&str>,
    ) -> Result<UpdateNodeOutcome, StoreError> {
        let tx = self.begin().await?;
        let changed = sql("UPDATE nodes SET labels = COALESCE(?, labels), display_name = COALESCE(?, display_name) \
             WHERE id = ? AND (? OR labels = ?)")
        .bind(labels.map(super::sql::to_json))
        .bind(display_name.map(str::to_owned))
        .bind(id.as_str())
        .bind(before.is_none())
        .bind(before.map(super::sql::to_json))
        .run(&*tx)
        .await?;
        let row = find(&*tx, id).await?;
        self.commit_if(changed == 1, tx).await?;
        Ok(match row {
            Some(row) if changed == 1 => UpdateNodeOutcome::Updated(Box::new(row)),
            Some(_) => UpdateNodeOutcome::ChangedMeanwhile,
            None => UpdateNodeOutcome::NotFound,
        })
    }

    /// Shuts a node out; `None`: no such node.
    pub async fn quarantine(
        &self,
        id: &NodeId,
        reason: &str,
        now: DateTime<Utc>,
    ) -> Result<Option<NodeRow>, StoreError> {
        self.again(|| self.quarantine_once(id, reason, now)).await
    }

    async fn quarantine_once(
        &self,
        id: &NodeId,
        reason: &str,
        now: DateTime<Utc>,
    ) -> Result<Option<NodeRow>, StoreError> {
        let tx = self.begin().await?;
        shut_out(&*tx, id, reason, now).await?;
        let row = find(&*tx, id).await?;
        self.commit_if(row.is_some(), tx).await?;
        Ok(row)
    }

    /// Forgets a node; with `force` what waits is cancelled and what is at work fails.
    pub async fn delete_node(
        &self,
        id: &NodeId,
        force: bool,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<DeleteNodeOutcome, StoreError> {
        self.again(|| self.delete_node_once(id, force, actor, now)).await
    }

    async fn delete_node_once(
        &self,
        id: &NodeId,
        force: bool,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<DeleteNodeOutcome, StoreError> {
        let tx = self.begin().await?;
        if sql("SELECT id FROM nodes WHERE id = ? {lock}").bind(id.as_str()).one(&*tx).await?.is_none() {
            return Ok(DeleteNodeOutcome::NotFound);
        }
        let work = sql("SELECT operation, node, state FROM executions WHERE node = ? AND state IN \
                        ('PENDING', 'ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING') ORDER BY operation");
        let found: Vec<(ExecutionId, ExecutionState)> =
            work.bind(id.as_str()).all(&*tx).await?.iter().map(read_found).collect::<Result<_, _>>()?;
        if !found.is_empty() && !force {
            return Ok(DeleteNodeOutcome::Busy(found.into_iter().map(|(id, _)| id).collect()));
        }
        let operations: Vec<OperationId> = found.iter().map(|(id, _)| id.operation.clone()).collect();
        lock(&*tx, &operations).await?;
        let (waiting, active): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|(_, state)| *state == ExecutionState::Pending);
        let error = Some(ExecutionError::new(reason::NODE_DELETED, format!("{actor} deleted the node")));
        let cancelled = End { to: ExecutionState::Cancelled, error: error.clone(), actor };
        moves::end(&*tx, &waiting, &cancelled, now).await?;
        moves::end(&*tx, &active, &End { to: ExecutionState::Failed, error, actor }, now).await?;
        sql("UPDATE certificates SET revoke_time = ? WHERE node = ? AND revoke_time IS NULL")
            .time(now)
            .bind(id.as_str())
            .run(&*tx)
            .await?;
        sql("DELETE FROM conflicts WHERE node = ?").bind(id.as_str()).run(&*tx).await?;
        sql("DELETE FROM nodes WHERE id = ?").bind(id.as_str()).run(&*tx).await?;
        names::give_back(&*tx, names::Kind::Node, id.as_str()).await?;
        self.commit(tx).await?;
        Ok(DeleteNodeOutcome::Deleted)
    }
}

const SELECT: &str = "SELECT n.*, (SELECT COUNT(*) FROM node_keys k WHERE k.node = n.id AND k.state = 'PENDING') \
    AS waiting, (SELECT MAX(c.not_after) FROM certificates c WHERE c.node = n.id AND c.key_sha256 = n.key_sha256 \
    AND c.revoke_time IS NULL) AS certificate_not_after, (SELECT e.operation FROM executions e WHERE e.node = n.id \
    AND e.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')) AS active, \
    EXISTS (SELECT 1 FROM conflicts c WHERE c.node = n.id AND c.resolution = '') AS torn FROM nodes n";

/// One node, also inside a transaction.
pub(super) async fn find(db: &impl Connection, id: &NodeId) -> Result<Option<NodeRow>, StoreError> {
    let row = sql(SELECT).and(" WHERE n.id = ?").bind(id.as_str()).one(db).await?;
    Ok(read_all(db, row.as_slice()).await?.pop())
}

/// Reads nodes, with what they say and is not taken, and with their pending keys. Hardly any node has either.
async fn read_all(db: &impl Connection, rows: &[Row]) -> Result<Vec<NodeRow>, StoreError> {
    let mut nodes = Vec::with_capacity(rows.len());
    let (mut torn, mut waiting) = (Vec::new(), Vec::new());
    for row in rows {
        let node = read(row)?;
        if row.flag("torn")? {
            torn.push(node.id.clone());
        }
        if row.int("waiting")? > 0 {
            waiting.push(node.id.clone());
        }
        nodes.push(node);
    }
    if !torn.is_empty() {
        let mut found = conflicts::of_nodes(db, &torn).await?;
        for node in &mut nodes {
            node.conflicts = found.remove(&node.id).unwrap_or_default();
        }
    }
    if !waiting.is_empty() {
        let mut pending: BTreeMap<NodeId, Vec<PendingKey>> = BTreeMap::new();
        for (node, key) in keys::pending(db, &waiting).await? {
            pending.entry(node).or_default().push(key);
        }
        for node in &mut nodes {
            node.pending_keys = pending.remove(&node.id).unwrap_or_default();
        }
    }
    Ok(nodes)
}

/// The id from the column `id`.
pub(super) fn read_id(row: &Row) -> Result<NodeId, StoreError> {
    row.word("id", |id| NodeId::parse(id).ok())
}

/// A serial number as it is compared.
pub(super) fn normal_serial(serial: &str) -> String {
    serial.trim().to_ascii_lowercase()
}

fn read(row: &Row) -> Result<NodeRow, StoreError> {
    let id = read_id(row)?;
    let controller_id = row.maybe_text("controller_id")?;
    Ok(NodeRow {
        display_name: row.text("display_name")?,
        labels: row.json("labels")?,
        state: row.word("state", NodeState::parse)?,
        state_reason: row.text("state_reason")?,
        connected: controller_id.is_some(),
        mode: row.maybe_word("mode", NodeMode::parse)?,
        board: row.json("board")?,
        system: row.json("system")?,
        boot_id: row.text("boot_id")?,
        agent_version: row.text("agent_version")?,
        create_time: row.time("create_time")?,
        last_seen: row.maybe_time("last_seen")?,
        active_execution: row
            .maybe_word("active", |operation| OperationId::parse(operation).ok())?
            .map(|operation| ExecutionId { operation, node: id.clone() }),
        session_epoch: row.int("session_epoch")?,
        controller_id,
        generation: row.int("generation")?,
        conflicts: Vec::new(),
        key_sha256: row.text("key_sha256")?,
        pending_keys: Vec::new(),
        certificate_expire_time: row.maybe_time("certificate_not_after")?,
        id,
    })
}
