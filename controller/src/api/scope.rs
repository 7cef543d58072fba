//! Callers that are limited to some nodes: the resources that they may see and steer.

use marco_proto::names::{NodeId, OperationId, ScheduleId};

use super::Context;
use super::operation::operation_not_found;
use super::status::ApiError;
use crate::identity::Caller;
use crate::operation::Target;
use crate::store::{NodeQuery, NodeRow, OperationRow, Reach, ScheduleRow, Scope};

/// One error for resources that do not exist and for those outside the scope, so that a caller cannot probe for names.
pub(super) fn outside(scope: &Scope) -> ApiError {
    ApiError::Forbidden {
        reason: "OUTSIDE_SCOPE",
        message: format!("limited to the nodes with {scope}: what is named does not exist, or does not lie within it"),
    }
}

impl Context {
    /// A node that the caller may see; `None`: there is none, for callers without a limit.
    pub(super) async fn node_for(&self, caller: &Caller, id: &NodeId) -> Result<Option<NodeRow>, ApiError> {
        caller.note_target(&id.name());
        let scope = caller.scope();
        let row = self.store.node(id).await?;
        if scope.is_everything() {
            return Ok(row);
        }
        row.filter(|row| scope.covers(&row.labels)).map(Some).ok_or_else(|| outside(&scope))
    }

    /// An operation with a node that the caller may see, as the caller may see it.
    pub(super) async fn operation_for(&self, caller: &Caller, id: &OperationId) -> Result<OperationRow, ApiError> {
        caller.note_target(&id.name());
        self.operation_within(&caller.scope(), id).await
    }

    /// An operation with a node in the scope, reduced to the parts in the scope.
    pub(super) async fn operation_within(&self, scope: &Scope, id: &OperationId) -> Result<OperationRow, ApiError> {
        let found = self.store.operation(id).await?;
        if scope.is_everything() {
            return found.ok_or_else(|| operation_not_found(id));
        }
        let mut rows: Vec<OperationRow> = found.into_iter().collect();
        if rows.is_empty() || self.store.reach(id, scope).await? == Reach::Nothing {
            return Err(outside(scope));
        }
        self.limit(scope, &mut rows).await?;
        rows.pop().ok_or_else(|| outside(scope))
    }

    /// Removes the parts of operations outside the scope: nodes of lists, and counts.
    pub(super) async fn limit(&self, scope: &Scope, rows: &mut [OperationRow]) -> Result<(), ApiError> {
        if scope.is_everything() || rows.is_empty() {
            return Ok(());
        }
        let ids: Vec<OperationId> = rows.iter().map(|row| row.id.clone()).collect();
        // The counts of the whole operation would tell how many nodes there are outside.
        let mut counts = self.store.counts_within(&ids, scope).await?;
        let visible = self.store.ids_within(scope).await?;
        for row in rows {
            row.counts = counts.remove(&row.id).unwrap_or_default();
            if let Target::Nodes(nodes) = &mut row.target {
                nodes.retain(|name| NodeId::parse(name).is_ok_and(|id| visible.contains(&id)));
            }
        }
        Ok(())
    }

    /// Returns an error if an operation has a node outside the caller's scope.
    pub(super) async fn may_steer(&self, caller: &Caller, id: &OperationId) -> Result<(), ApiError> {
        caller.note_target(&id.name());
        let scope = caller.scope();
        match self.store.reach(id, &scope).await? {
            Reach::All => Ok(()),
            Reach::Some => Err(ApiError::Forbidden {
                reason: "OUTSIDE_SCOPE",
                message: format!("limited to the nodes with {scope}: {} has others too", id.name()),
            }),
            Reach::Nothing => Err(outside(&scope)),
        }
    }

    /// True if every node that a schedule can ever reach is in the scope.
    async fn is_all_within(&self, scope: &Scope, schedule: &ScheduleRow) -> Result<bool, ApiError> {
        let Some(both) = schedule.scope.and(scope) else { return Ok(false) };
        // An equal or narrower scope of the schedule limits every fire already.
        if scope.is_everything() || both == schedule.scope {
            return Ok(true);
        }
        Ok(match &schedule.template.target {
            // Nodes that enrol later are reached too.
            Target::All => false,
            // Only a selector that includes the scope's labels can never match a node outside.
            Target::Labels(labels) => scope.covers(labels),
            Target::Nodes(names) => self.are_within(scope, names).await?,
        })
    }

    /// True if all of these nodes exist and are in the scope.
    pub(super) async fn are_within(&self, scope: &Scope, names: &[String]) -> Result<bool, ApiError> {
        let ids: Vec<NodeId> = names.iter().filter_map(|name| NodeId::parse(name).ok()).collect();
        let visible = self.store.ids_within(scope).await?;
        Ok(ids.len() == names.len() && ids.iter().all(|id| visible.contains(id)))
    }

    /// True if a schedule reaches a node in the scope.
    async fn is_some_within(&self, scope: &Scope, schedule: &ScheduleRow) -> Result<bool, ApiError> {
        let Some(both) = schedule.scope.and(scope) else { return Ok(false) };
        Ok(match &schedule.template.target {
            Target::All => !self.store.ids_within(&both).await?.is_empty(),
            Target::Labels(labels) => {
                let query = NodeQuery { labels: labels.clone(), scope: both, limit: 1, ..NodeQuery::default() };
                !self.store.nodes(&query).await?.is_empty()
            }
            Target::Nodes(names) => {
                let visible = self.store.ids_within(&both).await?;
                names.iter().any(|name| NodeId::parse(name).is_ok_and(|id| visible.contains(&id)))
            }
        })
    }

    /// A schedule, reduced to the caller's scope; `None`: it is outside.
    pub(super) async fn visible_schedule(
        &self,
        scope: &Scope,
        mut schedule: ScheduleRow,
    ) -> Result<Option<ScheduleRow>, ApiError> {
        if scope.is_everything() {
            return Ok(Some(schedule));
        }
        if !self.is_all_within(scope, &schedule).await? && !self.is_some_within(scope, &schedule).await? {
            return Ok(None);
        }
        if let Target::Nodes(names) = &mut schedule.template.target {
            let visible = self.store.ids_within(scope).await?;
            names.retain(|name| NodeId::parse(name).is_ok_and(|id| visible.contains(&id)));
        }
        Ok(Some(schedule))
    }

    /// A schedule that the caller may change, pause and run, because every node that it can ever reach is in the scope.
    pub(super) async fn schedule_to_steer(
        &self,
        caller: &Caller,
        id: &ScheduleId,
    ) -> Result<Option<ScheduleRow>, ApiError> {
        caller.note_target(&id.name());
        let scope = caller.scope();
        let Some(schedule) = self.store.schedule(id).await? else {
            return if scope.is_everything() { Ok(None) } else { Err(outside(&scope)) };
        };
        if self.is_all_within(&scope, &schedule).await? { Ok(Some(schedule)) } else { Err(outside(&scope)) }
    }
}
