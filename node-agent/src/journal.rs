//! What the node was asked to do and how far it is: written before it is done.
//!
//! One JSON file, replaced whole. A method that changes it returns after the change is on the disk, and then tells those
//! who wait on [`Journal::changes`]. When the disk takes nothing, only conclusions are kept, in memory: no work is begun.
//! Progress is not written: it is only true of the process that makes it.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, watch};

use crate::cause::chain;
use crate::durable;
use crate::health::{Ailment, Condition, Health};
use crate::job::{Action, FORK_LEAP, Failure, Kind, Release, State, WrongState};

mod confirmation;
mod entry;
mod file;
mod installing;

pub use confirmation::Confirmation;
pub use entry::{Entries, Entry, new_entry};
pub use installing::REPLACED;

/// Name of the journal's file in the state directory.
pub const FILE_NAME: &str = "journal.json";

/// Entries are kept this long after the controller's last acknowledgement, in microseconds.
const KEEP_MICROS: i64 = 30 * 24 * 60 * 60 * 1_000_000;
const FILE_MODE: u32 = 0o600;
/// Reason of a job that ends, or is not taken, because the journal cannot be written.
pub const NOT_WRITABLE: &str = "JOURNAL_NOT_WRITABLE";
/// Pause between two tries of a journal that cannot be written.
const HEAL: Duration = Duration::from_secs(10);

/// Requirement of a change: does it count when it cannot be written?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needed {
    /// No: what follows must never be done without it.
    OnDisk,
    /// Yes: nothing is done because of it.
    InMemory,
}

/// How far the process is with what it is doing now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Of which execution.
    pub execution: String,
    /// What it is doing.
    pub phase: String,
    /// Bytes that are done.
    pub done: u64,
    /// Bytes in all; 0 when unknown.
    pub total: u64,
}

/// What an assignment came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    /// It is a new job.
    New,
    /// The job was in the journal; its state is reported under the new attempt.
    Known,
    /// The action is not known: journalled as failed.
    Refused,
}

/// Why the journal did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk.
    #[error("the journal {path} could not be {what}", path = path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Not in the journal.
    #[error("{0} is not in the journal")]
    NotFound(String),
    /// Another job is unfinished. A controller sends none then, unless its store has lost that job.
    #[error("the node is at work on {0}")]
    Busy(String),
    /// A delivery that another one has overtaken.
    #[error("attempt {got} is older than {have}")]
    Stale {
        /// The one in the journal.
        have: u32,
        /// The one that came.
        got: u32,
    },
    /// It was called off before the point of no return.
    #[error("the job was cancelled")]
    CancelRequested,
    /// It does not follow.
    #[error(transparent)]
    WrongState(#[from] WrongState),
}

/// The journal of one node under one boot.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    boot_id: String,
    /// Held while a change is being written, so that changes follow one another.
    writer: Mutex<()>,
    entries: watch::Sender<Arc<Entries>>,
    progress: watch::Sender<Progress>,
    /// The command to power off was given under this boot.
    powering_off: AtomicBool,
    /// Illnesses of the node.
    health: Arc<Health>,
    /// By execution. Kept in memory only: what was said to an earlier process may be out of date.
    confirmations: watch::Sender<HashMap<String, Confirmation>>,
}

impl Journal {
    /// Reads the journal of `directory`, or begins one. A file that cannot be understood is set aside as
    /// `journal.json.bad-N`: the controller then says what is to become of the jobs that it held.
    pub fn open(directory: &Path, boot_id: &str) -> Result<Self, JournalError> {
        let path = directory.join(FILE_NAME);
        let entries = file::load(&path)?;
        Ok(Self {
            path,
            boot_id: boot_id.to_owned(),
            writer: Mutex::new(()),
            entries: watch::Sender::new(Arc::new(Entries(entries))),
            progress: watch::Sender::new(Progress::default()),
            powering_off: AtomicBool::new(false),
            health: Arc::default(),
            confirmations: watch::Sender::default(),
        })
    }

    /// The jobs as they are on the disk.
    pub fn entries(&self) -> Arc<Entries> {
        self.entries.borrow().clone()
    }

    /// Tells of every change.
    pub fn changes(&self) -> watch::Receiver<Arc<Entries>> {
        self.entries.subscribe()
    }

    /// Illnesses of the node: a journal that cannot be written, and those that others note.
    pub fn health(&self) -> &Arc<Health> {
        &self.health
    }

    /// Tells of progress.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// Says whether the machine was told to power off; kept in memory only, as another process does not know what became
    /// of the command.
    pub fn set_powering_off(&self, told: bool) {
        self.powering_off.store(told, Ordering::Release);
    }

    /// The execution by which the machine was told to power off and goes down.
    pub fn powering_off(&self) -> Option<String> {
        let entries = self.entries();
        let entry = entries.unfinished().filter(|_| self.powering_off.load(Ordering::Acquire))?;
        (entry.state == State::Armed && entry.kind() == Kind::PowerOff).then(|| entry.execution.clone())
    }

    /// Says how far the process is; kept in memory only.
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
                // Whatever was stored was stored under another attempt.
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
                // Nothing is wrong with it: it is not journalled, and can be given again.
                (_, Some(other)) => return Err(JournalError::Busy(other)),
                (_, None) => Accepted::New,
            };
            entries.0.push(entry);
            Ok(accepted)
        })
        .await
    }

    /// Takes up, in the installer, a job that the running system left on the card; one that is known stays as it is.
    pub async fn adopt(&self, entry: Entry) -> Result<(), JournalError> {
        self.change(Needed::InMemory, |entries, _| {
            if entries.get(&entry.execution).is_none() {
                entries.0.push(entry);
            }
            Ok(())
        })
        .await
    }

    /// Notes that a cancel was asked for, or that it came too late. An execution that is not known is journalled as
    /// cancelled, so that an assignment that arrives later is answered so, and not begun.
    pub async fn request_cancel(&self, execution: &str) -> Result<(), JournalError> {
        let first = self.note_confirmation(execution, Confirmation::CalledOff);
        self.change(Needed::InMemory, |entries, boot_id| {
            match entries.get_mut(execution) {
                Ok(entry) if entry.state == State::Accepted => entry.cancel_requested = true,
                // What is under way comes to its end, and is not tried again.
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

    /// Notes that the controller has stored what was reported up to `sequence`, at `now` (its time, microseconds since
    /// 1970), and drops what was settled long before.
    pub async fn ack(&self, execution: &str, sequence: u64, now: i64) -> Result<(), JournalError> {
        self.change(Needed::InMemory, |entries, _| {
            let entry = entries.get_mut(execution)?;
            entry.acked = entry.acked.max(sequence.min(entry.sequence));
            entry.acked_at = Some(now);
            entries.0.retain(|entry| {
                let settled = entry.state.is_final() && entry.is_acked();
                !(settled && entry.acked_at.is_some_and(|at| now.saturating_sub(at) > KEEP_MICROS))
            });
            Ok(())
        })
        .await?;
        self.note_confirmation(execution, Confirmation::Stands);
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

    /// The installer begins; unless a cancel was quicker, where the job was given to the installer itself.
    pub async fn install(&self, execution: &str) -> Result<(), JournalError> {
        self.step(execution, |entry, boot_id| {
            if entry.state == State::Accepted && entry.cancel_requested {
                return Err(JournalError::CancelRequested);
            }
            let to = entry.state.install(entry.kind())?;
            if entry.state == State::Installing && entry.boot_id != boot_id {
                entry.tries.begin_again();
            }
            // A restarted installer is in the state that it was in.
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

    /// The new system is up, and says what it is.
    pub async fn verify(&self, execution: &str, release: Release) -> Result<(), JournalError> {
        self.conclude(execution, |entry, boot_id| {
            entry.release = Some(release);
            entry.step(entry.state.verify(entry.kind())?, 1, boot_id);
            Ok(())
        })
        .await
    }

    /// Done.
    pub async fn succeed(&self, execution: &str) -> Result<(), JournalError> {
        self.conclude(execution, |entry, boot_id| {
            entry.error = None;
            entry.step(entry.state.succeed(entry.kind())?, 1, boot_id);
            Ok(())
        })
        .await
    }

    /// It cannot be done.
    pub async fn fail(&self, execution: &str, failure: Failure) -> Result<(), JournalError> {
        self.conclude(execution, |entry, boot_id| {
            entry.error = Some(failure);
            // A trial that ends here was perhaps reported further by the new system.
            let leap = if entry.state == State::Trial { FORK_LEAP } else { 1 };
            entry.step(entry.state.fail(entry.kind())?, leap, boot_id);
            Ok(())
        })
        .await
    }

    /// The old system is back.
    pub async fn roll_back(&self, execution: &str, failure: Failure) -> Result<(), JournalError> {
        self.conclude(execution, |entry, boot_id| {
            entry.error = Some(failure);
            entry.step(entry.state.roll_back(entry.kind())?, FORK_LEAP, boot_id);
            Ok(())
        })
        .await
    }

    /// Called off in time.
    pub async fn cancelled(&self, execution: &str) -> Result<(), JournalError> {
        self.conclude(execution, |entry, boot_id| {
            entry.error = Some(Failure::new("CANCELLED", "cancelled before the point of no return"));
            entry.step(entry.state.cancel(entry.kind())?, 1, boot_id);
            Ok(())
        })
        .await
    }

    /// Notes what stands in the way of a job that goes on, for the one who takes it up after the next boot.
    pub async fn note(&self, execution: &str, failure: Failure) -> Result<(), JournalError> {
        self.conclude(execution, |entry, _| {
            entry.error = Some(failure);
            Ok(())
        })
        .await
    }

    /// The file's contents as they will be once this job is armed: what the installer finds on the card.
    pub fn for_the_installer(&self, execution: &str) -> Result<Vec<u8>, JournalError> {
        self.preview(execution, |entry, boot_id| {
            entry.step(entry.state.arm(entry.kind())?, 1, boot_id);
            Ok(())
        })
    }

    /// The file's contents as they will be once the card is written: what the new system finds in its root.
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
        file::encode(&self.path, &entries)
    }

    /// A step that the agent takes only when it is on the disk.
    async fn step(
        &self,
        execution: &str,
        step: impl FnOnce(&mut Entry, &str) -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        self.change(Needed::OnDisk, |entries, boot_id| step(entries.get_mut(execution)?, boot_id)).await
    }

    /// A conclusion of what has happened. One that a restart loses is drawn again, or asked of the controller.
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
            (Err(error), Needed::OnDisk) => return Err(error),
            (Err(error), Needed::InMemory) => tracing::warn!(error = %chain(&error), "journal kept in memory only"),
            (Ok(()), _) => {}
        }
        self.entries.send_replace(Arc::new(entries));
        Ok(answer)
    }

    /// Writes the journal as it is: finds out whether that is possible, and makes up for what was kept in memory.
    pub async fn probe(&self) -> Result<(), JournalError> {
        let _writer = self.writer.lock().await;
        self.write(&self.entries()).await
    }

    /// Writes the journal again and again while that fails. Never ends.
    pub async fn heal(&self) {
        let mut changes = self.health.changes();
        let ill = |conditions: &Vec<Condition>| conditions.iter().any(|ill| ill.ailment == Ailment::Journal);
        while changes.wait_for(ill).await.is_ok() {
            tokio::time::sleep(HEAL).await;
            if self.probe().await.is_ok() {
                tracing::info!("journal can be written again");
            }
        }
    }

    /// Replaces the file; the caller holds the writer.
    async fn write(&self, entries: &Entries) -> Result<(), JournalError> {
        let contents = file::encode(&self.path, entries)?;
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
    entry.cancel_refused |= entry.cancel_requested;
    entry.step(entry.state.try_boot(entry.kind())?, 1, boot_id);
    Ok(())
}

/// What a journal elsewhere on the card noted against an execution, if it can be read.
pub fn noted(directory: &Path, execution: &str) -> Option<Failure> {
    let entries = Entries(file::read(&directory.join(FILE_NAME)).ok().flatten()?);
    entries.get(execution)?.error.clone()
}

#[cfg(test)]
mod tests;
