//! Schedules: storing, reading and changing them.

use std::time::Duration;

use chrono::{DateTime, Utc};
use marco_proto::names::ScheduleId;
use serde::{Deserialize, Serialize};

use super::sql::{Row, sql};
use super::{Scope, Store, StoreError, micros};
use crate::operation::{Action, Target};
use crate::rollout::Rollout;
use crate::schedule::{MaintenanceWindow, MissedFire, Overlap};

/// Template of a schedule's operations. It names artifacts and labels, which each fire resolves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// The action, with the names of artifacts.
    pub action: Action,
    /// The target, not resolved.
    pub target: Target,
    /// Pace, and conditions to pause by itself. `None`: all nodes at once.
    #[serde(default)]
    pub rollout: Option<Rollout>,
    /// Times at which nodes may begin. `None`: at any time.
    #[serde(default)]
    pub window: Option<MaintenanceWindow>,
}

/// A stored schedule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduleRow {
    /// Id of the schedule.
    pub id: ScheduleId,
    /// Cron expression.
    pub cron: String,
    /// Name of the time zone for `cron`.
    pub time_zone: String,
    /// Template of its operations.
    pub template: Template,
    /// Policy for fire times that are decided late.
    pub missed_fire: MissedFire,
    /// Policy for a fire time that comes while an operation of the schedule is unfinished.
    pub overlap: Overlap,
    /// Longest delay of a node's begin after the fire time.
    pub jitter: Duration,
    /// Time after the fire in which its operation may begin.
    pub expire_after: Duration,
    /// True: its fire times are skipped.
    pub paused: bool,
    /// Reason of the pause; empty if it is not paused.
    pub pause_reason: String,
    /// Name of the user who created it.
    pub creator: String,
    /// Nodes that every user who created or changed it is limited to.
    pub scope: Scope,
    /// Time of creation.
    pub create_time: DateTime<Utc>,
    /// Time of its last change, pause or resume.
    pub update_time: DateTime<Utc>,
    /// Rises with each change of the row, except a fire that went well. A writer with an old one is refused.
    pub revision: i64,
    /// The first undecided fire time. `None` if there is none, or it cannot be computed.
    pub next_fire: Option<DateTime<Utc>>,
    /// The last decided fire time. `None` before the first.
    pub last_fire: Option<DateTime<Utc>>,
    /// Number of fire times in a row that failed, up to the last one.
    pub failures: u32,
    /// Error of the last fire time; empty if it did not fail.
    pub failure: String,
}

impl Store {
    /// Stores a schedule. Returns false if its id is taken.
    pub async fn create_schedule(&self, new: &ScheduleRow) -> Result<bool, StoreError> {
        self.again(|| self.create_schedule_once(new)).await
    }

    async fn create_schedule_once(&self, new: &ScheduleRow) -> Result<bool, StoreError> {
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
        self.commit_if(inserted == 1, tx).await?;
        Ok(inserted == 1)
    }

    /// Reads one schedule.
    pub async fn schedule(&self, id: &ScheduleId) -> Result<Option<ScheduleRow>, StoreError> {
        let row = sql("SELECT * FROM schedules WHERE id = ?").bind(id.as_str()).one(self.reader()).await?;
        row.as_ref().map(read).transpose()
    }

    /// Schedules in the order of their ids. One whose row this version cannot read is left out.
    pub async fn schedules(&self, after: Option<&ScheduleId>, limit: u32) -> Result<Vec<ScheduleRow>, StoreError> {
        let rows = sql("SELECT * FROM schedules WHERE id > ? ORDER BY id LIMIT ?")
            .bind(after.map_or("", ScheduleId::as_str))
            .bind(i64::from(limit))
            .all(self.reader())
            .await?;
        Ok(readable(&rows))
    }

    /// Changes a schedule, unless it has changed since it was read. Returns false in that case.
    pub async fn update_schedule(&self, row: &ScheduleRow, now: DateTime<Utc>) -> Result<bool, StoreError> {
        self.again(|| self.update_schedule_once(row, now)).await
    }

    async fn update_schedule_once(&self, row: &ScheduleRow, now: DateTime<Utc>) -> Result<bool, StoreError> {
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
        // A change that was read before a fire and written after it must not make that fire time due again: its row
        // exists, so the schedule would stand still.
        .bind(row.last_fire.map_or(-1, micros))
        .run(&*tx)
        .await?;
        self.commit_if(changed == 1, tx).await?;
        Ok(changed == 1)
    }

    /// Pauses a schedule, with a reason. Returns it as it is now, or `None` if there is no such schedule.
    pub async fn pause_schedule(
        &self,
        id: &ScheduleId,
        reason: &str,
        now: DateTime<Utc>,
    ) -> Result<Option<ScheduleRow>, StoreError> {
        self.again(|| self.pause_schedule_once(id, reason, now)).await
    }

    async fn pause_schedule_once(
        &self,
        id: &ScheduleId,
        reason: &str,
        now: DateTime<Utc>,
    ) -> Result<Option<ScheduleRow>, StoreError> {
        let tx = self.begin().await?;
        let changed = sql(
            "UPDATE schedules SET paused = ?, pause_reason = ?, update_time = ?, revision = revision + 1 WHERE id = ?",
        )
        .bind(true)
        .bind(reason)
        .time(now)
        .bind(id.as_str())
        .run(&*tx)
        .await?;
        self.commit_if(changed == 1, tx).await?;
        self.schedule(id).await
    }

    /// Resumes a schedule and forgets its failures. Returns it as it is now. `next` becomes its next fire time if it
    /// has none, because that could not be computed.
    pub async fn resume_schedule(
        &self,
        id: &ScheduleId,
        next: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
    ) -> Result<Option<ScheduleRow>, StoreError> {
        self.again(|| self.resume_schedule_once(id, next, now)).await
    }

    async fn resume_schedule_once(
        &self,
        id: &ScheduleId,
        next: Option<DateTime<Utc>>,
        now: DateTime<Utc>,
    ) -> Result<Option<ScheduleRow>, StoreError> {
        let tx = self.begin().await?;
        // An undecided fire time stays, because a gap between the recorded ones must always mean a defect.
        let changed = sql("UPDATE schedules SET paused = ?, pause_reason = '', failures = 0, failure = '', \
             next_fire = COALESCE(next_fire, CAST(? AS BIGINT)), update_time = ?, revision = revision + 1 WHERE id = ?")
        .bind(false)
        .bind(next.map(micros))
        .time(now)
        .bind(id.as_str())
        .run(&*tx)
        .await?;
        self.commit_if(changed == 1, tx).await?;
        self.schedule(id).await
    }

    /// Deletes a schedule and its fires. Returns false if there is none.
    pub async fn delete_schedule(&self, id: &ScheduleId) -> Result<bool, StoreError> {
        self.again(|| self.delete_schedule_once(id)).await
    }

    async fn delete_schedule_once(&self, id: &ScheduleId) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        // The fires go with it, because a new schedule of the same name would inherit them.
        let deleted = sql("DELETE FROM schedules WHERE id = ?").bind(id.as_str()).run(&*tx).await?;
        self.commit_if(deleted == 1, tx).await?;
        Ok(deleted == 1)
    }
}

fn duration_micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// The rows that this version can read. Others, perhaps of a newer version, must not hold up these.
pub(super) fn readable(rows: &[Row]) -> Vec<ScheduleRow> {
    let read = |row: &Row| match read(row) {
        Ok(schedule) => Some(schedule),
        Err(error) => {
            let schedule = row.text("id").unwrap_or_default();
            tracing::warn!(schedule, error = crate::chain(&error), "a schedule cannot be read");
            None
        }
    };
    rows.iter().filter_map(read).collect()
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
        failures: row.number("failures")?,
        failure: row.text("failure")?,
    })
}
