//! Does the jobs of the journal, one at a time: each step is journalled before it is done.
//!
//! What to do next follows from the journal alone ([`job::resume`]), so an agent that was killed goes on by the same
//! code as one that was not.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backoff;
use crate::bootpart::{BootError, BootPart};
use crate::cause::chain;
use crate::download::{DownloadError, Downloader};
use crate::job::{self, Action, Failure, Found, Labels, MAX_TRIALS, Mode, Release, Resume};
use crate::journal::{Entry, Journal, JournalError, Progress};
use crate::system::{self, Board, Down, System, SystemError};
use way_down::WayDown;

mod asking;
mod console;
mod giving_back;
mod installing;
mod notice;
mod switch;
mod update;
mod way_down;

/// The journal cannot be written, so nothing is begun.
pub use crate::journal::NOT_WRITABLE as JOURNAL_NOT_WRITABLE;

/// The installer takes only updates with an image.
pub const ONLY_IMAGES: &str = "INSTALLER_TAKES_ONLY_IMAGES";
/// Pause before a job that cannot go on is tried again; it grows from try to try.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// How often a job is gone on with that the journal does not let go on.
const MAX_FAILURES: u32 = 5;
pub use crate::job::CALLED_OFF;
/// Somebody has a shell on the node's console.
pub const CONSOLE_IN_USE: &str = "CONSOLE_IN_USE";
/// No controller answered for an update whose installer was started.
pub const NO_CONTROLLER: &str = "NO_CONTROLLER";
/// A user of the node took the announced shutdown back.
pub const CALLED_OFF_ON_NODE: &str = "CALLED_OFF_ON_NODE";
/// The machine was told to restart three times, and did not.
pub const DID_NOT_REBOOT: &str = "REBOOT_DID_NOT_HAPPEN";

/// Addresses at which an installer finds its controllers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Addresses of controllers, host:port, in the order in which they are to be tried.
    pub controllers: Vec<String>,
    /// Address of the enrolment listener, host:port; empty: derived from the controllers.
    pub enroll: String,
}

/// What the executor is told about the node.
#[derive(Clone)]
pub struct Settings {
    /// The node's id.
    pub node: String,
    /// The addresses of controllers that are known at this moment, for the installer.
    pub addresses: Arc<dyn Fn() -> Addresses + Send + Sync>,
    /// How long a power-off waits, once armed, for the controller to know it: it hears nothing afterwards. A restart
    /// waits a fifth of that, for the operators' sake only.
    pub farewell: Duration,
    /// How long a new system waits for the controller to accept it before it gives the machine back to the installer.
    pub verdict: Duration,
    /// An installer that has not touched the card waits this long for a controller, then leaves the card to the old system.
    pub confirmation: Duration,
    /// The longest pause before an installation that failed on the way is tried again.
    pub max_pause: Duration,
    /// The controller's time.
    pub now: Arc<dyn Fn() -> DateTime<Utc> + Send + Sync>,
    /// The node's labels, once a controller has said them.
    pub labels: watch::Receiver<Option<Labels>>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Settings").field("node", &self.node).field("addresses", &(self.addresses)()).finish()
    }
}

/// A step of a job could not be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StepError {
    /// It was called off in time.
    #[error("the job was cancelled")]
    Cancelled,
    /// It cannot be done; final.
    #[error("{}: {}", .0.reason, .0.message)]
    Failed(Failure),
    /// The journal could not be written: nothing more is done until it can.
    #[error(transparent)]
    Journal(JournalError),
}

impl From<JournalError> for StepError {
    fn from(error: JournalError) -> Self {
        match error {
            JournalError::CancelRequested => Self::Cancelled,
            other => Self::Journal(other),
        }
    }
}

impl From<BootError> for StepError {
    fn from(error: BootError) -> Self {
        Self::Failed(Failure::new(error.reason(), chain(&error)))
    }
}

impl From<SystemError> for StepError {
    fn from(error: SystemError) -> Self {
        Self::Failed(Failure::new("SYSTEM_ERROR", chain(&error)))
    }
}

impl From<DownloadError> for StepError {
    fn from(error: DownloadError) -> Self {
        match error {
            DownloadError::Cancelled => Self::Cancelled,
            other => Self::Failed(Failure::new(other.reason(), chain(&other))),
        }
    }
}

/// The end of a wait for work.
enum Waited {
    /// There is a job.
    Job,
    /// The machine's owner has other plans after a failure.
    Owner,
    /// The old system is to run again.
    OldSystem,
}

/// Does the jobs of one node under one boot.
pub struct Executor {
    system: Arc<dyn System>,
    journal: Arc<Journal>,
    downloader: Downloader,
    boot_id: String,
    board: Board,
    settings: Settings,
    /// Since when an installation has failed for good, and nothing else has come.
    failed: std::sync::Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Executor").field("boot_id", &self.boot_id).field("settings", &self.settings).finish()
    }
}

impl Executor {
    /// For this machine and this journal, which was opened under the present boot.
    pub fn new(
        system: Arc<dyn System>,
        journal: Arc<Journal>,
        downloader: Downloader,
        settings: Settings,
    ) -> Result<Self, SystemError> {
        let (boot_id, board) = (system.boot_id()?, system.facts()?.board);
        Ok(Self { system, journal, downloader, boot_id, board, settings, failed: std::sync::Mutex::default() })
    }

    /// Draws the conclusions from the boot itself: what succeeded, failed or was rolled back by it. To be called before
    /// the first session, so that its Hello tells the truth.
    pub async fn settle(&self) {
        if let Err(error) = self.conclude_all().await {
            // It is tried again. The node connects meanwhile, and says what ails it.
            tracing::error!(error = %chain(&error), "what the boot decided is not journalled");
        }
        match self.mode() {
            Mode::Running => self.tidy_recovery().await,
            // Before a session: the old system still holds the job, and tells its end.
            Mode::Installer => self.leave_when_idle().await,
        }
    }

    async fn conclude_all(&self) -> Result<(), JournalError> {
        if self.mode() == Mode::Installer {
            self.adopt().await?;
        }
        while let Some(entry) = self.journal.entries().unfinished().cloned() {
            match self.decide(&entry) {
                Resume::Succeed | Resume::Fail(_) | Resume::RollBack | Resume::TrialFailed | Resume::Verify => {
                    self.conclude(&entry).await?;
                }
                _ => break,
            }
        }
        Ok(())
    }

    /// Does what the journal asks for, until `stop`. A job that is interrupted goes on when the agent starts again.
    pub async fn run(&self, stop: CancellationToken) {
        let mut changes = self.journal.changes();
        let mut failures: u32 = 0;
        loop {
            // Dropping the wait loses nothing: the journal keeps what it waits for.
            let waited = tokio::select! {
                () = stop.cancelled() => return,
                waited = changes.wait_for(|entries| entries.unfinished().is_some()) => {
                    if waited.is_ok() { Waited::Job } else { return }
                }
                () = self.patience_is_over() => Waited::Owner,
                () = self.old_system_waits() => Waited::OldSystem,
            };
            *self.failed_since() = None;
            match waited {
                Waited::Job => {}
                // The user at the console loses a shell that they would lose with the machine.
                Waited::Owner => drop(stop.run_until_cancelled(self.give_up()).await),
                Waited::OldSystem => drop(stop.run_until_cancelled(self.leave_when_idle()).await),
            }
            let Some(entry) = self.journal.entries().unfinished().cloned() else { continue };
            // Dropping the step is what a kill does, too: whatever it was, the journal says how to go on.
            let done = tokio::select! {
                () = stop.cancelled() => return,
                () = self.journal.replaced(&entry.execution) => {
                    tracing::warn!(execution = %entry.execution, "installation gives way to another image");
                    continue;
                }
                done = self.advance(&entry) => done,
            };
            let Err(error) = done else {
                failures = 0;
                continue;
            };
            tracing::error!(execution = %entry.execution, error = %chain(&error), "job cannot go on, trying again");
            failures = failures.saturating_add(1);
            if failures >= MAX_FAILURES {
                failures = 0;
                stop.run_until_cancelled(self.end_unwritten(&entry, &error)).await;
            }
            let pause = backoff::doubled(FIRST_PAUSE, failures.saturating_sub(1));
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause.min(self.settings.max_pause)) => {}
            }
        }
    }

    /// Ends a job whose next step cannot be journalled, however often that is tried.
    async fn end_unwritten(&self, entry: &Entry, error: &JournalError) {
        let reason = match error {
            JournalError::Io { .. } => JOURNAL_NOT_WRITABLE,
            _ => "AGENT_BUG",
        };
        if let Err(error) = self.failed(entry, Failure::new(reason, chain(error))).await {
            tracing::error!(execution = %entry.execution, error = %chain(&error), "job not ended");
        }
    }

    fn keep_failure(&self, execution: &str, failure: &Failure) {
        if self.mode() == Mode::Installer {
            self.system.keep_line(&format!("{execution}: {}: {}", failure.reason, failure.message));
        }
    }

    fn mode(&self) -> Mode {
        match self.system.mode() {
            system::Mode::Running => Mode::Running,
            system::Mode::Installer => Mode::Installer,
        }
    }

    fn recovery(&self) -> Option<BootPart> {
        self.system.card().map(|card| BootPart::new(card.recovery, &self.board))
    }

    fn release(&self) -> Release {
        match self.system.release() {
            Ok(Some(release)) => Release {
                execution: release.execution,
                image_sha256: release.image_sha256,
                boot_sha256: release.boot_sha256,
            },
            Ok(None) => Release::default(),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "release not readable");
                Release::default()
            }
        }
    }

    fn decide(&self, entry: &Entry) -> Resume {
        job::resume(Found {
            kind: entry.action.kind(),
            state: entry.state,
            mode: self.mode(),
            same_boot: entry.boot_id == self.boot_id,
            release_is_ours: self.release().execution == entry.execution,
        })
    }

    /// One stretch of a job: to its end, to the next state, or to the end of this boot.
    async fn advance(&self, entry: &Entry) -> Result<(), JournalError> {
        let execution = entry.execution.as_str();
        let decision = self.decide(entry);
        let asked = self.ask_first(entry, decision).await;
        tracing::info!(execution, state = ?entry.state, ?decision, stands = asked.is_ok(), "job goes on");
        let outcome = match decision {
            Resume::Begin if asked.is_err() => Err(StepError::Cancelled),
            Resume::Begin => self.begin(entry).await,
            Resume::GoDown => match asked {
                Ok(()) => self.go_down(entry, self.way_down(entry).await).await,
                Err(failure) => {
                    self.withdraw(execution).await;
                    Err(StepError::Failed(failure))
                }
            },
            Resume::Install => match asked {
                Ok(()) => self.install(entry).await,
                Err(failure) => Err(StepError::Failed(failure)),
            },
            Resume::TryBoot => self.go_down(entry, Self::into_new_system(entry)).await,
            Resume::AwaitVerdict => self.await_verdict(entry).await,
            Resume::Nothing
            | Resume::Succeed
            | Resume::Fail(_)
            | Resume::RollBack
            | Resume::TrialFailed
            | Resume::Verify => self.conclude(entry).await.map_err(StepError::Journal),
        };
        match outcome {
            Ok(()) => Ok(()),
            // Before the point of no return it is a failure like any other. A job that was only tried again would warn
            // users forever.
            Err(StepError::Journal(error @ JournalError::Io { .. })) if self.is_still_accepted(execution) => {
                self.failed(entry, Failure::new(JOURNAL_NOT_WRITABLE, chain(&error))).await
            }
            Err(StepError::Journal(error)) => Err(error),
            Err(StepError::Cancelled) => {
                self.withdraw(execution).await;
                self.journal.cancelled(execution).await?;
                tracing::info!(execution, "job cancelled");
                self.tidy_after(entry).await;
                Ok(())
            }
            Err(StepError::Failed(failure)) => self.failed(entry, failure).await,
        }
    }

    fn is_still_accepted(&self, execution: &str) -> bool {
        self.journal.entries().get(execution).is_some_and(|entry| entry.state == job::State::Accepted)
    }

    /// Journals what the boot itself decided.
    async fn conclude(&self, entry: &Entry) -> Result<(), JournalError> {
        let execution = entry.execution.as_str();
        let decision = self.decide(entry);
        tracing::info!(execution, state = ?entry.state, ?decision, "job concluded");
        match decision {
            Resume::Succeed => self.journal.succeed(execution).await,
            Resume::Fail(reason) => {
                self.journal.fail(execution, Failure::new(reason, sentence(reason))).await?;
                self.tidy_after(entry).await;
                Ok(())
            }
            Resume::RollBack => {
                self.journal.roll_back(execution, self.why_rolled_back(execution)).await?;
                self.tidy_after(entry).await;
                Ok(())
            }
            Resume::TrialFailed if entry.trials.saturating_add(1) >= MAX_TRIALS => {
                let message = format!(
                    "the new system did not come up, or did not reach the controller, in {MAX_TRIALS} trial boots; \
                     the node waits in its installer"
                );
                *self.failed_since() = Some(Instant::now());
                let failure = Failure::new("IMAGE_DID_NOT_COME_UP", message);
                tracing::warn!(execution, reason = %failure.reason, error = %failure.message, "job failed");
                self.keep_failure(execution, &failure);
                self.journal.fail(execution, failure).await
            }
            Resume::TrialFailed => {
                self.count_trial(entry).await;
                self.journal.trial_failed(execution).await
            }
            Resume::Verify => self.journal.verify(execution, self.release()).await,
            _ => Ok(()),
        }
    }

    /// From the beginning to the point of no return and over it. A cancel ends it at every point before.
    async fn begin(&self, entry: &Entry) -> Result<(), StepError> {
        let execution = entry.execution.as_str();
        let cancel = CancellationToken::new();
        let watcher = async {
            let mut changes = self.journal.changes();
            let asked = changes.wait_for(|entries| entries.get(execution).is_some_and(|entry| entry.cancel_requested));
            if asked.await.is_ok() {
                cancel.cancel();
            }
            std::future::pending::<()>().await;
        };
        // The watcher never ends; the work is not dropped by a cancel, but ends by itself, so that no thread of it
        // goes on writing.
        tokio::select! {
            done = self.begin_until(entry, &cancel) => done,
            () = watcher => Ok(()),
        }
    }

    async fn begin_until(&self, entry: &Entry, cancel: &CancellationToken) -> Result<(), StepError> {
        let execution = entry.execution.as_str();
        match (&entry.action, self.mode()) {
            (Action::Update(update), Mode::Installer) => self.begin_in_installer(entry, update, cancel).await,
            (Action::Reboot(_) | Action::PowerOff(_), Mode::Installer) => {
                Err(StepError::Failed(Failure::new(ONLY_IMAGES, sentence(ONLY_IMAGES))))
            }
            (Action::Reboot(notice), Mode::Running) => {
                self.give_notice(execution, Down::Reboot, notice, cancel).await?;
                self.journal.arm(execution).await?;
                self.go_down(entry, WayDown::Reboot).await
            }
            (Action::PowerOff(notice), Mode::Running) => {
                self.give_notice(execution, Down::PowerOff, notice, cancel).await?;
                self.journal.arm(execution).await?;
                self.go_down(entry, WayDown::PowerOff).await
            }
            (Action::Update(update), Mode::Running) => {
                let prefix = self.prepare_update(execution, update, cancel).await?;
                self.give_notice(execution, Down::Reboot, &update.notice, cancel).await?;
                self.hand_over(entry, update, prefix).await?;
                self.journal.arm(execution).await?;
                self.go_down(entry, self.way_down(entry).await).await
            }
            (Action::Unknown, _) => {
                Err(StepError::Failed(Failure::new(job::UNKNOWN_ACTION, sentence(job::UNKNOWN_ACTION))))
            }
        }
    }

    fn phase(&self, execution: &str, phase: &str) {
        self.journal.set_progress(Progress {
            execution: execution.to_owned(),
            phase: phase.to_owned(),
            done: 0,
            total: 0,
        });
    }
}

/// What a reason means, for people.
fn sentence(reason: &str) -> &'static str {
    match reason {
        job::DID_NOT_POWER_OFF => "the machine was told to power off and is still running under the same boot",
        job::RELEASE_MISMATCH => "the system that came up is not the one that this execution installed",
        job::WRONG_MODE => "the journal holds a state that this role of the agent cannot have",
        job::UNKNOWN_ACTION => "this agent does not know the action",
        CONSOLE_IN_USE => {
            "the installation before failed, and somebody has a shell on the node's console (policy = \"shell\"): the node \
             takes work again when that shell ends"
        }
        NO_CONTROLLER => {
            "the installer heard no controller say that the update stands, and left the old system as it was"
        }
        CALLED_OFF => "the controller gave it up while the node was away, so it was not gone on with",
        ONLY_IMAGES => "the node is in its installer, which takes only updates with an image",
        _ => "it cannot be done",
    }
}

#[cfg(test)]
mod tests;
