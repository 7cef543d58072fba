//! What nodes say that can neither be taken nor proved wrong: kept until an operator decides.

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

/// Conflicts that are kept of one node. A node speaks of few executions; one that invents them fills no database.
const MOST: u64 = 32;

/// A stored conflict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConflictRow {
    /// Of which execution; the store may not know it.
    pub execution: ExecutionId,
    /// Why the report was not taken.
    pub kind: Conflict,
    /// The state that the node reports.
    pub reported: ExecutionState,
    /// The state that was stored then; `None`: no such execution.
    pub known: Option<ExecutionState>,
    /// The attempt that the node reports.
    pub attempt: u32,
    /// The node's error.
    pub error: Option<ExecutionError>,
    /// The node gets no work because of it.
    pub holds: bool,
    /// When the node first said so.
    pub time: DateTime<Utc>,
}

impl ConflictRow {
    /// All of it, for people.
    pub fn sentence(&self) -> String {
        self.kind.sentence(&said(self.reported, self.error.as_ref()), self.attempt, self.known)
    }
}

/// What became of an operator's decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResolveOutcome {
    /// Decided; what the conflicts were.
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

/// The conflicts of these nodes that nobody has decided about.
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

/// Keeps a report that is not taken. The same again is no news and writes nothing; what an operator has decided about
/// stays decided. The caller holds the rows of the node and, where it exists, of the operation.
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
        if same {
            return Ok(());
        }
    } else if is_full(tx, &id.node).await? {
        return Ok(());
    }
    let decided = match &before {
        Some(before) => !before.text("resolution")?.is_empty(),
        None => false,
    };
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

/// Counts it as one more change that the node brought about; whether another event may be written for it.
async fn count(tx: &Transaction, id: &ExecutionId) -> Result<bool, StoreError> {
    let counted = sql("UPDATE executions SET changes = changes + 1 WHERE operation = ? AND node = ? AND changes < ?")
        .bind(id.operation.as_str())
        .bind(id.node.as_str())
        .bind(i64::from(MAX_CHANGES))
        .run(tx)
        .await?;
    Ok(counted == 1)
}

/// Whether a node has as many conflicts as are kept. The oldest one that was decided about makes room.
async fn is_full(tx: &Transaction, node: &NodeId) -> Result<bool, StoreError> {
    let rows = sql("SELECT operation, resolution FROM conflicts WHERE node = ? ORDER BY time, operation")
        .bind(node.as_str())
        .all(tx)
        .await?;
    if u64::try_from(rows.len()).unwrap_or(u64::MAX) < MOST {
        return Ok(false);
    }
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

/// The node said something of it that could be taken.
pub(super) async fn forget(tx: &Transaction, id: &ExecutionId) -> Result<(), StoreError> {
    sql("DELETE FROM conflicts WHERE node = ? AND operation = ?")
        .bind(id.node.as_str())
        .bind(id.operation.as_str())
        .run(tx)
        .await?;
    Ok(())
}

/// A Hello lists what the node is at work on: what it does not list keeps the node from nothing.
pub(super) async fn release_unlisted(tx: &Transaction, node: &NodeId, listed: &[ReportRow]) -> Result<(), StoreError> {
    sql("UPDATE conflicts SET holds = FALSE WHERE node = ? AND holds AND operation NOT IN {each}")
        .bind(node.as_str())
        .each(listed.iter().map(|report| report.execution.operation.as_str()))
        .run(tx)
        .await?;
    Ok(())
}

impl Store {
    /// What a node says of an execution and is not taken, if nobody has decided about it.
    pub async fn conflict(&self, id: &ExecutionId) -> Result<Option<ConflictRow>, StoreError> {
        let row = sql("SELECT * FROM conflicts WHERE node = ? AND operation = ? AND resolution = ''")
            .bind(id.node.as_str())
            .bind(id.operation.as_str())
            .one(self.reader())
            .await?;
        row.as_ref().map(read).transpose()
    }

    /// Decides about all conflicts of a node.
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
        // A node that is still at work refuses other work, whatever was decided.
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

/// Takes what the node says as it is.
async fn accept(tx: &Transaction, conflict: &ConflictRow, actor: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
    let id = &conflict.execution;
    let Some(found) = find(tx, id).await? else { return Ok(()) };
    let from = found.stored.state;
    // An end is for good, but for a failure that was none.
    let to = match from {
        ExecutionState::Failed => from.return_late(conflict.reported).ok(),
        _ => from.adopt(conflict.reported).ok(),
    };
    let reason = format!("accepted what the node says: {}", conflict.sentence());
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
            sql("UPDATE executions SET sequence = (SELECT c.sequence FROM conflicts c WHERE c.node = executions.node \
                 AND c.operation = executions.operation) WHERE operation = ? AND node = ?")
            .bind(id.operation.as_str())
            .bind(id.node.as_str())
            .run(tx)
            .await?;
            Ok(())
        }
        _ => {
            let event = Happened::to_node(&id.node, actor, from.as_str(), from.as_str(), &reason);
            events::record(tx, &id.operation, vec![event], now).await
        }
    }
}

/// Whether the store has given a node work.
pub(super) async fn is_at_work(tx: &impl Connection, node: &NodeId) -> Result<bool, StoreError> {
    let active = sql("SELECT 1 AS active FROM executions WHERE node = ? \
                      AND state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')");
    Ok(active.bind(node.as_str()).one(tx).await?.is_some())
}

/// Gives up what the node speaks of.
async fn abandon(tx: &Transaction, conflict: &ConflictRow, actor: &str, now: DateTime<Utc>) -> Result<(), StoreError> {
    let id = &conflict.execution;
    let Some(found) = find(tx, id).await? else { return Ok(()) };
    let from = found.stored.state;
    let message = format!("given up by {actor}: {}", conflict.sentence());
    if from.is_final() {
        let event = Happened::to_node(&id.node, actor, from.as_str(), from.as_str(), &message);
        return events::record(tx, &id.operation, vec![event], now).await;
    }
    let error = Some(ExecutionError::new(reason::CONFLICT_ABANDONED, message));
    moves::end(tx, &[(id.clone(), from)], &End { to: ExecutionState::Failed, error, actor }, now).await?;
    Ok(())
}
