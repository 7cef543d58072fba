//! What the dispatcher does because time has passed. Each call returns what it changed.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, OperationId};

use super::{Store, StoreError};
use crate::operation::ExecutionState;

/// An execution whose state the dispatcher changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// Which.
    pub execution: ExecutionId,
    /// Its state before.
    pub from: ExecutionState,
    /// Its state now.
    pub to: ExecutionState,
}

/// An execution whose node is late.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overdue {
    /// Which.
    pub execution: ExecutionId,
    /// Its state.
    pub state: ExecutionState,
}

impl Store {
    /// Scheduled operations whose time has come: now RUNNING.
    pub async fn begin_due(&self, now: DateTime<Utc>) -> Result<Vec<OperationId>, StoreError> {
        let _ = now;
        todo!()
    }

    /// Executions not begun before their operation's expire_time: now EXPIRED.
    pub async fn expire(&self, now: DateTime<Utc>) -> Result<Vec<Changed>, StoreError> {
        let _ = now;
        todo!()
    }

    /// Executions past their deadline: flagged overdue.
    pub async fn mark_overdue(&self, now: DateTime<Utc>) -> Result<Vec<Overdue>, StoreError> {
        let _ = now;
        todo!()
    }

    /// Executions overdue for 24 hours: now FAILED, `NEVER_RETURNED`.
    pub async fn give_up(&self, now: DateTime<Utc>) -> Result<Vec<Changed>, StoreError> {
        let _ = now;
        todo!()
    }

    /// Power-offs that were armed and whose node has had no session for 60 s: now SUCCEEDED.
    pub async fn power_off_done(&self, now: DateTime<Utc>) -> Result<Vec<Changed>, StoreError> {
        let _ = now;
        todo!()
    }

    /// Operations of which every execution has ended: now final.
    pub async fn finish_operations(&self, now: DateTime<Utc>) -> Result<Vec<OperationId>, StoreError> {
        let _ = now;
        todo!()
    }

    /// Executions whose node is to be asked for a cancel by this controller, until it answers.
    pub async fn cancels_due(&self, controller_id: &str) -> Result<Vec<ExecutionId>, StoreError> {
        let _ = controller_id;
        todo!()
    }
}
