//! Random, growing pauses, so that a fleet does not act in step.

use std::time::Duration;

/// The pause `first`, doubled `times` times.
pub(crate) fn doubled(first: Duration, times: u32) -> Duration {
    first.saturating_mul(1_u32.checked_shl(times).unwrap_or(u32::MAX))
}

/// A random pause from zero to `ceiling` (full jitter). Without a source of randomness: half of it.
pub(crate) fn full_jitter(ceiling: Duration) -> Duration {
    let share = getrandom::u32().unwrap_or(u32::MAX / 2);
    ceiling.mul_f64(f64::from(share) / f64::from(u32::MAX))
}
