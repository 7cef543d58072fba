//! Operations, executions and events.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use marco_proto::names::{ArtifactId, ExecutionId, NodeId};
use marco_proto::v1;

use super::{Bad, duration, labels, length, text, timestamp};
use crate::api::status::ApiError;
use crate::operation::{
    Action, Conflict, DEFAULT_NOTICE, ExecutionState, FrozenArtifact, Notice, OperationState, Target, Update,
    WaitReason,
};
use crate::rollout::{Limit, Rollout};
use crate::schedule::{MaintenanceWindow, RecurrenceError};
use crate::store::{ConflictRow, EventRow, ExecutionRow, LogRow, OperationRow};

/// Longest notice. A later restart is the purpose of `schedule_time`.
const MAX_NOTICE: Duration = Duration::from_secs(24 * 3600);
/// Longest window. A longer one would always be open.
const MAX_WINDOW: Duration = Duration::from_secs(366 * 24 * 3600);
/// Most nodes named in one operation.
const TARGETS_MAX: usize = 10_000;

fn notice(delay: Option<prost_types::Duration>, message: String, action: &str, bad: Bad<'_>) -> Notice {
    let delay = match delay {
        None => DEFAULT_NOTICE,
        Some(delay) => match length(delay) {
            Some(delay) if delay <= MAX_NOTICE => delay,
            _ => {
                bad(&format!("operation.{action}.notice"), "must be between 0 and 24 hours".to_owned());
                DEFAULT_NOTICE
            }
        },
    };
    let field = format!("operation.{action}.message");
    if let Err(ApiError::Invalid(violations)) = text(&field, &message) {
        for violation in violations {
            bad(&violation.field, violation.description);
        }
    }
    Notice { delay, message }
}

fn named(name: &str, field: &str, bad: Bad<'_>) -> Option<FrozenArtifact> {
    if name.is_empty() {
        return None;
    }
    match ArtifactId::parse(name) {
        Ok(id) => Some(FrozenArtifact { id: id.as_str().to_owned(), sha256: String::new() }),
        Err(error) => {
            bad(&format!("operation.update.{field}"), error.to_string());
            None
        }
    }
}

/// An action with its artifacts by name, not frozen yet.
pub(in crate::api) fn action(action: v1::operation::Action, bad: Bad<'_>) -> Option<Action> {
    Some(match action {
        v1::operation::Action::Reboot(reboot) => Action::Reboot(notice(reboot.notice, reboot.message, "reboot", bad)),
        v1::operation::Action::PowerOff(off) => Action::PowerOff(notice(off.notice, off.message, "power_off", bad)),
        v1::operation::Action::Update(update) => {
            if update.raw && update.image.is_empty() {
                bad("operation.update.raw", "needs an image, that of a whole disk".to_owned());
            }
            Action::Update(Update {
                image: named(&update.image, "image", bad),
                bootcode: named(&update.bootcode, "bootcode", bad),
                bootcodes: BTreeMap::new(),
                notice: notice(update.notice, update.message, "update", bad),
                discard_home: update.preserve.is_some_and(|preserve| preserve.discard_home),
                raw: update.raw,
            })
        }
    })
}

pub(in crate::api) fn target(target: v1::operation::Target, bad: Bad<'_>) -> Option<Target> {
    match target {
        v1::operation::Target::Nodes(list) => {
            if list.nodes.is_empty() {
                bad("operation.nodes.nodes", "is empty; name at least one node".to_owned());
            }
            // Before the names are read: a request of 1 MiB may have very many.
            if list.nodes.len() > TARGETS_MAX {
                bad("operation.nodes.nodes", format!("names more than {TARGETS_MAX} nodes; use labels"));
                return None;
            }
            let mut ids = Vec::with_capacity(list.nodes.len());
            for (index, name) in list.nodes.iter().enumerate() {
                match NodeId::parse(name) {
                    Ok(id) => ids.push(id.as_str().to_owned()),
                    Err(error) => bad(&format!("operation.nodes.nodes[{index}]"), error.to_string()),
                }
            }
            Some(Target::Nodes(ids))
        }
        v1::operation::Target::Labels(selector) => {
            if selector.match_labels.is_empty() {
                // An empty selector would match every node, which is more likely a mistake than meant.
                let message = "is empty; name at least one label, or use `all` to mean every node";
                bad("operation.labels.match_labels", message.to_owned());
            }
            match labels("operation.labels.match_labels", selector.match_labels) {
                Ok(labels) => Some(Target::Labels(labels)),
                Err(error) => {
                    if let ApiError::Invalid(violations) = error {
                        for violation in violations {
                            bad(&violation.field, violation.description);
                        }
                    }
                    None
                }
            }
        }
        v1::operation::Target::All(v1::AllNodes {}) => Some(Target::All),
    }
}

fn artifact_name(frozen: Option<&FrozenArtifact>) -> String {
    frozen.map(|frozen| format!("artifacts/{}", frozen.id)).unwrap_or_default()
}

fn digest(frozen: Option<&FrozenArtifact>) -> String {
    frozen.map(|frozen| frozen.sha256.clone()).unwrap_or_default()
}

pub(super) fn update(update: &Update, bootcode: Option<&FrozenArtifact>) -> v1::Update {
    v1::Update {
        image: artifact_name(update.image.as_ref()),
        bootcode: artifact_name(bootcode),
        notice: duration(update.notice.delay),
        message: update.notice.message.clone(),
        preserve: Some(v1::Preserve { discard_home: update.discard_home }),
        image_sha256: digest(update.image.as_ref()),
        bootcode_sha256: digest(bootcode),
        raw: update.raw,
    }
}

pub(super) fn reboot(notice: &Notice) -> v1::Reboot {
    v1::Reboot { notice: duration(notice.delay), message: notice.message.clone() }
}

pub(super) fn power_off(notice: &Notice) -> v1::PowerOff {
    v1::PowerOff { notice: duration(notice.delay), message: notice.message.clone() }
}

fn count(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

pub(super) fn asked_action(action: &Action) -> v1::operation::Action {
    match action {
        Action::Reboot(notice) => v1::operation::Action::Reboot(reboot(notice)),
        Action::PowerOff(notice) => v1::operation::Action::PowerOff(power_off(notice)),
        Action::Update(asked) => {
            // Defaults may differ between the boards of one operation. The field holds one, so only a common one is
            // shown.
            let mut defaults = asked.bootcodes.values();
            let only = defaults.next().filter(|_| defaults.next().is_none());
            v1::operation::Action::Update(update(asked, asked.bootcode.as_ref().or(only)))
        }
    }
}

pub(super) fn asked_target(target: &Target) -> v1::operation::Target {
    match target {
        Target::Nodes(ids) => {
            v1::operation::Target::Nodes(v1::NodeList { nodes: ids.iter().map(|id| format!("nodes/{id}")).collect() })
        }
        Target::Labels(labels) => {
            v1::operation::Target::Labels(v1::LabelSelector { match_labels: labels.clone().into_iter().collect() })
        }
        Target::All => v1::operation::Target::All(v1::AllNodes {}),
    }
}

pub(in crate::api) fn operation(row: &OperationRow) -> v1::Operation {
    v1::Operation {
        name: row.id.name(),
        action: Some(asked_action(&row.action)),
        target: Some(asked_target(&row.target)),
        schedule_time: Some(timestamp(row.schedule_time)),
        expire_time: Some(timestamp(row.expire_time)),
        state: operation_state_to_proto(row.state).into(),
        create_time: Some(timestamp(row.create_time)),
        schedule: row.schedule.as_ref().map(|id| id.name()).unwrap_or_default(),
        fire_time: row.fire_time.map(timestamp),
        retry_of: row.retry_of.as_ref().map(|id| id.name()).unwrap_or_default(),
        creator: row.creator.clone(),
        finish_time: row.finish_time.map(timestamp),
        counts: Some(v1::ExecutionCounts {
            total: count(row.counts.total),
            pending: count(row.counts.pending),
            active: count(row.counts.active),
            succeeded: count(row.counts.succeeded),
            failed: count(row.counts.failed),
            rolled_back: count(row.counts.rolled_back),
            cancelled: count(row.counts.cancelled),
            expired: count(row.counts.expired),
            overdue: count(row.counts.overdue),
        }),
        state_reason: row.state_reason.clone(),
        paused_by: row.paused_by.clone(),
        rollout: row.rollout.as_ref().map(rollout_to_proto),
        window: row.window.as_ref().map(window_to_proto),
    }
}

/// Reads a rollout.
pub(in crate::api) fn rollout(asked: v1::Rollout, bad: Bad<'_>) -> Rollout {
    use v1::rollout::FailureLimit;
    let mut number = |value: i32, field: &str| match u32::try_from(value) {
        Ok(number) => number,
        Err(_) => {
            bad(&format!("operation.rollout.{field}"), "must not be negative".to_owned());
            0
        }
    };
    // In the API 0 means no limit.
    let some = |number: u32| (number > 0).then_some(number);
    let max_in_flight = some(number(asked.max_in_flight, "max_in_flight"));
    let canary = number(asked.canary, "canary");
    let max_failures = asked.failure_limit.map(|limit| match limit {
        FailureLimit::MaxFailures(nodes) => Limit::Number(number(nodes, "max_failures")),
        FailureLimit::MaxFailuresPercent(percent) => Limit::Percent(number(percent, "max_failures_percent")),
    });
    let max_in_flight_per_group = some(number(asked.max_in_flight_per_group, "max_in_flight_per_group"));
    if matches!(max_failures, Some(Limit::Percent(percent)) if percent > 100) {
        bad("operation.rollout.max_failures_percent", "must be between 0 and 100".to_owned());
    }
    if let Err(ApiError::Invalid(violations)) = text("operation.rollout.group_by", &asked.group_by) {
        for violation in violations {
            bad(&violation.field, violation.description);
        }
    }
    // One without the other has no effect, and the caller believes in a limit.
    if asked.group_by.is_empty() != max_in_flight_per_group.is_none() {
        let description = "and max_in_flight_per_group need each other: the key of a label, and how many at once";
        bad("operation.rollout.group_by", description.to_owned());
    }
    let group_by = (!asked.group_by.is_empty()).then_some(asked.group_by);
    Rollout { max_in_flight, canary, max_failures, group_by, max_in_flight_per_group }
}

/// Reads a maintenance window.
pub(in crate::api) fn window(
    asked: v1::MaintenanceWindow,
    now: DateTime<Utc>,
    bad: Bad<'_>,
) -> Option<MaintenanceWindow> {
    let duration = asked.duration.and_then(length);
    let Some(duration) = duration.filter(|length| !length.is_zero() && *length <= MAX_WINDOW) else {
        bad("operation.window.duration", "must be more than 0 and at most 366 days".to_owned());
        return None;
    };
    let window = MaintenanceWindow { cron: asked.cron, duration, time_zone: asked.time_zone };
    match window.check(now) {
        Ok(()) => Some(window),
        Err(error) => {
            let field = match error {
                RecurrenceError::Cron { .. } | RecurrenceError::Never(_) => "operation.window.cron",
                RecurrenceError::Zone(_) => "operation.window.time_zone",
            };
            bad(field, error.to_string());
            None
        }
    }
}

pub(super) fn window_to_proto(window: &MaintenanceWindow) -> v1::MaintenanceWindow {
    v1::MaintenanceWindow {
        cron: window.cron.clone(),
        duration: duration(window.duration),
        // An empty zone is UTC. It is written out, because in a schedule's template an empty zone means the schedule's.
        time_zone: if window.time_zone.is_empty() { "UTC".to_owned() } else { window.time_zone.clone() },
    }
}

pub(super) fn rollout_to_proto(rollout: &Rollout) -> v1::Rollout {
    use v1::rollout::FailureLimit;
    v1::Rollout {
        max_in_flight: count(rollout.max_in_flight.unwrap_or_default()),
        canary: count(rollout.canary),
        group_by: rollout.group_by.clone().unwrap_or_default(),
        max_in_flight_per_group: count(rollout.max_in_flight_per_group.unwrap_or_default()),
        failure_limit: rollout.max_failures.map(|limit| match limit {
            Limit::Number(nodes) => FailureLimit::MaxFailures(count(nodes)),
            Limit::Percent(percent) => FailureLimit::MaxFailuresPercent(count(percent)),
        }),
    }
}

pub(super) fn operation_state_to_proto(state: OperationState) -> v1::operation::State {
    match state {
        OperationState::Scheduled => v1::operation::State::Scheduled,
        OperationState::Running => v1::operation::State::Running,
        OperationState::Paused => v1::operation::State::Paused,
        OperationState::Cancelling => v1::operation::State::Cancelling,
        OperationState::Succeeded => v1::operation::State::Succeeded,
        OperationState::Failed => v1::operation::State::Failed,
        OperationState::Cancelled => v1::operation::State::Cancelled,
    }
}

pub(super) fn state_to_proto(state: ExecutionState) -> v1::execution::State {
    match state {
        ExecutionState::Pending => v1::execution::State::Pending,
        ExecutionState::Assigned => v1::execution::State::Assigned,
        ExecutionState::Running => v1::execution::State::Running,
        ExecutionState::Rebooting => v1::execution::State::Rebooting,
        ExecutionState::Verifying => v1::execution::State::Verifying,
        ExecutionState::Succeeded => v1::execution::State::Succeeded,
        ExecutionState::Failed => v1::execution::State::Failed,
        ExecutionState::RolledBack => v1::execution::State::RolledBack,
        ExecutionState::Cancelled => v1::execution::State::Cancelled,
        ExecutionState::Expired => v1::execution::State::Expired,
    }
}

pub(in crate::api) fn execution_state(state: i32) -> Option<ExecutionState> {
    Some(match v1::execution::State::try_from(state).ok()? {
        v1::execution::State::Unspecified => return None,
        v1::execution::State::Pending => ExecutionState::Pending,
        v1::execution::State::Assigned => ExecutionState::Assigned,
        v1::execution::State::Running => ExecutionState::Running,
        v1::execution::State::Rebooting => ExecutionState::Rebooting,
        v1::execution::State::Verifying => ExecutionState::Verifying,
        v1::execution::State::Succeeded => ExecutionState::Succeeded,
        v1::execution::State::Failed => ExecutionState::Failed,
        v1::execution::State::RolledBack => ExecutionState::RolledBack,
        v1::execution::State::Cancelled => ExecutionState::Cancelled,
        v1::execution::State::Expired => ExecutionState::Expired,
    })
}

pub(in crate::api) fn operation_state(state: i32) -> Option<OperationState> {
    Some(match v1::operation::State::try_from(state).ok()? {
        v1::operation::State::Unspecified => return None,
        v1::operation::State::Scheduled => OperationState::Scheduled,
        v1::operation::State::Running => OperationState::Running,
        v1::operation::State::Paused => OperationState::Paused,
        v1::operation::State::Cancelling => OperationState::Cancelling,
        v1::operation::State::Succeeded => OperationState::Succeeded,
        v1::operation::State::Failed => OperationState::Failed,
        v1::operation::State::Cancelled => OperationState::Cancelled,
    })
}

pub(in crate::api) fn execution(row: &ExecutionRow) -> v1::Execution {
    let wait = match row.wait_reason {
        None => v1::execution::WaitReason::Unspecified,
        Some(WaitReason::NotDue) => v1::execution::WaitReason::NotDue,
        Some(WaitReason::NodeOffline) => v1::execution::WaitReason::NodeOffline,
        Some(WaitReason::AwaitingApproval) => v1::execution::WaitReason::AwaitingApproval,
        Some(WaitReason::Paused) => v1::execution::WaitReason::Paused,
        Some(WaitReason::NodeBusy) => v1::execution::WaitReason::NodeBusy,
        Some(WaitReason::NodeConflict) => v1::execution::WaitReason::NodeConflict,
        Some(WaitReason::NodeInstalling) => v1::execution::WaitReason::NodeInstalling,
        Some(WaitReason::NodeQuarantined) => v1::execution::WaitReason::NodeQuarantined,
        Some(WaitReason::WindowClosed) => v1::execution::WaitReason::WindowClosed,
        Some(WaitReason::NoSlot) => v1::execution::WaitReason::NoSlot,
        Some(WaitReason::Due) => v1::execution::WaitReason::Due,
    };
    v1::Execution {
        name: row.id.name(),
        node: row.id.node.name(),
        state: state_to_proto(row.state).into(),
        wait_reason: wait.into(),
        phase: row.phase.clone(),
        bytes_done: row.bytes_done,
        bytes_total: row.bytes_total,
        error: row
            .error
            .as_ref()
            .map(|error| v1::ExecutionError { reason: error.reason.clone(), message: error.message.clone() }),
        attempt: row.attempt,
        overdue: row.overdue,
        overdue_reason: row.overdue_reason.clone(),
        deadline: row.deadline.map(timestamp),
        cancel_requested: row.cancel_requested,
        update_time: Some(timestamp(row.update_time)),
        assign_time: row.assign_time.map(timestamp),
        finish_time: row.finish_time.map(timestamp),
        boot_id: row.boot_id.clone(),
        next_attempt_time: row.next_attempt_time.map(timestamp),
    }
}

pub(in crate::api) fn conflict(row: &ConflictRow) -> v1::Conflict {
    v1::Conflict {
        execution: row.execution.name(),
        kind: match row.kind {
            Conflict::Unknown => v1::conflict::Kind::Unknown,
            Conflict::Ahead => v1::conflict::Kind::Ahead,
            Conflict::Unproved => v1::conflict::Kind::Unproved,
            Conflict::Ended => v1::conflict::Kind::Ended,
            Conflict::Busy => v1::conflict::Kind::Busy,
        }
        .into(),
        reported_state: state_to_proto(row.reported).into(),
        known_state: row.known.map_or(v1::execution::State::Unspecified, state_to_proto).into(),
        attempt: row.attempt,
        error: row
            .error
            .as_ref()
            .map(|error| v1::ExecutionError { reason: error.reason.clone(), message: error.message.clone() }),
        explanation: row.sentence(),
        time: Some(timestamp(row.time)),
        holds_node: row.holds,
    }
}

pub(in crate::api) fn event(row: &EventRow) -> v1::Event {
    v1::Event {
        number: row.number,
        time: Some(timestamp(row.time)),
        node: row.node.as_ref().map(NodeId::name).unwrap_or_default(),
        actor: row.actor.clone(),
        from: row.from.clone(),
        to: row.to.clone(),
        reason: row.reason.clone(),
    }
}

pub(in crate::api) fn execution_log(id: &ExecutionId, row: LogRow) -> v1::ExecutionLog {
    v1::ExecutionLog { name: id.name(), log: row.sent.lines, time: Some(timestamp(row.time)), cut: row.sent.cut }
}
