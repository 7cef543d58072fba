//! What a virtual Pi remembers when its process ends: `pi.json`, replaced as a whole.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::SystemError;
use super::log::Line;

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// Where the power is.
    pub(super) power: Power,
    /// How many boots in a row did not come up.
    pub(super) dead: u32,
    /// The line of the log that goes with the last change: committed here first, so that it is there exactly once.
    pub(super) line: Option<Line>,
}

/// Where the power is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Power {
    /// Off until somebody presses the button.
    Off,
    /// Between reset and a running agent.
    Booting {
        /// The trial flag, as the last reset left it.
        tryboot: bool,
        /// What came before, when it was not a command.
        after: After,
    },
    /// An agent runs.
    On(Up),
    /// The command was given.
    GoingDown {
        /// What goes down.
        up: Up,
        /// To where.
        going: Going,
    },
}

/// What is up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Up {
    /// Its boot id.
    pub(super) boot_id: String,
    /// The partition that booted.
    pub(super) partition: u32,
    /// Whether it was a trial.
    pub(super) tryboot: bool,
    /// Whether it is an installer; none, in a state of an older version: the first partition has nothing else.
    #[serde(default)]
    pub(super) installer: Option<bool>,
}

/// Where a machine that goes down goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Going {
    /// Up again.
    Reboot,
    /// Up again with the trial flag.
    TryBoot,
    /// Off.
    Off,
}

/// What came before a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum After {
    /// A command.
    Command,
    /// The button, or the first power.
    PowerOn,
    /// A power cut.
    PowerCut,
    /// A boot that hung, and a watchdog that reset it.
    Watchdog,
}

impl After {
    /// As in the log.
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
    /// Of a Pi that was just plugged in.
    pub(super) fn first() -> Self {
        Self { power: Power::Booting { tryboot: false, after: After::PowerOn }, dead: 0, line: None }
    }

    /// Reads it; none when this Pi was never laid out.
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

    /// Replaces it, to the disk.
    pub(super) fn save(&self, dir: &Path) -> Result<(), SystemError> {
        let (path, temporary) = (dir.join("pi.json"), dir.join("pi.json.new"));
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            std::fs::rename(&temporary, &path)?;
            File::open(dir)?.sync_all()
        };
        write().map_err(SystemError::io("write", &path))
    }
}
