//! Assignment of due executions to free nodes.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId, OperationId};
use serde::Serialize;

use super::connection::Connection;
use super::events::{self, CONTROLLER, Happened};
use super::executions::read_id;
use super::moves::{deadline, patience};
use super::rollouts::{self, Admission, Gone};
use super::sql::{Row, Sql, sql};
use super::{Store, StoreError, micros};
use crate::operation::{Action, ExecutionState, MAX_ATTEMPT};

/// A delivery of an execution to its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The execution. Its node is the receiver.
    pub execution: ExecutionId,
    /// Number of the delivery, from 1 to `MAX_ATTEMPT`. It fences off reports of earlier deliveries.
    pub attempt: u32,
    /// The action, with digests instead of names.
    pub action: Action,
    /// The node's board family, for `Update::bootcode_for`; empty if unknown.
    pub family: String,
    /// Stored state, so that the agent can tell that it is ahead.
    pub known_state: ExecutionState,
    /// True if a cancel was requested meanwhile.
    pub cancel_requested: bool,
    /// The node's labels at the time of the delivery.
    pub labels: BTreeMap<String, String>,
}

/// Longest wait of a claim for rows that another transaction holds, on Postgres.
const LOCK_MILLIS: u32 = 500;

impl Store {
    /// Assigns its first due execution to each of these nodes that is free. Each comes with the epoch of its session.
    /// Skips those whose session this controller no longer holds.
    pub async fn claim(
        &self,
        controller_id: &str,
        nodes: &[(NodeId, i64)],
        now: DateTime<Utc>,
    ) -> Result<Vec<Assignment>, StoreError> {
        self.again(|| self.claim_once(controller_id, nodes, now)).await
    }

    async fn claim_once(
        &self,
        controller_id: &str,
        nodes: &[(NodeId, i64)],
        now: DateTime<Utc>,
    ) -> Result<Vec<Assignment>, StoreError> {
        let sessions: Vec<Session<'_>> =
            nodes.iter().map(|(node, epoch)| Session { node: node.as_str(), epoch: *epoch }).collect();
        if sessions.is_empty() {
            return Ok(Vec::new());
        }
        // Read outside of a transaction first: most rounds find nothing, and need no turn to write.
        let (due, broken) = first_due(self.reader(), controller_id, &sessions, self.gone(now), now).await?;
        for (id, error) in broken {
            self.not_assignable(&id, &error, now).await?;
        }
        let found: Vec<ExecutionId> = due.iter().map(read_id).collect::<Result<_, _>>()?;
        if found.is_empty() {
            return Ok(Vec::new());
        }
        // Locked rows are skipped at first, so that a controller that hangs within a transaction does not keep the
        // nodes of the others from their work. The second try waits for them, but not for long.
        let mut taken = Vec::new();
        let left = self.take_each(controller_id, &sessions, &found, Locks::Free, now, &mut taken).await?;
        if !left.is_empty() {
            match self.take_each(controller_id, &sessions, &left, Locks::Wait, now, &mut taken).await {
                Err(error) if error.is_contention() => {
                    tracing::debug!("executions are locked; the next round asks again")
                }
                done => done.map(|_| ())?,
            }
        }
        Ok(taken)
    }

    /// Assigns these in one transaction, or each in its own if one makes it fail for all: its node was given other work
    /// meanwhile, or its record is defective. Returns those that were locked.
    async fn take_each(
        &self,
        controller_id: &str,
        sessions: &[Session<'_>],
        found: &[ExecutionId],
        locks: Locks,
        now: DateTime<Utc>,
        taken: &mut Vec<Assignment>,
    ) -> Result<Vec<ExecutionId>, StoreError> {
        match self.take_once(controller_id, sessions, found, locks, now, taken).await {
            Err(StoreError::Refused(_) | StoreError::Unknown { .. }) => {}
            done => return done,
        }
        let mut locked = Vec::new();
        for id in found {
            match self.take_once(controller_id, sessions, std::slice::from_ref(id), locks, now, taken).await {
                Ok(left) => locked.extend(left),
                // The node was given other work, so this one stays PENDING.
                Err(error) if error.is_duplicate() => {}
                Err(error @ (StoreError::Refused(_) | StoreError::Unknown { .. })) => {
                    self.not_assignable(id, &error, now).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(locked)
    }

    /// Ends an execution that can never be assigned. Otherwise it would be the first due one of its node in every
    /// round, and keep the node from all later work.
    async fn not_assignable(&self, id: &ExecutionId, error: &StoreError, now: DateTime<Utc>) -> Result<(), StoreError> {
        let why = crate::chain(error);
        tracing::error!(execution = %id, error = why, "an execution cannot be assigned");
        self.break_off(id, format!("it cannot be assigned: {why}"), now).await?;
        Ok(())
    }

    /// Unanswered assignments to the present sessions of this controller, with the sessions' epochs. A claim that
    /// failed may be committed nevertheless (the answer to the commit was lost), and then its assignments were never
    /// sent.
    pub async fn unanswered(&self, controller_id: &str) -> Result<Vec<(Assignment, i64)>, StoreError> {
        sql("SELECT e.operation AS operation, e.node AS node, e.attempt AS attempt, o.action AS action, \
                 n.family AS family, n.labels AS labels, n.session_epoch AS epoch, \
                 e.cancel_requested AS cancel_requested \
             FROM executions e JOIN nodes n ON n.id = e.node JOIN operations o ON o.id = e.operation \
             WHERE n.controller_id = ? AND e.state = 'ASSIGNED' AND e.session_epoch = n.session_epoch ORDER BY e.node")
        .bind(controller_id)
        .all(self.reader())
        .await?
        .iter()
        .filter_map(|row| {
            let read = read_unanswered(row);
            if let Err(error) = &read {
                // Left out, not an error: the others are sent. This one becomes overdue.
                tracing::error!(error = crate::chain(error), "an assignment cannot be read; it is not sent");
            }
            read.ok().map(Ok)
        })
        .collect()
    }

    /// Assigns these executions in one transaction, except those that are no longer the first due ones of their nodes.
    /// Returns those that are locked.
    async fn take_once(
        &self,
        controller_id: &str,
        sessions: &[Session<'_>],
        found: &[ExecutionId],
        locks: Locks,
        now: DateTime<Utc>,
        taken: &mut Vec<Assignment>,
    ) -> Result<Vec<ExecutionId>, StoreError> {
        let tx = self.begin().await?;
        // Nodes are locked too: a session that begins meanwhile waits, and its Hello then sees the new assignment. Both
        // locks are taken in the order of ids, nodes first. See `store/order.rs`.
        let nodes = locks
            .of("SELECT id FROM nodes WHERE id IN {each} ORDER BY id ")
            .each(found.iter().map(|id| id.node.as_str()));
        let operations = locks
            .of("SELECT id FROM operations WHERE id IN {each} ORDER BY id ")
            .each(found.iter().map(|id| id.operation.as_str()));
        if locks == Locks::Wait && self.is_postgres() {
            sql(&format!("SET LOCAL lock_timeout = {LOCK_MILLIS}")).run(&*tx).await?;
        }
        let (nodes, operations) = (ids(&nodes.all(&*tx).await?)?, ids(&operations.all(&*tx).await?)?);
        let (found, locked): (Vec<&ExecutionId>, Vec<&ExecutionId>) =
            found.iter().partition(|id| nodes.contains(id.node.as_str()) && operations.contains(id.operation.as_str()));
        let locked: Vec<ExecutionId> = locked.into_iter().cloned().collect();
        // Read again under the locks: work may have been assigned, cancelled or paused since the first look, and a
        // rollout's free slots are exact only while its operation is locked.
        let mut due = Vec::with_capacity(found.len());
        let mut broken = Vec::new();
        // A rollout that cannot be read is left to the first look of the next round.
        let (rows, _) = first_due(&*tx, controller_id, sessions, self.gone(now), now).await?;
        for row in &rows {
            let id = read_id(row)?;
            if found.contains(&&id) {
                match Due::read(id.clone(), row, now) {
                    Ok(read) => due.push(read),
                    Err(error) => broken.push((id, error)),
                }
            }
        }
        if due.is_empty() {
            // Ended after the rollback, because `not_assignable` takes a transaction of its own.
            tx.rollback().await?;
            for (id, error) in broken {
                self.not_assignable(&id, &error, now).await?;
            }
            return Ok(locked);
        }
        let rows: Vec<&DueRow> = due.iter().map(|due| &due.row).collect();
        let changed = sql("UPDATE executions SET state = 'ASSIGNED', attempt = attempt + 1, sequence = 0, phase = '', \
                 bytes_done = 0, bytes_total = 0, furthest = 0, stretch_time = ?, overdue = FALSE, session_epoch = r.epoch, \
                 assign_boot_id = r.boot_id, boot_id = '', deadline = r.deadline, patience = r.patience, assign_time = ?, update_time = ? \
             FROM {rows operation TEXT, node TEXT, epoch BIGINT, boot_id TEXT, deadline BIGINT, patience BIGINT} \
             WHERE executions.operation = r.operation AND executions.node = r.node AND executions.state = 'PENDING' \
             RETURNING executions.operation AS operation, executions.node AS node, executions.attempt AS attempt")
        .time(now)
        .time(now)
        .time(now)
        .json(&rows)
        .all(&*tx)
        .await?;
        let mut attempts: BTreeMap<ExecutionId, u32> = BTreeMap::new();
        for row in &changed {
            attempts.insert(read_id(row)?, row.number("attempt")?);
        }
        let mut happened: BTreeMap<OperationId, Vec<Happened>> = BTreeMap::new();
        let mut assignments = Vec::with_capacity(due.len());
        for due in due {
            let Some(attempt) = attempts.remove(&due.id) else { continue };
            let (from, to) = (ExecutionState::Pending.as_str(), ExecutionState::Assigned.as_str());
            let event = Happened::to_node(&due.id.node, CONTROLLER, from, to, "");
            happened.entry(due.id.operation.clone()).or_default().push(event);
            assignments.push(Assignment {
                execution: due.id,
                attempt,
                action: due.action,
                family: due.family,
                known_state: ExecutionState::Assigned,
                cancel_requested: false,
                labels: due.labels,
            });
        }
        for (operation, events) in happened {
            events::record(&*tx, &operation, events, now).await?;
        }
        self.commit(tx).await?;
        taken.extend(assignments);
        for (id, error) in broken {
            // Not returned: the assignments above are committed and have to be sent. The next round tries this again.
            if let Err(error) = self.not_assignable(&id, &error, now).await {
                tracing::warn!(execution = %id, error = &*crate::chain(&error), "an execution was not ended");
            }
        }
        Ok(locked)
    }
}

/// Treatment of rows that another transaction holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Locks {
    /// Skipped.
    Free,
    /// Waited for, on Postgres at most `LOCK_MILLIS`.
    Wait,
}

impl Locks {
    fn of(self, select: &str) -> Sql {
        sql(select).and(match self {
            Self::Free => "{skip}",
            Self::Wait => "{lock}",
        })
    }
}

fn ids(rows: &[Row]) -> Result<BTreeSet<String>, StoreError> {
    rows.iter().map(|row| row.text("id")).collect()
}

/// A session of the controller. A row of `{rows ...}`.
#[derive(Serialize)]
struct Session<'a> {
    node: &'a str,
    epoch: i64,
}

/// Due executions of those of these nodes that are free.
const FREE: &str = "FROM {rows node TEXT, epoch BIGINT} \
    JOIN nodes n ON n.id = r.node AND n.session_epoch = r.epoch \
    JOIN executions e ON e.node = n.id AND e.state = 'PENDING' \
    JOIN operations o ON o.id = e.operation \
    WHERE n.controller_id = ? AND n.state = 'APPROVED' AND o.state = 'RUNNING' \
      AND o.schedule_time <= ? AND o.expire_time > ? AND e.not_before <= ? AND o.closed_until IS NULL \
      AND (n.mode <> 'INSTALLER' OR o.installs_image) AND {within n.labels o.scope} \
      AND NOT EXISTS (SELECT 1 FROM conflicts c WHERE c.node = n.id AND c.holds) \
      AND NOT EXISTS (SELECT 1 FROM executions b WHERE b.node = n.id \
                      AND b.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING'))";

fn read_unanswered(row: &Row) -> Result<(Assignment, i64), StoreError> {
    let assignment = Assignment {
        execution: read_id(row)?,
        attempt: row.number("attempt")?,
        action: row.json("action")?,
        family: row.text("family")?,
        known_state: ExecutionState::Assigned,
        cancel_requested: row.flag("cancel_requested")?,
        labels: row.json("labels")?,
    };
    Ok((assignment, row.int("epoch")?))
}

/// Executions that can never be assigned, each with the reason.
type Broken = Vec<(ExecutionId, StoreError)>;

/// The first due execution of each free node. An execution whose rollout has no free slot is not due, so it does not
/// keep its node from work of other operations. Also returns those whose rollout cannot be read.
async fn first_due(
    db: &impl Connection,
    controller_id: &str,
    sessions: &[Session<'_>],
    gone: Gone,
    now: DateTime<Utc>,
) -> Result<(Vec<Row>, Broken), StoreError> {
    let waiting = sql("SELECT e.operation AS operation, e.node AS node, n.labels AS labels, o.rollout AS rollout ")
        .and(FREE)
        .and(" AND o.rollout IS NOT NULL ORDER BY o.schedule_time, o.id, e.node")
        .json(sessions)
        .bind(controller_id)
        .time(now)
        .time(now)
        .time(now)
        .all(db)
        .await?;
    // Only a forecast without locks. Exact once the caller holds the operations, as every change of an execution does.
    let Admission { admitted, broken } = rollouts::admit(db, &waiting, gone).await?;
    let due = sql("SELECT operation, node, epoch, boot_id, family, labels, action, attempt FROM ( \
             SELECT e.attempt AS attempt, e.operation AS operation, e.node AS node, n.session_epoch AS epoch, n.boot_id AS boot_id, \
                    n.family AS family, n.labels AS labels, o.action AS action, \
                    ROW_NUMBER() OVER (PARTITION BY e.node ORDER BY o.schedule_time, o.id) AS place ")
    .and(FREE)
    .and(" AND (o.rollout IS NULL OR e.operation || '/' || e.node IN {each})) AS due WHERE place = 1 ORDER BY node")
    .json(sessions)
    .bind(controller_id)
    .time(now)
    .time(now)
    .time(now)
    .each(admitted.iter().map(|id| format!("{}/{}", id.operation.as_str(), id.node.as_str())))
    .all(db)
    .await?;
    Ok((due, broken))
}

struct Due {
    id: ExecutionId,
    action: Action,
    family: String,
    labels: BTreeMap<String, String>,
    row: DueRow,
}

/// A row of `{rows ...}`.
#[derive(Serialize)]
struct DueRow {
    operation: String,
    node: String,
    epoch: i64,
    boot_id: String,
    deadline: Option<i64>,
    patience: i64,
}

impl Due {
    fn read(id: ExecutionId, row: &Row, now: DateTime<Utc>) -> Result<Self, StoreError> {
        // A counter out of range is a defective record. The agent compares attempts, so none may wrap around.
        let attempt = row.int("attempt")?;
        if !(0..i64::from(MAX_ATTEMPT)).contains(&attempt) {
            return Err(StoreError::Unknown { what: "attempt", value: attempt.to_string() });
        }
        let action: Action = row.json("action")?;
        let (family, labels) = (row.text("family")?, row.json("labels")?);
        let row = DueRow {
            operation: id.operation.as_str().to_owned(),
            node: id.node.as_str().to_owned(),
            epoch: row.int("epoch")?,
            boot_id: row.text("boot_id")?,
            deadline: deadline(ExecutionState::Assigned, "", &action, now).map(micros),
            patience: patience(ExecutionState::Assigned, &action),
        };
        Ok(Self { id, action, family, labels, row })
    }
}
