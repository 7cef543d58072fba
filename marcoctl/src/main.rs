//! `marcoctl`: the operator's command line.

mod args;
mod ask;
mod bootcode;
mod card;
mod clock;
mod commands;
mod compression;
mod connect;
mod failure;
mod follow;
mod image;
mod output;
mod part;
mod progress;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::args::Cli;

#[tokio::main]
async fn main() -> ExitCode {
    // A wrong command line ends the process here, with exit code 2.
    let cli = Cli::parse();
    match commands::run(cli).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // A closed stderr leaves no other place for the report.
            let _ = std::io::stderr().write_all(failure.report().as_bytes());
            ExitCode::from(failure.exit_code())
        }
    }
}
