//! Messages of a session.

use marco_proto::names::{ExecutionId, LOG_MAX, NodeId};
use marco_proto::v1;

use super::operation::{execution_state, power_off, reboot, state_to_proto, update};
use super::{TEXT_MAX, boot_id, text};
use crate::api::status::ApiError;
use crate::operation::{Action, ExecutionError};
use crate::store::{Assignment, Release, ReportRow, SentLog};

/// Highest sequence of a report. It rises by one with each state, and by a hundred where two systems of a card fork.
const SEQUENCE_MAX: u64 = 1_000_000_000;
/// Limit of byte counts, above the size of any card. Larger reports are cut, so that no sum of two overflows.
const BYTES_MAX: u64 = 1 << 60;

/// Reads a report. A node may report its own executions only.
pub(in crate::api) fn report(report: v1::Report, node: &NodeId) -> Result<ReportRow, ApiError> {
    let execution = ExecutionId::parse(&report.execution)
        .map_err(|error| ApiError::invalid("report.execution", error.to_string()))?;
    // Otherwise one node could end the work of another.
    if execution.node != *node {
        return Err(ApiError::Forbidden {
            reason: "NOT_YOURS",
            message: "a node reports only on its own executions".to_owned(),
        });
    }
    let state = execution_state(report.state)
        .ok_or_else(|| ApiError::invalid("report.state", "is not a state that this controller knows"))?;
    text("report.phase", &report.phase)?;
    // Later reports must have a higher one: with the highest number nothing of the execution would be accepted any
    // more.
    if report.sequence > SEQUENCE_MAX {
        return Err(ApiError::invalid("report.sequence", format!("must be at most {SEQUENCE_MAX}")));
    }
    let error = report.error.map(|error| {
        let clean = |text: String, max: usize| -> String {
            // Cleaned and not refused: a report that is refused would be sent again without end.
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
        bytes_done: report.bytes_done.min(BYTES_MAX),
        bytes_total: report.bytes_total.min(BYTES_MAX),
        error,
        boot_id: boot_id(&report.boot_id)?,
        // Agents from before this field do not send it.
        accept_boot_id: if report.accept_boot_id.is_empty() { String::new() } else { boot_id(&report.accept_boot_id)? },
        release,
        cancel_refused: report.cancel_refused,
        log: log(&report.log, report.log_cut),
        journal_lost: report.journal_lost,
    })
}

/// A node's log for the store: bounded, in whole lines, without control characters that a terminal would obey.
fn log(text: &str, cut: bool) -> SentLog {
    let lines = newest(text, LOG_MAX);
    let clean = |c: char| if c.is_control() && c != '\n' { ' ' } else { c };
    SentLog { lines: lines.chars().map(clean).collect(), cut: cut || lines.len() < text.len() }
}

/// The last `most` bytes of a text, in whole lines; nothing of a line that is longer.
fn newest(text: &str, most: usize) -> &str {
    let Some(excess) = text.len().checked_sub(most).filter(|excess| *excess > 0) else { return text };
    // A line that begins exactly there is whole.
    let before = text.as_bytes().get(..excess).unwrap_or_default();
    let rest = text.as_bytes().get(excess..).unwrap_or_default();
    let skipped = match before.last() {
        Some(b'\n') => 0,
        _ => rest.iter().position(|byte| *byte == b'\n').map_or(rest.len(), |at| at + 1),
    };
    text.get(excess + skipped..).unwrap_or_default()
}

/// Acknowledges a report, and names it. Agents of protocol 1 read the first two fields.
pub(in crate::api) fn ack(report: &ReportRow) -> v1::Ack {
    v1::Ack {
        execution: report.execution.name(),
        sequence: report.sequence,
        attempt: report.attempt,
        state: state_to_proto(report.state).into(),
        boot_id: report.boot_id.clone(),
        release: report.release.as_ref().map(release),
    }
}

/// A verdict about the new system that asked for it by this report. `refusal`: the reason; `None`: it is accepted.
pub(in crate::api) fn verdict(report: &ReportRow, refusal: Option<&ExecutionError>) -> v1::Verdict {
    v1::Verdict {
        execution: report.execution.name(),
        attempt: report.attempt,
        boot_id: report.boot_id.clone(),
        release: report.release.as_ref().map(release),
        decision: match refusal {
            None => v1::verdict::Decision::Accepted,
            Some(_) => v1::verdict::Decision::Refused,
        }
        .into(),
        error: refusal.map(|error| v1::ExecutionError { reason: error.reason.clone(), message: error.message.clone() }),
    }
}

fn release(release: &Release) -> v1::Release {
    v1::Release {
        execution: release.execution.clone(),
        image_sha256: release.image_sha256.clone(),
        boot_sha256: release.boot_sha256.clone(),
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
        labels: assignment.labels.clone().into_iter().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::{LOG_MAX, log};

    #[test]
    fn what_is_kept_of_a_log_is_whole_lines_that_steer_nothing() {
        let kept = log("one\n\u{1b}[2Jtwo\tthree\0\r\n\u{9b}four\n", false);
        assert_eq!((kept.lines.as_str(), kept.cut), ("one\n [2Jtwo three  \n four\n", false));
        assert!(log("", true).lines.is_empty());

        let line = "äöü und mehr\n";
        let long = line.repeat(LOG_MAX / line.len() + 10);
        let kept = log(&long, false);
        assert!(kept.cut && kept.lines.len() <= LOG_MAX && kept.lines.len() > LOG_MAX - 2 * line.len());
        assert!(kept.lines.lines().all(|kept| kept == line.trim_end()));
        let exact = "x".repeat(LOG_MAX - 1) + "\n";
        assert_eq!(log(&exact, false).lines, exact);
        assert_eq!(log(&format!("older\n{exact}"), false).lines, exact);
        assert_eq!(log(&"x".repeat(LOG_MAX + 1), false).lines, "");
    }
}
