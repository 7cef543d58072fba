//! What operators do to an operation: cancel, pause, resume, abandon.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, OperationId};

use super::{ExecutionRow, OperationRow, Store, StoreError};

/// What became of a cancel, a pause or a resume.
#[derive(Debug, Clone)]
pub enum SteerOutcome {
    /// Done; the operation as it is now.
    Changed(OperationRow),
    /// It was so already.
    Unchanged(OperationRow),
    /// Not possible in its state.
    Refused(OperationRow),
    /// No such operation.
    NotFound,
}

/// What became of giving up an execution.
#[derive(Debug, Clone)]
pub enum AbandonOutcome {
    /// It ended FAILED.
    Abandoned(ExecutionRow),
    /// Its node is not overdue.
    NotOverdue(ExecutionRow),
    /// It had ended.
    Final(ExecutionRow),
    /// No such execution.
    NotFound,
}

impl Store {
    /// Asks that an operation stop: what is not assigned ends at once, the rest is asked of the nodes.
    pub async fn request_cancel(
        &self,
        id: &OperationId,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<SteerOutcome, StoreError> {
        let _ = (id, actor, now);
        todo!()
    }

    /// Holds back what is not assigned.
    pub async fn pause(
        &self,
        id: &OperationId,
        actor: &str,
        reason: &str,
        now: DateTime<Utc>,
    ) -> Result<SteerOutcome, StoreError> {
        let _ = (id, actor, reason, now);
        todo!()
    }

    /// Lets a paused operation go on.
    pub async fn resume(&self, id: &OperationId, actor: &str, now: DateTime<Utc>) -> Result<SteerOutcome, StoreError> {
        let _ = (id, actor, now);
        todo!()
    }

    /// Gives up an execution whose node is overdue.
    pub async fn abandon(
        &self,
        id: &ExecutionId,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<AbandonOutcome, StoreError> {
        let _ = (id, actor, now);
        todo!()
    }
}
