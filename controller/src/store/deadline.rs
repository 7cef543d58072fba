//! Deadlines for a step of the store: a connection, a statement or a commit.
//!
//! A caller of the API has a budget that only failed steps and waits for the permit to write draw on; statements that
//! succeed cost nothing. So a call of many statements may take its time while the database answers, and is answered
//! within two seconds if it does not, or if other writers hold it up.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Budget of a caller, who is answered within 2 s. The rest is for the work around the store.
const CALLER: Duration = Duration::from_millis(1700);
/// For rounds and sessions, for which no caller waits. Well above our longest statement.
pub(super) const BACKGROUND: Duration = Duration::from_secs(10);
/// Part of a caller's budget that is left for the statements after the permit to write came. Statements that get less
/// would time out on a healthy database.
const STATEMENTS: Duration = Duration::from_millis(500);
/// Shortest deadline of a step, so that the failure can still be recorded.
const LEAST: Duration = Duration::from_millis(50);

tokio::task_local! {
    /// Rest of a caller's budget in microseconds.
    static BUDGET: Arc<AtomicU64>;
}

/// Runs `work` within the budget of a caller.
pub async fn of_caller<T>(work: impl Future<Output = T>) -> T {
    BUDGET.scope(Arc::new(AtomicU64::new(micros(CALLER))), work).await
}

/// Takes the budget of the present task along into another task.
pub fn carried<T>(work: impl Future<Output = T>) -> impl Future<Output = T> {
    // A spawned task does not inherit values of the task that spawns it.
    let budget = BUDGET.try_with(Arc::clone);
    async move {
        match budget {
            Ok(budget) => BUDGET.scope(budget, work).await,
            // The present task has no caller who waits.
            Err(_) => work.await,
        }
    }
}

/// Deadline of the next step.
pub(super) fn next() -> Duration {
    BUDGET.try_with(|left| Duration::from_micros(left.load(Ordering::Relaxed)).max(LEAST)).unwrap_or(BACKGROUND)
}

/// Longest wait for the permit to write.
pub(super) fn of_queue() -> Duration {
    BUDGET
        .try_with(|left| Duration::from_micros(left.load(Ordering::Relaxed)).saturating_sub(STATEMENTS))
        .unwrap_or(BACKGROUND)
}

/// Longest wait of the database for a lock. `None`: the session's own, because no caller waits.
///
/// A third of the budget, so that the database gives up first: one statement may wait twice, in the queue for a row and
/// then for the transaction that holds it, each time this long. A deadline on this side cannot tell a held row from a
/// database that is silent, closes the connection and makes the health service say that writes fail.
pub(super) fn of_locks() -> Option<Duration> {
    BUDGET.try_with(|_| next() / 3).ok()
}

/// Takes the time of a failed step, or of a wait for the permit to write, from the budget.
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
        assert_eq!((next(), of_queue(), of_locks()), (BACKGROUND, BACKGROUND, None));
        of_caller(async {
            assert_eq!((next(), of_queue()), (CALLER, CALLER - STATEMENTS));
            assert!(of_locks().is_some_and(|locks| locks * 2 < CALLER));
            in_vain(Duration::from_millis(700));
            assert_eq!(next(), Duration::from_secs(1));
            tokio::spawn(carried(async { in_vain(Duration::from_secs(9)) })).await.unwrap();
            assert_eq!((next(), of_queue()), (LEAST, Duration::ZERO));
        })
        .await;
    }
}
