//! Explanations of an execution's state, in words.

use chrono::{DateTime, SecondsFormat, Utc};
use marco_proto::names::ExecutionId;
use marco_proto::v1;

use super::convert;
use crate::operation::{ExecutionState, WaitReason};
use crate::rollout::Rollout;
use crate::store::{ConflictRow, ExecutionRow, OperationRow, PoweredOff};

/// Largest number of nodes that a sentence names; the message has all of them.
const HOLDERS_SHOWN: usize = 10;

/// Explains a row in sentences. `held` also counts executions in the way that the caller may not see.
pub(super) fn explain(
    row: &ExecutionRow,
    whole: &OperationRow,
    holders: &[ExecutionId],
    held: usize,
    conflict: Option<&ConflictRow>,
) -> v1::ExplainExecutionResponse {
    let node = row.id.node.name();
    let operation = row.id.operation.name();
    let (explanation, suggestions) = match row.state {
        ExecutionState::Pending => {
            // With jitter each node has a time of its own, which explains more than the operation's.
            let (mut text, suggestions) = match row.not_before {
                Some(time) if row.wait_reason == Some(WaitReason::NotDue) => (
                    format!("It waits for its own time in the schedule's jitter, {}.", time.to_rfc3339()),
                    vec![format!("Stop it: marcoctl operations cancel {operation}")],
                ),
                _ => waiting(row.wait_reason, &node, &operation),
            };
            if row.wait_reason == Some(WaitReason::NoSlot)
                && let Some(rollout) = &whole.rollout
            {
                text = slot(rollout, whole.counts.succeeded, held);
            }
            text.push_str(&more(row, whole, holders, held));
            (text, suggestions)
        }
        ExecutionState::Assigned => {
            (format!("It was sent to {node} (attempt {}), which has not accepted it yet.", row.attempt), vec![])
        }
        ExecutionState::Running => {
            let phase = if row.phase.is_empty() { "at work" } else { row.phase.as_str() };
            (format!("{node} has accepted it: {phase}.{}", bytes(row)), cancel(row, &operation))
        }
        // No cancel is offered: past the point of no return it would be refused.
        ExecutionState::Rebooting => (
            format!(
                "{node} is past the point of no return and is going down, or is down{}. It is awaited with a new boot id.",
                if row.phase.is_empty() { String::new() } else { format!(": {}", row.phase) }
            ),
            vec![],
        ),
        ExecutionState::Verifying => (format!("{node} is back; what it runs is being checked."), vec![]),
        ExecutionState::Succeeded => ("It is done and was verified.".to_owned(), vec![]),
        ExecutionState::Failed | ExecutionState::RolledBack | ExecutionState::Cancelled | ExecutionState::Expired => {
            let why =
                row.error.as_ref().map(|error| format!(" {}: {}", error.reason, error.message)).unwrap_or_default();
            (
                format!("It ended {}.{why}", row.state.as_str()),
                vec![format!("Try again on the nodes that did not succeed: marcoctl operations retry {operation}")],
            )
        }
    };
    let mut explanation = explanation;
    let mut suggestions = suggestions;
    if let (Some(WaitReason::NodeBusy), [other, ..]) = (row.wait_reason, holders) {
        suggestions.insert(
            0,
            format!(
                "If {node} is in its installer or overdue, give that up, and this is next: marcoctl operations abandon {} {}",
                other.operation.name(),
                other.node
            ),
        );
    }
    // An overdue execution is explained below, with its reason.
    if let Some(deadline) = row.deadline.filter(|_| row.state.is_active() && !row.overdue) {
        explanation.push_str(&format!(" Without news it is overdue at {}.", instant(deadline)));
    }
    if row.overdue {
        let since = row.deadline.map(|deadline| format!(" since {}", instant(deadline))).unwrap_or_default();
        explanation.push_str(&format!(
            " It is overdue{since}: {}. The node is late, holds no slot, and is given up a day after.",
            row.overdue_reason
        ));
        suggestions.push(format!("Look at the node; to give it up: marcoctl operations abandon {} {node}", operation));
    }
    if row.cancel_requested && !row.state.is_final() {
        explanation.push_str(if row.cancel_refused {
            " A cancel was asked for and came too late."
        } else {
            " A cancel was asked for; the node has not answered yet."
        });
    }
    if let Some(conflict) = conflict {
        explanation.push_str(&format!(" It is in conflict since {}: {}.", instant(conflict.time), conflict.sentence()));
        suggestions.push(format!(
            "Decide who is right: marcoctl nodes resolve {node} --accept takes what the node says, --abandon gives it up"
        ));
    }
    let holders = holders.iter().map(ExecutionId::name).collect();
    v1::ExplainExecutionResponse { execution: Some(convert::execution(row)), explanation, suggestions, holders }
}

/// The reason why a powered-off node is away. The leading blank separates it from the sentence before.
pub(super) fn powered_off(off: &PoweredOff) -> String {
    format!(
        " It was powered off on purpose by {}, at {}: it comes back when somebody turns it on.",
        off.operation.name(),
        instant(off.time)
    )
}

/// A suggestion to read the log of an execution that did not succeed.
pub(super) fn read_log(id: &ExecutionId) -> String {
    format!("Read what the node logged: marcoctl operations log {} {}", id.operation.name(), id.node.name())
}

fn instant(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// The obstacle in detail: times, reasons and other executions.
fn more(row: &ExecutionRow, whole: &OperationRow, holders: &[ExecutionId], held: usize) -> String {
    match (row.wait_reason, holders) {
        (Some(WaitReason::WindowClosed), _) => match row.next_attempt_time {
            Some(opens) if opens >= whole.expire_time => {
                format!(" It opens next at {}, when the operation has expired.", instant(opens))
            }
            Some(opens) => format!(" It opens next at {}.", instant(opens)),
            None => " It never opens again.".to_owned(),
        },
        (Some(WaitReason::NotDue), _) => {
            format!(" That is {}.", instant(whole.schedule_time))
        }
        (Some(WaitReason::Paused), _) if !whole.state_reason.is_empty() => {
            format!(" The reason given: {}.", whole.state_reason)
        }
        // A limited caller learns that the slots are taken, but not by which nodes.
        (Some(WaitReason::NoSlot), []) if held > 0 => " Nodes that you may not see are in flight.".to_owned(),
        (Some(WaitReason::NoSlot), []) => {
            " No node holds one; the operation is about to pause, or its first nodes have not succeeded yet.".to_owned()
        }
        (Some(WaitReason::NoSlot), _) => {
            let mut nodes: Vec<&str> = holders.iter().take(HOLDERS_SHOWN).map(|id| id.node.as_str()).collect();
            let others = format!("and {} others", holders.len().saturating_sub(HOLDERS_SHOWN));
            if holders.len() > HOLDERS_SHOWN {
                nodes.push(&others);
            }
            format!(" In flight: {}.", nodes.join(", "))
        }
        (Some(WaitReason::NodeBusy), [other, ..]) => format!(" It is at work on {}.", other.operation.name()),
        _ => String::new(),
    }
}

/// The rollout limit that an execution waits for, if `held` slots of that limit are taken.
fn slot(rollout: &Rollout, succeeded: u32, held: usize) -> String {
    let held = u32::try_from(held).unwrap_or(u32::MAX);
    // The canary goes first: until it has succeeded, the rest does not begin.
    if succeeded < rollout.canary {
        return format!(
            "It waits for a slot: {} nodes, the canary, must succeed before the rest begins.",
            rollout.canary
        );
    }
    // The limit of the whole operation is named first: a free slot in the group would not help.
    let all_taken = rollout.max_in_flight.is_some_and(|limit| held >= limit);
    if let (Some(label), Some(limit)) = (&rollout.group_by, rollout.max_in_flight_per_group)
        && held >= limit
        && !all_taken
    {
        return format!(
            "It waits for a free slot of its group: at most {limit} with the same {label} at once, or without that label."
        );
    }
    match rollout.max_in_flight {
        Some(limit) => format!("It waits for a free slot: at most {limit} nodes at once."),
        None => "It waits for a free slot.".to_owned(),
    }
}

fn bytes(row: &ExecutionRow) -> String {
    if row.bytes_total == 0 {
        return String::new();
    }
    format!(" {} of {} bytes are done.", row.bytes_done, row.bytes_total)
}

fn cancel(row: &ExecutionRow, operation: &str) -> Vec<String> {
    // A second cancel changes nothing.
    if row.cancel_requested {
        return vec![];
    }
    vec![format!("Stop it while that is still possible: marcoctl operations cancel {operation}")]
}

/// The obstacle of a waiting execution, with suggestions.
pub(super) fn waiting(reason: Option<WaitReason>, node: &str, operation: &str) -> (String, Vec<String>) {
    let cancel = format!("Stop it: marcoctl operations cancel {operation}");
    match reason {
        Some(WaitReason::NotDue) => ("It waits for the operation's schedule_time.".to_owned(), vec![cancel]),
        Some(WaitReason::NodeOffline) => (
            format!("It waits for {node}, which has no open stream to the controller."),
            vec![format!("See whether the node has power and network: marcoctl nodes get {node}"), cancel],
        ),
        Some(WaitReason::AwaitingApproval) => (
            format!("It waits until an admin approves {node}."),
            vec![format!("Approve it: marcoctl nodes approve {node}"), cancel],
        ),
        Some(WaitReason::Paused) => (
            "It waits because the operation is paused.".to_owned(),
            vec![format!("Let it go on: marcoctl operations resume {operation}"), cancel],
        ),
        Some(WaitReason::NodeBusy) => (
            format!("It waits until {node} has ended another execution."),
            vec![format!("See which: marcoctl nodes get {node}"), cancel],
        ),
        Some(WaitReason::NodeConflict) => (
            format!("It waits because {node} says something that the controller cannot take."),
            vec![
                format!(
                    "See what (marcoctl nodes get {node}); then: marcoctl nodes resolve {node} --accept or --abandon"
                ),
                cancel,
            ],
        ),
        Some(WaitReason::WindowClosed) => (
            "It waits because the operation's maintenance window is closed.".to_owned(),
            vec![format!("Wait for it; or cancel, and begin without a window: marcoctl operations cancel {operation}")],
        ),
        Some(WaitReason::NoSlot) => (
            "It waits for a free slot: as many nodes are in flight as the rollout allows at once.".to_owned(),
            vec![format!("See how far the others are: marcoctl operations get {operation}"), cancel],
        ),
        Some(WaitReason::NodeInstalling) => (
            format!("It waits because {node} is in its installer and takes only an update with an image."),
            vec![format!("Give it an image: marcoctl operations update {node} --image ID"), cancel],
        ),
        Some(WaitReason::NodeQuarantined) => (
            format!("It waits because {node} is quarantined and gets no work."),
            vec![format!("Find out why (marcoctl nodes get {node}); then: marcoctl nodes approve {node}"), cancel],
        ),
        Some(WaitReason::Due) | None => {
            ("Nothing stands in the way; it is assigned within a second or so.".to_owned(), vec![])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{slot, waiting};
    use crate::operation::WaitReason;
    use crate::rollout::Rollout;

    #[test]
    fn who_waits_for_a_slot_is_told_which_limit_is_reached() {
        let rollout = Rollout {
            max_in_flight: Some(5),
            canary: 1,
            group_by: Some("switch".to_owned()),
            max_in_flight_per_group: Some(2),
            ..Rollout::default()
        };
        assert!(slot(&rollout, 0, 1).contains("1 nodes, the canary"));
        assert!(slot(&rollout, 1, 2).contains("at most 2 with the same switch"));
        assert!(slot(&rollout, 1, 5).contains("at most 5 nodes"));
        assert!(slot(&Rollout { max_in_flight: Some(2), ..rollout }, 1, 2).contains("at most 2 nodes"));
    }

    #[test]
    fn every_wait_says_what_can_be_done_but_the_one_that_ends_by_itself() {
        for reason in WaitReason::ALL {
            let (explanation, suggestions) = waiting(Some(*reason), "nodes/pi-01", "operations/x");
            assert!(explanation.ends_with('.'));
            assert_eq!(suggestions.is_empty(), *reason == WaitReason::Due, "{reason:?}");
        }
    }
}
