//! The recovery partition (p1) of a card in layout resident: stage an installer set, switch to it, confirm.
//!
//! Everything here blocks: call it off the runtime.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The partition could not be read, written, or did not hold what was written.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file or folder could not be read or written.
    #[error("cannot {doing} {path}")]
    Io {
        /// What was tried, as a verb.
        doing: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The set is not one that can be booted.
    #[error("the boot files are refused: {0}")]
    Refused(String),
    /// What was read back is not what was written.
    #[error("{path} does not hold what was written to it: the card may be failing")]
    NotWritten {
        /// The file.
        path: PathBuf,
    },
}

impl BootError {
    /// A stable word for programs, for an execution's error.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Io { .. } => "BOOT_PARTITION_IO",
            Self::Refused(_) => "BOOTCODE_REFUSED",
            Self::NotWritten { .. } => "BOOT_PARTITION_NOT_WRITTEN",
        }
    }
}

/// A prefix that an installer set lives under on p1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefix {
    /// `b0/`
    B0,
    /// `b1/`
    B1,
}

/// What boots by default; a trial boot takes the other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Default {
    /// The installed system: `boot_partition=4`, on trial 1.
    System,
    /// The installer: `boot_partition=1`, on trial 4.
    Installer,
}

/// What the installer is to do: `marco/install.json` on p1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstallJob {
    /// What to install.
    pub instruction: Instruction,
    /// Name of the execution.
    pub execution: String,
    /// Its attempt when it was armed.
    pub attempt: u32,
    /// The sequence of the last report when it was armed.
    pub sequence: u64,
    /// The boot id under which it was accepted.
    pub boot_id: String,
    /// Addresses of controllers, host:port, in order.
    pub controllers: Vec<String>,
    /// Address of the enrolment listener, host:port; empty: derived from the controllers.
    #[serde(default)]
    pub enroll: String,
    /// The node's id, which is also its host name.
    pub node: String,
    /// Make home anew.
    pub discard_home: bool,
    /// How many trial boots were armed so far.
    pub trials: u32,
    /// Where the installer set of this job is.
    pub prefix: Prefix,
}

/// What an installer does to the card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Instruction {
    /// Erases root and boot partition and installs an image.
    Install {
        /// The image's id.
        image: String,
        /// Its SHA-256.
        sha256: String,
    },
    /// Replaces the boot partition's files and leaves root alone.
    BootOnly {
        /// SHA-256 of the zip.
        sha256: String,
    },
}

/// The recovery partition, mounted.
#[derive(Debug, Clone)]
pub struct BootPart {
    #[expect(dead_code)]
    recovery: PathBuf,
}

impl BootPart {
    /// The partition that is mounted at `recovery` ([`Card::recovery`](crate::system::Card)).
    pub fn new(recovery: impl Into<PathBuf>) -> Self {
        Self { recovery: recovery.into() }
    }

    /// The installer zip that the node keeps for when no controller has one.
    pub fn fallback_zip(&self) -> PathBuf {
        todo!()
    }

    /// The complete set with this digest, if the card holds one. Reads it all.
    pub fn holds(&self, _sha256: &str) -> Result<Option<Prefix>, BootError> {
        todo!()
    }

    /// Unpacks the zip, whose digest is `sha256`, into the set that is not the default, and reads it back past the page
    /// cache; does nothing when the card holds that set already.
    pub fn stage(&self, _zip: &Path, _sha256: &str) -> Result<Prefix, BootError> {
        todo!()
    }

    /// Makes the set the one that a trial boot of the installer takes.
    pub fn name_for_tryboot(&self, _prefix: Prefix) -> Result<(), BootError> {
        todo!()
    }

    /// Makes the set the one that every boot of the installer takes.
    pub fn make_default(&self, _prefix: Prefix) -> Result<(), BootError> {
        todo!()
    }

    /// Says what boots by default.
    pub fn set_boot_partition(&self, _default: Default) -> Result<(), BootError> {
        todo!()
    }

    /// Says what the installer is to do. Written as a whole, read back.
    pub fn write_job(&self, _job: &InstallJob) -> Result<(), BootError> {
        todo!()
    }

    /// What the installer is to do; none when nothing, or nothing readable, is there.
    pub fn read_job(&self) -> Result<Option<InstallJob>, BootError> {
        todo!()
    }

    /// Removes the job.
    pub fn clear_job(&self) -> Result<(), BootError> {
        todo!()
    }

    /// Writes `installer-config.txt` as the 2015 system did: `export OS_IMG=NAME`, or no name without an image.
    pub fn write_installer_config(&self, _image: Option<&str>) -> Result<(), BootError> {
        todo!()
    }

    /// Copies the node's key and certificates from `identity_dir` to `marco/`, for the installer to use.
    pub fn stage_identity(&self, _identity_dir: &Path) -> Result<(), BootError> {
        todo!()
    }

    /// Removes them again.
    pub fn remove_identity(&self) -> Result<(), BootError> {
        todo!()
    }
}
