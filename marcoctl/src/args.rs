//! The command line: global flags and one subcommand per noun.

mod access;
mod artifacts;
mod bootcode;
mod card;
mod image;
mod nodes;
mod operations;
mod schedules;
mod tokens;
pub(crate) mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use access::{
    ApiTokensCommand, AuditCommand, CertsCommand, CreateApiToken, CreateUser, ListAudit, UpdateUser, UsersCommand,
};
pub(crate) use artifacts::{ArtifactsCommand, Kind, Purpose, Push};
pub(crate) use bootcode::{Arch, Board, BootcodeCommand, BuildBootcode, Packing};
pub(crate) use card::{CardCommand, WriteCard};
pub(crate) use image::{ImageCommand, PackImage};
pub(crate) use nodes::{Label, NodeSelection, Nodes, NodesCommand};
pub(crate) use operations::{
    Create, CreateUpdate, ExecutionStateArg, ListOperations, OneExecution, OperationStateArg, OperationsCommand,
    RolloutFlags, Target, Wait, WhichExecutions, WindowFlags,
};
pub(crate) use schedules::{
    ActionArg, CreateSchedule, MissedFireArg, Next, OtherTarget, OutcomeArg, OverlapArg, SchedulesCommand,
    UpdateSchedule,
};
pub(crate) use tokens::{CreateToken, TokensCommand};

/// Installs, updates, reboots and powers off Raspberry Pis, through their controller.
#[derive(Debug, Parser)]
#[command(
    name = "marcoctl",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = "\
Examples:
  marcoctl tokens create                                  a token with which one Pi joins
  marcoctl nodes list
  marcoctl artifacts push raspios-lite.tar.xz --kind image
  marcoctl operations update --all --image raspios-lite --wait
  marcoctl operations reboot pi-01 pi-02 --notice 0s

Exit codes:
  0  done
  1  failed, refused, not found or overdue
  2  wrong usage
  3  the controller was not reachable
  4  --timeout passed before the end"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags that every command accepts.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection and output")]
pub(crate) struct Global {
    /// Address of the controller's API; without a port: 1346
    #[arg(long, global = true, value_name = "HOST:PORT", env = "MARCO_CONTROLLER", default_value = "localhost:1346")]
    pub(crate) controller: String,
    /// Folder with the controller's ca.crt and your certificate and key
    #[arg(long, global = true, value_name = "DIR", env = "MARCO_CERTS", default_value = "./certs")]
    pub(crate) certs: PathBuf,
    /// Your identity: NAME.crt and NAME.key in the --certs folder
    // The controller writes an admin's certificate at its first start.
    #[arg(long, global = true, value_name = "NAME", env = "MARCO_IDENTITY", default_value = "admin")]
    pub(crate) identity: String,
    /// File with an API token, sent instead of a certificate; MARCO_API_TOKEN may hold the token itself
    #[arg(long, global = true, value_name = "FILE", env = "MARCO_API_TOKEN_FILE")]
    pub(crate) api_token_file: Option<PathBuf>,
    /// Format of the output; json is the API's messages in protobuf's JSON mapping
    #[arg(long, short, global = true, value_name = "FORMAT", env = "MARCO_OUTPUT", default_value = "table")]
    pub(crate) output: Format,
}

/// Format of results on stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Text for people.
    Table,
    /// JSON for programs.
    Json,
}

/// The nouns, one subcommand each.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one, from the command line")]
pub(crate) enum Command {
    /// Tokens with which new Pis join
    #[command(subcommand, visible_alias = "token")]
    Tokens(TokensCommand),
    /// The Pis
    #[command(subcommand, visible_alias = "node")]
    Nodes(NodesCommand),
    /// Stored operating systems (images) and boot files (bootcodes)
    #[command(subcommand, visible_alias = "artifact")]
    Artifacts(ArtifactsCommand),
    /// Reboot, power off and update nodes; show the results
    #[command(subcommand, visible_aliases = ["operation", "ops"])]
    Operations(OperationsCommand),
    /// Operations that recur, by cron and time zone
    #[command(subcommand, visible_alias = "schedule")]
    Schedules(SchedulesCommand),
    /// Boot files that start the installer, built here
    #[command(subcommand)]
    Bootcode(BootcodeCommand),
    /// Systems packed into images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Cards that make a new Pi a node
    #[command(subcommand)]
    Card(CardCommand),
    /// People and services with certificates, and their rights
    #[command(subcommand, visible_alias = "user")]
    Users(UsersCommand),
    /// Secrets that services send instead of certificates
    #[command(subcommand, visible_alias = "api-token")]
    ApiTokens(ApiTokensCommand),
    /// The certificates of users and nodes
    #[command(subcommand, visible_alias = "cert")]
    Certs(CertsCommand),
    /// Calls that changed something or were refused, and their callers
    #[command(subcommand)]
    Audit(AuditCommand),
}

/// Page size of a list.
#[derive(Debug, Clone, Args)]
pub(crate) struct Paging {
    /// Entries fetched at a time (1 to 1000); all pages are always fetched
    // The API's maximum is 1000.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=1000), default_value_t = 500)]
    pub(crate) page_size: i32,
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::Cli;

    #[test]
    fn the_command_line_is_sound() {
        // clap reports conflicting flags and missing groups only at run time.
        Cli::command().debug_assert();
    }

    #[test]
    fn nodes_all_and_selector_exclude_each_other() {
        for both in [&["pi-01", "--all"][..], &["--all", "--selector", "a=b"], &["pi-01", "--selector", "a=b"]] {
            let line = ["marcoctl", "operations", "reboot"].iter().chain(both);
            assert!(Cli::try_parse_from(line).is_err(), "{both:?} was taken");
        }
        assert!(Cli::try_parse_from(["marcoctl", "operations", "reboot"]).is_err(), "no target was taken");
    }

    #[test]
    fn a_timeout_needs_a_wait() {
        assert!(Cli::try_parse_from(["marcoctl", "operations", "reboot", "--all", "--timeout", "5s"]).is_err());
        assert!(
            Cli::try_parse_from(["marcoctl", "operations", "reboot", "--all", "--wait", "--timeout", "5s"]).is_ok()
        );
    }
}
