//! Summary of an operation while none of its nodes is at work: the number of finished nodes, and the reasons of the
//! others.

use std::collections::BTreeMap;

use marco_proto::v1::execution::{State, WaitReason};
use marco_proto::v1::{GetNodeRequest, Node};

use super::{Known, will_move};
use crate::connect::{Connection, call};
use crate::output::{clean, enum_word, id, local, timestamp, timestamp_of};
use crate::progress::is_final;

/// Maximum number of offline nodes that are queried. "since" is the earliest time among these.
const ASKED: usize = 16;

/// Returns true if every node is finished or waits for manual action: power, an approval, an operator.
pub(crate) fn stands_still(known: &Known) -> bool {
    !known.executions.is_empty()
        && known.executions.values().any(|execution| !is_final(execution.state()))
        && known.executions.values().all(|execution| execution.overdue || !will_move(execution))
}

/// Returns a summary for the waiting operator, for example "27 of 32 done, 5 offline since 2026-11-29 12:00:00 +01:00".
pub(crate) async fn summary(known: &Known, connection: &Connection) -> String {
    let offline = known.executions.values().filter(|execution| execution.wait_reason() == WaitReason::NodeOffline);
    let mut nodes = BTreeMap::new();
    for execution in offline.take(ASKED) {
        let request = GetNodeRequest { name: execution.node.clone() };
        // Best effort: the text is a convenience, and the stream is not read meanwhile.
        let Ok(node) = connection.nodes().get_node(call(request)).await else { break };
        nodes.insert(execution.node.clone(), node.into_inner());
    }
    sentence(known, &nodes)
}

fn sentence(known: &Known, nodes: &BTreeMap<String, Node>) -> String {
    let mut done = 0;
    let mut overdue = 0;
    let mut at_work = 0;
    let mut offline = Vec::new();
    let mut off = Vec::new();
    let mut others: BTreeMap<&str, usize> = BTreeMap::new();
    for execution in known.executions.values() {
        match (execution.state(), execution.wait_reason()) {
            // First, because a finished execution may still carry its old wait reason.
            (state, _) if is_final(state) => done += 1,
            _ if execution.overdue => overdue += 1,
            (State::Pending, WaitReason::NodeOffline) => match nodes.get(&execution.node) {
                // A node that was powered off on purpose needs someone at the board, not patience.
                Some(node) if !node.powered_off_by.is_empty() => off.push(id(&node.name)),
                node => offline.push(node.and_then(|node| timestamp(node.last_seen_time.as_ref()))),
            },
            (State::Pending, reason) => *others.entry(reason.as_str_name()).or_default() += 1,
            _ => at_work += 1,
        }
    }
    let mut parts = vec![format!("{done} of {} done", known.executions.len())];
    if at_work > 0 {
        parts.push(format!("{at_work} at work"));
    }
    if !offline.is_empty() {
        // The earliest time: it shows how long the longest outage has lasted.
        let since = offline.iter().flatten().min().map(|time| local(Some(&timestamp_of(*time))));
        let since = since.map(|since| format!(" since {since}")).unwrap_or_default();
        parts.push(format!("{} offline{since}", offline.len()));
    }
    if !off.is_empty() {
        parts.push(format!("{} powered off on purpose ({})", off.len(), clean(&off.join(" "))));
    }
    if overdue > 0 {
        parts.push(format!("{overdue} overdue"));
    }
    for (reason, count) in others {
        let word = enum_word(reason, "WAIT_REASON_").to_lowercase().replace('_', " ");
        parts.push(format!("{count} {}", if word.is_empty() { "waiting".to_owned() } else { word }));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use chrono::DateTime;
    use marco_proto::v1::execution::{State, WaitReason};
    use marco_proto::v1::{Execution, Node};

    use super::{sentence, stands_still};
    use crate::follow::Known;
    use crate::output::{local, timestamp_of};

    fn known(executions: &[(&str, State, WaitReason)]) -> Known {
        let mut known = Known::default();
        for (node, state, reason) in executions {
            let (state, wait_reason) = ((*state).into(), (*reason).into());
            let execution = Execution { node: format!("nodes/{node}"), state, wait_reason, ..Default::default() };
            known.executions.insert(execution.node.clone(), execution);
        }
        known
    }

    #[test]
    fn wait_says_how_many_are_done_and_since_when_others_are_offline() {
        let none = WaitReason::Unspecified;
        let known = known(&[
            ("a", State::Succeeded, none),
            ("b", State::Failed, none),
            ("c", State::Pending, WaitReason::NodeOffline),
            ("d", State::Pending, WaitReason::NodeOffline),
            ("e", State::Pending, WaitReason::NodeOffline),
            ("f", State::Pending, WaitReason::NodeQuarantined),
        ]);
        assert!(stands_still(&known));
        let at = |seconds| Some(timestamp_of(DateTime::from_timestamp(seconds, 0).unwrap()));
        let node = |id: &str, seconds, off: &str| Node {
            name: format!("nodes/{id}"),
            last_seen_time: at(seconds),
            powered_off_by: off.to_owned(),
            ..Default::default()
        };
        let nodes = [node("c", 1_900_000_500, ""), node("d", 1_900_000_000, ""), node("e", 1, "operations/x")];
        let nodes: BTreeMap<String, Node> = nodes.into_iter().map(|node| (node.name.clone(), node)).collect();
        let since = local(at(1_900_000_000).as_ref());
        assert_eq!(
            sentence(&known, &nodes),
            format!("2 of 6 done, 2 offline since {since}, 1 powered off on purpose (e), 1 node quarantined")
        );
        assert!(sentence(&known, &BTreeMap::new()).starts_with("2 of 6 done, 3 offline, 1"));
    }

    #[test]
    fn operation_with_a_node_at_work_does_not_stand_still() {
        let none = WaitReason::Unspecified;
        let offline = ("b", State::Pending, WaitReason::NodeOffline);
        assert!(!stands_still(&known(&[("a", State::Running, none), offline])));
        assert!(!stands_still(&known(&[("a", State::Pending, WaitReason::Due), offline])));
        assert!(!stands_still(&known(&[("a", State::Succeeded, none)])), "it has ended");
        assert!(!stands_still(&known(&[])));
    }
}
