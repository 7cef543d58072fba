//! Effects of a Hello on a node's executions.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};

use super::conflicts;
use super::connection::Transaction;
use super::events::CONTROLLER;
use super::executions::read_id;
use super::moves::{self, Move};
use super::operations::lock;
use super::reports::{self, Holder, MAX_CHANGES, ReportOutcome, hold_node};
use super::sql::sql;
use super::{Assignment, ReportRow, Store, StoreError};
use crate::operation::{Conflict, ExecutionError, ExecutionState, Greeting, HelloVerdict, on_hello, on_not_held};

/// The part of a Hello that concerns the node's executions.
#[derive(Debug, Clone, Copy)]
pub struct Hello<'a> {
    /// Boot id and role of the agent that says it.
    pub greeting: Greeting<'a>,
    /// Reports that it lists.
    pub listed: &'a [ReportRow],
}

/// Messages to send to a node after its Hello.
#[derive(Debug, Clone, Default)]
pub struct Reconciled {
    /// Deliveries that answer stale reports.
    pub assigns: Vec<Assignment>,
    /// Stored reports: execution and sequence.
    pub acks: Vec<(ExecutionId, u64)>,
    /// Executions that the node has to stop: they ended, or a cancel was requested, while it was away, and it has not
    /// passed the point of no return. Sent before the acknowledgements, because those let the node begin.
    pub cancels: Vec<ExecutionId>,
    /// Executions to ask the node about.
    pub queries: Vec<ExecutionId>,
    /// Reports that were not accepted, and why.
    pub refused: Vec<(ExecutionId, String)>,
    /// New systems that were not accepted, and why.
    pub rejected: Vec<(ExecutionId, ExecutionError)>,
    /// False if the session is no longer the node's. It has to end.
    pub holder: bool,
}

impl Store {
    /// Applies the reports that a Hello lists, and concludes from those that it does not list.
    pub async fn reconcile(
        &self,
        node: &NodeId,
        epoch: i64,
        Hello { greeting, listed }: Hello<'_>,
        now: DateTime<Utc>,
    ) -> Result<Reconciled, StoreError> {
        self.again(|| self.reconcile_once(node, epoch, Hello { greeting, listed }, now)).await
    }

    async fn reconcile_once(
        &self,
        node: &NodeId,
        epoch: i64,
        Hello { greeting, listed }: Hello<'_>,
        now: DateTime<Utc>,
    ) -> Result<Reconciled, StoreError> {
        let mut answer = Reconciled::default();
        let tx = self.begin().await?;
        // A session that another one replaced must change nothing.
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
        // All operations are locked together, so that they are locked in the order of their ids.
        lock(&*tx, active.iter().chain(listed.iter().map(|report| &report.execution)).map(|id| &id.operation)).await?;
        for report in listed {
            // A node may report about itself only.
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
                ReportOutcome::Conflict { acknowledge, why } => {
                    if acknowledge {
                        answer.acks.push((report.execution.clone(), report.sequence));
                    }
                    answer.refused.push((report.execution.clone(), why));
                }
                ReportOutcome::Refused(why) => answer.refused.push((report.execution.clone(), why)),
                ReportOutcome::Rejected(error) => answer.rejected.push((report.execution.clone(), error)),
                ReportOutcome::NotHolder => answer.holder = false,
            }
            // Even an accepted report may be of a cancelled execution, so this is checked for each.
            if &report.execution.node == node && is_called_off(&tx, report).await? {
                answer.cancels.push(report.execution.clone());
            }
        }
        conflicts::release_unlisted(&tx, node, listed).await?;
        for id in &active {
            let is_listed = listed.iter().any(|report| &report.execution == id);
            if settle(&tx, &holder, id, is_listed, greeting, now).await? {
                answer.queries.push(id.clone());
            }
        }
        self.commit(tx).await?;
        Ok(answer)
    }

    /// Handles a node's answer that its journal does not hold an execution, or that it is busy with another one.
    /// Returns false if the session is no longer the node's.
    pub async fn not_held(
        &self,
        id: &ExecutionId,
        busy_with: Option<&ReportRow>,
        epoch: i64,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        self.again(|| self.not_held_once(id, busy_with, epoch, now)).await
    }

    async fn not_held_once(
        &self,
        id: &ExecutionId,
        busy_with: Option<&ReportRow>,
        epoch: i64,
        now: DateTime<Utc>,
    ) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        let Some(holder) = hold_node(&tx, &id.node, epoch).await? else { return Ok(false) };
        lock(&*tx, [&id.operation].into_iter().chain(busy_with.map(|other| &other.execution.operation))).await?;
        if let Some(found) = reports::find(&tx, id).await?
            && let Some((to, error)) = on_not_held(&found.stored)
            // Each writes events, and a work that the node never takes would be delivered again and again.
            && found.changes < MAX_CHANGES
        {
            let change = Move {
                id,
                from: found.stored.state,
                to,
                error: error.as_ref(),
                action: &found.action,
                phase: "",
                actor: &id.node.name(),
                reason: "the node does not hold it",
                adopts: None,
            };
            moves::apply(&*tx, &change, now).await?;
            sql("UPDATE executions SET changes = changes + 1 WHERE operation = ? AND node = ?")
                .bind(id.operation.as_str())
                .bind(id.node.as_str())
                .run(&*tx)
                .await?;
        }
        if let Some(other) = busy_with {
            reports::apply(&tx, &holder, other, now).await?;
            // The store takes the other one for ended, the node does not. Meanwhile the node gets no work.
            if let Some(found) = reports::find(&tx, &other.execution).await?
                && !found.stored.state.is_active()
            {
                conflicts::note(&tx, other, Conflict::Busy, Some(found.stored.state), now).await?;
            }
        }
        self.commit(tx).await?;
        Ok(true)
    }
}

/// True if the reported execution was cancelled or has ended, and the node can still stop.
async fn is_called_off(tx: &Transaction, report: &ReportRow) -> Result<bool, StoreError> {
    // Later there is nothing left to stop, and the node would only answer that it is too late.
    if !matches!(report.state, ExecutionState::Running | ExecutionState::Rebooting) {
        return Ok(false);
    }
    let Some(found) = reports::find(tx, &report.execution).await? else { return Ok(false) };
    Ok(found.stored.cancel_requested || found.stored.state.is_final())
}

/// Concludes from a Hello about an execution that was active before. Returns true if the node has to be asked.
async fn settle(
    tx: &Transaction,
    holder: &Holder,
    id: &ExecutionId,
    listed: bool,
    greeting: Greeting<'_>,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let Some(found) = reports::find(tx, id).await? else { return Ok(false) };
    // Delivered in this very session, after its Hello was written, so the Hello cannot list it.
    let too_new = found.stored.state == ExecutionState::Assigned && found.epoch == holder.epoch();
    if too_new || !found.stored.state.is_active() {
        return Ok(false);
    }
    let verdict = on_hello(&found.stored, &found.action, listed, greeting);
    let boot_id = greeting.boot_id;
    if let HelloVerdict::Change(to, error) = &verdict {
        let to = *to;
        let change = Move {
            id,
            from: found.stored.state,
            to,
            error: error.as_ref(),
            action: &found.action,
            phase: "",
            actor: CONTROLLER,
            reason: "",
            adopts: None,
        };
        moves::apply(tx, &change, now).await?;
        // The new boot id is the proof of a restart, so it is kept with the execution.
        if boot_id != found.stored.assign_boot_id && to != ExecutionState::Pending {
            sql("UPDATE executions SET boot_id = ? WHERE operation = ? AND node = ?")
                .bind(boot_id)
                .bind(id.operation.as_str())
                .bind(id.node.as_str())
                .run(tx)
                .await?;
        }
    }
    Ok(verdict == HelloVerdict::Ask)
}
