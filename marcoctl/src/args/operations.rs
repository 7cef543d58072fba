//! `marcoctl operations`.

use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::{Args, Subcommand, ValueEnum};

use super::Paging;
use super::values::{FailureLimit, Pair, duration, failure_limit, instant, pair};
use crate::ask::Force;

/// Subcommands of `operations`.
#[derive(Debug, Subcommand)]
pub(crate) enum OperationsCommand {
    /// Restart nodes
    #[command(after_help = "\
Examples:
  marcoctl operations reboot pi-01 pi-02
  marcoctl operations reboot --selector room=a1 --at 2030-01-31T22:00:00+01:00 --message \"New kernel\"
  marcoctl operations reboot --all --notice 0s --wait --timeout 10m
  marcoctl operations reboot --all --max-in-flight 10 --canary 1 --max-failures 5%
  marcoctl operations reboot --all --group-by switch --max-per-group 2")]
    Reboot(Create),
    /// Power nodes off; they stay off until someone turns them on
    PowerOff(Create),
    /// Install an image and start it; or, without --image, only replace the boot files
    #[command(after_help = "\
Examples:
  marcoctl operations update pi-01 --image raspios-lite --wait
  marcoctl operations update --selector room=a1 --image kiosk-2030-01 --discard-home
  marcoctl operations update --all --bootcode kernel-6.12      boot files only

The download comes first, then the notice, then the restart. A node whose new system does not come
up goes back to the installer by itself and stays reachable.")]
    Update(CreateUpdate),
    /// List operations, newest first
    List(ListOperations),
    /// Show an operation and its result on each node
    Get {
        /// Name or id
        operation: String,
    },
    /// List the results of an operation, one per node
    Executions {
        /// Name or id
        operation: String,
        /// Only those in this state, for example failed or rolled-back; repeats, or takes a list with commas
        #[arg(long, value_name = "STATE", value_delimiter = ',')]
        state: Vec<ExecutionStateArg>,
        #[command(flatten)]
        paging: Paging,
    },
    /// Show an operation's progress until it has ended
    Watch {
        /// Name or id
        operation: String,
        /// Stop watching after this time, with exit code 4
        #[arg(long, value_name = "DURATION", value_parser = duration)]
        timeout: Option<Duration>,
    },
    /// Stop an operation; nodes past the point of no return finish their part
    Cancel {
        /// Name or id
        operation: String,
    },
    /// Hold back every node that has not begun
    Pause {
        /// Name or id
        operation: String,
        /// Reason, for the history
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        reason: String,
    },
    /// Let a paused operation go on
    Resume {
        /// Name or id
        operation: String,
    },
    /// Repeat it as a new operation on the nodes that did not succeed
    Retry {
        /// Name or id of an operation that has ended
        operation: String,
        #[command(flatten)]
        wait: Wait,
        #[command(flatten)]
        force: Force,
    },
    /// Explain the state of an operation's nodes, and the possible next steps
    Explain(WhichExecutions),
    /// Show a node's log of its part, if it failed or was rolled back: mostly the installer's lines
    Log(OneExecution),
    /// Give up an overdue node: its part ends as failed
    Abandon(OneExecution),
    /// List the events of an operation, in order
    Events {
        /// Name or id
        operation: String,
        #[command(flatten)]
        paging: Paging,
    },
}

/// Flags of every command that creates an operation.
#[derive(Debug, Args)]
pub(crate) struct Create {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Start of the notice; by default now
    #[arg(long, value_name = "RFC3339", value_parser = instant)]
    pub(crate) at: Option<DateTime<Utc>>,
    /// No node begins after this time; by default 24 hours after --at
    #[arg(long, value_name = "RFC3339", value_parser = instant)]
    pub(crate) expires: Option<DateTime<Utc>>,
    /// Warning time for logged-in users; by default 2m, 0s is at once
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) notice: Option<Duration>,
    /// Text shown to logged-in users
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(crate) message: String,
    #[command(flatten)]
    pub(crate) rollout: RolloutFlags,
    #[command(flatten)]
    pub(crate) window: WindowFlags,
    #[command(flatten)]
    pub(crate) wait: Wait,
    /// Create nothing: say for each node whether it would begin at once, wait, or refuse; exit code 1 if one would
    /// refuse
    // Nothing is created, so there is nothing to wait for.
    #[arg(long, conflicts_with = "wait")]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) force: Force,
}

/// Flags of the rollout. Without any of them all nodes begin at once, and nothing pauses the operation.
#[derive(Debug, Args)]
pub(crate) struct RolloutFlags {
    /// Maximum number of nodes at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) max_in_flight: Option<i32>,
    /// This many nodes must succeed before the rest begins; the operation pauses if one of them fails
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) canary: Option<i32>,
    /// Pause when more nodes than this have failed or are overdue
    #[arg(long, value_name = "N|P%", value_parser = failure_limit)]
    pub(crate) max_failures: Option<FailureLimit>,
    /// Label whose values form groups, for example switch; the nodes without it are one group
    // A label without a limit would have no effect, and a limit without a label no meaning.
    #[arg(long, value_name = "LABEL", requires = "max_per_group")]
    pub(crate) group_by: Option<String>,
    /// Maximum number of nodes of one group at once
    #[arg(long, value_name = "K", requires = "group_by", value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) max_per_group: Option<i32>,
}

/// Flags of the maintenance window. Without them nodes begin at any time.
#[derive(Debug, Args)]
pub(crate) struct WindowFlags {
    /// Begin nodes only in a maintenance window that opens at these times, for example "0 22 * * 1-5"
    // There is no default length: too long a window would let nodes restart during the working day.
    #[arg(long, value_name = "CRON", requires = "window_duration")]
    pub(crate) window_cron: Option<String>,
    /// Length of time that the window stays open
    #[arg(long, value_name = "DURATION", value_parser = duration, requires = "window_cron")]
    pub(crate) window_duration: Option<Duration>,
    /// The window's time zone, for example Europe/Madrid; by default UTC
    #[arg(long, value_name = "ZONE", requires = "window_cron")]
    pub(crate) window_zone: Option<String>,
}

/// Additional flags of an update.
#[derive(Debug, Args)]
pub(crate) struct CreateUpdate {
    #[command(flatten)]
    pub(crate) create: Create,
    /// The image to install; without it only the boot files change
    #[arg(long, value_name = "ID")]
    pub(crate) image: Option<String>,
    /// The boot files; by default the board's default
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    pub(crate) bootcode: String,
    /// Recreate the home partition instead of keeping it
    #[arg(long, requires = "image")]
    pub(crate) discard_home: bool,
    /// Write a whole-disk image to the whole card as it is; everything on the card is lost, including home and the
    /// installer, and a system that does not come up needs someone at the board
    #[arg(long, requires = "image")]
    pub(crate) raw: bool,
}

/// Nodes of the operation. Exactly one of the three must be given.
#[derive(Debug, Args)]
// Every node only by --all: an empty list must never mean all of them.
#[group(id = "target", required = true, multiple = false)]
pub(crate) struct Target {
    /// Names or ids
    #[arg(value_name = "NODE")]
    pub(crate) nodes: Vec<String>,
    /// Every approved node
    #[arg(long)]
    pub(crate) all: bool,
    /// The nodes with this label; repeats, or takes a list with commas: all of them must be there
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = pair)]
    pub(crate) selector: Vec<Pair>,
}

/// Flags for waiting until the operation ends.
#[derive(Debug, Clone, Args)]
pub(crate) struct Wait {
    /// Show the progress and wait for the end; exit code 1 if a node did not succeed
    #[arg(long)]
    pub(crate) wait: bool,
    /// Stop waiting after this time, with exit code 4; the operation goes on
    #[arg(long, value_name = "DURATION", value_parser = duration, requires = "wait")]
    pub(crate) timeout: Option<Duration>,
}

/// One execution, or all executions of an operation that have not succeeded.
#[derive(Debug, Args)]
pub(crate) struct WhichExecutions {
    /// Name or id of the operation, or the full name of an execution
    pub(crate) operation: String,
    /// Name or id of the node; without it, every node that has not succeeded
    pub(crate) node: Option<String>,
}

/// One execution.
#[derive(Debug, Args)]
pub(crate) struct OneExecution {
    /// Name or id of the operation, or the full name of an execution
    pub(crate) operation: String,
    /// Name or id of the node
    pub(crate) node: Option<String>,
}

/// Flags of `operations list`.
#[derive(Debug, Args)]
pub(crate) struct ListOperations {
    /// Only operations in this state; repeats, or takes a list with commas
    #[arg(long, value_name = "STATE", value_delimiter = ',')]
    pub(crate) state: Vec<OperationStateArg>,
    /// Only operations with a part for this node
    #[arg(long, value_name = "NODE", default_value = "", hide_default_value = true)]
    pub(crate) node: String,
    #[command(flatten)]
    pub(crate) paging: Paging,
}

/// Names of `Operation.State` on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OperationStateArg {
    Scheduled,
    Running,
    Paused,
    Cancelling,
    Succeeded,
    Failed,
    Cancelled,
}

/// Names of `Execution.State` on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExecutionStateArg {
    Pending,
    Assigned,
    Running,
    Rebooting,
    Verifying,
    Succeeded,
    Failed,
    RolledBack,
    Cancelled,
    Expired,
}
