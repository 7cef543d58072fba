//! `log.jsonl`: one line for each event of a virtual Pi, appended and synced.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};

/// Kind of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// It came up.
    Boot,
    /// It went down to come back.
    Reboot,
    /// It went down to stay off.
    PowerOff,
    /// It lost its power.
    PowerCut,
}

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Time of the event, RFC 3339, by the clock of the simulating machine.
    pub time: String,
    /// Id of the boot that started or ended.
    pub boot_id: String,
    /// Kind of the event.
    pub event: Event,
    /// The execution that asked for it. Empty: none did.
    pub execution: String,
    /// Of a boot: its cause, if that is not a command: `power-on`, `power-cut` or `watchdog`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub after: String,
    /// Of a boot: the partition that booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<u32>,
    /// Of a boot: true for a trial boot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tryboot: bool,
    /// Of a boot: silent mixes of boot files. Empty: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mixed: Vec<String>,
}

impl Line {
    /// A line with the event only.
    pub fn new(boot_id: &str, event: Event, execution: &str) -> Self {
        Self {
            time: DateTime::<Utc>::from(SystemTime::now()).to_rfc3339_opts(SecondsFormat::Micros, true),
            boot_id: boot_id.to_owned(),
            event,
            execution: execution.to_owned(),
            after: String::new(),
            partition: None,
            tryboot: false,
            mixed: Vec::new(),
        }
    }
}

/// The log file.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
}

impl Log {
    /// The log in this Pi's folder.
    pub fn new(dir: &Path) -> Self {
        Self { path: dir.join("log.jsonl") }
    }

    /// Appends the line unless the last line already is this event. The state is committed before its line, so a crash
    /// between the two leaves the line missing, and one after both must not repeat it.
    pub fn ensure(&self, line: &Line) -> std::io::Result<()> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&self.path)?;
        let (last, torn) = last_line(&mut file)?;
        if last.is_some_and(|last| last.boot_id == line.boot_id && last.event == line.event) {
            return Ok(());
        }
        // A torn line is ended first, so that this one can be parsed.
        let mut bytes = if torn { vec![b'\n'] } else { Vec::new() };
        serde_json::to_writer(&mut bytes, line)?;
        bytes.push(b'\n');
        file.write_all(&bytes)?;
        file.sync_data()
    }
}

/// The last line, if it can be parsed, and true if it has no final newline.
fn last_line(file: &mut File) -> std::io::Result<(Option<Line>, bool)> {
    // Longer than any line.
    const TAIL: u64 = 4096;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut tail = Vec::new();
    file.take(TAIL).read_to_end(&mut tail)?;
    let torn = tail.last().is_some_and(|last| *last != b'\n');
    let last = tail.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty());
    Ok((last.and_then(|line| serde_json::from_slice(line).ok()), torn))
}

#[cfg(test)]
mod tests {
    use super::{Event, Line, Log};

    #[test]
    fn a_line_is_written_once_however_often_it_is_ensured() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::new(dir.path());
        for (boot, event) in [("a", Event::Boot), ("a", Event::Reboot), ("a", Event::Reboot), ("b", Event::Boot)] {
            log.ensure(&Line::new(boot, event, "x")).unwrap();
        }
        let text = std::fs::read_to_string(dir.path().join("log.jsonl")).unwrap();
        assert_eq!(text.lines().count(), 3);
        assert_eq!(text.matches("\"event\":\"reboot\"").count(), 1);
    }

    #[test]
    fn a_torn_line_does_not_swallow_the_next() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("log.jsonl"), "{\"time\":\"2026").unwrap();
        Log::new(dir.path()).ensure(&Line::new("a", Event::Boot, "")).unwrap();
        let text = std::fs::read_to_string(dir.path().join("log.jsonl")).unwrap();
        assert!(serde_json::from_str::<Line>(text.lines().nth(1).unwrap()).is_ok());
    }
}
