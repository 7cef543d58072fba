//! Illnesses of the node, for the controller to show.

use chrono::{DateTime, TimeDelta, Utc};
use tokio::sync::watch;

/// A clock may be off by this before it is an illness: certificates and logs bear minutes.
const CLOCK: TimeDelta = TimeDelta::minutes(5);

/// A kind of illness; a node has each at most once.
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
}

/// An illness that the node has now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Of which kind.
    pub ailment: Ailment,
    /// A sentence for people.
    pub message: String,
}

/// Everything that ails the node, sorted by kind.
#[derive(Debug, Default)]
pub struct Health(watch::Sender<Vec<Condition>>);

impl Health {
    /// Notes an illness, or with `None` that it has passed.
    pub fn set(&self, ailment: Ailment, message: Option<String>) {
        self.0.send_if_modified(|conditions| {
            let before = conditions.clone();
            conditions.retain(|condition| condition.ailment != ailment);
            conditions.extend(message.map(|message| Condition { ailment, message }));
            conditions.sort_by_key(|condition| condition.ailment);
            *conditions != before
        });
    }

    /// Its illnesses now.
    pub fn conditions(&self) -> Vec<Condition> {
        self.0.borrow().clone()
    }

    /// True when it has this illness.
    pub fn has(&self, ailment: Ailment) -> bool {
        self.0.borrow().iter().any(|condition| condition.ailment == ailment)
    }

    /// Tells of every change.
    pub fn changes(&self) -> watch::Receiver<Vec<Condition>> {
        self.0.subscribe()
    }
}

/// Why a system's clock is wrong, judged by a controller's time; `None`: it is right.
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
