//! Progress of executions: coalesced by the caller, written in one statement.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, OperationId};

use serde::Serialize;

use super::moves::length;
use super::operations;
use super::sql::{signed, sql};
use super::{ReportRow, Store, StoreError, micros};
use crate::operation::{Action, ExecutionState, Phase, deadline_after, deadline_in_all, deadline_of_stretch, point};

/// Any active state: the time limit of a known phase is the same in each of them.
const SOME: ExecutionState = ExecutionState::Running;

/// True if the report repeats what is stored.
const SAME: &str = "(executions.phase = r.phase AND bytes_done = r.done)";
/// Time limit of the phase.
const WITHIN: &str = "CASE WHEN r.within > 0 THEN r.within ELSE patience END";
/// Time since which the node has got no further in its state. A new furthest point counts from now.
const SINCE: &str = "(CASE WHEN r.point > furthest THEN r.now ELSE COALESCE(stretch_time, assign_time, r.now) END)";

/// The latest deadline: for the whole execution, and for a node that gets no further.
fn latest_deadline() -> String {
    format!(
        "(CASE WHEN {SINCE} + r.stretch < assign_time + r.in_all THEN {SINCE} + r.stretch \
         ELSE assign_time + r.in_all END \
         )"
    )
}

/// The last progress of an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgressRow {
    /// The execution.
    pub execution: ExecutionId,
    /// The delivery that it belongs to.
    pub attempt: u32,
    /// The node's state change that it belongs to. Progress of an earlier one changes nothing.
    pub sequence: u64,
    /// Phase that the node reports.
    pub phase: String,
    /// Bytes of the phase that are done.
    pub bytes_done: u64,
    /// Bytes of the phase in total; 0 if unknown.
    pub bytes_total: u64,
    /// The node answered that it is too late to cancel.
    pub cancel_refused: bool,
}

impl From<ReportRow> for ProgressRow {
    fn from(row: ReportRow) -> Self {
        Self {
            execution: row.execution,
            attempt: row.attempt,
            sequence: row.sequence,
            phase: row.phase,
            bytes_done: row.bytes_done,
            bytes_total: row.bytes_total,
            cancel_refused: row.cancel_refused,
        }
    }
}

impl Store {
    /// Stores progress, one row for each execution. A new phase starts its own time limit. Within a phase, only a byte that
    /// moved is a sign of life: a node that repeats itself, or its phases, becomes no less overdue.
    pub async fn flush_progress(&self, rows: &[ProgressRow], now: DateTime<Utc>) -> Result<(), StoreError> {
        self.again(|| self.flush_progress_once(rows, now)).await
    }

    async fn flush_progress_once(&self, rows: &[ProgressRow], now: DateTime<Utc>) -> Result<(), StoreError> {
        if rows.is_empty() {
            return Ok(());
        }
        let actions = self.actions(rows).await?;
        let limit = |limit: Option<Duration>| length(limit.unwrap_or_default());
        let stored: Vec<Stored<'_>> = rows
            .iter()
            // Progress of an operation that the store does not know is dropped.
            .filter_map(|row| Some((row, actions.get(&row.execution.operation)?)))
            .map(|(row, action)| Stored {
                within: limit(Phase::parse(&row.phase).and_then(|_| deadline_after(SOME, &row.phase, action))),
                in_all: length(deadline_in_all(action)),
                stretch: length(deadline_of_stretch(action)),
                point: point(&row.phase, row.bytes_done),
                now: micros(now),
                operation: row.execution.operation.as_str(),
                node: row.execution.node.as_str(),
                attempt: i64::from(row.attempt),
                sequence: signed(row.sequence),
                phase: &row.phase,
                done: signed(row.bytes_done),
                total: signed(row.bytes_total),
                refused: i64::from(row.cancel_refused),
            })
            .collect();
        let tx = self.begin().await?;
        // Locked as by every writer of executions. Otherwise this statement would lock their rows in an order of its
        // own, and deadlock with a cancel that locks them in another one.
        operations::lock(&*tx, actions.keys()).await?;
        let latest = latest_deadline();
        sql(&format!(
            "UPDATE executions SET phase = r.phase, bytes_done = r.done, bytes_total = r.total, \
                 cancel_refused = cancel_refused OR r.refused = 1, update_time = r.now, \
                 furthest = CASE WHEN r.point > furthest THEN r.point ELSE furthest END, \
                 stretch_time = {SINCE}, \
                 forgiven_time = CASE WHEN overdue AND ({SAME} OR {latest} <= r.now) THEN forgiven_time END, \
                 overdue = overdue AND ({SAME} OR {latest} <= r.now), \
                 deadline = CASE WHEN {SAME} THEN deadline \
                     WHEN r.now + {WITHIN} > {latest} THEN {latest} ELSE r.now + {WITHIN} END \
             FROM {{rows operation TEXT, node TEXT, attempt BIGINT, sequence BIGINT, phase TEXT, done BIGINT, \
                   total BIGINT, refused BIGINT, within BIGINT, in_all BIGINT, stretch BIGINT, point BIGINT, now BIGINT}} \
             WHERE executions.operation = r.operation AND executions.node = r.node \
               AND executions.attempt = r.attempt AND executions.sequence = r.sequence \
               AND executions.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')"
        ))
        .json(&stored)
        .run(&*tx)
        .await?;
        self.commit(tx).await
    }

    /// Actions of the operations of these rows.
    async fn actions(&self, rows: &[ProgressRow]) -> Result<BTreeMap<OperationId, Action>, StoreError> {
        let operations: BTreeSet<&str> = rows.iter().map(|row| row.execution.operation.as_str()).collect();
        let found =
            sql("SELECT id, action FROM operations WHERE id IN {each}").each(operations).all(self.reader()).await?;
        let mut actions = BTreeMap::new();
        for row in &found {
            let id = operations::read_id(row)?;
            match row.json("action") {
                Ok(action) => drop(actions.insert(id, action)),
                // Its progress is dropped. As an error it would keep all rows of this batch, which the caller tries
                // again until it succeeds.
                Err(error) => tracing::debug!(operation = %id, error = crate::chain(&error), "progress is dropped"),
            }
        }
        Ok(actions)
    }
}

#[derive(Serialize)]
struct Stored<'a> {
    operation: &'a str,
    node: &'a str,
    attempt: i64,
    sequence: i64,
    phase: &'a str,
    done: i64,
    total: i64,
    refused: i64,
    /// Time limit of this phase in microseconds; 0 if it is not a known phase.
    within: i64,
    in_all: i64,
    /// Time limit in microseconds for a node that gets no further.
    stretch: i64,
    /// Position in the work, see [`point`].
    point: i64,
    now: i64,
}
