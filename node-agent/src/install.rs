//! The installer: an image streamed, checked, unpacked into the root and the boot partition, with no temporary file.

use std::path::Path;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use tokio_util::sync::CancellationToken;

use crate::bootpart::InstallJob;
use crate::download::Downloader;
use crate::system::System;

/// What the installer is doing, with bytes done and in all (0 when unknown).
pub type Progress = Arc<dyn Fn(Phase, u64, u64) + Send + Sync>;
/// Writes the running execution, in state trial, into the agent's state folder of the new root. Blocking.
pub type WriteJournal = Arc<dyn Fn(&Path) -> std::io::Result<()> + Send + Sync>;

/// A step of an installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Waiting for the first checked chunk.
    Connecting,
    /// Making the card ready.
    Partitioning,
    /// Downloading, checking and unpacking, as one stream; bytes are those of the download.
    Unpacking,
    /// Putting boot files where the firmware finds them, and checking them.
    BootFiles,
    /// Making the system this node's own.
    Personalising,
    /// Writing everything to the card.
    Syncing,
}

impl Phase {
    /// For a report.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Partitioning => "partitioning",
            Self::Unpacking => "unpacking image",
            Self::BootFiles => "writing boot files",
            Self::Personalising => "personalising",
            Self::Syncing => "syncing",
        }
    }
}

/// An installation failed; the installer stays what boots if the card was touched.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct InstallError {
    /// A stable word for programs, for example `NOT_A_SYSTEM`.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
    /// Whether a further try with the same artifact can end otherwise (a cut connection, not a bad image).
    pub retryable: bool,
}

/// Does what the job says to the card: first chunk verified → the job's set and the installer made the default
/// (step 4 of an update) → file systems → everything unpacked → personalised → on the card. Then a trial boot is due.
/// `now` is the controller's time, for `/etc/marco-release`.
pub async fn install(
    _job: &InstallJob,
    _system: &Arc<dyn System>,
    _downloader: &Downloader,
    _journal: WriteJournal,
    _now: DateTime<Utc>,
    _progress: Progress,
    _cancel: &CancellationToken,
) -> Result<(), InstallError> {
    todo!()
}
