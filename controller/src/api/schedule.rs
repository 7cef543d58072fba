//! `ScheduleService`.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{OperationId, ScheduleId};
use marco_proto::v1;
use marco_proto::v1::schedule_service_server::ScheduleService;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::operation::{Operations, must_open, request_key};
use super::scope::outside;
use super::status::ApiError;
use super::{Context, caller, convert};
use crate::calendar::{delta, later};
use crate::identity::Caller;
use crate::operation::{Action, Target};
use crate::schedule::{Recurrence, RecurrenceError, jitter, operation_uuid};
use crate::store::{NewOperation, OperationRow, Origin, RequestKey, ScheduleRow, Scope};

mod change;
mod doubts;
mod list;
mod read;

/// The service.
pub(super) struct Schedules {
    context: Context,
}

/// Builds the operation of a schedule for one of its times, with the time at which it begins. Targets are resolved and
/// artifacts frozen now.
///
/// # Errors
/// Returns an error if the template cannot be carried out now, or if the store does not answer.
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
        let window = schedule.template.window.as_ref();
        // Releases before this check stored windows that never open.
        must_open(window, begins)?;
        let operations = Operations::new(self.context.clone());
        let targets = operations.resolve(&schedule.template.target, &scope).await?;
        let mut action = schedule.template.action.clone();
        if let Action::Update(update) = &mut action {
            let facts = operations.freeze(update, &targets.families).await?;
            targets.startable(&action, facts.as_ref())?;
        }
        let most = delta(schedule.jitter);
        let start = |node: &str| later(begins, jitter(schedule.id.as_str(), node, most));
        // A manual run begins at once on every node.
        let starts = match fire_time {
            Some(_) if !most.is_zero() => targets.ids.iter().map(|id| (id.clone(), start(id.as_str()))).collect(),
            _ => BTreeMap::new(),
        };
        // With a window the lifetime counts from its first opening.
        let opens = window.and_then(|window| window.closed_until(begins)).unwrap_or(begins);
        let id = match fire_time {
            // The id is derived, so that a database that lost the operation creates the same one again.
            Some(instant) => operation_uuid(schedule.id.as_str(), schedule.create_time, instant),
            None => Uuid::now_v7(),
        };
        let id = OperationId::parse(&id.to_string()).map_err(|error| ApiError::Internal(error.to_string()))?;
        Ok(NewOperation {
            id,
            action,
            target: schedule.template.target.clone(),
            nodes: targets.ids,
            schedule_time: begins,
            expire_time: later(opens, delta(schedule.expire_after)),
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

    async fn create(&self, caller: &Caller, request: v1::CreateScheduleRequest) -> Result<v1::Schedule, ApiError> {
        let now = self.context.clock.now();
        let validate_only = request.validate_only;
        // The scope of today is kept with the schedule: its fires must not reach further than its creator may.
        let row = ScheduleRow { scope: caller.scope(), ..read::new(request, &caller.name, now)? };
        self.stays_within(caller, &row).await?;
        let exists = || ApiError::AlreadyExists {
            reason: "SCHEDULE_EXISTS",
            message: format!("there is {} already; `marcoctl schedules get {}` shows it", row.id.name(), row.id),
        };
        let doubts = self.doubts(&row, now).await?;
        if validate_only {
            // A dry run must get the answer of the real call.
            return match self.context.store.schedule(&row.id).await? {
                Some(_) => Err(exists()),
                None => Ok(not_stored(&row, doubts)),
            };
        }
        caller.note_target(&row.id.name());
        if !self.context.store.create_schedule(&row).await? {
            return Err(exists());
        }
        Ok(v1::Schedule { doubts, ..convert::schedule(&self.find(&row.id).await?) })
    }

    /// The schedule with the outcome of its last time.
    async fn shown(&self, row: &ScheduleRow) -> Result<v1::Schedule, ApiError> {
        let last = self.context.store.last_fires(std::slice::from_ref(&row.id)).await?;
        Ok(v1::Schedule { last_fire: last.get(&row.id).map(convert::last_fire), ..convert::schedule(row) })
    }

    /// Returns an error for a list with a node outside the scope, like the creation of an operation. Labels are limited
    /// at each fire.
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

    async fn pause(&self, caller: &Caller, name: &str, reason: &str) -> Result<ScheduleRow, ApiError> {
        let id = schedule_id("name", name)?;
        convert::text("reason", reason)?;
        self.to_steer(caller, &id).await?;
        let paused = self.context.store.pause_schedule(&id, reason, self.context.clock.now()).await?;
        paused.ok_or_else(|| not_found(&id))
    }

    /// Resumes a schedule. If the controller paused it because its next time was unknown, that time is looked for
    /// again.
    async fn resume(&self, caller: &Caller, name: &str) -> Result<ScheduleRow, ApiError> {
        let now = self.context.clock.now();
        let id = schedule_id("name", name)?;
        let row = self.to_steer(caller, &id).await?;
        let next = match row.next_fire {
            Some(_) => None,
            None => Some(next_of(&row, now)?),
        };
        self.context.store.resume_schedule(&id, next, now).await?.ok_or_else(|| not_found(&id))
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
        let operations = Operations::new(self.context.clone());
        let key = request_key(&request.request_id, &[b"run", id.as_str().as_bytes()])?;
        // Before the schedule is looked up, which may have been removed since the first call.
        if let Some(row) = operations.asked_before(caller, key.as_ref()).await? {
            return Ok(row);
        }
        let schedule = self.to_steer(caller, &id).await?;
        // The narrower of both scopes: a run must reach no node that its caller or the schedule's creator may not.
        let scope = schedule.scope.and(&caller.scope()).ok_or_else(|| outside(&caller.scope()))?;
        let new = self.prepare(&schedule, None, now, &caller.name, scope, key).await?;
        operations.stored(&new, now).await
    }
}

fn schedule_id(field: &str, name: &str) -> Result<ScheduleId, ApiError> {
    ScheduleId::parse(name).map_err(|error| ApiError::invalid(field, error.to_string()))
}

/// The schedule as it would be stored.
fn not_stored(row: &ScheduleRow, doubts: Vec<String>) -> v1::Schedule {
    v1::Schedule { doubts, create_time: None, update_time: None, ..convert::schedule(row) }
}

/// The next time of a schedule that has none.
fn next_of(row: &ScheduleRow, now: DateTime<Utc>) -> Result<DateTime<Utc>, ApiError> {
    let after = row.last_fire.map_or(now, |last| last.max(now));
    let recurrence = Recurrence::parse(&row.cron, &row.time_zone);
    recurrence.and_then(|recurrence| recurrence.must_fire(after)).map_err(|error| unreadable(row, &error))
}

fn unreadable(row: &ScheduleRow, error: &RecurrenceError) -> ApiError {
    ApiError::Precondition {
        reason: "SCHEDULE_UNREADABLE",
        message: format!(
            "{} cannot fire: {error}; `marcoctl schedules update {}` gives it another",
            row.id.name(),
            row.id
        ),
    }
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
        let validate_only = request.get_ref().validate_only;
        let result = self.create(&caller, request.into_inner()).await;
        let target = result.as_ref().map(|schedule| schedule.name.clone()).unwrap_or_default();
        if !validate_only {
            self.context.audit(&caller, "CreateSchedule", &target, &result).await;
        }
        Ok(Response::new(result?))
    }

    async fn get_schedule(&self, request: Request<v1::GetScheduleRequest>) -> Result<Response<v1::Schedule>, Status> {
        let caller = caller(&request)?;
        let id = schedule_id("name", &request.get_ref().name)?;
        let row = self.to_read(&caller, &id).await?;
        Ok(Response::new(self.shown(&row).await?))
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
        let validate_only = request.validate_only;
        let result = self.update(&caller, request).await;
        if !validate_only {
            self.context.audit(&caller, "UpdateSchedule", &target, &result).await;
        }
        Ok(Response::new(result?))
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
        let result = self.pause(&caller, &request.name, &request.reason).await;
        self.context.audit(&caller, "PauseSchedule", &request.name, &result).await;
        Ok(Response::new(convert::schedule(&result?)))
    }

    async fn resume_schedule(
        &self,
        request: Request<v1::ResumeScheduleRequest>,
    ) -> Result<Response<v1::Schedule>, Status> {
        let caller = caller(&request)?;
        let name = request.into_inner().name;
        let result = self.resume(&caller, &name).await;
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
