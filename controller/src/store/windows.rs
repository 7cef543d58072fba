//! Maintenance windows that open and close.

use chrono::{DateTime, Utc};
use marco_proto::names::OperationId;

use super::sql::sql;
use super::{Store, StoreError, micros, operations};
use crate::schedule::MaintenanceWindow;

impl Store {
    /// Opens and closes the windows of operations that are not finished; returns those that changed. A claim relies on
    /// what was found here last.
    pub async fn move_windows(&self, now: DateTime<Utc>) -> Result<Vec<OperationId>, StoreError> {
        let rows = sql("SELECT id, maintenance_window, closed_until FROM operations \
                        WHERE state IN ('SCHEDULED', 'RUNNING', 'PAUSED') AND maintenance_window IS NOT NULL")
        .all(self.reader())
        .await?;
        let mut changed = Vec::new();
        for row in &rows {
            let window: MaintenanceWindow = row.json("maintenance_window")?;
            let closed_until = window.closed_until(now);
            if closed_until.map(micros) != row.maybe_time("closed_until")?.map(micros) {
                changed.push((operations::read_id(row)?, closed_until));
            }
        }
        if changed.is_empty() {
            return Ok(Vec::new());
        }
        let tx = self.begin().await?;
        operations::lock(&*tx, changed.iter().map(|(id, _)| id)).await?;
        for (id, closed_until) in &changed {
            sql("UPDATE operations SET closed_until = ? WHERE id = ?")
                .bind(closed_until.map(micros))
                .bind(id.as_str())
                .run(&*tx)
                .await?;
        }
        self.commit(tx).await?;
        Ok(changed.into_iter().map(|(id, _)| id).collect())
    }
}
