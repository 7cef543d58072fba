//! Phases of a node between acceptance and end, with a time limit for each. A node past the limit is overdue, and the
//! phase is the reason.

use std::time::Duration;

use super::Action;
use super::state::{ExecutionState, words};

words! {
    /// The phase that a node reports. A text that is not in this list is accepted; the limit of the state applies then.
    Phase {
        /// Checks before an update; nothing is written yet.
        Checking = "checking whether it can be updated",
        /// Downloads the zip with the installer, or the system's boot files.
        DownloadingBootcode = "downloading bootcode",
        /// Unzips the boot files into a partition and reads them back.
        WritingBootFiles = "writing boot files",
        /// Logged-in users have been warned; the notice runs.
        Notice = "waiting for the notice to pass",
        /// The restart command was given.
        Restarting = "restarting",
        /// The machine is still up after the restart command, and was given a stronger one.
        ForcedRestart = "restarting by force",
        /// The restart command was given, with the argument for a one-shot trial boot.
        TrialBoot = "trial boot",
        /// The machine is still up after the trial boot command, and was given a stronger one.
        ForcedTrialBoot = "trial boot by force",
        /// The power-off command was given.
        PoweringOff = "powering off",
        /// The machine is still up after the power-off command, and was given a stronger one.
        ForcedPowerOff = "powering off by force",
        /// The installer waits for the first checked chunk.
        Connecting = "connecting",
        /// The installer makes the card ready.
        Partitioning = "partitioning",
        /// Downloads, checks and unpacks the image as one stream.
        Unpacking = "unpacking image",
        /// Writes the files to keep, the agent and the node's identity into the new system.
        Personalising = "personalising",
        /// Flushes everything to the card.
        Syncing = "syncing",
        /// The installer waits after an error that may pass.
        AnotherTry = "waiting to try the installation again",
        /// The new system is up and waits for the controller's verdict.
        Verdict = "waiting for the controller to accept the new system",
    }
}

/// ASSIGNED: a node that has the assignment answers at once.
const ASSIGNED: Duration = minutes(1);
/// RUNNING with an unknown phase: a Pi that writes to a slow card may be silent for long.
const RUNNING: Duration = minutes(30);
/// REBOOTING: the shutdown, two stronger commands, the start and a file system check.
const REBOOTING: Duration = minutes(10);
/// VERIFYING: from the first report of the new system to its last.
const VERIFYING: Duration = minutes(10);
/// Without getting further than ever before in its state: an installer that goes round in a circle has a new phase every
/// few seconds. Long enough to do again what a power cut undid.
const STRETCH: Duration = minutes(2 * 60);
/// Limit for the whole execution, for a node that keeps moving and never ends.
const IN_ALL: Duration = minutes(24 * 60);

const fn minutes(count: u64) -> Duration {
    Duration::from_secs(60 * count)
}

impl Phase {
    /// Longest time of the phase; in a phase that streams, the longest time without a byte.
    pub const fn limit(self) -> Duration {
        match self {
            Self::Checking | Self::Notice => minutes(2),
            Self::DownloadingBootcode | Self::Personalising => minutes(5),
            // A card may pause for minutes during its internal garbage collection.
            Self::WritingBootFiles | Self::Unpacking => minutes(10),
            Self::Restarting | Self::TrialBoot | Self::PoweringOff => REBOOTING,
            Self::ForcedRestart | Self::ForcedTrialBoot | Self::ForcedPowerOff => REBOOTING,
            // In the installer the network may have to come up again, and the agent's retry pauses are minutes long.
            Self::Connecting | Self::AnotherTry => minutes(10),
            // Creating file systems on a large, slow card; flushing all dirty memory at a few megabytes a second.
            Self::Partitioning | Self::Syncing => minutes(15),
            Self::Verdict => VERIFYING,
        }
    }

    /// True if the phase counts bytes. Each byte that moves then restarts its limit.
    pub const fn streams(self) -> bool {
        // Bytes and not rates: a card may stand still for minutes and be well.
        matches!(self, Self::DownloadingBootcode | Self::Unpacking)
    }

    /// Its place among the phases of one state. A pause is no step forward.
    const fn rank(self) -> u8 {
        match self {
            Self::AnotherTry => 0,
            Self::Checking => 1,
            Self::DownloadingBootcode => 2,
            Self::WritingBootFiles => 3,
            Self::Notice => 4,
            Self::Restarting | Self::TrialBoot | Self::PoweringOff => 5,
            Self::ForcedRestart | Self::ForcedTrialBoot | Self::ForcedPowerOff => 6,
            Self::Connecting => 7,
            Self::Partitioning => 8,
            Self::Unpacking => 9,
            Self::Personalising => 10,
            Self::Syncing => 11,
            Self::Verdict => 12,
        }
    }

    /// Its limit for this action. The operator chooses the notice, so its time is added.
    fn limit_of(self, action: &Action) -> Duration {
        match self {
            // The limit itself is the tolerance after the notice.
            Self::Notice => self.limit().saturating_add(action.notice().delay),
            _ => self.limit(),
        }
    }
}

/// Time after the start of this phase, or after its last byte, at which a node becomes overdue. `None`: nothing is
/// expected of the node.
pub fn deadline_after(state: ExecutionState, phase: &str, action: &Action) -> Option<Duration> {
    match (state, Phase::parse(phase)) {
        (ExecutionState::Assigned, _) => Some(ASSIGNED),
        (ExecutionState::Running | ExecutionState::Rebooting | ExecutionState::Verifying, Some(phase)) => {
            Some(phase.limit_of(action))
        }
        // A node that waits for the notice may not have reported that phase yet.
        (ExecutionState::Running, None) => Some(RUNNING.saturating_add(action.notice().delay)),
        // An unknown phase gets the limit of its state: a newer agent must not be overdue for a new word.
        (ExecutionState::Rebooting, None) => Some(REBOOTING),
        (ExecutionState::Verifying, None) => Some(VERIFYING),
        // PENDING and the final states: the node owes nothing.
        _ => None,
    }
}

/// Position of a node in its work, as a number that only grows while the node gets on.
pub fn point(phase: &str, bytes: u64) -> i64 {
    const BITS: u32 = 56;
    let rank = Phase::parse(phase).map_or(0, Phase::rank);
    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX).min((1 << BITS) - 1);
    (i64::from(rank) << BITS) + bytes
}

/// Time without getting further than ever before in its state at which a node becomes overdue, independent of its reports.
pub fn deadline_of_stretch(action: &Action) -> Duration {
    STRETCH.saturating_add(action.notice().delay)
}

/// Time after the assignment at which a node becomes overdue, independent of its reports.
pub fn deadline_in_all(action: &Action) -> Duration {
    IN_ALL.saturating_add(action.notice().delay)
}

/// The reason why a node is overdue, for people. `spent` is the time from its assignment to its deadline, `stood` that from when it was
/// further than ever before.
pub fn why_overdue(state: ExecutionState, phase: &str, action: &Action, spent: Duration, stood: Duration) -> String {
    let (whole, stretch) = (deadline_in_all(action), deadline_of_stretch(action));
    if spent >= whole {
        return format!("it is not done {} after it was assigned", span(whole));
    }
    if stood >= stretch {
        return format!("it has not got any further for {} (last: {phase})", span(stretch));
    }
    let limit = span(deadline_after(state, phase, action).unwrap_or_default());
    match (state, Phase::parse(phase)) {
        (ExecutionState::Assigned, _) => format!("the node has not answered the assignment for {limit}"),
        (_, Some(phase)) if phase.streams() => format!("{phase}: no byte has moved for {limit}"),
        (_, Some(phase)) => format!("{phase}: that takes longer than {limit}"),
        (_, None) => format!("nothing was heard of it in state {state} for {limit}"),
    }
}

fn span(length: Duration) -> String {
    humantime::format_duration(length).to_string()
}

#[cfg(test)]
mod tests {
    use super::super::Notice;
    use super::*;
    use ExecutionState as E;

    fn reboot(notice: u64) -> Action {
        Action::Reboot(Notice { delay: Duration::from_secs(notice), message: String::new() })
    }

    #[test]
    fn every_phase_in_every_state_in_which_a_node_is_awaited_has_a_deadline_and_no_other_has() {
        let phases = Phase::ALL.iter().map(|phase| phase.as_str()).chain(["", "something new"]);
        for phase in phases {
            for state in E::ALL.iter().copied() {
                let limit = deadline_after(state, phase, &reboot(0));
                assert_eq!(limit.is_some(), state.is_active(), "{state} {phase:?}");
                assert!(limit.is_none_or(|limit| limit >= ASSIGNED && limit < IN_ALL), "{state} {phase:?}");
            }
        }
    }

    #[test]
    fn the_notice_counts_while_a_node_may_be_waiting_for_it_and_in_all() {
        let after = |state, phase| deadline_after(state, phase, &reboot(7200));
        assert_eq!(after(E::Running, Phase::Notice.as_str()), Some(Duration::from_secs(7320)));
        assert_eq!(after(E::Running, ""), Some(Duration::from_secs(9000)));
        assert_eq!(after(E::Running, Phase::Unpacking.as_str()), Some(Duration::from_secs(600)));
        assert_eq!(after(E::Rebooting, ""), Some(Duration::from_secs(600)));
        assert_eq!(deadline_in_all(&reboot(7200)), Duration::from_secs(26 * 3600));
    }

    #[test]
    fn an_installation_that_gets_on_is_further_with_each_phase_and_byte() {
        let way = ["connecting", "partitioning", "unpacking image", "personalising", "syncing"];
        let mut last = point("waiting to try the installation again", u64::MAX);
        for phase in way {
            for bytes in [0, 1, 6_000_000_000, u64::MAX] {
                let now = point(phase, bytes);
                assert!(now > last, "{phase} {bytes}");
                last = now;
            }
        }
        assert_eq!(point("something new", 0), 0);
    }

    #[test]
    fn the_reason_names_the_phase_and_its_limit() {
        let why = |state, phase| why_overdue(state, phase, &reboot(0), Duration::from_secs(3600), Duration::ZERO);
        assert_eq!(why(E::Assigned, ""), "the node has not answered the assignment for 1m");
        assert_eq!(why(E::Running, "unpacking image"), "unpacking image: no byte has moved for 10m");
        assert_eq!(why(E::Running, "partitioning"), "partitioning: that takes longer than 15m");
        assert_eq!(why(E::Rebooting, "trial boot"), "trial boot: that takes longer than 10m");
        assert_eq!(why(E::Running, "something new"), "nothing was heard of it in state RUNNING for 30m");
        for phase in Phase::ALL.iter().copied() {
            assert!(why(E::Running, phase.as_str()).starts_with(phase.as_str()));
        }
        let round = why_overdue(E::Running, "connecting", &reboot(0), STRETCH, STRETCH);
        assert_eq!(round, "it has not got any further for 2h (last: connecting)");
        let long = why_overdue(E::Running, "unpacking image", &reboot(0), IN_ALL, STRETCH);
        assert_eq!(long, "it is not done 1day after it was assigned");
    }
}
