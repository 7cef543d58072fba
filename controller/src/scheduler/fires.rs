//! Creates operations at the times of schedules. Any number of controllers may try; the store lets one of them do it.
//!
//! A schedule that fails does not affect the others. Its time is recorded with the error, even after a panic, and after
//! a few failures in a row it is paused.

use std::any::Any;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::FutureExt as _;
use marco_proto::names::ScheduleId;
use tokio::sync::Notify;
use tokio_cron_scheduler::{Job, JobScheduler};
use tokio_util::sync::CancellationToken;

use crate::calendar::later;
use crate::clock::Clock;
use crate::schedule::{FireOutcome, MissedFire, Recurrence};
use crate::store::{AdvanceOutcome, FailedFire, FireRow, NewOperation, ScheduleRow, Store, StoreError};
use crate::watchdog::Pulse;

/// Longest time between two rounds; a wake-up makes the next one earlier.
const TICK: Duration = Duration::from_secs(1);
/// Horizon of wake-ups: times further away get none yet.
const WAKE_AHEAD: TimeDelta = TimeDelta::seconds(60);
/// Most schedules handled in one round, and most wake-ups ordered.
const AT_ONCE: u32 = 1000;
/// Failures in a row after which a schedule is paused.
const FAILURES: u32 = 3;
/// Longest stored text of a failure, in characters.
const FAILURE_TEXT: usize = 500;
/// Largest number of rows that one catch-up writes.
const LISTED: usize = 1000;
/// Interval at which a store that does not answer is logged again.
const COMPLAIN: Duration = Duration::from_secs(60);

/// The reason why no operation could be prepared.
#[derive(Debug)]
pub enum Unprepared {
    /// The template cannot be carried out now: no node matches, or an artifact is gone.
    Refused(String),
    /// The store does not answer; the next round tries again.
    Store(StoreError),
}

/// The operation of a fire, being prepared.
pub type Preparing = Pin<Box<dyn Future<Output = Result<NewOperation, Unprepared>> + Send>>;

/// Resolves targets and freezes artifacts: prepares a schedule's operation for a scheduled time, with the time at which
/// it begins.
pub type Prepare = Arc<dyn Fn(ScheduleRow, DateTime<Utc>, DateTime<Utc>) -> Preparing + Send + Sync>;

/// Finds times that have come, and creates the operations that are due.
pub struct Fires {
    store: Store,
    clock: Arc<dyn Clock>,
    prepare: Prepare,
    patience: TimeDelta,
    pulse: Pulse,
}

/// A decision about some times, which is stored in one transaction.
struct Step {
    rows: Vec<FireRow>,
    fire: Option<(DateTime<Utc>, String)>,
    next: Option<DateTime<Utc>>,
}

impl Fires {
    /// Times that are noticed later than `patience` are missed.
    pub fn new(store: Store, clock: Arc<dyn Clock>, prepare: Prepare, patience: TimeDelta) -> Self {
        Self { store, clock, prepare, patience, pulse: Pulse::new("scheduler") }
    }

    /// Reports rounds to a watchdog.
    #[must_use]
    pub fn watched(self, pulse: Pulse) -> Self {
        Self { pulse, ..self }
    }

    /// Runs rounds until cancelled. Each near time gets a one-shot job in `jobs`, which only wakes this loop.
    pub(super) async fn run(&self, jobs: &JobScheduler, stop: CancellationToken) {
        let wake = Arc::new(Notify::new());
        let mut ordered = BTreeSet::new();
        let mut complained = None::<tokio::time::Instant>;
        let mut aimed = false;
        loop {
            if !aimed {
                aimed = self.aim().await.is_ok();
            }
            let done = self.tick(jobs, &wake, &mut ordered).await;
            self.pulse.beat(&done);
            match done {
                Ok(()) => complained = None,
                Err(error) if complained.is_none_or(|last| last.elapsed() >= COMPLAIN) => {
                    tracing::error!(error = &*crate::chain(&error), "a round of the scheduler failed");
                    complained = Some(tokio::time::Instant::now());
                }
                Err(_) => {}
            }
            // Each arm only wakes. A lost wake-up is made good by the next tick.
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(TICK) => {}
                () = wake.notified() => {}
            }
        }
    }

    async fn tick(
        &self,
        jobs: &JobScheduler,
        wake: &Arc<Notify>,
        ordered: &mut BTreeSet<(DateTime<Utc>, ScheduleId)>,
    ) -> Result<(), StoreError> {
        let now = self.now().await?;
        self.round(now).await?;
        ordered.retain(|(at, _)| *at > now);
        for row in self.store.schedules_due(later(now, WAKE_AHEAD), AT_ONCE).await? {
            let Some(at) = row.next_fire.filter(|at| *at > now) else { continue };
            let Ok(until) = at.signed_duration_since(now).to_std() else { continue };
            // Each round sees the same near times again.
            if !ordered.insert((at, row.id)) {
                continue;
            }
            let wake = Arc::clone(wake);
            let job = Job::new_one_shot_async(until, move |_, _| {
                let wake = Arc::clone(&wake);
                Box::pin(async move { wake.notify_one() })
            });
            // Without the wake-up the next tick finds the time.
            let added = match job {
                Ok(job) => jobs.add(job).await.map(|_| ()),
                Err(error) => Err(error),
            };
            if let Err(error) = added {
                tracing::debug!(error = &*crate::chain(&error), "a wake-up could not be ordered");
            }
        }
        Ok(())
    }

    /// The database's time if it has one, so that a controller with a wrong clock is neither late nor early.
    ///
    /// # Errors
    /// Returns the store's error.
    pub async fn now(&self) -> Result<DateTime<Utc>, StoreError> {
        Ok(self.store.database_time().await?.unwrap_or_else(|| self.clock.now()))
    }

    /// One round: decides about every time until `now`. Public, so that tests can step through time.
    ///
    /// # Errors
    /// Returns the store's error. Decisions before it stay, and the next round goes on.
    #[tracing::instrument(level = "debug", skip_all, name = "fires")]
    pub async fn round(&self, now: DateTime<Utc>) -> Result<(), StoreError> {
        let mut failed = Ok(());
        for schedule in self.store.schedules_due(now, AT_ONCE).await? {
            let id = schedule.id.clone();
            // A defect in one schedule must not stop the others, nor end this controller.
            let decided = match AssertUnwindSafe(self.decide(schedule, now)).catch_unwind().await {
                Ok(Ok(())) => continue,
                // Without the database nothing can be decided. A single row that cannot be decided must not hold up the
                // others.
                Ok(Err(error @ StoreError::Unavailable(_))) => return Err(error),
                Ok(Err(error)) => self.failed(&id, &crate::chain(&error), now).await.and(Err(error)),
                Err(panic) => self.failed(&id, &format!("a defect: {}", said(&*panic)), now).await,
            };
            failed = failed.and(decided);
        }
        failed
    }

    /// Records that the first undecided time of a schedule failed.
    async fn failed(&self, id: &ScheduleId, why: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
        let why: String = why.chars().take(FAILURE_TEXT).collect();
        tracing::error!(schedule = %id, why, "a schedule failed");
        // Decisions before the failure stay.
        let Some(seen) = self.store.schedule(id).await? else { return Ok(()) };
        let Some(at) = seen.next_fire.filter(|at| *at <= now) else { return Ok(()) };
        // The walk to the next time may be the very thing that panics.
        let next = std::panic::catch_unwind(|| {
            Recurrence::parse(&seen.cron, &seen.time_zone).ok().and_then(|recurrence| recurrence.next_after(at))
        });
        let count = seen.failures.saturating_add(1);
        let pause = match next {
            Ok(Some(_)) if count < FAILURES => None,
            Ok(Some(_)) => Some(format!("it failed {count} times in a row, last: {why}")),
            Ok(None) | Err(_) => Some(format!("its next instant cannot be told: {why}")),
        };
        if let Some(reason) = &pause {
            tracing::error!(schedule = %id, reason, "a schedule is paused because it failed");
        }
        let row = record(&seen, at, FireOutcome::Skipped, format!("it failed: {why}"), now);
        let failed = FailedFire { row, next: next.ok().flatten(), pause };
        self.store.fail_fire(&seen, &failed, now).await.map(|_| ())
    }

    /// Calculates the next time of every schedule again. This release may read an expression differently, or have other
    /// zone rules, than the one that stored it.
    ///
    /// # Errors
    /// Returns the store's error.
    pub async fn aim(&self) -> Result<(), StoreError> {
        let now = self.now().await?;
        let mut last = None;
        loop {
            let page = self.store.schedules(last.as_ref(), AT_ONCE).await?;
            let Some(end) = page.last().map(|row| row.id.clone()) else { return Ok(()) };
            for schedule in page {
                // A time that has come is decided as it was stored; only coming ones move.
                let Some(stored) = schedule.next_fire.filter(|stored| *stored > now) else { continue };
                // Never before the last outcome: a time stored under old rules would fire once more.
                let after = schedule.last_fire.map_or(now, |last| last.max(now));
                let next = std::panic::catch_unwind(|| {
                    Recurrence::parse(&schedule.cron, &schedule.time_zone)
                        .map(|recurrence| recurrence.next_after(after))
                });
                // A schedule that cannot be read fails at its next time, with a record.
                let Ok(Ok(Some(next))) = next else { continue };
                if next != stored && self.store.move_next_fire(&schedule, Some(next)).await? {
                    tracing::warn!(schedule = %schedule.id, %stored, %next, "the coming instant of a schedule moved");
                }
            }
            last = Some(end);
        }
    }

    async fn decide(&self, mut schedule: ScheduleRow, now: DateTime<Utc>) -> Result<(), StoreError> {
        let Some(first) = schedule.next_fire else { return Ok(()) };
        let recurrence = match Recurrence::parse(&schedule.cron, &schedule.time_zone) {
            Ok(recurrence) => recurrence,
            Err(error) => {
                let why = format!("{error}; `marcoctl schedules update` gives it another");
                return self.failed(&schedule.id, &why, now).await;
            }
        };
        for step in steps(&schedule, &recurrence, first, now, self.patience) {
            let next = step.next;
            let last = step.fire.as_ref().map(|(at, _)| *at).or(step.rows.last().map(|row| row.fire_time));
            if !self.take(&schedule, step, now).await? {
                return Ok(());
            }
            // The next step is conditional on the row as this one left it.
            schedule.next_fire = next;
            schedule.last_fire = last.or(schedule.last_fire);
        }
        Ok(())
    }

    /// Takes a step; false: another controller did.
    async fn take(&self, schedule: &ScheduleRow, step: Step, now: DateTime<Utc>) -> Result<bool, StoreError> {
        let Step { mut rows, fire, next } = step;
        let Some((at, reason)) = fire else {
            return Ok(self.store.advance(schedule, &rows, None, next, now).await? != AdvanceOutcome::Elsewhere);
        };
        // A fire that is made up for begins now; a timely one begins at its own time.
        let begins = if reason.is_empty() { at } else { now };
        let refused = match (self.prepare)(schedule.clone(), at, begins).await {
            Ok(operation) => {
                let row = record(schedule, at, FireOutcome::Fired, reason, now);
                match self.store.advance(schedule, &rows, Some((&operation, &row)), next, now).await? {
                    AdvanceOutcome::Advanced(made) => {
                        if let Some(operation) = made {
                            tracing::info!(schedule = %schedule.id, %operation, fire_time = %at, "a schedule fired");
                        }
                        return Ok(true);
                    }
                    AdvanceOutcome::Overlapped => {
                        tracing::info!(schedule = %schedule.id, fire_time = %at, "a fire was skipped: overlap");
                        return Ok(true);
                    }
                    AdvanceOutcome::Elsewhere => return Ok(false),
                    AdvanceOutcome::ArtifactGone => "an artifact of the template was deleted just now".to_owned(),
                }
            }
            Err(Unprepared::Refused(reason)) => reason,
            Err(Unprepared::Store(error)) => return Err(error),
        };
        tracing::warn!(schedule = %schedule.id, fire_time = %at, reason = refused, "a fire was skipped");
        rows.push(record(schedule, at, FireOutcome::Skipped, refused, now));
        Ok(self.store.advance(schedule, &rows, None, next, now).await? != AdvanceOutcome::Elsewhere)
    }
}

/// Decisions about the times from `first` until `now`.
fn steps(
    schedule: &ScheduleRow,
    recurrence: &Recurrence,
    first: DateTime<Utc>,
    now: DateTime<Utc>,
    patience: TimeDelta,
) -> Vec<Step> {
    let due = recurrence.due(first, now, patience, LISTED);
    let row = |at: DateTime<Utc>, outcome, reason| record(schedule, at, outcome, reason, now);
    let mut rows: Vec<FireRow> = due
        .late
        .iter()
        .map(|at| match paused(schedule) {
            Some(reason) => row(*at, FireOutcome::Skipped, reason),
            None => row(*at, FireOutcome::Missed, format!("found {} late", span(now.signed_duration_since(*at)))),
        })
        .collect();
    if due.unlisted > 0
        && let Some(last) = rows.last_mut()
    {
        let more = if due.uncounted { "more than " } else { "" };
        let _ = write!(last.reason, "; so were {more}{} before it that are not listed", due.unlisted);
    }
    if let Some(reason) = paused(schedule) {
        rows.extend(due.timely.iter().map(|at| row(*at, FireOutcome::Skipped, reason.clone())));
        return vec![Step { rows, fire: None, next: due.next }];
    }
    // Only without a timely one: otherwise the make-up and the timely fire would come at once.
    if due.timely.is_empty() {
        let last = if schedule.missed_fire == MissedFire::Once { rows.pop() } else { None };
        let fire = last.map(|last| (last.fire_time, format!("made up for: {}", last.reason)));
        return vec![Step { rows, fire, next: due.next }];
    }
    let nexts = due.timely.iter().skip(1).copied().map(Some).chain([due.next]);
    due.timely
        .iter()
        .zip(nexts)
        .map(|(at, next)| Step { rows: std::mem::take(&mut rows), fire: Some((*at, String::new())), next })
        .collect()
}

/// The text of a panic.
fn said(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it said nothing")
}

/// The reason for skipped times; `None`: the schedule is not paused.
fn paused(schedule: &ScheduleRow) -> Option<String> {
    schedule.paused.then(|| match schedule.pause_reason.as_str() {
        "" => "the schedule was paused".to_owned(),
        reason => format!("the schedule was paused: {reason}"),
    })
}

fn record(
    schedule: &ScheduleRow,
    fire_time: DateTime<Utc>,
    outcome: FireOutcome,
    reason: String,
    now: DateTime<Utc>,
) -> FireRow {
    FireRow { schedule: schedule.id.clone(), fire_time, outcome, reason, operation: None, record_time: now }
}

/// A length of time in whole seconds, for people.
fn span(length: TimeDelta) -> String {
    humantime::format_duration(Duration::from_secs(u64::try_from(length.num_seconds()).unwrap_or(0))).to_string()
}

#[cfg(test)]
mod tests;
