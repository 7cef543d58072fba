//! Splits the times that have come into those in time and those too late.

use chrono::{DateTime, SubsecRound as _, TimeDelta, Utc};

use super::{Recurrence, first_in};
use crate::calendar::earlier;

/// Largest number of late times that are counted; beyond it the count says "more than".
const COUNTED: u64 = 100_000;
/// Largest number of timely times that are taken at once; the others are due at the next round.
const TIMELY: usize = 1000;

/// Times that have come, as of `now`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Due {
    /// Times that are too late, oldest first.
    pub late: Vec<DateTime<Utc>>,
    /// Number of late times between the last but one in `late` and the last, which are left out because they are too
    /// many.
    pub unlisted: u64,
    /// True if there are more than `unlisted`.
    pub uncounted: bool,
    /// Times that are not too late, oldest first.
    pub timely: Vec<DateTime<Utc>>,
    /// The first time without a decision: it is still to come, or `timely` is full. `None`: there is none.
    pub next: Option<DateTime<Utc>>,
}

impl Recurrence {
    /// The times from `first` until `now`. Those older than `patience` are late. At most `listed` of these are listed:
    /// the oldest, and the last one. The walk takes little more than `listed + COUNTED + TIMELY` steps.
    pub fn due(&self, first: DateTime<Utc>, now: DateTime<Utc>, patience: TimeDelta, listed: usize) -> Due {
        let limit = earlier(now, patience);
        let mut due = Due::default();
        let mut last = None;
        let mut at = first;
        loop {
            // The rest waits for the next round, so that one schedule cannot hold up the others.
            if at > now || due.timely.len() >= TIMELY {
                due.next = Some(at);
                break;
            }
            let mut from = at;
            if at >= limit {
                due.timely.push(at);
            // One place is kept for the last late time, which may be made up for.
            } else if due.late.len().saturating_add(1) < listed {
                due.late.push(at);
            } else if due.unlisted < COUNTED {
                // The last one is listed, so it counts as unlisted only when a later one takes its place.
                due.unlisted = due.unlisted.saturating_add(u64::from(last.is_some()));
                last = Some(at);
            } else {
                // After a year without a controller there may be 31 million late times; bisection skips them.
                due.uncounted = true;
                from = self.last_before(limit, at);
                last = Some(from);
            }
            match self.next_after(from) {
                // Never backwards: a bug in a zone's rules must not become an endless loop.
                Some(next) if next > at => at = next,
                _ => break,
            }
        }
        due.late.extend(last);
        due
    }

    /// The last time before `limit`. `known` is one before it too.
    fn last_before(&self, limit: DateTime<Utc>, known: DateTime<Utc>) -> DateTime<Utc> {
        let is_last = |at: DateTime<Utc>| self.next_after(at).is_none_or(|next| next >= limit);
        if is_last(known) {
            return known;
        }
        // Bisection works, because the condition stays true from the last time before the limit on.
        first_in(known, limit.trunc_subsecs(0), is_last).unwrap_or(known)
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta, Utc};

    use super::super::Recurrence;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).unwrap()
    }

    #[test]
    fn what_is_older_than_patience_is_late() {
        let minutes = Recurrence::parse("* * * * *", "UTC").unwrap();
        let due = minutes.due(at(0), at(600), TimeDelta::minutes(5), 1000);
        assert_eq!(due.late, (0..5).map(|minute| at(60 * minute)).collect::<Vec<_>>());
        assert_eq!(due.timely, (5..=10).map(|minute| at(60 * minute)).collect::<Vec<_>>());
        assert_eq!((due.next, due.unlisted, due.uncounted), (Some(at(660)), 0, false));
    }

    #[test]
    fn of_very_many_late_ones_the_oldest_and_the_last_are_listed() {
        let minutes = Recurrence::parse("* * * * *", "UTC").unwrap();
        let due = minutes.due(at(0), at(6000), TimeDelta::minutes(5), 10);
        let mut listed: Vec<_> = (0..9).map(|minute| at(60 * minute)).collect();
        listed.push(at(94 * 60));
        assert_eq!((due.late, due.unlisted), (listed, 85));
        assert_eq!(due.timely.len(), 6);
        let seconds = Recurrence::parse("* * * * * *", "UTC").unwrap();
        let due = seconds.due(at(0), at(200_000), TimeDelta::seconds(2), 3);
        assert_eq!((due.late.len(), due.uncounted), (3, true));
        assert_eq!((due.timely.len(), due.next), (3, Some(at(200_001))));
    }
}
