//! `marcoctl schedules`.

use std::time::Duration;

use chrono::{DateTime, Utc};
use clap::{Args, Subcommand, ValueEnum};

use super::values::{Pair, duration, instant, pair};
use super::{Paging, RolloutFlags, Target, WindowFlags};
use crate::ask::Force;

/// Subcommands of `schedules`.
#[derive(Debug, Subcommand)]
pub(crate) enum SchedulesCommand {
    /// Make operations recur
    #[command(after_help = "\
Examples:
  marcoctl schedules create nightly --cron \"0 3 * * *\" --zone Europe/Madrid --action reboot --all
  marcoctl schedules create lab --cron \"30 7 * * MON-FRI\" --zone Europe/Madrid --action update \\
      --image kiosk --selector room=a1 --jitter 10m --missed-fire once

The fields of a cron are minute, hour, day of month, month and day of week; a sixth, before them,
is the second. \"schedules next\" says in words what a cron means. Targets and artifacts are resolved
at each fire. A window's zone is --zone unless --window-zone says otherwise.")]
    Create(Box<CreateSchedule>),
    /// List schedules
    List(Paging),
    /// Show a schedule
    Get {
        /// Name or id
        schedule: String,
    },
    /// Change a schedule; without a flag for it, a setting stays as it is
    #[command(after_help = "\
Examples:
  marcoctl schedules update nightly --cron \"30 3 * * *\"
  marcoctl schedules update lab --image kiosk-2 --max-in-flight 5
  marcoctl schedules update lab pi-01 pi-02 --no-window

A new cron or zone counts from now. Operations that were made before stay as they are.")]
    Update(Box<UpdateSchedule>),
    /// Stop a schedule from making operations; its instants are recorded as skipped
    Pause {
        /// Name or id
        schedule: String,
        /// Reason; shown with the schedule and with each skipped instant
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        reason: String,
    },
    /// Let a paused schedule go on
    Resume {
        /// Name or id
        schedule: String,
    },
    /// Remove a schedule; operations that it made stay
    Delete {
        /// Name or id
        schedule: String,
    },
    /// Create its operation now, in addition to its times
    RunNow {
        /// Name or id
        schedule: String,
    },
    /// Show the coming fires, a line each: in the zone, and in UTC
    #[command(after_help = "\
Examples:
  marcoctl schedules next nightly
  marcoctl schedules next --cron \"0,30 2 * * *\" --zone Europe/Madrid --from 2030-03-30T00:00:00Z --count 5")]
    Next(Next),
    /// List the results of its instants, latest first: fired, skipped or missed, with the reason
    Fires {
        /// Name or id
        schedule: String,
        /// Only those with this outcome; repeats, or takes a list with commas
        #[arg(long, value_name = "OUTCOME", value_delimiter = ',')]
        outcome: Vec<OutcomeArg>,
        #[command(flatten)]
        paging: Paging,
    },
}

/// Flags of `schedules create`.
#[derive(Debug, Args)]
pub(crate) struct CreateSchedule {
    /// Id of the new schedule
    #[arg(value_name = "ID")]
    pub(crate) schedule: String,
    /// Times, as a cron expression
    #[arg(long, value_name = "CRON")]
    pub(crate) cron: String,
    /// Time zone of the cron expression
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    pub(crate) zone: String,
    /// Action of each fire
    #[arg(long, value_name = "ACTION")]
    pub(crate) action: ActionArg,
    #[command(flatten)]
    pub(crate) target: Target,
    /// The image to install, for an update; without it only the boot files change
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    pub(crate) image: String,
    /// The boot files, for an update; by default the board's default
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    pub(crate) bootcode: String,
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
    /// Maximum delay of a node; each node always waits the same share of it
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) jitter: Option<Duration>,
    /// No node begins later than this after a fire; by default 24h
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) expire_after: Option<Duration>,
    /// Policy for fires that come too late: skip them, or make up for them once
    #[arg(long, value_name = "POLICY", default_value = "skip")]
    pub(crate) missed_fire: MissedFireArg,
    /// Policy for a fire while an operation of the schedule is unfinished
    #[arg(long, value_name = "POLICY", default_value = "skip")]
    pub(crate) overlap: OverlapArg,
    #[command(flatten)]
    pub(crate) force: Force,
}

/// Flags of `schedules update`. `None`: unchanged.
#[derive(Debug, Args)]
pub(crate) struct UpdateSchedule {
    /// Name or id
    #[arg(value_name = "ID")]
    pub(crate) schedule: String,
    /// Times, as a cron expression
    #[arg(long, value_name = "CRON")]
    pub(crate) cron: Option<String>,
    /// Time zone of the cron expression
    #[arg(long, value_name = "ZONE")]
    pub(crate) zone: Option<String>,
    /// Action of each fire
    #[arg(long, value_name = "ACTION")]
    pub(crate) action: Option<ActionArg>,
    #[command(flatten)]
    pub(crate) target: OtherTarget,
    /// Image to install; empty: only the boot files change
    #[arg(long, value_name = "ID")]
    pub(crate) image: Option<String>,
    /// Boot files of an update; empty: the board's default
    #[arg(long, value_name = "ID")]
    pub(crate) bootcode: Option<String>,
    /// Warning time for logged-in users
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) notice: Option<Duration>,
    /// Text shown to logged-in users
    #[arg(long, value_name = "TEXT")]
    pub(crate) message: Option<String>,
    #[command(flatten)]
    pub(crate) rollout: RolloutFlags,
    /// Remove the rollout: all nodes at once, and nothing pauses the operation
    // `None` means unchanged, so removing needs a flag of its own.
    #[arg(long, conflicts_with_all = ["max_in_flight", "canary", "max_failures", "group_by", "max_per_group"])]
    pub(crate) no_rollout: bool,
    #[command(flatten)]
    pub(crate) window: WindowFlags,
    /// Remove the window: nodes begin at any time
    // As for the rollout: `None` means unchanged.
    #[arg(long, conflicts_with_all = ["window_cron", "window_duration", "window_zone"])]
    pub(crate) no_window: bool,
    /// Maximum delay of a node; each node always waits the same share of it; 0s: no delay
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) jitter: Option<Duration>,
    /// No node begins later than this after a fire
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) expire_after: Option<Duration>,
    /// Policy for fires that come too late: skip them, or make up for them once
    #[arg(long, value_name = "POLICY")]
    pub(crate) missed_fire: Option<MissedFireArg>,
    /// Policy for a fire while an operation of the schedule is unfinished
    #[arg(long, value_name = "POLICY")]
    pub(crate) overlap: Option<OverlapArg>,
    #[command(flatten)]
    pub(crate) force: Force,
}

/// New target nodes. At most one of the three may be given.
#[derive(Debug, Args)]
// A group of its own, because a change does not require a target.
#[group(id = "other_target", multiple = false)]
pub(crate) struct OtherTarget {
    /// Names or ids, replacing the current targets
    #[arg(value_name = "NODE")]
    pub(crate) nodes: Vec<String>,
    /// Every approved node
    #[arg(long)]
    pub(crate) all: bool,
    /// The nodes with this label; repeats, or takes a list with commas: all of them must be there
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',', value_parser = pair)]
    pub(crate) selector: Vec<Pair>,
}

/// Flags of `schedules next`.
#[derive(Debug, Args)]
pub(crate) struct Next {
    /// Name or id
    // Either a stored schedule or an expression: a stored one has its own cron and zone.
    #[arg(value_name = "ID", required_unless_present = "cron", conflicts_with_all = ["cron", "zone"])]
    pub(crate) schedule: Option<String>,
    /// A cron expression that is not stored
    #[arg(long, value_name = "CRON")]
    pub(crate) cron: Option<String>,
    /// Time zone of --cron; by default UTC
    #[arg(long, value_name = "ZONE", requires = "cron")]
    pub(crate) zone: Option<String>,
    /// Only fires later than this; by default now
    #[arg(long, value_name = "RFC3339", value_parser = instant)]
    pub(crate) from: Option<DateTime<Utc>>,
    /// Number of fires
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=1000), default_value_t = 10)]
    pub(crate) count: i32,
}

/// Names of a schedule's actions on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActionArg {
    Reboot,
    PowerOff,
    Update,
}

/// Names of `Schedule.MissedFire` on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum MissedFireArg {
    Skip,
    Once,
}

/// Names of `Schedule.Overlap` on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OverlapArg {
    Skip,
    Queue,
}

/// Names of `Fire.Outcome` on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutcomeArg {
    Fired,
    Skipped,
    Missed,
}
