//! The time: what tests replace, and the only place that asks the system for it.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use chrono::{DateTime, Duration, Utc};

/// Where `now` comes from.
pub trait Clock: Send + Sync + 'static {
    /// The time, UTC.
    fn now(&self) -> DateTime<Utc>;
}

/// The system's clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[allow(clippy::disallowed_methods, reason = "this is the one place that reads the system's clock")]
    fn now(&self) -> DateTime<Utc> {
        Utc::now()
    }
}

/// Monotonic time, anchored to a clock that several machines share: the database's. A controller whose own clock is an
/// hour off, or jumps, decides the same as its neighbours.
#[derive(Debug)]
pub struct AnchoredClock {
    start: Instant,
    at_start: Mutex<DateTime<Utc>>,
}

impl AnchoredClock {
    /// A clock that shows `time` now.
    pub fn new(time: DateTime<Utc>) -> Self {
        Self { start: Instant::now(), at_start: Mutex::new(time) }
    }

    /// Sets the clock by an answer of the shared one: what it said, and how long the question and the answer took.
    pub fn anchor(&self, time: DateTime<Utc>, round_trip: std::time::Duration) {
        // The answer was made about half-way.
        let now = time + Duration::from_std(round_trip / 2).unwrap_or_default();
        *self.at_start.lock().unwrap_or_else(PoisonError::into_inner) = now - self.elapsed();
    }

    fn elapsed(&self) -> Duration {
        Duration::from_std(self.start.elapsed()).unwrap_or(Duration::MAX)
    }
}

impl Clock for AnchoredClock {
    fn now(&self) -> DateTime<Utc> {
        *self.at_start.lock().unwrap_or_else(PoisonError::into_inner) + self.elapsed()
    }
}

/// A clock that stands still until it is moved: for tests.
#[derive(Debug)]
pub struct ManualClock(Mutex<DateTime<Utc>>);

impl ManualClock {
    /// A clock that shows `start`.
    pub fn new(start: DateTime<Utc>) -> Self {
        Self(Mutex::new(start))
    }

    /// Moves the clock on, or back.
    pub fn advance(&self, by: Duration) {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now += by;
    }
}

impl Clock for ManualClock {
    fn now(&self) -> DateTime<Utc> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::{AnchoredClock, Clock as _};
    use chrono::{Duration, TimeZone as _, Utc};

    #[test]
    fn an_anchored_clock_follows_the_shared_one_back_and_forth() {
        let shared = Utc.timestamp_opt(1_800_000_000, 0).unwrap();
        let clock = AnchoredClock::new(shared + Duration::hours(1));
        assert!(clock.now() >= shared + Duration::hours(1));
        clock.anchor(shared, std::time::Duration::from_secs(2));
        let now = clock.now();
        assert!(now >= shared + Duration::seconds(1) && now < shared + Duration::minutes(1), "{now}");
    }
}
