//! Nodes: reading, changing, quarantining and deleting them.

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

/// Hardware facts, as the agent reported them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Board {
    /// Model name from the device tree.
    pub model: String,
    /// Revision code, hexadecimal.
    pub revision: String,
    /// Serial number, 16 hexadecimal digits.
    pub serial: String,
    /// MAC addresses of its interfaces.
    pub mac_addresses: Vec<String>,
    /// Memory that the kernel sees, in bytes.
    pub memory_bytes: u64,
    /// `pi1` to `pi5`; empty if unknown.
    pub family: String,
}

/// Facts about the system that a node runs, as the agent reported them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct System {
    /// As `uname -m` prints it.
    pub kernel_arch: String,
    /// Architecture that the agent was built for.
    pub userspace_arch: String,
    /// Page size of the kernel in bytes.
    pub page_size: u32,
    /// As `uname -r` prints it.
    pub kernel_release: String,
    /// PRETTY_NAME of /etc/os-release.
    pub os: String,
    /// Partition layout of the card.
    pub layout: CardLayout,
    /// SHA-256 of the image that the system was installed from; empty if unknown.
    pub image_sha256: String,
    /// SHA-256 of the boot files; empty if unknown.
    pub boot_sha256: String,
    /// Reason to refuse an update. `None` if the node would accept one.
    pub update_refusal: Option<UpdateRefusal>,
    /// What the trial of a new system lacks on the machine, as a sentence; empty: nothing known.
    pub trial_lacks: String,
    /// Problems that the node reported last.
    pub conditions: Vec<Condition>,
}

/// A problem of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// Kind of the problem.
    pub ailment: Ailment,
    /// A sentence for people.
    pub message: String,
}

/// Kind of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ailment {
    /// The journal cannot be written, so the node takes no work.
    Journal,
    /// The file system of the agent's state is read-only or full.
    Disk,
    /// The system's clock is wrong.
    Clock,
    /// The power supply is too weak.
    UnderVoltage,
    /// The journal, or its newest copy, was lost.
    JournalLost,
    /// A kind that this controller does not know, from a newer agent or a newer controller.
    #[serde(other)]
    Unknown,
}

/// Reason of a node to refuse an update.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateRefusal {
    /// A stable word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

/// Partition layout of a card.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CardLayout {
    /// The agent reported none.
    #[default]
    Unknown,
    /// One boot partition.
    Single,
    /// A recovery partition with installer sets, and the system's own boot partition.
    Resident,
}

/// A stored node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRow {
    /// Id, unique also among users regardless of case.
    pub id: NodeId,
    /// A name for people.
    pub display_name: String,
    /// Labels, for selectors and scopes.
    pub labels: BTreeMap<String, String>,
    /// State of admission.
    pub state: NodeState,
    /// Reason if the node is not approved, else empty.
    pub state_reason: String,
    /// True while a controller holds its stream.
    pub connected: bool,
    /// Role of its agent at its last hello. `None` before the first.
    pub mode: Option<NodeMode>,
    /// Hardware, as its agent reported it last.
    pub board: Board,
    /// Running system, as its agent reported it last.
    pub system: System,
    /// Boot id of its last hello; empty before the first.
    pub boot_id: String,
    /// Agent's version of its last hello; empty before the first.
    pub agent_version: String,
    /// Time of its enrolment.
    pub create_time: DateTime<Utc>,
    /// Last sign of life. `None` before the first session.
    pub last_seen: Option<DateTime<Utc>>,
    /// The unfinished execution that was assigned to it, if any.
    pub active_execution: Option<ExecutionId>,
    /// Number of its last session.
    pub session_epoch: i64,
    /// The controller that holds its stream. `None` without a stream.
    pub controller_id: Option<String>,
    /// Rises each time an operator approves another key. Open calls of certificates with a lower one are ended.
    pub generation: i64,
    /// Reports about executions that the store could not accept, oldest first.
    pub conflicts: Vec<ConflictRow>,
    /// SHA-256 of the SubjectPublicKeyInfo of its key, lower-case hexadecimal. Empty after its key was revoked.
    pub key_sha256: String,
    /// Keys that wait for approval, oldest first.
    pub pending_keys: Vec<PendingKey>,
    /// End of validity of the newest certificate of its key. `None` if there is none.
    pub certificate_expire_time: Option<DateTime<Utc>>,
}

/// Filter for a list of nodes. An empty field does not restrict.
#[derive(Debug, Clone, Default)]
pub struct NodeQuery {
    /// Only nodes with a greater id, for the next page.
    pub after: Option<NodeId>,
    /// Largest number of rows.
    pub limit: u32,
    /// Only nodes in one of these states.
    pub states: Vec<NodeState>,
    /// Only nodes with all of these labels.
    pub labels: BTreeMap<String, String>,
    /// True: only connected nodes.
    pub connected: bool,
    /// Only nodes within the scope.
    pub scope: Scope,
}

/// Result of deleting a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeleteNodeOutcome {
    /// Deleted, and its certificates are revoked.
    Deleted,
    /// It has unfinished work, and `force` was not set.
    Busy(Vec<ExecutionId>),
    /// No such node.
    NotFound,
}

/// Result of changing a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpdateNodeOutcome {
    /// Changed; the node as it is now.
    Updated(Box<NodeRow>),
    /// Its labels changed since they were read. Nothing was written.
    ChangedMeanwhile,
    /// No such node.
    NotFound,
}

impl Store {
    /// Reads one node.
    pub async fn node(&self, id: &NodeId) -> Result<Option<NodeRow>, StoreError> {
        find(self.reader(), id).await
    }

    /// Nodes in the order of their ids.
    pub async fn nodes(&self, query: &NodeQuery) -> Result<Vec<NodeRow>, StoreError> {
        let which = sql(SELECT)
            .and(" WHERE n.id > ? AND (? OR n.state IN {each}) AND (? OR n.controller_id IS NOT NULL)")
            .bind(query.after.as_ref().map_or("", NodeId::as_str))
            .bind(query.states.is_empty())
            .each(query.states.iter().map(|state| state.as_str()))
            .bind(!query.connected);
        // A filter can only narrow the caller's scope, so both conditions hold.
        let rows = Self::with_labels(Self::with_labels(which, &query.labels), query.scope.labels())
            .and(" ORDER BY n.id LIMIT ?")
            .bind(i64::from(query.limit))
            .all(self.reader())
            .await?;
        read_all(self.reader(), &rows).await
    }

    /// Reads those of these nodes that exist, in the order of their ids.
    pub async fn nodes_by_id(&self, ids: &[NodeId]) -> Result<Vec<NodeRow>, StoreError> {
        let rows = sql(SELECT)
            .and(" WHERE n.id IN {each} ORDER BY n.id")
            .each(ids.iter().map(NodeId::as_str))
            .all(self.reader())
            .await?;
        read_all(self.reader(), &rows).await
    }

    /// Ids of the approved nodes that carry all of these labels. Without labels, of all approved nodes.
    pub async fn approved_nodes(&self, labels: &BTreeMap<String, String>) -> Result<Vec<NodeId>, StoreError> {
        let which = sql("SELECT n.id AS id FROM nodes n WHERE n.state = 'APPROVED'");
        Self::with_labels(which, labels).and(" ORDER BY n.id").all(self.reader()).await?.iter().map(read_id).collect()
    }

    /// Restricts a selection of `n` to nodes that carry these labels.
    fn with_labels(which: Sql, labels: &BTreeMap<String, String>) -> Sql {
        if labels.is_empty() { which } else { which.and(" AND {within n.labels}").json(labels) }
    }

    /// Changes labels, display name or both. With `before`, only if the labels are still those.
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
        // Labels decide which callers may act on a node, so a change must not overwrite labels that its caller never
        // saw. Comparing text works: maps are stored with sorted keys.
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

    /// Shuts a node out. Returns `None` if there is no such node.
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

    /// Deletes a node. With `force`, its waiting executions are cancelled and its active ones fail.
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
        // The node is locked above, the operations here: the order that all transactions keep.
        let operations: Vec<OperationId> = found.iter().map(|(id, _)| id.operation.clone()).collect();
        lock(&*tx, &operations).await?;
        let (waiting, active): (Vec<_>, Vec<_>) =
            found.into_iter().partition(|(_, state)| *state == ExecutionState::Pending);
        // A waiting execution is at no node, so it is CANCELLED. The node may have done a part of an active one, so
        // that is FAILED.
        let error = Some(ExecutionError::new(reason::NODE_DELETED, format!("{actor} deleted the node")));
        let cancelled = End { to: ExecutionState::Cancelled, error: error.clone(), actor };
        moves::end(&*tx, &waiting, &cancelled, now).await?;
        moves::end(&*tx, &active, &End { to: ExecutionState::Failed, error, actor }, now).await?;
        sql("UPDATE certificates SET revoke_time = ? WHERE node = ? AND revoke_time IS NULL")
            .time(now)
            .bind(id.as_str())
            .run(&*tx)
            .await?;
        // `conflicts` has no foreign key, so its rows do not go with the node.
        sql("DELETE FROM conflicts WHERE node = ?").bind(id.as_str()).run(&*tx).await?;
        sql("DELETE FROM nodes WHERE id = ?").bind(id.as_str()).run(&*tx).await?;
        // Without this no node or user could take the name again.
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

/// Reads one node, also inside a transaction.
pub(super) async fn find(db: &impl Connection, id: &NodeId) -> Result<Option<NodeRow>, StoreError> {
    let row = sql(SELECT).and(" WHERE n.id = ?").bind(id.as_str()).one(db).await?;
    Ok(read_all(db, row.as_slice()).await?.pop())
}

/// Reads nodes, with conflicts and pending keys. Few nodes have either, so these are fetched only for rows that say so.
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

/// Serial number in the form used for comparing.
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
