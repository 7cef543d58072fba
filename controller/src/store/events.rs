//! Events of operations, numbered.

use chrono::{DateTime, Utc};
use marco_proto::names::{NodeId, OperationId};

use serde::Serialize;

use super::connection::Connection;
use super::sql::{Row, signed, sql};
use super::{Scope, Store, StoreError};

/// Something that happened to an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRow {
    /// Within the operation, from 1, without gaps.
    pub number: u64,
    /// Time of the event.
    pub time: DateTime<Utc>,
    /// The node that it concerns. `None`: the operation itself.
    pub node: Option<NodeId>,
    /// Cause of the event: `controller`, a node's name or a user.
    pub actor: String,
    /// The state before; empty at creation.
    pub from: String,
    /// The state after.
    pub to: String,
    /// Reason, or empty.
    pub reason: String,
}

/// Operations whose events are deleted in one transaction, so that other writers get their turn in between.
const PRUNED_AT_ONCE: i64 = 200;

impl Store {
    /// Deletes the events, logs and conflicts of operations that ended before a time. Returns the number of operations.
    /// The operations and their event counts stay, so a late event gets the next number.
    pub async fn prune_events(&self, ended_before: DateTime<Utc>) -> Result<u64, StoreError> {
        self.again(|| self.prune_events_once(ended_before)).await
    }

    async fn prune_events_once(&self, ended_before: DateTime<Utc>) -> Result<u64, StoreError> {
        let mut pruned = 0;
        loop {
            let old = sql("SELECT id FROM operations WHERE finish_time < ? \
                           AND (EXISTS (SELECT 1 FROM events e WHERE e.operation = operations.id) \
                                OR EXISTS (SELECT 1 FROM execution_logs l WHERE l.operation = operations.id)) \
                           ORDER BY id LIMIT ?")
            .time(ended_before)
            .bind(PRUNED_AT_ONCE)
            .all(self.reader())
            .await?
            .iter()
            .map(|row| row.text("id"))
            .collect::<Result<Vec<_>, _>>()?;
            if old.is_empty() {
                return Ok(pruned);
            }
            let tx = self.begin().await?;
            for table in ["events", "execution_logs", "conflicts"] {
                sql(&format!("DELETE FROM {table} WHERE operation IN {{each}}")).each(&old).run(&*tx).await?;
            }
            // No hint: nobody waits for it.
            tx.commit().await?;
            pruned += u64::try_from(old.len()).unwrap_or(u64::MAX);
        }
    }

    /// Events of an operation after a number, oldest first.
    pub async fn events(&self, operation: &OperationId, after: u64, limit: u32) -> Result<Vec<EventRow>, StoreError> {
        self.events_within(&Scope::everything(), operation, after, limit).await
    }

    /// Events of an operation after a number, oldest first: its own, and those of nodes within a scope.
    pub async fn events_within(
        &self,
        scope: &Scope,
        operation: &OperationId,
        after: u64,
        limit: u32,
    ) -> Result<Vec<EventRow>, StoreError> {
        // Events of the operation itself name no node, so every caller who sees the operation sees them.
        sql("SELECT * FROM events WHERE operation = ? AND number > ? AND (? OR node IS NULL OR EXISTS \
                 (SELECT 1 FROM nodes n WHERE n.id = events.node AND {within n.labels})) ORDER BY number LIMIT ?")
        .bind(operation.as_str())
        .bind(signed(after))
        .bind(scope.is_everything())
        .json(scope)
        .bind(i64::from(limit))
        .all(self.reader())
        .await?
        .iter()
        .map(read)
        .collect()
    }
}

fn read(row: &Row) -> Result<EventRow, StoreError> {
    Ok(EventRow {
        number: row.number("number")?,
        time: row.time("time")?,
        node: row.maybe_word("node", |id| NodeId::parse(id).ok())?,
        actor: row.text("actor")?,
        from: row.text("from_state")?,
        to: row.text("to_state")?,
        reason: row.text("reason")?,
    })
}

/// Actor of events that the controller causes by itself.
pub(super) const CONTROLLER: &str = "controller";

/// An event without a number.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Happened {
    /// Set by `record`.
    number: i64,
    node: Option<String>,
    actor: String,
    from_state: &'static str,
    to_state: &'static str,
    reason: String,
}

impl Happened {
    /// An event of the operation itself.
    pub(super) fn to_operation(actor: &str, from: &'static str, to: &'static str, reason: &str) -> Self {
        Self {
            number: 0,
            node: None,
            actor: actor.to_owned(),
            from_state: from,
            to_state: to,
            reason: reason.to_owned(),
        }
    }

    /// An event of one of its executions.
    pub(super) fn to_node(node: &NodeId, actor: &str, from: &'static str, to: &'static str, reason: &str) -> Self {
        Self { node: Some(node.as_str().to_owned()), ..Self::to_operation(actor, from, to, reason) }
    }
}

/// Records events in order. Their numbers come from the operation's row, which is locked by that. So numbers have no
/// gaps, and are committed in order.
pub(super) async fn record(
    tx: &impl Connection,
    operation: &OperationId,
    mut events: Vec<Happened>,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    if events.is_empty() {
        return Ok(());
    }
    let added = i64::try_from(events.len()).unwrap_or(i64::MAX);
    let row = sql("UPDATE operations SET event_count = event_count + ?, update_time = ? WHERE id = ? \
                   RETURNING event_count")
    .bind(added)
    .time(now)
    .bind(operation.as_str())
    .one(tx)
    .await?;
    let Some(row) = row else { return Ok(()) };
    let mut number = row.int("event_count")?.saturating_sub(added);
    for event in &mut events {
        number = number.saturating_add(1);
        event.number = number;
    }
    sql("INSERT INTO events (operation, time, number, node, actor, from_state, to_state, reason) \
         SELECT ?, ?, r.number, r.node, r.actor, r.from_state, r.to_state, r.reason \
         FROM {rows number BIGINT, node TEXT, actor TEXT, from_state TEXT, to_state TEXT, reason TEXT}")
    .bind(operation.as_str())
    .time(now)
    .json(&events)
    .run(tx)
    .await?;
    Ok(())
}
