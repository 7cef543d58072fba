//! A journal whose file cannot be opened or written: a failing disk, or a torn file on a file system that is read-only.
//! The agent connects in any case, since only so an operator hears of it.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::loss::Loss;
use super::{FILE_NAME, Journal, JournalError, file};
use crate::cause::chain;
use crate::health::{Ailment, Condition};

/// Pause between two tries of a journal that cannot be opened or written.
const HEAL: Duration = Duration::from_secs(10);

/// The reason that the file could not be opened.
#[derive(Debug)]
pub(super) struct Unopened {
    what: &'static str,
    cause: String,
}

impl Unopened {
    /// The error of every write. The file may be whole, and must not be replaced by a journal that knows nothing.
    pub(super) fn error(&self, path: &Path) -> JournalError {
        JournalError::Io { path: path.to_owned(), what: self.what, source: io::Error::other(self.cause.clone()) }
    }
}

impl Journal {
    /// Writes the journal as it is. This shows whether that is possible, and makes up for changes kept in memory.
    pub async fn probe(&self) -> Result<(), JournalError> {
        let _writer = self.writer.lock().await;
        self.write(&self.entries()).await
    }

    /// Tries every ten seconds to write a journal that cannot be written. Ends only if a file that could not be opened now
    /// can be: the agent has to start again with it.
    pub async fn heal(&self) {
        let mut changes = self.health.changes();
        let ill = |conditions: &Vec<Condition>| conditions.iter().any(|ill| ill.ailment == Ailment::Journal);
        while changes.wait_for(ill).await.is_ok() {
            tokio::time::sleep(HEAL).await;
            if self.unopened.is_some() {
                if self.can_be_opened().await {
                    return;
                }
            } else if self.probe().await.is_ok() {
                tracing::info!("journal can be written again");
            }
        }
    }

    /// Same as [`Journal::open`], and never fails: a journal that cannot be opened is empty, takes no work, and says that
    /// it is ill and that the jobs in it are lost to this process.
    #[must_use]
    pub fn open_or_empty(directory: &Path, boot_id: &str) -> Self {
        let error = match Self::open(directory, boot_id) {
            Ok(journal) => return journal,
            Err(error) => error,
        };
        let message = chain(&error);
        tracing::error!(error = %message, "journal cannot be opened: the node takes no work");
        let unopened = match error {
            JournalError::Io { what, source, .. } => Unopened { what, cause: source.to_string() },
            other => Unopened { what: "opened", cause: chain(&other) },
        };
        let loss = Loss::new(format!("{message}; the agent does not know the jobs that are in it"));
        let contents = file::Contents { entries: Vec::new(), loss: Some(loss) };
        let journal = Self::with(directory.join(FILE_NAME), boot_id, contents, Some(unopened));
        journal.health.set(Ailment::Journal, Some(message));
        journal
    }

    /// Returns true if the file can be opened by now.
    pub(super) async fn can_be_opened(&self) -> bool {
        let path = self.path.clone();
        let loaded = tokio::task::spawn_blocking(move || file::load(&path)).await;
        matches!(loaded, Ok(Ok(_)))
    }
}
