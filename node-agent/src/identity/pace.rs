//! Limits the renewals of a node, by monotonic time: two clocks that disagree must not make it renew all day.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::{doubled, full_jitter};

/// Longest pause between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(60 * 60);
/// First pause after a renewal before a refusal causes the next one. It doubles with each renewal in a row. The second
/// one helps if a controller's clock was wrong and is right again. The tenth helps nothing.
const FIRST_REST: Duration = Duration::from_secs(5);
/// Longest gap in a row of renewals. Certificates live for weeks, so two renewals within a day have one cause.
const ROW: Duration = Duration::from_secs(24 * 60 * 60);

/// Earliest times of the next renewal.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Failures since the last success.
    failures: u32,
    /// Renewals in a row, each within [`ROW`] of the one before.
    in_a_row: u32,
    succeeded: Option<Instant>,
    rests_until: Option<Instant>,
}

impl Pace {
    /// Wait before a renewal that a refusal caused.
    pub(super) fn refused(&self, now: Instant) -> Duration {
        self.rests_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now))
    }

    /// Wait before a scheduled renewal. After a success it is not due again at once, whatever the time is believed to
    /// be.
    pub(super) fn scheduled(&self, now: Instant) -> Duration {
        let again = self.succeeded.map_or(Duration::ZERO, |last| (last + MAX_PAUSE).saturating_duration_since(now));
        again.max(self.refused(now))
    }

    /// Records a renewal.
    pub(super) fn succeed(&mut self, now: Instant) {
        let in_a_row = self.succeeded.is_some_and(|last| now.saturating_duration_since(last) < ROW);
        self.in_a_row = if in_a_row { self.in_a_row.saturating_add(1) } else { 0 };
        self.failures = 0;
        self.succeeded = Some(now);
        self.rests_until = Some(now + doubled(FIRST_REST, self.in_a_row).min(MAX_PAUSE));
    }

    /// Records a failed try.
    pub(super) fn fail(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        // Jitter: after an outage of the controller the whole fleet retries.
        let pause = full_jitter(doubled(FIRST_REST, self.failures).min(MAX_PAUSE));
        self.rests_until = Some(now + pause.max(Duration::from_secs(1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_cause_few_renewals() {
        let mut pace = Pace::default();
        let begin = Instant::now();
        let mut renewals = 0;
        // Two controllers whose clocks are a year apart: one of them refuses each certificate.
        for second in 0..24 * 60 * 60 {
            let now = begin + Duration::from_secs(second);
            if pace.refused(now).is_zero() {
                pace.succeed(now);
                renewals += 1;
            }
        }
        assert!((10..40).contains(&renewals), "{renewals} renewals in a day");
    }

    #[test]
    fn second_refusal_is_answered_within_seconds() {
        let mut pace = Pace::default();
        let begin = Instant::now();
        pace.succeed(begin);
        assert!(pace.refused(begin + Duration::from_secs(5)).is_zero());
        // A week later it is another problem.
        for _ in 0..9 {
            pace.succeed(begin);
        }
        let later = begin + Duration::from_secs(7 * 24 * 60 * 60);
        pace.succeed(later);
        assert!(pace.refused(later + Duration::from_secs(5)).is_zero());
    }

    #[test]
    fn renewal_that_succeeded_is_not_due_again() {
        let mut pace = Pace::default();
        let begin = Instant::now();
        assert!(pace.scheduled(begin).is_zero());
        pace.succeed(begin);
        assert_eq!(pace.scheduled(begin), MAX_PAUSE);
        // A failed one is tried again soon.
        let mut pace = Pace::default();
        pace.fail(begin);
        assert!(!pace.scheduled(begin).is_zero() && pace.scheduled(begin) <= FIRST_REST * 2);
    }
}
