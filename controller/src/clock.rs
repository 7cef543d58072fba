//! The time source: tests replace it, and it is the only place that asks the system for the time.

mod steps;

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use chrono::{DateTime, Duration, Utc};

use crate::calendar::{delta, earlier, later};
pub use steps::ClockWatch;

/// Seconds since 1970 at which this controller was built.
const BUILD_SECONDS: &str = env!("MARCO_BUILD_SECONDS");

/// Build time of this controller. A right clock never shows an earlier time.
pub fn built() -> DateTime<Utc> {
    BUILD_SECONDS.parse().ok().and_then(|seconds| DateTime::from_timestamp(seconds, 0)).unwrap_or(DateTime::UNIX_EPOCH)
}

/// A source of the current time.
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

/// Answers that take longer are refused: their time may be wrong by half of that.
pub const MAX_ROUND_TRIP: std::time::Duration = std::time::Duration::from_millis(500);

/// A shared clock's answer, with the question and the answer on this machine's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// The shared clock's time, taken somewhere between `asked` and `answered`.
    pub time: DateTime<Utc>,
    /// Start of the round trip.
    pub asked: Instant,
    /// End of the round trip.
    pub answered: Instant,
}

impl Sample {
    /// The sample with the shortest round trip; `None`: all took longer than `MAX_ROUND_TRIP`. A slow answer would make
    /// this clock wrong by half of its round trip, and this controller would take healthy ones for dead.
    pub fn best(samples: impl IntoIterator<Item = Self>) -> Option<Self> {
        // The error of an answer is at most half of its round trip.
        samples.into_iter().min_by_key(Self::round_trip).filter(|best| best.round_trip() <= MAX_ROUND_TRIP)
    }

    fn round_trip(&self) -> std::time::Duration {
        self.answered.saturating_duration_since(self.asked)
    }

    /// The time at `answered`, on the assumption that both ways took equally long.
    fn middle(&self) -> DateTime<Utc> {
        later(self.time, delta(self.round_trip() / 2))
    }
}

/// Monotonic time, anchored to a clock that several machines share: the database's. A controller whose own clock is an
/// hour off, or jumps, decides the same as the others.
#[derive(Debug)]
pub struct AnchoredClock {
    start: Instant,
    at_start: Mutex<DateTime<Utc>>,
}

impl AnchoredClock {
    /// A clock set by this sample.
    pub fn new(sample: Sample) -> Self {
        // Only the offset changes later, so that the clock runs evenly between two samples.
        let clock = Self { start: Instant::now(), at_start: Mutex::new(sample.time) };
        clock.anchor(sample);
        clock
    }

    /// Sets the clock by a new sample.
    pub fn anchor(&self, sample: Sample) {
        // Time has passed since the answer: the lock and the scheduler may have delayed this call.
        let now = later(sample.middle(), delta(sample.answered.elapsed()));
        *self.at_start.lock().unwrap_or_else(PoisonError::into_inner) = earlier(now, self.elapsed());
    }

    fn elapsed(&self) -> Duration {
        delta(self.start.elapsed())
    }
}

impl Clock for AnchoredClock {
    fn now(&self) -> DateTime<Utc> {
        later(*self.at_start.lock().unwrap_or_else(PoisonError::into_inner), self.elapsed())
    }
}

/// A clock for tests: it stands still until it is moved.
#[derive(Debug)]
pub struct ManualClock(Mutex<DateTime<Utc>>);

impl ManualClock {
    /// A clock that shows `start`.
    pub fn new(start: DateTime<Utc>) -> Self {
        Self(Mutex::new(start))
    }

    /// Moves the clock by `by`, which may be negative.
    pub fn advance(&self, by: Duration) {
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *now = later(*now, by);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> DateTime<Utc> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::{AnchoredClock, Clock as _, Sample};
    use std::time::Instant;

    use chrono::{Duration, TimeZone as _, Utc};

    fn sample(time: chrono::DateTime<Utc>, round_trip: std::time::Duration) -> Sample {
        let answered = Instant::now();
        Sample { time, asked: answered - round_trip, answered }
    }

    #[test]
    fn an_anchored_clock_follows_the_shared_one_back_and_forth() {
        let shared = Utc.timestamp_opt(1_800_000_000, 0).unwrap();
        let clock = AnchoredClock::new(sample(shared + Duration::hours(1), std::time::Duration::ZERO));
        assert!(clock.now() >= shared + Duration::hours(1));
        clock.anchor(sample(shared, std::time::Duration::from_secs(2)));
        let now = clock.now();
        assert!(now >= shared + Duration::seconds(1) && now < shared + Duration::minutes(1), "{now}");
    }

    #[test]
    fn a_slow_answer_sets_no_clock_and_the_fastest_of_several_does() {
        let shared = Utc.timestamp_opt(1_800_000_000, 0).unwrap();
        let millis = std::time::Duration::from_millis;
        assert!(Sample::best([sample(shared, millis(50_000)), sample(shared, millis(501))]).is_none());
        let samples = [300, 20, 400]
            .map(|took| sample(shared + Duration::milliseconds(took), millis(u64::try_from(took).unwrap())));
        assert_eq!(Sample::best(samples).unwrap().time, shared + Duration::milliseconds(20));
    }
}
