//! Giving executions to nodes.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId, OperationId};

use sea_orm::ConnectionTrait;
use serde::Serialize;

use super::events::{self, CONTROLLER, Happened};
use super::executions::read_id;
use super::moves::{deadline, patience};
use super::operations::lock;
use super::rollouts::{self, Gone};
use super::sql::{Row, sql};
use super::{Store, StoreError, micros};
use crate::operation::{Action, ExecutionState};

/// A delivery of an execution to its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Which execution; its node is the receiver.
    pub execution: ExecutionId,
    /// The number of the delivery.
    pub attempt: u32,
    /// What to do.
    pub action: Action,
    /// The node's board family, for `Update::bootcode_for`; empty: unknown.
    pub family: String,
    /// The state that is stored.
    pub known_state: ExecutionState,
    /// Whether a cancel was asked for meanwhile.
    pub cancel_requested: bool,
    /// The node's labels.
    pub labels: BTreeMap<String, String>,
}

impl Store {
    /// Assigns to each of these nodes, whose sessions this controller holds, its first due execution if it is free.
    pub async fn claim(
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
        let found: Vec<ExecutionId> = first_due(self.reader(), controller_id, &sessions, self.gone(now), now)
            .await?
            .iter()
            .map(read_id)
            .collect::<Result<_, _>>()?;
        if found.is_empty() {
            return Ok(Vec::new());
        }
        match self.take(controller_id, &sessions, &found, now).await {
            Err(error) if error.is_duplicate() => {}
            done => return done,
        }
        // One of the nodes was given other work meanwhile, which spoilt the statement for all of them.
        let mut taken = Vec::new();
        for id in found {
            match self.take(controller_id, &sessions, std::slice::from_ref(&id), now).await {
                Ok(assignments) => taken.extend(assignments),
                Err(error) if error.is_duplicate() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }

    /// What was assigned to the present sessions of this controller and not answered, with the sessions' epochs. When a
    /// claim fails, it may be committed all the same, and then nobody has sent it.
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
        .map(|row| {
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
        })
        .collect()
    }

    /// Assigns those of these executions that still are the first due ones of their nodes.
    async fn take(
        &self,
        controller_id: &str,
        sessions: &[Session<'_>],
        found: &[ExecutionId],
        now: DateTime<Utc>,
    ) -> Result<Vec<Assignment>, StoreError> {
        let tx = self.begin().await?;
        // A session that begins meanwhile waits until its Hello can see what was assigned.
        sql("SELECT id FROM nodes WHERE id IN {each} ORDER BY id {lock}")
            .each(found.iter().map(|id| id.node.as_str()))
            .all(&*tx)
            .await?;
        lock(&*tx, found.iter().map(|id| &id.operation)).await?;
        let mut due = Vec::with_capacity(found.len());
        for row in &first_due(&*tx, controller_id, sessions, self.gone(now), now).await? {
            let id = read_id(row)?;
            if found.contains(&id) {
                due.push(Due::read(id, row, now)?);
            }
        }
        if due.is_empty() {
            return Ok(Vec::new());
        }
        let rows: Vec<&DueRow> = due.iter().map(|due| &due.row).collect();
        let taken = sql("UPDATE executions SET state = 'ASSIGNED', attempt = attempt + 1, sequence = 0, phase = '', \
                 bytes_done = 0, bytes_total = 0, overdue = FALSE, session_epoch = r.epoch, \
                 assign_boot_id = r.boot_id, boot_id = '', deadline = r.deadline, patience = r.patience, assign_time = ?, update_time = ? \
             FROM {rows operation TEXT, node TEXT, epoch BIGINT, boot_id TEXT, deadline BIGINT, patience BIGINT} \
             WHERE executions.operation = r.operation AND executions.node = r.node AND executions.state = 'PENDING' \
             RETURNING executions.operation AS operation, executions.node AS node, executions.attempt AS attempt")
        .time(now)
        .time(now)
        .json(&rows)
        .all(&*tx)
        .await?;
        let mut attempts: BTreeMap<ExecutionId, u32> = BTreeMap::new();
        for row in &taken {
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
        Ok(assignments)
    }
}

/// A session that a controller holds.
#[derive(Serialize)]
struct Session<'a> {
    node: &'a str,
    epoch: i64,
}

/// Executions that are due, of these nodes as far as they are free.
const FREE: &str = "FROM {rows node TEXT, epoch BIGINT} \
    JOIN nodes n ON n.id = r.node AND n.session_epoch = r.epoch \
    JOIN executions e ON e.node = n.id AND e.state = 'PENDING' \
    JOIN operations o ON o.id = e.operation \
    WHERE n.controller_id = ? AND n.state = 'APPROVED' AND o.state = 'RUNNING' \
      AND o.schedule_time <= ? AND o.expire_time > ? AND e.not_before <= ? AND o.closed_until IS NULL \
      AND (n.mode <> 'INSTALLER' OR o.installs_image) AND {within n.labels o.scope} \
      AND NOT EXISTS (SELECT 1 FROM executions b WHERE b.node = n.id \
                      AND b.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING'))";

/// The first due execution of each of these nodes that is free to take it. Those of operations with a rollout are due
/// only as far as it has room, and then keep the node from nothing else.
async fn first_due(
    db: &impl ConnectionTrait,
    controller_id: &str,
    sessions: &[Session<'_>],
    gone: Gone,
    now: DateTime<Utc>,
) -> Result<Vec<Row>, StoreError> {
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
    let admitted = rollouts::admit(db, &waiting, gone).await?;
    sql("SELECT operation, node, epoch, boot_id, family, labels, action FROM ( \
             SELECT e.operation AS operation, e.node AS node, n.session_epoch AS epoch, n.boot_id AS boot_id, \
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
    .await
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
