//! What goes over a session.

use marco_proto::names::{ExecutionId, NodeId};
use marco_proto::v1;

use super::operation::{execution_state, power_off, reboot, state_to_proto, update};
use super::{TEXT_MAX, boot_id, text};
use crate::api::status::ApiError;
use crate::operation::{Action, ExecutionError};
use crate::store::{Assignment, ProgressRow, Release, ReportRow};

/// A report of this node: of another's executions it says nothing.
pub(in crate::api) fn report(report: v1::Report, node: &NodeId) -> Result<ReportRow, ApiError> {
    let execution = ExecutionId::parse(&report.execution)
        .map_err(|error| ApiError::invalid("report.execution", error.to_string()))?;
    if execution.node != *node {
        return Err(ApiError::Forbidden {
            reason: "NOT_YOURS",
            message: "a node reports only on its own executions".to_owned(),
        });
    }
    let state = execution_state(report.state)
        .ok_or_else(|| ApiError::invalid("report.state", "is not a state that this controller knows"))?;
    text("report.phase", &report.phase)?;
    let error = report.error.map(|error| {
        let clean = |text: String, max: usize| -> String {
            text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(max).collect()
        };
        ExecutionError { reason: clean(error.reason, 64), message: clean(error.message, TEXT_MAX) }
    });
    let release = match report.release {
        None => None,
        Some(release) => {
            for text_ in [&release.execution, &release.image_sha256, &release.boot_sha256] {
                text("report.release", text_)?;
            }
            Some(Release {
                execution: release.execution,
                image_sha256: release.image_sha256,
                boot_sha256: release.boot_sha256,
            })
        }
    };
    Ok(ReportRow {
        execution,
        attempt: report.attempt,
        sequence: report.sequence,
        state,
        phase: report.phase,
        bytes_done: report.bytes_done,
        bytes_total: report.bytes_total,
        error,
        boot_id: boot_id(&report.boot_id)?,
        release,
        cancel_refused: report.cancel_refused,
    })
}

pub(in crate::api) fn progress(row: ReportRow) -> ProgressRow {
    ProgressRow {
        execution: row.execution,
        attempt: row.attempt,
        sequence: row.sequence,
        phase: row.phase,
        bytes_done: row.bytes_done,
        bytes_total: row.bytes_total,
        cancel_refused: row.cancel_refused,
    }
}

pub(in crate::api) fn assign(assignment: &Assignment) -> v1::Assign {
    v1::Assign {
        execution: assignment.execution.name(),
        attempt: assignment.attempt,
        action: Some(match &assignment.action {
            Action::Reboot(notice) => v1::assign::Action::Reboot(reboot(notice)),
            Action::PowerOff(notice) => v1::assign::Action::PowerOff(power_off(notice)),
            Action::Update(asked) => v1::assign::Action::Update(update(asked, asked.bootcode_for(&assignment.family))),
        }),
        known_state: state_to_proto(assignment.known_state).into(),
    }
}
