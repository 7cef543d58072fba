//! `marco-agent`: reads the command line and starts what it names.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::Parser as _;
use node_agent::config::{Cli, Command, ConnectionArgs, File};
use node_agent::notify::{Status, notify};
use node_agent::run;
use node_agent::simulate::Simulation;
use node_agent::system::host::{Host, HostOptions};
use node_agent::system::virtual_pi::Options;
use node_agent::system::{Mode, System};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The log may be filtered; why it ended is always said.
            let _ = writeln!(std::io::stderr().lock(), "marco-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<()> {
    let file = File::read(cli.config.as_deref())?;
    let filter = file.log(cli.log.as_deref());
    let filter = tracing_subscriber::EnvFilter::try_new(&filter).with_context(|| format!("log filter {filter:?}"))?;
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start a runtime")?;
    let outcome = runtime.block_on(async {
        let stop = stop_on_signals()?;
        match cli.command {
            Command::Run(args) => agent(&args, &file, Mode::Running, stop).await,
            Command::Install(args) => agent(&args, &file, Mode::Installer, stop).await,
            // Dropping it loses nothing: the key is stored before it is used.
            Command::Enroll(args) => tokio::select! {
                () = stop.cancelled() => bail!("interrupted"),
                enrolled = enroll(&args, &file) => enrolled,
            },
            Command::Simulate(args) => {
                let simulation = Simulation {
                    count: args.count,
                    directory: args.dir,
                    prefix: args.prefix,
                    options: Options { boot_time: args.boot_time, shutdown_time: args.shutdown_time },
                    connection: args.connection.resolve(&file)?,
                };
                Ok(simulation.run(stop).await?)
            }
        }
    });
    // A thread that still writes must not hold up the end: whatever it writes is replaced whole or begun again.
    runtime.shutdown_background();
    outcome
}

/// Cancelled at the first SIGTERM or SIGINT.
fn stop_on_signals() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let token = stop.clone();
    // It lives as long as the runtime, and holds nothing.
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
        // Whoever has a command of their own does not expect systemd to be asked behind it.
        force_command: if file.shutdown_command.is_some() { Vec::new() } else { usual.force_command },
        shutdown_command: file.shutdown_command.clone().unwrap_or(usual.shutdown_command),
        ..usual
    })?)
}

async fn agent(args: &ConnectionArgs, file: &File, role: Mode, stop: CancellationToken) -> anyhow::Result<()> {
    let host = Arc::new(host(file)?);
    match (role, host.mode()) {
        (Mode::Installer, Mode::Running) => bail!(
            "this machine runs an installed system: `marco-agent install` works only as the program of the installer's \
             own initramfs, because it erases the card"
        ),
        (Mode::Running, Mode::Installer) => bail!("this is the installer's system: start `marco-agent install`"),
        _ => {}
    }
    let connection = args.resolve(file)?;
    notify(Status::Ready);
    run::run(host, connection, Arc::new(|_, _| {}), stop).await?;
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
