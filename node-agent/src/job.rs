//! A job is a node's part of an operation: its action, its states, and the decision of a starting agent about it. Pure:
//! no clock, no disk, no wire.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub mod phase;
mod tries;

pub use tries::{NEVER_ENDED, Tries};

/// Trial boots of a new system, after which the installer gives up and waits.
pub const MAX_TRIALS: u32 = 3;

/// Leap of the sequence number where two systems on one card go on from the same entry: the old system and the
/// installer after ARMED, the new system and the installer after a trial boot. The one that comes back later must be
/// ahead of every report of the other one.
pub const FORK_LEAP: u64 = 100;

/// A node's labels, by their keys.
pub type Labels = BTreeMap<String, String>;

/// An artifact as the operation froze it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    /// The id it was asked for by.
    pub id: String,
    /// SHA-256 of its bytes, lower-case hexadecimal.
    pub sha256: String,
}

/// The warning to logged-in users before a node goes down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// Time between the warning and the command; zero: at once.
    pub delay: Duration,
    /// Text for the users; may be empty.
    pub message: String,
}

/// An installation of an image, or of boot files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// The image; `None`: only the boot files change.
    pub image: Option<Artifact>,
    /// The bootcode; `None`: the fallback that the node keeps.
    pub bootcode: Option<Artifact>,
    /// The warning before the restart.
    pub notice: Notice,
    /// Formats the home partition; otherwise it is kept.
    pub discard_home: bool,
    /// Writes the image, which is a whole disk's, to the whole card as it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub raw: bool,
}

/// The running system's description of itself (`/etc/marco-release`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// The execution that installed the system or its boot files.
    pub execution: String,
    /// SHA-256 of the image; empty when no installer of ours wrote the root.
    pub image_sha256: String,
    /// SHA-256 of the boot files if only they were replaced since; otherwise empty.
    pub boot_sha256: String,
}

/// Reason of a job that did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// A stable word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

impl Failure {
    /// Creates a failure.
    pub fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), message: message.into() }
    }
}

/// An action on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Restart.
    Reboot(Notice),
    /// Power off.
    PowerOff(Notice),
    /// Install an image, or boot files.
    Update(Update),
    /// Something that this agent does not know: journalled, so that the answer stays the same.
    Unknown,
}

impl Action {
    /// Returns the action without its particulars.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Reboot(_) => Kind::Reboot,
            Self::PowerOff(_) => Kind::PowerOff,
            Self::Update(_) => Kind::Update,
            Self::Unknown => Kind::Unknown,
        }
    }

    /// Returns true for an update that writes an image to the whole card as it is.
    pub fn is_raw(&self) -> bool {
        matches!(self, Self::Update(update) if update.raw)
    }
}

/// An action without its particulars.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Restart.
    Reboot,
    /// Power off.
    PowerOff,
    /// Install.
    Update,
    /// Not known here.
    Unknown,
}

/// Role of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As a daemon of the installed system.
    Running,
    /// As the installer, before there is a system.
    Installer,
}

/// State of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// In the journal; can still be cancelled.
    Accepted,
    /// The point of no return: the command to go down follows at once.
    Armed,
    /// The installer is at work.
    Installing,
    /// The card is written; the new system is being tried once.
    Trial,
    /// The new system is up and waits for the controller to accept it.
    Verifying,
    /// Done and verified.
    Succeeded,
    /// Not done.
    Failed,
    /// Not done; the system that ran before runs again.
    RolledBack,
    /// Cancelled before the point of no return.
    Cancelled,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 9] = [
        Self::Accepted,
        Self::Armed,
        Self::Installing,
        Self::Trial,
        Self::Verifying,
        Self::Succeeded,
        Self::Failed,
        Self::RolledBack,
        Self::Cancelled,
    ];

    /// Returns true if no other state follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::RolledBack | Self::Cancelled)
    }

    /// Passes the point of no return.
    pub fn arm(self, kind: Kind) -> Result<Self, WrongState> {
        match (self, kind) {
            (Self::Accepted, Kind::Reboot | Kind::PowerOff | Kind::Update) => Ok(Self::Armed),
            _ => self.refuse("armed", kind),
        }
    }

    /// The installer begins, or begins again.
    pub fn install(self, kind: Kind) -> Result<Self, WrongState> {
        match (self, kind) {
            // Accepted: the assignment reached the installer itself. Trial: the system did not come up.
            (Self::Accepted | Self::Armed | Self::Installing | Self::Trial, Kind::Update) => Ok(Self::Installing),
            _ => self.refuse("installed", kind),
        }
    }

    /// The card is written; the new system is tried.
    pub fn try_boot(self, kind: Kind) -> Result<Self, WrongState> {
        match (self, kind) {
            (Self::Installing, Kind::Update) => Ok(Self::Trial),
            _ => self.refuse("tried", kind),
        }
    }

    /// The new system is up.
    pub fn verify(self, kind: Kind) -> Result<Self, WrongState> {
        match (self, kind) {
            (Self::Trial, Kind::Update) => Ok(Self::Verifying),
            _ => self.refuse("verified", kind),
        }
    }

    /// The action is done, with proof: another boot id, or the controller's acceptance.
    pub fn succeed(self, kind: Kind) -> Result<Self, WrongState> {
        match (self, kind) {
            // A new boot id alone does not prove an update: an old system boots, too.
            (Self::Armed, Kind::Reboot | Kind::PowerOff) | (Self::Verifying, Kind::Update) => Ok(Self::Succeeded),
            _ => self.refuse("completed", kind),
        }
    }

    /// The job has failed for good.
    pub fn fail(self, kind: Kind) -> Result<Self, WrongState> {
        if self.is_final() { self.refuse("failed", kind) } else { Ok(Self::Failed) }
    }

    /// The old system came back.
    pub fn roll_back(self, kind: Kind) -> Result<Self, WrongState> {
        match (self, kind) {
            // Only the old system rolls back, and its own journal ends at ARMED.
            (Self::Armed, Kind::Update) => Ok(Self::RolledBack),
            _ => self.refuse("rolled back", kind),
        }
    }

    /// A cancel came before the point of no return.
    pub fn cancel(self, kind: Kind) -> Result<Self, WrongState> {
        match self {
            // Once ARMED is on the disk, the command to go down may be under way.
            Self::Accepted => Ok(Self::Cancelled),
            _ => self.refuse("cancelled", kind),
        }
    }

    fn refuse(self, step: &'static str, kind: Kind) -> Result<Self, WrongState> {
        Err(WrongState { state: self, step, kind })
    }
}

/// A step that does not follow from the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a job ({kind:?}) that is {state:?} cannot be {step}")]
pub struct WrongState {
    /// The state it is in.
    pub state: State,
    /// The refused step, for the message: armed, installed, ...
    pub step: &'static str,
    /// Kind of the job's action.
    pub kind: Kind,
}

/// Decision of a starting agent about a job that it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Nothing: it is over.
    Nothing,
    /// Begin at the beginning; the notice starts again.
    Begin,
    /// The command to go down was journalled and has not worked: give it again.
    GoDown,
    /// The action has happened.
    Succeed,
    /// The action did not happen, or cannot happen, for this reason.
    Fail(&'static str),
    /// The old system runs again.
    RollBack,
    /// Install; in the installer only.
    Install,
    /// The new system did not come up: count the trial, then install again or give up.
    TrialFailed,
    /// The card is written, but the boot into it was not seen: order it again.
    TryBoot,
    /// The new system is up: report it.
    Verify,
    /// Wait until the controller accepts the new system.
    AwaitVerdict,
}

/// Reason: the power-off was ordered under this very boot, and did not happen.
pub const DID_NOT_POWER_OFF: &str = "POWER_OFF_DID_NOT_HAPPEN";
/// Reason: the controller gave the job up while the agent was not running, or before the next try.
pub const CALLED_OFF: &str = "CALLED_OFF";
/// Reason: the running system is not the one that the trial was for.
pub const RELEASE_MISMATCH: &str = "RELEASE_MISMATCH";
/// Reason: the journal holds a state that this role of the agent cannot have.
pub const WRONG_MODE: &str = "WRONG_MODE";
/// Reason: this agent does not know the action.
pub const UNKNOWN_ACTION: &str = "UNKNOWN_ACTION";
/// Reason: the newest copy of the journal was lost, so it is not known whether the action was done.
pub const JOURNAL_LOST: &str = "JOURNAL_LOST";

/// Facts by which a starting agent decides about a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Kind of the job's action.
    pub kind: Kind,
    /// State in the journal.
    pub state: State,
    /// The role in which the agent starts.
    pub mode: Mode,
    /// The machine has not restarted since the last state was journalled.
    pub same_boot: bool,
    /// The running system's release names this execution.
    pub release_is_ours: bool,
    /// The state is of an older copy of the journal, and later ones may have been journalled.
    pub torn: bool,
}

/// Decides about a job that a starting agent finds.
pub fn resume(found: Found) -> Resume {
    let Found { kind, state, mode, same_boot, release_is_ours, torn } = found;
    match (state, kind, mode) {
        (State::Succeeded | State::Failed | State::RolledBack | State::Cancelled, _, _) => Resume::Nothing,
        // The entry of a newer agent. An unknown action that arrives here is journalled as FAILED at once.
        (_, Kind::Unknown, _) => Resume::Fail(UNKNOWN_ACTION),

        // It may have been armed before the restart, and to begin again would do it twice. In the installer nothing is
        // disturbed by that.
        (State::Accepted, _, Mode::Running) if torn && !same_boot => Resume::Fail(JOURNAL_LOST),
        (State::Accepted, _, _) => Resume::Begin,

        (State::Armed, Kind::Reboot, _) if same_boot => Resume::GoDown,
        // The command may be hours old. A machine that is in use must not power off by surprise.
        (State::Armed, Kind::PowerOff, _) if same_boot => Resume::Fail(DID_NOT_POWER_OFF),
        // Another boot id proves a restart, and also that a machine that powers off was down.
        (State::Armed, Kind::Reboot | Kind::PowerOff, _) => Resume::Succeed,
        (State::Armed, Kind::Update, Mode::Running) if same_boot => Resume::GoDown,
        // The machine restarted, and this is not the installer: its trial boot has ended, or never came.
        (State::Armed, Kind::Update, Mode::Running) => Resume::RollBack,
        (State::Armed | State::Installing, Kind::Update, Mode::Installer) => Resume::Install,

        // Only the agent restarted: the new system has not been tried yet.
        (State::Trial, Kind::Update, Mode::Installer) if same_boot => Resume::TryBoot,
        (State::Trial | State::Verifying, Kind::Update, Mode::Installer) => Resume::TrialFailed,
        (State::Trial, Kind::Update, Mode::Running) if release_is_ours => Resume::Verify,
        (State::Trial, Kind::Update, Mode::Running) => Resume::Fail(RELEASE_MISMATCH),
        // Under any boot id: a power cut between the confirmation and its journal entry leaves this state, too.
        (State::Verifying, Kind::Update, Mode::Running) => Resume::AwaitVerdict,

        // A new root gets its journal in TRIAL, and the old system's ends at ARMED.
        (State::Installing, Kind::Update, Mode::Running) => Resume::Fail(WRONG_MODE),
        (State::Installing | State::Trial | State::Verifying, Kind::Reboot | Kind::PowerOff, _) => {
            Resume::Fail(WRONG_MODE)
        }
    }
}

#[cfg(test)]
mod tests;
