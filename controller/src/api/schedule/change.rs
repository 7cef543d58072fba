//! Changes of a schedule while it may fire.

use std::time::Duration;

use chrono::{DateTime, Utc};
use marco_proto::names::ScheduleId;
use marco_proto::v1;

use super::super::scope::outside;
use super::super::status::ApiError;
use super::{Schedules, not_stored, read, schedule_id};
use crate::identity::Caller;
use crate::store::ScheduleRow;

/// Time for which a change waits for the scheduler to decide about a time that has come.
const DECIDED_WITHIN: Duration = Duration::from_secs(3);
/// Interval of the checks during that wait.
const DECIDED_AGAIN: Duration = Duration::from_millis(50);
/// Number of tries if fires come in between.
const CHANGE_TRIES: u32 = 5;

impl Schedules {
    pub(super) async fn update(
        &self,
        caller: &Caller,
        request: v1::UpdateScheduleRequest,
    ) -> Result<v1::Schedule, ApiError> {
        let mut now = self.context.clock.now();
        let asked = request.schedule.ok_or_else(|| ApiError::invalid("schedule", "is missing"))?;
        let id = schedule_id("schedule.name", &asked.name)?;
        let paths = request.update_mask.map(|mask| mask.paths).unwrap_or_default();
        self.to_steer(caller, &id).await?;
        let mut old = self.find_decided(&id, now).await?;
        for _ in 0..CHANGE_TRIES {
            let mut new = read::changed(&old, asked.clone(), &paths, now)?;
            // The narrower of both scopes: a change must not give the schedule nodes that its maker or the caller may
            // not reach.
            new.scope = old.scope.and(&caller.scope()).ok_or_else(|| outside(&caller.scope()))?;
            self.stays_within(caller, &new).await?;
            let doubts = self.doubts(&new, now).await?;
            if request.validate_only {
                return Ok(not_stored(&new, doubts));
            }
            // Conditional on the revision that was read; a fire or another change in between makes it fail.
            if self.context.store.update_schedule(&new, now).await? {
                return Ok(v1::Schedule { doubts, ..self.shown(&self.find(&id).await?).await? });
            }
            let revision = old.revision;
            // A fire in between is no reason to trouble the caller.
            now = self.context.clock.now();
            old = self.find_decided(&id, now).await?;
            // Another caller changed it: the change must not be applied to a schedule that this caller has not seen.
            if old.revision != revision {
                break;
            }
        }
        Err(ApiError::Aborted {
            reason: "CHANGED_MEANWHILE",
            message: format!("{} was changed by somebody else just now; look at it and try again", id.name()),
        })
    }

    /// The schedule, after every time until `now` has an outcome. The scheduler decides within a moment after a time
    /// has come. If the times changed in that moment, it would get no row.
    async fn find_decided(&self, id: &ScheduleId, now: DateTime<Utc>) -> Result<ScheduleRow, ApiError> {
        let given_up = tokio::time::Instant::now() + DECIDED_WITHIN;
        loop {
            let row = self.find(id).await?;
            if row.next_fire.is_none_or(|next| next > now) {
                return Ok(row);
            }
            if tokio::time::Instant::now() > given_up {
                return Err(ApiError::Aborted {
                    reason: "FIRE_UNDECIDED",
                    message: format!("{} is firing at this moment; try again in a few seconds", id.name()),
                });
            }
            tokio::time::sleep(DECIDED_AGAIN).await;
        }
    }
}
