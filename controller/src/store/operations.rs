//! Operations: storing, reading and finishing them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{NodeId, OperationId, ScheduleId};

use serde::Serialize;

use super::connection::Connection;
use super::events::{self, Happened};
use super::rollouts::note_beginning;
use super::sql::{Row, sql, to_json};
use super::{Scope, Store, StoreError, micros};
use crate::operation::{Action, Counts, ExecutionState, OperationState, Target, final_state};
use crate::rollout::Rollout;
use crate::schedule::MaintenanceWindow;

/// An operation to be stored.
#[derive(Debug, Clone)]
pub struct NewOperation {
    /// UUID of version 7. Fresh, or derived from a schedule and its fire time.
    pub id: OperationId,
    /// The action, with the digests that artifact names had when it was created.
    pub action: Action,
    /// The target as the caller gave it.
    pub target: Target,
    /// The nodes that the target resolved to, without duplicates.
    pub nodes: Vec<NodeId>,
    /// Begin time. If it has passed, the operation begins at once.
    pub schedule_time: DateTime<Utc>,
    /// No execution begins after this time.
    pub expire_time: DateTime<Utc>,
    /// Name of the caller, or of the user who created its schedule. Also the actor of the first event.
    pub creator: String,
    /// Makes a retried request idempotent. `None` if the caller gave no request id.
    pub request: Option<RequestKey>,
    /// The operation that this one retries, if any.
    pub retry_of: Option<OperationId>,
    /// The schedule behind it. `None` for an operation that a caller asked for directly.
    pub origin: Option<Origin>,
    /// Pace, and conditions to pause by itself. `None`: all nodes at once, never paused by itself.
    pub rollout: Option<Rollout>,
    /// Times at which nodes may begin. `None`: at any time.
    pub window: Option<MaintenanceWindow>,
    /// Nodes that the caller is limited to. Checked again when a node is about to get its part.
    pub scope: Scope,
}

/// Origin of an operation that a schedule made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// Id of the schedule.
    pub schedule: ScheduleId,
    /// Scheduled time; `None` for a manual run.
    pub fire_time: Option<DateTime<Utc>>,
    /// Earliest start of each node, from the schedule's jitter. A node that is missing here begins with the operation.
    pub starts: BTreeMap<NodeId, DateTime<Utc>>,
}

/// Identifies a repeated request of one caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestKey {
    /// Chosen by the caller, unique among the caller's operations.
    pub request_id: String,
    /// SHA-256 of the request's body, lower-case hexadecimal.
    pub body_sha256: String,
}

/// Result of a request to store an operation.
#[derive(Debug, Clone)]
pub enum CreateOutcome {
    /// Stored.
    Created(OperationRow),
    /// An earlier request stored it, with the same caller, request id and body.
    Existing(OperationRow),
    /// The caller used the request id before, with another body.
    RequestReused,
    /// An artifact that it names was deleted in the meantime. Nothing is stored.
    ArtifactGone,
}

/// A stored operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperationRow {
    /// UUID of version 7. Sorts by creation, or by fire time if a schedule made it.
    pub id: OperationId,
    /// The action, with digests instead of names.
    pub action: Action,
    /// The target as the caller gave it.
    pub target: Target,
    /// State of the operation as a whole.
    pub state: OperationState,
    /// Reason given for the pause. Empty if none was given or the operation is not paused.
    pub state_reason: String,
    /// User who paused it, or `controller` if its rollout did. Empty if it is not paused, or was paused by a release
    /// that did not store this.
    pub paused_by: String,
    /// Begin time.
    pub schedule_time: DateTime<Utc>,
    /// No execution begins after this time.
    pub expire_time: DateTime<Utc>,
    /// Name of the caller who created it, or who created its schedule.
    pub creator: String,
    /// The operation that it retries, if any.
    pub retry_of: Option<OperationId>,
    /// The schedule that made it, if any.
    pub schedule: Option<ScheduleId>,
    /// The schedule's fire time that it was made for. `None` also for a manual run.
    pub fire_time: Option<DateTime<Utc>>,
    /// Time at which it was stored.
    pub create_time: DateTime<Utc>,
    /// Last change of its own state or of an execution's.
    pub update_time: DateTime<Utc>,
    /// End time. `None` while it is unfinished.
    pub finish_time: Option<DateTime<Utc>>,
    /// Number of its events, which is also the number of the last one.
    pub event_count: u64,
    /// Number of executions per state.
    pub counts: Counts,
    /// Pace, and conditions to pause by itself. `None`: all nodes at once.
    pub rollout: Option<Rollout>,
    /// Times at which nodes may begin. `None`: at any time.
    pub window: Option<MaintenanceWindow>,
}

/// Filter for a list of operations. An empty field does not restrict.
#[derive(Debug, Clone, Default)]
pub struct OperationQuery {
    /// Only operations created before this one, for the next page.
    pub after: Option<OperationId>,
    /// Largest number of rows.
    pub limit: u32,
    /// Only operations in one of these states.
    pub states: Vec<OperationState>,
    /// Only operations with an execution on this node.
    pub node: Option<NodeId>,
    /// Only operations with an execution on a node within the scope.
    pub scope: Scope,
}

impl Store {
    /// Stores an operation, its executions and its first event. Returns the stored one if the same request came before.
    pub async fn create_operation(&self, new: &NewOperation, now: DateTime<Utc>) -> Result<CreateOutcome, StoreError> {
        self.again(|| self.create_operation_once(new, now)).await
    }

    async fn create_operation_once(&self, new: &NewOperation, now: DateTime<Utc>) -> Result<CreateOutcome, StoreError> {
        let tx = self.begin().await?;
        match insert_all(&*tx, new, now).await {
            Ok(true) => {}
            // The same request came before, perhaps at the same moment through another controller.
            Ok(false) => {
                tx.rollback().await?;
                return self.existing(new).await;
            }
            // The foreign key of `needs` fails if a concurrent delete removed the bytes first.
            Err(error) if error.is_dangling() => {
                tx.rollback().await?;
                return Ok(CreateOutcome::ArtifactGone);
            }
            Err(error) => return Err(error),
        }
        let row = find(&*tx, &new.id).await?;
        self.commit(tx).await?;
        row.map(CreateOutcome::Created).ok_or(StoreError::Unknown { what: "operation", value: new.id.to_string() })
    }

    /// An operation with its counts.
    pub async fn operation(&self, id: &OperationId) -> Result<Option<OperationRow>, StoreError> {
        find(self.reader(), id).await
    }

    /// Operations, newest first.
    pub async fn operations(&self, query: &OperationQuery) -> Result<Vec<OperationRow>, StoreError> {
        // Ids do not tell which operation is newer: the id of a scheduled one carries its fire time.
        let rows = sql("SELECT o.* FROM operations o WHERE (? OR (o.create_time, o.id) < \
                            (SELECT l.create_time, l.id FROM operations l WHERE l.id = ?)) \
                        AND (? OR o.state IN {each}) \
                        AND (? OR EXISTS (SELECT 1 FROM executions e WHERE e.operation = o.id AND e.node = ?)) \
                        AND (? OR EXISTS (SELECT 1 FROM executions e JOIN nodes n ON n.id = e.node \
                                          WHERE e.operation = o.id AND {within n.labels})) \
                        ORDER BY o.create_time DESC, o.id DESC LIMIT ?")
        // The first value of each pair switches its filter off, so that one text serves all filters.
        .bind(query.after.is_none())
        .bind(query.after.as_ref().map_or("", OperationId::as_str))
        .bind(query.states.is_empty())
        .each(query.states.iter().map(|state| state.as_str()))
        .bind(query.node.is_none())
        .bind(query.node.as_ref().map_or("", NodeId::as_str))
        .bind(query.scope.is_everything())
        .json(&query.scope)
        .bind(i64::from(query.limit))
        .all(self.reader())
        .await?;
        read_all(self.reader(), &rows).await
    }

    /// Number of executions per state of these operations, counting only nodes within a scope.
    pub async fn counts_within(
        &self,
        ids: &[OperationId],
        scope: &Scope,
    ) -> Result<BTreeMap<OperationId, Counts>, StoreError> {
        counts(self.reader(), ids, scope).await
    }

    /// Result of an earlier request of the same caller with this id. `None` if there was none.
    pub async fn requested(&self, creator: &str, key: &RequestKey) -> Result<Option<CreateOutcome>, StoreError> {
        let row = sql("SELECT * FROM operations WHERE creator = ? AND request_id = ?")
            .bind(creator)
            .bind(key.request_id.as_str())
            .one(self.reader())
            .await?;
        let Some(row) = row else { return Ok(None) };
        // The same id with another body is an error of the caller, not a retry.
        if row.maybe_text("request_sha256")?.as_deref() != Some(&key.body_sha256) {
            return Ok(Some(CreateOutcome::RequestReused));
        }
        let found = read_all(self.reader(), std::slice::from_ref(&row)).await?.pop();
        Ok(found.map(CreateOutcome::Existing))
    }

    async fn existing(&self, new: &NewOperation) -> Result<CreateOutcome, StoreError> {
        let Some(request) = &new.request else {
            return Err(StoreError::Unknown { what: "conflict", value: new.id.to_string() });
        };
        Ok(self.requested(&new.creator, request).await?.unwrap_or(CreateOutcome::RequestReused))
    }
}

fn first_state(new: &NewOperation, now: DateTime<Utc>) -> OperationState {
    if new.schedule_time <= now { OperationState::Running } else { OperationState::Scheduled }
}

/// Inserts the operation, its needs, its executions and its first event. Returns false if the same caller has used the
/// request id. Returns an error that `is_dangling` if an artifact is gone.
pub(super) async fn insert_all(
    tx: &impl Connection,
    new: &NewOperation,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    if !insert(tx, new, now).await? {
        return Ok(false);
    }
    insert_needs(tx, new).await?;
    let starts = new.origin.as_ref().map(|origin| &origin.starts);
    let parts: Vec<Part<'_>> = new
        .nodes
        .iter()
        .map(|node| {
            // A start that has passed becomes 0, because only times ahead may hold an execution back.
            let start = starts.and_then(|starts| starts.get(node)).filter(|start| **start > now);
            Part { node: node.as_str(), not_before: start.map_or(0, |start| micros(*start)) }
        })
        .collect();
    sql("INSERT INTO executions (operation, node, state, update_time, not_before) \
         SELECT ?, r.node, 'PENDING', CAST(? AS BIGINT), r.not_before FROM {rows node TEXT, not_before BIGINT}")
    .bind(new.id.as_str())
    .time(now)
    .json(&parts)
    .run(tx)
    .await?;
    // The dispatcher does this for an operation that begins later (`begin_due`).
    if first_state(new, now) == OperationState::Running {
        note_beginning(tx, &new.id, now).await?;
    }
    let created = Happened::to_operation(&new.creator, "", first_state(new, now).as_str(), "");
    events::record(tx, &new.id, vec![created], now).await?;
    Ok(true)
}

/// A row of `{rows ...}`.
#[derive(Serialize)]
struct Part<'a> {
    node: &'a str,
    not_before: i64,
}

/// Inserts the operation's row. Returns false if the same caller has used the request id.
async fn insert(tx: &impl Connection, new: &NewOperation, now: DateTime<Utc>) -> Result<bool, StoreError> {
    // A request id of NULL never conflicts, so requests without one are always inserted.
    let inserted =
        sql("INSERT INTO operations (id, action, action_kind, installs_image, target, state, schedule_time, \
             expire_time, creator, request_id, request_sha256, retry_of, schedule, fire_time, rollout, \
             maintenance_window, closed_until, scope, create_time, update_time) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (creator, request_id) DO NOTHING")
        .bind(new.id.as_str())
        .json(&new.action)
        .bind(new.action.kind())
        .bind(new.action.image().is_some())
        .bind(to_json(&new.target))
        .bind(first_state(new, now).as_str())
        .time(new.schedule_time)
        .time(new.expire_time)
        .bind(new.creator.as_str())
        .bind(new.request.as_ref().map(|request| request.request_id.clone()))
        .bind(new.request.as_ref().map(|request| request.body_sha256.clone()))
        .bind(new.retry_of.as_ref().map(|id| id.as_str().to_owned()))
        .bind(new.origin.as_ref().map(|origin| origin.schedule.as_str().to_owned()))
        .bind(new.origin.as_ref().and_then(|origin| origin.fire_time).map(micros))
        .bind(new.rollout.as_ref().map(to_json))
        .bind(new.window.as_ref().map(to_json))
        // Stored now, so that the first claim does not begin a node outside of the window.
        .bind(new.window.as_ref().and_then(|window| window.closed_until(now)).map(micros))
        .json(&new.scope)
        .time(now)
        .time(now)
        .run(tx)
        .await?;
    Ok(inserted == 1)
}

/// Stores which bytes it needs. They are kept until it has ended.
async fn insert_needs(tx: &impl Connection, new: &NewOperation) -> Result<(), StoreError> {
    let artifacts = new.action.artifacts();
    if !artifacts.is_empty() {
        sql(
            "INSERT INTO needs (operation, artifact, sha256) SELECT ?, r.id, r.sha256 FROM {rows id TEXT, sha256 TEXT}",
        )
        .bind(new.id.as_str())
        .json(&artifacts)
        .run(tx)
        .await?;
    }
    Ok(())
}

/// Reads one operation, also inside a transaction.
pub(super) async fn find(db: &impl Connection, id: &OperationId) -> Result<Option<OperationRow>, StoreError> {
    let rows = sql("SELECT * FROM operations WHERE id = ?").bind(id.as_str()).all(db).await?;
    Ok(read_all(db, &rows).await?.pop())
}

/// Locks operations in the order of their ids, as every transaction must, and returns their states.
pub(super) async fn lock(
    tx: &impl Connection,
    ids: impl IntoIterator<Item = &OperationId>,
) -> Result<Vec<(OperationId, OperationState)>, StoreError> {
    locked(tx, "SELECT id, state FROM operations WHERE id IN {each} ORDER BY id {lock}", ids).await
}

/// Locks those operations that no other transaction holds, and returns their states. For rounds: the next one takes the
/// rest. A round that waited for one operation, in each of its steps, held up all others and the beat.
pub(super) async fn lock_free(
    tx: &impl Connection,
    ids: impl IntoIterator<Item = &OperationId>,
) -> Result<BTreeMap<OperationId, OperationState>, StoreError> {
    let free = locked(tx, "SELECT id, state FROM operations WHERE id IN {each} ORDER BY id {skip}", ids).await?;
    Ok(free.into_iter().collect())
}

async fn locked(
    tx: &impl Connection,
    select: &str,
    ids: impl IntoIterator<Item = &OperationId>,
) -> Result<Vec<(OperationId, OperationState)>, StoreError> {
    sql(select)
        .each(ids.into_iter().map(OperationId::as_str))
        .all(tx)
        .await?
        .iter()
        .map(|row| Ok((read_id(row)?, row.word("state", OperationState::parse)?)))
        .collect()
}

/// Gives the operation its final state if all its executions have ended. Returns true if it did.
pub(super) async fn finish_if_done(
    tx: &impl Connection,
    id: &OperationId,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    // Checked first: counting the executions of a large operation at each report would cost far more.
    let done = sql("SELECT state, cancel_requested FROM operations WHERE id = ? AND NOT EXISTS \
                    (SELECT 1 FROM executions e WHERE e.operation = operations.id AND e.state IN \
                     ('PENDING', 'ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING'))")
    .bind(id.as_str())
    .one(tx)
    .await?;
    let Some(row) = done else { return Ok(false) };
    let from = row.word("state", OperationState::parse)?;
    let counts = counts(tx, std::slice::from_ref(id), &Scope::everything()).await?.remove(id).unwrap_or_default();
    // A FAILED operation can end again, as something else, if a node that was given up returns.
    let Some(to) = final_state(&counts, row.flag("cancel_requested")?).filter(|to| *to != from) else {
        return Ok(false);
    };
    if from.finish(&counts, row.flag("cancel_requested")?).is_err() {
        return Ok(false);
    }
    let changed = sql("UPDATE operations SET state = ?, finish_time = ? WHERE id = ? AND state = ?")
        .bind(to.as_str())
        .time(now)
        .bind(id.as_str())
        .bind(from.as_str())
        .run(tx)
        .await?;
    if changed == 1 {
        // From here on the bytes may be swept, unless a name or another operation needs them.
        sql("DELETE FROM needs WHERE operation = ?").bind(id.as_str()).run(tx).await?;
        let finished = Happened::to_operation(events::CONTROLLER, from.as_str(), to.as_str(), "");
        events::record(tx, id, vec![finished], now).await?;
    }
    Ok(changed == 1)
}

pub(super) fn read_id(row: &Row) -> Result<OperationId, StoreError> {
    row.word("id", |id| OperationId::parse(id).ok())
}

async fn counts(
    db: &impl Connection,
    ids: &[OperationId],
    scope: &Scope,
) -> Result<BTreeMap<OperationId, Counts>, StoreError> {
    let rows = sql("SELECT operation AS id, state, COUNT(*) AS number, COUNT(*) FILTER (WHERE overdue) AS late \
                    FROM executions WHERE operation IN {each} AND (? OR EXISTS \
                        (SELECT 1 FROM nodes n WHERE n.id = executions.node AND {within n.labels})) \
                    GROUP BY operation, state")
    .each(ids.iter().map(OperationId::as_str))
    .bind(scope.is_everything())
    .json(scope)
    .all(db)
    .await?;
    let mut all: BTreeMap<OperationId, Counts> = BTreeMap::new();
    for row in &rows {
        let counts = all.entry(read_id(row)?).or_default();
        let (number, late): (u32, u32) = (row.number("number")?, row.number("late")?);
        let state = row.word("state", ExecutionState::parse)?;
        counts.total = counts.total.saturating_add(number);
        let place = match state {
            ExecutionState::Pending => &mut counts.pending,
            ExecutionState::Succeeded => &mut counts.succeeded,
            ExecutionState::Failed => &mut counts.failed,
            ExecutionState::RolledBack => &mut counts.rolled_back,
            ExecutionState::Cancelled => &mut counts.cancelled,
            ExecutionState::Expired => &mut counts.expired,
            ExecutionState::Assigned
            | ExecutionState::Running
            | ExecutionState::Rebooting
            | ExecutionState::Verifying => {
                counts.overdue = counts.overdue.saturating_add(late);
                &mut counts.active
            }
        };
        *place = place.saturating_add(number);
    }
    Ok(all)
}

async fn read_all(db: &impl Connection, rows: &[Row]) -> Result<Vec<OperationRow>, StoreError> {
    let ids = rows.iter().map(read_id).collect::<Result<Vec<_>, _>>()?;
    // One query for all operations of a page, not one for each.
    let mut counts = counts(db, &ids, &Scope::everything()).await?;
    rows.iter()
        .zip(ids)
        .map(|(row, id)| {
            Ok(OperationRow {
                action: row.json("action")?,
                target: row.json("target")?,
                state: row.word("state", OperationState::parse)?,
                state_reason: row.text("state_reason")?,
                paused_by: row.text("paused_by")?,
                schedule_time: row.time("schedule_time")?,
                expire_time: row.time("expire_time")?,
                creator: row.text("creator")?,
                retry_of: row.maybe_word("retry_of", |id| OperationId::parse(id).ok())?,
                schedule: row.maybe_word("schedule", |id| ScheduleId::parse(id).ok())?,
                fire_time: row.maybe_time("fire_time")?,
                create_time: row.time("create_time")?,
                update_time: row.time("update_time")?,
                finish_time: row.maybe_time("finish_time")?,
                event_count: row.number("event_count")?,
                counts: counts.remove(&id).unwrap_or_default(),
                rollout: row.maybe_json("rollout")?,
                window: row.maybe_json("maintenance_window")?,
                id,
            })
        })
        .collect()
}
