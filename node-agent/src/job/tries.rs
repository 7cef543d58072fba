//! How often an installation is tried: bounded for each cause, and in all.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Tries that may end for one cause. The card may heal itself, and a program may have been killed for its memory once.
const PER_CAUSE: u32 = 5;
/// The same while the old system is whole: going back costs nothing.
const UNCOMMITTED: u32 = 3;
/// Boots in which an installation may begin without coming to an end. A power supply that fails is not the image's fault,
/// but one that hangs the machine each time never ends otherwise.
const BEGUN: u32 = 50;
/// How long an installation is tried, whatever the causes. The controller takes it for overdue then, too.
const IN_ALL: Duration = Duration::from_secs(24 * 60 * 60);
/// Causes that lie outside of the node: those end with time, and are bounded by it alone once the card is touched.
const OUTSIDE: [&str; 2] = ["DOWNLOAD_FAILED", "LABELS_UNKNOWN"];
/// Reason of an installation that began in boot after boot.
pub const NEVER_ENDED: &str = "INSTALLATION_NEVER_ENDED";

/// Tries of an installation that failed. It is journalled, so that a restart forgets none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tries {
    /// By the reason that ended them.
    causes: BTreeMap<String, u32>,
    /// Boots in which it was found under way.
    begun: u32,
    /// Time that they took, by the clocks of all boots together.
    seconds: u64,
}

impl Tries {
    /// True for an installation that has not failed yet.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Counts one that failed, `spent` after the count before.
    pub fn count(&mut self, reason: &str, spent: Duration) {
        let count = self.causes.entry(reason.to_owned()).or_default();
        *count = count.saturating_add(1);
        self.seconds = self.seconds.saturating_add(spent.as_secs());
    }

    /// Counts a boot in which the installation begins again without having failed.
    pub fn begin_again(&mut self) {
        self.begun = self.begun.saturating_add(1);
    }

    /// Begins anew for a further trial boot; the time in all goes on.
    pub fn for_next_trial(&mut self) {
        self.causes.clear();
        self.begun = 0;
    }

    /// All that failed in this boot and before.
    pub fn failed(&self) -> u32 {
        self.causes.values().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Why the installation is not begun once more after a boot that did not end it; `None`: it is.
    pub fn never_ended(&self) -> Option<String> {
        let over = self.begun > BEGUN;
        over.then(|| format!("the machine restarted {} times while the image was being installed", self.begun))
    }

    /// Why it is not tried again after it failed for this reason; `None`: it is.
    pub fn over(&self, reason: &str, committed: bool) -> Option<String> {
        let count = self.causes.get(reason).copied().unwrap_or_default();
        let limit = match (committed, OUTSIDE.contains(&reason)) {
            (true, true) => u32::MAX,
            (true, false) => PER_CAUSE,
            (false, _) => UNCOMMITTED,
        };
        if count >= limit {
            return Some(format!("tried {count} times"));
        }
        let spent = Duration::from_secs(self.seconds);
        (spent >= IN_ALL).then(|| format!("tried for {}", humantime::format_duration(spent)))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{BEGUN, PER_CAUSE, Tries, UNCOMMITTED};

    /// Tries until it is over; the number of the last one.
    fn tries(reason: &str, committed: bool, each: Duration) -> u32 {
        let mut tries = Tries::default();
        for number in 1..10_000 {
            tries.count(reason, each);
            if tries.over(reason, committed).is_some() {
                return number;
            }
        }
        panic!("{reason} is tried for ever");
    }

    #[test]
    fn every_cause_is_tried_a_bounded_number_of_times() {
        for (reason, _) in marco_proto::reasons::REASONS {
            assert_eq!(tries(reason, false, Duration::ZERO), UNCOMMITTED, "{reason}");
            let minutes = Duration::from_secs(600);
            let outside = ["DOWNLOAD_FAILED", "LABELS_UNKNOWN"].contains(reason);
            assert_eq!(tries(reason, true, minutes), if outside { 24 * 6 } else { PER_CAUSE }, "{reason}");
        }
    }

    #[test]
    fn causes_are_counted_apart_and_all_of_them_by_time() {
        let mut tries = Tries::default();
        for number in 0..PER_CAUSE - 1 {
            for reason in ["DISK_IO", "SYSTEM_ERROR", "BOOT_PARTITION_IO"] {
                tries.count(reason, Duration::from_secs(3600));
                assert_eq!(tries.over(reason, true), None, "{number} {reason}");
            }
        }
        // Those were twelve hours.
        for _ in 0..12 {
            assert_eq!(tries.over("DOWNLOAD_FAILED", true), None);
            tries.count("DOWNLOAD_FAILED", Duration::from_secs(3600));
        }
        assert_eq!(tries.over("DOWNLOAD_FAILED", true).as_deref(), Some("tried for 1day"));
        tries.for_next_trial();
        assert!(tries.over("DISK_IO", true).is_some(), "a further trial is no further day");
    }

    #[test]
    fn installation_that_hangs_each_machine_is_begun_so_often_and_no_more() {
        let mut tries = Tries::default();
        for _ in 0..BEGUN {
            tries.begin_again();
            assert_eq!(tries.never_ended(), None);
        }
        tries.begin_again();
        assert!(tries.never_ended().is_some());
    }
}
