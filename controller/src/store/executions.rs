//! Reading executions.

use std::time::Duration;

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId, OperationId};

use super::connection::Connection;
use super::rollouts::{Gone, group, standing};
use super::sql::{Row, sql};
use super::{Scope, Store, StoreError};
use crate::calendar::END_OF_TIME;
use crate::operation::{
    self, Action, ExecutionError, ExecutionState, NodeMode, NodeState, OperationState, WaitContext, WaitReason,
    wait_reason,
};
use crate::rollout::Rollout;

/// A stored execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutionRow {
    /// Its id.
    pub id: ExecutionId,
    /// Its present state.
    pub state: ExecutionState,
    /// Reason to wait. `None` unless PENDING.
    pub wait_reason: Option<WaitReason>,
    /// Earliest assignment, from a schedule's jitter. `None` without jitter, or once that time has come.
    pub not_before: Option<DateTime<Utc>>,
    /// Phase that the node reported last.
    pub phase: String,
    /// Bytes of the phase that are done.
    pub bytes_done: u64,
    /// Bytes of the phase in total; 0 if unknown.
    pub bytes_total: u64,
    /// Error of an execution that did not succeed.
    pub error: Option<ExecutionError>,
    /// Number of the last delivery; 0 before the first.
    pub attempt: u32,
    /// Last sequence number of the node that was committed.
    pub sequence: u64,
    /// True once the dispatcher found it past its deadline.
    pub overdue: bool,
    /// The phase or state that takes too long, and its limit; empty unless overdue.
    pub overdue_reason: String,
    /// Time at which it becomes overdue. `None` if nothing is awaited.
    pub deadline: Option<DateTime<Utc>>,
    /// A cancel was requested.
    pub cancel_requested: bool,
    /// The node answered that it is too late to cancel.
    pub cancel_refused: bool,
    /// Time of its last change.
    pub update_time: DateTime<Utc>,
    /// Time of its last assignment, if there was one.
    pub assign_time: Option<DateTime<Utc>>,
    /// End time. `None` while it is unfinished.
    pub finish_time: Option<DateTime<Utc>>,
    /// Boot id of the node at the assignment; empty before.
    pub assign_boot_id: String,
    /// Boot id with which the node came back; empty before.
    pub boot_id: String,
    /// Time of the next try if it is known: the operation's begin, or the opening of its window.
    pub next_attempt_time: Option<DateTime<Utc>>,
}

impl Store {
    /// Executions of an operation, by node. `after` is the last node of the page before. Empty `states`: all.
    pub async fn executions(
        &self,
        operation: &OperationId,
        after: Option<&NodeId>,
        limit: u32,
        states: &[ExecutionState],
    ) -> Result<Vec<ExecutionRow>, StoreError> {
        self.executions_within(&Scope::everything(), operation, after, limit, states).await
    }

    /// Executions of an operation on nodes within a scope, by node. Otherwise like `executions`.
    pub async fn executions_within(
        &self,
        scope: &Scope,
        operation: &OperationId,
        after: Option<&NodeId>,
        limit: u32,
        states: &[ExecutionState],
    ) -> Result<Vec<ExecutionRow>, StoreError> {
        let rows = sql(SELECT)
            .and(
                " WHERE e.operation = ? AND e.node > ? AND (? OR e.state IN {each}) AND (? OR {within n.labels}) \
                 ORDER BY e.node LIMIT ?",
            )
            .bind(operation.as_str())
            .bind(after.map_or("", NodeId::as_str))
            .bind(states.is_empty())
            .each(states.iter().map(|state| state.as_str()))
            .bind(scope.is_everything())
            .json(scope)
            .bind(i64::from(limit))
            .all(self.reader())
            .await?;
        read_all(self.reader(), &rows).await
    }

    /// Reads one execution.
    pub async fn execution(&self, id: &ExecutionId) -> Result<Option<ExecutionRow>, StoreError> {
        find(self.reader(), id).await
    }
}

/// Reads one execution, also inside a transaction.
pub(super) async fn find(db: &impl Connection, id: &ExecutionId) -> Result<Option<ExecutionRow>, StoreError> {
    let row = sql(SELECT)
        .and(" WHERE e.operation = ? AND e.node = ?")
        .bind(id.operation.as_str())
        .bind(id.node.as_str())
        .one(db)
        .await?;
    Ok(read_all(db, row.as_slice()).await?.pop())
}

// LEFT JOIN, because executions outlive their nodes. Only overdue ones need the action, so it is not read for the
// others.
const SELECT: &str = "SELECT e.*, CASE WHEN e.overdue THEN o.action END AS overdue_action, o.state AS operation_state, o.installs_image AS installs_image, \
    o.rollout AS rollout, o.closed_until AS closed_until, o.schedule_time AS due_time, n.labels AS labels, \
    n.state AS node_state, n.controller_id IS NOT NULL AS connected, n.mode AS node_mode, \
    EXISTS (SELECT 1 FROM executions b WHERE b.node = e.node \
            AND b.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')) AS busy, \
    EXISTS (SELECT 1 FROM conflicts c WHERE c.node = e.node AND c.holds) AS conflict \
    FROM executions e JOIN operations o ON o.id = e.operation LEFT JOIN nodes n ON n.id = e.node";

/// Reads executions of one operation.
async fn read_all(db: &impl Connection, rows: &[Row]) -> Result<Vec<ExecutionRow>, StoreError> {
    let mut all = rows.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    // Counted once for all rows, since they belong to one operation.
    let mut known = None;
    for (row, execution) in rows.iter().zip(&mut all) {
        if execution.wait_reason != Some(WaitReason::Due) {
            continue;
        }
        let (rollout, standing) = match &known {
            Some(known) => known,
            None => match row.maybe_json::<Rollout>("rollout")? {
                Some(rollout) => {
                    let standing = standing(db, &execution.id.operation, &rollout, Gone::NOBODY).await?;
                    known.insert((rollout, standing))
                }
                None => break,
            },
        };
        if rollout.choose(standing, &[group(rollout, row)?]).is_empty() {
            execution.wait_reason = Some(WaitReason::NoSlot);
        }
    }
    Ok(all)
}

fn read(row: &Row) -> Result<ExecutionRow, StoreError> {
    let state = row.word("state", ExecutionState::parse)?;
    let wait_reason = if state == ExecutionState::Pending { Some(read_wait_reason(row)?) } else { None };
    Ok(ExecutionRow {
        id: read_id(row)?,
        state,
        wait_reason,
        next_attempt_time: match wait_reason {
            Some(WaitReason::NotDue) => row.maybe_time("due_time")?,
            // A window that never opens has no next time.
            Some(WaitReason::WindowClosed) => row.maybe_time("closed_until")?.filter(|time| *time < END_OF_TIME),
            _ => None,
        },
        not_before: match row.int("not_before")? {
            0 => None,
            _ => Some(row.time("not_before")?),
        },
        phase: row.text("phase")?,
        bytes_done: row.number("bytes_done")?,
        bytes_total: row.number("bytes_total")?,
        error: match row.maybe_text("error_reason")? {
            Some(reason) => {
                Some(ExecutionError { reason, message: row.maybe_text("error_message")?.unwrap_or_default() })
            }
            None => None,
        },
        attempt: row.number("attempt")?,
        sequence: row.number("sequence")?,
        overdue: row.flag("overdue")?,
        overdue_reason: match row.flag("overdue")? {
            // One unreadable record must not hide the others.
            true => why_overdue(row, "overdue_action").unwrap_or_else(|error| error.to_string()),
            false => String::new(),
        },
        deadline: row.maybe_time("deadline")?,
        cancel_requested: row.flag("cancel_requested")?,
        cancel_refused: row.flag("cancel_refused")?,
        update_time: row.time("update_time")?,
        assign_time: row.maybe_time("assign_time")?,
        finish_time: row.maybe_time("finish_time")?,
        assign_boot_id: row.text("assign_boot_id")?,
        boot_id: row.text("boot_id")?,
    })
}

/// Describes what an execution is late with, from the columns `state`, `phase`, `deadline`, `assign_time`, `stretch_time`
/// and `action`.
pub(super) fn why_overdue(row: &Row, action: &'static str) -> Result<String, StoreError> {
    let action: Action = row.json(action)?;
    let deadline = row.maybe_time("deadline")?;
    let since = |column| {
        Ok::<_, StoreError>(match (row.maybe_time(column)?, deadline) {
            (Some(begun), Some(deadline)) => deadline.signed_duration_since(begun).to_std().unwrap_or_default(),
            _ => Duration::ZERO,
        })
    };
    let (spent, stood) = (since("assign_time")?, since("stretch_time")?);
    Ok(operation::why_overdue(row.word("state", ExecutionState::parse)?, &row.text("phase")?, &action, spent, stood))
}

/// The id from the columns `operation` and `node`.
pub(super) fn read_id(row: &Row) -> Result<ExecutionId, StoreError> {
    Ok(ExecutionId {
        operation: row.word("operation", |id| OperationId::parse(id).ok())?,
        node: row.word("node", |id| NodeId::parse(id).ok())?,
    })
}

fn read_wait_reason(row: &Row) -> Result<WaitReason, StoreError> {
    // The node was deleted. The next round cancels the execution (`cancel_orphans`).
    let Some(node) = row.maybe_word("node_state", NodeState::parse)? else {
        return Ok(WaitReason::NodeOffline);
    };
    Ok(wait_reason(&WaitContext {
        operation: row.word("operation_state", OperationState::parse)?,
        installs_image: row.flag("installs_image")?,
        early: row.int("not_before")? != 0,
        node,
        connected: row.flag("connected")?,
        mode: row.maybe_word("node_mode", NodeMode::parse)?.unwrap_or(NodeMode::Running),
        busy: row.flag("busy")?,
        conflict: row.flag("conflict")?,
        window_closed: row.maybe_time("closed_until")?.is_some(),
    }))
}
