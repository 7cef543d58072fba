//! A Raspberry Pi 4 B made of a directory, with firmware that follows the rules of the real one. For trying the project
//! without hardware, for load tests, and for every test that must reboot something.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use chrono::{DateTime, SecondsFormat, Utc};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};
use tokio::sync::watch;

use super::disk::erasure::{self, Begun, Decided, Place};
use super::disk::plan::{self, Plan};
use super::disk::probe::Contents;
use super::rooted::Rooted;
use super::scheduled::{Schedule, Standing};
use super::{
    Board, Booted, Card, Down, Erase, Facts, Force, Layout, Lease, Mode, NO_PARTITIONS, Ready, Reboot, Refusal, Room,
    System, SystemError, SystemFacts, Target,
};
use log::{Event, Line, Log};
use state::{Going, Power, State, Up};

use crate::bootpart::BootPart;
use crate::health::{Ailment, Condition};
use crate::settings::Settings;
use crate::step;

pub mod firmware;
pub mod log;
mod power;
mod state;
mod tree;

/// Bytes that must be free for another installer set.
const SET_ROOM: u64 = 64 * 1024 * 1024;
/// Time after the expected end of a shutdown before a stronger command: a Pi that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// Stands for the program that supervises a trial.
const SUPERVISOR: &str = "supervisor";

/// Error for a board with a weak power supply.
const WEAK_POWER: &str = "the board's power supply is too weak at this moment (under-voltage)";

/// Speed of a virtual Pi, and the card of a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Time from power or reset until the agent runs.
    pub boot_time: Duration,
    /// Time from the command to go down until the machine is down.
    pub shutdown_time: Duration,
    /// A new Pi's card has only the installer on it, and no system.
    pub blank: bool,
    /// A new Pi's card is a stock image's, in layout single.
    pub stock: bool,
}

/// A Raspberry Pi 4 B made of a directory.
#[derive(Debug)]
pub struct VirtualPi {
    dir: PathBuf,
    id: String,
    options: Options,
    log: Log,
    state: Mutex<State>,
    /// Incremented with each change of the power state, for the task that drives this Pi.
    changed: watch::Sender<u64>,
    /// Held by every writer into the card's file systems.
    target: Arc<tokio::sync::Mutex<()>>,
    /// Users were warned, and not yet told otherwise.
    told: AtomicBool,
    /// Held for the life of this value: two processes must not drive one Pi.
    _lock: std::fs::File,
}

impl VirtualPi {
    /// Opens the Pi in `dir`, or lays one out there that is about to power on.
    ///
    /// # Errors
    /// The folder cannot be written, its state cannot be read, or another process drives this Pi.
    pub fn open(dir: &Path, id: &str, options: Options) -> Result<Arc<Self>, SystemError> {
        std::fs::create_dir_all(dir).map_err(SystemError::io("make", dir))?;
        let lock = std::fs::File::create(dir.join("lock")).map_err(SystemError::io("make", dir.join("lock")))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| SystemError::io("lock (does another process drive this Pi?)", dir)(error.into()))?;
        let state = match State::load(dir)? {
            Some(state) => state,
            None => {
                tree::lay_out(dir, id, &board(id), options)?;
                let state = State::first();
                state.save(dir)?;
                state
            }
        };
        // The virtual kernel only looks whether it is there.
        let supervisor = dir.join(SUPERVISOR);
        std::fs::write(&supervisor, "virtual supervisor\n").map_err(SystemError::io("write", &supervisor))?;
        Ok(Arc::new(Self {
            dir: dir.to_owned(),
            id: id.to_owned(),
            options,
            log: Log::new(dir),
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            target: Arc::default(),
            told: AtomicBool::new(false),
            _lock: lock,
        }))
    }

    /// The node's id, which is its folder's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The Pi's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn state(&self) -> State {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Computes the next state under the lock, commits it, then writes its line of the log.
    fn advance(&self, decide: impl FnOnce(&State) -> Option<State>) -> Result<(), SystemError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(next) = decide(&state) else { return Ok(()) };
        // State first, line second: a process killed in between writes the line at its next start, exactly once.
        next.save(&self.dir)?;
        *state = next;
        let logged = self.ensure_logged(&state);
        drop(state);
        self.changed.send_modify(|count| *count += 1);
        logged
    }

    /// Writes the line of the last change, unless it is there.
    fn ensure_logged(&self, state: &State) -> Result<(), SystemError> {
        match &state.line {
            Some(line) => self.log.ensure(line).map_err(SystemError::io("write", self.dir.join("log.jsonl"))),
            None => Ok(()),
        }
    }

    fn up(&self) -> Option<Up> {
        match self.state().power {
            Power::On(up) | Power::GoingDown { up, .. } => Some(up),
            Power::Off | Power::Booting { .. } => None,
        }
    }

    /// True if the file `stuck` holds up a way down. Empty, it is a service that does not stop; `services`: killing
    /// services does not help either; `everything`: no command helps.
    fn stuck(&self, force: Option<Force>) -> bool {
        let Ok(what) = std::fs::read_to_string(self.dir.join("stuck")) else { return false };
        match (what.trim(), force) {
            ("everything", _) | (_, None) | ("services", Some(Force::Services)) => true,
            (_, Some(Force::Services | Force::Everything)) => false,
        }
    }

    /// Decides what an installation formats. Folders count as ext4, unless a test's file `root-holds` or
    /// `home-holds` names other contents: a format, `unreadable`, or empty for a blank partition.
    fn decide(&self, erase: Erase) -> Result<Decided, Refusal> {
        let plan = if self.is_stock() { Plan::Write(Vec::new()) } else { Plan::Keep };
        erasure::decide(&plan, &[], erase, Begun::default(), |place| {
            let name = match place {
                Place::Root => "root-holds",
                Place::Home => "home-holds",
            };
            match std::fs::read_to_string(self.dir.join(name)).as_deref().map(str::trim) {
                Err(_) => Contents::FileSystem("ext4"),
                Ok("") => Contents::Nothing,
                Ok("unreadable") => Contents::Unreadable("Input/output error (os error 5)".into()),
                Ok(what) => Contents::Unknown(what.to_owned()),
            }
        })
    }

    /// Goes down once. A second command finds it going down already and changes nothing.
    fn go_down(&self, going: Going, event: Event, execution: Option<&str>) -> Result<(), SystemError> {
        self.advance(|state| match &state.power {
            Power::On(up) => Some(State {
                line: Some(Line::new(&up.boot_id, event, execution.unwrap_or_default())),
                power: Power::GoingDown { up: up.clone(), going },
                ..state.clone()
            }),
            _ => None,
        })
    }

    fn wall(&self, text: &str) -> Result<(), SystemError> {
        let path = self.dir.join("wall.log");
        let time = DateTime::<Utc>::from(SystemTime::now()).to_rfc3339_opts(SecondsFormat::Micros, true);
        let append = || {
            let mut file = std::fs::OpenOptions::new().append(true).create(true).open(&path)?;
            // Escaped, so that each message is one line.
            std::io::Write::write_all(&mut file, format!("{time} {}\n", text.escape_debug()).as_bytes())
        };
        append().map_err(SystemError::io("write", &path))
    }

    /// The file `scheduled` stands for logind's `/run/systemd/shutdown`: a test that writes it announces a shutdown,
    /// and one that removes it cancels it.
    fn schedule(&self) -> Schedule {
        Schedule { file: self.dir.join("scheduled"), ours: self.dir.join("scheduled-by-agent") }
    }

    /// A test creates the file `under-voltage`.
    fn weak_power(&self) -> bool {
        self.dir.join("under-voltage").exists()
    }

    fn is_stock(&self) -> bool {
        BootPart::new(self.card().recovery, &board(&self.id)).is_stock()
    }

    fn card(&self) -> Card {
        let part = |name| self.dir.join(name);
        Card { recovery: part("recovery"), boot: part("boot"), root: part("root"), home: part("home") }
    }
}

#[async_trait]
impl System for VirtualPi {
    fn boot_id(&self) -> Result<String, SystemError> {
        self.up().map(|up| up.boot_id).ok_or(SystemError::Unsupported("the virtual Pi is off"))
    }

    fn facts(&self) -> Result<Facts, SystemError> {
        let root = Rooted::open(&self.card().root).map_err(SystemError::io("open", self.card().root))?;
        let os = match self.mode() {
            Mode::Installer => "Marco installer".to_owned(),
            Mode::Running => super::facts::pretty_name(&root).unwrap_or_default(),
        };
        let system = SystemFacts {
            kernel_arch: "aarch64".into(),
            userspace_arch: "aarch64".into(),
            page_size: 4096,
            kernel_release: "6.6.0-virtual".into(),
            os,
            layout: if self.is_stock() { Layout::Single } else { Layout::Resident },
        };
        Ok(Facts { board: board(&self.id), system })
    }

    fn mode(&self) -> Mode {
        match self.up() {
            // A state of an older version knows only installers on the first partition.
            Some(up) if up.installer.unwrap_or(up.partition == 1) => Mode::Installer,
            _ => Mode::Running,
        }
    }

    fn booted(&self) -> Option<Booted> {
        self.up().map(|up| Booted { partition: up.partition, tryboot: up.tryboot })
    }

    fn card(&self) -> Option<Card> {
        Some(self.card())
    }

    fn root(&self) -> PathBuf {
        self.card().root
    }

    fn state_dir(&self) -> PathBuf {
        match self.mode() {
            Mode::Running => self.card().root.join("var/lib/marco-agent"),
            Mode::Installer => self.card().recovery.join("marco"),
        }
    }

    fn identity_dir(&self) -> PathBuf {
        match self.mode() {
            Mode::Running => self.dir.join("agent"),
            // As on a real card: an installer has only the identity that was left on its own partition.
            Mode::Installer => self.card().recovery.join("marco"),
        }
    }

    fn supervisor_program(&self) -> Option<PathBuf> {
        Some(self.dir.join(SUPERVISOR))
    }

    async fn announce(&self, down: Down, delay: Duration, message: &str) -> Result<bool, SystemError> {
        let text = super::announcement(down, delay, message);
        self.wall(&text)?;
        self.told.store(true, Ordering::Release);
        let schedule = self.schedule();
        schedule.announce(down, delay, &text).map_err(SystemError::io("write", schedule.file))
    }

    fn standing(&self) -> Standing {
        self.schedule().standing()
    }

    async fn withdraw(&self) -> Result<(), SystemError> {
        let schedule = self.schedule();
        schedule.withdraw().map_err(SystemError::io("remove", schedule.file))?;
        if self.told.swap(false, Ordering::AcqRel) { self.wall(super::WITHDRAWN) } else { Ok(()) }
    }

    async fn reboot(&self, how: Reboot, execution: Option<&str>, message: &str) -> Result<(), SystemError> {
        self.wall(&super::announcement(Down::Reboot, Duration::ZERO, message))?;
        let going = match how {
            Reboot::Plain => Going::Reboot,
            Reboot::TryBoot => Going::TryBoot,
        };
        if self.stuck(None) {
            return Ok(());
        }
        self.go_down(going, Event::Reboot, execution)
    }

    async fn power_off(&self, execution: Option<&str>, message: &str) -> Result<(), SystemError> {
        self.wall(&super::announcement(Down::PowerOff, Duration::ZERO, message))?;
        if self.stuck(None) {
            return Ok(());
        }
        self.go_down(Going::Off, Event::PowerOff, execution)
    }

    async fn force(&self, down: Down, how: Reboot, force: Force, execution: Option<&str>) -> Result<(), SystemError> {
        if self.stuck(Some(force)) {
            return Ok(());
        }
        match (down, how) {
            (Down::PowerOff, _) => self.go_down(Going::Off, Event::PowerOff, execution),
            (Down::Reboot, Reboot::Plain) => self.go_down(Going::Reboot, Event::Reboot, execution),
            (Down::Reboot, Reboot::TryBoot) => self.go_down(Going::TryBoot, Event::Reboot, execution),
        }
    }

    fn patience(&self) -> Duration {
        self.options.shutdown_time.saturating_add(PATIENCE)
    }

    fn conditions(&self) -> Vec<Condition> {
        let weak = self.weak_power().then(|| Condition { ailment: Ailment::UnderVoltage, message: WEAK_POWER.into() });
        let settings = super::wrong_settings(&self.card().recovery);
        super::ailing_disk(&self.state_dir()).into_iter().chain(weak).chain(settings).collect()
    }

    fn clock(&self) -> Option<DateTime<Utc>> {
        // Only a test gives it a clock, in the file `clock`.
        std::fs::read_to_string(self.dir.join("clock")).ok()?.trim().parse().ok()
    }

    async fn preflight_update(&self) -> Result<(), Refusal> {
        if self.weak_power() {
            return Err(Refusal { reason: "UNDER_VOLTAGE", message: WEAK_POWER.into() });
        }
        let recovery = self.card().recovery;
        let room = rustix::fs::statvfs(&recovery).map(|found| found.f_bavail.saturating_mul(found.f_frsize));
        match room {
            Ok(room) if room >= SET_ROOM => super::check_settings(&recovery),
            Ok(room) => Err(Refusal {
                reason: "NO_ROOM",
                message: format!(
                    "the recovery partition has {room} bytes free, and an installer set may take {SET_ROOM}"
                ),
            }),
            Err(error) => Err(Refusal {
                reason: "RECOVERY_PARTITION_UNREADABLE",
                message: format!("the recovery partition cannot be read: {error}"),
            }),
        }
    }

    async fn check_kept(&self, erase: Erase) -> Result<(), Refusal> {
        self.decide(erase).map(drop)
    }

    async fn check_target(&self, room: Room) -> Result<Ready, SystemError> {
        let Room::Resident(needs) = room else { return Err(SystemError::Unsupported(NO_PARTITIONS)) };
        // A card of folders has no size, unless a test gives it one in MiB.
        let size = std::fs::read_to_string(self.dir.join("card-size")).unwrap_or_default();
        let Ok(mebibytes) = size.trim().parse::<u64>() else { return Ok(Ready::Now) };
        let settings = Settings::read(&self.card().recovery);
        let settings = settings.map_err(|error| SystemError::Invalid(crate::cause::chain(&error)))?;
        if let Plan::Write(parts) = plan::plan(&[], mebibytes << 11, &settings)? {
            plan::fits(&parts, needs)?;
        }
        Ok(Ready::Now)
    }

    async fn prepare_target(&self, erase: Erase) -> Result<Target, SystemError> {
        if self.mode() != Mode::Installer {
            return Err(SystemError::Unsupported("a card is installed only by the installer, not by what runs on it"));
        }
        let decided = self.decide(erase)?;
        // The file `mkfs-fails` stands for a card on which no file system can be made.
        if self.dir.join("mkfs-fails").exists() {
            let failed = std::io::Error::other("mke2fs ended with status 1");
            return Err(SystemError::io("make a file system on", self.card().root)(failed));
        }
        let lease = Lease::new(Arc::clone(&self.target).lock_owned().await);
        let card = self.card();
        let (root, home) = (decided.root.is_some(), decided.home.is_some());
        let (held, emptied) = (lease.clone(), card.clone());
        let job = tokio::task::spawn_blocking(move || {
            // The thread goes on if the job is dropped (a power cut), and so keeps the lease.
            let _held = held;
            let folders = [Some(&emptied.boot), root.then_some(&emptied.root), home.then_some(&emptied.home)];
            folders.into_iter().flatten().try_for_each(|folder| {
                step::at("format", folder, &[]).map_err(SystemError::io("format", folder))?;
                tree::empty(folder)
            })
        });
        job.await.map_err(|error| SystemError::Invalid(format!("emptying the card did not end: {error}")))??;
        let device = |number| format!("PARTUUID={}-{number:02}", tree::disk_id(&self.id));
        Ok(Target {
            root: card.root,
            boot: card.boot,
            root_device: device(2),
            boot_device: device(4),
            home_device: device(3),
            root_type: "ext4".into(),
            home_type: "ext4".into(),
            lease,
        })
    }

    async fn finish_target(&self, target: Target) -> Result<(), SystemError> {
        let (from, to) = (self.card().recovery.join("marco"), self.dir.join("agent"));
        // An installation on a real card puts the identity into the new root. Here the running system reads it from
        // `agent`.
        let job = tokio::task::spawn_blocking(move || {
            tree::copy_identity(&from, &to)?;
            step::at("sync", &target.root, &[]).map_err(SystemError::io("sync", &target.root))?;
            let folder = std::fs::File::open(&target.root).map_err(SystemError::io("open", &target.root))?;
            rustix::fs::syncfs(&folder).map_err(|error| SystemError::io("sync", &target.root)(error.into()))
        });
        job.await.map_err(|error| SystemError::Invalid(format!("syncing the card did not end: {error}")))?
    }
}

/// Derived from the id, so that the same Pi always has the same board.
fn board(id: &str) -> Board {
    let digest = hex::encode(Sha256::digest(id.as_bytes()));
    let tail: String = digest.chars().skip(digest.len() - 8).collect();
    let mac: Vec<&str> = [(0, 2), (2, 4), (4, 6)].into_iter().filter_map(|(from, to)| digest.get(from..to)).collect();
    Board {
        model: "Raspberry Pi 4 Model B Rev 1.4".into(),
        // New-style code of a Pi 4 B with 4 GiB.
        revision: "c03114".into(),
        serial: format!("10000000{tail}"),
        // An OUI of Raspberry Pi.
        macs: vec![format!("dc:a6:32:{}", mac.join(":"))],
        memory_bytes: 4 * 1024 * 1024 * 1024,
        family: "pi4".into(),
    }
}

#[cfg(test)]
pub(crate) mod tests;
