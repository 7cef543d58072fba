//! Reports of nodes that can neither be accepted nor proved wrong. They are kept until an operator decides.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};

use super::connection::{Connection, Transaction};
use super::events::{self, Happened};
use super::executions::read_id;
use super::moves::{self, End, Move};
use super::operations::lock;
use super::reports::{MAX_CHANGES, find};
use super::sql::{Row, signed, sql};
use super::{ReportRow, Store, StoreError};
use crate::operation::{Conflict, Decision, ExecutionError, ExecutionState, reason};

/// Limit of conflicts that are kept of one node. A node reports few executions; one that invents them must not fill the
/// database.
const MOST: u64 = 32;

/// A stored conflict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConflictRow {
    /// The execution. The store may not know it.
    pub execution: ExecutionId,
    /// Reason that the report was not accepted.
    pub kind: Conflict,
    /// State that the node reports.
    pub reported: ExecutionState,
    /// State that was stored then. `None`: no such execution.
    pub known: Option<ExecutionState>,
    /// Attempt that the node reports.
    pub attempt: u32,
    /// Error that the node reports.
    pub error: Option<ExecutionError>,
    /// True if the node gets no work because of it.
    pub holds: bool,
    /// Time of the first such report.
    pub time: DateTime<Utc>,
}

impl ConflictRow {
    /// All of it in a sentence for operators.
    pub fn sentence(&self) -> String {
        self.kind.sentence(&said(self.reported, self.error.as_ref()), self.attempt, self.known)
    }
}

/// Result of an operator's decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResolveOutcome {
    /// Decided. These were the conflicts.
    Resolved(Vec<ConflictRow>),
    /// The node has no conflict.
    NoConflict,
    /// No such node.
    NotFound,
}

fn said(state: ExecutionState, error: Option<&ExecutionError>) -> String {
    match error {
        Some(error) => format!("{state}, {}", error.reason),
        None => state.to_string(),
    }
}

fn read(row: &Row) -> Result<ConflictRow, StoreError> {
    Ok(ConflictRow {
        execution: read_id(row)?,
        kind: row.word("kind", Conflict::parse)?,
        reported: row.word("state", ExecutionState::parse)?,
        known: row.maybe_word("known", ExecutionState::parse)?,
        attempt: row.number("attempt")?,
        error: match row.maybe_text("error_reason")? {
            Some(reason) => {
                Some(ExecutionError { reason, message: row.maybe_text("error_message")?.unwrap_or_default() })
            }
            None => None,
        },
        holds: row.flag("holds")?,
        time: row.time("time")?,
    })
}

/// Undecided conflicts of these nodes.
pub(super) async fn of_nodes(
    db: &impl Connection,
    nodes: impl IntoIterator<Item = &NodeId>,
) -> Result<BTreeMap<NodeId, Vec<ConflictRow>>, StoreError> {
    let mut found: BTreeMap<NodeId, Vec<ConflictRow>> = BTreeMap::new();
    let which = sql("SELECT * FROM conflicts WHERE node IN {each} AND resolution = '' ORDER BY node, time, operation");
    for row in which.each(nodes.into_iter().map(NodeId::as_str)).all(db).await? {
        let conflict = read(&row)?;
        found.entry(conflict.execution.node.clone()).or_default().push(conflict);
    }
    Ok(found)
}

/// Stores a report that was not accepted. A repeated one writes nothing, and a decided conflict stays decided. The
/// caller holds the rows of the node and, if it exists, of the operation.
pub(super) async fn note(
    tx: &Transaction,
    report: &ReportRow,
    kind: Conflict,
    known: Option<ExecutionState>,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    let id = &report.execution;
    let before = sql("SELECT kind, state, attempt, resolution FROM conflicts WHERE node = ? AND operation = ?")
        .bind(id.node.as_str())
        .bind(id.operation.as_str())
        .one(tx)
        .await?;
    if let Some(before) = &before {
        let same = (before.text("kind")?, before.text("state")?, before.int("attempt")?)
            == (kind.to_string(), report.state.to_string(), i64::from(report.attempt));
        // A node that refused other work for this one is still at it. Without the hold it would be given other work,
        // and refuse that, with each of its reports.
        let still_busy =
            kind == Conflict::Ended && !report.state.is_final() && before.text("kind")? == Conflict::Busy.as_str();
        // A node says the same with each Hello.
        if same || still_busy {
            return Ok(());
        }
    } else if is_full(tx, &id.node).await? {
        return Ok(());
    }
    let decided = match &before {
        Some(before) => !before.text("resolution")?.is_empty(),
        None => false,
    };
    // After a decision only a node that is still at work is kept from other work.
    sql("INSERT INTO conflicts (node, operation, kind, attempt, sequence, state, known, error_reason, error_message, \
             boot_id, holds, time) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) \
         ON CONFLICT (node, operation) DO UPDATE SET kind = excluded.kind, attempt = excluded.attempt, \
             sequence = excluded.sequence, state = excluded.state, known = excluded.known, \
             error_reason = excluded.error_reason, error_message = excluded.error_message, \
             boot_id = excluded.boot_id, holds = excluded.holds AND (conflicts.resolution = '' \
                 OR excluded.state IN ('RUNNING', 'REBOOTING', 'VERIFYING'))")
    .bind(id.node.as_str())
    .bind(id.operation.as_str())
    .bind(kind.as_str())
    .bind(i64::from(report.attempt))
    .bind(signed(report.sequence))
    .bind(report.state.as_str())
    .bind(known.map(|known| known.as_str().to_owned()))
    .bind(report.error.as_ref().map(|error| error.reason.clone()))
    .bind(report.error.as_ref().map(|error| error.message.clone()))
    .bind(report.boot_id.as_str())
    .bind(kind.holds(report.state))
    .time(now)
    .run(tx)
    .await?;
    // Counted, because a node that alternates between two reports could write events without end.
    if let Some(known) = known
        && !decided
        && count(tx, id).await?
    {
        let why = format!(
            "not taken: {}",
            kind.sentence(&said(report.state, report.error.as_ref()), report.attempt, Some(known))
        );
        let event = Happened::to_node(&id.node, &id.node.name(), known.as_str(), known.as_str(), &why);
        events::record(tx, &id.operation, vec![event], now).await?;
    }
    Ok(())
}

/// Counts one more change that the node caused. Returns true if another event may be written for it.
async fn count(tx: &Transaction, id: &ExecutionId) -> Result<bool, StoreError> {
    let counted = sql("UPDATE executions SET changes = changes + 1 WHERE operation = ? AND node = ? AND changes < ?")
        .bind(id.operation.as_str())
        .bind(id.node.as_str())
        .bind(i64::from(MAX_CHANGES))
        .run(tx)
        .await?;
    Ok(counted == 1)
}

/// True if a node has as many conflicts as are kept. The oldest decided one is deleted to make room.
async fn is_full(tx: &Transaction, node: &NodeId) -> Result<bool, StoreError> {
    let rows = sql("SELECT operation, resolution FROM conflicts WHERE node = ? ORDER BY time, operation")
        .bind(node.as_str())
        .all(tx)
        .await?;
    if u64::try_from(rows.len()).unwrap_or(u64::MAX) < MOST {
        return Ok(false);
    }
    // An undecided conflict never makes room: an operator has to see it.
    for row in &rows {
        if !row.text("resolution")?.is_empty() {
            sql("DELETE FROM conflicts WHERE node = ? AND operation = ?")
                .bind(node.as_str())
                .bind(row.text("operation")?)
                .run(tx)
                .await?;
            return Ok(false);
        }
    }
    Ok(true)
}

/// Deletes the conflict about an execution, after a report of it that could be accepted.
pub(super) async fn forget(tx: &Transaction, id: &ExecutionId) -> Result<(), StoreError> {
    sql("DELETE FROM conflicts WHERE node = ? AND operation = ?")
        .bind(id.node.as_str())
        .bind(id.operation.as_str())
        .run(tx)
        .await?;
    Ok(())
}

/// Releases conflicts that a Hello does not list. The node is not at work on them, so they must not keep work from it.
pub(super) async fn release_unlisted(tx: &Transaction, node: &NodeId, listed: &[ReportRow]) -> Result<(), StoreError> {
    sql("UPDATE conflicts SET holds = FALSE WHERE node = ? AND holds AND operation NOT IN {each}")
        .bind(node.as_str())
        .each(listed.iter().map(|report| report.execution.operation.as_str()))
        .run(tx)
        .await?;
    Ok(())
}

impl Store {
    /// The undecided conflict about an execution, if there is one.
    pub async fn conflict(&self, id: &ExecutionId) -> Result<Option<ConflictRow>, StoreError> {
        let row = sql("SELECT * FROM conflicts WHERE node = ? AND operation = ? AND resolution = ''")
            .bind(id.node.as_str())
            .bind(id.operation.as_str())
            .one(self.reader())
            .await?;
        row.as_ref().map(read).transpose()
    }

    /// Decides all conflicts of a node.
    pub async fn resolve(
        &self,
        node: &NodeId,
        decision: Decision,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<ResolveOutcome, StoreError> {
        self.again(|| self.resolve_once(node, decision, actor, now)).await
    }

    async fn resolve_once(
        &self,
        node: &NodeId,
        decision: Decision,
        actor: &str,
        now: DateTime<Utc>,
    ) -> Result<ResolveOutcome, StoreError> {
        let tx = self.begin().await?;
        if sql("SELECT id FROM nodes WHERE id = ? {lock}").bind(node.as_str()).one(&*tx).await?.is_none() {
            return Ok(ResolveOutcome::NotFound);
        }
        let Some(conflicts) = of_nodes(&*tx, [node]).await?.remove(node) else { return Ok(ResolveOutcome::NoConflict) };
        lock(&*tx, conflicts.iter().map(|conflict| &conflict.execution.operation)).await?;
        for conflict in &conflicts {
            match decision {
                Decision::Accept => accept(&tx, conflict, actor, now).await?,
                Decision::Abandon => abandon(&tx, conflict, actor, now).await?,
            }
        }
        let word = match decision {
            Decision::Accept => "ACCEPTED",
            Decision::Abandon => "ABANDONED",
        };
        // A node that is still at work refuses other work, so it gets none, whatever was decided.
        sql("UPDATE conflicts SET resolution = ?, holds = holds AND state IN ('RUNNING', 'REBOOTING', 'VERIFYING') \
                 AND (known IS NULL OR ?) WHERE node = ? AND resolution = ''")
        .bind(word)
        .bind(decision == Decision::Abandon)
        .bind(node.as_str())
        .run(&*tx)
        .await?;
        self.commit(tx).await?;
        Ok(ResolveOutcome::Resolved(conflicts))
    }
}

/// Accepts the node's report as it is.
async fn accept(tx: &Transaction, conflict: &ConflictRow, actor: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
    let id = &conflict.execution;
    let Some(found) = find(tx, id).await? else { return Ok(()) };
    let from = found.stored.state;
    // A final state stays, except a failure that the report disproves.
    let to = match from {
        ExecutionState::Failed => from.return_late(conflict.reported).ok(),
        _ => from.adopt(conflict.reported).ok(),
    };
    let reason = format!("accepted what the node says: {}", conflict.sentence());
    // The database allows one active execution for each node.
    let busy = match to {
        Some(to) if to.is_active() && !from.is_active() => is_at_work(tx, &id.node).await?,
        _ => false,
    };
    match to {
        Some(to) if !busy => {
            let change = Move {
                id,
                from,
                to,
                error: conflict.error.as_ref(),
                action: &found.action,
                phase: "",
                actor,
                reason: &reason,
                adopts: (from != ExecutionState::Failed).then_some(conflict.attempt),
            };
            moves::apply(tx, &change, now).await?;
            // The stored sequence becomes the node's, so that its next report follows on it.
            sql("UPDATE executions SET sequence = (SELECT c.sequence FROM conflicts c WHERE c.node = executions.node \
                 AND c.operation = executions.operation) WHERE operation = ? AND node = ?")
            .bind(id.operation.as_str())
            .bind(id.node.as_str())
            .run(tx)
            .await?;
            Ok(())
        }
        // Nothing can change, but the decision is recorded.
        _ => {
            let event = Happened::to_node(&id.node, actor, from.as_str(), from.as_str(), &reason);
            events::record(tx, &id.operation, vec![event], now).await
        }
    }
}

/// True if the store has an active execution of a node.
pub(super) async fn is_at_work(tx: &impl Connection, node: &NodeId) -> Result<bool, StoreError> {
    let active = sql("SELECT 1 AS active FROM executions WHERE node = ? \
                      AND state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')");
    Ok(active.bind(node.as_str()).one(tx).await?.is_some())
}

/// Gives up the execution that the node reports.
async fn abandon(tx: &Transaction, conflict: &ConflictRow, actor: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
    let id = &conflict.execution;
    let Some(found) = find(tx, id).await? else { return Ok(()) };
    let from = found.stored.state;
    let message = format!("given up by {actor}: {}", conflict.sentence());
    // It has ended already, so only the decision is recorded.
    if from.is_final() {
        let event = Happened::to_node(&id.node, actor, from.as_str(), from.as_str(), &message);
        return events::record(tx, &id.operation, vec![event], now).await;
    }
    let error = Some(ExecutionError::new(reason::CONFLICT_ABANDONED, message));
    moves::end(tx, &[(id.clone(), from)], &End { to: ExecutionState::Failed, error, actor }, now).await?;
    Ok(())
}
