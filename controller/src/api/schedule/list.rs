//! Lists of schedules and of their past and coming times.

use chrono::DateTime;
use marco_proto::names::ScheduleId;
use marco_proto::v1;

use super::super::status::ApiError;
use super::super::{convert, page};
use super::{Schedules, read, schedule_id, unreadable};
use crate::identity::Caller;
use crate::schedule::{Recurrence, Tzdata};
use crate::store::{FireQuery, ScheduleRow, Scope};

/// Default number of fires in a preview.
const PREVIEW: usize = 10;
/// Largest number of fires in a preview.
const PREVIEW_MAX: usize = 1000;

impl Schedules {
    pub(super) async fn list(
        &self,
        caller: &Caller,
        request: v1::ListSchedulesRequest,
    ) -> Result<v1::ListSchedulesResponse, ApiError> {
        const LIST: &str = "schedules";
        let size = page::size(request.page_size)?;
        let after = match page::after(LIST, &request.page_token)? {
            Some(id) => Some(schedule_id("page_token", &id)?),
            None => None,
        };
        let rows = self.visible(&caller.scope(), after, size + 1).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |row| row.id.as_str().to_owned());
        let ids: Vec<ScheduleId> = rows.iter().map(|row| row.id.clone()).collect();
        let last = self.context.store.last_fires(&ids).await?;
        let shown = |row: &ScheduleRow| v1::Schedule {
            last_fire: last.get(&row.id).map(convert::last_fire),
            ..convert::schedule(row)
        };
        Ok(v1::ListSchedulesResponse { schedules: rows.iter().map(shown).collect(), next_page_token })
    }

    /// Schedules by id: as many as asked for, of those that the caller may see.
    async fn visible(
        &self,
        scope: &Scope,
        mut after: Option<ScheduleId>,
        limit: u32,
    ) -> Result<Vec<ScheduleRow>, ApiError> {
        let limit_reached = |rows: &Vec<ScheduleRow>| rows.len() >= usize::try_from(limit).unwrap_or(usize::MAX);
        let mut rows = Vec::new();
        // The reach of a schedule depends on its template and on today's nodes, which no query can express. So pages
        // are read until enough rows are visible.
        loop {
            let page = self.context.store.schedules(after.as_ref(), limit).await?;
            let Some(last) = page.last().map(|row| row.id.clone()) else { return Ok(rows) };
            for row in page {
                rows.extend(self.context.visible_schedule(scope, row).await?);
                if limit_reached(&rows) {
                    return Ok(rows);
                }
            }
            after = Some(last);
        }
    }

    pub(super) async fn list_fires(
        &self,
        caller: &Caller,
        request: v1::ListFiresRequest,
    ) -> Result<v1::ListFiresResponse, ApiError> {
        const LIST: &str = "fires";
        let parent = schedule_id("parent", &request.parent)?;
        let size = page::size(request.page_size)?;
        let damaged = || ApiError::invalid("page_token", "is damaged");
        // A schedule has one row for each time, so the time is the key of a page.
        let before = match page::after(LIST, &request.page_token)? {
            Some(micros) => {
                let micros = micros.parse().map_err(|_| damaged())?;
                Some(DateTime::from_timestamp_micros(micros).ok_or_else(damaged)?)
            }
            None => None,
        };
        let outcomes = request
            .filter
            .unwrap_or_default()
            .outcomes
            .iter()
            .map(|outcome| {
                convert::fire_outcome(*outcome)
                    .ok_or_else(|| ApiError::invalid("filter.outcomes", "has an unknown outcome"))
            })
            .collect::<Result<Vec<_>, _>>()?;
        self.to_read(caller, &parent).await?;
        let rows = self.context.store.fires(&parent, &FireQuery { before, limit: size + 1, outcomes }).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |row| row.fire_time.timestamp_micros().to_string());
        Ok(v1::ListFiresResponse { fires: rows.iter().map(convert::fire).collect(), next_page_token })
    }

    pub(super) async fn preview(
        &self,
        caller: &Caller,
        request: v1::PreviewScheduleRequest,
    ) -> Result<v1::PreviewScheduleResponse, ApiError> {
        let recurrence = match request.name.as_str() {
            "" => read::recurrence("", &request.cron, &request.time_zone).map_err(ApiError::Invalid)?,
            // A name with an expression could mean either.
            name if request.cron.is_empty() && request.time_zone.is_empty() => {
                let row = self.to_read(caller, &schedule_id("name", name)?).await?;
                Recurrence::parse(&row.cron, &row.time_zone).map_err(|error| unreadable(&row, &error))?
            }
            _ => return Err(ApiError::invalid("cron", "stands beside a name; give one of the two")),
        };
        let count = match usize::try_from(request.count) {
            Ok(0) => PREVIEW,
            Ok(count) => count.min(PREVIEW_MAX),
            Err(_) => return Err(ApiError::invalid("count", "must not be negative")),
        };
        let from = match request.from {
            None => self.context.clock.now(),
            Some(from) => {
                let mut wrong = None;
                let read = convert::time(Some(from), "from", &mut |_, why| wrong = Some(why));
                read.ok_or_else(|| ApiError::invalid("from", wrong.unwrap_or_default()))?
            }
        };
        // An empty list would look like a success.
        if recurrence.next_after(from).is_none() {
            let why = format!("{:?} never fires after {}: no date matches it", recurrence.cron(), from.to_rfc3339());
            return Err(ApiError::invalid("cron", why));
        }
        let fires = recurrence.fires_after(from).take(count).map(|fire| v1::ComingFire {
            fire_time: Some(convert::timestamp(fire)),
            local_time: recurrence.local(fire).to_rfc3339(),
            utc_time: fire.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
        });
        Ok(v1::PreviewScheduleResponse {
            fires: fires.collect(),
            cron_in_words: recurrence.words(),
            time_zone: recurrence.zone().name().to_owned(),
            tzdata_version: Tzdata::of_process().to_string(),
        })
    }
}
