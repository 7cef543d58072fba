//! The instants of schedules: which have come, and what became of them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{OperationId, ScheduleId};

use serde::Serialize;

use super::connection::Connection;
use super::operations::{NewOperation, insert_all};
use super::schedules::{ScheduleRow, readable};
use super::sql::{Row, sql};
use super::{Store, StoreError, micros};
use crate::operation::OperationState;
use crate::schedule::{FireOutcome, Overlap};

/// What became of an instant of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FireRow {
    /// The schedule.
    pub schedule: ScheduleId,
    /// The instant.
    pub fire_time: DateTime<Utc>,
    /// What became of it.
    pub outcome: FireOutcome,
    /// Why.
    pub reason: String,
    /// The operation that was made.
    pub operation: Option<OperationId>,
    /// When it was decided.
    pub record_time: DateTime<Utc>,
}

/// An instant of which nothing could become, because deciding about it failed.
#[derive(Debug, Clone)]
pub struct FailedFire {
    /// What is recorded for it.
    pub row: FireRow,
    /// The instant after it; `None`: it cannot be told.
    pub next: Option<DateTime<Utc>>,
    /// Why the schedule is paused for it; `None`: it goes on.
    pub pause: Option<String>,
}

/// The last instant of a schedule of which something became.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastFire {
    /// What became of it.
    pub row: FireRow,
    /// Where the operation is that was made.
    pub operation_state: Option<OperationState>,
}

/// Which fires to list; what is empty does not restrict.
#[derive(Debug, Clone, Default)]
pub struct FireQuery {
    /// Only earlier ones than this.
    pub before: Option<DateTime<Utc>>,
    /// How many at most.
    pub limit: u32,
    /// With one of these outcomes.
    pub outcomes: Vec<FireOutcome>,
}

/// What became of deciding about instants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdvanceOutcome {
    /// Decided, as asked; with the operation that was made, if one was.
    Advanced(Option<OperationId>),
    /// Decided; the operation was not made, because an earlier one is unfinished.
    Overlapped,
    /// Nothing was done: another controller was first, or the schedule was changed.
    Elsewhere,
    /// Nothing was done: an artifact that the operation names was removed meanwhile.
    ArtifactGone,
}

impl Store {
    /// Schedules with an instant that has come, or that comes until then. One whose row this version cannot read is
    /// left out, so that it holds up no other.
    pub async fn schedules_due(&self, until: DateTime<Utc>, limit: u32) -> Result<Vec<ScheduleRow>, StoreError> {
        let rows = sql("SELECT * FROM schedules WHERE next_fire <= ? ORDER BY next_fire, id LIMIT ?")
            .time(until)
            .bind(i64::from(limit))
            .all(self.reader())
            .await?;
        Ok(readable(&rows))
    }

    /// Decides about the instants of a schedule from `seen.next_fire` until before `next`, in one transaction: `rows`
    /// are recorded, and `fire` makes an operation for its instant, unless one of the schedule is unfinished and it
    /// does not queue. Only one caller ever gets to decide about an instant.
    pub async fn advance(
        &self,
        seen: &ScheduleRow,
        rows: &[FireRow],
        fire: Option<(&NewOperation, &FireRow)>,
        next: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
    ) -> Result<AdvanceOutcome, StoreError> {
        self.again(|| self.advance_once(seen, rows, fire, next, now)).await
    }

    async fn advance_once(
        &self,
        seen: &ScheduleRow,
        rows: &[FireRow],
        fire: Option<(&NewOperation, &FireRow)>,
        next: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
    ) -> Result<AdvanceOutcome, StoreError> {
        let last = rows.iter().chain(fire.map(|(_, row)| row)).map(|row| row.fire_time).max();
        let tx = self.begin().await?;
        let moved = sql("UPDATE schedules SET next_fire = ?, last_fire = ?, failures = 0, failure = '' \
                         WHERE id = ? AND revision = ? AND next_fire = ?")
        .bind(next.map(micros))
        .bind(last.or(seen.last_fire).map(micros))
        .bind(seen.id.as_str())
        .bind(seen.revision)
        .bind(seen.next_fire.map(micros))
        .run(&*tx)
        .await?;
        if moved == 0 {
            tx.rollback().await?;
            return Ok(AdvanceOutcome::Elsewhere);
        }
        insert_fires(&*tx, rows).await?;
        let mut outcome = AdvanceOutcome::Advanced(None);
        if let Some((operation, row)) = fire {
            let unfinished = match seen.overlap {
                Overlap::Skip => unfinished(&*tx, &seen.id).await?,
                Overlap::Queue => None,
            };
            if let Some(earlier) = unfinished {
                let reason = format!("operations/{earlier} of this schedule has not ended");
                let skipped = FireRow { outcome: FireOutcome::Skipped, reason, operation: None, ..row.clone() };
                insert_fires(&*tx, &[skipped]).await?;
                outcome = AdvanceOutcome::Overlapped;
            } else if made_before(&*tx, &operation.id, &seen.id).await? {
                // By a row of which the rest was lost; the id follows from the schedule and the instant.
                let fired = FireRow { operation: Some(operation.id.clone()), ..row.clone() };
                insert_fires(&*tx, &[fired]).await?;
            } else {
                match insert_all(&*tx, operation, now).await {
                    Ok(_) => {}
                    Err(error) if error.is_dangling() => {
                        tx.rollback().await?;
                        return Ok(AdvanceOutcome::ArtifactGone);
                    }
                    Err(error) => return Err(error),
                }
                let fired = FireRow { operation: Some(operation.id.clone()), ..row.clone() };
                insert_fires(&*tx, &[fired]).await?;
                outcome = AdvanceOutcome::Advanced(Some(operation.id.clone()));
            }
        }
        self.commit(tx).await?;
        Ok(outcome)
    }

    /// What became of the instants of a schedule, latest first.
    pub async fn fires(&self, schedule: &ScheduleId, query: &FireQuery) -> Result<Vec<FireRow>, StoreError> {
        sql("SELECT * FROM fires WHERE schedule = ? AND fire_time < ? AND (? OR outcome IN {each}) \
             ORDER BY fire_time DESC LIMIT ?")
        .bind(schedule.as_str())
        .bind(query.before.map_or(i64::MAX, micros))
        .bind(query.outcomes.is_empty())
        .each(query.outcomes.iter().map(|outcome| outcome.as_str()))
        .bind(i64::from(query.limit))
        .all(self.reader())
        .await?
        .iter()
        .map(read_fire)
        .collect()
    }

    /// Records that deciding about the instant `seen.next_fire` failed, and pauses the schedule if that is asked for;
    /// false: somebody else decided about it, or the schedule was changed.
    pub async fn fail_fire(
        &self,
        seen: &ScheduleRow,
        failed: &FailedFire,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        self.again(|| self.fail_fire_once(seen, failed, now)).await
    }

    async fn fail_fire_once(
        &self,
        seen: &ScheduleRow,
        failed: &FailedFire,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        let moved = sql("UPDATE schedules SET next_fire = ?, last_fire = ?, failures = failures + 1, failure = ?, \
                         paused = (paused OR ?), pause_reason = CASE WHEN ? THEN ? ELSE pause_reason END, \
                         update_time = ?, revision = revision + 1 \
                         WHERE id = ? AND revision = ? AND next_fire = ?")
        .bind(failed.next.map(micros))
        .time(failed.row.fire_time)
        .bind(failed.row.reason.as_str())
        .bind(failed.pause.is_some())
        .bind(failed.pause.is_some())
        .bind(failed.pause.as_deref().unwrap_or_default())
        .time(now)
        .bind(seen.id.as_str())
        .bind(seen.revision)
        .bind(seen.next_fire.map(micros))
        .run(&*tx)
        .await?;
        if moved == 0 {
            tx.rollback().await?;
            return Ok(false);
        }
        insert_fires(&*tx, std::slice::from_ref(&failed.row)).await?;
        self.commit(tx).await?;
        Ok(true)
    }

    /// Moves the next instant of a schedule that is still to come, because the rules of its zone, or how its expression
    /// is read, are others than when it was stored; false: the schedule was changed meanwhile.
    pub async fn move_next_fire(&self, seen: &ScheduleRow, next: Option<DateTime<Utc>>) -> Result<bool, StoreError> {
        self.again(|| self.move_next_fire_once(seen, next)).await
    }

    async fn move_next_fire_once(&self, seen: &ScheduleRow, next: Option<DateTime<Utc>>) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        let moved = sql("UPDATE schedules SET next_fire = ?, revision = revision + 1 \
                         WHERE id = ? AND revision = ? AND next_fire = ?")
        .bind(next.map(micros))
        .bind(seen.id.as_str())
        .bind(seen.revision)
        .bind(seen.next_fire.map(micros))
        .run(&*tx)
        .await?;
        self.commit(tx).await?;
        Ok(moved == 1)
    }

    /// Of each of these schedules the last instant of which something became.
    pub async fn last_fires(&self, ids: &[ScheduleId]) -> Result<BTreeMap<ScheduleId, LastFire>, StoreError> {
        sql("SELECT f.*, o.state AS operation_state FROM schedules s \
             JOIN fires f ON f.schedule = s.id AND f.fire_time = s.last_fire \
             LEFT JOIN operations o ON o.id = f.operation WHERE s.id IN {each}")
        .each(ids.iter().map(ScheduleId::as_str))
        .all(self.reader())
        .await?
        .iter()
        .map(|row| {
            let operation_state = row.maybe_word("operation_state", OperationState::parse)?;
            let row = read_fire(row)?;
            Ok((row.schedule.clone(), LastFire { row, operation_state }))
        })
        .collect()
    }
}

async fn unfinished(tx: &impl Connection, id: &ScheduleId) -> Result<Option<String>, StoreError> {
    sql("SELECT id FROM operations WHERE schedule = ? AND state IN ('SCHEDULED', 'RUNNING', 'PAUSED', 'CANCELLING') \
         ORDER BY create_time DESC, id DESC LIMIT 1")
    .bind(id.as_str())
    .one(tx)
    .await?
    .map(|row| row.text("id"))
    .transpose()
}

/// Whether the schedule has an operation of this id.
async fn made_before(tx: &impl Connection, operation: &OperationId, schedule: &ScheduleId) -> Result<bool, StoreError> {
    let found = sql("SELECT id FROM operations WHERE id = ? AND schedule = ?")
        .bind(operation.as_str())
        .bind(schedule.as_str())
        .one(tx)
        .await?;
    Ok(found.is_some())
}

/// A row of `{rows ...}`.
#[derive(Serialize)]
struct Recorded<'a> {
    schedule: &'a str,
    fire_time: i64,
    outcome: &'static str,
    reason: &'a str,
    operation: Option<&'a str>,
    record_time: i64,
}

async fn insert_fires(tx: &impl Connection, rows: &[FireRow]) -> Result<(), StoreError> {
    if rows.is_empty() {
        return Ok(());
    }
    let rows: Vec<Recorded<'_>> = rows
        .iter()
        .map(|row| Recorded {
            schedule: row.schedule.as_str(),
            fire_time: micros(row.fire_time),
            outcome: row.outcome.as_str(),
            reason: &row.reason,
            operation: row.operation.as_ref().map(OperationId::as_str),
            record_time: micros(row.record_time),
        })
        .collect();
    sql("INSERT INTO fires (schedule, fire_time, outcome, reason, operation, record_time) \
         SELECT r.schedule, r.fire_time, r.outcome, r.reason, r.operation, r.record_time FROM \
         {rows schedule TEXT, fire_time BIGINT, outcome TEXT, reason TEXT, operation TEXT, record_time BIGINT}")
    .json(&rows)
    .run(tx)
    .await?;
    Ok(())
}

fn read_fire(row: &Row) -> Result<FireRow, StoreError> {
    Ok(FireRow {
        schedule: row.word("schedule", |id| ScheduleId::parse(id).ok())?,
        fire_time: row.time("fire_time")?,
        outcome: row.word("outcome", FireOutcome::parse)?,
        reason: row.text("reason")?,
        operation: row.maybe_word("operation", |id| OperationId::parse(id).ok())?,
        record_time: row.time("record_time")?,
    })
}
