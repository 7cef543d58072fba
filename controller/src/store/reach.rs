//! The part of an operation that lies within a scope. Deleted nodes lie in no scope, except that of everything.

use std::collections::BTreeSet;

use chrono::{DateTime, Utc};
use marco_proto::names::{NodeId, OperationId};

use super::dispatch::Changed;
use super::sql::sql;
use super::{Scope, Store, StoreError, nodes};
use crate::operation::{ExecutionError, ExecutionState, reason};

/// Part of an operation that lies within a scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// None of its nodes.
    Nothing,
    /// Some of its nodes.
    Some,
    /// All of its nodes that still exist.
    All,
}

impl Store {
    /// Part of an operation that lies within a scope.
    pub async fn reach(&self, operation: &OperationId, scope: &Scope) -> Result<Reach, StoreError> {
        if scope.is_everything() {
            return Ok(Reach::All);
        }
        // JOIN: deleted nodes do not count, because nothing can be done to them.
        let row = sql("SELECT COUNT(*) AS whole, COUNT(*) FILTER (WHERE {within n.labels}) AS inside \
                       FROM executions e JOIN nodes n ON n.id = e.node WHERE e.operation = ?")
        .json(scope)
        .bind(operation.as_str())
        .one(self.reader())
        .await?;
        let Some(row) = row else { return Ok(Reach::Nothing) };
        let (whole, inside): (u64, u64) = (row.number("whole")?, row.number("inside")?);
        Ok(match inside {
            0 => Reach::Nothing,
            inside if inside == whole => Reach::All,
            _ => Reach::Some,
        })
    }

    /// Ids of the nodes within a scope.
    pub async fn ids_within(&self, scope: &Scope) -> Result<BTreeSet<NodeId>, StoreError> {
        sql("SELECT n.id AS id FROM nodes n WHERE {within n.labels}")
            .json(scope)
            .all(self.reader())
            .await?
            .iter()
            .map(nodes::read_id)
            .collect()
    }

    /// Cancels due executions on nodes that left the scope of the operation's creator.
    pub async fn cancel_outside_scope(&self, now: DateTime<Utc>) -> Result<Vec<Changed>, StoreError> {
        // Only executions that are due: until then a node's labels may still change.
        let which = sql("SELECT e.operation AS operation, e.node AS node, e.state AS state \
             FROM operations o JOIN executions e ON e.operation = o.id AND e.state = 'PENDING' \
             JOIN nodes n ON n.id = e.node \
             WHERE o.state = 'RUNNING' AND o.schedule_time <= ? AND NOT {within n.labels o.scope}")
        .time(now);
        let why = "its labels changed, and it is not among the nodes any more that whoever asked for this may operate";
        let error = ExecutionError::new(reason::OUTSIDE_SCOPE, why);
        self.end_found(which, ExecutionState::Cancelled, Some(error), now).await
    }
}
