//! `marcoctl schedules`.

use chrono::{DateTime, Utc};
use marco_proto::v1::operation::{self, Action, Target};
use marco_proto::v1::{
    CreateScheduleRequest, DeleteScheduleRequest, Fire, FireFilter, GetScheduleRequest, ListFiresRequest,
    ListFiresResponse, ListSchedulesRequest, ListSchedulesResponse, Operation, PauseScheduleRequest, PowerOff,
    PreviewScheduleRequest, Reboot, ResumeScheduleRequest, RunScheduleRequest, Schedule, Update, fire, schedule,
};
use uuid::Uuid;

use super::operations::{insist, manner, operation_text, rollout, target, window};
use super::{all_pages, proto_duration};
use crate::args::{ActionArg, CreateSchedule, MissedFireArg, Next, OutcomeArg, OverlapArg, SchedulesCommand};
use crate::ask::{Force, say, unless_forced};
use crate::connect::{Connection, call};
use crate::failure::Failure;
use crate::output::{
    Out, ago, clean, enum_word, fields, id, in_local_time, labels, listing, local, span, timestamp_of,
};

mod update;

pub(super) async fn run(command: SchedulesCommand, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    match command {
        SchedulesCommand::Create(flags) => {
            let force = flags.force;
            let created = create(asked(*flags)?, force, connection).await?;
            out.document(&created, detail)
        }
        SchedulesCommand::Update(flags) => {
            let changed = update::update(*flags, connection).await?;
            out.document(&changed, detail)
        }
        SchedulesCommand::List(paging) => {
            let schedules = all_pages(async |page_token| {
                let request = ListSchedulesRequest { page_size: paging.page_size, page_token };
                let page = connection.schedules().list_schedules(call(request)).await?.into_inner();
                Ok((page.schedules, page.next_page_token))
            })
            .await?;
            out.document(&ListSchedulesResponse { schedules, ..Default::default() }, |list, now| {
                rows(&list.schedules, now)
            })
        }
        SchedulesCommand::Get { schedule } => {
            let request = GetScheduleRequest { name: schedule };
            out.document(&connection.schedules().get_schedule(call(request)).await?.into_inner(), detail)
        }
        SchedulesCommand::Pause { schedule, reason } => {
            let request = PauseScheduleRequest { name: schedule, reason };
            out.document(&connection.schedules().pause_schedule(call(request)).await?.into_inner(), detail)
        }
        SchedulesCommand::Resume { schedule } => {
            let request = ResumeScheduleRequest { name: schedule };
            out.document(&connection.schedules().resume_schedule(call(request)).await?.into_inner(), detail)
        }
        SchedulesCommand::Delete { schedule } => {
            let request = DeleteScheduleRequest { name: schedule.clone() };
            let deleted = connection.schedules().delete_schedule(call(request)).await?.into_inner();
            out.document(&deleted, |_, _| format!("schedules/{} is deleted", id(&schedule)))
        }
        SchedulesCommand::RunNow { schedule } => {
            let request = RunScheduleRequest { name: schedule, request_id: Uuid::now_v7().to_string() };
            let made = insist(async || connection.schedules().run_schedule(call(request.clone())).await).await?;
            out.document(&made, operation_text)
        }
        SchedulesCommand::Next(flags) => next(flags, connection, out).await,
        SchedulesCommand::Fires { schedule, outcome, paging } => {
            let outcomes: Vec<i32> = outcome.into_iter().map(|word| outcome_of(word).into()).collect();
            let filter = (!outcomes.is_empty()).then_some(FireFilter { outcomes });
            let fires = all_pages(async |page_token| {
                let (parent, filter) = (schedule.clone(), filter.clone());
                let request = ListFiresRequest { parent, page_size: paging.page_size, page_token, filter };
                let page = connection.schedules().list_fires(call(request)).await?.into_inner();
                Ok((page.fires, page.next_page_token))
            })
            .await?;
            out.document(&ListFiresResponse { fires, ..Default::default() }, |list, _| fires_text(&list.fires))
        }
    }
}

/// Creates a schedule. The controller is first asked for its doubts, and the operator decides about them.
async fn create(request: CreateScheduleRequest, force: Force, connection: &Connection) -> Result<Schedule, Failure> {
    let trial = CreateScheduleRequest { validate_only: true, ..request.clone() };
    let checked = connection.schedules().create_schedule(call(trial)).await?.into_inner();
    if checked.create_time.is_some() {
        // An older controller ignores `validate_only` and has created the schedule.
        return Ok(checked);
    }
    unless_forced(&checked.doubts, force)?;
    Ok(connection.schedules().create_schedule(call(request)).await?.into_inner())
}

async fn next(flags: Next, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let request = PreviewScheduleRequest {
        name: flags.schedule.unwrap_or_default(),
        cron: flags.cron.unwrap_or_default(),
        time_zone: flags.zone.unwrap_or_default(),
        from: flags.from.map(timestamp_of),
        count: flags.count,
    };
    let preview = connection.schedules().preview_schedule(call(request)).await?.into_inner();
    // On stderr: programs read stdout as one fire per line.
    if !out.is_json() && !preview.cron_in_words.is_empty() {
        let (words, zone, version) = (&preview.cron_in_words, &preview.time_zone, &preview.tzdata_version);
        say(&format!("{}, by the clocks of {}; time zones: {}\n", clean(words), clean(zone), clean(version)));
    }
    out.document(&preview, |preview, _| {
        preview.fires.iter().map(|fire| format!("{} {}\n", fire.local_time, fire.utc_time)).collect()
    })
}

/// Builds the request from the flags.
fn asked(flags: CreateSchedule) -> Result<CreateScheduleRequest, Failure> {
    // Otherwise the flags would be ignored, and the schedule would do something else than asked.
    if flags.action != ActionArg::Update && !(flags.image.is_empty() && flags.bootcode.is_empty()) {
        return Err(Failure::Usage {
            message: "--image and --bootcode are for an update".to_owned(),
            hint: "marcoctl schedules create ID --cron CRON --action update --image ID --all".to_owned(),
        });
    }
    let notice = flags.notice.map(proto_duration).transpose()?;
    let message = flags.message;
    let action = match flags.action {
        ActionArg::Reboot => Action::Reboot(Reboot { notice, message }),
        ActionArg::PowerOff => Action::PowerOff(PowerOff { notice, message }),
        ActionArg::Update => {
            let (image, bootcode) = (flags.image, flags.bootcode);
            Action::Update(Update { image, bootcode, notice, message, ..Default::default() })
        }
    };
    let operation = Operation {
        action: Some(action),
        target: Some(target(flags.target)),
        rollout: rollout(flags.rollout),
        window: window(flags.window)?,
        ..Default::default()
    };
    let schedule = Schedule {
        cron: flags.cron,
        time_zone: flags.zone,
        operation: Some(operation),
        missed_fire: missed_fire_of(flags.missed_fire).into(),
        overlap: overlap_of(flags.overlap).into(),
        jitter: flags.jitter.map(proto_duration).transpose()?,
        expire_after: flags.expire_after.map(proto_duration).transpose()?,
        ..Default::default()
    };
    Ok(CreateScheduleRequest { schedule: Some(schedule), schedule_id: flags.schedule, validate_only: false })
}

fn missed_fire_of(word: MissedFireArg) -> schedule::MissedFire {
    match word {
        MissedFireArg::Skip => schedule::MissedFire::Skip,
        MissedFireArg::Once => schedule::MissedFire::Once,
    }
}

fn overlap_of(word: OverlapArg) -> schedule::Overlap {
    match word {
        OverlapArg::Skip => schedule::Overlap::Skip,
        OverlapArg::Queue => schedule::Overlap::Queue,
    }
}

fn outcome_of(word: OutcomeArg) -> fire::Outcome {
    match word {
        OutcomeArg::Fired => fire::Outcome::Fired,
        OutcomeArg::Skipped => fire::Outcome::Skipped,
        OutcomeArg::Missed => fire::Outcome::Missed,
    }
}

fn action(schedule: &Schedule) -> String {
    match schedule.operation.as_ref().and_then(|operation| operation.action.as_ref()) {
        Some(Action::Reboot(_)) => "reboot".to_owned(),
        Some(Action::PowerOff(_)) => "power-off".to_owned(),
        Some(Action::Update(update)) if update.image.is_empty() => "update boot files".to_owned(),
        Some(Action::Update(update)) => format!("update {}", id(&update.image)),
        None => String::new(),
    }
}

fn targets(schedule: &Schedule) -> String {
    match schedule.operation.as_ref().and_then(|operation| operation.target.as_ref()) {
        Some(Target::Nodes(list)) => list.nodes.iter().map(|node| id(node)).collect::<Vec<_>>().join(" "),
        Some(Target::Labels(selector)) => labels(&selector.match_labels),
        Some(Target::All(_)) => "all approved nodes".to_owned(),
        None => String::new(),
    }
}

fn state(schedule: &Schedule) -> String {
    match (schedule.paused, &schedule.next_fire_time) {
        (true, _) => "PAUSED",
        (false, Some(_)) => "ACTIVE",
        (false, None) => "OVER",
    }
    .to_owned()
}

fn length(duration: Option<&prost_types::Duration>) -> String {
    let length = duration.and_then(|length| std::time::Duration::try_from(*length).ok()).unwrap_or_default();
    if length.is_zero() { String::new() } else { span(length) }
}

fn rows(schedules: &[Schedule], now: DateTime<Utc>) -> String {
    let rows = schedules.iter().map(|schedule| {
        vec![
            id(&schedule.name),
            schedule.cron.clone(),
            schedule.time_zone.clone(),
            action(schedule),
            targets(schedule),
            state(schedule),
            ago(schedule.next_fire_time.as_ref(), now),
            schedule.last_fire.as_ref().map(|fire| last_outcome(fire, now)).unwrap_or_default(),
        ]
    });
    listing("no schedules", &["SCHEDULE", "CRON", "ZONE", "ACTION", "TARGETS", "STATE", "NEXT", "LAST"], rows)
}

/// Formats the outcome of an instant, its operation's state and its age: `FIRED, RUNNING 3m ago`.
fn last_outcome(fire: &Fire, now: DateTime<Utc>) -> String {
    let outcome = enum_word(fire.outcome().as_str_name(), "OUTCOME_");
    let state = match fire.operation_state() {
        operation::State::Unspecified => String::new(),
        state => format!(", {}", enum_word(state.as_str_name(), "STATE_")),
    };
    format!("{outcome}{state} {}", ago(fire.fire_time.as_ref(), now))
}

fn detail(schedule: &Schedule, now: DateTime<Utc>) -> String {
    let next = match schedule.next_fire_time.as_ref() {
        Some(time) => format!("{} ({})", local(Some(time)), ago(Some(time), now)),
        None => String::new(),
    };
    let manner = manner(&schedule.operation.clone().unwrap_or_default());
    let last = match &schedule.last_fire {
        Some(fire) if fire.reason.is_empty() => last_outcome(fire, now),
        Some(fire) => format!("{}: {}", last_outcome(fire, now), fire.reason),
        None => String::new(),
    };
    fields(&[
        ("schedule", schedule.name.clone()),
        ("cron", schedule.cron.clone()),
        ("in words", schedule.cron_in_words.clone()),
        ("zone", schedule.time_zone.clone()),
        ("action", action(schedule)),
        ("targets", targets(schedule)),
        ("notice", manner.notice),
        ("message", manner.message),
        ("rollout", manner.rollout),
        ("window", manner.window),
        ("state", state(schedule)),
        ("paused because", schedule.pause_reason.clone()),
        ("next fire", next),
        ("last fire", local(schedule.last_fire_time.as_ref())),
        ("last outcome", last),
        ("failed because", schedule.failure.clone()),
        ("missed fires", enum_word(schedule.missed_fire().as_str_name(), "MISSED_FIRE_").to_lowercase()),
        ("overlap", enum_word(schedule.overlap().as_str_name(), "OVERLAP_").to_lowercase()),
        ("jitter", length(schedule.jitter.as_ref())),
        ("expires after", length(schedule.expire_after.as_ref())),
        ("creator", schedule.creator.clone()),
    ])
}

fn fires_text(fires: &[Fire]) -> String {
    let rows = fires.iter().map(|fire| {
        vec![
            local(fire.fire_time.as_ref()),
            enum_word(fire.outcome().as_str_name(), "OUTCOME_"),
            id(&fire.operation),
            in_local_time(&fire.reason),
        ]
    });
    listing("no fires", &["FIRE", "OUTCOME", "OPERATION", "WHY"], rows)
}
