//! The shutdown that is announced on a machine. logind keeps one, whoever asked for it, in
//! `/run/systemd/shutdown/scheduled`: `shutdown` replaces it, and `shutdown -c` takes it back, without asking whose it is.

use std::fmt;
use std::io::{ErrorKind, Result};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, SecondsFormat, Utc};

use super::Down;

/// Characters of its message that are repeated to others.
const MESSAGE: usize = 120;

/// A shutdown that is announced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheduled {
    /// `reboot`, `poweroff`, `halt` or another word of systemd.
    pub mode: String,
    /// Its time; `None`: it does not say.
    pub at: Option<DateTime<Utc>>,
    /// Message to users; empty: none.
    pub message: String,
}

impl Scheduled {
    /// Reads lines of `KEY=VALUE`; keys that are not known are left out.
    fn parse(text: &str) -> Self {
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let micros = value("USEC").and_then(|micros| micros.trim().parse().ok());
        Self {
            mode: value("MODE").unwrap_or_default().trim().to_owned(),
            at: micros.and_then(DateTime::from_timestamp_micros),
            message: value("WALL_MESSAGE").unwrap_or_default().replace("\\\"", "\"").replace("\\\\", "\\"),
        }
    }
}

impl fmt::Display for Scheduled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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

/// The owner of the announcement that stands on a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Nobody's.
    Nothing,
    /// The agent's own.
    Ours,
    /// Somebody else's.
    Theirs(Scheduled),
}

/// Files of a machine's announcement.
#[derive(Debug, Clone)]
pub(crate) struct Schedule {
    /// The announcement that stands.
    pub(crate) file: PathBuf,
    /// A copy of ours: it tells the two apart also after the agent was killed, and is gone with the boot as `file` is.
    pub(crate) ours: PathBuf,
}

impl Schedule {
    /// Tells whose announcement stands.
    pub(crate) fn standing(&self) -> Standing {
        let read = |path| std::fs::read(path).ok().map(|text| Scheduled::parse(&String::from_utf8_lossy(&text)));
        match (read(&self.file), read(&self.ours)) {
            (None, _) => Standing::Nothing,
            (Some(stands), Some(ours)) if stands == ours => Standing::Ours,
            (Some(stands), _) => Standing::Theirs(stands),
        }
    }

    /// Notes that what stands now is ours; tells whether anything stands.
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

    /// Notes that none is ours.
    pub(crate) fn forget(&self) {
        let _ = remove(&self.ours);
    }

    /// As logind does it: schedules ours, unless somebody else's stands. Tells whether it did.
    pub(crate) fn announce(&self, down: Down, delay: Duration, message: &str) -> Result<bool> {
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

    /// As `shutdown -c` does it, for ours only. Tells whether it stood.
    pub(crate) fn withdraw(&self) -> Result<bool> {
        let stood = self.standing() == Standing::Ours;
        if stood {
            remove(&self.file)?;
        }
        remove(&self.ours)?;
        Ok(stood)
    }

    /// As a boot leaves it.
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
        // Theirs is neither replaced nor withdrawn, also when it took the place of ours.
        assert!(announce());
        std::fs::write(&schedule.file, "USEC=1\nMODE=poweroff\n").unwrap();
        assert!(matches!(schedule.standing(), Standing::Theirs(theirs) if theirs.mode == "poweroff"));
        assert!(!announce() && !schedule.withdraw().unwrap());
        assert_eq!(std::fs::read_to_string(&schedule.file).unwrap(), "USEC=1\nMODE=poweroff\n");
    }
}
