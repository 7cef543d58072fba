//! A virtual Pi seen from outside: its log, its card, its power supply.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// A virtual Pi's folder.
#[derive(Debug, Clone)]
pub struct Pi {
    dir: PathBuf,
}

/// A line of a virtual Pi's log: something that was done to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PiEvent {
    /// When, as it wrote it.
    pub time: String,
    /// Under which boot id.
    pub boot_id: String,
    /// `boot`, `reboot`, `power-off` or `power-cut`.
    pub event: String,
    /// For which execution, if for one.
    pub execution: String,
}

impl Pi {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file or folder of it, for example `root/etc/marco-release`.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.dir.join(inside)
    }

    /// The text of one of its files.
    pub fn read(&self, inside: &str) -> Result<String> {
        let path = self.path(inside);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// What was done to it, oldest first. A last line that is being written is left out.
    pub fn log(&self) -> Result<Vec<PiEvent>> {
        let text = self.read("log.jsonl")?;
        let whole = text.rfind('\n').and_then(|end| text.get(..end)).unwrap_or_default();
        whole.lines().filter(|line| !line.is_empty()).map(event).collect()
    }

    /// How many lines of its log are `event`, for this execution.
    pub fn count(&self, event: &str, execution: &str) -> Result<usize> {
        let log = self.log()?;
        Ok(log.iter().filter(|line| line.event == event && line.execution == execution).count())
    }

    /// How often it was rebooted for this execution.
    pub fn reboots(&self, execution: &str) -> Result<usize> {
        self.count("reboot", execution)
    }

    /// How often it has booted.
    pub fn boots(&self) -> Result<usize> {
        Ok(self.log()?.iter().filter(|line| line.event == "boot").count())
    }

    /// Presses its power button.
    pub fn power_on(&self) -> Result<()> {
        fs::write(self.path("power-on"), "").context("power-on")
    }

    /// Pulls its plug for a moment.
    pub fn cut_power(&self) -> Result<()> {
        fs::write(self.path("power-cut"), "").context("power-cut")
    }

    /// Whether its agent has written this text into its journal, in whichever role it runs.
    pub fn journal_names(&self, text: &str) -> bool {
        ["root/var/lib/marco-agent", "recovery/marco"].into_iter().any(|state| {
            let files = fs::read_dir(self.path(state)).into_iter().flatten().flatten();
            files.into_iter().any(|file| {
                file.file_name().to_string_lossy().starts_with("journal")
                    && fs::read_to_string(file.path()).is_ok_and(|journal| journal.contains(text))
            })
        })
    }
}

fn event(line: &str) -> Result<PiEvent> {
    let value: serde_json::Value = serde_json::from_str(line).with_context(|| format!("log line {line:?}"))?;
    let text = |key: &str| value.get(key).and_then(|field| field.as_str()).unwrap_or_default().to_owned();
    let event =
        PiEvent { time: text("time"), boot_id: text("boot_id"), event: text("event"), execution: text("execution") };
    anyhow::ensure!(
        !event.time.is_empty() && !event.boot_id.is_empty(),
        "a log line lacks its time or boot id: {line:?}"
    );
    anyhow::ensure!(
        ["boot", "reboot", "power-off", "power-cut"].contains(&event.event.as_str()),
        "a log line has an unknown event: {line:?}"
    );
    Ok(event)
}
