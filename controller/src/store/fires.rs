//! Fire times of schedules: those that are due, and their outcomes.

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

/// Outcome of one fire time of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FireRow {
    /// The schedule.
    pub schedule: ScheduleId,
    /// The fire time.
    pub fire_time: DateTime<Utc>,
    /// The outcome.
    pub outcome: FireOutcome,
    /// Reason for the outcome.
    pub reason: String,
    /// The operation that was created, if any.
    pub operation: Option<OperationId>,
    /// Time of the decision.
    pub record_time: DateTime<Utc>,
}

/// A fire time about which deciding failed.
#[derive(Debug, Clone)]
pub struct FailedFire {
    /// The row to record for it.
    pub row: FireRow,
    /// The next fire time. `None` if it cannot be computed.
    pub next: Option<DateTime<Utc>>,
    /// Reason to pause the schedule. `None`: it goes on.
    pub pause: Option<String>,
}

/// The last decided fire time of a schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastFire {
    /// Its outcome.
    pub row: FireRow,
    /// State of the operation that was created, if any.
    pub operation_state: Option<OperationState>,
}

/// Filter for a list of fires. An empty field does not restrict.
#[derive(Debug, Clone, Default)]
pub struct FireQuery {
    /// Only earlier fire times than this one, for the next page.
    pub before: Option<DateTime<Utc>>,
    /// Largest number of rows.
    pub limit: u32,
    /// Only fires with one of these outcomes.
    pub outcomes: Vec<FireOutcome>,
}

/// Result of deciding about fire times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdvanceOutcome {
    /// Decided, as asked. Contains the operation, if one was created.
    Advanced(Option<OperationId>),
    /// Decided. No operation was created, because an earlier one is unfinished.
    Overlapped,
    /// Nothing was written: another controller was first, or the schedule was changed.
    Elsewhere,
    /// Nothing was written: an artifact that the operation names was deleted in the meantime.
    ArtifactGone,
}

impl Store {
    /// Schedules with a fire time at `until` or before. A schedule whose row this version cannot read is left out, so
    /// that it holds up no other.
    pub async fn schedules_due(&self, until: DateTime<Utc>, limit: u32) -> Result<Vec<ScheduleRow>, StoreError> {
        let rows = sql("SELECT * FROM schedules WHERE next_fire <= ? ORDER BY next_fire, id LIMIT ?")
            .time(until)
            .bind(i64::from(limit))
            .all(self.reader())
            .await?;
        Ok(readable(&rows))
    }

    /// Decides about the fire times of a schedule from `seen.next_fire` until before `next`, in one transaction. `rows`
    /// are recorded. `fire` creates an operation for its fire time, unless the schedule has an unfinished one and does
    /// not queue. Only one caller ever decides about a fire time.
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
        // The condition on `next_fire` makes one controller win. The others change no row.
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
        // Skipped and missed fire times get a row too, so a gap in the rows always means a defect.
        insert_fires(&*tx, rows).await?;
        let mut outcome = AdvanceOutcome::Advanced(None);
        if let Some((operation, row)) = fire {
            // The UPDATE above locks the schedule, so no other controller can create an operation of it in between.
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
                // An earlier decision created it, and the rest of that was lost. Its id follows from the schedule and
                // the fire time.
                let fired = FireRow { operation: Some(operation.id.clone()), ..row.clone() };
                insert_fires(&*tx, &[fired]).await?;
            } else {
                match insert_all(&*tx, operation, now).await {
                    Ok(_) => {}
                    // The bytes were deleted after the artifact's name was resolved.
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

    /// Decided fire times of a schedule, latest first.
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

    /// Records that deciding about `seen.next_fire` failed, and pauses the schedule if `failed.pause` says so. Returns
    /// false if another caller decided about it, or the schedule was changed.
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
        // `next_fire` moves on although nothing was decided, so that one bad fire time does not block the schedule.
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

    /// Moves the next fire time of a schedule, which is still ahead. The rules of its time zone, or the reading of its
    /// expression, changed since it was stored. Returns false if the schedule was changed in the meantime.
    pub async fn move_next_fire(&self, seen: &ScheduleRow, next: Option<DateTime<Utc>>) -> Result<bool, StoreError> {
        self.again(|| self.move_next_fire_once(seen, next)).await
    }

    async fn move_next_fire_once(&self, seen: &ScheduleRow, next: Option<DateTime<Utc>>) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        // A fire time computed under the old rules of its zone would still fire once under them.
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

    /// The last decided fire time of each of these schedules.
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

/// True if the schedule has an operation with this id.
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
