//! Maintenance windows: executions begin only within them.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{Recurrence, RecurrenceError};
use crate::calendar::{self, END_OF_TIME};

/// A window that opens by a cron expression in a time zone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaintenanceWindow {
    /// Cron expression of its openings.
    pub cron: String,
    /// Time for which it stays open.
    pub duration: Duration,
    /// Zone of the expression; empty: UTC.
    pub time_zone: String,
}

impl MaintenanceWindow {
    /// Checks that it can be read, and opens after `now`.
    ///
    /// # Errors
    /// Returns an error if the expression or the zone is invalid, or if no date matches.
    pub fn check(&self, now: DateTime<Utc>) -> Result<(), RecurrenceError> {
        Recurrence::parse(&self.cron, &self.time_zone)?.must_fire(now).map(|_| ())
    }

    /// The end of the time for which it is closed; `None`: it is open. A window that never opens again, or cannot be
    /// read, is closed until [`END_OF_TIME`]. The instant of its opening is inside, the instant of its closing is
    /// outside.
    pub fn closed_until(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        // An opening within the last `duration` means that it is still open. Looking back once covers overlapping
        // windows too.
        let earliest = calendar::earlier(now, calendar::delta(self.duration));
        let opens = Recurrence::parse(&self.cron, &self.time_zone).ok().and_then(|cron| cron.next_after(earliest));
        Some(opens.unwrap_or(END_OF_TIME)).filter(|opens| *opens > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(cron: &str, hours: u64, zone: &str) -> MaintenanceWindow {
        MaintenanceWindow {
            cron: cron.to_owned(),
            duration: Duration::from_secs(hours * 3600),
            time_zone: zone.to_owned(),
        }
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn it_is_open_from_its_opening_until_its_end() {
        let nightly = window("0 22 * * *", 4, "");
        assert_eq!(nightly.closed_until(at("2030-01-15T21:59:59Z")), Some(at("2030-01-15T22:00:00Z")));
        assert_eq!(nightly.closed_until(at("2030-01-15T22:00:00Z")), None);
        assert_eq!(nightly.closed_until(at("2030-01-16T01:59:59.999Z")), None);
        assert_eq!(nightly.closed_until(at("2030-01-16T02:00:00Z")), Some(at("2030-01-16T22:00:00Z")));
    }

    #[test]
    fn it_opens_by_the_clock_of_its_zone() {
        let nightly = window("0 22 * * *", 1, "Europe/Madrid");
        assert_eq!(nightly.closed_until(at("2030-01-15T12:00:00Z")), Some(at("2030-01-15T21:00:00Z")));
        assert_eq!(nightly.closed_until(at("2030-07-15T12:00:00Z")), Some(at("2030-07-15T20:00:00Z")));
        // The hour from two to three is skipped that night. The window opens at three o'clock summer time, for its
        // whole length.
        let spring = window("30 2 * * *", 1, "Europe/Madrid");
        assert_eq!(spring.closed_until(at("2030-03-31T00:59:59Z")), Some(at("2030-03-31T01:00:00Z")));
        assert_eq!(spring.closed_until(at("2030-03-31T01:59:59Z")), None);
        assert!(spring.closed_until(at("2030-03-31T02:00:00Z")).is_some());
    }

    #[test]
    fn windows_that_overlap_are_one() {
        let always = window("0 * * * *", 2, "");
        assert_eq!(always.closed_until(at("2030-01-15T12:34:56Z")), None);
    }

    #[test]
    fn window_that_never_opens_is_refused() {
        let now = at("2030-01-15T00:00:00Z");
        for never in ["0 0 30 2 *", "0 22 30 2 *", "0 0 31 4,6,9,11 *", "0 0 31 2 ?"] {
            let window = window(never, 1, "Europe/Madrid");
            assert_eq!(window.check(now), Err(RecurrenceError::Never(never.to_owned())));
            assert_eq!(window.closed_until(now), Some(END_OF_TIME), "one that is stored already");
        }
        assert_eq!(window("0 2 * * 7L", 1, "").check(now), Ok(()));
        assert_eq!(window("0 2 * * 7L", 1, "").closed_until(now), Some(at("2030-01-27T02:00:00Z")));
        assert!(matches!(window("nonsense", 1, "").check(now), Err(RecurrenceError::Cron { .. })));
        assert!(matches!(window("0 0 * * *", 1, "Nowhere/Land").check(now), Err(RecurrenceError::Zone(_))));
        assert_eq!(window("nonsense", 1, "").closed_until(now), Some(END_OF_TIME));
    }

    #[test]
    fn the_ends_of_time_are_no_trouble() {
        let window = MaintenanceWindow { duration: Duration::MAX, ..window("0 0 * * *", 1, "America/Vancouver") };
        for now in [END_OF_TIME, DateTime::<Utc>::MAX_UTC, DateTime::<Utc>::MIN_UTC, calendar::START_OF_TIME] {
            assert!(window.closed_until(now).is_none_or(|opens| opens <= END_OF_TIME), "{now}");
        }
    }
}
