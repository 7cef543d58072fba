//! Detects a clock that disagrees with stored times or that is set while the controller runs, and logs it. No call is
//! refused for it: correcting a wrong clock takes the same step. Only what cannot be undone waits: old rows are not
//! removed while the time is in doubt.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use chrono::{DateTime, TimeDelta, Utc};
use tokio_util::sync::CancellationToken;

use super::Clock;
use crate::calendar::{delta, earlier, later};

/// Interval of the checks.
const LOOK: std::time::Duration = std::time::Duration::from_secs(1);
/// Largest difference between synchronised clocks.
const TOLERANCE: TimeDelta = TimeDelta::minutes(1);
/// Age of the last row from which the clock may be ahead; a controller that was off for that long looks the same.
const LONG: TimeDelta = TimeDelta::days(30);
/// A larger step leaves the time in doubt.
const FAR: TimeDelta = TimeDelta::days(1);
/// Time for which a doubt lasts: enough for an operator to see it, and short against rows that are kept for months.
const DOUBT: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 60 * 60);

/// A disagreement of the clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finding {
    /// The clock is behind the last stored row, by this much.
    Behind(TimeDelta),
    /// The last stored row is older than [`LONG`], by this much.
    LongAgo(TimeDelta),
    /// The clock has passed the last stored row.
    CaughtUp,
    /// The clock was set by this much, or the machine slept.
    Stepped(TimeDelta),
}

/// Compares a clock with monotonic time and with the last stored row.
#[derive(Debug)]
struct Steps {
    /// The clock's time and the monotonic time at the last check; `None`: not checked yet.
    before: Option<(DateTime<Utc>, Instant)>,
    /// Time of the last stored row; `None`: the store is empty, or the clock has passed it.
    last_row: Option<DateTime<Utc>>,
}

impl Steps {
    fn look(&mut self, now: DateTime<Utc>, at: Instant) -> Option<Finding> {
        let Some((then, since)) = self.before.replace((now, at)) else { return self.first(now) };
        // Monotonic time does not jump, so a difference is a step of the clock. It stands still while the machine
        // sleeps, which therefore looks the same.
        let step = now.signed_duration_since(later(then, delta(at.saturating_duration_since(since))));
        if step.abs() > TOLERANCE {
            // The step is reported; only the operator knows if it was in the right direction.
            self.last_row = self.last_row.filter(|last| now < *last);
            return Some(Finding::Stepped(step));
        }
        self.last_row.take_if(|last| now >= *last).map(|_| Finding::CaughtUp)
    }

    fn first(&mut self, now: DateTime<Utc>) -> Option<Finding> {
        let last = self.last_row?;
        if now < earlier(last, TOLERANCE) {
            return Some(Finding::Behind(last.signed_duration_since(now)));
        }
        self.last_row = None;
        let gap = now.signed_duration_since(last);
        (gap > LONG).then_some(Finding::LongAgo(gap))
    }
}

impl Finding {
    /// True if the time may be far ahead of the right one.
    fn is_doubtful(self) -> bool {
        match self {
            Self::LongAgo(_) => true,
            Self::Stepped(by) => by.abs() > FAR,
            // A clock that is behind removes too little, which the next run makes good.
            Self::Behind(_) | Self::CaughtUp => false,
        }
    }
}

#[derive(Debug)]
struct Seen {
    steps: Steps,
    /// The last check with a doubt; `None`: there was none.
    doubted: Option<Instant>,
}

/// Watches a clock for steps, and remembers doubts.
pub struct ClockWatch {
    clock: Arc<dyn Clock>,
    seen: Mutex<Seen>,
}

impl ClockWatch {
    /// Watches this clock. `last_row` is the time of the last stored row; `None`: the store is empty.
    pub fn new(clock: Arc<dyn Clock>, last_row: Option<DateTime<Utc>>) -> Self {
        Self { clock, seen: Mutex::new(Seen { steps: Steps { before: None, last_row }, doubted: None }) }
    }

    /// Checks until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        loop {
            self.look(Instant::now());
            // Dropping the wait loses nothing.
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// True if the time is not in doubt, so that old rows may be removed.
    pub fn is_settled(&self) -> bool {
        // Checked again here: the step itself may have made the caller's job due before the next check.
        self.look(Instant::now())
    }

    fn look(&self, at: Instant) -> bool {
        let now = self.clock.now();
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(finding) = seen.steps.look(now, at) {
            say(finding, now);
            if finding.is_doubtful() {
                seen.doubted = Some(at);
            }
        }
        seen.doubted.is_none_or(|doubted| at.saturating_duration_since(doubted) >= DOUBT)
    }
}

fn say(finding: Finding, now: DateTime<Utc>) {
    let seconds = |length: TimeDelta| length.num_seconds();
    match finding {
        Finding::Behind(by) => tracing::warn!(
            %now,
            behind_seconds = seconds(by),
            "the controller's clock is before the last row of its database: it is behind, or was ahead when that was \
             written; compare it with a clock that is right"
        ),
        Finding::LongAgo(gap) => tracing::warn!(
            %now,
            ahead_seconds = seconds(gap),
            "the last row of the database is more than 30 days old: unless the controller was off for so long, its clock \
             is ahead; compare it with a clock that is right"
        ),
        Finding::CaughtUp => tracing::info!(%now, "the controller's clock has passed the last row of its database"),
        Finding::Stepped(by) => tracing::warn!(
            %now,
            by_seconds = seconds(by),
            "the controller's clock was set, or the machine slept; nodes get another certificate where theirs is not \
             valid now"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::ManualClock;

    #[test]
    fn time_of_a_far_step_is_in_doubt_for_a_week() {
        let start = at("2027-03-01T12:00:00Z");
        let clock = Arc::new(ManualClock::new(start));
        let watch = ClockWatch::new(clock.clone(), Some(start));
        let begin = Instant::now();
        assert!(watch.look(begin));
        clock.advance(TimeDelta::hours(1));
        assert!(watch.look(begin), "an hour removes nothing that matters");
        clock.advance(TimeDelta::days(450));
        assert!(!watch.look(begin));
        clock.advance(TimeDelta::days(-450));
        assert!(!watch.look(begin));
        clock.advance(delta(DOUBT));
        assert!(watch.look(begin + DOUBT));
        // A start long after the last row is doubtful too: a clock that is ahead looks like that.
        let watch = ClockWatch::new(clock, Some(start - TimeDelta::days(60)));
        assert!(!watch.look(begin));
    }

    fn at(text: &str) -> DateTime<Utc> {
        text.parse().unwrap()
    }

    #[test]
    fn clock_before_the_last_row_is_found() {
        let last = at("2027-03-01T12:00:00Z");
        let begin = Instant::now();
        let mut steps = Steps { before: None, last_row: Some(last) };
        let now = last - TimeDelta::hours(2);
        assert_eq!(steps.look(now, begin), Some(Finding::Behind(TimeDelta::hours(2))));
        assert_eq!(steps.look(now + TimeDelta::seconds(1), begin + Duration::from_secs(1)), None, "it is said once");
        // The clock runs on and catches up.
        let caught_up = steps.look(last, begin + Duration::from_secs(7200));
        assert_eq!(caught_up, Some(Finding::CaughtUp));
        assert_eq!(steps.look(last + TimeDelta::seconds(1), begin + Duration::from_secs(7201)), None);
    }

    #[test]
    fn rows_of_another_controller_are_in_step() {
        let last = at("2027-03-01T12:00:00Z");
        let mut steps = Steps { before: None, last_row: Some(last) };
        assert_eq!(steps.look(last - TimeDelta::seconds(20), Instant::now()), None);
        let mut steps = Steps { before: None, last_row: None };
        assert_eq!(steps.look(last, Instant::now()), None, "an empty store says nothing");
    }

    #[test]
    fn clock_far_after_the_last_row_is_named() {
        let last = at("2027-03-01T12:00:00Z");
        let mut steps = Steps { before: None, last_row: Some(last) };
        let year = TimeDelta::days(365);
        assert_eq!(steps.look(last + year, Instant::now()), Some(Finding::LongAgo(year)));
    }

    #[test]
    fn clock_that_is_set_is_noticed_both_ways() {
        let (now, begin) = (at("2027-03-01T12:00:00Z"), Instant::now());
        let mut steps = Steps { before: None, last_row: None };
        assert_eq!(steps.look(now, begin), None);
        let ahead = now + TimeDelta::days(20);
        let second = TimeDelta::seconds(1);
        assert_eq!(
            steps.look(ahead + second, begin + Duration::from_secs(1)),
            Some(Finding::Stepped(TimeDelta::days(20)))
        );
        let back = steps.look(now + second * 9, begin + Duration::from_secs(9));
        assert_eq!(back, Some(Finding::Stepped(TimeDelta::days(-20))));
        assert_eq!(steps.look(now + second * 10, begin + Duration::from_secs(10)), None);
    }
}
