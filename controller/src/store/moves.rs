//! Writes of executions' states. Each names the state that it expects, and adds its event.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::names::{ExecutionId, OperationId};
use serde::Serialize;

use super::connection::Connection;
use super::dispatch::Changed;
use super::events::{self, CONTROLLER, Happened};
use super::executions::read_id;
use super::operations::{finish_if_done, lock_free};
use super::sql::{Row, Sql, sql};
use super::{Store, StoreError, micros};
use crate::operation::{Action, ExecutionError, ExecutionState, deadline_after, deadline_of_stretch, reason};

/// A change of one execution's state.
pub(super) struct Move<'a> {
    pub(super) id: &'a ExecutionId,
    pub(super) from: ExecutionState,
    pub(super) to: ExecutionState,
    pub(super) error: Option<&'a ExecutionError>,
    pub(super) action: &'a Action,
    /// Phase that the node reports; empty if it reports none.
    pub(super) phase: &'a str,
    pub(super) actor: &'a str,
    pub(super) reason: &'a str,
    /// The node's attempt, if it is ahead of the store.
    pub(super) adopts: Option<u32>,
}

impl Move<'_> {
    fn is_legal(&self) -> bool {
        let to = if self.adopts.is_some() { self.from.adopt(self.to) } else { self.from.change_to(self.to) };
        self.from == self.to || to.is_ok()
    }
}

/// Time at which an execution that enters this state and phase now becomes overdue. `None`: never.
pub(super) fn deadline(
    state: ExecutionState,
    phase: &str,
    action: &Action,
    now: DateTime<Utc>,
) -> Option<DateTime<Utc>> {
    deadline_after(state, phase, action)
        .map(|limit| TimeDelta::from_std(limit).unwrap_or(TimeDelta::MAX))
        .and_then(|limit| now.checked_add_signed(limit))
}

/// Time limit of the state in microseconds, for progress whose phase is not known. 0 if nothing is awaited.
pub(super) fn patience(state: ExecutionState, action: &Action) -> i64 {
    length(deadline_after(state, "", action).unwrap_or_default())
}

/// Microseconds. Capped well below the largest integer, because SQL adds them to a time.
pub(super) fn length(time: Duration) -> i64 {
    i64::try_from(time.as_micros()).unwrap_or(i64::MAX / 4)
}

/// Applies a change if the execution is still in the state `from`, and finishes its operation if it was the last one.
/// Returns true if it did. The caller holds the operation's row.
pub(super) async fn apply(tx: &impl Connection, change: &Move<'_>, now: DateTime<Utc>) -> Result<bool, StoreError> {
    // A report may name any state. An illegal step changes nothing.
    if !change.is_legal() {
        return Ok(false);
    }
    // A repeated state is neither a sign of life nor an event, even under another sequence number.
    let again = change.from == change.to && change.error.is_none() && change.adopts.is_none();
    let due = deadline(change.to, change.phase, change.action, now).map(micros);
    let stretch = length(deadline_of_stretch(change.action));
    let changed = sql("UPDATE executions SET state = ?, error_reason = ?, error_message = ?, \
             overdue = overdue AND ? AND phase = ?, \
             forgiven_time = CASE WHEN ? OR (? AND phase = ?) THEN forgiven_time END, \
             deadline = CASE WHEN ? AND phase = ? THEN deadline \
                 WHEN ? AND stretch_time + CAST(? AS BIGINT) < CAST(? AS BIGINT) THEN stretch_time + CAST(? AS BIGINT) \
                 ELSE CAST(? AS BIGINT) END, \
             furthest = CASE WHEN ? THEN furthest ELSE 0 END, \
             stretch_time = CASE WHEN ? THEN stretch_time ELSE CAST(? AS BIGINT) END, \
             phase = CASE WHEN ? THEN phase ELSE ? END, patience = ?, update_time = ?, finish_time = ?, \
             attempt = COALESCE(?, attempt), assign_time = COALESCE(assign_time, ?) \
         WHERE operation = ? AND node = ? AND state = ?")
    .bind(change.to.as_str())
    .bind(change.error.map(|error| error.reason.clone()))
    .bind(change.error.map(|error| error.message.clone()))
    .bind(again)
    .bind(change.phase)
    // A node that was overdue and is at work again can fail once more. No operator has forgiven that failure.
    .bind(change.to.is_final())
    .bind(again)
    .bind(change.phase)
    .bind(again)
    .bind(change.phase)
    .bind(again)
    .bind(stretch)
    .bind(due)
    .bind(stretch)
    .bind(due)
    .bind(again)
    .bind(again)
    .time(now)
    // The last phase stays after the end, because it tells where the node stopped.
    .bind(change.to.is_final() && change.phase.is_empty())
    .bind(change.phase)
    .bind(patience(change.to, change.action))
    .time(now)
    .bind(change.to.is_final().then(|| micros(now)))
    // The store may have lost the assignment itself, so an adopted attempt gets a time now.
    .bind(change.adopts.map(i64::from))
    .bind(change.adopts.map(|_| micros(now)))
    .bind(change.id.operation.as_str())
    .bind(change.id.node.as_str())
    .bind(change.from.as_str())
    .run(tx)
    .await?;
    if changed == 0 {
        return Ok(false);
    }
    if again {
        return Ok(true);
    }
    let reason = change.error.map_or(change.reason, |error| &error.reason);
    let event = Happened::to_node(&change.id.node, change.actor, change.from.as_str(), change.to.as_str(), reason);
    events::record(tx, &change.id.operation, vec![event], now).await?;
    if change.to.is_final() {
        finish_if_done(tx, &change.id.operation, now).await?;
    }
    Ok(true)
}

/// One end for several executions.
pub(super) struct End<'a> {
    pub(super) to: ExecutionState,
    pub(super) error: Option<ExecutionError>,
    pub(super) actor: &'a str,
}

/// A row of `{rows ...}`.
#[derive(Serialize)]
struct Key<'a> {
    operation: &'a str,
    node: &'a str,
    state: &'a str,
}

/// Reads executions from the columns `operation`, `node` and `state`.
pub(super) fn read_found(row: &Row) -> Result<(ExecutionId, ExecutionState), StoreError> {
    Ok((read_id(row)?, row.word("state", ExecutionState::parse)?))
}

/// Ends executions that are still in the state in which they were found. Writes their events, and finishes the
/// operations of which they were the last. The caller holds the operations' rows.
pub(super) async fn end(
    tx: &impl Connection,
    found: &[(ExecutionId, ExecutionState)],
    end: &End<'_>,
    now: DateTime<Utc>,
) -> Result<Vec<Changed>, StoreError> {
    // `change_to` has no way from PENDING to FAILED. One that can never be assigned still has to fail.
    let is_legal = |from: ExecutionState| match end.to {
        ExecutionState::Failed => !from.is_final() && from.break_off().is_ok(),
        to => from.change_to(to).is_ok(),
    };
    let legal: BTreeMap<&ExecutionId, ExecutionState> =
        found.iter().filter(|(_, from)| is_legal(*from)).map(|(id, from)| (id, *from)).collect();
    let keys: Vec<Key<'_>> = legal
        .iter()
        .map(|(id, from)| Key { operation: id.operation.as_str(), node: id.node.as_str(), state: from.as_str() })
        .collect();
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let ended = sql("UPDATE executions SET state = ?, error_reason = ?, error_message = ?, overdue = FALSE, \
             deadline = NULL, update_time = ?, finish_time = ? \
         FROM {rows operation TEXT, node TEXT, state TEXT} WHERE executions.operation = r.operation \
             AND executions.node = r.node AND executions.state = r.state \
         RETURNING executions.operation AS operation, executions.node AS node")
    .bind(end.to.as_str())
    .bind(end.error.as_ref().map(|error| error.reason.clone()))
    .bind(end.error.as_ref().map(|error| error.message.clone()))
    .time(now)
    .time(now)
    .json(&keys)
    .all(tx)
    .await?;
    let mut changed = Vec::with_capacity(ended.len());
    let mut happened: BTreeMap<OperationId, Vec<Happened>> = BTreeMap::new();
    let reason = end.error.as_ref().map_or("", |error| error.reason.as_str());
    for row in &ended {
        let id = read_id(row)?;
        let Some(from) = legal.get(&id).copied() else { continue };
        happened.entry(id.operation.clone()).or_default().push(Happened::to_node(
            &id.node,
            end.actor,
            from.as_str(),
            end.to.as_str(),
            reason,
        ));
        changed.push(Changed { execution: id, from, to: end.to });
    }
    // A BTreeMap, so the operations are written in the order of their ids, like all locks.
    for (operation, events) in happened {
        events::record(tx, &operation, events, now).await?;
        finish_if_done(tx, &operation, now).await?;
    }
    Ok(changed)
}

impl Store {
    /// Ends one execution as FAILED because its record or its delivery is defective. Returns true if it did.
    pub(super) async fn break_off(
        &self,
        id: &ExecutionId,
        why: String,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        let error = Some(ExecutionError::new(reason::NOT_ASSIGNABLE, why));
        let which = sql("SELECT operation, node, state FROM executions WHERE operation = ? AND node = ? \
                         AND state IN ('PENDING', 'ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')")
        .bind(id.operation.as_str())
        .bind(id.node.as_str());
        Ok(!self.end_found(which, ExecutionState::Failed, error, now).await?.is_empty())
    }

    /// Ends the executions that `which` finds (columns `operation`, `node`, `state`). The query runs twice: first
    /// outside of a transaction, because mostly it finds nothing, then again under the lock of the operations.
    pub(super) async fn end_found(
        &self,
        which: Sql,
        to: ExecutionState,
        error: Option<ExecutionError>,
        now: DateTime<Utc>,
    ) -> Result<Vec<Changed>, StoreError> {
        self.again(|| self.end_found_once(which.clone(), to, error.clone(), now)).await
    }

    async fn end_found_once(
        &self,
        which: Sql,
        to: ExecutionState,
        error: Option<ExecutionError>,
        now: DateTime<Utc>,
    ) -> Result<Vec<Changed>, StoreError> {
        let mut operations: Vec<OperationId> = Vec::new();
        for row in which.clone().all(self.reader()).await? {
            operations.push(read_id(&row)?.operation);
        }
        if operations.is_empty() {
            return Ok(Vec::new());
        }
        let tx = self.begin().await?;
        let held = lock_free(&*tx, &operations).await?;
        let mut found = which.all(&*tx).await?.iter().map(read_found).collect::<Result<Vec<_>, _>>()?;
        // Operations that appeared since the first query, or that another transaction holds, are left to the next
        // round.
        found.retain(|(id, _)| held.contains_key(&id.operation));
        let changed = end(&*tx, &found, &End { to, error, actor: CONTROLLER }, now).await?;
        self.commit(tx).await?;
        Ok(changed)
    }
}
