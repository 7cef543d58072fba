//! Formats operations, executions and events as text.

use chrono::{DateTime, Utc};
use marco_proto::v1::operation::{Action, Target};
use marco_proto::v1::rollout::FailureLimit;
use marco_proto::v1::{
    CheckOperationResponse, Event, Execution, ExecutionLog, ExplainExecutionResponse, MaintenanceWindow, Operation,
    Rollout,
};

use crate::follow::Known;
use crate::output::{
    ago, bytes, clean, enum_word, fields, id, in_local_time, labels, listing, local, span, table, timestamp,
};
use crate::progress::{describe, done_of, is_final};

/// Returns the name of an operation's state.
pub(super) fn operation_state(operation: &Operation) -> String {
    enum_word(operation.state().as_str_name(), "STATE_")
}

fn execution_state(execution: &Execution) -> String {
    enum_word(execution.state().as_str_name(), "STATE_")
}

fn action(operation: &Operation) -> String {
    match &operation.action {
        Some(Action::Reboot(_)) => "reboot".to_owned(),
        Some(Action::PowerOff(_)) => "power-off".to_owned(),
        Some(Action::Update(update)) if update.image.is_empty() => "update boot files".to_owned(),
        Some(Action::Update(update)) => format!("update {}", id(&update.image)),
        None => String::new(),
    }
}

/// Formats operations as a table.
pub(super) fn operations(operations: &[Operation], now: DateTime<Utc>) -> String {
    let rows = operations.iter().map(|operation| {
        vec![
            id(&operation.name),
            action(operation),
            operation_state(operation),
            done_of(&operation.counts.unwrap_or_default()),
            ago(operation.create_time.as_ref(), now),
            operation.creator.clone(),
        ]
    });
    listing("no operations", &["OPERATION", "ACTION", "STATE", "TARGETS", "CREATED", "BY"], rows)
}

/// Formats the result of a dry run: one line per node, then the warnings.
pub(super) fn checks(found: &CheckOperationResponse) -> String {
    let rows = found.checks.iter().map(|check| {
        let verdict = enum_word(check.verdict().as_str_name(), "VERDICT_");
        vec![id(&check.node), verdict, check.reason.clone(), in_local_time(&check.message)]
    });
    let mut text = table(&["NODE", "WOULD BE", "REASON", "WHY"], rows);
    for warning in &found.warnings {
        text.push_str(&format!("\nwarning: {}", clean(&in_local_time(&warning.message))));
    }
    text
}

fn rollout(rollout: &Rollout) -> String {
    let mut parts = Vec::new();
    if rollout.max_in_flight > 0 {
        parts.push(format!("{} at once", rollout.max_in_flight));
    }
    if rollout.canary > 0 {
        parts.push(format!("{} first", rollout.canary));
    }
    match rollout.failure_limit {
        Some(FailureLimit::MaxFailures(nodes)) => parts.push(format!("{nodes} may fail")),
        Some(FailureLimit::MaxFailuresPercent(percent)) => parts.push(format!("{percent}% may fail")),
        None => {}
    }
    if rollout.max_in_flight_per_group > 0 {
        parts.push(format!("{} at once of each {}", rollout.max_in_flight_per_group, rollout.group_by));
    }
    parts.join(", ")
}

fn window(window: &MaintenanceWindow) -> String {
    let length = window.duration.and_then(|length| std::time::Duration::try_from(length).ok());
    let zone = if window.time_zone.is_empty() { "UTC" } else { window.time_zone.as_str() };
    format!("{} for {}, {zone}", window.cron, length.map(span).unwrap_or_default())
}

/// Settings that an operation shares with a schedule's template, formatted.
pub(in crate::commands) struct Manner {
    pub(in crate::commands) notice: String,
    pub(in crate::commands) message: String,
    pub(in crate::commands) rollout: String,
    pub(in crate::commands) window: String,
}

/// Formats the notice, message, rollout and window of an operation or a template.
pub(in crate::commands) fn manner(operation: &Operation) -> Manner {
    let (notice, message) = match &operation.action {
        Some(Action::Reboot(reboot)) => (reboot.notice.as_ref(), reboot.message.clone()),
        Some(Action::PowerOff(power_off)) => (power_off.notice.as_ref(), power_off.message.clone()),
        Some(Action::Update(update)) => (update.notice.as_ref(), update.message.clone()),
        None => (None, String::new()),
    };
    Manner {
        notice: notice.and_then(|notice| std::time::Duration::try_from(*notice).ok()).map(span).unwrap_or_default(),
        message,
        rollout: operation.rollout.as_ref().map(rollout).unwrap_or_default(),
        window: operation.window.as_ref().map(window).unwrap_or_default(),
    }
}

/// Formats one operation.
pub(in crate::commands) fn operation(operation: &Operation, now: DateTime<Utc>) -> String {
    let manner = manner(operation);
    let update = match &operation.action {
        Some(Action::Update(update)) => update.clone(),
        _ => Default::default(),
    };
    let targets = match &operation.target {
        // A long list would push everything else off the screen. `operations executions` lists the nodes.
        Some(Target::Nodes(list)) if list.nodes.len() > 8 => format!("{} nodes by name", list.nodes.len()),
        Some(Target::Nodes(list)) => list.nodes.iter().map(|node| id(node)).collect::<Vec<_>>().join(" "),
        Some(Target::Labels(selector)) => labels(&selector.match_labels),
        Some(Target::All(_)) => "all approved nodes".to_owned(),
        None => String::new(),
    };
    let starts = match operation.schedule_time.as_ref() {
        Some(time) => format!("{} ({})", local(Some(time)), ago(Some(time), now)),
        None => String::new(),
    };
    fields(&[
        ("operation", operation.name.clone()),
        ("action", action(operation)),
        ("image sha256", update.image_sha256),
        ("bootcode", update.bootcode),
        ("bootcode sha256", update.bootcode_sha256),
        ("notice", manner.notice),
        ("message", manner.message),
        ("targets", targets),
        ("schedule", operation.schedule.clone()),
        ("rollout", manner.rollout),
        ("window", manner.window),
        ("state", operation_state(operation)),
        ("reason", in_local_time(&operation.state_reason)),
        ("done", done_of(&operation.counts.unwrap_or_default())),
        ("starts", starts),
        ("expires", local(operation.expire_time.as_ref())),
        ("created", local(operation.create_time.as_ref())),
        ("by", operation.creator.clone()),
        ("finished", local(operation.finish_time.as_ref())),
        ("retry of", operation.retry_of.clone()),
    ])
}

/// Formats executions as a table.
pub(super) fn executions(executions: &[Execution], now: DateTime<Utc>) -> String {
    let rows = executions.iter().map(|execution| {
        let percent = execution.bytes_done.saturating_mul(100).checked_div(execution.bytes_total);
        // A finished execution keeps its last byte counts, which are no progress.
        let progress = match percent {
            Some(percent) if !is_final(execution.state()) => {
                format!("{percent} % of {}", bytes(execution.bytes_total))
            }
            _ => String::new(),
        };
        vec![id(&execution.node), describe(execution), progress, ago(execution.update_time.as_ref(), now)]
    });
    listing("no executions", &["NODE", "STATE", "PROGRESS", "CHANGED"], rows)
}

/// Formats the result of each node: duration, state, and the reason if it did not succeed.
pub(super) fn results(known: &Known) -> String {
    let why = |execution: &Execution| match &execution.error {
        Some(error) => format!("{}: {}", error.reason, error.message),
        None if execution.overdue => format!("overdue: {}", execution.overdue_reason),
        None => String::new(),
    };
    let took = |execution: &Execution| {
        let begun = timestamp(execution.assign_time.as_ref());
        let ended = timestamp(execution.finish_time.as_ref());
        begun.zip(ended).and_then(|(begun, ended)| (ended - begun).to_std().ok()).map(span).unwrap_or_default()
    };
    let rows = known
        .executions
        .values()
        .map(|execution| vec![id(&execution.node), took(execution), execution_state(execution), why(execution)]);
    // The last column has no header, so that it takes no space if it is empty.
    table(&["NODE", "TOOK", "RESULT", ""], rows)
}

/// Formats the explanation of one execution.
pub(super) fn explanation(explained: &ExplainExecutionResponse) -> String {
    let execution = explained.execution.clone().unwrap_or_default();
    let mut text = format!(
        "{}  {}\n  {}\n",
        clean(&id(&execution.node)),
        describe(&execution),
        clean(&in_local_time(&explained.explanation))
    );
    for suggestion in &explained.suggestions {
        text.push_str(&format!("  - {}\n", clean(&in_local_time(suggestion))));
    }
    text
}

/// Maximum number of nodes that are named for one explanation.
const NODES_SHOWN: usize = 6;

/// Groups executions that have the same explanation. Groups and members keep the order of the list.
pub(super) fn alike(executions: &[Execution]) -> Vec<Vec<&Execution>> {
    let key = |execution: &Execution| {
        // The reason is compared, not the message: messages may contain a node's own values.
        let reason = execution.error.as_ref().map(|error| error.reason.clone());
        (execution.state, execution.wait_reason, execution.overdue, execution.cancel_requested, reason)
    };
    let mut groups: Vec<Vec<&Execution>> = Vec::new();
    for execution in executions {
        match groups.iter_mut().find(|group| group.first().is_some_and(|first| key(first) == key(execution))) {
            Some(group) => group.push(execution),
            None => groups.push(vec![execution]),
        }
    }
    groups
}

/// Formats the explanation of a group. `first` is the explanation of its first member.
pub(super) fn explanation_of_all(alike: &[&Execution], first: &ExplainExecutionResponse) -> String {
    let text = explanation(first);
    if alike.len() < 2 {
        return text;
    }
    let named: Vec<String> = alike.iter().take(NODES_SHOWN).map(|execution| clean(&id(&execution.node))).collect();
    let more = match alike.len().saturating_sub(NODES_SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{} nodes: {}{more}; the first of them:\n{text}", alike.len(), named.join(" "))
}

/// Formats a node's log.
pub(super) fn log(log: &ExecutionLog) -> String {
    let head = if log.cut { "(older lines were left out)\n" } else { "" };
    // The lines come from a node, so they are escaped one by one; the line feeds stay.
    log.log.lines().fold(head.to_owned(), |text, line| text + &clean(line) + "\n")
}

/// Formats events as a table.
pub(super) fn events(events: &[Event]) -> String {
    let rows = events.iter().map(|event| {
        let change = match (event.from.as_str(), event.to.as_str()) {
            ("", to) => to.to_owned(),
            (from, to) => format!("{from} -> {to}"),
        };
        vec![
            event.number.to_string(),
            local(event.time.as_ref()),
            id(&event.node),
            change,
            event.actor.clone(),
            in_local_time(&event.reason),
        ]
    });
    listing("no events", &["#", "TIME", "NODE", "CHANGE", "BY", "REASON"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use marco_proto::v1::execution::{State, WaitReason};

    fn pending(node: &str, reason: WaitReason) -> Execution {
        Execution {
            node: format!("nodes/{node}"),
            state: State::Pending.into(),
            wait_reason: reason.into(),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_true_of_many_nodes_is_said_once() {
        let mut all: Vec<Execution> =
            (10..30).map(|number| pending(&format!("pi-{number}"), WaitReason::NoSlot)).collect();
        all.push(pending("pi-99", WaitReason::NodeOffline));
        let groups = alike(&all);
        assert_eq!(groups.iter().map(Vec::len).collect::<Vec<_>>(), [20, 1]);
        let first = ExplainExecutionResponse {
            execution: all.first().cloned(),
            explanation: "It waits.".to_owned(),
            ..Default::default()
        };
        let text = explanation_of_all(&groups[0], &first);
        assert!(text.starts_with("20 nodes: pi-10 pi-11 pi-12 pi-13 pi-14 pi-15 and 14 more; the first"), "{text}");
        assert!(explanation_of_all(&groups[1], &first).starts_with("pi-10  "), "{text}");
    }
}
