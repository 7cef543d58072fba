//! Order of an operation over its nodes: the nodes that may go next, and the reasons to pause by itself. Pure.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Smallest number of vanished targets that pauses, independent of their share. One broken cable must not pause a
/// rollout over two nodes.
const VANISHED_AT_LEAST: u32 = 3;
/// Share of the targets that must vanish, as one in this many.
const VANISHED_ONE_IN: u32 = 3;

/// Limits that an operator asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rollout {
    /// Nodes at the same time; `None`: all.
    pub max_in_flight: Option<u32>,
    /// Nodes that must succeed before the others begin; 0: none.
    pub canary: u32,
    /// Failures before the operation pauses; `None`: any number.
    pub max_failures: Option<Limit>,
    /// Key of the label whose values form groups; `None`: no groups. Nodes without the label form one group with the
    /// same bound: a misspelt label must not lift the bound.
    pub group_by: Option<String>,
    /// Nodes of one group at the same time; `None`: all.
    pub max_in_flight_per_group: Option<u32>,
}

/// A number of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// An absolute number.
    Number(u32),
    /// Percentage of the targets, rounded down.
    Percent(u32),
}

impl Limit {
    /// The number of nodes for this many targets.
    pub fn of(self, total: u32) -> u32 {
        match self {
            Self::Number(number) => number,
            // Rounded down: the limit is a promise of the most that may fail.
            Self::Percent(percent) => u32::try_from(u64::from(total) * u64::from(percent) / 100).unwrap_or(u32::MAX),
        }
    }
}

/// Progress of an operation, as the store counted it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Number of its targets.
    pub total: u32,
    /// Executions that are not assigned.
    pub pending: u32,
    /// Executions that succeeded.
    pub succeeded: u32,
    /// Executions that failed, were rolled back or are overdue.
    pub failures: u32,
    /// Failures that an operator saw and let pass by resuming.
    pub forgiven: u32,
    /// Targets that had a stream at the start and lost it, without a restart or power-off that explains it.
    pub vanished: u32,
    /// Group of each node that holds a slot; `None`: the node has no such label.
    pub in_flight: Vec<Option<String>>,
}

/// The reason why an operation pauses by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// Too many failures: the number, and the limit.
    Failures(u32, u32),
    /// A canary failed: the number of failures, and the number of canaries that must succeed.
    Canary(u32, u32),
    /// Nodes vanished: their number, and the number of targets.
    Vanished(u32, u32),
}

impl fmt::Display for Pause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failures(failed, limit) => {
                write!(f, "max_failures passed: {failed} failed or overdue, {limit} may be")
            }
            Self::Canary(failed, canary) => {
                write!(f, "canary failed: {failed} failed or overdue among the first, of which {canary} must succeed")
            }
            Self::Vanished(vanished, total) => {
                write!(f, "nodes vanished: {vanished} of {total} lost their streams and were not restarting")
            }
        }
    }
}

impl Rollout {
    /// The reason to pause; `None`: go on.
    pub fn pause(&self, standing: &Standing) -> Option<Pause> {
        // Nothing is left to hold back: a pause would only ask an operator for a decision without effect.
        if standing.pending == 0 {
            return None;
        }
        // Otherwise a resumed operation would pause again at once.
        let failures = standing.failures.saturating_sub(standing.forgiven);
        if let Some(limit) = self.max_failures.map(|limit| limit.of(standing.total))
            && failures > limit
        {
            return Some(Pause::Failures(failures, limit));
        }
        // At the first failure: otherwise the next nodes would take the canaries' places and fail one by one.
        if failures > 0 && standing.succeeded < self.canary {
            return Some(Pause::Canary(failures, self.canary));
        }
        let many = standing.vanished.saturating_mul(VANISHED_ONE_IN) >= standing.total;
        (many && standing.vanished >= VANISHED_AT_LEAST).then_some(Pause::Vanished(standing.vanished, standing.total))
    }

    /// Chooses the waiting nodes that may go now. `waiting` holds their groups; the result holds indices into it, in
    /// order.
    pub fn choose(&self, standing: &Standing, waiting: &[Option<String>]) -> Vec<usize> {
        // Checked here too, so that no caller can choose nodes for an operation that has to pause.
        if self.pause(standing).is_some() {
            return Vec::new();
        }
        let mut room = self.room(standing);
        let mut groups: BTreeMap<Option<&str>, u32> = BTreeMap::new();
        for group in &standing.in_flight {
            *groups.entry(group.as_deref()).or_default() += 1;
        }
        let mut chosen = Vec::new();
        for (place, group) in waiting.iter().enumerate() {
            if room == 0 {
                break;
            }
            // A full group is skipped, not waited for: the nodes of other groups behind it may go.
            if let Some(limit) = self.max_in_flight_per_group {
                let held = groups.entry(group.as_deref()).or_default();
                if *held >= limit {
                    continue;
                }
                *held += 1;
            }
            room -= 1;
            chosen.push(place);
        }
        chosen
    }

    /// Nodes that may begin now, before the limits of groups.
    fn room(&self, standing: &Standing) -> u32 {
        let in_flight = u32::try_from(standing.in_flight.len()).unwrap_or(u32::MAX);
        let room = self.max_in_flight.map_or(u32::MAX, |limit| limit.saturating_sub(in_flight));
        if standing.succeeded >= self.canary {
            return room;
        }
        // While canaries run, `in_flight` counts against the missing successes, so that no more than the canaries are
        // out.
        room.min((self.canary - standing.succeeded).saturating_sub(in_flight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str) -> Option<String> {
        Some(name.to_owned())
    }

    fn standing(in_flight: usize) -> Standing {
        Standing { total: 100, pending: 90, in_flight: vec![None; in_flight], ..Standing::default() }
    }

    #[test]
    fn without_any_limit_all_go_at_once() {
        assert_eq!(Rollout::default().choose(&standing(5), &vec![None; 95]).len(), 95);
    }

    #[test]
    fn never_more_than_the_limit_are_in_flight() {
        let rollout = Rollout { max_in_flight: Some(10), ..Rollout::default() };
        for in_flight in 0..15 {
            let chosen = rollout.choose(&standing(in_flight), &vec![None; 50]);
            assert_eq!(chosen, (0..10_usize.saturating_sub(in_flight)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_full_group_waits_and_the_others_pass_it() {
        let rollout = Rollout { group_by: group("switch"), max_in_flight_per_group: Some(2), ..Rollout::default() };
        let now = Standing { in_flight: vec![group("a"), None], ..standing(0) };
        let waiting = [group("a"), group("a"), group("b"), None, group("b"), group("b"), None];
        assert_eq!(rollout.choose(&now, &waiting), [0, 2, 3, 4]);
        let tight = Rollout { max_in_flight: Some(4), ..rollout };
        assert_eq!(tight.choose(&now, &waiting), [0, 2]);
    }

    #[test]
    fn nodes_without_the_label_are_one_bounded_group() {
        let misspelt = Rollout { group_by: group("swich"), max_in_flight_per_group: Some(2), ..Rollout::default() };
        assert_eq!(misspelt.choose(&standing(0), &vec![None; 95]), [0, 1]);
        assert_eq!(misspelt.choose(&standing(1), &vec![None; 95]), [0]);
        assert!(misspelt.choose(&standing(2), &vec![None; 95]).is_empty());
        // A label with an empty value is a group of its own, distinct from nodes without the label.
        assert_eq!(misspelt.choose(&standing(2), &[None, group(""), group("")]), [1, 2]);
    }

    #[test]
    fn the_canaries_go_first_and_the_rest_waits_for_all_of_them() {
        let rollout = Rollout { canary: 3, max_in_flight: Some(10), ..Rollout::default() };
        let rest = vec![None; 50];
        assert_eq!(rollout.choose(&standing(0), &rest).len(), 3);
        assert_eq!(rollout.choose(&standing(3), &rest).len(), 0);
        let two = Standing { succeeded: 2, ..standing(1) };
        assert_eq!(rollout.choose(&two, &rest).len(), 0);
        // One is overdue and an operator let that pass: another node takes its place.
        let replaced = Standing { succeeded: 2, failures: 1, forgiven: 1, ..standing(0) };
        assert_eq!(rollout.choose(&replaced, &rest).len(), 1);
        let three = Standing { succeeded: 3, ..standing(0) };
        assert_eq!(rollout.choose(&three, &rest).len(), 10);
    }

    #[test]
    fn a_canary_that_fails_pauses() {
        let rollout = Rollout { canary: 3, max_failures: Some(Limit::Number(5)), ..Rollout::default() };
        let one = Standing { succeeded: 2, failures: 1, ..standing(0) };
        assert_eq!(rollout.pause(&one), Some(Pause::Canary(1, 3)));
        assert!(rollout.choose(&one, &[None]).is_empty());
        assert_eq!(rollout.pause(&Standing { succeeded: 3, ..one }), None);
    }

    #[test]
    fn more_failures_than_may_be_pause_until_an_operator_lets_them_pass() {
        let number = Rollout { max_failures: Some(Limit::Number(5)), ..Rollout::default() };
        let percent = Rollout { max_failures: Some(Limit::Percent(5)), ..Rollout::default() };
        let none = Rollout { max_failures: Some(Limit::Number(0)), ..Rollout::default() };
        let failed = |failures| Standing { failures, ..standing(0) };
        for rollout in [&number, &percent] {
            assert_eq!(rollout.pause(&failed(5)), None);
            assert_eq!(rollout.pause(&failed(6)), Some(Pause::Failures(6, 5)));
            assert_eq!(rollout.pause(&Standing { forgiven: 6, ..failed(11) }), None);
            assert_eq!(rollout.pause(&Standing { forgiven: 6, ..failed(12) }), Some(Pause::Failures(6, 5)));
        }
        assert_eq!(none.pause(&failed(1)), Some(Pause::Failures(1, 0)));
        assert_eq!(Rollout::default().pause(&failed(90)), None);
        assert_eq!(number.pause(&Standing { pending: 0, ..failed(6) }), None, "nothing is left to hold back");
    }

    #[test]
    fn a_third_of_the_targets_and_at_least_three_must_vanish() {
        let pauses = |vanished, total| {
            Rollout::default().pause(&Standing { total, pending: 1, vanished, ..Standing::default() }).is_some()
        };
        assert!(!pauses(33, 100));
        assert!(pauses(34, 100));
        assert!(!pauses(2, 3));
        assert!(pauses(3, 3));
        assert!(pauses(3, 9));
        assert!(!pauses(3, 10));
    }

    #[test]
    fn a_percentage_is_rounded_down() {
        assert_eq!((Limit::Percent(10).of(19), Limit::Percent(100).of(7), Limit::Percent(33).of(3)), (1, 7, 0));
    }
}
