//! Nodes.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};
use serde::{Deserialize, Serialize};

use super::{Store, StoreError};
use crate::operation::{NodeMode, NodeState};

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
    /// How often it got a new key; certificates of an earlier generation are revoked at its approval.
    pub generation: i64,
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

impl Store {
    /// One node.
    pub async fn node(&self, id: &NodeId) -> Result<Option<NodeRow>, StoreError> {
        let _ = id;
        todo!()
    }

    /// Nodes, by id.
    pub async fn nodes(&self, query: &NodeQuery) -> Result<Vec<NodeRow>, StoreError> {
        let _ = query;
        todo!()
    }

    /// Those of these nodes that exist, by id.
    pub async fn nodes_by_id(&self, ids: &[NodeId]) -> Result<Vec<NodeRow>, StoreError> {
        let _ = ids;
        todo!()
    }

    /// The ids of the approved nodes with all of these labels; no labels: of all approved nodes.
    pub async fn approved_nodes(&self, labels: &BTreeMap<String, String>) -> Result<Vec<NodeId>, StoreError> {
        let _ = labels;
        todo!()
    }

    /// Changes labels, display name, or both; `None`: no such node.
    pub async fn update_node(
        &self,
        id: &NodeId,
        labels: Option<&BTreeMap<String, String>>,
        display_name: Option<&str>,
    ) -> Result<Option<NodeRow>, StoreError> {
        let _ = (id, labels, display_name);
        todo!()
    }

    /// Admits a node with the board and the key that it has now; `None`: no such node.
    pub async fn approve(&self, id: &NodeId, now: DateTime<Utc>) -> Result<Option<NodeRow>, StoreError> {
        let _ = (id, now);
        todo!()
    }

    /// Shuts a node out; `None`: no such node.
    pub async fn quarantine(
        &self,
        id: &NodeId,
        reason: &str,
        now: DateTime<Utc>,
    ) -> Result<Option<NodeRow>, StoreError> {
        let _ = (id, reason, now);
        todo!()
    }

    /// Forgets a node; with `force` what waits is cancelled and what is at work fails.
    pub async fn delete_node(
        &self,
        id: &NodeId,
        force: bool,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<DeleteNodeOutcome, StoreError> {
        let _ = (id, force, actor, now);
        todo!()
    }
}
