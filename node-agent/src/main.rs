//! `marco-agent`: reads the command line and runs its command.

use std::collections::BTreeSet;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Parser as _;
use node_agent::config::{Cli, Command, ConnectionArgs, File};
use node_agent::discovery;
use node_agent::logbook::Logbook;
use node_agent::network::hook;
use node_agent::notify::{Status, notify};
use node_agent::simulate::Simulation;
use node_agent::system::host::{Host, HostOptions};
use node_agent::system::installer::Installer;
use node_agent::system::virtual_pi::Options;
use node_agent::system::{LOG_FILE, System as _};
use node_agent::{init, network, run, supervise};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

/// Interval of writes of the log to the card. A write is skipped if nothing was logged.
const KEEP_LOG: Duration = Duration::from_secs(10);
/// Longest wait of an installer on a trial boot for a card that it can use.
const NO_CARD: Duration = Duration::from_secs(10 * 60);
/// Interval of looks for the card.
const LOOK_FOR_CARD: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    // Before the command line: the kernel passes words of its own to the first process.
    if let Some(role) = supervise::role() {
        supervise::main(role);
    }
    if init::is_init() {
        init::main();
    }
    let mut arguments = std::env::args();
    // udhcpc calls this program under another name, with an event instead of options.
    if arguments.next().is_some_and(|name| name == hook::PROGRAM) {
        return lease_changed(&arguments.next().unwrap_or_default());
    }
    let cli = Cli::parse();
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The log may be filtered, but the reason for the end must be seen.
            let _ = writeln!(std::io::stderr().lock(), "marco-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<()> {
    let file = File::read(cli.config.as_deref())?;
    let filter = file.log(cli.log.as_deref());
    // A wrong filter ends the start: it would only show as a silent log.
    let filter = tracing_subscriber::EnvFilter::try_new(&filter).with_context(|| format!("log filter {filter:?}"))?;
    // The installer's log is also kept in a file on the card, where colours are noise.
    let colours = std::io::stderr().is_terminal() && !init::in_initramfs();
    let logbook = Logbook::default();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours);
    let mut set_log: SetLog = Box::new(|_| {});
    if matches!(cli.command, Command::Run(_)) {
        // The last part of the log goes to the controller with the report of a failed job.
        builder.with_writer(logbook.clone()).init();
    } else if matches!(cli.command, Command::Install(_)) {
        // The card's `install.toml` may name another filter, and is read later.
        let builder = builder.with_writer(logbook.clone()).with_filter_reloading();
        let handle = builder.reload_handle();
        set_log = Box::new(move |filter| {
            let set = tracing_subscriber::EnvFilter::try_new(filter).map(|filter| handle.reload(filter));
            if !matches!(set, Ok(Ok(()))) {
                tracing::warn!(filter, "no filter of the log");
            }
        });
        builder.init();
    } else {
        // Standard output has the results, which scripts read.
        builder.with_writer(std::io::stderr).init();
    }

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start a runtime")?;
    let outcome = runtime.block_on(async {
        let stop = stop_on_signals()?;
        match cli.command {
            Command::Run(args) => agent(&args, &file, logbook, stop).await,
            Command::Install(args) => installer(&args, &file, logbook, set_log, stop).await,
            // Cancel-safe: the key is stored before it is used.
            Command::Enroll(args) => tokio::select! {
                () = stop.cancelled() => bail!("interrupted"),
                enrolled = enroll(&args, &file) => enrolled,
            },
            Command::Discover(args) => tokio::select! {
                () = stop.cancelled() => bail!("interrupted"),
                discovered = discover(args.first) => discovered,
            },
            Command::Simulate(args) => {
                let simulation = Simulation {
                    count: args.count,
                    directory: args.dir,
                    prefix: args.prefix,
                    options: Options {
                        boot_time: args.boot_time,
                        shutdown_time: args.shutdown_time,
                        blank: args.blank,
                        stock: args.stock,
                    },
                    connection: args.connection.resolve(&file)?,
                };
                Ok(simulation.run(stop).await?)
            }
        }
    });
    // A thread that still writes must not hold up the end: its file is replaced whole, or begun again.
    runtime.shutdown_background();
    outcome
}

/// Cancelled at the first SIGTERM or SIGINT.
fn stop_on_signals() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let token = stop.clone();
    // Nobody awaits it: it lives as long as the runtime, and holds nothing.
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        notify(Status::Stopping);
        token.cancel();
    });
    Ok(stop)
}

fn host(file: &File) -> anyhow::Result<Host> {
    let usual = HostOptions::default();
    Ok(Host::new(HostOptions {
        state_dir: file.state_dir.clone().unwrap_or(usual.state_dir),
        identity_dir: file.identity_dir.clone().unwrap_or(usual.identity_dir),
        // With a command of the operator's own, systemd must not be asked behind it.
        force_command: if file.shutdown_command.is_some() { Vec::new() } else { usual.force_command },
        shutdown_command: file.shutdown_command.clone().unwrap_or(usual.shutdown_command),
        ..usual
    })?)
}

async fn agent(args: &ConnectionArgs, file: &File, logbook: Logbook, stop: CancellationToken) -> anyhow::Result<()> {
    if init::in_initramfs() {
        bail!("this is the installer's system: start `marco-agent install`");
    }
    let host = Arc::new(host(file)?);
    host.log_is_from(move || logbook.last());
    let connection = args.resolve(file)?;
    // Before the enrolment, which may wait for days: that is no failed start.
    notify(Status::Ready);
    run::run(host, connection, Arc::new(|_, _| {}), stop).await?;
    Ok(())
}

/// Sets the filter of the log.
type SetLog = Box<dyn Fn(&str) + Send>;

/// Runs the installer until the machine restarts, or until an error is so wrong that the first process has to start it
/// again.
async fn installer(
    args: &ConnectionArgs,
    file: &File,
    logbook: Logbook,
    set_log: SetLog,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    if !init::in_initramfs() {
        bail!(
            "this machine runs an installed system: `marco-agent install` works only as the program of the installer's \
             own initramfs, because it erases the card"
        );
    }
    let Some(found) = find_card(&stop).await else { return Ok(()) };
    if let Some(card) = found.card() {
        // A node that was never online has nothing else to tell what happened.
        logbook.keep_in(&card.recovery.join(LOG_FILE));
    }
    let kept = logbook.clone();
    // The lines since the last interval are those about the restart.
    found.on_going_down(move || kept.write());
    let kept = logbook.clone();
    found.log_is_from(move || kept.last());
    // Ends with this function: the log is written once more on the way down.
    let _keeping = AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            tokio::time::sleep(KEEP_LOG).await;
            let logbook = logbook.clone();
            let _ = tokio::task::spawn_blocking(move || logbook.write()).await;
        }
    }));
    if let Some(error) = found.wrong_settings() {
        // Not an end: the installer would be started again and again, and nobody would hear why.
        tracing::error!(error = %error, "settings of the card are wrong, the defaults hold");
    }
    let settings = found.settings().clone();
    if let Some(filter) = &settings.log {
        set_log(filter);
    }
    let _network = AbortOnDropHandle::new(tokio::spawn(network::keep_up(settings.network)));
    let connection = args.resolve(file)?;
    run::run(Arc::new(found), connection, Arc::new(|_, _| {}), stop).await?;
    Ok(())
}

/// Waits for the card: its driver may still be looking for it. On a trial boot the old system gets the machine back after
/// [`NO_CARD`].
async fn find_card(stop: &CancellationToken) -> Option<Installer> {
    let mut last = String::new();
    let mut leaves = Instant::now() + NO_CARD;
    loop {
        let problem = match Installer::find().await {
            Ok(Some(found)) => return Some(found),
            Ok(None) => "no card with a recovery partition yet (FAT, first partition, label RECOVERY)".to_owned(),
            Err(error) => format!("{:#}", anyhow::Error::from(error)),
        };
        // Each problem once: the card is looked for twice a second.
        if problem != last {
            tracing::warn!("{problem}");
            last = problem;
        }
        if Instant::now() >= leaves {
            Installer::leave_without_a_card();
            leaves = Instant::now() + NO_CARD;
        }
        tokio::select! {
            () = stop.cancelled() => return None,
            () = tokio::time::sleep(LOOK_FOR_CARD) => {}
        }
    }
}

/// Handles a call by udhcpc: sets the interface up, and ends.
fn lease_changed(event: &str) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime.map_err(anyhow::Error::from).and_then(|runtime| Ok(runtime.block_on(hook::main(event))?));
    if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Prints the controllers that are found. The addresses stand alone: scripts read them.
async fn discover(first: bool) -> anyhow::Result<()> {
    let found = if first { discovery::first().await.into_iter().collect() } else { discovery::survey().await };
    let mut printed = BTreeSet::new();
    for address in found.iter().filter_map(discovery::Found::address) {
        // A controller may answer on several interfaces, and by both protocols.
        if printed.insert(address) {
            writeln!(std::io::stdout().lock(), "{address}").context("cannot write to standard output")?;
        }
    }
    if printed.is_empty() {
        bail!(
            "no controller answered, by mDNS or MarcoPolo: is one on this network, with --discovery on, and may \
             multicast pass to it (UDP 5353, UDP 1337)?"
        );
    }
    Ok(())
}

async fn enroll(args: &ConnectionArgs, file: &File) -> anyhow::Result<()> {
    let (node, held) = run::enroll_once(&host(file)?, &args.resolve(file)?).await?;
    let words = match held {
        None => "was enrolled before",
        Some(false) => "is enrolled",
        Some(true) => "is enrolled, and held until an admin approves it",
    };
    writeln!(std::io::stdout().lock(), "nodes/{node} {words}").context("cannot write to standard output")?;
    Ok(())
}
