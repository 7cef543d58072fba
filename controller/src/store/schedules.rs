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
    /// How many instants in a row failed until the last one.
    pub failures: u32,
    /// Why the last one failed; empty: it did not.
    pub failure: String,
}

impl Store {
    /// Stores a schedule; false when its id is taken.
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

    /// One schedule.
    pub async fn schedule(&self, id: &ScheduleId) -> Result<Option<ScheduleRow>, StoreError> {
        let row = sql("SELECT * FROM schedules WHERE id = ?").bind(id.as_str()).one(self.reader()).await?;
        row.as_ref().map(read).transpose()
    }

    /// Schedules by id. One whose row this version cannot read is left out.
    pub async fn schedules(&self, after: Option<&ScheduleId>, limit: u32) -> Result<Vec<ScheduleRow>, StoreError> {
        let rows = sql("SELECT * FROM schedules WHERE id > ? ORDER BY id LIMIT ?")
            .bind(after.map_or("", ScheduleId::as_str))
            .bind(i64::from(limit))
            .all(self.reader())
            .await?;
        Ok(readable(&rows))
    }

    /// Changes what recurs and when, unless the schedule has changed since it was read; false when it has.
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
        // What the scheduler decided meanwhile must not be due again.
        .bind(row.last_fire.map_or(-1, micros))
        .run(&*tx)
        .await?;
        self.commit_if(changed == 1, tx).await?;
        Ok(changed == 1)
    }

    /// Pauses a schedule, with a reason; the schedule as it is now.
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

    /// Lets a schedule go on, and forgets that it failed; the schedule as it is now. `next` is its next instant if it has
    /// none, because it could not be told.
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

    /// Removes a schedule and its fires; false when there is none.
    pub async fn delete_schedule(&self, id: &ScheduleId) -> Result<bool, StoreError> {
        self.again(|| self.delete_schedule_once(id)).await
    }

    async fn delete_schedule_once(&self, id: &ScheduleId) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        let deleted = sql("DELETE FROM schedules WHERE id = ?").bind(id.as_str()).run(&*tx).await?;
        self.commit_if(deleted == 1, tx).await?;
        Ok(deleted == 1)
    }
}

fn duration_micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// Those of the rows that this version can read: the others, of a newer one perhaps, hold up nothing.
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
