//! What a node's part of an operation is, which states it has, and what an agent that starts does with a job it finds.
//! Pure: no clock, no disk, no wire.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub mod phase;
mod tries;

pub use tries::{NEVER_ENDED, Tries};

/// How often a new system is tried before the installer gives up and waits.
pub const MAX_TRIALS: u32 = 3;

/// How far the sequence number leaps where two systems on one card go on from the same entry: the old system and the
/// installer after ARMED, the new system and the installer after a trial boot. The one that comes back later must be
/// ahead of whatever the other one may have reported.
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
    /// How long they are warned; zero is at once.
    pub delay: Duration,
    /// What they are told.
    pub message: String,
}

/// An installation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// The image; `None`: only the boot files change.
    pub image: Option<Artifact>,
    /// The bootcode; `None`: the fallback that the node keeps.
    pub bootcode: Option<Artifact>,
    /// The warning before the restart.
    pub notice: Notice,
    /// Make the home partition anew.
    pub discard_home: bool,
    /// Write the image, a whole disk's, to the whole card as it is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub raw: bool,
}

/// What the running system says it is (`/etc/marco-release`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// The execution that installed the system or its boot files.
    pub execution: String,
    /// SHA-256 of the image; empty when no installer of ours wrote the root.
    pub image_sha256: String,
    /// SHA-256 of the boot files, where only they were replaced; else empty.
    pub boot_sha256: String,
}

/// Why a job did not succeed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// A stable word for programs.
    pub reason: String,
    /// A sentence for people.
    pub message: String,
}

impl Failure {
    /// A failure of this reason, said in this sentence.
    pub fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self { reason: reason.into(), message: message.into() }
    }
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
    /// Something that this agent does not know: journalled, so that the answer stays the same.
    Unknown,
}

impl Action {
    /// Which of the actions it is.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Reboot(_) => Kind::Reboot,
            Self::PowerOff(_) => Kind::PowerOff,
            Self::Update(_) => Kind::Update,
            Self::Unknown => Kind::Unknown,
        }
    }

    /// Whether it writes an image to the whole card as it is.
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

/// In which role the agent runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As a daemon of the installed system.
    Running,
    /// As the installer, before there is a system.
    Installer,
}

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// In the journal; still to be cancelled.
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
    /// Not done; what ran before runs again.
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

    /// Whether nothing follows.
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

    /// What was asked was done, and it shows.
    pub fn succeed(self, kind: Kind) -> Result<Self, WrongState> {
        match (self, kind) {
            (Self::Armed, Kind::Reboot | Kind::PowerOff) | (Self::Verifying, Kind::Update) => Ok(Self::Succeeded),
            _ => self.refuse("completed", kind),
        }
    }

    /// It cannot be done.
    pub fn fail(self, kind: Kind) -> Result<Self, WrongState> {
        if self.is_final() { self.refuse("failed", kind) } else { Ok(Self::Failed) }
    }

    /// The old system came back.
    pub fn roll_back(self, kind: Kind) -> Result<Self, WrongState> {
        match (self, kind) {
            (Self::Armed, Kind::Update) => Ok(Self::RolledBack),
            _ => self.refuse("rolled back", kind),
        }
    }

    /// It was called off in time.
    pub fn cancel(self, kind: Kind) -> Result<Self, WrongState> {
        match self {
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
    /// What was to be done.
    pub step: &'static str,
    /// Of which action.
    pub kind: Kind,
}

/// What an agent that starts does with a job it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// Nothing: it is over.
    Nothing,
    /// Begin at the beginning; a notice starts anew.
    Begin,
    /// The command to go down was journalled and has not worked: give it again.
    GoDown,
    /// What was asked has happened.
    Succeed,
    /// It did not happen, or cannot: the reason.
    Fail(&'static str),
    /// The old system runs again.
    RollBack,
    /// Install; in the installer only.
    Install,
    /// The new system did not come up: count the trial, then install again or give up.
    TrialFailed,
    /// The card is written, but the boot into it was not seen: order it again.
    TryBoot,
    /// The new system is up: say so.
    Verify,
    /// Wait until the controller accepts the new system.
    AwaitVerdict,
}

/// A power-off that was ordered under this very boot, and did not happen.
pub const DID_NOT_POWER_OFF: &str = "POWER_OFF_DID_NOT_HAPPEN";
/// The controller gave the job up: while the agent was not running, or before its next try.
pub const CALLED_OFF: &str = "CALLED_OFF";
/// The running system is not the one that the trial was for.
pub const RELEASE_MISMATCH: &str = "RELEASE_MISMATCH";
/// The journal holds a state that this role of the agent cannot have.
pub const WRONG_MODE: &str = "WRONG_MODE";
/// The action is not one that this agent knows.
pub const UNKNOWN_ACTION: &str = "UNKNOWN_ACTION";

/// What is known when an agent starts and finds a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// What was asked.
    pub kind: Kind,
    /// Where it stood.
    pub state: State,
    /// The role in which the agent starts.
    pub mode: Mode,
    /// The machine has not restarted since the last state was journalled.
    pub same_boot: bool,
    /// The running system's release names this execution.
    pub release_is_ours: bool,
}

/// Decides what an agent that starts does with a job it finds.
pub fn resume(found: Found) -> Resume {
    let Found { kind, state, mode, same_boot, release_is_ours } = found;
    match (state, kind, mode) {
        (State::Succeeded | State::Failed | State::RolledBack | State::Cancelled, _, _) => Resume::Nothing,
        (_, Kind::Unknown, _) => Resume::Fail(UNKNOWN_ACTION),

        (State::Accepted, _, _) => Resume::Begin,

        (State::Armed, Kind::Reboot, _) if same_boot => Resume::GoDown,
        // Never powered off by surprise, long after it was asked for.
        (State::Armed, Kind::PowerOff, _) if same_boot => Resume::Fail(DID_NOT_POWER_OFF),
        (State::Armed, Kind::Reboot | Kind::PowerOff, _) => Resume::Succeed,
        (State::Armed, Kind::Update, Mode::Running) if same_boot => Resume::GoDown,
        (State::Armed, Kind::Update, Mode::Running) => Resume::RollBack,
        (State::Armed | State::Installing, Kind::Update, Mode::Installer) => Resume::Install,

        (State::Trial, Kind::Update, Mode::Installer) if same_boot => Resume::TryBoot,
        (State::Trial | State::Verifying, Kind::Update, Mode::Installer) => Resume::TrialFailed,
        (State::Trial, Kind::Update, Mode::Running) if release_is_ours => Resume::Verify,
        (State::Trial, Kind::Update, Mode::Running) => Resume::Fail(RELEASE_MISMATCH),
        // Whatever the boot id: a power cut between the confirmation and its journal entry leaves this state, too.
        (State::Verifying, Kind::Update, Mode::Running) => Resume::AwaitVerdict,

        (State::Installing, Kind::Update, Mode::Running) => Resume::Fail(WRONG_MODE),
        (State::Installing | State::Trial | State::Verifying, Kind::Reboot | Kind::PowerOff, _) => {
            Resume::Fail(WRONG_MODE)
        }
    }
}

#[cfg(test)]
mod tests;
