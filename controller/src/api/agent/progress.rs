//! Progress of executions, which is written now and then.

use std::collections::HashMap;

use marco_proto::names::ExecutionId;
use tokio::sync::mpsc;

use super::PROGRESS_INTERVAL;
use crate::api::Context;
use crate::store::ProgressRow;

/// Writes the newest progress of each execution, in one statement a second. Progress lost with the process was only a
/// hint.
pub(super) async fn write(context: Context, mut receiver: mpsc::Receiver<ProgressRow>) {
    let mut newest: HashMap<ExecutionId, ProgressRow> = HashMap::new();
    let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        // `recv` and `tick` are cancel safe, so no row is lost.
        tokio::select! {
            () = context.stop.cancelled() => return,
            row = receiver.recv() => match row {
                Some(row) => { newest.insert(row.execution.clone(), row); }
                None => return,
            },
            _ = ticks.tick(), if !newest.is_empty() => {
                let rows: Vec<ProgressRow> = newest.drain().map(|(_, row)| row).collect();
                if let Err(error) = context.store.flush_progress(&rows, context.clock.now()).await {
                    tracing::debug!(error = &*crate::chain(&error), "progress was not written");
                    // Kept, because progress postpones deadlines. Rows that are newer by now take precedence.
                    for row in rows {
                        newest.entry(row.execution.clone()).or_insert(row);
                    }
                }
            }
        }
    }
}
