//! Maintenance windows that open and close.

use chrono::{DateTime, Utc};
use marco_proto::names::OperationId;

use super::sql::{Row, sql};
use super::{Store, StoreError, micros, operations};
use crate::calendar;
use crate::schedule::MaintenanceWindow;

impl Store {
    /// Opens and closes the windows of unfinished operations. Returns those that changed. A claim relies on the result
    /// stored here.
    pub async fn move_windows(&self, now: DateTime<Utc>) -> Result<Vec<OperationId>, StoreError> {
        self.again(|| self.move_windows_once(now)).await
    }

    async fn move_windows_once(&self, now: DateTime<Utc>) -> Result<Vec<OperationId>, StoreError> {
        let rows = sql("SELECT id, maintenance_window, closed_until FROM operations \
                        WHERE state IN ('SCHEDULED', 'RUNNING', 'PAUSED') AND maintenance_window IS NOT NULL")
        .all(self.reader())
        .await?;
        let mut changed = Vec::new();
        for row in &rows {
            let id = operations::read_id(row)?;
            let stored = row.maybe_time("closed_until")?;
            // A window that never opens stays closed. Searching the whole calendar for it each time would be slow.
            if stored.is_some_and(|time| time >= calendar::END_OF_TIME) {
                continue;
            }
            let closed_until = closed_until(&id, row, now);
            if closed_until.map(micros) != stored.map(micros) {
                changed.push((id, closed_until));
            }
        }
        if changed.is_empty() {
            return Ok(Vec::new());
        }
        let tx = self.begin().await?;
        let held = operations::lock_free(&*tx, changed.iter().map(|(id, _)| id)).await?;
        changed.retain(|(id, _)| held.contains_key(id));
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

/// Time until which the window of an operation is closed. `None`: open. A window that cannot be read or computed stays
/// closed, and no other operation is affected.
fn closed_until(id: &OperationId, row: &Row, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
    // The window is stored, so a panic here would end this controller at each restart, and the other controllers too.
    let found = row
        .json("maintenance_window")
        .map(|window: MaintenanceWindow| std::panic::catch_unwind(|| window.closed_until(now)).map_err(|_| window));
    match found {
        Ok(Ok(closed_until)) => closed_until,
        Ok(Err(window)) => {
            tracing::error!(operation = %id, ?window, "the dates of a maintenance window cannot be told; it stays closed");
            Some(calendar::END_OF_TIME)
        }
        Err(error) => {
            let error = crate::chain(&error);
            tracing::error!(operation = %id, error, "a maintenance window cannot be read; it stays closed");
            Some(calendar::END_OF_TIME)
        }
    }
}
