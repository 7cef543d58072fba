//! Maintenance windows: times outside which nothing is begun.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use super::{Recurrence, RecurrenceError};

/// A window that opens by a cron expression in a time zone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaintenanceWindow {
    /// When it opens.
    pub cron: String,
    /// How long it stays open.
    pub duration: Duration,
    /// The zone of the expression; empty: UTC.
    pub time_zone: String,
}

impl MaintenanceWindow {
    /// Whether it can be read.
    ///
    /// # Errors
    /// When the expression or the zone is none.
    pub fn check(&self) -> Result<(), RecurrenceError> {
        Recurrence::parse(&self.cron, &self.time_zone).map(|_| ())
    }

    /// Until when it is closed; `None` while it is open. A window that never opens again is closed until the end of
    /// time. The instant at which it opens is inside, the one at which it closes is not.
    pub fn closed_until(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let duration = TimeDelta::from_std(self.duration).unwrap_or(TimeDelta::MAX);
        let earliest = now.checked_sub_signed(duration).unwrap_or(DateTime::<Utc>::MIN_UTC);
        let opens = Recurrence::parse(&self.cron, &self.time_zone).ok().and_then(|cron| cron.next_after(earliest));
        match opens {
            Some(opens) if opens <= now => None,
            Some(opens) => Some(opens),
            None => Some(DateTime::<Utc>::MAX_UTC),
        }
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
        // The hour from two to three is left out that night: it opens at three o'clock summer time, for its whole length.
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
    fn one_that_never_opens_says_so() {
        assert!(
            window("0 0 30 2 *", 1, "").closed_until(at("2030-01-15T00:00:00Z")).unwrap() > at("2100-01-01T00:00:00Z")
        );
        assert!(window("nonsense", 1, "").check().is_err());
        assert!(window("0 0 * * *", 1, "Nowhere/Land").check().is_err());
    }
}
