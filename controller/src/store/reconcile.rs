//! What a Hello changes of a node's executions.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};

use super::connection::Transaction;
use super::events::CONTROLLER;
use super::executions::read_id;
use super::moves::{self, Move};
use super::operations::lock;
use super::reports::{self, Holder, ReportOutcome, hold_node};
use super::sql::sql;
use super::{Assignment, ReportRow, Store, StoreError};
use crate::operation::{ExecutionState, HelloVerdict, NodeMode, on_hello};

/// What to send to a node after its Hello.
#[derive(Debug, Clone, Default)]
pub struct Reconciled {
    /// Deliveries that answer stale reports.
    pub assigns: Vec<Assignment>,
    /// Reports that are stored: execution and sequence.
    pub acks: Vec<(ExecutionId, u64)>,
    /// Reports that are not accepted, and why.
    pub refused: Vec<(ExecutionId, String)>,
    /// False when the session is not the node's any more: end it.
    pub holder: bool,
}

impl Store {
    /// Applies what a Hello lists, and what it does not.
    pub async fn reconcile(
        &self,
        node: &NodeId,
        epoch: i64,
        mode: NodeMode,
        boot_id: &str,
        listed: &[ReportRow],
        now: DateTime<Utc>,
    ) -> Result<Reconciled, StoreError> {
        let mut answer = Reconciled::default();
        let tx = self.begin().await?;
        let Some(holder) = hold_node(&tx, node, epoch).await? else { return Ok(answer) };
        answer.holder = true;
        let active = sql("SELECT operation, node FROM executions WHERE node = ? \
                          AND state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')")
        .bind(node.as_str())
        .all(&*tx)
        .await?
        .iter()
        .map(read_id)
        .collect::<Result<Vec<_>, _>>()?;
        lock(&*tx, active.iter().chain(listed.iter().map(|report| &report.execution)).map(|id| &id.operation)).await?;
        for report in listed {
            let outcome = if &report.execution.node == node {
                reports::apply(&tx, &holder, report, now).await?
            } else {
                ReportOutcome::Refused("it is about another node".to_owned())
            };
            match outcome {
                ReportOutcome::Acked | ReportOutcome::Progress | ReportOutcome::Unknown => {
                    answer.acks.push((report.execution.clone(), report.sequence));
                }
                ReportOutcome::Stale(assignment) => answer.assigns.push(*assignment),
                ReportOutcome::Refused(why) => answer.refused.push((report.execution.clone(), why)),
                ReportOutcome::NotHolder => answer.holder = false,
            }
        }
        for id in &active {
            let is_listed = listed.iter().any(|report| &report.execution == id);
            settle(&tx, &holder, id, is_listed, (mode, boot_id), now).await?;
        }
        self.commit(tx).await?;
        Ok(answer)
    }
}

/// Draws the conclusion of a Hello for an execution that was active before it.
async fn settle(
    tx: &Transaction,
    holder: &Holder,
    id: &ExecutionId,
    listed: bool,
    (mode, boot_id): (NodeMode, &str),
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    let Some(found) = reports::find(tx, id).await? else { return Ok(()) };
    // Delivered to this very session, after its Hello was written.
    let too_new = found.stored.state == ExecutionState::Assigned && found.epoch == holder.epoch();
    if too_new || !found.stored.state.is_active() {
        return Ok(());
    }
    if let HelloVerdict::Change(to, error) = on_hello(&found.stored, &found.action, listed, mode, boot_id) {
        let change = Move {
            id,
            from: found.stored.state,
            to,
            error: error.as_ref(),
            action: &found.action,
            phase: "",
            actor: CONTROLLER,
            reason: "",
        };
        moves::apply(tx, &change, now).await?;
        if boot_id != found.stored.assign_boot_id && to != ExecutionState::Pending {
            sql("UPDATE executions SET boot_id = ? WHERE operation = ? AND node = ?")
                .bind(boot_id)
                .bind(id.operation.as_str())
                .bind(id.node.as_str())
                .run(tx)
                .await?;
        }
    }
    Ok(())
}
