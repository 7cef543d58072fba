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

/// How long a power-off waits for the controller to know of it.
const FAREWELL: Duration = Duration::from_secs(5);
/// An installer waits this long to get in, and to hear that its update stands: about as long as it tries to get the image.
const CONFIRMATION: Duration = Duration::from_secs(10 * 60);
/// The longest pause before an installation that failed on the way is tried again.
const MAX_INSTALL_PAUSE: Duration = Duration::from_secs(60);
/// The longest pause between two tries to enrol.
const MAX_ENROLL_PAUSE: Duration = Duration::from_secs(15);
/// How long the parts of an agent may take to end.
const DRAIN: Duration = Duration::from_secs(4);

/// Beside the identity: the controllers that lived when the agent was last connected.
const LIVE: &str = "live-controllers.json";

/// How an agent finds its controllers and gets in.
#[derive(Debug, Clone, Default)]
pub struct Connection {
    /// Controllers, in the order in which they are tried; empty: those of the join file on the card, or of the job that
    /// the installer was left.
    pub controllers: Vec<Address>,
    /// Enrolment listeners; empty: the controllers' hosts, port 1347.
    pub enroll: Vec<Address>,
    /// The join token; none: that of the join file on the card.
    pub token: Option<JoinToken>,
    /// The id to ask for; empty: that of the join file, else one that the controller makes from the serial number.
    pub name: String,
    /// Whether, when no controllers were named, the network is asked for some; none: it is not.
    pub search: Option<Asking>,
}

/// How the network is asked for controllers.
#[derive(Debug, Clone, Default)]
pub struct Asking {
    /// Asks for all agents of this process.
    pub searcher: Arc<Searcher>,
    /// Controllers to be tried when nobody else was found.
    pub fallback: Vec<Address>,
}

/// An agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The machine did not answer.
    #[error("this machine cannot be asked")]
    System(#[from] SystemError),
    /// The journal cannot be read or written.
    #[error("the journal cannot be used")]
    Journal(#[from] JournalError),
    /// There is no identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The join file cannot be used.
    #[error("the join file cannot be used")]
    Join(#[from] JoinError),
    /// An address in the join file makes no sense.
    #[error("the join file names a wrong address")]
    Address(#[from] crate::discovery::InvalidAddress),
    /// A token in the join file makes no sense.
    #[error("the join file names a wrong token")]
    Token(#[from] identity::InvalidToken),
    /// No controller is known.
    #[error(
        "no controller is known, and none was found on the network: give --controller HOST:PORT, or put \
         marco/join.toml on the boot partition of the card"
    )]
    NoController,
    /// What the controllers say, and no time heals.
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
        /// Its process, as far as it said so.
        holder: String,
    },
    /// A part of the agent ended by itself.
    #[error("a part of the agent stopped working")]
    Broken,
}

/// Told once, when a node has been enrolled: its id, and whether it is held until an admin approves it.
pub type OnEnrolled = Arc<dyn Fn(&str, bool) + Send + Sync>;

/// Loads the node's identity, or enrols it once. The last part says whether it was enrolled just now and is held.
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
    // Also when it was enrolled before: the power may have failed between the two.
    if let Some(path) = &way.join_file {
        forget_token(system, facts, path)?;
    }
    Ok((identity, held))
}

/// A running system has the recovery partition mounted for reading only.
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

/// Enrols the node where the way leads, and where that fails, at a controller that is found. Nobody has to be trusted
/// for that: the token says of which CA the right one is.
async fn enroll_somewhere(directory: &Path, facts: &Facts, way: &Way, time: &Arc<TlsTime>) -> Result<bool, RunError> {
    let token = way.token.clone().ok_or(IdentityError::NoToken)?;
    let ca = token.ca();
    let mut enrollment =
        Enrollment { listeners: way.enroll.clone(), token, name: way.name.clone(), board: board(facts) };
    let mut outcome = Err(RunError::NoController);
    // As they are, then with who was found quickly, then with everybody who answers.
    for look in [false, true, true] {
        if look {
            if !way.discovery.searches() {
                return outcome;
            }
            way.discovery.look(&ca).await;
            enrollment.listeners = way.discovery.listeners();
        }
        // An answer may be lost on the way: who asked in vain asks once more.
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

/// Enrols the machine unless it is; the id, and whether it is held (none: it was enrolled before).
pub async fn enroll_once(system: &dyn System, connection: &Connection) -> Result<(String, Option<bool>), RunError> {
    let facts = system.facts()?;
    let way = Way::find(system, &facts.board, connection)?;
    let (identity, held) = identify(system, &facts, &way, &Arc::new(TlsTime::default())).await?;
    Ok((identity.node().to_owned(), held))
}

/// Enrols the machine, however long it takes. Every try reads the join file anew: somebody may just be writing it.
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
            // Somebody is to see it. Nobody looks at an installer's exit code, and an operator may just be putting
            // things right at the controller.
            Err(RunError::Identity(error))
                if system.mode() == system::Mode::Running && is_final(&error, connection) =>
            {
                return Err(RunError::Permanent(error));
            }
            Err(error) => chain(&error),
        };
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

/// Whether it is no use to try again. Where controllers are looked for, a foreign one says nothing of those to come.
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
    let _lock = Lock::take(system.as_ref())?;
    let facts = system.facts()?;
    // Dropping a try to enrol loses nothing: the key is stored before it is used.
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
    // Those that are found are remembered when they have proved to be controllers.
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
            // Read when a job is handed over, not now: addresses learnt from controllers and the network go along.
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

    // What ends a part by itself, if it has a reason.
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
            // Dropping a write loses nothing: the file is replaced whole.
            stop.run_until_cancelled(healed.heal()).await;
            None
        }
        .in_current_span()
    });
    // None of them ends by itself but the session, which may find that it is no use.
    let ended = tokio::select! {
        () = stop.cancelled() => None,
        ended = parts.join_next() => (!stop.is_cancelled()).then_some(ended),
    };
    match ended {
        None => {}
        Some(Some(Ok(Some(error)))) => return Err(RunError::Permanent(error)),
        Some(_) => return Err(RunError::Broken),
    }
    if tokio::time::timeout(DRAIN, async { while parts.join_next().await.is_some() {} }).await.is_err() {
        tracing::warn!("agent did not end in time");
    }
    Ok(())
}

/// A fresh connection for each try, to one controller after the other.
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

/// Something that no other start of an agent has.
fn instance() -> String {
    let mut bytes = [0; 16];
    // Without randomness there are no keys and no TLS either; the boot id then tells as much as it can.
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
        card_is_blank: system.mode() == system::Mode::Installer && !system.holds_system(),
        image: if system.mode() == system::Mode::Installer { image_of_2015(system) } else { String::new() },
    }
}

/// What `installer-config.txt` on the card names; what it says else is warned of.
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
