//! The job that a running system leaves for its installer: `marco/install.json` on p1.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::durable;

use super::{BootError, BootPart, Prefix, file, read_json, write_json};

/// Job of an installer.
///
/// The installer may be older or newer than the system that wrote the job. Fields are only added, and readers ignore
/// unknown ones. The first installers refuse unknown fields, so a field is not written while it has its default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstallJob {
    /// Version of the file; absent: 1. A higher one means that a reader of version 1 cannot do the job.
    #[serde(default = "first_version", skip_serializing_if = "is_first_version")]
    pub version: u32,
    /// The work to do.
    pub instruction: Instruction,
    /// Name of the execution that the installer reports for.
    pub execution: String,
    /// Attempt of the execution when it was armed.
    pub attempt: u32,
    /// Sequence of the last report before the restart. The installer continues from it.
    pub sequence: u64,
    /// Id of the boot in which the execution was accepted.
    pub boot_id: String,
    /// Controller addresses, host:port, in the order in which to try them.
    pub controllers: Vec<String>,
    /// Address of the enrolment listener, host:port. Empty: derived from the controllers.
    #[serde(default)]
    pub enroll: String,
    /// The node's id, which is also its host name.
    pub node: String,
    /// True: home is formatted, and its files are lost.
    pub discard_home: bool,
    /// Trial boots that failed so far.
    pub trials: u32,
    /// Folder of the installer set of this job.
    pub prefix: Prefix,
    /// Signature of the card's disk, in hexadecimal. `None`: no other disk could be taken for it, or an older agent wrote
    /// the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

/// Work of an installer on the card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Instruction {
    /// Erases root and boot partition and installs an image.
    Install {
        /// The image's id.
        image: String,
        /// Its SHA-256.
        sha256: String,
        /// True: a whole-disk image is written to the whole card unchanged.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        raw: bool,
    },
    /// Replaces the boot partition's files and leaves the root alone.
    BootOnly {
        /// SHA-256 of the zip of boot files.
        sha256: String,
    },
}

/// Version of the file that is written, and the highest that is read.
pub const JOB_VERSION: u32 = 1;

fn first_version() -> u32 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_first_version(version: &u32) -> bool {
    *version == first_version()
}

impl BootPart {
    /// Writes the job as a whole and reads it back.
    pub fn write_job(&self, job: &InstallJob) -> Result<(), BootError> {
        let _lock = self.lock()?;
        write_json(&self.job_file(), job)
    }

    /// Stores the number of failed trial boots in this execution's job, if there is one. Only a digit changes, so the
    /// file is written in place: a power cut leaves the old number or the new one, never no job.
    pub fn count_trial(&self, execution: &str, trials: u32) -> Result<(), BootError> {
        let _lock = self.lock()?;
        let Some(job) = self.read_job()?.filter(|job| job.execution == execution) else { return Ok(()) };
        let path = self.job_file();
        let text = durable::read(&path).map_err(BootError::io("read", &path))?;
        // Other parts of the file may be of a newer agent, and stay as they are.
        let (before, after) = (format!("\"trials\": {}", job.trials), format!("\"trials\": {trials}"));
        let text = match String::from_utf8_lossy(&text).split(&before).collect::<Vec<_>>().as_slice() {
            [head, tail] => format!("{head}{after}{tail}").into_bytes(),
            _ => file::json(&path, &InstallJob { trials, ..job })?,
        };
        file::write_in_place(&path, &text)
    }

    /// Reads the job. `None`: missing, unreadable, or of a newer version.
    pub fn read_job(&self) -> Result<Option<InstallJob>, BootError> {
        let Some(job) = read_json::<InstallJob>(&self.job_file())? else { return Ok(None) };
        if job.version > JOB_VERSION {
            // Not an error: an installer that finds no job it can do goes back to the old system.
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
