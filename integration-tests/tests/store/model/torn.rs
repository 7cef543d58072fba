//! Torn journals: a node loses the last copies of its journal, or all of them.

use std::collections::VecDeque;

use chrono::{DateTime, Utc};
use marco_proto::names::ExecutionId;
use node_agent::job::{Kind, Mode, State};
use node_agent::journal::{Entry, FILE_NAME};

use super::pi::{Done, Pi, named, wrong};

/// Copies of a journal that may come back.
const COPIES: usize = 8;

/// What a tear can bring back, and what it has done.
#[derive(Default)]
pub(super) struct Torn {
    /// Contents of the journal, oldest first, the present ones last.
    pub(super) copies: VecDeque<Vec<u8>>,
    /// The job that the running system left on the card for its installer.
    job: Option<Entry>,
    /// A job that the journal held as armed when it was torn. True: a power-off.
    pub(super) armed: Option<(ExecutionId, bool)>,
    /// It was torn.
    pub(super) ever: bool,
    /// It was torn before a backup was restored, so neither side may know what was done.
    pub(super) before_a_restore: bool,
}

impl Pi {
    /// Keeps the present copy of the journal, if it is another one.
    pub(super) fn remember(&mut self) {
        // A node that is off writes nothing, and its file may be torn.
        if !self.is_on {
            return;
        }
        let Ok(contents) = std::fs::read(self.folder.path().join(FILE_NAME)) else { return };
        if self.torn.copies.back() != Some(&contents) {
            self.torn.copies.push_back(contents);
        }
        if self.torn.copies.len() > COPIES {
            self.torn.copies.pop_front();
        }
        // As `install.json` on the card: written before the restart, or by the installer that got the job itself, and gone
        // with the end of the update.
        let update = self.unfinished().filter(|entry| entry.action.kind() == Kind::Update);
        self.torn.job = match (update, self.torn.job.take()) {
            (Some(entry), job) if entry.state == State::Installing => match job {
                Some(job) if job.execution == entry.execution => Some(job),
                _ => Some(Entry { state: State::Armed, ..entry }),
            },
            (Some(entry), _) if entry.state == State::Armed => Some(entry),
            (Some(_), job) => job,
            (None, _) => None,
        };
    }

    /// Loses the last `lost` copies of the journal; 0, or more than there are: all. The agent is killed with it, and
    /// starts again.
    pub(super) async fn tear(&mut self, lost: usize, now: DateTime<Utc>) -> Done {
        self.remember();
        if let Some(entry) = self.unfinished().filter(|entry| entry.state == State::Armed && self.mode == Mode::Running)
        {
            self.torn.armed = Some((named(&entry), entry.action.kind() == Kind::PowerOff));
        }
        self.torn.ever = true;
        let left = if lost == 0 { 0 } else { self.torn.copies.len().saturating_sub(lost) };
        let mut older = left.checked_sub(1).and_then(|at| self.torn.copies.get(at)).cloned();
        // An installer of before goes by its job on the card, and does not say that its journal was lost.
        if older.is_none() && self.protocol == 1 && self.mode == Mode::Installer {
            older = self.torn.copies.front().cloned();
        }
        self.torn.copies.truncate(left);
        let (file, successor) = (self.folder.path().join(FILE_NAME), self.folder.path().join("journal.json.new"));
        let write = |path: &std::path::Path, contents: Option<Vec<u8>>| match contents {
            Some(contents) => std::fs::write(path, contents).map_err(|error| error.to_string()),
            None => {
                drop(std::fs::remove_file(path));
                Ok(())
            }
        };
        if self.protocol == 1 {
            write(&file, older)?;
            write(&successor, None)?;
        } else {
            write(&file, Some(b"{ torn".to_vec()))?;
            write(&successor, older)?;
        }
        self.restart(now).await
    }

    /// Takes the job that the running system left, if the installer's journal lacks it.
    pub(super) async fn adopt(&mut self) -> Done {
        let knows_some = self.unfinished().is_some();
        match self.torn.job.clone() {
            // Only while the update goes on: its end removes the job from the card.
            Some(job) if self.protocol > 1 && self.torn.ever && !knows_some => {
                self.journal.adopt(job).await.map_err(wrong)
            }
            _ => Ok(()),
        }
    }
}
