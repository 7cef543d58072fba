//! Rate limits: a burst at once, then one for each interval, by key.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};

/// Largest number of remembered keys. If all of them are in debt, new keys are refused: an attacker has very many
/// addresses.
const KEYS_MAX: usize = 20_000;

/// A limit with a memory for each key.
#[derive(Debug)]
pub struct Rate<K> {
    burst: i64,
    interval: i64,
    /// End of the key's debt, in microseconds since 1970.
    free_at: Mutex<HashMap<K, i64>>,
}

impl<K: Eq + Hash> Rate<K> {
    /// A limit of `burst` at once, and one more for each `interval`.
    pub fn new(burst: u32, interval: Duration) -> Self {
        let interval = i64::try_from(interval.as_micros()).unwrap_or(i64::MAX);
        Self { burst: i64::from(burst), interval, free_at: Mutex::new(HashMap::new()) }
    }

    /// Takes one; false: none is left.
    pub fn take(&self, key: K, now: DateTime<Utc>) -> bool {
        let now = now.timestamp_micros();
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        // Only now, because it walks all keys; those without a debt need no memory.
        if free_at.len() >= KEYS_MAX && !free_at.contains_key(&key) {
            free_at.retain(|_, at| *at > now);
            if free_at.len() >= KEYS_MAX {
                return false;
            }
        }
        let full = self.full(now);
        let at = free_at.entry(key).or_insert(now);
        let after = owed_until(*at, now, full).saturating_add(self.interval);
        let taken = after <= full;
        // A refusal costs nothing: otherwise a client that retries too often would never get in again.
        if taken {
            *at = after;
        }
        taken
    }

    /// True if one is left.
    pub fn has(&self, key: &K, now: DateTime<Utc>) -> bool {
        let now = now.timestamp_micros();
        let free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let full = self.full(now);
        let at = owed_until(free_at.get(key).copied().unwrap_or(now), now, full);
        at.saturating_add(self.interval) <= full
    }

    /// End of the debt of a key that used its whole burst just now.
    fn full(&self, now: i64) -> i64 {
        now.saturating_add(self.interval.saturating_mul(self.burst).max(0))
    }
}

/// The end of a key's debt, which is at most a burst long. A longer one comes from a clock that was ahead; kept, it
/// would shut a room of nodes out for as long as the clock was wrong.
fn owed_until(at: i64, now: i64, full: i64) -> i64 {
    if at > full { now } else { at.max(now) }
}

/// The address that a limit counts by. IPv6: the network of 64 bits, because one machine may use all its addresses.
pub fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::{Rate, source};
    use chrono::{DateTime, TimeDelta};
    use std::time::Duration;

    #[test]
    fn a_burst_then_one_each_interval_for_each_key() {
        let rate = Rate::new(3, Duration::from_secs(10));
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        assert!((0..3).all(|_| rate.take("a", now)));
        assert!(!rate.take("a", now) && !rate.has(&"a", now) && rate.take("b", now));
        let later = now + TimeDelta::seconds(10);
        assert!(rate.has(&"a", later) && rate.take("a", later) && !rate.take("a", later));
        assert!((0..3).all(|_| rate.take("a", now + TimeDelta::hours(1))));
    }

    #[test]
    fn debt_of_a_clock_that_was_ahead_is_forgotten() {
        let rate = Rate::new(3, Duration::from_secs(10));
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let ahead = now + TimeDelta::days(365);
        assert!((0..3).all(|_| rate.take("a", ahead)));
        assert!(!rate.has(&"a", ahead));
        assert!(rate.has(&"a", now) && (0..3).all(|_| rate.take("a", now)));
        assert!(!rate.take("a", now), "the limit holds again");
    }

    #[test]
    fn one_machine_is_one_source() {
        let (one, two) = ("2001:db8::1".parse().unwrap(), "2001:db8::ffff:2".parse().unwrap());
        assert_eq!(source(one), source(two));
        assert_ne!(source(one), source("2001:db8:0:1::1".parse().unwrap()));
        assert_eq!(source("::ffff:10.0.0.1".parse().unwrap()), "10.0.0.1".parse::<std::net::IpAddr>().unwrap());
    }
}
