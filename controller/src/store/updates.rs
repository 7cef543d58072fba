//! Ended updates of a node.

use marco_proto::names::{ExecutionId, NodeId, OperationId};

use super::sql::sql;
use super::{Store, StoreError};
use crate::operation::{Action, ExecutionError, ExecutionState, FrozenArtifact};

/// Number of a node's updates that are searched for an image that it ran.
const UPDATES: i64 = 50;

/// The last update of a node that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastUpdate {
    /// Its execution.
    pub id: ExecutionId,
    /// Its final state.
    pub state: ExecutionState,
    /// Error if it did not succeed.
    pub error: Option<ExecutionError>,
    /// The update's action.
    pub action: Action,
}

impl Store {
    /// The node's updates that have ended, newest first.
    async fn ended_updates(&self, node: &NodeId) -> Result<Vec<LastUpdate>, StoreError> {
        let rows = sql("SELECT e.operation, e.state, e.error_reason, e.error_message, o.action FROM executions e \
             JOIN operations o ON o.id = e.operation WHERE e.node = ? AND o.action_kind = 'update' \
             AND e.finish_time IS NOT NULL ORDER BY e.finish_time DESC, e.operation DESC LIMIT ?")
        .bind(node.as_str())
        .bind(UPDATES)
        .all(self.reader())
        .await?;
        rows.iter()
            .map(|row| {
                let operation = row.word("operation", |id| OperationId::parse(id).ok())?;
                let message = row.maybe_text("error_message")?.unwrap_or_default();
                Ok(LastUpdate {
                    id: ExecutionId { operation, node: node.clone() },
                    state: row.word("state", ExecutionState::parse)?,
                    error: row.maybe_text("error_reason")?.map(|reason| ExecutionError { reason, message }),
                    action: row.json("action")?,
                })
            })
            .collect()
    }

    /// The node's last update that has ended.
    pub async fn last_update(&self, node: &NodeId) -> Result<Option<LastUpdate>, StoreError> {
        Ok(self.ended_updates(node).await?.into_iter().next())
    }

    /// The image that a node ran before a failed update: that of its last successful update to another image.
    pub async fn image_before(&self, node: &NodeId, failed: &str) -> Result<Option<FrozenArtifact>, StoreError> {
        let updates = self.ended_updates(node).await?.into_iter();
        let succeeded = updates.filter(|update| update.state == ExecutionState::Succeeded);
        // Installing the failed image once more would fail the same way.
        Ok(succeeded.filter_map(|update| update.action.image().cloned()).find(|image| image.sha256 != failed))
    }
}
