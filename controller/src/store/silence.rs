//! The one guard of everything that judges somebody by silence: overdue and given-up executions, powered-off and vanished
//! nodes, slots of nodes that are gone, dead controllers.
//!
//! Silence proves something only if this process listened. It did not before it started, while the database was away
//! (nodes that spoke could not be stored), while the process or its machine stood still, and while reports that came wait
//! to be stored. After each of these everybody gets the time to come back first.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, TimeDelta, Utc};

use super::Store;

/// Time for a node to come back: an agent's longest pause between two tries is 60 s, and then it has to connect.
const NODES_COME_BACK: TimeDelta = TimeDelta::seconds(75);
/// Time for a controller to give a sign of life: three beats.
const CONTROLLERS_COME_BACK: TimeDelta = TimeDelta::seconds(15);
/// Two rounds are at most about a second apart. After a longer break the process, the machine or its clock stood still.
const STOOD_STILL: TimeDelta = TimeDelta::seconds(15);

/// Whose silence is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Silent {
    Node,
    Controller,
}

/// How long this process has listened.
#[derive(Debug, Default)]
pub(super) struct Watch {
    listening: Mutex<Listening>,
    /// Sessions with reports that the database did not take yet.
    backlogs: Arc<AtomicUsize>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Listening {
    /// `None`: nobody keeps watch in this process, so nothing is known against judging.
    since: Option<DateTime<Utc>>,
    last: Option<DateTime<Utc>>,
    interrupted: bool,
}

impl Listening {
    fn watched(self, now: DateTime<Utc>) -> Self {
        let went_on = self.last.is_some_and(|last| now >= last && now.signed_duration_since(last) <= STOOD_STILL);
        let since = if went_on && !self.interrupted { self.since } else { Some(now) };
        Self { since, last: Some(now), interrupted: false }
    }

    fn may_judge(self, who: Silent, now: DateTime<Utc>) -> bool {
        let time = match who {
            Silent::Node => NODES_COME_BACK,
            Silent::Controller => CONTROLLERS_COME_BACK,
        };
        !self.interrupted && self.since.is_none_or(|since| now.signed_duration_since(since) >= time)
    }
}

/// Reports wait to be stored for as long as this lives.
#[derive(Debug, Default)]
pub struct Backlog(Arc<AtomicUsize>);

impl Drop for Backlog {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Store {
    /// Says that nodes can speak to this process and that it looks after them. Each dispatch round says it; a break
    /// between two of them counts as an interruption. Returns since when it listens without one.
    pub fn keep_watch(&self, now: DateTime<Utc>) -> DateTime<Utc> {
        let mut listening = self.shared.watch.listening.lock().unwrap_or_else(PoisonError::into_inner);
        *listening = listening.watched(now);
        listening.since.unwrap_or(now)
    }

    /// Says that the database did not answer: what nodes said meanwhile may be lost, or wait. From the next
    /// [`Store::keep_watch`] on they get the time to come back.
    pub fn interrupt_watch(&self) {
        self.shared.watch.listening.lock().unwrap_or_else(PoisonError::into_inner).interrupted = true;
    }

    /// Says that reports wait to be stored; nobody is judged before they are.
    pub fn backlog(&self) -> Backlog {
        self.shared.watch.backlogs.fetch_add(1, Ordering::Relaxed);
        Backlog(Arc::clone(&self.shared.watch.backlogs))
    }

    /// Whether reports wait to be stored.
    #[cfg(test)]
    pub(crate) fn has_backlog(&self) -> bool {
        self.shared.watch.backlogs.load(Ordering::Relaxed) != 0
    }

    /// Whether silence until now means something.
    pub(super) fn may_judge(&self, who: Silent, now: DateTime<Utc>) -> bool {
        let watch = &self.shared.watch;
        let listening = *watch.listening.lock().unwrap_or_else(PoisonError::into_inner);
        listening.may_judge(who, now) && (who == Silent::Controller || watch.backlogs.load(Ordering::Relaxed) == 0)
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta, Utc};

    use super::{Listening, Silent};

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).unwrap() + TimeDelta::seconds(seconds)
    }

    /// Rounds of every second from one time until another.
    fn watched(listening: Listening, from: i64, until: i64) -> Listening {
        (from..=until).fold(listening, |listening, second| listening.watched(at(second)))
    }

    #[test]
    fn nobody_is_judged_until_they_had_time_to_come_back() {
        let started = watched(Listening::default(), 0, 14);
        assert!(!started.may_judge(Silent::Controller, at(14)) && !started.may_judge(Silent::Node, at(14)));
        assert!(started.may_judge(Silent::Controller, at(15)) && !started.may_judge(Silent::Node, at(15)));
        assert!(!watched(started, 15, 74).may_judge(Silent::Node, at(74)));
        assert!(watched(started, 15, 75).may_judge(Silent::Node, at(75)));
        assert!(Listening::default().may_judge(Silent::Node, at(0)), "nobody keeps watch");
    }

    #[test]
    fn after_an_interruption_they_get_the_time_again() {
        let before = watched(Listening::default(), 0, 100);
        let away = Listening { interrupted: true, ..before };
        assert!(!away.may_judge(Silent::Controller, at(101)), "the database is away");
        let back = watched(away, 110, 184);
        assert!(!back.may_judge(Silent::Node, at(184)) && back.may_judge(Silent::Node, at(185)));
        // Frozen, suspended, or the clock was set.
        let stood_still = watched(before, 116, 190);
        assert!(!stood_still.may_judge(Silent::Node, at(190)) && stood_still.may_judge(Silent::Node, at(191)));
        let backwards = watched(before, -3600, -3526);
        assert!(!backwards.may_judge(Silent::Node, at(-3526)) && backwards.may_judge(Silent::Node, at(-3525)));
        assert!(watched(before, 114, 150).may_judge(Silent::Node, at(150)), "a slow round is no break");
    }
}
