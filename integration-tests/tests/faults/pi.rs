//! The virtual Pi from outside: its power, what it boots, and its agent's journal.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use marco_archive::config_txt::{Conditions, ConfigTxt};
use node_agent::system::Release;
use serde_json::Value;

use crate::template::OLD_ROOT;

/// A boot in the log of a virtual Pi.
const BOOT: &str = "\"event\":\"boot\"";

/// A job in the journal.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) execution: String,
    pub(crate) state: String,
    pub(crate) acked: bool,
}

impl Job {
    pub(crate) fn is_final(&self) -> bool {
        matches!(self.state.as_str(), "succeeded" | "failed" | "rolled-back" | "cancelled")
    }
}

/// The state of a Pi.
#[derive(Debug)]
pub(crate) struct PiState {
    /// The agent runs.
    pub(crate) is_up: bool,
    /// The installer runs.
    pub(crate) installs: bool,
    pub(crate) boots: usize,
    /// The installer is what boots next.
    pub(crate) installer_boots: bool,
    pub(crate) old_root: bool,
    /// The last boot was of the old system.
    pub(crate) ran_old: bool,
    /// The execution that installed the root; empty: none.
    pub(crate) release: String,
    pub(crate) jobs: Vec<Job>,
}

impl PiState {
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let state: Value = serde_json::from_slice(&fs::read(dir.join("pi.json"))?).context("pi.json")?;
        let up = state.get("power").and_then(|power| power.get("on"));
        let installs = up.and_then(|up| up.get("installer")).and_then(Value::as_bool).unwrap_or_default();
        let folder = if installs { "recovery/marco" } else { "root/var/lib/marco-agent" };
        let log = fs::read_to_string(dir.join("log.jsonl")).unwrap_or_default();
        // Not by the agent's code, whose reads are steps.
        let autoboot = fs::read_to_string(dir.join("recovery/autoboot.txt")).unwrap_or_default();
        let partition = ConfigTxt::parse(&autoboot).get("boot_partition", &Conditions::default()).map(str::to_owned);
        let release = Release::read(&dir.join("root"), Some(&dir.join("boot"))).ok().flatten();
        let last_boot = log.lines().rfind(|line| line.contains(BOOT)).unwrap_or_default();
        Ok(Self {
            ran_old: last_boot.contains("\"partition\":4") && release.as_ref().is_none_or(|it| it.execution.is_empty()),
            is_up: up.is_some(),
            installs,
            boots: log.matches(BOOT).count(),
            installer_boots: partition.is_none_or(|partition| partition.trim() != "4"),
            old_root: dir.join(OLD_ROOT).exists(),
            release: release.unwrap_or_default().execution,
            jobs: jobs(&dir.join(folder).join("journal.json")),
        })
    }

    /// Nothing is under way on the node.
    pub(crate) fn is_settled(&self) -> bool {
        self.is_up && self.jobs.iter().all(|job| job.is_final() && job.acked)
    }

    pub(crate) fn job(&self, execution: &str) -> Option<&Job> {
        self.jobs.iter().find(|job| job.execution == execution)
    }
}

fn jobs(file: &Path) -> Vec<Job> {
    // Missing and torn journals hold no jobs.
    let journal: Value = fs::read(file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    let entries = journal.get("entries").and_then(Value::as_array).cloned().unwrap_or_default();
    let number = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_u64).unwrap_or_default();
    let text = |entry: &Value, key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    entries
        .iter()
        .map(|entry| Job {
            execution: text(entry, "execution"),
            state: text(entry, "state"),
            acked: number(entry, "acked") >= number(entry, "sequence"),
        })
        .collect()
}
