//! Problems of the node, which the controller shows.

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::watch;

/// Tolerance of the clock: certificates and logs bear some minutes.
const CLOCK: TimeDelta = TimeDelta::minutes(5);

/// Kind of a problem. A node has each at most once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ailment {
    /// The journal cannot be written: the node takes no work.
    Journal,
    /// The file system of the agent's state is read-only or full.
    Disk,
    /// The system's clock is wrong.
    Clock,
    /// The power supply is too weak.
    UnderVoltage,
    /// The journal, or its newest copy, was lost.
    JournalLost,
}

/// A problem that the node has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Its kind.
    pub ailment: Ailment,
    /// A sentence for operators.
    pub message: String,
}

/// All problems of the node, sorted by kind.
#[derive(Debug, Default)]
pub struct Health(watch::Sender<Vec<Condition>>);

impl Health {
    /// Sets or updates a problem. `None`: it has passed.
    pub fn set(&self, ailment: Ailment, message: Option<String>) {
        self.0.send_if_modified(|conditions| {
            let before = conditions.clone();
            conditions.retain(|condition| condition.ailment != ailment);
            conditions.extend(message.map(|message| Condition { ailment, message }));
            // Sorted, so that the comparison below sees only real changes.
            conditions.sort_by_key(|condition| condition.ailment);
            // Wakes the session only on a change: conditions are checked periodically.
            *conditions != before
        });
    }

    /// The present problems.
    pub fn conditions(&self) -> Vec<Condition> {
        self.0.borrow().clone()
    }

    /// True if the node has this problem.
    pub fn has(&self, ailment: Ailment) -> bool {
        self.0.borrow().iter().any(|condition| condition.ailment == ailment)
    }

    /// A receiver that sees every change.
    pub fn changes(&self) -> watch::Receiver<Vec<Condition>> {
        self.0.subscribe()
    }
}

/// Describes a wrong clock, compared with the controller's time. `None`: the clock is right.
pub fn wrong_clock(clock: DateTime<Utc>, time: DateTime<Utc>) -> Option<String> {
    let off = clock.signed_duration_since(time);
    let length = humantime::format_duration(std::time::Duration::from_secs(off.num_seconds().unsigned_abs()));
    let direction = if off < TimeDelta::zero() { "behind" } else { "ahead of" };
    (off.abs() > CLOCK).then(|| format!("the system's clock is {length} {direction} the controller's"))
}

#[cfg(test)]
mod tests {
    use super::{Ailment, Condition, Health, wrong_clock};

    #[test]
    fn clock_may_be_off_by_minutes() {
        let time = "2026-01-01T00:00:00Z".parse().unwrap();
        assert_eq!(wrong_clock("2026-01-01T00:04:59Z".parse().unwrap(), time), None);
        assert_eq!(
            wrong_clock("2025-12-31T22:00:00Z".parse().unwrap(), time).unwrap(),
            "the system's clock is 2h behind the controller's"
        );
        let ahead = wrong_clock("2026-01-03T00:00:00Z".parse().unwrap(), time).unwrap();
        assert_eq!(ahead, "the system's clock is 2days ahead of the controller's");
    }

    #[test]
    fn only_news_is_told() {
        let health = Health::default();
        let mut changes = health.changes();
        health.set(Ailment::Disk, None);
        assert!(!changes.has_changed().unwrap());
        health.set(Ailment::Disk, Some("full".into()));
        health.set(Ailment::Journal, Some("read-only".into()));
        assert!(changes.has_changed().unwrap() && health.has(Ailment::Journal));
        let named: Vec<Ailment> = changes.borrow_and_update().iter().map(|condition| condition.ailment).collect();
        assert_eq!(named, [Ailment::Journal, Ailment::Disk]);
        health.set(Ailment::Disk, Some("full".into()));
        assert!(!changes.has_changed().unwrap());
        health.set(Ailment::Journal, None);
        assert_eq!(health.conditions(), [Condition { ailment: Ailment::Disk, message: "full".into() }]);
    }
}
