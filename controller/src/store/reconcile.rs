//! What a Hello changes of a node's executions.

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};

use super::conflicts;
use super::connection::Transaction;
use super::events::CONTROLLER;
use super::executions::read_id;
use super::moves::{self, Move};
use super::operations::lock;
use super::reports::{self, Holder, ReportOutcome, hold_node};
use super::sql::sql;
use super::{Assignment, ReportRow, Store, StoreError};
use crate::operation::{Conflict, ExecutionState, Greeting, HelloVerdict, on_hello, on_not_held};

/// A Hello, as far as it concerns the node's executions.
#[derive(Debug, Clone, Copy)]
pub struct Hello<'a> {
    /// Who says it.
    pub greeting: Greeting<'a>,
    /// What it lists.
    pub listed: &'a [ReportRow],
}

/// What to send to a node after its Hello.
#[derive(Debug, Clone, Default)]
pub struct Reconciled {
    /// Deliveries that answer stale reports.
    pub assigns: Vec<Assignment>,
    /// Reports that are stored: execution and sequence.
    pub acks: Vec<(ExecutionId, u64)>,
    /// Executions that the node is to be asked about.
    pub queries: Vec<ExecutionId>,
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
                ReportOutcome::Conflict { acknowledge, why } => {
                    if acknowledge {
                        answer.acks.push((report.execution.clone(), report.sequence));
                    }
                    answer.refused.push((report.execution.clone(), why));
                }
                ReportOutcome::Refused(why) => answer.refused.push((report.execution.clone(), why)),
                ReportOutcome::NotHolder => answer.holder = false,
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

    /// Draws the conclusion of a node's answer that its journal does not hold an execution, or that it is busy with
    /// another; tells whether the session still is the node's.
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
        }
        if let Some(other) = busy_with {
            reports::apply(&tx, &holder, other, now).await?;
            // The store takes it for ended, and the node does not: it gets nothing else meanwhile.
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

/// Draws the conclusion of a Hello for an execution that was active before it; tells whether the node is to be asked.
async fn settle(
    tx: &Transaction,
    holder: &Holder,
    id: &ExecutionId,
    listed: bool,
    greeting: Greeting<'_>,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let Some(found) = reports::find(tx, id).await? else { return Ok(false) };
    // Delivered to this very session, after its Hello was written.
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
