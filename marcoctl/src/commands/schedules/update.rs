//! `marcoctl schedules update`: changes the settings that flags name, and no others.

use marco_proto::v1::operation::Action;
use marco_proto::v1::{
    GetScheduleRequest, MaintenanceWindow, Operation, PowerOff, Reboot, Rollout, Schedule, Update,
    UpdateScheduleRequest,
};
use prost_types::FieldMask;

use super::super::operations::{rollout, target, window};
use super::super::proto_duration;
use super::{missed_fire_of, overlap_of};
use crate::args::{ActionArg, OtherTarget, Target, UpdateSchedule};
use crate::ask::unless_forced;
use crate::connect::{Connection, call};
use crate::failure::Failure;

pub(super) async fn update(flags: UpdateSchedule, connection: &Connection) -> Result<Schedule, Failure> {
    // The API replaces the template as a whole. Everything that no flag names is read and sent back unchanged.
    let template = if changes_template(&flags) {
        let request = GetScheduleRequest { name: flags.schedule.clone() };
        connection.schedules().get_schedule(call(request)).await?.into_inner().operation
    } else {
        None
    };
    let force = flags.force;
    let request = asked(flags, template)?;
    let trial = UpdateScheduleRequest { validate_only: true, ..request.clone() };
    let checked = connection.schedules().update_schedule(call(trial)).await?.into_inner();
    if checked.create_time.is_some() {
        // An older controller ignores `validate_only` and has made the change.
        return Ok(checked);
    }
    unless_forced(&checked.doubts, force)?;
    Ok(connection.schedules().update_schedule(call(request)).await?.into_inner())
}

fn changes_template(flags: &UpdateSchedule) -> bool {
    let OtherTarget { nodes, all, selector } = &flags.target;
    let target = !nodes.is_empty() || *all || !selector.is_empty();
    target || changes_action(flags) || changes_rollout(flags) || flags.window.window_cron.is_some() || flags.no_window
}

fn changes_action(flags: &UpdateSchedule) -> bool {
    flags.action.is_some()
        || flags.image.is_some()
        || flags.bootcode.is_some()
        || flags.notice.is_some()
        || flags.message.is_some()
}

fn changes_rollout(flags: &UpdateSchedule) -> bool {
    let given = &flags.rollout;
    flags.no_rollout
        || given.max_in_flight.is_some()
        || given.canary.is_some()
        || given.max_failures.is_some()
        || given.group_by.is_some()
}

/// Builds the request from the flags, and from the current template if they change it.
fn asked(flags: UpdateSchedule, template: Option<Operation>) -> Result<UpdateScheduleRequest, Failure> {
    let mut new = Schedule { name: flags.schedule.clone(), ..Default::default() };
    let mut paths = Vec::new();
    let mut changes = |path: &str| paths.push(path.to_owned());
    if let Some(cron) = &flags.cron {
        changes("cron");
        new.cron.clone_from(cron);
    }
    if let Some(zone) = &flags.zone {
        changes("time_zone");
        new.time_zone.clone_from(zone);
    }
    if let Some(word) = flags.missed_fire {
        changes("missed_fire");
        new.missed_fire = missed_fire_of(word).into();
    }
    if let Some(word) = flags.overlap {
        changes("overlap");
        new.overlap = overlap_of(word).into();
    }
    if let Some(jitter) = flags.jitter {
        changes("jitter");
        new.jitter = Some(proto_duration(jitter)?);
    }
    if let Some(after) = flags.expire_after {
        changes("expire_after");
        new.expire_after = Some(proto_duration(after)?);
    }
    if changes_template(&flags) {
        changes("operation");
        new.operation = Some(changed(flags, template.unwrap_or_default())?);
    }
    if paths.is_empty() {
        return Err(Failure::Usage {
            message: "no flag says what to change".to_owned(),
            hint: "marcoctl schedules update ID --cron CRON (see: marcoctl schedules update --help)".to_owned(),
        });
    }
    let update_mask = Some(FieldMask { paths });
    Ok(UpdateScheduleRequest { schedule: Some(new), update_mask, validate_only: false })
}

/// Applies the flags to the template.
fn changed(flags: UpdateSchedule, mut template: Operation) -> Result<Operation, Failure> {
    if changes_action(&flags) {
        template.action = Some(changed_action(&flags, template.action)?);
    }
    if changes_rollout(&flags) {
        // Each flag is a change, so an existing limit stays unless its flag is given.
        let before = template.rollout.unwrap_or_default();
        template.rollout = if flags.no_rollout { None } else { rollout(flags.rollout).map(|new| over(before, new)) };
    }
    if flags.no_window {
        template.window = None;
    } else if let Some(new) = window(flags.window)? {
        // A new window without a zone keeps the zone of the old one.
        let before = template.window.unwrap_or_default().time_zone;
        let time_zone = if new.time_zone.is_empty() { before } else { new.time_zone };
        template.window = Some(MaintenanceWindow { time_zone, ..new });
    }
    let OtherTarget { nodes, all, selector } = flags.target;
    if !nodes.is_empty() || all || !selector.is_empty() {
        template.target = Some(target(Target { nodes, all, selector }));
    }
    Ok(template)
}

/// Overlays a rollout with the values that are set in `new`. No flag can set a zero.
fn over(before: Rollout, new: Rollout) -> Rollout {
    let or = |new: i32, before: i32| if new == 0 { before } else { new };
    Rollout {
        max_in_flight: or(new.max_in_flight, before.max_in_flight),
        canary: or(new.canary, before.canary),
        failure_limit: new.failure_limit.or(before.failure_limit),
        group_by: if new.group_by.is_empty() { before.group_by } else { new.group_by },
        max_in_flight_per_group: or(new.max_in_flight_per_group, before.max_in_flight_per_group),
    }
}

fn changed_action(flags: &UpdateSchedule, before: Option<Action>) -> Result<Action, Failure> {
    let (kind, mut notice, mut message) = match &before {
        Some(Action::PowerOff(before)) => (ActionArg::PowerOff, before.notice, before.message.clone()),
        Some(Action::Update(before)) => (ActionArg::Update, before.notice, before.message.clone()),
        Some(Action::Reboot(before)) => (ActionArg::Reboot, before.notice, before.message.clone()),
        None => (ActionArg::Reboot, None, String::new()),
    };
    if let Some(new) = flags.notice {
        notice = Some(proto_duration(new)?);
    }
    if let Some(new) = &flags.message {
        message.clone_from(new);
    }
    // A changed action keeps notice and message, because they mean the same for every action.
    let kind = flags.action.unwrap_or(kind);
    if kind != ActionArg::Update && (flags.image.is_some() || flags.bootcode.is_some()) {
        return Err(Failure::Usage {
            message: "--image and --bootcode are for an update, and the schedule's action is another".to_owned(),
            hint: "marcoctl schedules update ID --action update --image IMAGE".to_owned(),
        });
    }
    Ok(match kind {
        ActionArg::Reboot => Action::Reboot(Reboot { notice, message }),
        ActionArg::PowerOff => Action::PowerOff(PowerOff { notice, message }),
        ActionArg::Update => {
            let before = match before {
                Some(Action::Update(before)) => before,
                _ => Update::default(),
            };
            let image = flags.image.clone().unwrap_or(before.image);
            let bootcode = flags.bootcode.clone().unwrap_or(before.bootcode);
            Action::Update(Update { image, bootcode, notice, message, preserve: before.preserve, ..Default::default() })
        }
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;
    use marco_proto::v1::operation::{Action, Target};
    use marco_proto::v1::rollout::FailureLimit;
    use marco_proto::v1::{AllNodes, MaintenanceWindow, Operation, Rollout, Update, UpdateScheduleRequest};

    use crate::args::{Cli, Command, SchedulesCommand};
    use crate::failure::Failure;

    fn template() -> Operation {
        Operation {
            action: Some(Action::Update(Update {
                image: "kiosk".to_owned(),
                message: "soon".to_owned(),
                notice: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
                ..Default::default()
            })),
            target: Some(Target::All(AllNodes {})),
            rollout: Some(Rollout { max_in_flight: 3, canary: 1, ..Default::default() }),
            window: Some(MaintenanceWindow { cron: "0 2 * * *".to_owned(), ..Default::default() }),
            ..Default::default()
        }
    }

    fn asked(flags: &[&str]) -> Result<UpdateScheduleRequest, Failure> {
        let line = ["marcoctl", "schedules", "update", "nightly"].iter().chain(flags);
        let Command::Schedules(SchedulesCommand::Update(flags)) = Cli::try_parse_from(line).unwrap().command else {
            panic!("another command")
        };
        super::asked(*flags, Some(template()))
    }

    fn paths(request: &UpdateScheduleRequest) -> Vec<&str> {
        request.update_mask.as_ref().unwrap().paths.iter().map(String::as_str).collect()
    }

    #[test]
    fn the_mask_names_what_a_flag_names_and_nothing_else() {
        for (flags, path) in [
            (["--cron", "0 4 * * *"], "cron"),
            (["--zone", "Europe/Madrid"], "time_zone"),
            (["--missed-fire", "once"], "missed_fire"),
            (["--overlap", "queue"], "overlap"),
            (["--jitter", "0s"], "jitter"),
            (["--expire-after", "2h"], "expire_after"),
            (["--message", "now"], "operation"),
            (["--notice", "0s"], "operation"),
            (["--canary", "2"], "operation"),
            (["pi-01", "pi-02"], "operation"),
        ] {
            assert_eq!(paths(&asked(&flags).unwrap()), [path]);
        }
        let both = asked(&["--cron", "0 4 * * *", "--no-window"]).unwrap();
        assert_eq!(paths(&both), ["cron", "operation"]);
        assert!(matches!(asked(&[]), Err(Failure::Usage { .. })));
    }

    #[test]
    fn of_the_template_only_what_a_flag_names_changes() {
        let changed = |flags: &[&str]| asked(flags).unwrap().schedule.unwrap().operation.unwrap();
        let update = |new: Update| Operation { action: Some(Action::Update(new)), ..template() };
        let Some(Action::Update(before)) = template().action else { panic!("no update") };
        assert_eq!(changed(&["--image", "kiosk-2"]), update(Update { image: "kiosk-2".to_owned(), ..before.clone() }));
        assert_eq!(changed(&["--message", ""]), update(Update { message: String::new(), ..before }));
        assert_eq!(changed(&["--no-rollout"]), Operation { rollout: None, ..template() });
        assert_eq!(changed(&["--no-window"]), Operation { window: None, ..template() });
        let limit = Some(FailureLimit::MaxFailuresPercent(5));
        let rollout = Rollout { max_in_flight: 9, canary: 1, failure_limit: limit, ..Default::default() };
        let given = changed(&["--max-in-flight", "9", "--max-failures", "5%"]);
        assert_eq!(given, Operation { rollout: Some(rollout), ..template() });
        let nodes = changed(&["pi-01"]);
        assert_eq!(Operation { target: template().target, ..nodes.clone() }, template());
        assert!(matches!(nodes.target, Some(Target::Nodes(list)) if list.nodes == ["pi-01"]));
        let rebooting = changed(&["--action", "reboot"]);
        assert!(matches!(&rebooting.action, Some(Action::Reboot(reboot)) if reboot.message == "soon"));
        assert!(matches!(asked(&["--action", "reboot", "--image", "x"]), Err(Failure::Usage { .. })));
    }
}
