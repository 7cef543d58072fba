//! Rollouts: their state, the nodes that may go next, and pausing by itself.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::names::{ExecutionId, NodeId, OperationId};

use super::connection::Connection;
use super::events::{self, CONTROLLER, Happened};
use super::executions::read_id;
use super::operations::{self, lock_free};
use super::silence::Silent;
use super::sql::{Row, Sql, sql};
use super::{Store, StoreError};
use crate::rollout::{Pause, Rollout, Standing};

/// Time without a stream after which a node counts as gone. A node that only lost its stream is back within its longest
/// delay between two tries.
const GONE_AFTER: TimeDelta = TimeDelta::seconds(60);

/// Condition for an execution that holds a slot. Takes one value; see `Gone`.
const IN_FLIGHT: &str = "e.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING') AND NOT e.overdue \
     AND NOT (e.state IN ('ASSIGNED', 'RUNNING') AND n.id IS NOT NULL AND n.controller_id IS NULL \
              AND n.disconnect_time IS NOT NULL AND n.disconnect_time <= ?)";

/// Microseconds since 1970. A node that lost its stream at this time or before is gone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gone(i64);

impl Gone {
    /// No node counts as gone.
    pub(super) const NOBODY: Self = Self(i64::MIN);
}

impl Store {
    pub(super) fn gone(&self, now: DateTime<Utc>) -> Gone {
        // Silence proves nothing at present, so no node counts as gone.
        if !self.may_judge(Silent::Node, now) {
            return Gone::NOBODY;
        }
        Gone(super::micros(crate::calendar::earlier(now, GONE_AFTER)))
    }

    /// Pauses the running operations whose rollout asks for it. Returns them with the reason.
    pub async fn pause_rollouts(&self, now: DateTime<Utc>) -> Result<Vec<(OperationId, Pause)>, StoreError> {
        self.again(|| self.pause_rollouts_once(now)).await
    }

    async fn pause_rollouts_once(&self, now: DateTime<Utc>) -> Result<Vec<(OperationId, Pause)>, StoreError> {
        let mut bad = Vec::new();
        // Looked at without locks first, because mostly nothing has to pause.
        for row in running().all(self.reader()).await? {
            let id = operations::read_id(&row)?;
            // The next claim ends its nodes. Until then it must not keep the other rollouts from pausing.
            let rollout = match row.json::<Rollout>("rollout") {
                Ok(rollout) => rollout,
                Err(error) => {
                    tracing::debug!(operation = %id, error = crate::chain(&error), "a rollout cannot be read");
                    continue;
                }
            };
            if rollout.pause(&standing(self.reader(), &id, &rollout, self.gone(now)).await?).is_some() {
                bad.push((id, rollout));
            }
        }
        if bad.is_empty() {
            return Ok(Vec::new());
        }
        let tx = self.begin().await?;
        let mut held = lock_free(&*tx, bad.iter().map(|(id, _)| id)).await?;
        let mut paused = Vec::new();
        for (id, rollout) in bad {
            let Some(from) = held.remove(&id) else { continue };
            // An operator paused it already, or it has ended.
            let Ok(to) = from.pause() else { continue };
            // Counted again under the operation's lock: executions may have ended since the first look.
            let Some(why) = rollout.pause(&standing(&*tx, &id, &rollout, self.gone(now)).await?) else { continue };
            let reason = why.to_string();
            sql("UPDATE operations SET state = ?, state_reason = ?, paused_by = ? WHERE id = ? AND state = ?")
                .bind(to.as_str())
                .bind(reason.as_str())
                .bind(CONTROLLER)
                .bind(id.as_str())
                .bind(from.as_str())
                .run(&*tx)
                .await?;
            let event = Happened::to_operation(CONTROLLER, from.as_str(), to.as_str(), &reason);
            events::record(&*tx, &id, vec![event], now).await?;
            paused.push((id, why));
        }
        self.commit(tx).await?;
        Ok(paused)
    }

    /// Executions that hold the slots this one waits for. If its group is full, those of the group, else all in flight.
    pub async fn slot_holders(&self, id: &ExecutionId, now: DateTime<Utc>) -> Result<Vec<ExecutionId>, StoreError> {
        let Some(operation) = operations::find(self.reader(), &id.operation).await? else { return Ok(Vec::new()) };
        let Some(rollout) = operation.rollout else { return Ok(Vec::new()) };
        let own = sql("SELECT labels FROM nodes WHERE id = ?").bind(id.node.as_str()).one(self.reader()).await?;
        let own = own.map(|row| group(&rollout, &row)).transpose()?.flatten();
        let mut all = Vec::new();
        for row in in_flight(&id.operation, self.gone(now)).all(self.reader()).await? {
            all.push((read_id(&row)?, group(&rollout, &row)?));
        }
        let of_group: Vec<ExecutionId> =
            all.iter().filter(|(_, group)| *group == own).map(|(id, _)| id.clone()).collect();
        let full = rollout
            .max_in_flight_per_group
            .is_some_and(|limit| of_group.len() >= usize::try_from(limit).unwrap_or(usize::MAX));
        Ok(if full { of_group } else { all.into_iter().map(|(id, _)| id).collect() })
    }

    /// The execution that the node is at work on, if any.
    pub async fn at_work(&self, node: &NodeId) -> Result<Option<ExecutionId>, StoreError> {
        sql("SELECT operation, node FROM executions WHERE node = ? \
             AND state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')")
        .bind(node.as_str())
        .one(self.reader())
        .await?
        .as_ref()
        .map(read_id)
        .transpose()
    }
}

fn running() -> Sql {
    sql("SELECT id, rollout FROM operations WHERE state = 'RUNNING' AND rollout IS NOT NULL ORDER BY id")
}

/// State of an operation's rollout. Exact if the caller holds the operation's row, because every change of an execution
/// holds it too.
pub(super) async fn standing(
    db: &impl Connection,
    id: &OperationId,
    rollout: &Rollout,
    gone: Gone,
) -> Result<Standing, StoreError> {
    let mut standing = Standing::default();
    let counted = sql("SELECT COUNT(*) AS total, COUNT(*) FILTER (WHERE state = 'PENDING') AS pending, \
             COUNT(*) FILTER (WHERE state = 'SUCCEEDED') AS succeeded, \
             COUNT(*) FILTER (WHERE state IN ('FAILED', 'ROLLED_BACK') OR overdue) AS failures, \
             COUNT(*) FILTER (WHERE (state IN ('FAILED', 'ROLLED_BACK') OR overdue) \
                              AND forgiven_time IS NOT NULL) AS forgiven \
         FROM executions WHERE operation = ?")
    .bind(id.as_str())
    .one(db)
    .await?;
    if let Some(row) = counted {
        standing.total = row.number("total")?;
        standing.pending = row.number("pending")?;
        standing.succeeded = row.number("succeeded")?;
        standing.failures = row.number("failures")?;
        standing.forgiven = row.number("forgiven")?;
    }
    // A powered-off node has not vanished. Neither has a node that restarts, for this operation or another.
    let lost = sql("SELECT (SELECT COUNT(*) FROM executions e JOIN nodes n ON n.id = e.node \
             WHERE e.operation = o.id AND e.present AND n.state = 'APPROVED' AND n.controller_id IS NULL \
             AND n.disconnect_time <= ? AND NOT (o.action_kind = 'power-off' AND e.state = 'SUCCEEDED') \
             AND NOT EXISTS (SELECT 1 FROM executions b WHERE b.node = e.node AND NOT b.overdue \
                             AND b.state IN ('REBOOTING', 'VERIFYING'))) AS vanished \
         FROM operations o WHERE o.id = ?")
    .bind(gone.0)
    .bind(id.as_str())
    .one(db)
    .await?;
    if let Some(row) = lost {
        standing.vanished = row.number("vanished")?;
    }
    for row in in_flight(id, gone).all(db).await? {
        standing.in_flight.push(group(rollout, &row)?);
    }
    Ok(standing)
}

fn in_flight(id: &OperationId, gone: Gone) -> Sql {
    sql("SELECT e.operation AS operation, e.node AS node, n.labels AS labels FROM executions e \
         LEFT JOIN nodes n ON n.id = e.node WHERE e.operation = ? AND ")
    .and(IN_FLIGHT)
    .and(" ORDER BY e.node")
    .bind(id.as_str())
    .bind(gone.0)
}

/// Group of a node, from its column `labels`. `None` if the rollout has no groups, or the node lacks the label.
pub(super) fn group(rollout: &Rollout, row: &Row) -> Result<Option<String>, StoreError> {
    let Some(key) = &rollout.group_by else { return Ok(None) };
    // The node was deleted.
    if row.maybe_text("labels")?.is_none() {
        return Ok(None);
    }
    let mut labels: BTreeMap<String, String> = row.json("labels")?;
    Ok(labels.remove(key))
}

/// Executions, each with the group of its node.
type Nodes = Vec<(ExecutionId, Option<String>)>;

/// Waiting executions, by what their rollouts say.
#[derive(Default)]
pub(super) struct Admission {
    /// Those that may go now.
    pub(super) admitted: Vec<ExecutionId>,
    /// Those that can never go, because their rollout or their node's labels cannot be read.
    pub(super) broken: Vec<(ExecutionId, StoreError)>,
}

/// Decides which waiting executions may go now. The rows of `waiting` have the columns `operation`, `node`, `labels`
/// and `rollout`, in the order of assignment.
pub(super) async fn admit(db: &impl Connection, waiting: &[Row], gone: Gone) -> Result<Admission, StoreError> {
    let mut operations: BTreeMap<OperationId, (Rollout, Nodes)> = BTreeMap::new();
    let Admission { mut admitted, mut broken } = Admission::default();
    for row in waiting {
        let id = read_id(row)?;
        // A newer release may have stored a limit that this one does not know. Returned beside the others: as an error
        // it would keep every node of this controller from work, each round.
        let read = match operations.get_mut(&id.operation) {
            Some((rollout, nodes)) => group(rollout, row).map(|group| nodes.push((id.clone(), group))),
            None => row.json::<Rollout>("rollout").and_then(|rollout| {
                let nodes = vec![(id.clone(), group(&rollout, row)?)];
                operations.insert(id.operation.clone(), (rollout, nodes));
                Ok(())
            }),
        };
        if let Err(error) = read {
            broken.push((id, error));
        }
    }
    for (id, (rollout, nodes)) in operations {
        let (ids, groups): (Vec<ExecutionId>, Vec<Option<String>>) = nodes.into_iter().unzip();
        // Counted in the transaction that assigns. A list made earlier could give a slot to two controllers.
        let chosen = rollout.choose(&standing(db, &id, &rollout, gone).await?, &groups);
        admitted.extend(chosen.into_iter().filter_map(|place| ids.get(place).cloned()));
    }
    Ok(Admission { admitted, broken })
}

/// Stores which targets have a stream as the operation begins or resumes, because only those can vanish. Also forgives
/// the failures until now, because the operator who resumes has seen them. The caller holds the operation's row.
///
/// Forgiven failures are stored with each execution, not as a number. A node that was overdue and still succeeds takes
/// its forgiven failure with it, and leaves no room for the failure of another node.
pub(super) async fn note_beginning(
    tx: &impl Connection,
    id: &OperationId,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    sql("UPDATE executions SET present = node IN (SELECT id FROM nodes WHERE controller_id IS NOT NULL) \
         WHERE operation = ? AND EXISTS (SELECT 1 FROM operations o WHERE o.id = ? AND o.rollout IS NOT NULL)")
    .bind(id.as_str())
    .bind(id.as_str())
    .run(tx)
    .await?;
    sql("UPDATE executions SET forgiven_time = ? WHERE operation = ? AND forgiven_time IS NULL \
         AND (state IN ('FAILED', 'ROLLED_BACK') OR overdue)")
    .time(now)
    .bind(id.as_str())
    .run(tx)
    .await?;
    Ok(())
}
