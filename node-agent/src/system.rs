//! The machine as the agent sees and changes it. The trait [`System`] is the only seam between the agent and a board,
//! because a test can neither reboot a machine nor partition a card.

use std::any::Any;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use marco_archive::disk::Needs;

mod ailing;
pub(crate) mod command;
mod disk;
pub(crate) mod drivers;
mod effect;
pub mod facts;
pub mod host;
pub mod installer;
pub mod release;
pub mod rooted;
pub(crate) mod scheduled;
mod test_firmware;
pub mod virtual_pi;

pub(crate) use disk::{make_read_only, make_writable};

use crate::health::Condition;
pub(crate) use ailing::{SETTINGS_WRONG, ailing_disk, check_settings, wrong_settings};
pub(crate) use effect::effect;
pub use facts::{Board, Facts, Layout, SystemFacts};
pub use release::Release;
use rooted::Rooted;
pub use scheduled::{Scheduled, Standing};
pub(crate) use scheduled::{WITHDRAWN, announcement};

/// A query or a command to the machine failed.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// A file or folder could not be read or written.
    #[error("cannot {doing} {path}")]
    Io {
        /// The operation that failed, as a verb: `read`, `make`.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A program could not be started, failed, or did not end in time.
    #[error("{program} failed: {message}")]
    Command {
        /// The program's path.
        program: String,
        /// Exit status and the beginning of its standard error, or the reason that it did not start or end.
        message: String,
    },
    /// A value read from the machine is invalid, for example an unreadable power state.
    #[error("{0}")]
    Invalid(String),
    /// This kind of machine does not support the operation.
    #[error("{0}")]
    Unsupported(&'static str),
    /// The operation is refused for a reason that a retry does not change.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl SystemError {
    /// For `map_err` on I/O: adds the operation and the path to the error.
    pub fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}

/// Role in which the machine was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The installed system runs.
    Running,
    /// The pre-boot installer runs.
    Installer,
}

/// This boot, as reported by the firmware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Booted {
    /// Number of the partition that it booted from.
    pub partition: u32,
    /// True for a trial boot, which is one-shot.
    pub tryboot: bool,
}

/// Mount points of the card's partitions. On a stock card `recovery` and `boot` are the same partition.
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

/// The two ways to go down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Down {
    /// It comes back.
    Reboot,
    /// It stays off.
    PowerOff,
}

/// Target of a reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reboot {
    /// The default system.
    Plain,
    /// Once into what `[tryboot]` names (reboot argument `0 tryboot`); any later reset returns to the default.
    TryBoot,
}

/// Part of an orderly shutdown that a stronger command skips.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Force {
    /// Services are killed instead of stopped. File systems are still unmounted.
    Services,
    /// Everything: the data is written and the kernel restarts.
    Everything,
}

/// Reason that a machine refuses an update. Nothing was written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// A stable word for programs, for example `LAYOUT_NOT_RESIDENT`.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
}

/// Exclusive access to the target's file systems until the last clone is dropped. A power cut of a virtual Pi drops
/// only the job, and a thread of it may still write. The lease makes the next job wait for that thread.
#[derive(Clone)]
pub struct Lease(#[expect(dead_code, reason = "held for its Drop only")] Arc<dyn Any + Send + Sync>);

impl Lease {
    /// Wraps the guard that is released with the last clone.
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
    /// The new root (p2): empty if it was to be erased, otherwise unchanged.
    pub root: PathBuf,
    /// The system's boot partition (p4), empty.
    pub boot: PathBuf,
    /// Name of the root in `root=` and fstab, for example `PARTUUID=1a2b3c4d-02`.
    pub root_device: String,
    /// Name of the boot partition in fstab.
    pub boot_device: String,
    /// Name of home in fstab.
    pub home_device: String,
    /// The root's file system, as in mount(8).
    pub root_type: String,
    /// Home's file system, as in mount(8).
    pub home_type: String,
    /// Held by every writer into the target.
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

/// A card for an image that is written to it unchanged. Only the recovery partition is left, behind the image.
#[derive(Debug)]
pub struct WholeCard {
    /// The device of the card.
    pub device: PathBuf,
    /// First byte of the recovery partition: the image must end before it.
    pub limit: u64,
    /// Held by every writer to the card.
    pub lease: Lease,
}

/// A range of the card, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Offset from the card's beginning.
    pub start: u64,
    /// Size of the range.
    pub length: u64,
}

/// Room that an installation needs on the card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// The partitions of layout resident, the recovery partition first, with this room in boot partition and root.
    Resident(Needs),
    /// An image of this many bytes from the card's beginning, and the recovery partition behind it.
    Whole(u64),
}

/// Result of [`System::check_target`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// The card can be prepared at once.
    Now,
    /// The recovery partition must be moved first: [`System::move_recovery`], then a restart.
    AfterRestart,
}

/// Partitions to format before an installation. The boot partition always is formatted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Erase {
    /// The root.
    pub root: bool,
    /// Home.
    pub home: bool,
}

/// Separates the log of an earlier start from that of a later one.
pub const STARTED_AGAIN: &str = "--- started again ---\n";

/// Source of the agent's own log. Empty until [`OwnLog::is_from`] sets it.
#[derive(Default)]
pub struct OwnLog(OnceLock<Box<dyn Fn() -> Vec<u8> + Send + Sync>>);

impl OwnLog {
    /// Sets the source. Later calls have no effect.
    pub fn is_from(&self, read: impl Fn() -> Vec<u8> + Send + Sync + 'static) {
        // The first source stays: a process has one log.
        let _ = self.0.set(Box::new(read));
    }

    /// The log up to now. Empty without a source.
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
/// Bytes of [`LOG_FILE`] that are kept.
const LOG_LENGTH: usize = 128 * 1024;

/// Error for a whole-disk image on a card made of folders.
pub(crate) const NO_PARTITIONS: &str =
    "the image is a whole disk's, and this node's card is made of folders: push a tarball of its root instead";

/// A machine: the real host, its installer, or a virtual Pi.
#[async_trait]
pub trait System: Send + Sync + 'static {
    /// Id of this boot. It changes with each boot, which proves a reboot to the controller.
    fn boot_id(&self) -> Result<String, SystemError>;

    /// Facts about the board and its system. Reads files: not for a hot path.
    fn facts(&self) -> Result<Facts, SystemError>;

    /// Role in which the machine was started.
    fn mode(&self) -> Mode;

    /// The firmware's report of this boot. `None`: it reports nothing (not a Raspberry Pi, or an old firmware).
    fn booted(&self) -> Option<Booted>;

    /// Mount points of the card. `None`: neither a card in layout resident nor a stock card.
    fn card(&self) -> Option<Card>;

    /// The root of the installed system, in either mode.
    fn root(&self) -> PathBuf;

    /// Folder of the agent's journal: on the root when running, on p1 in the installer.
    fn state_dir(&self) -> PathBuf;

    /// Folder of the node's key and certificates.
    fn identity_dir(&self) -> PathBuf;

    /// The installation that the system comes from, by the root's `/etc/marco-release` and the boot partition's
    /// `marco-release`, which is newer if only boot files were replaced. `None`: not installed by Marco.
    fn release(&self) -> Result<Option<Release>, SystemError> {
        Release::read(&self.root(), self.card().as_ref().map(|card| card.boot.as_path()))
    }

    /// True if the card holds any system, also one that Marco did not install. Only an operator's order may erase it.
    fn holds_system(&self) -> bool {
        Rooted::open(&self.root()).is_ok_and(|root| !root.list("").unwrap_or_default().is_empty())
    }

    /// Path of the agent's program, which an installation copies into the new root together with the node's identity.
    /// `None`: the program is not on the card, as on a virtual Pi.
    fn agent_program(&self) -> Option<PathBuf> {
        None
    }

    /// Path of the program that supervises the trial of a new system. `None`: nothing does.
    fn supervisor_program(&self) -> Option<PathBuf> {
        self.agent_program()
    }

    /// Says what a trial on this machine lacks, so that some hang of it would need hands. `None`: nothing is known to be
    /// missing. It is no reason to refuse an update.
    fn trial_lacks(&self) -> Option<&'static str> {
        None
    }

    /// Ends the supervision of this system's trial, which was accepted. Blocking. The trial's kernel parameters must be
    /// gone by then.
    fn end_supervision(&self) -> std::io::Result<()> {
        Ok(())
    }

    /// Warns logged-in users that the machine goes down after `delay`. The warning itself shuts nothing down, and a
    /// user's own announced shutdown stays. Returns true if the warning stands as an announced shutdown
    /// ([`Standing::Ours`]) until `delay` has passed: then a user can cancel it.
    async fn announce(&self, down: Down, delay: Duration, message: &str) -> Result<bool, SystemError>;

    /// The announced shutdown and its owner.
    fn standing(&self) -> Standing {
        Standing::Nothing
    }

    /// Tells logged-in users that the agent's shutdown is cancelled, and removes a trial boot that it prepared. A
    /// user's own shutdown stays. Says nothing if nothing was announced.
    async fn withdraw(&self) -> Result<(), SystemError>;

    /// Reboots at once. Returns after the command is issued: the caller may be killed at any time from then on.
    /// `execution` names the execution that asked, for the log of a virtual Pi.
    async fn reboot(&self, how: Reboot, execution: Option<&str>, message: &str) -> Result<(), SystemError>;

    /// Powers off at once. Returns when the command was issued.
    async fn power_off(&self, execution: Option<&str>, message: &str) -> Result<(), SystemError>;

    /// Goes down at once by a stronger command, for a machine that is still up after an orderly one. A reboot keeps its
    /// argument: a trial boot stays one. Returns when the command was issued.
    async fn force(&self, down: Down, how: Reboot, force: Force, execution: Option<&str>) -> Result<(), SystemError>;

    /// Time that an orderly shutdown may take before a stronger command is given.
    fn patience(&self) -> Duration {
        Duration::from_secs(60)
    }

    /// Signature of the card's disk for a job on it, if the installer could take another disk for it. Reads all disks.
    fn disk_to_name(&self) -> Option<String> {
        None
    }

    /// Problems of the machine that can be seen from here. Reads files: not for a hot path.
    fn conditions(&self) -> Vec<Condition> {
        Vec::new()
    }

    /// The system's clock, to compare with the controller's. `None`: nothing relies on it.
    fn clock(&self) -> Option<DateTime<Utc>> {
        None
    }

    /// Checks that an update can begin. Nothing is written.
    async fn preflight_update(&self) -> Result<(), Refusal>;

    /// Refuses an installation that would keep data which the installer does not understand or cannot read. Nothing is
    /// written.
    async fn check_kept(&self, _erase: Erase) -> Result<(), Refusal> {
        Ok(())
    }

    /// Checks that [`prepare_target`](Self::prepare_target) or [`whole_card`](Self::whole_card) can work on this card.
    /// Nothing is written.
    async fn check_target(&self, room: Room) -> Result<Ready, SystemError> {
        match room {
            // A card without partitions has nothing to measure or to move.
            Room::Resident(_) => Ok(Ready::Now),
            Room::Whole(_) => Err(SystemError::Unsupported(NO_PARTITIONS)),
        }
    }

    /// Schedules the move of the recovery partition for the next restart, to make this room. Everything else on the
    /// card is lost then.
    async fn move_recovery(&self, _room: Room) -> Result<(), SystemError> {
        Err(SystemError::Unsupported(NO_PARTITIONS))
    }

    /// Makes the card's file systems ready to be installed into, and mounts them. Installer only.
    async fn prepare_target(&self, erase: Erase) -> Result<Target, SystemError>;

    /// Formats the target's boot partition again, empty and mounted, with a label of at most 11 bytes. cloud-init finds
    /// its data by that label. A card of folders has no labels.
    async fn label_boot(&self, _target: &Target, _label: &str) -> Result<(), SystemError> {
        Ok(())
    }

    /// True if the card has partitions that the file systems of a whole-disk image can be written to.
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

    /// Removes every partition but the recovery partition, so that an image can be written before that. Installer only.
    async fn whole_card(&self) -> Result<WholeCard, SystemError> {
        Err(SystemError::Unsupported(NO_PARTITIONS))
    }

    /// Mounts the boot partition and the root of an image that was written to the whole card. The card's table does not
    /// list them yet.
    async fn mount_whole(&self, _boot: Stretch, _root: Stretch, _lease: Lease) -> Result<Target, SystemError> {
        Err(SystemError::Unsupported(NO_PARTITIONS))
    }

    /// Writes everything to the card, unmounts it, and then writes the image's first sector, with its table. From then
    /// on the image boots.
    async fn finish_whole(&self, _target: Target, _first: [u8; 512]) -> Result<(), SystemError> {
        Err(SystemError::Unsupported(NO_PARTITIONS))
    }

    /// Writes everything to the card and unmounts what [`prepare_target`](Self::prepare_target) mounted.
    async fn finish_target(&self, target: Target) -> Result<(), SystemError>;

    /// Appends a line to the installer's log on the card, for an operator who reads the card elsewhere. Never a secret.
    fn keep_line(&self, line: &str) {
        let Some(card) = self.card() else { return };
        // Read and rewritten, not appended: the file keeps only its newest part. A failure must not fail the job.
        let path = card.recovery.join(LOG_FILE);
        let kept = std::fs::read(&path).unwrap_or_default();
        let from = kept.len().saturating_sub(LOG_LENGTH);
        let text = [kept.get(from..).unwrap_or_default(), line.as_bytes(), b"\n"].concat();
        let written = crate::step::at("log", &path, &text).and_then(|()| std::fs::write(&path, text));
        if let Err(error) = written {
            tracing::warn!(error = %error, "log not kept on the card");
        }
    }

    /// Log of this machine, oldest first: of its installer, then of this agent. Reads a file: not for a hot path.
    fn kept_log(&self) -> Vec<u8> {
        self.card().map(|card| std::fs::read(card.recovery.join(LOG_FILE)).unwrap_or_default()).unwrap_or_default()
    }

    /// Wait between the final failure of an installation and [`give_up`](Self::give_up). `None`: no limit, the node
    /// waits for the controller.
    fn gives_up_after(&self) -> Option<Duration> {
        None
    }

    /// Applies the owner's policy for a failed installation (`failure` in `install.toml`).
    async fn give_up(&self) -> Result<(), SystemError> {
        Ok(())
    }

    /// Tells the watchdog that the machine is alive; call it at least every ten seconds during long work.
    fn feed_watchdog(&self) {}
}
