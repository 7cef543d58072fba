//! State of a virtual Pi that outlives its process: `pi.json`, replaced as a whole.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::SystemError;
use super::log::Line;

/// All of the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// Power state.
    pub(super) power: Power,
    /// Boots in a row that failed.
    pub(super) dead: u32,
    /// The log line of the last change. It is committed here first, so that the log gets it exactly once.
    pub(super) line: Option<Line>,
}

/// Power state of a Pi.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Power {
    /// Off until a test or an operator writes `power-on`.
    Off,
    /// Between reset and a running agent.
    Booting {
        /// Trial flag of the last reset.
        tryboot: bool,
        /// Cause of the boot.
        after: After,
    },
    /// The agent runs.
    On(Up),
    /// A shutdown was commanded.
    GoingDown {
        /// The boot that ends.
        up: Up,
        /// Target of the shutdown.
        going: Going,
    },
}

/// A running boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Up {
    /// Id of this boot.
    pub(super) boot_id: String,
    /// Partition that booted.
    pub(super) partition: u32,
    /// True for a trial boot.
    pub(super) tryboot: bool,
    /// True for an installer. `None`: written by an older version, which had only installers on the first partition.
    #[serde(default)]
    pub(super) installer: Option<bool>,
}

/// Target of a shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Going {
    /// Boots again.
    Reboot,
    /// Boots again with the trial flag.
    TryBoot,
    /// Stays off.
    Off,
}

/// Cause of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum After {
    /// A reboot command.
    Command,
    /// The power button, or the first power.
    PowerOn,
    /// A power cut.
    PowerCut,
    /// A watchdog reset after a boot that hung.
    Watchdog,
}

impl After {
    /// Word in the log; empty for a command.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Command => "",
            Self::PowerOn => "power-on",
            Self::PowerCut => "power-cut",
            Self::Watchdog => "watchdog",
        }
    }
}

impl State {
    /// State of a Pi that was just plugged in.
    pub(super) fn first() -> Self {
        Self { power: Power::Booting { tryboot: false, after: After::PowerOn }, dead: 0, line: None }
    }

    /// Reads the state. `None`: this Pi was never laid out.
    pub(super) fn load(dir: &Path) -> Result<Option<Self>, SystemError> {
        let path = dir.join("pi.json");
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| {
                SystemError::Invalid(format!("{} is not the state of a virtual Pi: {error}", path.display()))
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(SystemError::io("read", path)(error)),
        }
    }

    /// Replaces the state atomically, synced to the disk.
    pub(super) fn save(&self, dir: &Path) -> Result<(), SystemError> {
        let (path, temporary) = (dir.join("pi.json"), dir.join("pi.json.new"));
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            // Atomic: a process that is killed leaves the old state or the new one.
            std::fs::rename(&temporary, &path)?;
            File::open(dir)?.sync_all()
        };
        write().map_err(SystemError::io("write", &path))
    }
}
