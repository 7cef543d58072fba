//! What the agent can find out about the machine, and what it can do to it: the one trait between the agent and a
//! board, because a test can neither reboot a machine nor partition a card.

use std::any::Any;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use marco_archive::disk::Needs;

pub(crate) mod command;
mod disk;
pub mod facts;
pub mod host;
pub mod installer;
pub mod release;
pub mod rooted;
pub(crate) mod scheduled;
mod test_firmware;
pub mod virtual_pi;

pub(crate) use disk::{make_read_only, make_writable};

use crate::health::{Ailment, Condition};
pub use facts::{Board, Facts, Layout, SystemFacts};
pub use release::Release;
use rooted::Rooted;
pub use scheduled::{Scheduled, Standing};

/// A state folder needs room for a journal and its successor.
const STATE_ROOM: u64 = 1 << 20;

/// Illness of the file system of a folder, if it has one.
pub(crate) fn ailing_disk(folder: &Path) -> Option<Condition> {
    // The agent makes the folder itself.
    let there = folder.ancestors().find(|folder| folder.exists())?;
    let message = match rustix::fs::statvfs(there) {
        Ok(found) if found.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) => "is read-only".to_owned(),
        Ok(found) => match found.f_bavail.saturating_mul(found.f_frsize) {
            free if free < STATE_ROOM => format!("has {free} bytes free"),
            _ => return None,
        },
        Err(error) => format!("cannot be asked: {error}"),
    };
    Some(Condition { ailment: Ailment::Disk, message: format!("the file system of {} {message}", folder.display()) })
}

/// A machine could not be asked or told something.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// A file or folder could not be read or written.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was tried, as a verb.
        doing: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A program could not be started, failed, or did not end in time.
    #[error("{program} failed: {message}")]
    Command {
        /// The program's path.
        program: String,
        /// Exit status and last words, or why it did not start.
        message: String,
    },
    /// What was found makes no sense, for example an unreadable power state.
    #[error("{0}")]
    Invalid(String),
    /// This machine cannot do that.
    #[error("{0}")]
    Unsupported(&'static str),
    /// It will not be done, for a reason that trying again does not change.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl SystemError {
    /// For `map_err` on I/O: says what was tried on what.
    pub fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}

/// In which role the machine was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The installed system runs.
    Running,
    /// The pre-boot installer runs.
    Installer,
}

/// What the firmware booted, as it says itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Booted {
    /// Number of the partition that it booted from.
    pub partition: u32,
    /// Whether it was a trial boot.
    pub tryboot: bool,
}

/// Where the partitions of a card in layout resident are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// p1: firmware files, installer sets, `marco/`.
    pub recovery: PathBuf,
    /// p4: the system's own boot partition.
    pub boot: PathBuf,
    /// p2: the system's root.
    pub root: PathBuf,
    /// p3: home.
    pub home: PathBuf,
}

/// How a machine goes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Down {
    /// It comes back.
    Reboot,
    /// It stays off.
    PowerOff,
}

/// Which way a reboot takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reboot {
    /// Into the default.
    Plain,
    /// Once into what `[tryboot]` names (reboot argument `0 tryboot`); any later reset returns to the default.
    TryBoot,
}

/// What a stronger command does not wait for any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// Services: they are killed; file systems are unmounted.
    Services,
    /// Anything: the data is written and the kernel restarts.
    Everything,
}

/// Why a machine will not be updated. Nothing was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// A stable word for programs, for example `LAYOUT_NOT_RESIDENT`.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// Keeps everybody else from the target's file systems until the last clone is dropped. A thread that still writes
/// after its job was given up (a power cut of a virtual Pi drops only the job) thereby holds up the next job.
#[derive(Clone)]
pub struct Lease(#[expect(dead_code, reason = "held for its Drop only")] Arc<dyn Any + Send + Sync>);

impl Lease {
    /// Wraps whatever must be held.
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Self(Arc::new(guard))
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lease")
    }
}

/// File systems that are ready to be installed into, mounted.
#[derive(Debug, Clone)]
pub struct Target {
    /// The new root (p2): empty when it was asked to be made anew, else as it was.
    pub root: PathBuf,
    /// The system's boot partition (p4), empty.
    pub boot: PathBuf,
    /// What `root=` and fstab must call the root, for example `PARTUUID=1a2b3c4d-02`.
    pub root_device: String,
    /// What fstab must call the boot partition.
    pub boot_device: String,
    /// What fstab must call home.
    pub home_device: String,
    /// The root's file system, as mount(8) calls it.
    pub root_type: String,
    /// Home's.
    pub home_type: String,
    /// To be held by whatever writes into the target.
    pub lease: Lease,
}

/// The partitions of a card, not mounted, for an image that brings its file systems with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawTarget {
    /// The device of the system's boot partition (p4).
    pub boot: PathBuf,
    /// The device of the root (p2).
    pub root: PathBuf,
}

/// A card that an image is written to as it is: nothing is left on it but the recovery partition, behind the image.
#[derive(Debug)]
pub struct WholeCard {
    /// The device of the card.
    pub device: PathBuf,
    /// Where the recovery partition begins, in bytes: the image must end before it.
    pub limit: u64,
    /// To be held by whoever writes to the card.
    pub lease: Lease,
}

/// A stretch of the card, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Where it begins.
    pub start: u64,
    /// How long it is.
    pub length: u64,
}

/// What a card must have room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// The partitions of layout resident, the recovery partition before all others, with so much room in the system's.
    Resident(Needs),
    /// An image of so many bytes, from the card's beginning, and the recovery partition behind it.
    Whole(u64),
}

/// Whether the card can be worked on at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// It can.
    Now,
    /// The recovery partition has to lie elsewhere first: [`System::move_recovery`], and a restart.
    AfterRestart,
}

/// What is made anew before an installation; the boot partition always is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Erase {
    /// The root.
    pub root: bool,
    /// Home.
    pub home: bool,
}

/// Between what an earlier start left in a log and what a later one says.
pub const STARTED_AGAIN: &str = "--- started again ---\n";

/// Where a machine finds what its own agent logged; nothing until somebody says.
#[derive(Default)]
pub struct OwnLog(OnceLock<Box<dyn Fn() -> Vec<u8> + Send + Sync>>);

impl OwnLog {
    /// Takes it from here from now on.
    pub fn is_from(&self, read: impl Fn() -> Vec<u8> + Send + Sync + 'static) {
        // The first one stays: there is one log.
        let _ = self.0.set(Box::new(read));
    }

    /// What it says now.
    pub fn read(&self) -> Vec<u8> {
        self.0.get().map(|read| read()).unwrap_or_default()
    }
}

impl std::fmt::Debug for OwnLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OwnLog")
    }
}

/// The installer's log, on the recovery partition.
pub const LOG_FILE: &str = "marco/install.log";
/// Bytes of it that are kept.
const LOG_LENGTH: usize = 128 * 1024;

/// Why a whole-disk image is refused where there is no disk.
pub(crate) const NO_PARTITIONS: &str =
    "the image is a whole disk's, and this node's card is made of folders: push a tarball of its root instead";

/// What users read when nothing goes down after all.
pub(crate) const WITHDRAWN: &str = "The announced shutdown was cancelled.";

/// What users read before the machine goes down.
pub(crate) fn announcement(down: Down, delay: Duration, message: &str) -> String {
    let what = match down {
        Down::Reboot => "reboots",
        Down::PowerOff => "powers off",
    };
    let when = if delay.is_zero() { "now".to_owned() } else { format!("in {}", humantime::format_duration(delay)) };
    let message = message.trim();
    if message.is_empty() {
        format!("This machine {what} {when}.")
    } else {
        format!("This machine {what} {when}: {message}")
    }
}

/// A machine.
#[async_trait]
pub trait System: Send + Sync + 'static {
    /// The id of this boot; another boot has another one.
    fn boot_id(&self) -> Result<String, SystemError>;

    /// What the board is and what runs on it. Reads files: not for a hot path.
    fn facts(&self) -> Result<Facts, SystemError>;

    /// In which role it was started.
    fn mode(&self) -> Mode;

    /// What the firmware booted; none when it does not say (not a Raspberry Pi, or an old firmware).
    fn booted(&self) -> Option<Booted>;

    /// Where the partitions are; none unless the card is in layout resident.
    fn card(&self) -> Option<Card>;

    /// The root of the installed system, in either mode.
    fn root(&self) -> PathBuf;

    /// Where the agent keeps its journal: on the root when running, on p1 in the installer.
    fn state_dir(&self) -> PathBuf;

    /// Where the node's key and certificates are.
    fn identity_dir(&self) -> PathBuf;

    /// Which installation the system comes from, as `/etc/marco-release` says (and, when only boot files were
    /// replaced since, the boot partition's `marco-release`); none when no installer of ours was at work.
    fn release(&self) -> Result<Option<Release>, SystemError> {
        Release::read(&self.root(), self.card().as_ref().map(|card| card.boot.as_path()))
    }

    /// Whether the card holds a system, whoever installed it: then only somebody who says so may erase it.
    fn holds_system(&self) -> bool {
        Rooted::open(&self.root()).is_ok_and(|root| !root.list("").unwrap_or_default().is_empty())
    }

    /// The agent's own program, where an installation has to put it into the new root together with the node's
    /// identity; none: it is not on the card, as a virtual Pi's.
    fn agent_program(&self) -> Option<PathBuf> {
        None
    }

    /// Warns logged-in users that the machine goes down after `delay`. Nothing goes down by that, and a shutdown that
    /// somebody else announced stays. Tells whether the warning stands as an announced shutdown
    /// ([`Standing::Ours`]) until `delay` has passed, so that a user can take it back.
    async fn announce(&self, down: Down, delay: Duration, message: &str) -> Result<bool, SystemError>;

    /// Tells whose shutdown is announced now.
    fn standing(&self) -> Standing {
        Standing::Nothing
    }

    /// Tells logged-in users that what the agent announced does not happen, and takes back a trial boot that it prepared.
    /// Somebody else's shutdown stays, and nothing is said when nothing was announced.
    async fn withdraw(&self) -> Result<(), SystemError>;

    /// Reboots at once. Returns when the command was issued: what follows may not run any more. `execution` is who
    /// asked, for the log of a virtual Pi.
    async fn reboot(&self, how: Reboot, execution: Option<&str>, message: &str) -> Result<(), SystemError>;

    /// Powers off at once. Returns when the command was issued.
    async fn power_off(&self, execution: Option<&str>, message: &str) -> Result<(), SystemError>;

    /// Goes down at once by a stronger command, for a machine that is still up although it was told to. A reboot keeps
    /// its argument: a trial boot stays one. Returns when the command was issued.
    async fn force(&self, down: Down, how: Reboot, force: Force, execution: Option<&str>) -> Result<(), SystemError>;

    /// How long it may take to go down before a stronger command is given.
    fn patience(&self) -> Duration {
        Duration::from_secs(60)
    }

    /// Illnesses of the machine, as far as they can be seen. Reads files: not for a hot path.
    fn conditions(&self) -> Vec<Condition> {
        Vec::new()
    }

    /// The system's clock; `None`: nothing relies on it.
    fn clock(&self) -> Option<DateTime<Utc>> {
        None
    }

    /// Whether an update can be begun, before anything is written.
    async fn preflight_update(&self) -> Result<(), Refusal>;

    /// Refuses an installation that would keep something which the installer does not understand or cannot read. Nothing is
    /// written.
    async fn check_kept(&self, _erase: Erase) -> Result<(), Refusal> {
        Ok(())
    }

    /// Whether [`prepare_target`](Self::prepare_target), or [`whole_card`](Self::whole_card), can work on this card. Nothing
    /// is written.
    async fn check_target(&self, room: Room) -> Result<Ready, SystemError> {
        match room {
            Room::Resident(_) => Ok(Ready::Now),
            Room::Whole(_) => Err(SystemError::Unsupported(NO_PARTITIONS)),
        }
    }

    /// Has the recovery partition moved when the machine restarts next, so that there is this room. Everything else on the
    /// card is lost then.
    async fn move_recovery(&self, _room: Room) -> Result<(), SystemError> {
        Err(SystemError::Unsupported(NO_PARTITIONS))
    }

    /// Makes the card's file systems ready to be installed into, and mounts them. Installer only.
    async fn prepare_target(&self, erase: Erase) -> Result<Target, SystemError>;

    /// Makes the boot partition of a target anew, empty and mounted again, under this label of at most 11 bytes, for what
    /// looks for it by that. A card of folders has no labels.
    async fn label_boot(&self, _target: &Target, _label: &str) -> Result<(), SystemError> {
        Ok(())
    }

    /// Whether the card has partitions that the file systems of a whole-disk image can be written to.
    fn takes_disk_images(&self) -> bool {
        false
    }

    /// Unmounts root and boot partition of a target, so that file systems can be written to them.
    async fn raw_target(&self, _target: &Target) -> Result<RawTarget, SystemError> {
        Err(SystemError::Unsupported(NO_PARTITIONS))
    }

    /// Checks the file systems that were written, lets the root grow to its partition, and mounts both again.
    async fn mount_raw(&self, _target: &Target) -> Result<(), SystemError> {
        Err(SystemError::Unsupported(NO_PARTITIONS))
    }

    /// Takes every partition but the recovery partition off the card, so that an image can be written before that.
    /// Installer only.
    async fn whole_card(&self) -> Result<WholeCard, SystemError> {
        Err(SystemError::Unsupported(NO_PARTITIONS))
    }

    /// Mounts the boot partition and the root of an image that was written to the whole card, which the card's table does
    /// not know yet.
    async fn mount_whole(&self, _boot: Stretch, _root: Stretch, _lease: Lease) -> Result<Target, SystemError> {
        Err(SystemError::Unsupported(NO_PARTITIONS))
    }

    /// Writes everything to the card, unmounts it, and then writes the image's first sector, with its table: from then on
    /// the image is what boots.
    async fn finish_whole(&self, _target: Target, _first: [u8; 512]) -> Result<(), SystemError> {
        Err(SystemError::Unsupported(NO_PARTITIONS))
    }

    /// Writes everything to the card and unmounts what [`prepare_target`](Self::prepare_target) mounted.
    async fn finish_target(&self, target: Target) -> Result<(), SystemError>;

    /// Keeps a line of the installer's log on the card, for whoever takes the card out. Not for a secret.
    fn keep_line(&self, line: &str) {
        let Some(card) = self.card() else { return };
        let path = card.recovery.join(LOG_FILE);
        let kept = std::fs::read(&path).unwrap_or_default();
        let from = kept.len().saturating_sub(LOG_LENGTH);
        let text = [kept.get(from..).unwrap_or_default(), line.as_bytes(), b"\n"].concat();
        if let Err(error) = std::fs::write(&path, text) {
            tracing::warn!(error = %error, "log not kept on the card");
        }
    }

    /// What is logged of what happened to this machine, oldest first: by its installer, and by this agent. Reads a file:
    /// not for a hot path.
    fn kept_log(&self) -> Vec<u8> {
        self.card().map(|card| std::fs::read(card.recovery.join(LOG_FILE)).unwrap_or_default()).unwrap_or_default()
    }

    /// How long an installation that failed for good is left as it is before [`give_up`](Self::give_up); none: for ever,
    /// waiting for the controller.
    fn gives_up_after(&self) -> Option<Duration> {
        None
    }

    /// Does what its owner wants of a machine whose installation failed.
    async fn give_up(&self) -> Result<(), SystemError> {
        Ok(())
    }

    /// Tells the watchdog that the machine is alive; call it at least every ten seconds during long work.
    fn feed_watchdog(&self) {}
}
