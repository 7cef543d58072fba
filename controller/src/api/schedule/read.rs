//! Turns a request into a schedule that can be stored, or into a list of every wrong field.

use std::time::Duration;

use chrono::{DateTime, Utc};
use marco_proto::names::ScheduleId;
use marco_proto::v1;
use uuid::Uuid;

use crate::api::convert;
use crate::api::operation;
use crate::api::status::{ApiError, Violation};
use crate::schedule::{Recurrence, RecurrenceError};
use crate::store::{ScheduleRow, Scope, Template};

/// Default lifetime of a fire's operation: it does not begin later.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Longest jitter.
const JITTER_MAX: Duration = Duration::from_secs(24 * 3600);
/// Longest lifetime of a fire's operation.
const LIFETIME_MAX: Duration = Duration::from_secs(366 * 24 * 3600);
/// Longest expression, in bytes.
const CRON_MAX: usize = 256;
/// Fields that can be changed.
const CHANGEABLE: [&str; 7] = ["cron", "time_zone", "operation", "missed_fire", "overlap", "jitter", "expire_after"];

/// A new schedule.
pub(super) fn new(
    request: v1::CreateScheduleRequest,
    creator: &str,
    now: DateTime<Utc>,
) -> Result<ScheduleRow, ApiError> {
    let asked = request
        .schedule
        .ok_or_else(|| ApiError::invalid("schedule", "is missing; it needs a cron and an operation"))?;
    let mut wrong = Vec::new();
    let id = match request.schedule_id.as_str() {
        "" => ScheduleId::parse(&Uuid::now_v7().to_string()),
        id => ScheduleId::parse(id),
    };
    if let Err(error) = &id {
        wrong.push(violation("schedule_id", error.to_string()));
    }
    if !asked.name.is_empty() {
        wrong.push(violation("schedule.name", "is made of schedule_id; leave it out".to_owned()));
    }
    let read = Fields::read(asked, now, &mut wrong);
    let (Ok(id), Some(fields), true) = (id, read, wrong.is_empty()) else { return Err(ApiError::Invalid(wrong)) };
    Ok(ScheduleRow {
        id,
        cron: fields.recurrence.cron().to_owned(),
        time_zone: fields.recurrence.zone().name().to_owned(),
        template: fields.template,
        missed_fire: fields.missed_fire,
        overlap: fields.overlap,
        jitter: fields.jitter,
        expire_after: fields.expire_after,
        paused: false,
        pause_reason: String::new(),
        creator: creator.to_owned(),
        scope: Scope::everything(),
        create_time: now,
        update_time: now,
        revision: 1,
        next_fire: fields.recurrence.next_after(now),
        last_fire: None,
        failures: 0,
        failure: String::new(),
    })
}

/// The schedule, with the fields changed that the paths name.
pub(super) fn changed(
    old: &ScheduleRow,
    asked: v1::Schedule,
    paths: &[String],
    now: DateTime<Utc>,
) -> Result<ScheduleRow, ApiError> {
    if paths.is_empty() {
        return Err(ApiError::invalid("update_mask", format!("must name at least one of {}", CHANGEABLE.join(", "))));
    }
    // Merged as a message, so that the same reader checks a new and a changed schedule.
    let mut merged = convert::schedule(old);
    for path in paths {
        match path.as_str() {
            "cron" => merged.cron.clone_from(&asked.cron),
            "time_zone" => merged.time_zone.clone_from(&asked.time_zone),
            "operation" => merged.operation.clone_from(&asked.operation),
            "missed_fire" => merged.missed_fire = asked.missed_fire,
            "overlap" => merged.overlap = asked.overlap,
            "jitter" => merged.jitter = asked.jitter,
            "expire_after" => merged.expire_after = asked.expire_after,
            other => {
                let other: String = other.chars().take(80).collect();
                let can = CHANGEABLE.join(", ");
                return Err(ApiError::invalid("update_mask", format!("{other:?} cannot be changed; {can} can")));
            }
        }
    }
    // A window that followed the schedule's zone still does.
    if let Some(window) = merged.operation.as_mut().and_then(|operation| operation.window.as_mut())
        && !paths.iter().any(|path| path == "operation")
        && window.time_zone == old.time_zone
    {
        window.time_zone.clone_from(&merged.time_zone);
    }
    let mut wrong = Vec::new();
    let read = Fields::read(merged, now, &mut wrong);
    let (Some(fields), true) = (read, wrong.is_empty()) else { return Err(ApiError::Invalid(wrong)) };
    let (cron, time_zone) = (fields.recurrence.cron().to_owned(), fields.recurrence.zone().name().to_owned());
    let next_fire = if cron == old.cron && time_zone == old.time_zone {
        old.next_fire
    } else {
        // No time gets a second outcome, even if the clock went back.
        fields.recurrence.next_after(old.last_fire.map_or(now, |last| last.max(now)))
    };
    Ok(ScheduleRow {
        cron,
        time_zone,
        template: fields.template,
        missed_fire: fields.missed_fire,
        overlap: fields.overlap,
        jitter: fields.jitter,
        expire_after: fields.expire_after,
        next_fire,
        ..old.clone()
    })
}

/// A cron expression in its zone; `prefix` is put before the names of fields in errors.
pub(super) fn recurrence(prefix: &str, cron: &str, time_zone: &str) -> Result<Recurrence, Vec<Violation>> {
    if cron.len() > CRON_MAX {
        return Err(vec![violation(&format!("{prefix}cron"), format!("must be at most {CRON_MAX} bytes"))]);
    }
    Recurrence::parse(cron, time_zone).map_err(|error| {
        let field = match &error {
            RecurrenceError::Cron { .. } | RecurrenceError::Never(_) => "cron",
            RecurrenceError::Zone(_) => "time_zone",
        };
        vec![violation(&format!("{prefix}{field}"), error.to_string())]
    })
}

struct Fields {
    recurrence: Recurrence,
    template: Template,
    missed_fire: crate::schedule::MissedFire,
    overlap: crate::schedule::Overlap,
    jitter: Duration,
    expire_after: Duration,
}

impl Fields {
    fn read(asked: v1::Schedule, now: DateTime<Utc>, wrong: &mut Vec<Violation>) -> Option<Self> {
        let recurrence = match recurrence("schedule.", &asked.cron, &asked.time_zone) {
            Ok(recurrence) => {
                // Such a schedule would silently do nothing.
                if let Err(never) = recurrence.must_fire(now) {
                    wrong.push(violation("schedule.cron", never.to_string()));
                }
                Some(recurrence)
            }
            Err(violations) => {
                wrong.extend(violations);
                None
            }
        };
        let zone = recurrence.as_ref().map(|recurrence| recurrence.zone().name());
        let template = template(asked.operation, zone, now, wrong);
        let missed_fire = convert::missed_fire(asked.missed_fire);
        if missed_fire.is_none() {
            wrong.push(violation("schedule.missed_fire", "is no policy that is known".to_owned()));
        }
        let overlap = convert::overlap(asked.overlap);
        if overlap.is_none() {
            wrong.push(violation("schedule.overlap", "is no policy that is known".to_owned()));
        }
        let expire_after = length(asked.expire_after, "expire_after", DEFAULT_LIFETIME, LIFETIME_MAX, wrong);
        // Every execution would expire at once.
        if expire_after.is_zero() {
            wrong.push(violation("schedule.expire_after", "must be longer than nothing".to_owned()));
        }
        let jitter = length(asked.jitter, "jitter", Duration::ZERO, JITTER_MAX, wrong);
        // Otherwise the last nodes would expire before their own time comes.
        if jitter >= expire_after && !jitter.is_zero() {
            wrong.push(violation("schedule.jitter", "must be shorter than expire_after".to_owned()));
        }
        Some(Self {
            recurrence: recurrence?,
            template: template?,
            missed_fire: missed_fire?,
            overlap: overlap?,
            jitter,
            expire_after,
        })
    }
}

/// `zone` is the schedule's, and the default of its window.
fn template(
    operation: Option<v1::Operation>,
    zone: Option<&str>,
    now: DateTime<Utc>,
    wrong: &mut Vec<Violation>,
) -> Option<Template> {
    let Some(mut operation) = operation else {
        wrong.push(violation("schedule.operation", "is missing; it needs an action and a target".to_owned()));
        return None;
    };
    for (set, field) in
        [(operation.schedule_time.is_some(), "schedule_time"), (operation.expire_time.is_some(), "expire_time")]
    {
        if set {
            let why = "is set by each fire; leave it out".to_owned();
            wrong.push(violation(&format!("schedule.operation.{field}"), why));
        }
    }
    // Filled in here, because the operation of a fire does not know the schedule's zone.
    if let Some(window) = operation.window.as_mut().filter(|window| window.time_zone.is_empty()) {
        window.time_zone = zone.unwrap_or_default().to_owned();
    }
    let operation = v1::Operation { schedule_time: None, expire_time: None, ..operation };
    let request = v1::CreateOperationRequest { operation: Some(operation), request_id: String::new() };
    // Read like an operation, so that a template has the same rules.
    match operation::read(request, now) {
        Ok(asked) => {
            Some(Template { action: asked.action, target: asked.target, rollout: asked.rollout, window: asked.window })
        }
        Err(ApiError::Invalid(violations)) => {
            wrong.extend(
                violations.into_iter().map(|found| violation(&format!("schedule.{}", found.field), found.description)),
            );
            None
        }
        Err(error) => {
            wrong.push(violation("schedule.operation", error.to_string()));
            None
        }
    }
}

fn length(
    asked: Option<prost_types::Duration>,
    field: &str,
    default: Duration,
    most: Duration,
    wrong: &mut Vec<Violation>,
) -> Duration {
    match asked.map(convert::length) {
        None => default,
        Some(Some(length)) if length <= most => length,
        Some(_) => {
            let why = format!("must be between 0 and {}", humantime::format_duration(most));
            wrong.push(violation(&format!("schedule.{field}"), why));
            default
        }
    }
}

fn violation(field: &str, description: String) -> Violation {
    Violation { field: field.to_owned(), description }
}
