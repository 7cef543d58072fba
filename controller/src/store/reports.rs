//! Reports of nodes: validation, storage, and the answer to each.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{ExecutionId, NodeId};

use super::conflicts::{self, is_at_work};
use super::connection::Transaction;
use super::events::{self, CONTROLLER, Happened};
use super::logs;
use super::moves::{self, Move, deadline, patience};
use super::operations::lock;
use super::sql::{Row, signed, sql};
use super::{Assignment, SentLog, Store, StoreError, micros};
use crate::operation::{
    Action, Conflict, ExecutionError, ExecutionState, Expected, MAX_ATTEMPT, ReportVerdict, Reported, Stored,
    on_report, reason,
};

/// A report of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportRow {
    /// The execution. Its node must be the reporting one.
    pub execution: ExecutionId,
    /// Number of the delivery, counted by the controller.
    pub attempt: u32,
    /// Number of the state change, counted by the node. Progress repeats it.
    pub sequence: u64,
    /// State in the node's journal.
    pub state: ExecutionState,
    /// Current phase of the work; empty if there is none.
    pub phase: String,
    /// Bytes of the phase that are done.
    pub bytes_done: u64,
    /// Bytes of the phase in total; 0 if unknown.
    pub bytes_total: u64,
    /// Reason of a failure or rollback.
    pub error: Option<ExecutionError>,
    /// Boot id of the node now.
    pub boot_id: String,
    /// Boot id under which the node accepted the execution; empty if the agent does not report it.
    pub accept_boot_id: String,
    /// Contents of the running system's /etc/marco-release. `None`: not reported.
    pub release: Option<Release>,
    /// The node answered that it is too late to cancel.
    pub cancel_refused: bool,
    /// Last log lines about the execution, if it failed or was rolled back.
    pub log: SentLog,
    /// The state counts from an older copy of a torn journal.
    pub journal_lost: bool,
}

/// Contents of a running system's /etc/marco-release.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Release {
    /// Name of the execution that installed the system or its boot files; empty: none.
    pub execution: String,
    /// SHA-256 of the image, in hex; empty: none.
    pub image_sha256: String,
    /// SHA-256 of the boot files, in hex; empty: none.
    pub boot_sha256: String,
}

/// Result of a report, from which the session answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportOutcome {
    /// It is stored, now or before: acknowledge its sequence.
    Acked,
    /// The state was stored before, perhaps by a commit whose answer was lost. Only the progress is new: keep it for
    /// `flush_progress`, and acknowledge the sequence unless this session has done so.
    Progress,
    /// It belongs to an earlier delivery: answer with this one.
    Stale(Box<Assignment>),
    /// The store has no such execution: acknowledge, so that the node stops reporting it. Kept as a conflict.
    Unknown,
    /// Kept as a conflict, for an operator to decide.
    Conflict {
        /// True if the report is acknowledged nevertheless.
        acknowledge: bool,
        /// Reason that it was not accepted.
        why: String,
    },
    /// The session is no longer the node's: end it.
    NotHolder,
    /// Rejected with a reason. Not acknowledged.
    Refused(String),
    /// The new system that waits for a verdict is not the one that was asked for, or its execution has ended without
    /// success. Not acknowledged.
    Rejected(ExecutionError),
}

impl ReportOutcome {
    /// True if the session has to acknowledge the report's sequence. `before`: it has already done so.
    pub fn acknowledges(&self, before: bool) -> bool {
        match self {
            Self::Acked | Self::Unknown => true,
            // The answer to the commit may have been lost, or the session that stored it may have ended before its
            // acknowledgement. Without one the node repeats the report forever.
            Self::Progress => !before,
            Self::Conflict { acknowledge, .. } => *acknowledge,
            Self::Stale(_) | Self::NotHolder | Self::Refused(_) | Self::Rejected(_) => false,
        }
    }
}

impl Store {
    /// Stores a report unless it is stored already.
    pub async fn apply_report(
        &self,
        node: &NodeId,
        epoch: i64,
        report: &ReportRow,
        now: DateTime<Utc>,
    ) -> Result<ReportOutcome, StoreError> {
        self.again(|| self.apply_report_once(node, epoch, report, now)).await
    }

    async fn apply_report_once(
        &self,
        node: &NodeId,
        epoch: i64,
        report: &ReportRow,
        now: DateTime<Utc>,
    ) -> Result<ReportOutcome, StoreError> {
        // A compromised node must not change the executions of another one.
        if &report.execution.node != node {
            return Ok(ReportOutcome::Refused("it is about another node".to_owned()));
        }
        let tx = self.begin().await?;
        let Some(holder) = hold_node(&tx, node, epoch).await? else { return Ok(ReportOutcome::NotHolder) };
        // The node is locked before the operation, the order that every transaction keeps. See `store/order.rs`.
        lock(&*tx, [&report.execution.operation]).await?;
        let outcome = apply(&tx, &holder, report, now).await?;
        self.commit(tx).await?;
        Ok(outcome)
    }
}

/// The locked node row of a session.
pub(super) struct Holder {
    epoch: i64,
    boot_id: String,
    family: String,
    labels: BTreeMap<String, String>,
}

impl Holder {
    /// Session epoch.
    pub(super) fn epoch(&self) -> i64 {
        self.epoch
    }
}

/// Locks a node. `None`: the session is no longer the node's.
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

/// An execution, as the decision about a report needs it.
pub(super) struct Found {
    pub(super) stored: Stored,
    pub(super) action: Action,
    /// Phase of the last report.
    pub(super) phase: String,
    /// Epoch of the session to which it was last delivered.
    pub(super) epoch: i64,
    bytes: (u64, u64),
    cancel_refused: bool,
    /// Changes caused by the node, limited by `MAX_CHANGES`.
    pub(super) changes: u32,
    /// Resolution of its conflict; empty if undecided. `None`: no conflict.
    conflict: Option<String>,
}

/// Reads an execution. The caller holds the operation's row.
pub(super) async fn find(tx: &Transaction, id: &ExecutionId) -> Result<Option<Found>, StoreError> {
    let row = sql("SELECT e.state AS state, e.attempt AS attempt, e.sequence AS sequence, e.session_epoch AS epoch, \
             e.error_reason AS error_reason, e.assign_boot_id AS assign_boot_id, \
             e.cancel_requested AS cancel_requested, e.phase AS phase, e.bytes_done AS bytes_done, \
             e.bytes_total AS bytes_total, e.cancel_refused AS cancel_refused, e.changes AS changes, \
             c.resolution AS conflict, o.action AS action \
         FROM executions e JOIN operations o ON o.id = e.operation \
             LEFT JOIN conflicts c ON c.node = e.node AND c.operation = e.operation WHERE e.operation = ? AND e.node = ?")
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
        bytes: (row.number("bytes_done")?, row.number("bytes_total")?),
        cancel_refused: row.flag("cancel_refused")?,
        changes: row.number("changes")?,
        conflict: row.maybe_text("conflict")?,
    })
}

/// Decides about a report and stores the decision. The caller holds the rows of the node and of the operation.
pub(super) async fn apply(
    tx: &Transaction,
    holder: &Holder,
    report: &ReportRow,
    now: DateTime<Utc>,
) -> Result<ReportOutcome, StoreError> {
    let Some(found) = find(tx, &report.execution).await? else {
        conflicts::note(tx, report, Conflict::Unknown, None, now).await?;
        return Ok(ReportOutcome::Unknown);
    };
    let name = report.execution.name();
    let expected = Expected { execution: &name, action: &found.action, family: &holder.family };
    let verdict = match on_report(&found.stored, &reported(report), &expected) {
        // A unique index allows one active execution for each node, and the store has given the node other work
        // meanwhile. That has to be taken back before this one can become active again.
        ReportVerdict::Adopt(to, _)
            if to.is_active() && !found.stored.state.is_active() && is_at_work(tx, &report.execution.node).await? =>
        {
            ReportVerdict::Conflict(Conflict::Busy)
        }
        verdict => verdict,
    };
    if found.conflict.is_some() && !matches!(verdict, ReportVerdict::Conflict(_) | ReportVerdict::Refuse(_)) {
        // A conflict about an ended execution stays visible until the node reports the stored end. CANCELLED agrees
        // with every end except SUCCEEDED: nothing was done.
        let (known, said) = (found.stored.state, report.state);
        let nothing_done = said == ExecutionState::Cancelled && known != ExecutionState::Succeeded;
        if !known.is_final() || known == said || nothing_done {
            conflicts::forget(tx, &report.execution).await?;
        }
    }
    match verdict {
        ReportVerdict::Change(..) | ReportVerdict::Adopt(..) | ReportVerdict::Stale if found.changes >= MAX_CHANGES => {
            Ok(ReportOutcome::Refused(format!("the node has changed its state or its delivery {MAX_CHANGES} times")))
        }
        ReportVerdict::Change(to, error) => {
            if !change(tx, holder, report, &found, to, error.as_ref(), now).await? {
                return Ok(ReportOutcome::Refused(format!("it is {} and cannot become {to}", found.stored.state)));
            }
            if tells_why(to) {
                logs::keep(tx, &report.execution, &report.log, now).await?;
            }
            Ok(ReportOutcome::Acked)
        }
        ReportVerdict::Adopt(to, error) => {
            change(tx, holder, report, &found, to, error.as_ref(), now).await?;
            if tells_why(to) {
                logs::keep(tx, &report.execution, &report.log, now).await?;
            }
            Ok(ReportOutcome::Acked)
        }
        ReportVerdict::Reject(error) => {
            change(tx, holder, report, &found, ExecutionState::Failed, Some(&error), now).await?;
            Ok(ReportOutcome::Rejected(error))
        }
        ReportVerdict::Duplicate => {
            refuse_cancel(tx, report, &found).await?;
            // The Hello that reported this end first may have had no room for the log.
            if tells_why(report.state) && report.state == found.stored.state {
                logs::keep(tx, &report.execution, &report.log, now).await?;
            }
            Ok(ReportOutcome::Acked)
        }
        ReportVerdict::Progress => {
            // Stored at once: progress waits in memory, where newer progress replaces older, and the refused cancel
            // would be lost with it.
            refuse_cancel(tx, report, &found).await?;
            let same = (report.phase.as_str(), report.bytes_done, report.bytes_total)
                == (found.phase.as_str(), found.bytes.0, found.bytes.1);
            Ok(if same { ReportOutcome::Acked } else { ReportOutcome::Progress })
        }
        ReportVerdict::Stale => redeliver(tx, holder, report, found, now).await,
        // An operator accepted the node's report, so the node gets its acknowledgement.
        ReportVerdict::Conflict(_) | ReportVerdict::Refuse(_) if found.conflict.as_deref() == Some("ACCEPTED") => {
            Ok(ReportOutcome::Acked)
        }
        ReportVerdict::Conflict(conflict) => {
            conflicts::note(tx, report, conflict, Some(found.stored.state), now).await?;
            // An operator abandoned the execution, so any end settles it.
            let given_up = found.conflict.as_deref() == Some("ABANDONED") && report.state.is_final();
            let why = conflict.sentence(report.state.as_str(), report.attempt, Some(found.stored.state));
            Ok(ReportOutcome::Conflict { acknowledge: conflict.is_acknowledged(report.state) || given_up, why })
        }
        ReportVerdict::Refuse(why) if report.state == ExecutionState::Verifying => {
            Ok(ReportOutcome::Rejected(ExecutionError::new(reason::NOT_VERIFIED, why)))
        }
        ReportVerdict::Refuse(why) => Ok(ReportOutcome::Refused(why.to_owned())),
    }
}

/// True if the node's log is kept for an end in this state.
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
        accept_boot_id: report.accept_boot_id.clone(),
        journal_lost: report.journal_lost,
        release_execution: release.execution,
        release_image: release.image_sha256,
        release_boot: release.boot_sha256,
    }
}

/// Stores that it is too late to cancel, unless it is stored already.
async fn refuse_cancel(tx: &Transaction, report: &ReportRow, found: &Found) -> Result<(), StoreError> {
    if report.cancel_refused && !found.cancel_refused {
        sql("UPDATE executions SET cancel_refused = TRUE WHERE operation = ? AND node = ?")
            .bind(report.execution.operation.as_str())
            .bind(report.execution.node.as_str())
            .run(tx)
            .await?;
    }
    Ok(())
}

/// Limit of changes of an execution's state or delivery that its node can cause. Each writes an event, and a
/// compromised node must not fill the database with them. An honest node needs a few dozen.
pub(super) const MAX_CHANGES: u32 = 1000;

async fn change(
    tx: &Transaction,
    holder: &Holder,
    report: &ReportRow,
    found: &Found,
    to: ExecutionState,
    error: Option<&ExecutionError>,
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let adopts = (report.attempt > found.stored.attempt && !found.stored.state.is_final()).then_some(report.attempt);
    let told = match adopts {
        Some(attempt) => Some(format!("taken from the node, which was given it {attempt} times")),
        None if report.journal_lost => Some("told from an older copy, since the node's journal was torn".to_owned()),
        None => None,
    };
    let changed = Move {
        id: &report.execution,
        from: found.stored.state,
        to,
        error,
        action: &found.action,
        phase: &report.phase,
        actor: &report.execution.node.name(),
        reason: told.as_deref().unwrap_or(&report.phase),
        adopts,
    };
    if !moves::apply(tx, &changed, now).await? {
        return Ok(false);
    }
    // Only another boot id than that of the assignment proves a restart, so no other is kept.
    let came_back = !report.boot_id.is_empty() && report.boot_id != found.stored.assign_boot_id;
    sql("UPDATE executions SET sequence = ?, bytes_done = ?, bytes_total = ?, changes = changes + 1, \
             cancel_refused = cancel_refused OR ?, boot_id = CASE WHEN ? THEN ? ELSE boot_id END, \
             session_epoch = CASE WHEN ? THEN CAST(? AS BIGINT) ELSE session_epoch END, \
             assign_boot_id = CASE WHEN assign_boot_id = '' THEN ? ELSE assign_boot_id END \
         WHERE operation = ? AND node = ?")
    .bind(signed(report.sequence))
    .bind(signed(report.bytes_done))
    .bind(signed(report.bytes_total))
    .bind(report.cancel_refused)
    .bind(came_back)
    .bind(report.boot_id.as_str())
    // The store lost the session of an adopted delivery, and perhaps its boot id. The node's own record replaces them.
    .bind(adopts.is_some())
    .bind(holder.epoch)
    .bind(report.accept_boot_id.as_str())
    .bind(report.execution.operation.as_str())
    .bind(report.execution.node.as_str())
    .run(tx)
    .await?;
    Ok(true)
}

/// Answers a report of an earlier delivery with the stored delivery, unchanged. A report that is repeated, or that
/// crosses with the answer, gets the same one: a new attempt would be stale before it arrived, and the exchange would
/// never end. Only a PENDING execution gets a new attempt.
async fn redeliver(
    tx: &Transaction,
    holder: &Holder,
    report: &ReportRow,
    found: Found,
    now: DateTime<Utc>,
) -> Result<ReportOutcome, StoreError> {
    let from = found.stored.state;
    let fresh = from == ExecutionState::Pending;
    let further = if fresh { found.stored.attempt.checked_add(1) } else { Some(found.stored.attempt) };
    let Some(attempt) = further.filter(|attempt| *attempt <= MAX_ATTEMPT) else {
        return Ok(ReportOutcome::Refused(format!("it was delivered {MAX_ATTEMPT} times")));
    };
    let to = if fresh { ExecutionState::Assigned } else { from };
    // One write for each session: repeated reports would cost an fsync each.
    let given_here = !fresh && found.epoch == holder.epoch;
    if !given_here && !deliver(tx, holder, report, &found, (to, attempt), now).await? {
        return Ok(ReportOutcome::Refused("the node holds other work".to_owned()));
    }
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

/// Stores a delivery to this session. Returns false if the node has been given other work.
async fn deliver(
    tx: &Transaction,
    holder: &Holder,
    report: &ReportRow,
    found: &Found,
    (to, attempt): (ExecutionState, u32),
    now: DateTime<Utc>,
) -> Result<bool, StoreError> {
    let from = found.stored.state;
    // Other work of the node is excluded here: a violation of the unique index would abort the whole transaction.
    let changed =
        sql("UPDATE executions SET state = ?, attempt = ?, session_epoch = ?, update_time = ?, assign_time = ?, \
             deadline = ?, patience = ?, overdue = FALSE, forgiven_time = NULL, changes = changes + 1, \
             sequence = CASE WHEN state = 'PENDING' THEN 0 ELSE sequence END, \
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
        .bind(from == ExecutionState::Pending)
        .run(tx)
        .await?;
    if changed == 0 {
        return Ok(false);
    }
    let event = Happened::to_node(&report.execution.node, CONTROLLER, from.as_str(), to.as_str(), "delivered again");
    events::record(tx, &report.execution.operation, vec![event], now).await?;
    Ok(true)
}
