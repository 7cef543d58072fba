//! How long a step of the store (a connection, a statement, a commit) may wait for its answer.
//!
//! A caller of the API has a budget of time spent in vain: steps that succeed cost nothing of it, one that fails takes
//! what it waited. So a call of many statements may take its time while the database answers, and is answered within
//! two seconds when it does not.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A caller is answered within 2 s; the rest is for what comes around the store.
const CALLER: Duration = Duration::from_millis(1700);
/// Rounds and sessions, for which nobody waits: above the longest statement of ours by far.
pub(super) const BACKGROUND: Duration = Duration::from_secs(10);
/// A step gets at least this, so that a record of the failure has a chance.
const LEAST: Duration = Duration::from_millis(50);

tokio::task_local! {
    /// What a caller's budget has left, in microseconds.
    static BUDGET: Arc<AtomicU64>;
}

/// Does it within the budget of a caller.
pub async fn of_caller<T>(work: impl Future<Output = T>) -> T {
    BUDGET.scope(Arc::new(AtomicU64::new(micros(CALLER))), work).await
}

/// Takes the present task's budget along into another task.
pub fn carried<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    let budget = BUDGET.try_with(Arc::clone);
    async move {
        match budget {
            Ok(budget) => BUDGET.scope(budget, work).await,
            // Nobody waits for the present task.
            Err(_) => work.await,
        }
    }
}

/// How long the next step may take.
pub(super) fn next() -> Duration {
    BUDGET.try_with(|left| Duration::from_micros(left.load(Ordering::Relaxed)).max(LEAST)).unwrap_or(BACKGROUND)
}

/// A step failed after this time.
pub(super) fn in_vain(waited: Duration) {
    // Outside of a call there is no budget.
    let _ = BUDGET.try_with(|left| {
        let _ = left.try_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(micros(waited))));
    });
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_waits_in_vain_are_paid_for() {
        assert_eq!(next(), BACKGROUND);
        of_caller(async {
            assert_eq!(next(), CALLER);
            in_vain(Duration::from_millis(700));
            assert_eq!(next(), Duration::from_secs(1));
            tokio::spawn(carried(async { in_vain(Duration::from_secs(9)) })).await.unwrap();
            assert_eq!(next(), LEAST);
        })
        .await;
    }
}
