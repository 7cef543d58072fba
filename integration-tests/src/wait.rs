//! Waiting for conditions, always with a deadline.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::MissedTickBehavior;

/// How often a condition is looked at.
const INTERVAL: Duration = Duration::from_millis(50);

/// Calls `condition` until it answers something, and fails with `what` when that takes longer than `limit`.
///
/// An error of the condition itself ends the wait at once; a condition that may fail for a while answers `None` then.
pub async fn wait_until<T, F>(limit: Duration, what: &str, mut condition: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let mut interval = tokio::time::interval(INTERVAL);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::time::timeout(limit, async {
        loop {
            interval.tick().await;
            if let Some(found) = condition().await? {
                return Ok(found);
            }
        }
    })
    .await
    .with_context(|| format!("waited {limit:?} in vain: {what}"))?
}

/// Seconds, shorter to write.
pub const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}
