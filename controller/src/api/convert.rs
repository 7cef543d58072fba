//! Conversions between the API's messages and our own types. Reading checks its input; writing cannot fail.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use chrono::{DateTime, TimeZone as _, Utc};

use super::status::ApiError;

mod access;
mod agent;
mod artifact;
mod node;
mod operation;
mod schedule;

pub(super) use access::{api_token, audit_event, certificate, person_role, ttl, user};
pub(super) use agent::{ack, assign, report, verdict};
pub(super) use artifact::{artifact, facts, kind};
pub(super) use node::{board, boot_id, join_token, mode, node, node_state, system, token_limits};
pub(super) use operation::{
    action, event, execution, execution_log, execution_state, operation, operation_state, rollout, target, window,
};
pub(super) use schedule::{fire, fire_outcome, last_fire, missed_fire, overlap, schedule};

/// Longest free text, in bytes.
const TEXT_MAX: usize = 1024;
/// Longest label key or value, in bytes, as in Kubernetes.
const LABEL_MAX: usize = 63;
/// Most labels of a node.
const LABELS_MAX: usize = 64;

/// Notes a wrong field, by its path, with the reason.
pub(super) type Bad<'a> = &'a mut dyn FnMut(&str, String);

/// Free text: bounded and without control characters, as it is shown on terminals.
pub(super) fn text<'a>(field: &str, text: &'a str) -> Result<&'a str, ApiError> {
    if text.len() > TEXT_MAX {
        return Err(ApiError::invalid(field, format!("must be at most {TEXT_MAX} bytes")));
    }
    if text.chars().any(char::is_control) {
        return Err(ApiError::invalid(field, "must not contain control characters"));
    }
    Ok(text)
}

pub(super) fn labels(field: &str, labels: HashMap<String, String>) -> Result<BTreeMap<String, String>, ApiError> {
    if labels.len() > LABELS_MAX {
        return Err(ApiError::invalid(field, format!("must be at most {LABELS_MAX} labels")));
    }
    // No `=` and no comma: the command line separates labels by them.
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '/');
    for (key, value) in &labels {
        if key.is_empty()
            || key.len() > LABEL_MAX
            || value.len() > LABEL_MAX
            || !key.chars().chain(value.chars()).all(allowed)
        {
            return Err(ApiError::invalid(
                field,
                format!(
                    "keys and values are at most {LABEL_MAX} letters, digits, dots, underscores, hyphens and slashes, and a key is not empty"
                ),
            ));
        }
    }
    Ok(labels.into_iter().collect())
}

/// Limits times to the year 9999: the type ends there, and clients fail on more.
pub(super) fn timestamp(time: DateTime<Utc>) -> prost_types::Timestamp {
    let time = crate::calendar::bounded(time);
    prost_types::Timestamp {
        seconds: time.timestamp(),
        nanos: i32::try_from(time.timestamp_subsec_nanos()).unwrap_or_default(),
    }
}

pub(super) fn duration(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

/// A length of time as a caller sent it; `None`: negative, or not normalized (`google/protobuf/duration.proto`).
/// prost's own conversion negates the seconds of a negative one, which overflows for the smallest number there is.
pub(super) fn length(asked: prost_types::Duration) -> Option<Duration> {
    let nanos = u32::try_from(asked.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(u64::try_from(asked.seconds).ok()?, nanos))
}

/// An optional time, to the microsecond, as the store keeps it.
pub(super) fn time(time: Option<prost_types::Timestamp>, field: &str, bad: Bad<'_>) -> Option<DateTime<Utc>> {
    let time = time?;
    let read = u32::try_from(time.nanos)
        .ok()
        // Cut here, so that a time compares equal after it was stored.
        .and_then(|nanos| Utc.timestamp_opt(time.seconds, nanos / 1000 * 1000).single())
        // Years that RFC 3339 can write.
        .filter(|time| (-62_135_596_800..=253_402_300_799).contains(&time.timestamp()));
    if read.is_none() {
        bad(field, "is no valid time".to_owned());
    }
    read
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::length;

    #[test]
    fn lengths_of_time_are_read_at_their_extremes() {
        let read = |seconds, nanos| length(prost_types::Duration { seconds, nanos });
        assert_eq!(read(1, 999_999_999), Some(Duration::new(1, 999_999_999)));
        assert_eq!(read(i64::MAX, 0), Some(Duration::from_secs(i64::MAX.unsigned_abs())));
        for (seconds, nanos) in
            [(i64::MIN, 0), (-1, 0), (0, -1), (i64::MIN, i32::MIN), (1, 1_000_000_000), (0, i32::MAX)]
        {
            assert_eq!(read(seconds, nanos), None, "{seconds} {nanos}");
        }
    }
}
