//! One agent on one machine: identity, journal, executor and session, from start to stop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use marco_proto::names::VERDICT_DEADLINE;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use crate::backoff;
use crate::bootpart::BootPart;
use crate::cause::chain;
use crate::discovery::{Address, Controllers, Searcher};
use crate::download::{Connect, ConnectError, Downloader};
use crate::executor::{self, Executor, Settings};
use crate::identity::{
    self, Enrollment, Identity, IdentityError, JoinError, JoinFile, JoinToken, KeyPolicy, Purpose, TlsTime, enroll,
};
use crate::job;
use crate::journal::{Journal, JournalError};
use crate::session::{self, Session};
use crate::settings::seed2015::Seed;
use crate::system::{self, Facts, System, SystemError};

mod back;
mod lock;
mod look;
mod way;

use lock::Lock;
use look::{Look, keep_looking};
use way::{LastGood, Way};

/// Longest wait of a power-off for the controller's acknowledgement.
const FAREWELL: Duration = Duration::from_secs(5);
/// Longest wait of an installer to get in, and to hear that its update stands: about as long as it tries to get the
/// image.
const CONFIRMATION: Duration = Duration::from_secs(10 * 60);
/// Longest pause before a failed installation is tried again.
const MAX_INSTALL_PAUSE: Duration = Duration::from_secs(60);
/// Longest pause between two tries to enrol.
const MAX_ENROLL_PAUSE: Duration = Duration::from_secs(15);
/// Longest time from `stop` until the agent's tasks have ended.
const DRAIN: Duration = Duration::from_secs(4);

/// File beside the identity: the controllers that were alive when the agent was last connected.
const LIVE: &str = "live-controllers.json";

/// Settings by which an agent finds its controllers and gets in.
#[derive(Debug, Clone, Default)]
pub struct Connection {
    /// Controllers, in the order to try; empty: those of the join file on the card, or of the job that the installer
    /// was left.
    pub controllers: Vec<Address>,
    /// Enrolment listeners; empty: the controllers' hosts, port 1347.
    pub enroll: Vec<Address>,
    /// The join token; `None`: that of the join file on the card.
    pub token: Option<JoinToken>,
    /// The id to ask for, unless the join file names one; empty: the controller makes one from the serial number.
    pub name: String,
    /// Search of the network if no controllers were named; `None`: no search.
    pub search: Option<Asking>,
}

/// A search of the network for controllers.
#[derive(Debug, Clone, Default)]
pub struct Asking {
    /// One searcher for all agents of this process.
    pub searcher: Arc<Searcher>,
    /// Controllers to try if no other was found.
    pub fallback: Vec<Address>,
}

/// An agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Facts of the machine could not be read.
    #[error("this machine cannot be asked")]
    System(#[from] SystemError),
    /// The journal cannot be read or written.
    #[error("the journal cannot be used")]
    Journal(#[from] JournalError),
    /// The node's identity cannot be loaded, or the node cannot be enrolled.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The join file cannot be used.
    #[error("the join file cannot be used")]
    Join(#[from] JoinError),
    /// The join file holds an invalid address.
    #[error("the join file names a wrong address")]
    Address(#[from] crate::discovery::InvalidAddress),
    /// The join file holds an invalid token.
    #[error("the join file names a wrong token")]
    Token(#[from] identity::InvalidToken),
    /// No controller was named, remembered or found.
    #[error(
        "no controller is known, and none was found on the network: give --controller HOST:PORT, or put \
         marco/join.toml on the boot partition of the card"
    )]
    NoController,
    /// The controllers refuse for good: another try cannot help.
    #[error("this cannot go well, however often it is tried")]
    Permanent(#[source] IdentityError),
    /// Another agent runs on these folders.
    #[error(
        "{folder} is in use by another agent ({holder}), and two agents would overwrite each other's journal: stop that \
         one first, or give this one a state_dir and an identity_dir of its own",
        folder = folder.display()
    )]
    InUse {
        /// The folder of the journal or of the identity.
        folder: PathBuf,
        /// The other agent's process, as far as it is known.
        holder: String,
    },
    /// A task of the agent ended by itself.
    #[error("a part of the agent stopped working")]
    Broken,
}

/// Called once, after a node was enrolled: its id, and whether it is held until an admin approves it.
pub type OnEnrolled = Arc<dyn Fn(&str, bool) + Send + Sync>;

/// Loads the node's identity, or enrols the node once. The second part is `None` if it was enrolled before, otherwise
/// whether it is held.
async fn identify(
    system: &dyn System,
    facts: &Facts,
    way: &Way,
    time: &Arc<TlsTime>,
) -> Result<(Identity, Option<bool>), RunError> {
    let directory = system.identity_dir();
    let (identity, held) = match Identity::load(&directory, time.clone())? {
        Some(identity) => (identity, None),
        None => {
            let held = enroll_somewhere(&directory, facts, way, time).await?;
            let identity = Identity::load(&directory, time.clone())?.ok_or(IdentityError::NoToken)?;
            (identity, Some(held))
        }
    };
    // For a node that was enrolled before, too: the power may have failed between the enrolment and this.
    if let Some(path) = &way.join_file {
        forget_token(system, facts, path)?;
    }
    Ok((identity, held))
}

/// Removes the token from the join file. A running system has the recovery partition mounted read-only, so it is opened
/// for writing.
fn forget_token(system: &dyn System, facts: &Facts, path: &Path) -> Result<(), RunError> {
    let refused = match JoinFile::forget_token(path) {
        Err(JoinError::Io { source, .. }) if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem => source,
        other => return Ok(other?),
    };
    let Some(card) = system.card().filter(|card| path.starts_with(&card.recovery)) else {
        return Err(JoinError::Io { doing: "write", path: path.to_owned(), source: refused }.into());
    };
    let opened = BootPart::new(&card.recovery, &facts.board).open_for_writing();
    let _writable = opened.map_err(|error| JoinError::Io {
        doing: "write",
        path: path.to_owned(),
        source: std::io::Error::other(error),
    })?;
    Ok(JoinFile::forget_token(path)?)
}

/// Enrols the node at the known listeners and, if that fails, at one that is found. A found one needs no trust: the
/// token names the CA of the right one.
async fn enroll_somewhere(directory: &Path, facts: &Facts, way: &Way, time: &Arc<TlsTime>) -> Result<bool, RunError> {
    let token = way.token.clone().ok_or(IdentityError::NoToken)?;
    let ca = token.ca();
    let mut enrollment =
        Enrollment { listeners: way.enroll.clone(), token, name: way.name.clone(), board: board(facts) };
    let mut outcome = Err(RunError::NoController);
    // First the known listeners, then those that answer quickly, then all that answer.
    for look in [false, true, true] {
        if look {
            if !way.discovery.searches() {
                return outcome;
            }
            way.discovery.look(&ca).await;
            enrollment.listeners = way.discovery.listeners();
        }
        // An answer may be lost on the network, so an empty search is repeated once.
        if enrollment.listeners.is_empty() {
            continue;
        }
        match enroll(directory, &enrollment, time).await {
            Err(error) if error.is_retryable() => outcome = Err(error.into()),
            other => {
                way.discovery.worked();
                return Ok(other?);
            }
        }
    }
    outcome
}

/// Enrols the machine unless it is enrolled. Returns its id, and whether it is held (`None`: it was enrolled before).
pub async fn enroll_once(system: &dyn System, connection: &Connection) -> Result<(String, Option<bool>), RunError> {
    let facts = system.facts()?;
    let way = Way::find(system, &facts.board, connection)?;
    let (identity, held) = identify(system, &facts, &way, &Arc::new(TlsTime::default())).await?;
    Ok((identity.node().to_owned(), held))
}

/// Enrols the machine, without a limit of time. Each try reads the join file again: an operator may just be writing it.
async fn identify_patiently(
    system: &dyn System,
    connection: &Connection,
    facts: &Facts,
) -> Result<(Way, Identity, Option<bool>), RunError> {
    let time = Arc::new(TlsTime::default());
    let mut failures: u32 = 0;
    let mut last = String::new();
    loop {
        let tried = async {
            let way = Way::find(system, &facts.board, connection)?;
            let (identity, held) = identify(system, facts, &way, &time).await?;
            Ok::<_, RunError>((way, identity, held))
        };
        let error = match tried.await {
            Ok(found) => return Ok(found),
            // An operator or a script sees the exit code of a running system's agent. Nobody looks at an installer's,
            // and an operator may just be putting things right at the controller.
            Err(RunError::Identity(error))
                if system.mode() == system::Mode::Running && is_final(&error, connection) =>
            {
                return Err(RunError::Permanent(error));
            }
            Err(error) => chain(&error),
        };
        // Each error once: the tries may go on for days, and the log on the card is bounded.
        if error != last {
            tracing::warn!(error = %error, "node cannot be enrolled yet");
            if system.mode() == system::Mode::Installer {
                system.keep_line(&format!("node cannot be enrolled yet: {error}"));
            }
            last = error;
        }
        failures = failures.saturating_add(1);
        let ceiling = backoff::doubled(Duration::from_millis(500), failures);
        tokio::time::sleep(backoff::full_jitter(ceiling.min(MAX_ENROLL_PAUSE))).await;
    }
}

/// Returns true if another try cannot help. In a search a controller of another CA is not final: the right one may
/// answer next.
fn is_final(error: &IdentityError, connection: &Connection) -> bool {
    let searches = connection.search.is_some() && connection.controllers.is_empty();
    error.is_permanent() && !(searches && matches!(error, IdentityError::Connect { .. }))
}

/// Runs an agent on this machine until `stop`.
pub async fn run(
    system: Arc<dyn System>,
    connection: Connection,
    on_enrolled: OnEnrolled,
    stop: CancellationToken,
) -> Result<(), RunError> {
    // Before anything is read: a second agent would overwrite the journal of the first.
    let _lock = Lock::take(system.as_ref())?;
    let facts = system.facts()?;
    // Cancel-safe: the key is stored before it is used.
    let identified = tokio::select! {
        () = stop.cancelled() => return Ok(()),
        identified = identify_patiently(system.as_ref(), &connection, &facts) => identified,
        () = back::when_nobody_lets_it_in(system.as_ref(), &facts.board, CONFIRMATION) => return Ok(()),
    };
    let (way, identity, held) = identified?;
    if let Some(held) = held {
        tracing::info!(node = identity.node(), held, "node enrolled");
        on_enrolled(identity.node(), held);
    }
    let identity = Arc::new(identity);
    let boot_id = system.boot_id()?;
    let journal = Arc::new(Journal::open(&system.state_dir(), &boot_id)?);
    // Named controllers only. Found ones are remembered after they have proved to be controllers.
    let known = way.discovery.known();
    if !known.is_empty() {
        LastGood { controllers: known, enroll: way.enroll.clone() }.remember(system.as_ref());
    }
    let controllers = Arc::new(Controllers::remembered(way.discovery, system.identity_dir().join(LIVE)));
    let listeners = {
        let (controllers, named) = (controllers.clone(), way.enroll);
        move || controllers.listeners(&named)
    };

    let (labels, known) = watch::channel(None);
    let settings = Settings {
        node: identity.node().to_owned(),
        addresses: {
            // Called when a job is handed over, so that addresses learnt since from controllers and the network go
            // along.
            let (controllers, listeners) = (controllers.clone(), listeners.clone());
            Arc::new(move || executor::Addresses {
                controllers: controllers.in_order(),
                enroll: listeners().first().cloned().unwrap_or_default(),
            })
        },
        farewell: FAREWELL,
        verdict: VERDICT_DEADLINE,
        confirmation: CONFIRMATION,
        max_pause: MAX_INSTALL_PAUSE,
        now: {
            let time = identity.time().clone();
            Arc::new(move || time.now())
        },
        labels: known,
    };
    let downloader = Downloader::new(connect_in_turn(identity.clone(), controllers.clone()));
    let executor = Executor::new(system.clone(), journal.clone(), downloader, settings)?;
    // Before the first Hello, which then reports a journal that cannot be written.
    if let Err(error) = journal.probe().await {
        tracing::error!(error = %chain(&error), "journal cannot be written: the node takes no work");
    }
    executor.settle().await;
    let look = Look {
        system: system.clone(),
        health: journal.health().clone(),
        identity: identity.clone(),
        labels: labels.subscribe(),
    };
    look.at_health();
    let node = describe(system.as_ref(), &facts, boot_id);
    let (refusal, refused) = watch::channel(system.preflight_update().await.err());
    let log = session::KeptLog::new({
        let system = system.clone();
        move || system.kept_log()
    });
    let healed = journal.clone();
    let session = Session { controllers, identity: identity.clone(), journal, node, refusal: refused, log, labels };

    // The agent's tasks. A task that ends by itself returns its reason.
    let mut parts: JoinSet<Option<IdentityError>> = JoinSet::new();
    parts.spawn({
        let stop = stop.clone();
        async move {
            executor.run(stop).await;
            None
        }
        .in_current_span()
    });
    parts.spawn({
        let stop = stop.clone();
        async move { session.run(stop).await }.in_current_span()
    });
    parts.spawn({
        let stop = stop.clone();
        let policy = match system.mode() {
            system::Mode::Running => KeyPolicy::Rotate,
            // The installer's identity is a copy: a new key in it would leave the system with an old one.
            system::Mode::Installer => KeyPolicy::Keep,
        };
        async move {
            identity.keep_fresh(listeners, policy, &stop).await;
            None
        }
        .in_current_span()
    });
    parts.spawn({
        let stop = stop.clone();
        async move {
            keep_looking(look, &refusal, &stop).await;
            None
        }
        .in_current_span()
    });
    parts.spawn({
        let stop = stop.clone();
        async move {
            // Cancel-safe: the file is replaced whole.
            stop.run_until_cancelled(healed.heal()).await;
            None
        }
        .in_current_span()
    });
    // Only the session ends by itself, if no controller can ever take this node.
    let ended = tokio::select! {
        () = stop.cancelled() => None,
        ended = parts.join_next() => (!stop.is_cancelled()).then_some(ended),
    };
    match ended {
        None => {}
        Some(Some(Ok(Some(error)))) => return Err(RunError::Permanent(error)),
        Some(_) => return Err(RunError::Broken),
    }
    // Bounded, so that a task that hangs does not hold up a shutdown. Each write of the tasks is atomic or begun again.
    if tokio::time::timeout(DRAIN, async { while parts.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!("agent did not end in time");
    }
    Ok(())
}

/// Makes a fresh connection for each try, to one controller after the other.
fn connect_in_turn(identity: Arc<Identity>, controllers: Arc<Controllers>) -> Connect {
    let turn = Arc::new(AtomicUsize::new(0));
    Arc::new(move || {
        let controllers = controllers.in_order();
        let index = turn.fetch_add(1, Ordering::Relaxed).checked_rem(controllers.len()).unwrap_or(0);
        let address = controllers.get(index).cloned().unwrap_or_default();
        let identity = identity.clone();
        Box::pin(async move { identity.connect(&address, Purpose::Download).await.map_err(ConnectError::from) })
    })
}

fn board(facts: &Facts) -> identity::Board {
    let board = &facts.board;
    identity::Board {
        model: board.model.clone(),
        revision: board.revision.clone(),
        serial: board.serial.clone(),
        macs: board.macs.clone(),
        memory_bytes: board.memory_bytes,
        family: board.family.clone(),
    }
}

/// Returns a random id that no other start of an agent has.
fn instance() -> String {
    let mut bytes = [0; 16];
    // Without randomness there are no keys and no TLS either. The boot id alone then tells clones apart.
    if getrandom::fill(&mut bytes).is_err() {
        return String::new();
    }
    hex::encode(bytes)
}

fn describe(system: &dyn System, facts: &Facts, boot_id: String) -> session::Node {
    let release = system.release().unwrap_or_else(|error| {
        tracing::warn!(error = %chain(&error), "release not readable");
        None
    });
    let release = release.unwrap_or_default();
    session::Node {
        boot_id,
        instance: instance(),
        mode: match system.mode() {
            system::Mode::Running => job::Mode::Running,
            system::Mode::Installer => job::Mode::Installer,
        },
        board: board(facts),
        kernel_arch: facts.system.kernel_arch.clone(),
        userspace_arch: facts.system.userspace_arch.clone(),
        page_size: facts.system.page_size,
        kernel_release: facts.system.kernel_release.clone(),
        os: facts.system.os.clone(),
        layout: match facts.system.layout {
            system::Layout::Unknown => session::Layout::Unknown,
            system::Layout::Single => session::Layout::Single,
            system::Layout::Resident => session::Layout::Resident,
        },
        image_sha256: release.image_sha256,
        boot_sha256: release.boot_sha256,
        trial_lacks: system.trial_lacks().unwrap_or_default().to_owned(),
        // Only a blank card gets its board's default image unasked; a system is erased on request only.
        card_is_blank: system.mode() == system::Mode::Installer && !system.holds_system(),
        image: if system.mode() == system::Mode::Installer { image_of_2015(system) } else { String::new() },
    }
}

/// Returns the image that the card's `installer-config.txt` names; empty: none. Warns of unknown settings in it.
fn image_of_2015(system: &dyn System) -> String {
    let Some(card) = system.card() else { return String::new() };
    let seed = Seed::read(&card.recovery);
    if !seed.unknown.is_empty() {
        tracing::warn!(unknown = ?seed.unknown, "installer-config.txt says what this installer does not know");
    }
    seed.image.unwrap_or_default()
}

#[cfg(test)]
mod tests;
