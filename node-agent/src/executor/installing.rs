//! The steps of an update in the installer, up to the trial boot of the new system.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::update::off_runtime;
use super::{CALLED_OFF, Executor, ONLY_IMAGES, StepError, WayDown, sentence};
use crate::backoff;
use crate::bootpart::{InstallJob, Instruction};
use crate::cause::chain;
use crate::durable;
use crate::install::{self, Next, Phase};
use crate::job::{self, Action, Artifact, Failure, Notice, State, Update, phase};
use crate::journal::{self, Entry, JournalError, Progress};

impl Executor {
    /// Begins a job that the controller gave to the installer itself: it has no system to go back to, and no user to
    /// warn.
    pub(super) async fn begin_in_installer(
        &self,
        entry: &Entry,
        update: &Update,
        cancel: &CancellationToken,
    ) -> Result<(), StepError> {
        if update.image.is_none() {
            return Err(StepError::Failed(Failure::new(ONLY_IMAGES, sentence(ONLY_IMAGES))));
        }
        self.judge(update, cancel).await?;
        let prefix = self.installer_set(&entry.execution, update.bootcode.as_ref(), cancel).await?;
        if cancel.is_cancelled() {
            return Err(StepError::Cancelled);
        }
        let recovery = self.recovery_or_fail()?;
        let job = self.install_job(entry, update, prefix, entry.sequence)?;
        let image = update.image.as_ref().map(|image| image.id.clone());
        off_runtime(move || {
            recovery.write_installer_config(image.as_deref())?;
            recovery.write_job(&job)?;
            Ok(())
        })
        .await?;
        self.journal.install(&entry.execution).await?;
        Ok(())
    }

    /// Takes over the job that the running system left on the card (`install.json`), in case the installer's journal is
    /// lost.
    pub(super) async fn adopt(&self) -> Result<(), JournalError> {
        let Some(recovery) = self.recovery() else { return Ok(()) };
        let read = off_runtime(move || Ok(recovery.read_job()?)).await;
        let job = match read {
            Ok(Some(job)) => job,
            Ok(None) => return Ok(()),
            Err(error) => {
                // Not fatal: the journal may hold the job. Without either, this installer is idle and leaves.
                tracing::error!(error = %chain(&error), "installation job not readable");
                return Ok(());
            }
        };
        let (image, bootcode, raw) = match job.instruction {
            Instruction::Install { image, sha256, raw } => (Some(Artifact { id: image, sha256 }), None, raw),
            Instruction::BootOnly { sha256 } => (None, Some(Artifact { id: String::new(), sha256 }), false),
        };
        let notice = Notice { delay: Duration::ZERO, message: String::new() };
        let action = Action::Update(Update { image, bootcode, notice, discard_home: job.discard_home, raw });
        let mut entry = journal::new_entry(&job.execution, job.attempt, action, State::Armed, &job.boot_id);
        entry.sequence = job.sequence;
        entry.trials = job.trials;
        self.journal.adopt(entry).await
    }

    /// Steps 4 and 5 of an update. Tries again what may heal, within the limits of [`job::Tries`]. An installation that
    /// was called off meanwhile is not tried again.
    pub(super) async fn install(&self, entry: &Entry) -> Result<(), StepError> {
        let execution = entry.execution.as_str();
        let recovery = self.recovery_or_fail()?;
        let job = off_runtime(move || Ok(recovery.read_job()?)).await?;
        let Some(job) = job.filter(|job| job.execution == execution) else {
            let message = "the card does not say any more what is to be installed";
            return Err(StepError::Failed(Failure::new("INSTALL_JOB_LOST", message)));
        };
        self.journal.install(execution).await?;
        // Counted over boots: an image or a card that hangs the machine each time leaves no other trace.
        let before = self.journal.entries().get(execution).and_then(|entry| entry.tries.never_ended());
        if let Some(message) = before {
            return Err(StepError::Failed(Failure::new(job::NEVER_ENDED, message)));
        }

        let next = loop {
            let begun = Instant::now();
            let error = match self.install_once(execution, &job).await {
                Ok(next) => break next,
                Err(error) => error,
            };
            let failure = Failure::new(error.reason, chain(&error));
            // Asked after each try: it may have made the installer the default, and then there is no way back.
            let committed = self.installer_boots().await;
            // Before the pause: a machine that is reset during it forgets no try.
            let tries = self.journal.tried(execution, failure.clone(), begun.elapsed()).await?;
            let failed = tries.failed();
            tracing::warn!(
                execution, reason = error.reason, error = %failure.message, failed, committed, "installation failed"
            );
            if !error.retryable {
                return Err(StepError::Failed(failure));
            }
            if let Some(why) = tries.over(error.reason, committed) {
                let message = format!("{} ({why})", failure.message);
                return Err(StepError::Failed(Failure::new(failure.reason, message)));
            }
            self.keep_failure(execution, &failure);
            self.phase(execution, phase::ANOTHER_TRY);
            let pause = self.pause(failed);
            // Cancel-safe: neither wait holds anything.
            tokio::select! {
                biased;
                () = self.journal.called_off(execution) => {
                    let message = format!("it was called off, and so not tried again after: {}", failure.message);
                    return Err(StepError::Failed(Failure::new(CALLED_OFF, message)));
                }
                () = tokio::time::sleep(pause) => {}
            }
        };
        if next == Next::Installer {
            return self.go_down(entry, WayDown::Reboot).await;
        }
        self.journal.try_boot(execution).await?;
        self.go_down(entry, Self::into_new_system(entry)).await
    }

    /// Selects the restart into the installed system. A raw image needs no trial: every boot is the new system.
    pub(super) fn into_new_system(entry: &Entry) -> WayDown {
        if entry.action.is_raw() { WayDown::Reboot } else { WayDown::TryBoot }
    }

    async fn install_once(&self, execution: &str, job: &InstallJob) -> Result<Next, install::InstallError> {
        let progress: install::Progress = {
            let (journal, execution) = (self.journal.clone(), execution.to_owned());
            Arc::new(move |phase: Phase, done, total| {
                let (execution, phase) = (execution.clone(), phase.as_str().to_owned());
                journal.set_progress(Progress { execution, phase, done, total });
            })
        };
        let stands: Arc<dyn Fn() -> bool + Send + Sync> = {
            let (journal, execution) = (self.journal.clone(), execution.to_owned());
            Arc::new(move || !journal.entries().get(&execution).is_some_and(|entry| entry.cancel_requested))
        };
        let write: install::WriteJournal = {
            let (journal, execution) = (self.journal.clone(), execution.to_owned());
            Arc::new(move |folder: &Path| {
                let contents = journal.for_the_new_root(&execution).map_err(std::io::Error::other)?;
                durable::replace(&folder.join(journal::FILE_NAME), &contents, 0o600)
            })
        };
        // An installation is never cancelled. It ends with the process, or is dropped for another image.
        let never = CancellationToken::new();
        let context = install::Context {
            journal: write,
            now: (self.settings.now)(),
            progress,
            labels: self.settings.labels.clone(),
            stands,
        };
        install::install(job, &self.system, &self.downloader, context, &never).await
    }

    /// Pause after so many failed tries: full jitter, doubling from a second up to `Settings::max_pause`.
    pub(super) fn pause(&self, tries: u32) -> Duration {
        let ceiling = backoff::doubled(Duration::from_secs(1), tries);
        backoff::full_jitter(ceiling.min(self.settings.max_pause))
    }

    /// Counts a failed trial in `install.json`, too: the journal lies on a file system that a power cut may tear.
    pub(super) async fn count_trial(&self, entry: &Entry) {
        let Some(recovery) = self.recovery() else { return };
        let (execution, trials) = (entry.execution.clone(), entry.trials.saturating_add(1));
        let counted = off_runtime(move || Ok(recovery.count_trial(&execution, trials)?));
        if let Err(error) = counted.await {
            tracing::warn!(execution = %entry.execution, error = %chain(&error), "trial not counted on the card");
        }
    }
}
