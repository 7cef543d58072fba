//! How much a node may say: what is beyond it is not read until later, and so the node waits.

use std::time::Duration;

use tokio::time::Instant;

/// Messages that a node may send at once: all that its journal holds, after a long time without a stream.
const BURST: u32 = 200;
/// Messages a second for ever. An agent reports progress once a second and a state now and then.
const PER_SECOND: u32 = 20;

/// The messages of one session.
#[derive(Debug)]
pub(super) struct Quota {
    left: u32,
    filled: Instant,
}

impl Quota {
    pub(super) fn new(now: Instant) -> Self {
        Self { left: BURST, filled: now }
    }

    /// Whether another message may be read.
    pub(super) fn has_room(&self) -> bool {
        self.left > 0
    }

    /// When there is room again, if there is none.
    pub(super) fn room_at(&self) -> Instant {
        self.filled + Duration::from_secs(1)
    }

    /// Adds what has become free.
    pub(super) fn refill(&mut self, now: Instant) {
        let seconds = now.duration_since(self.filled).as_secs();
        if seconds > 0 {
            let more = u32::try_from(seconds).unwrap_or(u32::MAX).saturating_mul(PER_SECOND);
            self.left = self.left.saturating_add(more).min(BURST);
            self.filled += Duration::from_secs(seconds);
        }
    }

    /// A message was read.
    pub(super) fn spend(&mut self, now: Instant) {
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
