//! What a running system leaves for its installer: `marco/install.json` on p1.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{BootError, BootPart, Prefix, file, read_json, write_json};

/// What the installer is to do.
///
/// An installer may be older or newer than the system that wrote it: fields are only added, and readers leave alone what
/// they do not know. Installers before that rule refuse a field that they do not know, so nothing is written that says only
/// what its absence says, too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstallJob {
    /// Version of the file; absent: 1. A higher one would mean that this job cannot be done by who knows only version 1.
    #[serde(default = "first_version", skip_serializing_if = "is_first_version")]
    pub version: u32,
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
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Instruction {
    /// Erases root and boot partition and installs an image.
    Install {
        /// The image's id.
        image: String,
        /// Its SHA-256.
        sha256: String,
        /// Writes it, a whole disk's, to the whole card as it is.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        raw: bool,
    },
    /// Replaces the boot partition's files and leaves root alone.
    BootOnly {
        /// SHA-256 of the zip.
        sha256: String,
    },
}

/// The version of the file that is written, and the highest that is read.
pub const JOB_VERSION: u32 = 1;

fn first_version() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_first_version(version: &u32) -> bool {
    *version == first_version()
}

impl BootPart {
    /// Says what the installer is to do. Written as a whole, read back.
    pub fn write_job(&self, job: &InstallJob) -> Result<(), BootError> {
        let _lock = self.lock()?;
        write_json(&self.job_file(), job)
    }

    /// Says in this execution's job, if that is there, how many trial boots failed. Only a digit changes, so this is done in
    /// place: a cut leaves the old number or the new one, never no job.
    pub fn count_trial(&self, execution: &str, trials: u32) -> Result<(), BootError> {
        let _lock = self.lock()?;
        let Some(job) = self.read_job()?.filter(|job| job.execution == execution) else { return Ok(()) };
        let path = self.job_file();
        let text = std::fs::read(&path).map_err(BootError::io("read", &path))?;
        // What else stands in the file may be of a newer agent, and stays where it is.
        let (before, after) = (format!("\"trials\": {}", job.trials), format!("\"trials\": {trials}"));
        let text = match String::from_utf8_lossy(&text).split(&before).collect::<Vec<_>>().as_slice() {
            [head, tail] => format!("{head}{after}{tail}").into_bytes(),
            _ => file::json(&path, &InstallJob { trials, ..job })?,
        };
        file::write_in_place(&path, &text)
    }

    /// What the installer is to do; none when nothing, or nothing readable, is there.
    pub fn read_job(&self) -> Result<Option<InstallJob>, BootError> {
        let Some(job) = read_json::<InstallJob>(&self.job_file())? else { return Ok(None) };
        if job.version > JOB_VERSION {
            tracing::error!(
                version = job.version,
                "the installation job is of a newer agent, and cannot be done by this one"
            );
            return Ok(None);
        }
        Ok(Some(job))
    }

    pub(super) fn job_file(&self) -> PathBuf {
        self.recovery.join("marco/install.json")
    }
}
