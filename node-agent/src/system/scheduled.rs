//! The shutdown that is announced on a machine. logind keeps only one, in `/run/systemd/shutdown/scheduled`: `shutdown`
//! replaces it and `shutdown -c` cancels it, no matter who announced it.

use std::fmt;
use std::io::{ErrorKind, Result};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, SecondsFormat, Utc};

use super::Down;

/// Characters of a message that are repeated to others.
const MESSAGE: usize = 120;

/// Message to logged-in users after a cancelled shutdown.
pub(crate) const WITHDRAWN: &str = "The announced shutdown was cancelled.";

/// Message to logged-in users before the machine goes down.
pub(crate) fn announcement(down: Down, delay: Duration, message: &str) -> String {
    let what = match down {
        Down::Reboot => "reboots",
        Down::PowerOff => "powers off",
    };
    let when = if delay.is_zero() { "now".to_owned() } else { format!("in {}", humantime::format_duration(delay)) };
    let message = message.trim();
    if message.is_empty() {
        format!("This machine {what} {when}.")
    } else {
        format!("This machine {what} {when}: {message}")
    }
}

/// An announced shutdown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheduled {
    /// systemd's word: `reboot`, `poweroff`, `halt` or another.
    pub mode: String,
    /// Its time. `None`: not in the file.
    pub at: Option<DateTime<Utc>>,
    /// Message to users. Empty: none.
    pub message: String,
}

impl Scheduled {
    /// Reads lines of `KEY=VALUE` and skips unknown keys.
    fn parse(text: &str) -> Self {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let micros = value("USEC").and_then(|micros| micros.trim().parse().ok());
        Self {
            mode: value("MODE").unwrap_or_default().trim().to_owned(),
            at: micros.and_then(DateTime::from_timestamp_micros),
            // logind escapes quotes and backslashes in its file.
            message: value("WALL_MESSAGE").unwrap_or_default().replace("\\\"", "\"").replace("\\\\", "\\"),
        }
    }
}

impl fmt::Display for Scheduled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The message is another user's: control characters could forge a line of a log or change a terminal.
        let plain = |text: &str| text.chars().filter(|c| !c.is_control()).take(MESSAGE).collect::<String>();
        match self.mode.as_str() {
            "reboot" => f.write_str("a reboot")?,
            "poweroff" => f.write_str("a power-off")?,
            "" => f.write_str("a shutdown")?,
            other => write!(f, "a shutdown ({})", plain(other))?,
        }
        if let Some(at) = self.at {
            write!(f, " at {}", at.to_rfc3339_opts(SecondsFormat::Secs, true))?;
        }
        match plain(&self.message).as_str() {
            "" => Ok(()),
            message => write!(f, " ({message:?})"),
        }
    }
}

/// Owner of the announced shutdown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// No shutdown is announced.
    Nothing,
    /// The agent's own announcement.
    Ours,
    /// Another program's or a user's.
    Theirs(Scheduled),
}

/// Files that hold a machine's announcement.
#[derive(Debug, Clone)]
pub(crate) struct Schedule {
    /// logind's file.
    pub(crate) file: PathBuf,
    /// Copy of the agent's announcement. It identifies that even after the agent was killed, and disappears with the
    /// boot, as `file` does.
    pub(crate) ours: PathBuf,
}

impl Schedule {
    /// The announcement that stands, and its owner.
    pub(crate) fn standing(&self) -> Standing {
        let read = |path| std::fs::read(path).ok().map(|text| Scheduled::parse(&String::from_utf8_lossy(&text)));
        match (read(&self.file), read(&self.ours)) {
            (None, _) => Standing::Nothing,
            // Compared by contents: every `shutdown` replaces the one file.
            (Some(stands), Some(ours)) if stands == ours => Standing::Ours,
            (Some(stands), _) => Standing::Theirs(stands),
        }
    }

    /// Records the present announcement as the agent's. False: there is none that can be copied.
    pub(crate) fn remember(&self) -> bool {
        let copied = || {
            let text = std::fs::read(&self.file)?;
            if let Some(folder) = self.ours.parent() {
                std::fs::create_dir_all(folder)?;
            }
            std::fs::write(&self.ours, text)
        };
        copied().is_ok()
    }

    /// Forgets the agent's announcement.
    pub(crate) fn forget(&self) {
        let _ = remove(&self.ours);
    }

    /// Announces a shutdown as logind does, unless another's stands. True if it was announced.
    pub(crate) fn announce(&self, down: Down, delay: Duration, message: &str) -> Result<bool> {
        // logind schedules no shutdown without a delay.
        if delay.is_zero() || matches!(self.standing(), Standing::Theirs(_)) {
            return Ok(false);
        }
        let mode = match down {
            Down::Reboot => "reboot",
            Down::PowerOff => "poweroff",
        };
        let now = DateTime::<Utc>::from(SystemTime::now());
        let micros = now.timestamp_micros().saturating_add(delay.as_micros().try_into().unwrap_or(i64::MAX));
        let message = message.escape_default();
        std::fs::write(&self.file, format!("USEC={micros}\nWARN_WALL=1\nMODE={mode}\nWALL_MESSAGE={message}\n"))?;
        Ok(self.remember())
    }

    /// Cancels the agent's own announcement, as `shutdown -c` does. True if it stood.
    pub(crate) fn withdraw(&self) -> Result<bool> {
        let stood = self.standing() == Standing::Ours;
        if stood {
            remove(&self.file)?;
        }
        // The copy goes in any case: another shutdown may have replaced the agent's.
        remove(&self.ours)?;
        Ok(stood)
    }

    /// Removes both files, as a boot does.
    pub(crate) fn clear(&self) -> Result<()> {
        remove(&self.file)?;
        remove(&self.ours)
    }
}

fn remove(path: &PathBuf) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Schedule, Scheduled, Standing};
    use crate::system::Down;

    #[test]
    fn shutdown_is_told_as_people_say_it() {
        let text = "USEC=1764453600000000\nWARN_WALL=1\nMODE=reboot\nUID=0\nWALL_MESSAGE=new \\\"kernel\\\"\x07\n";
        let said = Scheduled::parse(text).to_string();
        assert_eq!(said, "a reboot at 2025-11-29T22:00:00Z (\"new \\\"kernel\\\"\")");
        assert_eq!(Scheduled::parse("").to_string(), "a shutdown");
        assert_eq!(Scheduled::parse("MODE=poweroff").to_string(), "a power-off");
        assert_eq!(Scheduled::parse("USEC=no\nMODE=kexec").to_string(), "a shutdown (kexec)");
    }

    #[test]
    fn ours_is_told_from_theirs() {
        let dir = tempfile::tempdir().unwrap();
        let schedule = Schedule { file: dir.path().join("scheduled"), ours: dir.path().join("run/ours") };
        assert_eq!(schedule.standing(), Standing::Nothing);
        let announce = || schedule.announce(Down::Reboot, Duration::from_secs(60), "x").unwrap();
        assert!(announce());
        assert_eq!(schedule.standing(), Standing::Ours);
        assert!(schedule.withdraw().unwrap());
        assert_eq!(schedule.standing(), Standing::Nothing);
        // Another's announcement is neither replaced nor withdrawn, even if it replaced the agent's.
        assert!(announce());
        std::fs::write(&schedule.file, "USEC=1\nMODE=poweroff\n").unwrap();
        assert!(matches!(schedule.standing(), Standing::Theirs(theirs) if theirs.mode == "poweroff"));
        assert!(!announce() && !schedule.withdraw().unwrap());
        assert_eq!(std::fs::read_to_string(&schedule.file).unwrap(), "USEC=1\nMODE=poweroff\n");
    }
}
