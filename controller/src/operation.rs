//! Operations and executions: their states, and the change of state that follows each event. Pure: no clock, no store,
//! no wire.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

mod conflict;
mod phase;
mod report;
mod state;
mod wait;

pub use conflict::{Conflict, Decision};
pub use phase::{Phase, deadline_after, deadline_in_all, deadline_of_stretch, point, why_overdue};
pub use report::{
    Expected, Greeting, HelloVerdict, MAX_ATTEMPT, ReportVerdict, Reported, Stored, on_hello, on_not_held, on_report,
};
pub use state::{Counts, ExecutionError, ExecutionState, IllegalTransition, OperationState, final_state, reason};
pub use wait::{NodeMode, NodeState, WaitContext, WaitReason, wait_reason};

/// Default warning time of users before a node goes down.
pub const DEFAULT_NOTICE: Duration = Duration::from_secs(120);

/// Warning to logged-in users before a node goes down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// Time between the start of the action and the restart or power-off.
    pub delay: Duration,
    /// Text shown to the users.
    pub message: String,
}

/// An artifact as an operation froze it at creation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenArtifact {
    /// The artifact's id, as the request named it.
    pub id: String,
    /// SHA-256 of its bytes, lower-case hexadecimal.
    pub sha256: String,
}

/// An operation's action.
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
    /// Create the home partition again instead of keeping it.
    pub discard_home: bool,
    /// Write the image, which is a whole disk's, unchanged over the whole card.
    // Absent when false, as in rows that were stored before the field existed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub raw: bool,
}

/// The nodes, as the request selected them. The resolved list is frozen in the executions.
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

impl Action {
    /// Its name in logs and in the store.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Reboot(_) => "reboot",
            Self::PowerOff(_) => "power-off",
            Self::Update(_) => "update",
        }
    }

    /// The warning before the node goes down.
    pub fn notice(&self) -> &Notice {
        match self {
            Self::Reboot(notice) | Self::PowerOff(notice) => notice,
            Self::Update(update) => &update.notice,
        }
    }

    /// The image to install; `None`: the action installs none.
    pub fn image(&self) -> Option<&FrozenArtifact> {
        match self {
            Self::Update(update) => update.image.as_ref(),
            Self::Reboot(_) | Self::PowerOff(_) => None,
        }
    }

    /// Every artifact that the action names, without duplicates, sorted by id.
    pub fn artifacts(&self) -> Vec<&FrozenArtifact> {
        let Self::Update(update) = self else { return Vec::new() };
        let mut all: Vec<&FrozenArtifact> =
            update.image.iter().chain(&update.bootcode).chain(update.bootcodes.values()).collect();
        // One artifact may be the image, the one asked for and the default of several boards at the same time.
        all.sort_by(|a, b| (&a.id, &a.sha256).cmp(&(&b.id, &b.sha256)));
        all.dedup();
        all
    }
}

impl Update {
    /// The bootcode for a board family: the one named, else the family's default, else the one for any board, else
    /// `None` (the fallback that the node keeps).
    pub fn bootcode_for(&self, family: &str) -> Option<&FrozenArtifact> {
        // The operator's word counts more than a default, and a family's default more than the general one.
        self.bootcode.as_ref().or_else(|| self.bootcodes.get(family)).or_else(|| self.bootcodes.get("*"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artifact(id: &str) -> FrozenArtifact {
        FrozenArtifact { id: id.to_owned(), sha256: format!("digest of {id}") }
    }

    fn notice(seconds: u64) -> Notice {
        Notice { delay: Duration::from_secs(seconds), message: String::new() }
    }

    fn update() -> Update {
        let bootcodes = [("pi4", artifact("for-pi4")), ("pi3", artifact("image")), ("*", artifact("for-any"))];
        Update {
            image: Some(artifact("image")),
            bootcode: None,
            bootcodes: bootcodes.map(|(family, artifact)| (family.to_owned(), artifact)).into(),
            notice: notice(3),
            discard_home: false,
            raw: false,
        }
    }

    #[test]
    fn action_has_its_word_notice_and_image() {
        let all = [Action::Reboot(notice(1)), Action::PowerOff(notice(2)), Action::Update(update())];
        assert_eq!(all.each_ref().map(Action::kind), ["reboot", "power-off", "update"]);
        assert_eq!(all.each_ref().map(|action| action.notice().delay.as_secs()), [1, 2, 3]);
        assert_eq!(all.each_ref().map(Action::image), [None, None, Some(&artifact("image"))]);
    }

    #[test]
    fn artifacts_are_named_once_each() {
        let ids = |action: &Action| action.artifacts().iter().map(|found| found.id.clone()).collect::<Vec<_>>();
        assert_eq!(ids(&Action::Update(update())), ["for-any", "for-pi4", "image"]);
        assert_eq!(ids(&Action::Update(Update { bootcode: Some(artifact("named")), ..update() })).len(), 4);
        assert!(ids(&Action::Reboot(notice(1))).is_empty());
    }

    #[test]
    fn bootcode_is_the_named_else_the_familys_else_any_boards() {
        let id = |update: &Update, family| update.bootcode_for(family).map(|found| found.id.clone());
        assert_eq!(id(&update(), "pi4").as_deref(), Some("for-pi4"));
        assert_eq!(id(&update(), "pi5").as_deref(), Some("for-any"));
        assert_eq!(id(&Update { bootcodes: BTreeMap::new(), ..update() }, "pi4"), None);
        let named = Update { bootcode: Some(artifact("named")), ..update() };
        assert_eq!(id(&named, "pi4").as_deref(), Some("named"));
    }
}
