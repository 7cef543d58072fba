//! `make e2e`, `make failures`, `make trials` and `make powercut`: whole machines under QEMU, with a real kernel and installer.
#![allow(clippy::print_stdout, reason = "what it prints is the point of it")]

#[path = "e2e/cuts.rs"]
mod cuts;
#[path = "e2e/failures.rs"]
mod failures;
#[path = "e2e/journey.rs"]
mod journey;
#[path = "e2e/trials.rs"]
mod trials;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use integration_tests::machine::board::Board;
use integration_tests::machine::rig::Options;
use tokio::signal::unix::{SignalKind, signal};

const USAGE: &str = "usage: marco-e2e boot|failures|trials|powercut BOARD DEBIAN-ROOT AGENT, in a network namespace of its own; the scripts in \
                     scripts/ know how; in the environment for powercut CUTS=N and SEED=N, for trials LIMIT=SECONDS and ONLY='NAMES'";

#[tokio::main]
async fn main() -> ExitCode {
    let done = async {
        let mut terminated = signal(SignalKind::terminate())?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        // Dropping the future ends its processes and removes its files.
        tokio::select! {
            done = play() => done,
            _ = terminated.recv() => bail!("terminated"),
            _ = interrupted.recv() => bail!("interrupted"),
        }
    };
    match done.await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("\nFAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn play() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, board, debian, agent] = arguments.as_slice() else { bail!("{USAGE}") };
    let options = Options { board: Board::parse(board)?, debian: PathBuf::from(debian), agent: PathBuf::from(agent) };
    let dir = tempfile::Builder::new().prefix("marco-e2e-").tempdir().context("a folder for the machine")?;
    // `KEEP` names a folder that receives the machine's files after a failure.
    let kept = std::env::var_os("KEEP").map(PathBuf::from);
    let played = match what.as_str() {
        "boot" => journey::travel(options, dir.path()).await,
        "failures" => failures::fail(options, dir.path()).await,
        "trials" => trials::run(options, dir.path()).await,
        "powercut" => cuts::cut(options, dir.path()).await,
        _ => bail!("{USAGE}"),
    };
    if let (Some(kept), Err(_)) = (kept, &played) {
        std::fs::rename(dir.keep(), &kept).with_context(|| format!("keeping the machine in {}", kept.display()))?;
    }
    played
}
