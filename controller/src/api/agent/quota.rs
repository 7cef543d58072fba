//! Limit of a node's messages. Messages beyond it stay unread until later, so the node waits and loses nothing.

use std::time::Duration;

use tokio::time::Instant;

/// Messages that a node may send at once: its whole journal, after a long time without a stream.
const BURST: u32 = 200;
/// Messages a second, without a limit in time. An agent reports progress once a second and a state now and then.
const PER_SECOND: u32 = 20;

/// Message budget of one session: a token bucket.
#[derive(Debug)]
pub(super) struct Quota {
    left: u32,
    filled: Instant,
}

impl Quota {
    pub(super) fn new(now: Instant) -> Self {
        Self { left: BURST, filled: now }
    }

    /// True if another message may be read.
    pub(super) fn has_room(&self) -> bool {
        self.left > 0
    }

    /// Time at which there is room again. Only meaningful while there is none.
    pub(super) fn room_at(&self) -> Instant {
        self.filled + Duration::from_secs(1)
    }

    /// Adds the budget of the whole seconds since the last refill, up to the burst.
    pub(super) fn refill(&mut self, now: Instant) {
        let seconds = now.duration_since(self.filled).as_secs();
        if seconds > 0 {
            // Saturating: a session that was silent for years must not overflow, and only the burst counts.
            let more = u32::try_from(seconds).unwrap_or(u32::MAX).saturating_mul(PER_SECOND);
            self.left = self.left.saturating_add(more).min(BURST);
            // Not `now`: the rest of a second counts for the next refill.
            self.filled += Duration::from_secs(seconds);
        }
    }

    /// Takes one message out of the budget.
    pub(super) fn spend(&mut self, now: Instant) {
        // The run loop refills only while the budget is empty, so all other seconds are credited here.
        self.refill(now);
        self.left = self.left.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::{BURST, PER_SECOND, Quota};
    use std::time::Duration;
    use tokio::time::Instant;

    #[test]
    fn a_node_that_talks_without_end_is_heard_so_often_a_second() {
        let start = Instant::now();
        let mut quota = Quota::new(start);
        let mut heard = 0;
        for millisecond in 0..10_000 {
            let now = start + Duration::from_millis(millisecond);
            quota.refill(now);
            if quota.has_room() {
                quota.spend(now);
                heard += 1;
            } else {
                assert!(quota.room_at() > now);
            }
        }
        assert_eq!(heard, BURST + 9 * PER_SECOND);
    }

    #[test]
    fn silence_is_saved_up_to_the_burst() {
        let start = Instant::now();
        let mut quota = Quota::new(start);
        for _ in 0..BURST {
            quota.spend(start);
        }
        assert!(!quota.has_room());
        quota.refill(start + Duration::from_secs(3600));
        assert_eq!(quota.left, BURST);
    }
}
