//! What a run under faults has to come to: the database and the nodes' own logs tell the same story, once.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::Fleet;

/// Numbers that look random and are the same for the same seed (Knuth's MMIX generator).
#[derive(Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let high = usize::try_from(self.0 >> 33).unwrap_or_default();
        high % limit.max(1)
    }
}

/// A number from the environment.
pub fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Checks that each instant of each schedule came to one operation, or to a row that says why not. `period`: how often
/// the schedule of this id fires, in seconds; periods divide the minute. `operations` are those that schedules made.
/// Answers how many instants there were.
pub fn fires_are_complete(
    schedules: &[Value],
    fires: &[Value],
    operations: &[Value],
    period: impl Fn(&str) -> Result<u64>,
) -> Result<usize> {
    let named: BTreeSet<&str> = fires.iter().filter_map(|fire| fire["operation"].as_str()).collect();
    let made: BTreeSet<&str> = operations.iter().filter_map(|operation| operation["id"].as_str()).collect();
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
        // What was due in the last moments before the pause may still have been on its way.
        let until = schedule["update_time"].as_i64().context("no update_time")? - 3_000_000;
        // Every minute begins anew, as the cron says; all periods divide it.
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

/// Checks that each node's own log and the database say the same of each execution, all of which restart a node. Answers
/// how often nodes restarted for one.
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
