//! Limits of an installation's tries: for each cause, and in all.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Failed tries for one cause. The card may heal itself, and a program may have been killed for its memory once.
const PER_CAUSE: u32 = 5;
/// The same while the old system is whole: going back costs nothing.
const UNCOMMITTED: u32 = 3;
/// Boots in which an installation may begin without coming to an end. A power supply that fails is not the image's fault,
/// but one that hangs the machine each time never ends otherwise.
const BEGUN: u32 = 50;
/// Time of all tries together, over all causes. The controller takes the node for overdue then, too.
const IN_ALL: Duration = Duration::from_secs(24 * 60 * 60);
/// Causes that lie outside of the node: those end with time, and are bounded by it alone once the card is touched.
const OUTSIDE: [&str; 2] = ["DOWNLOAD_FAILED", "LABELS_UNKNOWN"];
/// Reason: the installation began in boot after boot, without an end.
pub const NEVER_ENDED: &str = "INSTALLATION_NEVER_ENDED";

/// Failed tries of an installation. They are journalled, so that a restart forgets none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tries {
    /// Failed tries by their reason.
    causes: BTreeMap<String, u32>,
    /// Boots that found the installation under way.
    begun: u32,
    /// Seconds that all tries took, over all boots.
    seconds: u64,
}

impl Tries {
    /// Returns true if nothing was counted yet.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Counts a failed try that took `spent`.
    pub fn count(&mut self, reason: &str, spent: Duration) {
        let count = self.causes.entry(reason.to_owned()).or_default();
        *count = count.saturating_add(1);
        self.seconds = self.seconds.saturating_add(spent.as_secs());
    }

    /// Counts a boot in which the installation begins again without having failed.
    pub fn begin_again(&mut self) {
        self.begun = self.begun.saturating_add(1);
    }

    /// Resets the counts for a further trial boot; the total time goes on.
    pub fn for_next_trial(&mut self) {
        self.causes.clear();
        self.begun = 0;
    }

    /// Failed tries of all boots since the last trial boot.
    pub fn failed(&self) -> u32 {
        self.causes.values().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Returns the reason not to begin again after a boot that did not end the installation; `None`: begin.
    pub fn never_ended(&self) -> Option<String> {
        let over = self.begun > BEGUN;
        over.then(|| format!("the machine restarted {} times while the image was being installed", self.begun))
    }

    /// Returns the reason not to try again after a failure of this cause; `None`: try.
    pub fn over(&self, reason: &str, committed: bool) -> Option<String> {
        let count = self.causes.get(reason).copied().unwrap_or_default();
        let limit = match (committed, OUTSIDE.contains(&reason)) {
            // A network that is away for a night comes back. A card that takes no file system never will.
            (true, true) => u32::MAX,
            (true, false) => PER_CAUSE,
            // The old system is whole, so outside causes are counted as well.
            (false, _) => UNCOMMITTED,
        };
        if count >= limit {
            return Some(format!("tried {count} times"));
        }
        // Causes may take turns, and each stay below its own limit.
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
        // Every known reason, so that a new one cannot be tried without a limit.
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
