//! How an operation goes over its nodes: who may go next, and when it pauses by itself. Pure.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// So many targets must vanish, whatever their share.
const VANISHED_AT_LEAST: u32 = 3;
/// One in so many targets must vanish.
const VANISHED_ONE_IN: u32 = 3;

/// What an operator asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rollout {
    /// How many nodes at once; `None`: all.
    pub max_in_flight: Option<u32>,
    /// How many nodes must succeed before the rest is begun.
    pub canary: u32,
    /// How many may fail before it pauses; `None`: any number.
    pub max_failures: Option<Limit>,
    /// The label whose values make groups. The nodes without it are one group of their own, bounded like the others: a
    /// label that is misspelt must not lift the bound.
    pub group_by: Option<String>,
    /// How many nodes of one group at once; `None`: all.
    pub max_in_flight_per_group: Option<u32>,
}

/// A number of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// As such.
    Number(u32),
    /// In a hundred targets, rounded down.
    Percent(u32),
}

impl Limit {
    /// The number for so many targets.
    pub fn of(self, total: u32) -> u32 {
        match self {
            Self::Number(number) => number,
            Self::Percent(percent) => u32::try_from(u64::from(total) * u64::from(percent) / 100).unwrap_or(u32::MAX),
        }
    }
}

/// Where an operation stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// Its targets.
    pub total: u32,
    /// Those that are not assigned.
    pub pending: u32,
    /// Those that succeeded.
    pub succeeded: u32,
    /// Those that failed or were rolled back, and those that are overdue.
    pub failures: u32,
    /// How many failures an operator has seen and let pass.
    pub forgiven: u32,
    /// Targets that were there at the start and lost their streams, without a restart to explain it.
    pub vanished: u32,
    /// The group of each node that holds a slot; `None`: the one of the nodes without the label.
    pub in_flight: Vec<Option<String>>,
}

/// Why an operation pauses by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pause {
    /// More nodes failed than may: how many, and how many may.
    Failures(u32, u32),
    /// One of the first nodes failed, which all have to succeed: how many failed, and how many those are.
    Canary(u32, u32),
    /// Nodes vanished: how many, of how many.
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
    /// Why it has to pause, if it has to. With nothing left to begin there is nothing to hold back.
    pub fn pause(&self, standing: &Standing) -> Option<Pause> {
        if standing.pending == 0 {
            return None;
        }
        let failures = standing.failures.saturating_sub(standing.forgiven);
        if let Some(limit) = self.max_failures.map(|limit| limit.of(standing.total))
            && failures > limit
        {
            return Some(Pause::Failures(failures, limit));
        }
        if failures > 0 && standing.succeeded < self.canary {
            return Some(Pause::Canary(failures, self.canary));
        }
        let many = standing.vanished.saturating_mul(VANISHED_ONE_IN) >= standing.total;
        (many && standing.vanished >= VANISHED_AT_LEAST).then_some(Pause::Vanished(standing.vanished, standing.total))
    }

    /// Which of these nodes, given by their groups, may go now: their places, in order.
    pub fn choose(&self, standing: &Standing, waiting: &[Option<String>]) -> Vec<usize> {
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

    /// How many nodes may be begun, whatever their groups.
    fn room(&self, standing: &Standing) -> u32 {
        let in_flight = u32::try_from(standing.in_flight.len()).unwrap_or(u32::MAX);
        let room = self.max_in_flight.map_or(u32::MAX, |limit| limit.saturating_sub(in_flight));
        if standing.succeeded >= self.canary {
            return room;
        }
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
        // A label whose value is empty is a group, too, and another one.
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
        // One is overdue, an operator let that pass: another takes its place.
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
