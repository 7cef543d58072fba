//! Owns tokio-cron-scheduler, which only wakes recurring work. The store tells which work is due.

#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tokio_cron_scheduler::{Job, JobScheduler, JobSchedulerError};
use tokio_util::sync::CancellationToken;

mod fires;

pub use fires::{Fires, Prepare, Preparing, Unprepared};

/// Recurring work; it reports its own errors.
pub type Work = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// Recurring work with its times.
pub struct Recurring {
    /// Cron expression with seconds, in UTC.
    pub cron: &'static str,
    /// The work.
    pub work: Work,
}

/// Runs recurring work, and the fires of schedules, until cancelled.
///
/// # Errors
/// Returns an error if the scheduler cannot start, or if an expression is wrong.
pub async fn run(jobs: Vec<Recurring>, fires: Option<Fires>, stop: CancellationToken) -> Result<(), JobSchedulerError> {
    let mut scheduler = JobScheduler::new().await?;
    for job in jobs {
        scheduler.add(Job::new_async(job.cron, move |_, _| (job.work)())?).await?;
    }
    scheduler.start().await?;
    if let Some(fires) = fires {
        fires.run(&scheduler, stop.clone()).await;
    }
    stop.cancelled().await;
    scheduler.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::{Recurring, run};
    use std::sync::Arc;
    use std::time::Duration;
    use tokio_util::sync::CancellationToken;

    #[tokio::test]
    async fn recurring_work_recurs_until_it_is_stopped() {
        let stop = CancellationToken::new();
        let (sender, mut receiver) = tokio::sync::mpsc::channel(8);
        let work = Arc::new(move || -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
            let sender = sender.clone();
            Box::pin(async move {
                let _ = sender.try_send(());
            })
        });
        let task = tokio::spawn(run(vec![Recurring { cron: "* * * * * *", work }], None, stop.clone()));
        for _ in 0..2 {
            tokio::time::timeout(Duration::from_secs(10), receiver.recv()).await.expect("it did not recur");
        }
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(10), task).await.expect("it did not stop").unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_wrong_expression_is_an_error() {
        let jobs = vec![Recurring { cron: "never", work: Arc::new(|| Box::pin(async {})) }];
        assert!(run(jobs, None, CancellationToken::new()).await.is_err());
    }
}
