//! Commands of operators to an operation: cancel, pause, resume, abandon.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, OperationId};

use super::connection::Transaction;
use super::events::{self, Happened};
use super::moves::{self, End, read_found};
use super::open::Tx;
use super::operations::{self, lock};
use super::rollouts::note_beginning;
use super::sql::sql;
use super::{ExecutionRow, OperationRow, Store, StoreError, executions};
use crate::operation::{ExecutionError, ExecutionState, IllegalTransition, OperationState, reason};

/// Result of a cancel, a pause or a resume.
#[derive(Debug, Clone)]
pub enum SteerOutcome {
    /// Done; the operation as it is now.
    Changed(OperationRow),
    /// It was in the wanted state already.
    Unchanged(OperationRow),
    /// Its state does not allow it.
    Refused(OperationRow),
    /// No such operation.
    NotFound,
}

/// Result of abandoning an execution.
#[derive(Debug, Clone)]
pub enum AbandonOutcome {
    /// It ended as FAILED.
    Abandoned(ExecutionRow),
    /// Its node is neither overdue nor in its installer.
    NotOverdue(ExecutionRow),
    /// It had ended before.
    Final(ExecutionRow),
    /// No such execution.
    NotFound,
}

impl Store {
    /// Requests a cancel. Executions that wait end at once; the nodes are asked to stop the others.
    pub async fn request_cancel(
        &self,
        id: &OperationId,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<SteerOutcome, StoreError> {
        self.again(|| self.request_cancel_once(id, actor, now)).await
    }

    async fn request_cancel_once(
        &self,
        id: &OperationId,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<SteerOutcome, StoreError> {
        let Some((tx, from)) = self.hold_once(id).await? else { return Ok(SteerOutcome::NotFound) };
        // A repeated cancel is no error, also after the end.
        let so_already = matches!(from, OperationState::Cancelling | OperationState::Cancelled);
        let to = match self.legal(from.cancel(), so_already, id, &tx).await? {
            Ok(to) => to,
            Err(outcome) => return Ok(outcome),
        };
        sql("UPDATE operations SET state = ?, cancel_requested = TRUE WHERE id = ? AND state = ?")
            .bind(to.as_str())
            .bind(id.as_str())
            .bind(from.as_str())
            .run(&*tx)
            .await?;
        let asked = Happened::to_operation(actor, from.as_str(), to.as_str(), "");
        events::record(&*tx, id, vec![asked], now).await?;
        // Flagged, not ended: only the node knows if it can still stop. The dispatcher asks it until it answers.
        sql("UPDATE executions SET cancel_requested = TRUE, update_time = ? WHERE operation = ? \
             AND state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')")
        .time(now)
        .bind(id.as_str())
        .run(&*tx)
        .await?;
        let waiting = sql("SELECT operation, node, state FROM executions WHERE operation = ? AND state = 'PENDING'")
            .bind(id.as_str())
            .all(&*tx)
            .await?
            .iter()
            .map(read_found)
            .collect::<Result<Vec<_>, _>>()?;
        moves::end(&*tx, &waiting, &End { to: ExecutionState::Cancelled, error: None, actor }, now).await?;
        // Without an active execution the operation ends here; otherwise it ends with the last one.
        operations::finish_if_done(&*tx, id, now).await?;
        self.steered(tx, id).await
    }

    /// Holds back the executions that are not assigned. Active ones go on.
    pub async fn pause(
        &self,
        id: &OperationId,
        actor: &str,
        reason: &str,
        now: DateTime<Utc>,
    ) -> Result<SteerOutcome, StoreError> {
        self.again(|| self.pause_once(id, actor, reason, now)).await
    }

    async fn pause_once(
        &self,
        id: &OperationId,
        actor: &str,
        reason: &str,
        now: DateTime<Utc>,
    ) -> Result<SteerOutcome, StoreError> {
        let Some((tx, from)) = self.hold_once(id).await? else { return Ok(SteerOutcome::NotFound) };
        let to = match self.legal(from.pause(), from == OperationState::Paused, id, &tx).await? {
            Ok(to) => to,
            Err(outcome) => return Ok(outcome),
        };
        self.set(&tx, id, (from, to), actor, reason, now).await?;
        self.steered(tx, id).await
    }

    /// Resumes a paused operation. Its failures until now are forgiven.
    pub async fn resume(&self, id: &OperationId, actor: &str, now: DateTime<Utc>) -> Result<SteerOutcome, StoreError> {
        self.again(|| self.resume_once(id, actor, now)).await
    }

    async fn resume_once(&self, id: &OperationId, actor: &str, now: DateTime<Utc>) -> Result<SteerOutcome, StoreError> {
        let Some((tx, from)) = self.hold_once(id).await? else { return Ok(SteerOutcome::NotFound) };
        // An operation that was paused before its time goes back to SCHEDULED.
        let due = sql("SELECT id FROM operations WHERE id = ? AND schedule_time <= ?")
            .bind(id.as_str())
            .time(now)
            .one(&*tx)
            .await?
            .is_some();
        let goes_on = matches!(from, OperationState::Scheduled | OperationState::Running);
        let to = match self.legal(from.resume(due), goes_on, id, &tx).await? {
            Ok(to) => to,
            Err(outcome) => return Ok(outcome),
        };
        self.set(&tx, id, (from, to), actor, "", now).await?;
        note_beginning(&*tx, id, now).await?;
        self.steered(tx, id).await
    }

    /// Gives up an execution whose node is overdue, or is in its installer: there it may work forever and seem alive.
    pub async fn abandon(
        &self,
        id: &ExecutionId,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<AbandonOutcome, StoreError> {
        self.again(|| self.abandon_once(id, actor, now)).await
    }

    async fn abandon_once(
        &self,
        id: &ExecutionId,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<AbandonOutcome, StoreError> {
        let Some((tx, _)) = self.hold_once(&id.operation).await? else { return Ok(AbandonOutcome::NotFound) };
        let Some(row) = executions::find(&*tx, id).await? else { return Ok(AbandonOutcome::NotFound) };
        if row.state.is_final() {
            return Ok(AbandonOutcome::Final(row));
        }
        let installing = sql("SELECT 1 AS found FROM nodes WHERE id = ? AND mode = 'INSTALLER'").bind(id.node.as_str());
        if row.state == ExecutionState::Pending || (!row.overdue && installing.one(&*tx).await?.is_none()) {
            return Ok(AbandonOutcome::NotOverdue(row));
        }
        sql("UPDATE executions SET cancel_requested = TRUE WHERE operation = ? AND node = ?")
            .bind(id.operation.as_str())
            .bind(id.node.as_str())
            .run(&*tx)
            .await?;
        let error = ExecutionError::new(reason::NEVER_RETURNED, format!("given up by {actor}"));
        let end = End { to: ExecutionState::Failed, error: Some(error), actor };
        moves::end(&*tx, &[(id.clone(), row.state)], &end, now).await?;
        let row = executions::find(&*tx, id).await?;
        self.commit(tx).await?;
        Ok(row.map_or(AbandonOutcome::NotFound, AbandonOutcome::Abandoned))
    }

    /// Begins a transaction that locks an operation. Returns `None` if there is no such operation.
    async fn hold_once(&self, id: &OperationId) -> Result<Option<(Tx, OperationState)>, StoreError> {
        let tx = self.begin().await?;
        Ok(lock(&*tx, [id]).await?.pop().map(|(_, state)| (tx, state)))
    }

    /// The new state, or the outcome if the step is not allowed.
    async fn legal(
        &self,
        to: Result<OperationState, IllegalTransition>,
        so_already: bool,
        id: &OperationId,
        tx: &Transaction,
    ) -> Result<Result<OperationState, SteerOutcome>, StoreError> {
        match to {
            Ok(to) => Ok(Ok(to)),
            Err(_) => Ok(Err(match operations::find(tx, id).await? {
                Some(row) if so_already => SteerOutcome::Unchanged(row),
                Some(row) => SteerOutcome::Refused(row),
                None => SteerOutcome::NotFound,
            })),
        }
    }

    async fn set(
        &self,
        tx: &Transaction,
        id: &OperationId,
        (from, to): (OperationState, OperationState),
        actor: &str,
        reason: &str,
        now: DateTime<Utc>,
    ) -> Result<(), StoreError> {
        let paused_by = if to == OperationState::Paused { actor } else { "" };
        sql("UPDATE operations SET state = ?, state_reason = ?, paused_by = ? WHERE id = ? AND state = ?")
            .bind(to.as_str())
            .bind(reason)
            .bind(paused_by)
            .bind(id.as_str())
            .bind(from.as_str())
            .run(tx)
            .await?;
        events::record(tx, id, vec![Happened::to_operation(actor, from.as_str(), to.as_str(), reason)], now).await
    }

    async fn steered(&self, tx: Tx, id: &OperationId) -> Result<SteerOutcome, StoreError> {
        let row = operations::find(&*tx, id).await?;
        self.commit(tx).await?;
        Ok(row.map_or(SteerOutcome::NotFound, SteerOutcome::Changed))
    }
}
