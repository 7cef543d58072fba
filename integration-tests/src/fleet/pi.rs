//! A virtual Pi seen from outside: its log, its card, its power supply.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Handle to a virtual Pi's folder.
#[derive(Debug, Clone)]
pub struct Pi {
    dir: PathBuf,
}

/// A line of a virtual Pi's log: one event of its hardware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PiEvent {
    /// Time of the event, as the Pi wrote it.
    pub time: String,
    /// Boot id during the event.
    pub boot_id: String,
    /// `boot`, `reboot`, `power-off` or `power-cut`.
    pub event: String,
    /// The execution that caused the event; empty if none did.
    pub execution: String,
}

impl Pi {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The Pi's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Path of a file or folder inside the Pi, for example `root/etc/marco-release`.
    pub fn path(&self, inside: &str) -> PathBuf {
        self.dir.join(inside)
    }

    /// Reads a text file inside the Pi.
    pub fn read(&self, inside: &str) -> Result<String> {
        let path = self.path(inside);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// The Pi's events, oldest first.
    pub fn log(&self) -> Result<Vec<PiEvent>> {
        let text = self.read("log.jsonl")?;
        // The Pi may be writing the last line at this moment: only lines with their line feed count.
        let whole = text.rfind('\n').and_then(|end| text.get(..end)).unwrap_or_default();
        whole.lines().filter(|line| !line.is_empty()).map(event).collect()
    }

    /// Number of `event` lines of its log for this execution.
    pub fn count(&self, event: &str, execution: &str) -> Result<usize> {
        let log = self.log()?;
        Ok(log.iter().filter(|line| line.event == event && line.execution == execution).count())
    }

    /// Number of reboots for this execution.
    pub fn reboots(&self, execution: &str) -> Result<usize> {
        self.count("reboot", execution)
    }

    /// Number of boots since the Pi was made.
    pub fn boots(&self) -> Result<usize> {
        Ok(self.log()?.iter().filter(|line| line.event == "boot").count())
    }

    /// Presses its power button: the Pi boots if it is off.
    pub fn power_on(&self) -> Result<()> {
        // The virtual Pi watches for these files and removes them.
        fs::write(self.path("power-on"), "").context("power-on")
    }

    /// Cuts its power for a moment.
    pub fn cut_power(&self) -> Result<()> {
        fs::write(self.path("power-cut"), "").context("power-cut")
    }

    /// True if its agent's journal contains this text, in the system's role or in the installer's.
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
