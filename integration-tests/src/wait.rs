//! Waiting for conditions, always with a deadline.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::MissedTickBehavior;

/// Interval between two checks of a condition.
const INTERVAL: Duration = Duration::from_millis(50);

/// Calls `condition` until it returns `Some`. Returns an error that contains `what` if that takes longer than `limit`.
///
/// An error of the condition ends the wait at once. A condition that may fail for a while returns `None` then.
pub async fn wait_until<T, F>(limit: Duration, what: &str, mut condition: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let mut interval = tokio::time::interval(INTERVAL);
    // After a slow check the next one waits a full interval; the default would catch up in a burst.
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

/// Shorthand for [`Duration::from_secs`].
pub const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}
