//! `ScheduleService`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{OperationId, ScheduleId};
use marco_proto::v1;
use marco_proto::v1::schedule_service_server::ScheduleService;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::operation::{Operations, request_key};
use super::scope::outside;
use super::status::ApiError;
use super::{Context, caller, convert, page};
use crate::identity::Caller;
use crate::operation::{Action, Target};
use crate::schedule::{Recurrence, jitter};
use crate::store::{FireQuery, NewOperation, OperationRow, Origin, RequestKey, ScheduleRow, Scope};

mod change;
mod read;

/// Fires that a preview shows unless it says how many.
const PREVIEW: usize = 10;
/// Most fires that a preview shows.
const PREVIEW_MAX: usize = 1000;

/// The service.
pub(super) struct Schedules {
    context: Context,
}

/// Makes the operation of a schedule for an instant, to begin at a time: targets are resolved, and artifacts frozen, now.
///
/// # Errors
/// When the template cannot be carried out now, or the store does not answer.
pub async fn prepare_fire(
    context: Context,
    schedule: ScheduleRow,
    fire_time: DateTime<Utc>,
    begins: DateTime<Utc>,
) -> Result<NewOperation, ApiError> {
    let scope = schedule.scope.clone();
    Schedules::new(context).prepare(&schedule, Some(fire_time), begins, &schedule.creator, scope, None).await
}

impl Schedules {
    pub(super) fn new(context: Context) -> Self {
        Self { context }
    }

    async fn prepare(
        &self,
        schedule: &ScheduleRow,
        fire_time: Option<DateTime<Utc>>,
        begins: DateTime<Utc>,
        creator: &str,
        scope: Scope,
        request: Option<RequestKey>,
    ) -> Result<NewOperation, ApiError> {
        let operations = Operations::new(self.context.clone());
        let targets = operations.resolve(&schedule.template.target, &scope).await?;
        let mut action = schedule.template.action.clone();
        if let Action::Update(update) = &mut action {
            operations.freeze(update, &targets.families).await?;
        }
        let most = chrono::TimeDelta::from_std(schedule.jitter).unwrap_or_default();
        let start = |node: &str| begins + jitter(schedule.id.as_str(), node, most);
        let starts = match fire_time {
            Some(_) if !most.is_zero() => targets.ids.iter().map(|id| (id.clone(), start(id.as_str()))).collect(),
            _ => BTreeMap::new(),
        };
        // What may begin only in a window has its time from the first opening on.
        let window = schedule.template.window.as_ref();
        let opens = window.and_then(|window| window.closed_until(begins)).unwrap_or(begins);
        let id =
            OperationId::parse(&Uuid::now_v7().to_string()).map_err(|error| ApiError::Internal(error.to_string()))?;
        Ok(NewOperation {
            id,
            action,
            target: schedule.template.target.clone(),
            nodes: targets.ids,
            schedule_time: begins,
            expire_time: opens + schedule.expire_after,
            creator: creator.to_owned(),
            request,
            retry_of: None,
            rollout: schedule.template.rollout.clone(),
            window: schedule.template.window.clone(),
            scope,
            origin: Some(Origin { schedule: schedule.id.clone(), fire_time, starts }),
        })
    }

    async fn find(&self, id: &ScheduleId) -> Result<ScheduleRow, ApiError> {
        self.context.store.schedule(id).await?.ok_or_else(|| not_found(id))
    }

    async fn create(&self, caller: &Caller, request: v1::CreateScheduleRequest) -> Result<ScheduleRow, ApiError> {
        let now = self.context.clock.now();
        let row = ScheduleRow { scope: caller.scope(), ..read::new(request, &caller.name, now)? };
        self.stays_within(caller, &row).await?;
        if !self.context.store.create_schedule(&row).await? {
            return Err(ApiError::AlreadyExists {
                reason: "SCHEDULE_EXISTS",
                message: format!("there is {} already; `marcoctl schedules get {}` shows it", row.id.name(), row.id),
            });
        }
        self.find(&row.id).await
    }

    /// Refuses a list of nodes with one outside, as creating an operation does. What labels match is limited at each fire.
    async fn stays_within(&self, caller: &Caller, row: &ScheduleRow) -> Result<(), ApiError> {
        let scope = caller.scope();
        match &row.template.target {
            Target::Nodes(names) if !scope.is_everything() => {
                if self.context.are_within(&scope, names).await? {
                    Ok(())
                } else {
                    Err(outside(&scope))
                }
            }
            _ => Ok(()),
        }
    }

    async fn to_steer(&self, caller: &Caller, id: &ScheduleId) -> Result<ScheduleRow, ApiError> {
        self.context.schedule_to_steer(caller, id).await?.ok_or_else(|| not_found(id))
    }

    async fn to_read(&self, caller: &Caller, id: &ScheduleId) -> Result<ScheduleRow, ApiError> {
        caller.note_target(&id.name());
        let scope = caller.scope();
        let visible = match self.context.store.schedule(id).await? {
            Some(row) => self.context.visible_schedule(&scope, row).await?,
            None => None,
        };
        visible.ok_or_else(|| if scope.is_everything() { not_found(id) } else { outside(&scope) })
    }

    async fn set_paused(&self, caller: &Caller, name: &str, paused: Option<&str>) -> Result<ScheduleRow, ApiError> {
        let id = schedule_id("name", name)?;
        if let Some(reason) = paused {
            convert::text("reason", reason)?;
        }
        self.to_steer(caller, &id).await?;
        self.context
            .store
            .set_schedule_paused(&id, paused, self.context.clock.now())
            .await?
            .ok_or_else(|| not_found(&id))
    }

    async fn delete(&self, caller: &Caller, name: &str) -> Result<v1::DeleteScheduleResponse, ApiError> {
        let id = schedule_id("name", name)?;
        self.to_steer(caller, &id).await?;
        match self.context.store.delete_schedule(&id).await? {
            true => Ok(v1::DeleteScheduleResponse {}),
            false => Err(not_found(&id)),
        }
    }

    async fn run(&self, caller: &Caller, request: v1::RunScheduleRequest) -> Result<OperationRow, ApiError> {
        let now = self.context.clock.now();
        let id = schedule_id("name", &request.name)?;
        let schedule = self.to_steer(caller, &id).await?;
        let scope = schedule.scope.and(&caller.scope()).ok_or_else(|| outside(&caller.scope()))?;
        let key = request_key(&request.request_id, &[b"run", id.as_str().as_bytes()])?;
        let new = self.prepare(&schedule, None, now, &caller.name, scope, key).await?;
        Operations::new(self.context.clone()).stored(&new, now).await
    }

    async fn list(
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
        Ok(v1::ListSchedulesResponse { schedules: rows.iter().map(convert::schedule).collect(), next_page_token })
    }

    /// Schedules by id, as many as asked for of those that may be seen.
    async fn visible(
        &self,
        scope: &Scope,
        mut after: Option<ScheduleId>,
        limit: u32,
    ) -> Result<Vec<ScheduleRow>, ApiError> {
        let limit_reached = |rows: &Vec<ScheduleRow>| rows.len() >= usize::try_from(limit).unwrap_or(usize::MAX);
        let mut rows = Vec::new();
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

    async fn list_fires(
        &self,
        caller: &Caller,
        request: v1::ListFiresRequest,
    ) -> Result<v1::ListFiresResponse, ApiError> {
        const LIST: &str = "fires";
        let parent = schedule_id("parent", &request.parent)?;
        let size = page::size(request.page_size)?;
        let damaged = || ApiError::invalid("page_token", "is damaged");
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

    async fn preview(
        &self,
        caller: &Caller,
        request: v1::PreviewScheduleRequest,
    ) -> Result<v1::PreviewScheduleResponse, ApiError> {
        let recurrence = match request.name.as_str() {
            "" => read::recurrence("", &request.cron, &request.time_zone).map_err(ApiError::Invalid)?,
            name if request.cron.is_empty() && request.time_zone.is_empty() => {
                let row = self.to_read(caller, &schedule_id("name", name)?).await?;
                Recurrence::parse(&row.cron, &row.time_zone).map_err(|error| ApiError::Internal(error.to_string()))?
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
        let fires = recurrence.fires_after(from).take(count).map(|fire| v1::ComingFire {
            fire_time: Some(convert::timestamp(fire)),
            local_time: recurrence.local(fire).to_rfc3339(),
            utc_time: fire.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
        });
        Ok(v1::PreviewScheduleResponse { fires: fires.collect() })
    }
}

fn schedule_id(field: &str, name: &str) -> Result<ScheduleId, ApiError> {
    ScheduleId::parse(name).map_err(|error| ApiError::invalid(field, error.to_string()))
}

fn not_found(id: &ScheduleId) -> ApiError {
    ApiError::NotFound {
        reason: "SCHEDULE_NOT_FOUND",
        message: format!("there is no {}; `marcoctl schedules list` shows those that exist", id.name()),
    }
}

#[tonic::async_trait]
impl ScheduleService for Schedules {
    async fn create_schedule(
        &self,
        request: Request<v1::CreateScheduleRequest>,
    ) -> Result<Response<v1::Schedule>, Status> {
        let caller = caller(&request)?;
        let result = self.create(&caller, request.into_inner()).await;
        let target = result.as_ref().map(|row| row.id.name()).unwrap_or_default();
        self.context.audit(&caller, "CreateSchedule", &target, &result).await;
        Ok(Response::new(convert::schedule(&result?)))
    }

    async fn get_schedule(&self, request: Request<v1::GetScheduleRequest>) -> Result<Response<v1::Schedule>, Status> {
        let caller = caller(&request)?;
        let id = schedule_id("name", &request.get_ref().name)?;
        Ok(Response::new(convert::schedule(&self.to_read(&caller, &id).await?)))
    }

    async fn list_schedules(
        &self,
        request: Request<v1::ListSchedulesRequest>,
    ) -> Result<Response<v1::ListSchedulesResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(self.list(&caller, request.into_inner()).await?))
    }

    async fn update_schedule(
        &self,
        request: Request<v1::UpdateScheduleRequest>,
    ) -> Result<Response<v1::Schedule>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let target = request.schedule.as_ref().map(|schedule| schedule.name.clone()).unwrap_or_default();
        let result = self.update(&caller, request).await;
        self.context.audit(&caller, "UpdateSchedule", &target, &result).await;
        Ok(Response::new(convert::schedule(&result?)))
    }

    async fn delete_schedule(
        &self,
        request: Request<v1::DeleteScheduleRequest>,
    ) -> Result<Response<v1::DeleteScheduleResponse>, Status> {
        let caller = caller(&request)?;
        let name = request.into_inner().name;
        let result = self.delete(&caller, &name).await;
        self.context.audit(&caller, "DeleteSchedule", &name, &result).await;
        Ok(Response::new(result?))
    }

    async fn pause_schedule(
        &self,
        request: Request<v1::PauseScheduleRequest>,
    ) -> Result<Response<v1::Schedule>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let result = self.set_paused(&caller, &request.name, Some(&request.reason)).await;
        self.context.audit(&caller, "PauseSchedule", &request.name, &result).await;
        Ok(Response::new(convert::schedule(&result?)))
    }

    async fn resume_schedule(
        &self,
        request: Request<v1::ResumeScheduleRequest>,
    ) -> Result<Response<v1::Schedule>, Status> {
        let caller = caller(&request)?;
        let name = request.into_inner().name;
        let result = self.set_paused(&caller, &name, None).await;
        self.context.audit(&caller, "ResumeSchedule", &name, &result).await;
        Ok(Response::new(convert::schedule(&result?)))
    }

    async fn run_schedule(&self, request: Request<v1::RunScheduleRequest>) -> Result<Response<v1::Operation>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let name = request.name.clone();
        let result = self.run(&caller, request).await;
        self.context.audit(&caller, "RunSchedule", &name, &result).await;
        Ok(Response::new(convert::operation(&result?)))
    }

    async fn preview_schedule(
        &self,
        request: Request<v1::PreviewScheduleRequest>,
    ) -> Result<Response<v1::PreviewScheduleResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(self.preview(&caller, request.into_inner()).await?))
    }

    async fn list_fires(
        &self,
        request: Request<v1::ListFiresRequest>,
    ) -> Result<Response<v1::ListFiresResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(self.list_fires(&caller, request.into_inner()).await?))
    }
}
