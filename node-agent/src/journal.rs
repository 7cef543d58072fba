//! The node's jobs and how far each is: written before it is done.
//!
//! One JSON file, replaced whole. A method that changes it returns after the change is on the disk, and then wakes the
//! receivers of [`Journal::changes`]. If the disk takes no writes, only conclusions are kept, in memory, and no work is
//! begun. Progress is not written: it is only true of the process that makes it.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::{Mutex, watch};

use crate::cause::chain;
use crate::durable;
use crate::health::{Ailment, Health};
use crate::job::{Action, FORK_LEAP, Failure, Kind, Release, State, WrongState};

mod confirmation;
mod entry;
mod file;
mod installing;
mod loss;
mod unopened;
mod verdict;

pub use confirmation::Confirmation;
pub use entry::{Entries, Entry, new_entry};
pub use installing::REPLACED;
use loss::Loss;
use unopened::Unopened;
pub use verdict::Verdict;

/// Name of the journal's file in the state directory.
pub const FILE_NAME: &str = "journal.json";

/// Entries are kept this long after the controller's last acknowledgement, in microseconds.
const KEEP_MICROS: i64 = 30 * 24 * 60 * 60 * 1_000_000;
const FILE_MODE: u32 = 0o600;
/// Reason of a job that ends, or is not taken, because the journal cannot be written.
pub const NOT_WRITABLE: &str = "JOURNAL_NOT_WRITABLE";

/// Requirement of a change: must it be on the disk to count?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needed {
    /// Yes: the next step must never be done without it.
    OnDisk,
    /// No: nothing is done because of it, so losing it does no harm.
    InMemory,
}

/// Progress of the present step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Name of the execution.
    pub execution: String,
    /// The present step, in the words of `job::phase`.
    pub phase: String,
    /// Bytes done; 0 in a phase that counts none.
    pub done: u64,
    /// Bytes in all; 0 when unknown.
    pub total: u64,
}

/// Outcome of an assignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// It is a new job.
    New,
    /// The job was in the journal; its state is reported under the new attempt.
    Known,
    /// The action is not known: journalled as failed.
    Refused,
}

/// A request that the journal did not carry out.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file could not be read or replaced.
    #[error("the journal {path} could not be {what}", path = path.display())]
    Io {
        /// The journal's file.
        path: PathBuf,
        /// The action that failed, for the message: read, written, set aside, encoded.
        what: &'static str,
        /// The system's error.
        source: io::Error,
    },
    /// The execution is not in the journal.
    #[error("{0} is not in the journal")]
    NotFound(String),
    /// Another job is unfinished. A controller sends none then, unless its store has lost that job.
    #[error("the node is at work on {0}")]
    Busy(String),
    /// A later delivery of the same execution came before this one.
    #[error("attempt {got} is older than {have}")]
    Stale {
        /// Attempt in the journal.
        have: u32,
        /// Attempt that came.
        got: u32,
    },
    /// A cancel came before the point of no return.
    #[error("the job was cancelled")]
    CancelRequested,
    /// The step does not follow from the job's state.
    #[error(transparent)]
    WrongState(#[from] WrongState),
}

/// The journal of one node under one boot.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    /// `Some`: the file could not be opened, and nothing is written over it.
    unopened: Option<Unopened>,
    boot_id: String,
    /// Held while a change is being written, so that changes follow one another.
    writer: Mutex<()>,
    entries: watch::Sender<Arc<Entries>>,
    progress: watch::Sender<Progress>,
    /// The command to power off was given under this boot.
    powering_off: AtomicBool,
    /// Ailments of the node.
    health: Arc<Health>,
    /// By execution. Kept in memory only: the answers to an earlier process may be out of date.
    confirmations: watch::Sender<HashMap<String, Confirmation>>,
    /// By execution.
    verdicts: watch::Sender<HashMap<String, Verdict>>,
    /// The loss of the journal or its newest copy, until it is over.
    loss: std::sync::Mutex<Option<Loss>>,
}

impl Journal {
    /// Reads the journal of `directory`, or begins one. A file that cannot be understood is set aside as
    /// `journal.json.bad-N`, and the journal says that it was lost.
    pub fn open(directory: &Path, boot_id: &str) -> Result<Self, JournalError> {
        let path = directory.join(FILE_NAME);
        let contents = file::load(&path)?;
        Ok(Self::with(path, boot_id, contents, None))
    }

    fn with(path: PathBuf, boot_id: &str, contents: file::Contents, unopened: Option<Unopened>) -> Self {
        let file::Contents { entries, loss } = contents;
        let journal = Self {
            path,
            unopened,
            boot_id: boot_id.to_owned(),
            writer: Mutex::new(()),
            entries: watch::Sender::new(Arc::new(Entries(entries))),
            progress: watch::Sender::new(Progress::default()),
            powering_off: AtomicBool::new(false),
            health: Arc::default(),
            confirmations: watch::Sender::default(),
            verdicts: watch::Sender::default(),
            loss: std::sync::Mutex::default(),
        };
        journal.remember_loss(loss);
        journal
    }

    /// The journal's file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The jobs as they are on the disk.
    pub fn entries(&self) -> Arc<Entries> {
        self.entries.borrow().clone()
    }

    /// Wakes at every change.
    pub fn changes(&self) -> watch::Receiver<Arc<Entries>> {
        self.entries.subscribe()
    }

    /// Ailments of the node: a journal that cannot be written, and those that others note.
    pub fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// Wakes when the progress changes.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Notes whether the machine was told to power off. Kept in memory only: another process does not know whether the
    /// command had any effect.
    pub fn set_powering_off(&self, told: bool) {
        self.powering_off.store(told, Ordering::Release);
    }

    /// Returns the power-off for which the command was given under this boot; `None`: there is none.
    pub fn powering_off(&self) -> Option<String> {
        let entries = self.entries();
        let entry = entries.unfinished().filter(|_| self.powering_off.load(Ordering::Acquire))?;
        (entry.state == State::Armed && entry.kind() == Kind::PowerOff).then(|| entry.execution.clone())
    }

    /// Sets the progress, in memory only.
    pub fn set_progress(&self, progress: Progress) {
        self.progress.send_if_modified(|now| {
            let changed = *now != progress;
            *now = progress;
            changed
        });
    }

    /// Takes an assignment. One that the journal knows is answered from it, and never begun again.
    pub async fn accept(&self, execution: &str, attempt: u32, action: Action) -> Result<Accepted, JournalError> {
        let accepted = self.accept_entry(execution, attempt, action).await?;
        self.note_confirmation(execution, Confirmation::Stands);
        Ok(accepted)
    }

    async fn accept_entry(&self, execution: &str, attempt: u32, action: Action) -> Result<Accepted, JournalError> {
        // A new job is begun only when it is on the disk. Of one that is known only the number changes.
        let known = self.entries().get(execution).is_some();
        let needed = if known { Needed::InMemory } else { Needed::OnDisk };
        self.change(needed, |entries, boot_id| {
            if let Ok(entry) = entries.get_mut(execution) {
                if attempt < entry.attempt {
                    return Err(JournalError::Stale { have: entry.attempt, got: attempt });
                }
                entry.attempt = attempt;
                // The controller stored the earlier reports under another attempt, so it must hear of it again.
                entry.acked = 0;
                return Ok(Accepted::Known);
            }
            let busy = entries.unfinished().map(|other| other.execution.clone());
            let mut entry = new_entry(execution, attempt, action, State::Accepted, boot_id);
            let accepted = match (entry.kind(), busy) {
                (Kind::Unknown, _) => {
                    entry.state = State::Failed;
                    entry.error = Some(Failure::new(crate::job::UNKNOWN_ACTION, "this agent does not know the action"));
                    Accepted::Refused
                }
                (_, Some(_)) if entries.make_way(&entry, boot_id) => Accepted::New,
                // Not journalled as failed: the controller may give it again.
                (_, Some(other)) => return Err(JournalError::Busy(other)),
                (_, None) => Accepted::New,
            };
            entries.0.push(entry);
            Ok(accepted)
        })
        .await
    }

    /// Notes that a cancel was asked for, or that it came too late. An unknown execution is journalled as cancelled, so
    /// that an assignment that arrives later is answered so, and not begun.
    pub async fn request_cancel(&self, execution: &str) -> Result<(), JournalError> {
        let first = self.note_confirmation(execution, Confirmation::CalledOff);
        self.change(Needed::InMemory, |entries, boot_id| {
            match entries.get_mut(execution) {
                Ok(entry) if entry.state == State::Accepted => entry.cancel_requested = true,
                // The try under way goes on to its end, and no other follows.
                Ok(entry) if entry.state == State::Installing => entry.cancel_requested = true,
                // An earlier process passed the point of no return. This one has not gone on yet, and will not.
                Ok(entry) if entry.state == State::Armed && first => {}
                Ok(entry) => entry.cancel_refused = entry.state != State::Cancelled,
                Err(_) => entries.0.push(new_entry(execution, 0, Action::Unknown, State::Cancelled, boot_id)),
            }
            Ok(())
        })
        .await
    }

    /// Notes that the controller has stored the report with this attempt and sequence, at `now` (its time, microseconds
    /// since 1970), and drops what was settled long before. An acknowledgement of another report changes nothing.
    pub async fn ack(&self, execution: &str, attempt: u32, sequence: u64, now: i64) -> Result<(), JournalError> {
        let taken = self
            .change(Needed::InMemory, |entries, _| {
                let entry = entries.get_mut(execution)?;
                if (entry.attempt, entry.sequence) != (attempt, sequence) {
                    return Ok(false);
                }
                entry.acked = sequence;
                entry.acked_at = Some(now);
                // A store that lost its last reports may ask for them, but not a month later.
                entries.0.retain(|entry| {
                    let settled = entry.state.is_final() && entry.is_acked();
                    !(settled && entry.acked_at.is_some_and(|at| now.saturating_sub(at) > KEEP_MICROS))
                });
                Ok(true)
            })
            .await?;
        if taken {
            self.note_confirmation(execution, Confirmation::Stands);
        }
        Ok(())
    }

    /// Passes the point of no return, unless a cancel was quicker.
    pub async fn arm(&self, execution: &str) -> Result<(), JournalError> {
        self.step(execution, |entry, boot_id| {
            if entry.cancel_requested {
                return Err(JournalError::CancelRequested);
            }
            entry.step(entry.state.arm(entry.kind())?, 1, boot_id);
            Ok(())
        })
        .await
    }

    /// The installer begins. Fails if the job was given to the installer itself, and a cancel was quicker.
    pub async fn install(&self, execution: &str) -> Result<(), JournalError> {
        self.step(execution, |entry, boot_id| {
            if entry.state == State::Accepted && entry.cancel_requested {
                return Err(JournalError::CancelRequested);
            }
            let to = entry.state.install(entry.kind())?;
            if entry.state == State::Installing && entry.boot_id != boot_id {
                entry.tries.begin_again();
            }
            // A restarted installer is in the same state, so there is nothing new to report.
            let leap = u64::from(entry.state != State::Installing);
            entry.step(to, leap, boot_id);
            Ok(())
        })
        .await
    }

    /// The card is written, and the new system will be tried.
    pub async fn try_boot(&self, execution: &str) -> Result<(), JournalError> {
        self.step(execution, try_boot).await
    }

    /// The new system did not come up: it is installed again.
    pub async fn trial_failed(&self, execution: &str) -> Result<(), JournalError> {
        self.step(execution, |entry, boot_id| {
            let to = entry.state.install(entry.kind())?;
            entry.trials = entry.trials.saturating_add(1);
            entry.tries.for_next_trial();
            entry.step(to, FORK_LEAP, boot_id);
            Ok(())
        })
        .await
    }

    /// The new system is up, and describes itself in `release`.
    pub async fn verify(&self, execution: &str, release: Release) -> Result<(), JournalError> {
        self.conclude(execution, |entry, boot_id| {
            entry.release = Some(release);
            entry.step(entry.state.verify(entry.kind())?, 1, boot_id);
            Ok(())
        })
        .await
    }

    /// The job has succeeded. Clears the failure of an earlier try.
    pub async fn succeed(&self, execution: &str) -> Result<(), JournalError> {
        self.conclude(execution, |entry, boot_id| {
            entry.error = None;
            entry.step(entry.state.succeed(entry.kind())?, 1, boot_id);
            Ok(())
        })
        .await
    }

    /// The job has failed for good.
    pub async fn fail(&self, execution: &str, failure: Failure) -> Result<(), JournalError> {
        self.conclude(execution, |entry, boot_id| {
            entry.error = Some(failure);
            // The new system may have reported later states of this trial.
            let leap = if entry.state == State::Trial { FORK_LEAP } else { 1 };
            entry.step(entry.state.fail(entry.kind())?, leap, boot_id);
            Ok(())
        })
        .await
    }

    /// The old system is back: `failure` says why.
    pub async fn roll_back(&self, execution: &str, failure: Failure) -> Result<(), JournalError> {
        self.conclude(execution, |entry, boot_id| {
            entry.error = Some(failure);
            entry.step(entry.state.roll_back(entry.kind())?, FORK_LEAP, boot_id);
            Ok(())
        })
        .await
    }

    /// The job was cancelled before the point of no return.
    pub async fn cancelled(&self, execution: &str) -> Result<(), JournalError> {
        self.conclude(execution, |entry, boot_id| {
            entry.error = Some(Failure::new("CANCELLED", "cancelled before the point of no return"));
            entry.step(entry.state.cancel(entry.kind())?, 1, boot_id);
            Ok(())
        })
        .await
    }

    /// Notes a failure without an end, for the system that goes on with the job after the next boot.
    pub async fn note(&self, execution: &str, failure: Failure) -> Result<(), JournalError> {
        self.conclude(execution, |entry, _| {
            entry.error = Some(failure);
            Ok(())
        })
        .await
    }

    /// Returns the file's contents for the installer on the card: this job is armed in them.
    pub fn for_the_installer(&self, execution: &str) -> Result<Vec<u8>, JournalError> {
        self.preview(execution, |entry, boot_id| {
            entry.step(entry.state.arm(entry.kind())?, 1, boot_id);
            Ok(())
        })
    }

    /// Returns the file's contents for the new system's root: this job is on trial in them.
    pub fn for_the_new_root(&self, execution: &str) -> Result<Vec<u8>, JournalError> {
        self.preview(execution, try_boot)
    }

    fn preview(
        &self,
        execution: &str,
        step: impl FnOnce(&mut Entry, &str) -> Result<(), JournalError>,
    ) -> Result<Vec<u8>, JournalError> {
        let mut entries = Entries::clone(&self.entries());
        step(entries.get_mut(execution)?, &self.boot_id)?;
        file::encode(&self.path, &entries, self.loss().as_ref())
    }

    /// Journals a step that the agent takes only when it is on the disk.
    async fn step(
        &self,
        execution: &str,
        step: impl FnOnce(&mut Entry, &str) -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        self.change(Needed::OnDisk, |entries, boot_id| step(entries.get_mut(execution)?, boot_id)).await
    }

    /// Journals something that has happened. A restart that loses it concludes the same again, or asks the controller.
    async fn conclude(
        &self,
        execution: &str,
        step: impl FnOnce(&mut Entry, &str) -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        self.change(Needed::InMemory, |entries, boot_id| step(entries.get_mut(execution)?, boot_id)).await
    }

    async fn change<T>(
        &self,
        needed: Needed,
        change: impl FnOnce(&mut Entries, &str) -> Result<T, JournalError>,
    ) -> Result<T, JournalError> {
        let _writer = self.writer.lock().await;
        let before = self.entries();
        let mut entries = Entries::clone(&before);
        let answer = change(&mut entries, &self.boot_id)?;
        if entries == *before {
            return Ok(answer);
        }
        match (self.write(&entries).await, needed) {
            // Readers never see a step that a restart would not find.
            (Err(error), Needed::OnDisk) => return Err(error),
            (Err(error), Needed::InMemory) => tracing::warn!(error = %chain(&error), "journal kept in memory only"),
            (Ok(()), _) => {}
        }
        self.entries.send_replace(Arc::new(entries));
        Ok(answer)
    }

    /// Replaces the file; the caller holds the writer.
    async fn write(&self, entries: &Entries) -> Result<(), JournalError> {
        if let Some(unopened) = &self.unopened {
            return Err(unopened.error(&self.path));
        }
        let contents = file::encode(&self.path, entries, self.loss().as_ref())?;
        let path = self.path.clone();
        let written = tokio::task::spawn_blocking(move || durable::replace(&path, &contents, FILE_MODE)).await;
        let written = written
            .unwrap_or_else(|_| Err(io::Error::other("the writer did not end")))
            .map_err(|source| JournalError::Io { path: self.path.clone(), what: "written", source });
        self.health.set(Ailment::Journal, written.as_ref().err().map(|error| chain(error)));
        written
    }
}

fn try_boot(entry: &mut Entry, boot_id: &str) -> Result<(), JournalError> {
    // A cancel that came during the installation is too late now, and the controller must hear that.
    entry.cancel_refused |= entry.cancel_requested;
    entry.step(entry.state.try_boot(entry.kind())?, 1, boot_id);
    Ok(())
}

/// Reads the failure of an execution in a journal elsewhere on the card; `None`: no failure, or unreadable.
pub fn noted(directory: &Path, execution: &str) -> Option<Failure> {
    let entries = Entries(file::read(&directory.join(FILE_NAME)).ok().flatten()?.entries);
    entries.get(execution)?.error.clone()
}

#[cfg(test)]
mod tests;
