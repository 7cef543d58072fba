//! Creates operations and waits for their end.

use std::time::Duration;

use marco_proto::reasons::{Healing, healing};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::{self, Action};
use marco_proto::v1::operation_check::Verdict;
use marco_proto::v1::{
    AllNodes, CheckOperationRequest, CreateOperationRequest, LabelSelector, MaintenanceWindow, NodeList, Operation,
    PowerOff, Preserve, Reboot, RetryOperationRequest, Rollout, Update, rollout,
};
use tokio::time::Instant;
use tonic::{Response, Status};
use uuid::Uuid;

use super::super::{label_map, proto_duration};
use super::show;
use crate::args::values::FailureLimit;
use crate::args::{Create, CreateUpdate, RolloutFlags, Target, Wait, WindowFlags};
use crate::ask::{self, Force, say};
use crate::connect::{Connection, call};
use crate::failure::{Failure, is_cut};
use crate::follow::{End, Known, Until, follow, summary};
use crate::output::{Out, clean, in_local_time, timestamp_of};
use crate::progress::View;

/// Maximum number of attempts to create an operation over broken connections. The request id makes them idempotent.
const TRIES: u32 = 4;
/// Pause before the second attempt. It doubles with each further one.
const PAUSE: Duration = Duration::from_millis(500);

pub(super) async fn reboot(flags: Create, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let notice = flags.notice.map(proto_duration).transpose()?;
    let message = flags.message.clone();
    create(Action::Reboot(Reboot { notice, message }), flags, connection, out).await
}

pub(super) async fn power_off(flags: Create, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let notice = flags.notice.map(proto_duration).transpose()?;
    let message = flags.message.clone();
    create(Action::PowerOff(PowerOff { notice, message }), flags, connection, out).await
}

pub(super) async fn update(flags: CreateUpdate, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let update = Update {
        image: flags.image.unwrap_or_default(),
        bootcode: flags.bootcode,
        notice: flags.create.notice.map(proto_duration).transpose()?,
        message: flags.create.message.clone(),
        preserve: flags.discard_home.then_some(Preserve { discard_home: true }),
        raw: flags.raw,
        ..Default::default()
    };
    create(Action::Update(update), flags.create, connection, out).await
}

async fn create(action: Action, flags: Create, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let operation = Operation {
        action: Some(action),
        target: Some(target(flags.target)),
        schedule_time: flags.at.map(timestamp_of),
        expire_time: flags.expires.map(timestamp_of),
        rollout: rollout(flags.rollout),
        window: window(flags.window)?,
        ..Default::default()
    };
    if flags.dry_run {
        return check(operation, connection, out).await;
    }
    // With --force nothing is asked, so the check is not needed.
    if !flags.force.force {
        ask::unless_forced(&doubts(operation.clone(), connection).await, flags.force)?;
    }
    // Made once, outside of `insist`: all attempts must carry the same id.
    let request = CreateOperationRequest { operation: Some(operation), request_id: Uuid::now_v7().to_string() };
    let created = insist(async || connection.operations().create_operation(call(request.clone())).await).await?;
    finish(created, &flags.wait, connection, out).await
}

/// Shows the expected result on each node, based on the nodes' last reports.
async fn check(operation: Operation, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let request = CheckOperationRequest { operation: Some(operation) };
    let found = connection.operations().check_operation(call(request)).await?.into_inner();
    out.document(&found, |found, _| show::checks(found))?;
    let refused = found.checks.iter().filter(|check| check.verdict() == Verdict::Refused).count();
    if refused == 0 {
        return Ok(());
    }
    Err(Failure::Unsuccessful {
        message: format!("{refused} of {} would be refused", nodes(found.checks.len())),
        hint: "nothing was created".to_owned(),
    })
}

/// Returns the doubts that need an answer, and prints the others. A request that the controller refuses has no doubts
/// here: the creation reports the refusal with its reason.
async fn doubts(operation: Operation, connection: &Connection) -> Vec<String> {
    let request = CheckOperationRequest { operation: Some(operation) };
    // Best effort: a controller without this call must not prevent the creation.
    let Ok(found) = connection.operations().check_operation(call(request)).await else { return Vec::new() };
    // The controller only reports doubts. It has no terminal, so the question is asked here (docs/decisions/0072).
    let (doubts, said): (Vec<_>, Vec<_>) = found.into_inner().warnings.into_iter().partition(|warning| warning.ask);
    for warning in said {
        say(&format!("note: {}\n", clean(&in_local_time(&warning.message))));
    }
    doubts.into_iter().map(|warning| in_local_time(&warning.message)).collect()
}

fn nodes(count: usize) -> String {
    if count == 1 { "1 node".to_owned() } else { format!("{count} nodes") }
}

pub(super) async fn retry(
    name: String,
    wait: &Wait,
    force: Force,
    connection: &Connection,
    out: &mut Out,
) -> Result<(), Failure> {
    if !force.force {
        let again: Vec<String> = super::executions(&name, Vec::new(), super::PAGE_SIZE, connection)
            .await?
            .into_iter()
            .filter(|execution| execution.state() != State::Succeeded)
            .map(|execution| execution.node)
            .collect();
        // Only the nodes are in doubt, so the action does not matter. The retry itself reports everything that it
        // refuses.
        let action = Some(Action::Reboot(Reboot::default()));
        let target = Some(operation::Target::Nodes(NodeList { nodes: again }));
        let operation = Operation { action, target, ..Default::default() };
        ask::unless_forced(&doubts(operation, connection).await, force)?;
    }
    let request = RetryOperationRequest { name, request_id: Uuid::now_v7().to_string() };
    let created = insist(async || connection.operations().retry_operation(call(request.clone())).await).await?;
    finish(created, wait, connection, out).await
}

pub(in crate::commands) fn rollout(flags: RolloutFlags) -> Option<Rollout> {
    let asked = Rollout {
        max_in_flight: flags.max_in_flight.unwrap_or_default(),
        canary: flags.canary.unwrap_or_default(),
        failure_limit: flags.max_failures.map(|limit| match limit {
            FailureLimit::Nodes(nodes) => rollout::FailureLimit::MaxFailures(nodes),
            FailureLimit::Percent(percent) => rollout::FailureLimit::MaxFailuresPercent(percent),
        }),
        group_by: flags.group_by.unwrap_or_default(),
        max_in_flight_per_group: flags.max_per_group.unwrap_or_default(),
    };
    // An empty rollout is not sent, so that the controller's default applies.
    (asked != Rollout::default()).then_some(asked)
}

pub(in crate::commands) fn window(flags: WindowFlags) -> Result<Option<MaintenanceWindow>, Failure> {
    let Some(cron) = flags.window_cron else { return Ok(None) };
    let duration = flags.window_duration.map(proto_duration).transpose()?;
    Ok(Some(MaintenanceWindow { cron, duration, time_zone: flags.window_zone.unwrap_or_default() }))
}

pub(in crate::commands) fn target(target: Target) -> operation::Target {
    if target.all {
        operation::Target::All(AllNodes {})
    } else if target.selector.is_empty() {
        operation::Target::Nodes(NodeList { nodes: target.nodes })
    } else {
        operation::Target::Labels(LabelSelector { match_labels: label_map(&target.selector) })
    }
}

/// Repeats a call over broken connections. The caller's request id makes the controller answer a repeated request like
/// the first one.
pub(in crate::commands) async fn insist<T>(ask: impl AsyncFn() -> Result<Response<T>, Status>) -> Result<T, Failure> {
    let mut pause = PAUSE;
    let mut tries = 1;
    loop {
        match ask().await {
            // A refusal is final. Only a lost answer leaves open if the operation exists.
            Err(status) if is_cut(&status) && tries < TRIES => {}
            answer => return Ok(answer?.into_inner()),
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
        tries += 1;
    }
}

/// Shows a new operation, or waits for its end if requested.
async fn finish(created: Operation, wait: &Wait, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    if !wait.wait {
        return out.document(&created, show::operation);
    }
    if !out.is_json() {
        // The name comes first: a wait that is killed must not lose it.
        out.line(&created.name)?;
    }
    let deadline = wait.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut view = View::for_wait(out);
    let until = Until { deadline, stuck: true };
    // Dropping the watch is safe: it only reads.
    let followed = tokio::select! {
        followed = follow(connection, &created.name, until, &mut view, out) => Some(followed),
        // The operation goes on without this process. The message says so, and how to cancel it.
        _ = tokio::signal::ctrl_c() => None,
    };
    view.finish();
    if out.is_json() && !matches!(followed, Some(Ok(_))) {
        // After a failed watch the operation still exists. Its name must not be lost.
        out.document(&created, show::operation)?;
    }
    let Some(followed) = followed else {
        return Err(Failure::Unsuccessful {
            message: format!("interrupted; {} goes on", created.name),
            hint: format!("marcoctl operations watch {0}, or marcoctl operations cancel {0}", created.name),
        });
    };
    let (mut known, end) = followed?;
    // The connection broke before the first message.
    if known.operation.name.is_empty() {
        known.operation = created.clone();
    }
    out.document(&known.operation, |_, _| show::results(&known))?;
    verdict(&known, end, &created.name, connection).await
}

/// Returns true if another try can help at least one failed node. Also true if no error is known.
fn retry_can_help(known: &Known) -> bool {
    let mut errors = known.executions.values().filter_map(|execution| execution.error.as_ref()).peekable();
    errors.peek().is_none() || errors.any(|error| healing(&error.reason) != Healing::AnotherImage)
}

/// Converts the outcome of following an operation to the command's result.
pub(super) async fn verdict(known: &Known, end: End, name: &str, connection: &Connection) -> Result<(), Failure> {
    let state = known.operation.state();
    let paused = state == operation::State::Paused;
    let reason = clean(&known.operation.state_reason);
    let steer =
        || format!("marcoctl operations resume {name} lets it go on, marcoctl operations cancel {name} ends it");
    let counts = known.operation.counts.unwrap_or_default();
    match end {
        End::Ended if state == operation::State::Succeeded => Ok(()),
        // The reader of stdout closed it, which is no failure.
        End::Unread => Ok(()),
        End::Ended => Err(Failure::Unsuccessful {
            message: format!(
                "{name} ended {}: {} of {} nodes succeeded",
                show::operation_state(&known.operation),
                counts.succeeded,
                counts.total
            ),
            hint: if retry_can_help(known) {
                format!("marcoctl operations explain {name}, then marcoctl operations retry {name}")
            } else {
                format!("marcoctl operations explain {name} NODE says which image to put back")
            },
        }),
        End::Stuck => Err(Failure::Unsuccessful {
            message: format!(
                "{name} is not done: {} overdue and no other node at work",
                overdue(counts.overdue, known)
            ),
            hint: format!("marcoctl operations explain {name}; the operation goes on if they come back"),
        }),
        End::Paused => Err(Failure::Unsuccessful {
            message: format!("{name} paused by itself: {reason} ({})", summary(known, connection).await),
            hint: steer(),
        }),
        End::TimedOut if paused => Err(Failure::TimedOut {
            message: format!("{name} has not ended within the time-out: it is paused{}", because(&reason)),
            hint: steer(),
        }),
        End::TimedOut => Err(Failure::TimedOut {
            message: format!(
                "{name} has not ended within the time-out; it goes on: {}",
                summary(known, connection).await
            ),
            hint: format!("marcoctl operations watch {name}"),
        }),
    }
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

fn overdue(counted: i32, known: &Known) -> String {
    let seen = known.executions.values().filter(|execution| execution.overdue).count();
    // Counts and executions may come in different messages. The larger number is shown.
    match usize::try_from(counted).unwrap_or_default().max(seen) {
        1 => "one node is".to_owned(),
        nodes => format!("{nodes} nodes are"),
    }
}
