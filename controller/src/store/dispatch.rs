//! Work of the dispatcher that becomes due with time. Each call returns what it changed.

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::names::{ExecutionId, OperationId};

use super::events::{self, CONTROLLER, Happened};
use super::executions::{self, read_id};
use super::moves::read_found;
use super::operations::{self, finish_if_done, lock_free};
use super::rollouts::note_beginning;
use super::silence::Silent;
use super::sql::sql;
use super::{Store, StoreError};
use crate::operation::{ExecutionError, ExecutionState, reason};

/// Time that an execution may be overdue before it is given up.
const GIVE_UP_AFTER: TimeDelta = TimeDelta::hours(24);
/// Silence after which a powered-off node is believed off. A node that only lost its stream would be back within its
/// longest delay.
const OFF_AFTER: TimeDelta = TimeDelta::seconds(60);
/// Time for which an installer is told that its execution was given up.
const TOLD_FOR: TimeDelta = TimeDelta::seconds(60);

/// An execution whose state the dispatcher changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// The execution.
    pub execution: ExecutionId,
    /// State before.
    pub from: ExecutionState,
    /// State now.
    pub to: ExecutionState,
}

/// An execution that was found overdue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overdue {
    /// The execution.
    pub execution: ExecutionId,
    /// Its state.
    pub state: ExecutionState,
    /// The phase or state that takes too long, and its limit.
    pub why: String,
}

impl Store {
    /// Begins scheduled operations whose time has come: they become RUNNING.
    pub async fn begin_due(&self, now: DateTime<Utc>) -> Result<Vec<OperationId>, StoreError> {
        self.again(|| self.begin_due_once(now)).await
    }

    async fn begin_due_once(&self, now: DateTime<Utc>) -> Result<Vec<OperationId>, StoreError> {
        // Looked for without a transaction, because mostly nothing is due.
        let due = sql("SELECT id FROM operations WHERE state = 'SCHEDULED' AND schedule_time <= ?")
            .time(now)
            .all(self.reader())
            .await?
            .iter()
            .map(operations::read_id)
            .collect::<Result<Vec<_>, _>>()?;
        if due.is_empty() {
            return Ok(due);
        }
        let tx = self.begin().await?;
        let mut begun = Vec::with_capacity(due.len());
        for (id, from) in lock_free(&*tx, &due).await? {
            let Ok(to) = from.begin() else { continue };
            sql("UPDATE operations SET state = ? WHERE id = ? AND state = ?")
                .bind(to.as_str())
                .bind(id.as_str())
                .bind(from.as_str())
                .run(&*tx)
                .await?;
            let event = Happened::to_operation(CONTROLLER, from.as_str(), to.as_str(), "");
            events::record(&*tx, &id, vec![event], now).await?;
            note_beginning(&*tx, &id, now).await?;
            begun.push(id);
        }
        self.commit(tx).await?;
        Ok(begun)
    }

    /// Releases executions whose share of the jitter has passed. Returns how many.
    pub async fn release_due(&self, now: DateTime<Utc>) -> Result<u64, StoreError> {
        self.again(|| self.release_due_once(now)).await
    }

    async fn release_due_once(&self, now: DateTime<Utc>) -> Result<u64, StoreError> {
        let held = sql("SELECT 1 AS held FROM executions WHERE not_before > 0 AND not_before <= ? LIMIT 1").time(now);
        if held.one(self.reader()).await?.is_none() {
            return Ok(0);
        }
        let tx = self.begin().await?;
        // Rows that another transaction holds are left to the next round. Since this never waits, it needs no lock on
        // the operations.
        let released = sql("UPDATE executions SET not_before = 0 WHERE (operation, node) IN \
                            (SELECT operation, node FROM executions WHERE not_before > 0 AND not_before <= ? {skip})")
        .time(now)
        .run(&*tx)
        .await?;
        self.commit(tx).await?;
        Ok(released)
    }

    /// Ends executions that did not begin before their operation's expire_time: they become EXPIRED.
    pub async fn expire(&self, now: DateTime<Utc>) -> Result<Vec<Changed>, StoreError> {
        let which = sql("SELECT e.operation AS operation, e.node AS node, e.state AS state \
                         FROM operations o JOIN executions e ON e.operation = o.id AND e.state = 'PENDING' \
                         WHERE o.state IN ('SCHEDULED', 'RUNNING', 'PAUSED', 'CANCELLING') AND o.expire_time <= ?")
        .time(now);
        let error = ExecutionError::new(reason::EXPIRED, "it was not begun before the operation's expire_time");
        self.end_found(which, ExecutionState::Expired, Some(error), now).await
    }

    /// Flags executions past their deadline as overdue.
    pub async fn mark_overdue(&self, now: DateTime<Utc>) -> Result<Vec<Overdue>, StoreError> {
        self.again(|| self.mark_overdue_once(now)).await
    }

    async fn mark_overdue_once(&self, now: DateTime<Utc>) -> Result<Vec<Overdue>, StoreError> {
        // Right after an outage every node looks late, although none of them could report.
        if !self.may_judge(Silent::Node, now) {
            return Ok(Vec::new());
        }
        let late = sql("SELECT e.operation AS operation, e.node AS node, e.state AS state, e.phase AS phase, \
                            e.assign_time AS assign_time, e.stretch_time AS stretch_time, e.deadline AS deadline, o.action AS action \
                        FROM executions e JOIN operations o ON o.id = e.operation \
                        WHERE e.deadline <= ? AND NOT e.overdue \
                        AND e.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')")
        .time(now);
        let found = late
            .all(self.reader())
            .await?
            .iter()
            .map(|row| {
                let why = executions::why_overdue(row, "action").unwrap_or_else(|error| error.to_string());
                Ok((read_found(row)?, why))
            })
            .collect::<Result<Vec<_>, StoreError>>()?;
        if found.is_empty() {
            return Ok(Vec::new());
        }
        let tx = self.begin().await?;
        let held = lock_free(&*tx, found.iter().map(|((id, _), _)| &id.operation)).await?;
        let mut marked = Vec::with_capacity(found.len());
        // Their nodes may have reported since the first look, so the conditions are checked again.
        for ((id, state), why) in found.into_iter().filter(|((id, _), _)| held.contains_key(&id.operation)) {
            let changed =
                sql("UPDATE executions SET overdue = TRUE, overdue_time = ?, update_time = ? WHERE operation = ? \
                     AND node = ? AND state = ? AND deadline <= ? AND NOT overdue")
                .time(now)
                .time(now)
                .bind(id.operation.as_str())
                .bind(id.node.as_str())
                .bind(state.as_str())
                .time(now)
                .run(&*tx)
                .await?;
            if changed == 1 {
                let event =
                    Happened::to_node(&id.node, CONTROLLER, state.as_str(), state.as_str(), &format!("overdue: {why}"));
                events::record(&*tx, &id.operation, vec![event], now).await?;
                marked.push(Overdue { execution: id, state, why });
            }
        }
        self.commit(tx).await?;
        Ok(marked)
    }

    /// Gives up executions that were overdue for 24 hours: they become FAILED, `NEVER_RETURNED`.
    pub async fn give_up(&self, now: DateTime<Utc>) -> Result<Vec<Changed>, StoreError> {
        if !self.may_judge(Silent::Node, now) {
            return Ok(Vec::new());
        }
        // Counted from when it was found overdue, not from its deadline. After a long outage a node still gets its day.
        let which = sql("SELECT operation, node, state FROM executions WHERE overdue \
                         AND COALESCE(overdue_time, deadline) <= ? AND state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')")
        .time(crate::calendar::earlier(now, GIVE_UP_AFTER));
        let error = ExecutionError::new(reason::NEVER_RETURNED, "nothing was heard of the node for a day");
        self.end_found(which, ExecutionState::Failed, Some(error), now).await
    }

    /// Ends power-offs whose agent said its last words and has had no session since: they become SUCCEEDED. A
    /// controller must have listened for these 60 s (since `listening`). A stream that only broke proves nothing.
    pub async fn power_off_done(
        &self,
        listening: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> Result<Vec<Changed>, StoreError> {
        if !self.may_judge(Silent::Node, now) || listening > crate::calendar::earlier(now, OFF_AFTER) {
            return Ok(Vec::new());
        }
        // Any later session raises the epoch, so last words of an earlier one are void.
        let which = sql("SELECT e.operation AS operation, e.node AS node, e.state AS state FROM executions e \
                         JOIN operations o ON o.id = e.operation JOIN nodes n ON n.id = e.node \
                         WHERE e.state = 'REBOOTING' AND o.action_kind = 'power-off' AND n.controller_id IS NULL \
                         AND e.goodbye_epoch = n.session_epoch AND e.goodbye_time <= ? AND n.disconnect_time <= ?")
        .time(crate::calendar::earlier(now, OFF_AFTER))
        .time(crate::calendar::earlier(now, OFF_AFTER));
        self.end_found(which, ExecutionState::Succeeded, None, now).await
    }

    /// Ends executions that wait for a node that was deleted while they were created: they become CANCELLED.
    pub async fn cancel_orphans(&self, now: DateTime<Utc>) -> Result<Vec<Changed>, StoreError> {
        let which = sql("SELECT e.operation AS operation, e.node AS node, e.state AS state FROM executions e \
                         WHERE e.state = 'PENDING' AND NOT EXISTS (SELECT 1 FROM nodes n WHERE n.id = e.node)");
        let error = ExecutionError::new(reason::NODE_DELETED, "the node was deleted while the operation was created");
        self.end_found(which, ExecutionState::Cancelled, Some(error), now).await
    }

    /// Finishes operations of which every execution has ended.
    pub async fn finish_operations(&self, now: DateTime<Utc>) -> Result<Vec<OperationId>, StoreError> {
        self.again(|| self.finish_operations_once(now)).await
    }

    async fn finish_operations_once(&self, now: DateTime<Utc>) -> Result<Vec<OperationId>, StoreError> {
        let done = sql("SELECT id FROM operations WHERE state IN ('SCHEDULED', 'RUNNING', 'PAUSED', 'CANCELLING') \
                        AND NOT EXISTS (SELECT 1 FROM executions e WHERE e.operation = operations.id AND e.state IN \
                        ('PENDING', 'ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING'))")
        .all(self.reader())
        .await?
        .iter()
        .map(operations::read_id)
        .collect::<Result<Vec<_>, _>>()?;
        if done.is_empty() {
            return Ok(done);
        }
        let tx = self.begin().await?;
        let mut finished = Vec::with_capacity(done.len());
        for id in lock_free(&*tx, &done).await?.into_keys() {
            if finish_if_done(&*tx, &id, now).await? {
                finished.push(id);
            }
        }
        self.commit(tx).await?;
        Ok(finished)
    }

    /// Executions that this controller's nodes are asked to cancel, until they answer. An installer whose execution was given
    /// up is told so for a minute; later its next Hello tells it.
    pub async fn cancels_due(&self, controller_id: &str, now: DateTime<Utc>) -> Result<Vec<ExecutionId>, StoreError> {
        sql("SELECT e.operation AS operation, e.node AS node FROM executions e JOIN nodes n ON n.id = e.node \
             WHERE n.controller_id = ? AND e.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING') \
             AND e.cancel_requested AND NOT e.cancel_refused \
             UNION SELECT e.operation AS operation, e.node AS node FROM executions e JOIN nodes n ON n.id = e.node \
             WHERE n.controller_id = ? AND n.mode = 'INSTALLER' AND e.state = 'FAILED' AND e.error_reason = ? \
             AND e.cancel_requested AND NOT e.cancel_refused AND e.finish_time > ? \
             UNION SELECT c.operation AS operation, c.node AS node FROM conflicts c JOIN nodes n ON n.id = c.node \
             WHERE n.controller_id = ? AND c.resolution = 'ABANDONED' AND c.holds ORDER BY node")
        .bind(controller_id)
        .bind(controller_id)
        .bind(reason::NEVER_RETURNED)
        .time(crate::calendar::earlier(now, TOLD_FOR))
        .bind(controller_id)
        .all(self.reader())
        .await?
        .iter()
        .map(read_id)
        .collect()
    }

    /// Overdue executions of this controller's nodes. The nodes are asked about them, because the store may have lost
    /// their reports.
    pub async fn queries_due(&self, controller_id: &str) -> Result<Vec<ExecutionId>, StoreError> {
        sql("SELECT e.operation AS operation, e.node AS node FROM executions e JOIN nodes n ON n.id = e.node \
             WHERE n.controller_id = ? AND e.overdue AND e.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING') \
             ORDER BY e.node")
        .bind(controller_id)
        .all(self.reader())
        .await?
        .iter()
        .map(read_id)
        .collect()
    }
}
