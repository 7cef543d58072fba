//! Schedules, and what became of their instants.

use std::time::Duration;

use chrono::{DateTime, Utc};
use marco_proto::names::{OperationId, ScheduleId};

use serde::{Deserialize, Serialize};

use super::connection::Connection;
use super::operations::{NewOperation, insert_all};
use super::sql::{Row, sql};
use super::{Scope, Store, StoreError, micros};
use crate::operation::{Action, Target};
use crate::rollout::Rollout;
use crate::schedule::MaintenanceWindow;
use crate::schedule::{FireOutcome, MissedFire, Overlap};

/// What each fire makes an operation of: names, not yet resolved and frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// What to do.
    pub action: Action,
    /// On which nodes.
    pub target: Target,
    /// How each operation goes over its nodes.
    #[serde(default)]
    pub rollout: Option<Rollout>,
    /// When nodes may be begun.
    #[serde(default)]
    pub window: Option<MaintenanceWindow>,
}

/// A stored schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduleRow {
    /// Its id.
    pub id: ScheduleId,
    /// When.
    pub cron: String,
    /// In which time zone.
    pub time_zone: String,
    /// What.
    pub template: Template,
    /// What is done about late instants.
    pub missed_fire: MissedFire,
    /// What is done about an instant while an operation of it is unfinished.
    pub overlap: Overlap,
    /// How much later than the fire a node begins at most.
    pub jitter: Duration,
    /// How long after the fire its operation may be begun.
    pub expire_after: Duration,
    /// Its instants are skipped.
    pub paused: bool,
    /// Why.
    pub pause_reason: String,
    /// Who made it.
    pub creator: String,
    /// The nodes that whoever made or changed it is limited to.
    pub scope: Scope,
    /// When it was stored.
    pub create_time: DateTime<Utc>,
    /// When it was last changed, paused or resumed.
    pub update_time: DateTime<Utc>,
    /// Another one after each of these.
    pub revision: i64,
    /// The first instant of which nothing has become yet.
    pub next_fire: Option<DateTime<Utc>>,
    /// The last of which something has.
    pub last_fire: Option<DateTime<Utc>>,
}

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
    /// Stores a schedule; false when its id is taken.
    pub async fn create_schedule(&self, new: &ScheduleRow) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        let inserted = sql("INSERT INTO schedules (id, cron, time_zone, template, missed_fire, overlap, jitter, \
             expire_after, paused, pause_reason, creator, scope, create_time, update_time, next_fire) \
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING")
        .bind(new.id.as_str())
        .bind(new.cron.as_str())
        .bind(new.time_zone.as_str())
        .json(&new.template)
        .bind(new.missed_fire.as_str())
        .bind(new.overlap.as_str())
        .bind(duration_micros(new.jitter))
        .bind(duration_micros(new.expire_after))
        .bind(new.paused)
        .bind(new.pause_reason.as_str())
        .bind(new.creator.as_str())
        .json(&new.scope)
        .time(new.create_time)
        .time(new.update_time)
        .bind(new.next_fire.map(micros))
        .run(&*tx)
        .await?;
        self.commit(tx).await?;
        Ok(inserted == 1)
    }

    /// One schedule.
    pub async fn schedule(&self, id: &ScheduleId) -> Result<Option<ScheduleRow>, StoreError> {
        let row = sql("SELECT * FROM schedules WHERE id = ?").bind(id.as_str()).one(self.reader()).await?;
        row.as_ref().map(read).transpose()
    }

    /// Schedules by id.
    pub async fn schedules(&self, after: Option<&ScheduleId>, limit: u32) -> Result<Vec<ScheduleRow>, StoreError> {
        sql("SELECT * FROM schedules WHERE id > ? ORDER BY id LIMIT ?")
            .bind(after.map_or("", ScheduleId::as_str))
            .bind(i64::from(limit))
            .all(self.reader())
            .await?
            .iter()
            .map(read)
            .collect()
    }

    /// Changes what recurs and when, unless the schedule has changed since it was read; false when it has.
    pub async fn update_schedule(&self, row: &ScheduleRow, now: DateTime<Utc>) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        let changed = sql("UPDATE schedules SET cron = ?, time_zone = ?, template = ?, missed_fire = ?, overlap = ?, \
             jitter = ?, expire_after = ?, scope = ?, next_fire = ?, update_time = ?, revision = revision + 1 \
             WHERE id = ? AND revision = ? AND COALESCE(last_fire, -1) = ?")
        .bind(row.cron.as_str())
        .bind(row.time_zone.as_str())
        .json(&row.template)
        .bind(row.missed_fire.as_str())
        .bind(row.overlap.as_str())
        .bind(duration_micros(row.jitter))
        .bind(duration_micros(row.expire_after))
        .json(&row.scope)
        .bind(row.next_fire.map(micros))
        .time(now)
        .bind(row.id.as_str())
        .bind(row.revision)
        // What the scheduler decided meanwhile must not be due again.
        .bind(row.last_fire.map_or(-1, micros))
        .run(&*tx)
        .await?;
        self.commit(tx).await?;
        Ok(changed == 1)
    }

    /// Pauses a schedule, with a reason, or lets it go on; the schedule as it is now.
    pub async fn set_schedule_paused(
        &self,
        id: &ScheduleId,
        paused: Option<&str>,
        now: DateTime<Utc>,
    ) -> Result<Option<ScheduleRow>, StoreError> {
        let tx = self.begin().await?;
        sql("UPDATE schedules SET paused = ?, pause_reason = ?, update_time = ?, revision = revision + 1 WHERE id = ?")
            .bind(paused.is_some())
            .bind(paused.unwrap_or_default())
            .time(now)
            .bind(id.as_str())
            .run(&*tx)
            .await?;
        self.commit(tx).await?;
        self.schedule(id).await
    }

    /// Removes a schedule and its fires; false when there is none.
    pub async fn delete_schedule(&self, id: &ScheduleId) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        let deleted = sql("DELETE FROM schedules WHERE id = ?").bind(id.as_str()).run(&*tx).await?;
        self.commit(tx).await?;
        Ok(deleted == 1)
    }

    /// Schedules with an instant that has come, or that comes until then.
    pub async fn schedules_due(&self, until: DateTime<Utc>, limit: u32) -> Result<Vec<ScheduleRow>, StoreError> {
        sql("SELECT * FROM schedules WHERE next_fire <= ? ORDER BY next_fire, id LIMIT ?")
            .time(until)
            .bind(i64::from(limit))
            .all(self.reader())
            .await?
            .iter()
            .map(read)
            .collect()
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
        let last = rows.iter().chain(fire.map(|(_, row)| row)).map(|row| row.fire_time).max();
        let tx = self.begin().await?;
        let moved = sql("UPDATE schedules SET next_fire = ?, last_fire = ? \
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
}

async fn unfinished(tx: &impl Connection, id: &ScheduleId) -> Result<Option<String>, StoreError> {
    sql("SELECT id FROM operations WHERE schedule = ? AND state IN ('SCHEDULED', 'RUNNING', 'PAUSED', 'CANCELLING') \
         ORDER BY id DESC LIMIT 1")
    .bind(id.as_str())
    .one(tx)
    .await?
    .map(|row| row.text("id"))
    .transpose()
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

fn duration_micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

fn read(row: &Row) -> Result<ScheduleRow, StoreError> {
    Ok(ScheduleRow {
        id: row.word("id", |id| ScheduleId::parse(id).ok())?,
        cron: row.text("cron")?,
        time_zone: row.text("time_zone")?,
        template: row.json("template")?,
        missed_fire: row.word("missed_fire", MissedFire::parse)?,
        overlap: row.word("overlap", Overlap::parse)?,
        jitter: Duration::from_micros(row.number("jitter")?),
        expire_after: Duration::from_micros(row.number("expire_after")?),
        paused: row.flag("paused")?,
        pause_reason: row.text("pause_reason")?,
        creator: row.text("creator")?,
        scope: row.json("scope")?,
        create_time: row.time("create_time")?,
        update_time: row.time("update_time")?,
        revision: row.int("revision")?,
        next_fire: row.maybe_time("next_fire")?,
        last_fire: row.maybe_time("last_fire")?,
    })
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
