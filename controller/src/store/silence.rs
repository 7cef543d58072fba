//! One guard for every judgement by silence: overdue and given-up executions, powered-off and vanished nodes, slots of
//! nodes that are gone, dead controllers.
//!
//! Silence proves something only if this process listened. It did not listen before it started, while the database was
//! away (reports of nodes could not be stored), while the process or its machine stood still, or while received reports
//! wait to be stored. After each of these, nodes and controllers first get the time to come back.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use chrono::{DateTime, TimeDelta, Utc};

use super::Store;

/// Time for a node to come back: an agent's longest pause between two tries is 60 s, and then it has to connect.
const NODES_COME_BACK: TimeDelta = TimeDelta::seconds(75);
/// Time for a controller to send a beat: three of them.
const CONTROLLERS_COME_BACK: TimeDelta = TimeDelta::seconds(15);
/// Longest break between two rounds, which are at most about a second apart. After a longer one the process, the
/// machine or its clock stood still.
const STOOD_STILL: TimeDelta = TimeDelta::seconds(15);

/// Party whose silence is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Silent {
    Node,
    Controller,
}

/// Record of how long this process has listened.
#[derive(Debug, Default)]
pub(super) struct Watch {
    listening: Mutex<Listening>,
    /// Number of sessions with reports that the database did not take yet.
    backlogs: Arc<AtomicUsize>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Listening {
    /// `None` if no dispatcher runs in this process, so nothing is known against judging.
    since: Option<DateTime<Utc>>,
    last: Option<DateTime<Utc>>,
    interrupted: bool,
}

impl Listening {
    fn watched(self, now: DateTime<Utc>) -> Self {
        // A clock that was set back looks like a break as well, since deadlines cannot be trusted then either.
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

/// Marks reports that wait to be stored, as long as it lives.
#[derive(Debug, Default)]
pub struct Backlog(Arc<AtomicUsize>);

impl Drop for Backlog {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Store {
    /// Notes that nodes can reach this process and that it looks after them. Each dispatch round calls it; a break
    /// between two calls counts as an interruption. Returns since when there was none.
    pub fn keep_watch(&self, now: DateTime<Utc>) -> DateTime<Utc> {
        let mut listening = self.shared.watch.listening.lock().unwrap_or_else(PoisonError::into_inner);
        *listening = listening.watched(now);
        listening.since.unwrap_or(now)
    }

    /// Notes that the database did not answer, so reports of nodes may be lost or wait. From the next
    /// [`Store::keep_watch`] on, nodes and controllers get the time to come back.
    pub fn interrupt_watch(&self) {
        self.shared.watch.listening.lock().unwrap_or_else(PoisonError::into_inner).interrupted = true;
    }

    /// Notes that reports wait to be stored. No node is judged before they are.
    pub fn backlog(&self) -> Backlog {
        self.shared.watch.backlogs.fetch_add(1, Ordering::Relaxed);
        Backlog(Arc::clone(&self.shared.watch.backlogs))
    }

    /// True if reports wait to be stored.
    #[cfg(test)]
    pub(crate) fn has_backlog(&self) -> bool {
        self.shared.watch.backlogs.load(Ordering::Relaxed) != 0
    }

    /// True if silence until now proves something.
    pub(super) fn may_judge(&self, who: Silent, now: DateTime<Utc>) -> bool {
        let watch = &self.shared.watch;
        let listening = *watch.listening.lock().unwrap_or_else(PoisonError::into_inner);
        // Reports that wait to be stored say something about nodes, and nothing about controllers.
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
