//! What an operation and an execution are, which states they have, and which change of state follows which event.
//! Pure: no clock, no store, no wire.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use marco_proto::names::{ArtifactId, ExecutionId, NodeId, OperationId};
use serde::{Deserialize, Serialize};

/// How long users are warned when an operation does not say.
pub const DEFAULT_NOTICE: Duration = Duration::from_secs(120);

/// Warning to logged-in users before a node goes down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// How long, from the start of the action.
    pub delay: Duration,
    /// What they are told.
    pub message: String,
}

/// An artifact as an operation froze it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenArtifact {
    /// The id it was asked for by.
    pub id: String,
    /// SHA-256 of its bytes, lower-case hexadecimal.
    pub sha256: String,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Restart.
    Reboot(Notice),
    /// Power off.
    PowerOff(Notice),
    /// Install an image, or boot files.
    Update(Update),
}

/// An installation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// The image; `None`: only boot files.
    pub image: Option<FrozenArtifact>,
    /// The bootcode asked for, or the board default where all targets have the same; see `bootcodes`.
    pub bootcode: Option<FrozenArtifact>,
    /// Defaults by board family (`pi4`, ...; `*` any board), frozen at creation, used where `bootcode` is `None`.
    pub bootcodes: BTreeMap<String, FrozenArtifact>,
    /// Warning before the restart.
    pub notice: Notice,
    /// Make the home partition anew.
    pub discard_home: bool,
}

/// On which nodes, as it was asked for (the nodes themselves are frozen beside it).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// By id.
    Nodes(Vec<String>),
    /// By label.
    Labels(BTreeMap<String, String>),
    /// Every approved node.
    All,
}
