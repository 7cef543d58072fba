//! `OperationService`.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId, OperationId};
use marco_proto::v1;
use marco_proto::v1::operation_service_server::OperationService;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::status::ApiError;
use super::{Context, caller, convert, remedy, watch};
use crate::identity::Caller;
use crate::operation::{Action, ExecutionState, Target, WaitReason};
use crate::rollout::Rollout;
use crate::schedule::MaintenanceWindow;
use crate::store::{AbandonOutcome, CreateOutcome, ExecutionRow, NewOperation, OperationRow, RequestKey, SteerOutcome};

mod check;
mod create;
mod list;

use create::default_expiry;
use create::written;
pub(super) use create::{must_open, read, request_key};

/// The service.
pub(super) struct Operations {
    context: Context,
}

impl Operations {
    pub(super) fn new(context: Context) -> Self {
        Self { context }
    }

    async fn create(&self, caller: &Caller, request: v1::CreateOperationRequest) -> Result<OperationRow, ApiError> {
        let now = self.context.clock.now();
        let written = written(request, now)?;
        if let Some(row) = self.asked_before(caller, written.request.as_ref()).await? {
            return Ok(row);
        }
        let asked = written.at(now)?;
        let nodes = self.resolve(&asked.target, &caller.scope()).await?;
        let mut action = asked.action;
        if let Action::Update(update) = &mut action {
            let facts = self.freeze(update, &nodes.families).await?;
            nodes.startable(&action, facts.as_ref())?;
        }
        self.store_new(
            caller,
            action,
            asked.target,
            nodes.ids,
            asked.schedule_time,
            asked.expire_time,
            asked.request,
            None,
            asked.rollout,
            asked.window,
            now,
        )
        .await
    }

    #[allow(clippy::too_many_arguments, reason = "the columns of one row, named where they are read")]
    async fn store_new(
        &self,
        caller: &Caller,
        action: Action,
        target: Target,
        nodes: Vec<NodeId>,
        schedule_time: DateTime<Utc>,
        expire_time: DateTime<Utc>,
        request: Option<RequestKey>,
        retry_of: Option<OperationId>,
        rollout: Option<Rollout>,
        window: Option<MaintenanceWindow>,
        now: DateTime<Utc>,
    ) -> Result<OperationRow, ApiError> {
        let id =
            OperationId::parse(&Uuid::now_v7().to_string()).map_err(|error| ApiError::Internal(error.to_string()))?;
        // A retry has the retried operation as its target in the audit.
        if retry_of.is_none() {
            caller.note_target(&id.name());
        }
        let new = NewOperation {
            id,
            action,
            target,
            nodes,
            schedule_time,
            expire_time,
            creator: caller.name.clone(),
            request,
            retry_of,
            origin: None,
            rollout,
            window,
            scope: caller.scope(),
        };
        self.stored(&new, now).await
    }

    /// Stores an operation, or returns the one that the same request stored before.
    pub(in crate::api) async fn stored(
        &self,
        new: &NewOperation,
        now: DateTime<Utc>,
    ) -> Result<OperationRow, ApiError> {
        match self.context.store.create_operation(new, now).await? {
            CreateOutcome::Created(row) => {
                tracing::info!(operation = %row.id, "an operation was stored");
                Ok(row)
            }
            CreateOutcome::Existing(row) => Ok(row),
            CreateOutcome::ArtifactGone => Err(ApiError::NotFound {
                reason: "ARTIFACT_NOT_FOUND",
                message: "an artifact that the operation names was deleted just now".to_owned(),
            }),
            CreateOutcome::RequestReused => Err(reused()),
        }
    }

    /// The operation that an earlier request of the caller with this key created. Every call with a `request_id` asks
    /// this first: times that have passed and names that were removed since must not hide the first result.
    pub(in crate::api) async fn asked_before(
        &self,
        caller: &Caller,
        key: Option<&RequestKey>,
    ) -> Result<Option<OperationRow>, ApiError> {
        let Some(key) = key else { return Ok(None) };
        match self.context.store.requested(&caller.name, key).await? {
            None => Ok(None),
            // The caller's scope may be narrower now.
            Some(CreateOutcome::Existing(row)) => self.context.operation_for(caller, &row.id).await.map(Some),
            Some(_) => Err(reused()),
        }
    }

    async fn retry(&self, caller: &Caller, request: v1::RetryOperationRequest) -> Result<OperationRow, ApiError> {
        let now = self.context.clock.now();
        let id = operation_id("name", &request.name)?;
        // The verb is part of the key, so that one id cannot mean a creation and a retry.
        let key = request_key(&request.request_id, &[b"retry", id.as_str().as_bytes()])?;
        if let Some(row) = self.asked_before(caller, key.as_ref()).await? {
            return Ok(row);
        }
        self.context.may_steer(caller, &id).await?;
        let old = self.find(&id).await?;
        // Otherwise two operations would work on the same nodes.
        if !old.state.is_final() {
            return Err(ApiError::Precondition {
                reason: "NOT_FINISHED",
                message: format!("{} is {}; only a finished operation can be retried", id.name(), old.state.as_str()),
            });
        }
        let unsuccessful =
            [ExecutionState::Failed, ExecutionState::RolledBack, ExecutionState::Cancelled, ExecutionState::Expired];
        let rows = self.context.store.executions(&id, None, u32::MAX, &unsuccessful).await?;
        let hopeless = |row: &ExecutionRow| remedy::is_hopeless(row.state, row.error.as_ref(), &old.action);
        if let Some(first) = rows.first().filter(|_| rows.iter().all(hopeless)) {
            return Err(remedy::no_retry(&self.context, first, rows.len(), &old.action).await?);
        }
        let mut nodes: Vec<NodeId> = rows.into_iter().filter(|row| !hopeless(row)).map(|row| row.id.node).collect();
        // Nodes may have been deleted since.
        let known: BTreeSet<NodeId> =
            self.context.store.nodes_by_id(&nodes).await?.into_iter().map(|row| row.id).collect();
        nodes.retain(|node| known.contains(node));
        if nodes.is_empty() {
            return Err(ApiError::Precondition {
                reason: "NOTHING_TO_RETRY",
                message: format!("every node of {} that still exists succeeded", id.name()),
            });
        }
        must_open(old.window.as_ref(), now)?;
        // By name: labels may match other nodes today.
        let target = Target::Nodes(nodes.iter().map(|node| node.as_str().to_owned()).collect());
        self.store_new(
            caller,
            old.action,
            target,
            nodes,
            now,
            default_expiry(old.window.as_ref(), now),
            key,
            Some(id),
            old.rollout,
            old.window,
            now,
        )
        .await
    }

    async fn find(&self, id: &OperationId) -> Result<OperationRow, ApiError> {
        self.context.store.operation(id).await?.ok_or_else(|| operation_not_found(id))
    }

    fn steered(outcome: SteerOutcome, id: &OperationId, what: &str) -> Result<OperationRow, ApiError> {
        match outcome {
            // A repeated call is no error: the operation is as the caller wants it.
            SteerOutcome::Changed(row) | SteerOutcome::Unchanged(row) => Ok(row),
            SteerOutcome::Refused(row) => Err(ApiError::Precondition {
                reason: "WRONG_STATE",
                message: format!("{} is {} and cannot be {what}", id.name(), row.state.as_str()),
            }),
            SteerOutcome::NotFound => Err(operation_not_found(id)),
        }
    }

    /// An execution that the caller may see.
    async fn find_execution(&self, caller: &Caller, id: &ExecutionId) -> Result<ExecutionRow, ApiError> {
        // The node decides, because an operation may be partly outside the scope.
        if !caller.scope().is_everything() {
            self.context.node_for(caller, &id.node).await?;
        }
        self.context.store.execution(id).await?.ok_or_else(|| execution_not_found(id))
    }

    async fn log(&self, caller: &Caller, name: &str) -> Result<v1::ExecutionLog, ApiError> {
        let id = execution_id(name)?;
        let state = self.find_execution(caller, &id).await?.state;
        let found = self.context.store.execution_log(&id).await?;
        found.map(|row| convert::execution_log(&id, row)).ok_or_else(|| ApiError::NotFound {
            reason: "NO_LOG",
            message: format!(
                "there is no log of {id}, which is {}: a node sends one when it ends FAILED or ROLLED_BACK, if it has one, \
                 and it is removed together with the operation's events",
                state.as_str()
            ),
        })
    }

    async fn abandon(&self, caller: &Caller, name: &str) -> Result<ExecutionRow, ApiError> {
        let id = execution_id(name)?;
        self.context.may_steer(caller, &id.operation).await?;
        match self.context.store.abandon(&id, &caller.name, self.context.clock.now()).await? {
            AbandonOutcome::Abandoned(row) => Ok(row),
            // A node within its deadline may still succeed.
            AbandonOutcome::NotOverdue(row) | AbandonOutcome::Final(row) => Err(ApiError::Precondition {
                reason: "NOT_OVERDUE",
                message: format!(
                    "{id} is {}; only one that is overdue, or at work in its installer, can be abandoned",
                    row.state.as_str()
                ),
            }),
            AbandonOutcome::NotFound => Err(execution_not_found(&id)),
        }
    }
}

fn reused() -> ApiError {
    ApiError::AlreadyExists {
        reason: "REQUEST_ID_REUSED",
        message: "request_id was used before for a different operation; choose a new one".to_owned(),
    }
}

pub(super) fn operation_id(field: &str, name: &str) -> Result<OperationId, ApiError> {
    OperationId::parse(name).map_err(|error| ApiError::invalid(field, error.to_string()))
}

fn execution_id(name: &str) -> Result<ExecutionId, ApiError> {
    ExecutionId::parse(name).map_err(|error| ApiError::invalid("name", error.to_string()))
}

pub(super) fn operation_not_found(id: &OperationId) -> ApiError {
    ApiError::NotFound {
        reason: "OPERATION_NOT_FOUND",
        message: format!("there is no {}; `marcoctl operations list` shows those that exist", id.name()),
    }
}

fn execution_not_found(id: &ExecutionId) -> ApiError {
    ApiError::NotFound {
        reason: "EXECUTION_NOT_FOUND",
        message: format!("there is no {id}; `marcoctl operations get` shows an operation's executions"),
    }
}

#[tonic::async_trait]
impl OperationService for Operations {
    async fn create_operation(
        &self,
        request: Request<v1::CreateOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let caller = caller(&request)?;
        let result = self.create(&caller, request.into_inner()).await;
        let target = result.as_ref().map(|row| row.id.name()).unwrap_or_default();
        self.context.audit(&caller, "CreateOperation", &target, &result).await;
        Ok(Response::new(convert::operation(&result?)))
    }

    async fn check_operation(
        &self,
        request: Request<v1::CheckOperationRequest>,
    ) -> Result<Response<v1::CheckOperationResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(self.check(&caller, request.into_inner()).await?))
    }

    async fn get_operation(
        &self,
        request: Request<v1::GetOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let caller = caller(&request)?;
        let id = operation_id("name", &request.get_ref().name)?;
        Ok(Response::new(convert::operation(&self.context.operation_for(&caller, &id).await?)))
    }

    async fn list_operations(
        &self,
        request: Request<v1::ListOperationsRequest>,
    ) -> Result<Response<v1::ListOperationsResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(self.list(&caller, request.into_inner()).await?))
    }

    async fn cancel_operation(
        &self,
        request: Request<v1::CancelOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let caller = caller(&request)?;
        let id = operation_id("name", &request.get_ref().name)?;
        self.context.may_steer(&caller, &id).await?;
        let outcome = self.context.store.request_cancel(&id, &caller.name, self.context.clock.now()).await;
        let result = outcome.map_err(ApiError::from).and_then(|outcome| Self::steered(outcome, &id, "cancelled"));
        self.context.audit(&caller, "CancelOperation", &id.name(), &result).await;
        Ok(Response::new(convert::operation(&result?)))
    }

    async fn pause_operation(
        &self,
        request: Request<v1::PauseOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let id = operation_id("name", &request.name)?;
        convert::text("reason", &request.reason)?;
        self.context.may_steer(&caller, &id).await?;
        let outcome = self.context.store.pause(&id, &caller.name, &request.reason, self.context.clock.now()).await;
        let result = outcome.map_err(ApiError::from).and_then(|outcome| Self::steered(outcome, &id, "paused"));
        self.context.audit(&caller, "PauseOperation", &id.name(), &result).await;
        Ok(Response::new(convert::operation(&result?)))
    }

    async fn resume_operation(
        &self,
        request: Request<v1::ResumeOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let caller = caller(&request)?;
        let id = operation_id("name", &request.get_ref().name)?;
        self.context.may_steer(&caller, &id).await?;
        let outcome = self.context.store.resume(&id, &caller.name, self.context.clock.now()).await;
        let result = outcome.map_err(ApiError::from).and_then(|outcome| Self::steered(outcome, &id, "resumed"));
        self.context.audit(&caller, "ResumeOperation", &id.name(), &result).await;
        Ok(Response::new(convert::operation(&result?)))
    }

    async fn retry_operation(
        &self,
        request: Request<v1::RetryOperationRequest>,
    ) -> Result<Response<v1::Operation>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let target = request.name.clone();
        let result = self.retry(&caller, request).await;
        self.context.audit(&caller, "RetryOperation", &target, &result).await;
        Ok(Response::new(convert::operation(&result?)))
    }

    async fn list_executions(
        &self,
        request: Request<v1::ListExecutionsRequest>,
    ) -> Result<Response<v1::ListExecutionsResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(self.list_executions(&caller, request.into_inner()).await?))
    }

    async fn explain_execution(
        &self,
        request: Request<v1::ExplainExecutionRequest>,
    ) -> Result<Response<v1::ExplainExecutionResponse>, Status> {
        let caller = caller(&request)?;
        let id = execution_id(&request.get_ref().name)?;
        let scope = caller.scope();
        let row = self.find_execution(&caller, &id).await?;
        let holders = match row.wait_reason {
            Some(WaitReason::NoSlot) => self.context.store.slot_holders(&id, self.context.clock.now()).await,
            Some(WaitReason::NodeBusy) => {
                self.context.store.at_work(&id.node).await.map(|found| found.into_iter().collect())
            }
            _ => Ok(Vec::new()),
        };
        let mut holders = holders.map_err(ApiError::from)?;
        let held = holders.len();
        if !scope.is_everything() {
            let visible = self.context.store.ids_within(&scope).await.map_err(ApiError::from)?;
            // Their number is told; their names only inside the caller's scope.
            holders.retain(|holder| visible.contains(&holder.node));
        }
        let operation = self.context.operation_within(&scope, &id.operation).await?;
        let conflict = self.context.store.conflict(&id).await.map_err(ApiError::from)?;
        let mut explained = super::explain::explain(&row, &operation, &holders, held, conflict.as_ref());
        if row.wait_reason == Some(WaitReason::NodeOffline) {
            let off = self.context.store.powered_off(std::slice::from_ref(&id.node)).await.map_err(ApiError::from)?;
            if let Some(off) = off.get(&id.node) {
                explained.explanation.push_str(&super::explain::powered_off(off));
            }
        }
        // Replaces the suggestion of a retry that cannot help.
        remedy::amend(&self.context, &row, &operation.action, &mut explained).await?;
        if row.state.is_final() && self.context.store.has_log(&id).await.map_err(ApiError::from)? {
            // In front, because the log tells more than any other suggestion.
            explained.suggestions.insert(0, super::explain::read_log(&id));
        }
        Ok(Response::new(explained))
    }

    async fn get_execution_log(
        &self,
        request: Request<v1::GetExecutionLogRequest>,
    ) -> Result<Response<v1::ExecutionLog>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(self.log(&caller, &request.get_ref().name).await?))
    }

    async fn abandon_execution(
        &self,
        request: Request<v1::AbandonExecutionRequest>,
    ) -> Result<Response<v1::Execution>, Status> {
        let caller = caller(&request)?;
        let name = request.into_inner().name;
        let result = self.abandon(&caller, &name).await;
        self.context.audit(&caller, "AbandonExecution", &name, &result).await;
        Ok(Response::new(convert::execution(&result?)))
    }

    type WatchOperationStream = watch::Stream<v1::WatchOperationResponse>;

    async fn watch_operation(
        &self,
        request: Request<v1::WatchOperationRequest>,
    ) -> Result<Response<Self::WatchOperationStream>, Status> {
        let caller = caller(&request)?;
        let id = operation_id("name", &request.get_ref().name)?;
        // An unknown operation is an error of the call, not of the stream.
        self.context.operation_for(&caller, &id).await?;
        Ok(Response::new(watch::operation(self.context.clone(), caller, id)))
    }

    async fn list_events(
        &self,
        request: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(self.list_events(&caller, request.into_inner()).await?))
    }
}
