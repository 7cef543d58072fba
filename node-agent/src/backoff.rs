//! Pauses that keep a fleet from acting in step.

use std::time::Duration;

/// A pause between nothing and `ceiling`, evenly spread. Without a source of randomness: half of it.
pub(crate) fn full_jitter(ceiling: Duration) -> Duration {
    let share = getrandom::u32().unwrap_or(u32::MAX / 2);
    ceiling.mul_f64(f64::from(share) / f64::from(u32::MAX))
}
