//! Runs the jobs of the journal, one at a time. Each step is journalled before it is done.
//!
//! The journal alone decides the next step ([`job::resume`]), so an agent that was killed goes on by the same code as
//! one that was not.

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

/// Reason: the journal cannot be written, so nothing is begun.
pub use crate::journal::NOT_WRITABLE as JOURNAL_NOT_WRITABLE;

/// Reason: the installer takes only updates with an image.
pub const ONLY_IMAGES: &str = "INSTALLER_TAKES_ONLY_IMAGES";
/// First pause before a job that cannot go on is tried again. It doubles with each failure, up to
/// `Settings::max_pause`.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Steps in a row that may fail to be journalled. The job then ends FAILED.
const MAX_FAILURES: u32 = 5;
pub use crate::job::CALLED_OFF;
/// Reason: after a failed installation a user has a shell on the node's console.
pub const CONSOLE_IN_USE: &str = "CONSOLE_IN_USE";
/// Reason: the installer was started for an update, and no controller confirmed it.
pub const NO_CONTROLLER: &str = "NO_CONTROLLER";
/// Reason: a user of the node cancelled or replaced the announced shutdown.
pub const CALLED_OFF_ON_NODE: &str = "CALLED_OFF_ON_NODE";
/// Reason: the machine was told to restart three times, and did not.
pub const DID_NOT_REBOOT: &str = "REBOOT_DID_NOT_HAPPEN";

/// Addresses at which an installer finds its controllers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Addresses of controllers, host:port, in the order to try.
    pub controllers: Vec<String>,
    /// Address of the enrolment listener, host:port. Empty: derived from the controllers.
    pub enroll: String,
}

/// The node's facts and limits that the executor needs.
#[derive(Clone)]
pub struct Settings {
    /// The node's id.
    pub node: String,
    /// Returns the addresses of controllers that are known at this moment, for the installer.
    pub addresses: Arc<dyn Fn() -> Addresses + Send + Sync>,
    /// Longest wait of an armed power-off for the controller's acknowledgement: the controller hears nothing
    /// afterwards. A restart waits a fifth of it, so that operators see the state.
    pub farewell: Duration,
    /// Longest wait of a new system for the controller's acceptance. It then gives the machine back to the installer.
    pub verdict: Duration,
    /// An installer that has not touched the card waits this long for a controller, then leaves the card to the old system.
    pub confirmation: Duration,
    /// Longest pause between two tries of an installation, or of a job that cannot go on.
    pub max_pause: Duration,
    /// Returns the present time by the controller's clock. The new system's release file says it.
    pub now: Arc<dyn Fn() -> DateTime<Utc> + Send + Sync>,
    /// The node's labels; `None`: no controller has said them yet.
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
    /// A cancel came before the point of no return.
    #[error("the job was cancelled")]
    Cancelled,
    /// Final: the job ends with this failure.
    #[error("{}: {}", .0.reason, .0.message)]
    Failed(Failure),
    /// The journal could not be written. Nothing more is done until it can.
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
    /// A job is unfinished.
    Job,
    /// The time after a failed installation is over; the card's settings name what follows.
    Owner,
    /// An idle installer leaves the machine to the old system.
    OldSystem,
}

/// Runs the jobs of one node under one boot.
pub struct Executor {
    system: Arc<dyn System>,
    journal: Arc<Journal>,
    downloader: Downloader,
    boot_id: String,
    board: Board,
    settings: Settings,
    /// Time at which a job failed for good; `None`: none has, or other work has come since.
    failed: std::sync::Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Executor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Executor").field("boot_id", &self.boot_id).field("settings", &self.settings).finish()
    }
}

impl Executor {
    /// Creates the executor of this machine. The journal must have been opened under the present boot.
    pub fn new(
        system: Arc<dyn System>,
        journal: Arc<Journal>,
        downloader: Downloader,
        settings: Settings,
    ) -> Result<Self, SystemError> {
        let (boot_id, board) = (system.boot_id()?, system.facts()?.board);
        Ok(Self { system, journal, downloader, boot_id, board, settings, failed: std::sync::Mutex::default() })
    }

    /// Journals the outcomes that the boot itself decided: success, failure or rollback. Call it before the first
    /// session, so that the Hello reports them.
    pub async fn settle(&self) {
        if let Err(error) = self.conclude_all().await {
            // `run` tries it again. The node connects meanwhile, and reports that its journal cannot be written.
            tracing::error!(error = %chain(&error), "what the boot decided is not journalled");
        }
        match self.mode() {
            Mode::Running => self.tidy_recovery().await,
            // Without a session: the old system still holds the job, and reports its end.
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

    /// Runs the jobs of the journal until `stop`. An interrupted job goes on when the agent starts again.
    pub async fn run(&self, stop: CancellationToken) {
        let mut changes = self.journal.changes();
        let mut failures: u32 = 0;
        loop {
            // Cancel-safe: the journal keeps the jobs that the wait looks for.
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
            // Dropping the step at any point equals a kill: the journal says how to go on.
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
            // Endless tries would keep an installer on its trial boot forever, beside a whole old system.
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

    /// Ends a job whose next step could not be journalled in [`MAX_FAILURES`] tries.
    async fn end_unwritten(&self, entry: &Entry, error: &JournalError) {
        let reason = match error {
            JournalError::Io { .. } => JOURNAL_NOT_WRITABLE,
            // Not the disk: the program took a step that does not follow from the job's state.
            _ => "AGENT_BUG",
        };
        if let Err(error) = self.failed(entry, Failure::new(reason, chain(error))).await {
            tracing::error!(execution = %entry.execution, error = %chain(&error), "job not ended");
        }
    }

    fn keep_failure(&self, execution: &str, failure: &Failure) {
        if self.mode() == Mode::Installer {
            // The card's log can be read on any machine, also if the node never reaches its controller again.
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
                // An unreadable release proves nothing: a trial then ends as a mismatch, never as a success.
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
            torn: entry.torn,
        })
    }

    /// Advances a job to its end, to its next state, or to the end of this boot.
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
                    // An earlier process of the agent has warned the users.
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
            // Before the point of no return this ends the job. One that was only tried again would warn users forever.
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

    /// Journals the outcome that the boot itself decided.
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
                // The card's file before the journal: after a power cut between them the same number is counted again.
                self.count_trial(entry).await;
                self.journal.trial_failed(execution).await
            }
            Resume::Verify => self.journal.verify(execution, self.release()).await,
            _ => Ok(()),
        }
    }

    /// Takes a job from its beginning past the point of no return. A cancel ends it at every step before that.
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
        // A cancel does not drop the work, whose blocking threads would go on writing. The work sees the token, and
        // ends by itself. The watcher never ends.
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
                // After the notice, in which the agent may have renewed its key: the installer needs the present one.
                self.hand_over(entry, update, prefix).await?;
                // After all files of the installer: an armed update restarts at once, also if the agent starts again.
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

/// Explains a reason to people.
fn sentence(reason: &str) -> &'static str {
    match reason {
        job::DID_NOT_POWER_OFF => "the machine was told to power off and is still running under the same boot",
        job::RELEASE_MISMATCH => "the system that came up is not the one that this execution installed",
        job::WRONG_MODE => "the journal holds a state that this role of the agent cannot have",
        job::UNKNOWN_ACTION => "this agent does not know the action",
        job::JOURNAL_LOST => {
            "the newest copy of the node's journal was lost and the machine has restarted since, so it is not known \
             whether this was done"
        }
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
