//! `marco-controller`: reads the settings, runs the controller, reports how it ended.

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use marco_controller::clock::SystemClock;
use marco_controller::config::{Cli, Command, Config, ServeArgs, Shared};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let Command::Serve(args) = Cli::parse().command;
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "error: {}", marco_controller::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Raises the soft limit of open files to the hard limit: every stream is an open file, and shells grant few by
/// default.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // A failure is ignored: a system call filter may forbid the call, and its author has set the limit then.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,marco_controller=info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    raise_open_files();
    // Database, artifacts and staged uploads are private. Files for others (certificates) set their own mode.
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
    let config = Config::load(args, Shared::of_process())?;

    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")?.block_on(
        async {
            let stop = CancellationToken::new();
            let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
            let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
            let on_signal = stop.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                tracing::info!("stopping: no new calls, streams are told good-bye");
                on_signal.cancel();
            });

            // It may wait long for the right clock. Dropping it there loses nothing: nothing runs yet.
            let controller = tokio::select! {
                bound = marco_controller::Controller::bind(config, std::sync::Arc::new(SystemClock)) => bound?,
                () = stop.cancelled() => return Ok(()),
            };
            writeln!(std::io::stdout(), "{}", controller.greeting()).context("cannot write to standard output")?;
            let drained = controller.run(stop).await?;
            if drained {
                tracing::info!("stopped; every stream had ended");
            } else {
                tracing::warn!("stopped; some streams had to be cut");
            }
            Ok(())
        },
    )
}
