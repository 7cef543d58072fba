//! Schedules and the outcomes of their times.

use marco_proto::v1;

use super::operation::{asked_action, asked_target, operation_state_to_proto, rollout_to_proto, window_to_proto};
use super::{duration, timestamp};
use crate::schedule::{FireOutcome, MissedFire, Overlap, Recurrence};
use crate::store::{FireRow, LastFire, ScheduleRow};

pub(in crate::api) fn schedule(row: &ScheduleRow) -> v1::Schedule {
    v1::Schedule {
        name: row.id.name(),
        cron: row.cron.clone(),
        time_zone: row.time_zone.clone(),
        operation: Some(v1::Operation {
            action: Some(asked_action(&row.template.action)),
            target: Some(asked_target(&row.template.target)),
            rollout: row.template.rollout.as_ref().map(rollout_to_proto),
            window: row.template.window.as_ref().map(window_to_proto),
            ..v1::Operation::default()
        }),
        missed_fire: match row.missed_fire {
            MissedFire::Skip => v1::schedule::MissedFire::Skip,
            MissedFire::Once => v1::schedule::MissedFire::Once,
        }
        .into(),
        overlap: match row.overlap {
            Overlap::Skip => v1::schedule::Overlap::Skip,
            Overlap::Queue => v1::schedule::Overlap::Queue,
        }
        .into(),
        jitter: duration(row.jitter),
        paused: row.paused,
        pause_reason: row.pause_reason.clone(),
        create_time: Some(timestamp(row.create_time)),
        next_fire_time: row.next_fire.map(timestamp),
        last_fire_time: row.last_fire.map(timestamp),
        expire_after: duration(row.expire_after),
        creator: row.creator.clone(),
        update_time: Some(timestamp(row.update_time)),
        cron_in_words: Recurrence::parse(&row.cron, &row.time_zone).map(|cron| cron.words()).unwrap_or_default(),
        doubts: Vec::new(),
        last_fire: None,
        failure: row.failure.clone(),
    }
}

/// The last time with its outcome, and the state of its operation.
pub(in crate::api) fn last_fire(last: &LastFire) -> v1::Fire {
    let operation_state = last.operation_state.map(operation_state_to_proto).unwrap_or_default().into();
    v1::Fire { operation_state, ..fire(&last.row) }
}

/// The policy; unset means skip.
pub(in crate::api) fn missed_fire(policy: i32) -> Option<MissedFire> {
    Some(match v1::schedule::MissedFire::try_from(policy).ok()? {
        v1::schedule::MissedFire::Unspecified | v1::schedule::MissedFire::Skip => MissedFire::Skip,
        v1::schedule::MissedFire::Once => MissedFire::Once,
    })
}

/// The policy; unset means skip.
pub(in crate::api) fn overlap(policy: i32) -> Option<Overlap> {
    Some(match v1::schedule::Overlap::try_from(policy).ok()? {
        v1::schedule::Overlap::Unspecified | v1::schedule::Overlap::Skip => Overlap::Skip,
        v1::schedule::Overlap::Queue => Overlap::Queue,
    })
}

pub(in crate::api) fn fire_outcome(outcome: i32) -> Option<FireOutcome> {
    Some(match v1::fire::Outcome::try_from(outcome).ok()? {
        v1::fire::Outcome::Unspecified => return None,
        v1::fire::Outcome::Fired => FireOutcome::Fired,
        v1::fire::Outcome::Skipped => FireOutcome::Skipped,
        v1::fire::Outcome::Missed => FireOutcome::Missed,
    })
}

pub(in crate::api) fn fire(row: &FireRow) -> v1::Fire {
    v1::Fire {
        schedule: row.schedule.name(),
        fire_time: Some(timestamp(row.fire_time)),
        outcome: match row.outcome {
            FireOutcome::Fired => v1::fire::Outcome::Fired,
            FireOutcome::Skipped => v1::fire::Outcome::Skipped,
            FireOutcome::Missed => v1::fire::Outcome::Missed,
        }
        .into(),
        reason: row.reason.clone(),
        operation: row.operation.as_ref().map(|id| id.name()).unwrap_or_default(),
        record_time: Some(timestamp(row.record_time)),
        operation_state: v1::operation::State::Unspecified.into(),
    }
}
