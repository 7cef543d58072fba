//! Invariants of a run under faults: the database and the nodes' own logs agree, and nothing happened twice.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::Fleet;

/// Pseudo-random numbers, reproducible by their seed (Knuth's MMIX generator).
#[derive(Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// The next number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // The low bits of a linear congruential generator have short periods.
        let high = usize::try_from(self.0 >> 33).unwrap_or_default();
        high % limit.max(1)
    }
}

/// A number from the environment; `default` if it is unset or unreadable.
pub fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Checks that each due time of each schedule has exactly one operation, or a row with the reason why not. `period`:
/// the interval of the schedule with this id, in seconds, a divisor of 60. `operations`: those that schedules created.
/// Returns the number of due times checked.
pub fn fires_are_complete(
    schedules: &[Value],
    fires: &[Value],
    operations: &[Value],
    period: impl Fn(&str) -> Result<u64>,
) -> Result<usize> {
    let named: BTreeSet<&str> = fires.iter().filter_map(|fire| fire["operation"].as_str()).collect();
    let made: BTreeSet<&str> = operations.iter().filter_map(|operation| operation["id"].as_str()).collect();
    // In both directions: an operation without a fire is as wrong as a fire without its operation.
    ensure!(named == made, "fires name {} operations, and there are {}", named.len(), made.len());
    let fired = fires.iter().filter(|fire| fire["outcome"] == "FIRED").count();
    ensure!(fired == made.len(), "{fired} fires made {} operations", made.len());
    let mut found: BTreeMap<&str, BTreeSet<i64>> = BTreeMap::new();
    for fire in fires {
        let outcome = fire["outcome"].as_str().unwrap_or_default();
        let explained = match outcome {
            "FIRED" => fire["operation"].is_string(),
            "SKIPPED" | "MISSED" => !fire["reason"].as_str().unwrap_or_default().is_empty(),
            _ => false,
        };
        ensure!(explained, "a fire without an operation or a reason: {fire}");
        let time = fire["fire_time"].as_i64().context("a fire without a time")?;
        found.entry(fire["schedule"].as_str().unwrap_or_default()).or_default().insert(time);
    }
    let mut checked = 0;
    for schedule in schedules {
        let id = schedule["id"].as_str().context("a schedule without an id")?;
        let step = i64::try_from(period(id)?)? * 1_000_000;
        let from = schedule["create_time"].as_i64().context("no create_time")?;
        // The controller may not have written the last due times before the pause yet.
        let until = schedule["update_time"].as_i64().context("no update_time")? - 3_000_000;
        // The cron's seconds start again with each minute. All periods divide the minute, so steps from the epoch hit
        // the same times.
        let mut instant = (from / step + 1) * step;
        while instant < until {
            let there = found.get(id).is_some_and(|times| times.contains(&instant));
            ensure!(there, "{id} has neither a fire nor a miss for {instant}");
            checked += 1;
            instant += step;
        }
    }
    Ok(checked)
}

/// Checks that each node's own log and the database agree on each execution, all of which reboot a node. Returns the
/// number of executions that rebooted one.
pub fn logs_agree(fleet: &Fleet, ids: &[String], executions: &[Value]) -> Result<usize> {
    let mut reboots: BTreeMap<String, usize> = BTreeMap::new();
    for id in ids {
        for line in fleet.pi(id).log()? {
            if line.event == "reboot" {
                *reboots.entry(line.execution.clone()).or_default() += 1;
            }
        }
    }
    for (execution, count) in &reboots {
        ensure!(*count == 1, "{execution} was done {count} times");
    }
    for execution in executions {
        let name = format!(
            "operations/{}/executions/{}",
            execution["operation"].as_str().unwrap_or_default(),
            execution["node"].as_str().unwrap_or_default()
        );
        let done = reboots.contains_key(&name);
        let state = execution["state"].as_str().unwrap_or_default();
        let fits = match state {
            "SUCCEEDED" => done,
            "FAILED" | "CANCELLED" | "EXPIRED" | "ROLLED_BACK" => !done,
            _ => false,
        };
        ensure!(
            fits,
            "{name} ended {state}, but the node's log says: {}",
            if done { "rebooted" } else { "not rebooted" }
        );
    }
    Ok(reboots.len())
}
