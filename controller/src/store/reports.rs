//! Reports of nodes.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};

use super::connection::Transaction;
use super::events::{self, CONTROLLER, Happened};
use super::logs;
use super::moves::{self, Move, deadline, patience};
use super::operations::lock;
use super::sql::{Row, signed, sql};
use super::{Assignment, SentLog, Store, StoreError, micros};
use crate::operation::{Action, ExecutionError, ExecutionState, Expected, ReportVerdict, Reported, Stored, on_report};

/// A report of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportRow {
    /// On which execution.
    pub execution: ExecutionId,
    /// Under which delivery.
    pub attempt: u32,
    /// The number of the state change.
    pub sequence: u64,
    /// The state.
    pub state: ExecutionState,
    /// What the node is doing.
    pub phase: String,
    /// Bytes of the phase that are done.
    pub bytes_done: u64,
    /// Bytes of the phase in all; 0: unknown.
    pub bytes_total: u64,
    /// Why it did not succeed.
    pub error: Option<ExecutionError>,
    /// The boot id under which it is said.
    pub boot_id: String,
    /// What the running system says it is.
    pub release: Option<Release>,
    /// It was too late for a cancel.
    pub cancel_refused: bool,
    /// What the node logged of it, where it did not succeed.
    pub log: SentLog,
}

/// What a running system says it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Release {
    /// The name of the execution that installed it.
    pub execution: String,
    /// SHA-256 of its image; empty: none.
    pub image_sha256: String,
    /// SHA-256 of its boot files; empty: none.
    pub boot_sha256: String,
}

/// What became of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportOutcome {
    /// It is stored, now or before: acknowledge its sequence.
    Acked,
    /// It only carries progress: keep it for `flush_progress`.
    Progress,
    /// It is of another delivery: answer with this one.
    Stale(Box<Assignment>),
    /// There is no such execution of this node: acknowledge, so that the node forgets it.
    Unknown,
    /// The session is not the node's any more: end it.
    NotHolder,
    /// Not accepted and not to be acknowledged; the text says why.
    Refused(String),
}

impl Store {
    /// Stores a report, if it is news.
    pub async fn apply_report(
        &self,
        node: &NodeId,
        epoch: i64,
        report: &ReportRow,
        now: DateTime<Utc>,
    ) -> Result<ReportOutcome, StoreError> {
        if &report.execution.node != node {
            return Ok(ReportOutcome::Refused("it is about another node".to_owned()));
        }
        let tx = self.begin().await?;
        let Some(holder) = hold_node(&tx, node, epoch).await? else { return Ok(ReportOutcome::NotHolder) };
        lock(&*tx, [&report.execution.operation]).await?;
        let outcome = apply(&tx, &holder, report, now).await?;
        match outcome {
            // Nothing was written.
            ReportOutcome::Progress | ReportOutcome::Unknown => {}
            _ => self.commit(tx).await?,
        }
        Ok(outcome)
    }
}

/// The node of a session, locked.
pub(super) struct Holder {
    epoch: i64,
    boot_id: String,
    family: String,
    labels: BTreeMap<String, String>,
}

impl Holder {
    /// The number of the session.
    pub(super) fn epoch(&self) -> i64 {
        self.epoch
    }
}

/// Locks a node, if the session still is its own.
pub(super) async fn hold_node(tx: &Transaction, node: &NodeId, epoch: i64) -> Result<Option<Holder>, StoreError> {
    let row = sql("SELECT boot_id, family, labels FROM nodes WHERE id = ? AND session_epoch = ? \
                   AND controller_id IS NOT NULL {lock}")
    .bind(node.as_str())
    .bind(epoch)
    .one(tx)
    .await?;
    row.map(|row| {
        let (boot_id, family) = (row.text("boot_id")?, row.text("family")?);
        Ok(Holder { epoch, boot_id, family, labels: row.json("labels")? })
    })
    .transpose()
}

/// An execution with what a decision needs.
pub(super) struct Found {
    pub(super) stored: Stored,
    pub(super) action: Action,
    /// What the node said last that it does.
    pub(super) phase: String,
    /// The session to which it was last delivered.
    pub(super) epoch: i64,
}

/// Reads what a decision needs; the caller holds the operation's row.
pub(super) async fn find(tx: &Transaction, id: &ExecutionId) -> Result<Option<Found>, StoreError> {
    let row = sql("SELECT e.state AS state, e.attempt AS attempt, e.sequence AS sequence, e.session_epoch AS epoch, \
             e.error_reason AS error_reason, e.assign_boot_id AS assign_boot_id, \
             e.cancel_requested AS cancel_requested, e.phase AS phase, o.action AS action \
         FROM executions e JOIN operations o ON o.id = e.operation WHERE e.operation = ? AND e.node = ?")
    .bind(id.operation.as_str())
    .bind(id.node.as_str())
    .one(tx)
    .await?;
    row.as_ref().map(read).transpose()
}

fn read(row: &Row) -> Result<Found, StoreError> {
    Ok(Found {
        stored: Stored {
            state: row.word("state", ExecutionState::parse)?,
            attempt: row.number("attempt")?,
            sequence: row.number("sequence")?,
            error_reason: row.maybe_text("error_reason")?,
            assign_boot_id: row.text("assign_boot_id")?,
            cancel_requested: row.flag("cancel_requested")?,
        },
        action: row.json("action")?,
        phase: row.text("phase")?,
        epoch: row.int("epoch")?,
    })
}

/// Decides about a report, and stores the decision; the caller holds the rows of the node and of the operation.
pub(super) async fn apply(
    tx: &Transaction,
    holder: &Holder,
    report: &ReportRow,
    now: DateTime<Utc>,
) -> Result<ReportOutcome, StoreError> {
    let Some(found) = find(tx, &report.execution).await? else { return Ok(ReportOutcome::Unknown) };
    let name = report.execution.name();
    let expected = Expected { execution: &name, action: &found.action, family: &holder.family };
    match on_report(&found.stored, &reported(report), &expected) {
        ReportVerdict::Change(to, error) => {
            if !change(tx, report, &found, to, error.as_ref(), now).await? {
                return Ok(ReportOutcome::Refused(format!("it is {} and cannot become {to}", found.stored.state)));
            }
            if tells_why(to) {
                logs::keep(tx, &report.execution, &report.log, now).await?;
            }
            Ok(ReportOutcome::Acked)
        }
        ReportVerdict::Reject(error) => {
            change(tx, report, &found, ExecutionState::Failed, Some(&error), now).await?;
            Ok(ReportOutcome::Refused(error.message))
        }
        ReportVerdict::Duplicate => {
            if report.cancel_refused {
                refuse_cancel(tx, &report.execution).await?;
            }
            // The Hello that said it first may have had no room for it.
            if tells_why(report.state) && report.state == found.stored.state {
                logs::keep(tx, &report.execution, &report.log, now).await?;
            }
            Ok(ReportOutcome::Acked)
        }
        ReportVerdict::Progress => Ok(ReportOutcome::Progress),
        ReportVerdict::Stale => redeliver(tx, holder, report, found, now).await,
        ReportVerdict::Refuse(why) => Ok(ReportOutcome::Refused(why.to_owned())),
    }
}

/// Whether an end in this state is one of which the node's log is kept.
fn tells_why(state: ExecutionState) -> bool {
    matches!(state, ExecutionState::Failed | ExecutionState::RolledBack)
}

fn reported(report: &ReportRow) -> Reported {
    let release = report.release.clone().unwrap_or_default();
    Reported {
        attempt: report.attempt,
        sequence: report.sequence,
        state: report.state,
        error: report.error.clone(),
        boot_id: report.boot_id.clone(),
        release_execution: release.execution,
        release_image: release.image_sha256,
        release_boot: release.boot_sha256,
    }
}

async fn refuse_cancel(tx: &Transaction, id: &ExecutionId) -> Result<u64, StoreError> {
    sql("UPDATE executions SET cancel_refused = TRUE WHERE operation = ? AND node = ?")
        .bind(id.operation.as_str())
        .bind(id.node.as_str())
        .run(tx)
        .await
}

async fn change(
    tx: &Transaction,
    report: &ReportRow,
    found: &Found,
    to: ExecutionState,
    error: Option<&ExecutionError>,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let changed = Move {
        id: &report.execution,
        from: found.stored.state,
        to,
        error,
        action: &found.action,
        phase: &report.phase,
        actor: &report.execution.node.name(),
        reason: &report.phase,
    };
    if !moves::apply(tx, &changed, now).await? {
        return Ok(false);
    }
    let came_back = !report.boot_id.is_empty() && report.boot_id != found.stored.assign_boot_id;
    sql("UPDATE executions SET sequence = ?, bytes_done = ?, bytes_total = ?, \
             cancel_refused = cancel_refused OR ?, boot_id = CASE WHEN ? THEN ? ELSE boot_id END \
         WHERE operation = ? AND node = ?")
    .bind(signed(report.sequence))
    .bind(signed(report.bytes_done))
    .bind(signed(report.bytes_total))
    .bind(report.cancel_refused)
    .bind(came_back)
    .bind(report.boot_id.as_str())
    .bind(report.execution.operation.as_str())
    .bind(report.execution.node.as_str())
    .run(tx)
    .await?;
    Ok(true)
}

/// Most deliveries of an execution that a node can bring about: each is an event, and a node that is led by somebody else
/// must not fill the database with them. An honest one needs one for each session that was lost in the wrong moment.
const MAX_ATTEMPT: u32 = 1000;

/// Raises the attempt above the node's, so that its next report is of a delivery that is known.
async fn redeliver(
    tx: &Transaction,
    holder: &Holder,
    report: &ReportRow,
    found: Found,
    now: DateTime<Utc>,
) -> Result<ReportOutcome, StoreError> {
    let from = found.stored.state;
    if found.stored.attempt >= MAX_ATTEMPT {
        return Ok(ReportOutcome::Refused(format!("it was delivered {MAX_ATTEMPT} times")));
    }
    let to = if from == ExecutionState::Pending { ExecutionState::Assigned } else { from };
    let attempt = found.stored.attempt.max(report.attempt).saturating_add(1);
    let fresh = from == ExecutionState::Pending;
    let changed =
        sql("UPDATE executions SET state = ?, attempt = ?, session_epoch = ?, update_time = ?, assign_time = ?, \
             deadline = ?, patience = ?, overdue = FALSE, \
             assign_boot_id = CASE WHEN assign_boot_id = '' THEN ? ELSE assign_boot_id END \
         WHERE operation = ? AND node = ? AND state = ? AND (NOT ? OR NOT EXISTS \
             (SELECT 1 FROM executions b WHERE b.node = executions.node \
              AND b.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')))")
        .bind(to.as_str())
        .bind(i64::from(attempt))
        .bind(holder.epoch)
        .time(now)
        .time(now)
        .bind(deadline(to, &found.phase, &found.action, now).map(micros))
        .bind(patience(to, &found.action))
        .bind(holder.boot_id.as_str())
        .bind(report.execution.operation.as_str())
        .bind(report.execution.node.as_str())
        .bind(from.as_str())
        .bind(fresh)
        .run(tx)
        .await?;
    if changed == 0 {
        return Ok(ReportOutcome::Refused("the node holds other work".to_owned()));
    }
    let event = Happened::to_node(&report.execution.node, CONTROLLER, from.as_str(), to.as_str(), "delivered again");
    events::record(tx, &report.execution.operation, vec![event], now).await?;
    Ok(ReportOutcome::Stale(Box::new(Assignment {
        execution: report.execution.clone(),
        attempt,
        family: holder.family.clone(),
        known_state: to,
        cancel_requested: found.stored.cancel_requested,
        action: found.action,
        labels: holder.labels.clone(),
    })))
}
