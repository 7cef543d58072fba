//! The steps of an update: in the running system up to the trial boot of the installer, in the installer up to the
//! trial boot of the new system, and in the new system its confirmation.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::{Addresses, Executor, ONLY_IMAGES, StepError, WayDown, sentence};
use crate::backoff;
use crate::bootpart::{BootError, BootPart, DefaultBoot, InstallJob, Instruction, Prefix};
use crate::cause::chain;
use crate::download::{self, DownloadError};
use crate::durable;
use crate::install::{self, Next, Phase};
use crate::job::{Action, Artifact, Failure, Kind, Mode, Notice, State, Update, phase};
use crate::journal::{self, Entry, JournalError, Progress};
use crate::system::{Erase, Refusal};

/// How often an installation that has not touched the card yet is tried before the old system is started again.
const MAX_UNCOMMITTED: u32 = 3;

/// Name of the folder of downloads beside the journal.
const DOWNLOADS: &str = "downloads";

impl Executor {
    /// Steps 1 and 2: nothing is touched but the idle installer set.
    pub(super) async fn prepare_update(
        &self,
        execution: &str,
        update: &Update,
        cancel: &CancellationToken,
    ) -> Result<Prefix, StepError> {
        self.phase(execution, phase::CHECKING);
        self.system.preflight_update().await.map_err(refused)?;
        // A raw image keeps nothing.
        if !update.raw {
            self.system.check_kept(erased_by(update)).await.map_err(refused)?;
        }
        self.judge(update, cancel).await?;
        // Without an image the bootcode is what goes into the system's boot partition, not what installs it.
        let installer = if update.image.is_some() { update.bootcode.as_ref() } else { None };
        self.installer_set(execution, installer, cancel).await
    }

    /// Whether the image can start this board, by what the controller knows of it: before anything is armed.
    async fn judge(&self, update: &Update, cancel: &CancellationToken) -> Result<(), StepError> {
        let Some(image) = &update.image else { return Ok(()) };
        let facts = self.downloader.facts(&image.sha256, cancel).await;
        if cancel.is_cancelled() {
            return Err(StepError::Cancelled);
        }
        let Some(facts) = facts else { return Ok(()) };
        let board = self.system.facts()?.board;
        let judged = facts.judge(&board.family, board.device_tree());
        judged.map_err(|message| StepError::Failed(Failure::new(install::NOT_A_SYSTEM, message)))
    }

    /// The installer set asked for, or the fallback, complete on p1.
    async fn installer_set(
        &self,
        execution: &str,
        bootcode: Option<&Artifact>,
        cancel: &CancellationToken,
    ) -> Result<Prefix, StepError> {
        let recovery = self.recovery_or_fail()?;
        let Some(bootcode) = bootcode else {
            if self.mode() == Mode::Installer {
                let present = recovery.clone();
                if let Some(prefix) = off_runtime(move || Ok(present.present()?)).await? {
                    return Ok(prefix);
                }
            }
            self.phase(execution, phase::WRITING_BOOT_FILES);
            return off_runtime(move || {
                let zip = recovery.fallback_zip();
                let digest = digest_of(&zip).map_err(|error| {
                    let message = format!("no bootcode was named, and the fallback of this node is no help: {error}");
                    StepError::Failed(Failure::new("NO_BOOTCODE", message))
                })?;
                Ok(recovery.stage(&zip, &digest)?)
            })
            .await;
        };

        let digest = bootcode.sha256.clone();
        let held = off_runtime({
            let (recovery, digest) = (recovery.clone(), digest.clone());
            move || Ok(recovery.holds(&digest)?)
        })
        .await?;
        if let Some(prefix) = held {
            return Ok(prefix);
        }
        let zip = download::file_in(&self.downloads(), &digest);
        let progress = self.bytes_of(execution, phase::DOWNLOADING_BOOTCODE);
        self.phase(execution, phase::DOWNLOADING_BOOTCODE);
        tokio::fs::create_dir_all(self.downloads()).await.map_err(DownloadError::from)?;
        let (folder, keep) = (self.downloads(), digest.clone());
        off_runtime(move || {
            download::sweep(&folder, Some(&keep));
            Ok(())
        })
        .await?;
        self.downloader.to_file(&digest, &zip, progress, cancel).await?;
        if cancel.is_cancelled() {
            return Err(StepError::Cancelled);
        }
        self.phase(execution, phase::WRITING_BOOT_FILES);
        off_runtime(move || {
            let prefix = recovery.stage(&zip, &digest);
            remove(&zip);
            Ok(prefix?)
        })
        .await
    }

    /// The end of step 2: everything that the installer needs to know, on p1. Until the trial boot it changes nothing.
    pub(super) async fn hand_over(&self, entry: &Entry, update: &Update, prefix: Prefix) -> Result<(), StepError> {
        let recovery = self.recovery_or_fail()?;
        let folder = self.recovery_folder().ok_or_else(no_recovery)?;
        let journal = self.journal.for_the_installer(&entry.execution)?;
        // As it is now: the attempt may have been raised since the job began.
        let entry = self.journal.entries().get(&entry.execution).cloned().unwrap_or_else(|| entry.clone());
        let job = self.install_job(&entry, update, prefix, entry.sequence.saturating_add(1))?;
        let identity = self.system.identity_dir();
        let image = update.image.as_ref().map(|image| image.id.clone());
        off_runtime(move || {
            recovery.write_installer_config(image.as_deref())?;
            recovery.stage_identity(&identity)?;
            {
                let _writable = recovery.open_for_writing()?;
                write_journal(&folder, &journal)?;
            }
            recovery.write_job(&job)?;
            recovery.name_for_tryboot(prefix)?;
            Ok(())
        })
        .await
    }

    fn install_job(
        &self,
        entry: &Entry,
        update: &Update,
        prefix: Prefix,
        sequence: u64,
    ) -> Result<InstallJob, StepError> {
        let instruction = match (&update.image, &update.bootcode) {
            (Some(image), _) => {
                let (image, sha256) = (image.id.clone(), image.sha256.clone());
                Instruction::Install { image, sha256, raw: update.raw }
            }
            (None, Some(bootcode)) => Instruction::BootOnly { sha256: bootcode.sha256.clone() },
            (None, None) => {
                let message = "neither an image nor boot files were named";
                return Err(StepError::Failed(Failure::new("NO_BOOTCODE", message)));
            }
        };
        let Addresses { controllers, enroll } = (self.settings.addresses)();
        Ok(InstallJob {
            instruction,
            execution: entry.execution.clone(),
            attempt: entry.attempt,
            sequence,
            boot_id: entry.boot_id.clone(),
            controllers,
            enroll,
            node: self.settings.node.clone(),
            discard_home: update.discard_home,
            trials: entry.trials,
            prefix,
        })
    }

    /// A job that reached the installer itself: there is nothing to go back to, and nobody to warn.
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

    /// In the installer: the job that the running system left on the card becomes ours, should its journal be lost.
    pub(super) async fn adopt(&self) -> Result<(), JournalError> {
        let Some(recovery) = self.recovery() else { return Ok(()) };
        let read = off_runtime(move || Ok(recovery.read_job()?)).await;
        let job = match read {
            Ok(Some(job)) => job,
            Ok(None) => return Ok(()),
            Err(error) => {
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

    /// Steps 4 and 5.
    pub(super) async fn install(&self, entry: &Entry) -> Result<(), StepError> {
        let execution = entry.execution.as_str();
        let recovery = self.recovery_or_fail()?;
        let job = off_runtime(move || Ok(recovery.read_job()?)).await?;
        let Some(job) = job.filter(|job| job.execution == execution) else {
            let message = "the card does not say any more what is to be installed";
            return Err(StepError::Failed(Failure::new("INSTALL_JOB_LOST", message)));
        };
        self.journal.install(execution).await?;

        // A boot that was no trial is a boot by default: then the installer has been made the default before.
        let touched = Arc::new(AtomicBool::new(self.system.booted().is_some_and(|booted| !booted.tryboot)));
        let mut tries: u32 = 0;
        let next = loop {
            let error = match self.install_once(execution, &job, &touched).await {
                Ok(next) => break next,
                Err(error) => error,
            };
            tries = tries.saturating_add(1);
            let failure = Failure::new(error.reason, chain(&error));
            tracing::warn!(execution, reason = error.reason, error = %failure.message, tries, "installation failed");
            self.keep_failure(execution, &failure);
            let touched = touched.load(Ordering::Acquire);
            if !touched && (!error.retryable || tries >= MAX_UNCOMMITTED) {
                // The old system is whole: it comes back by itself, and says why.
                self.journal.note(execution, failure).await?;
                return self.go_down(entry, WayDown::Reboot).await;
            }
            if !error.retryable {
                return Err(StepError::Failed(failure));
            }
            self.journal.note(execution, failure).await?;
            self.phase(execution, phase::ANOTHER_TRY);
            tokio::time::sleep(self.pause(tries)).await;
        };
        if next == Next::Installer {
            return self.go_down(entry, WayDown::Reboot).await;
        }
        self.journal.try_boot(execution).await?;
        self.go_down(entry, Self::into_new_system(entry)).await
    }

    /// How the installer restarts into what it has installed. Of a raw image every boot is the new system.
    pub(super) fn into_new_system(entry: &Entry) -> WayDown {
        if entry.action.is_raw() { WayDown::Reboot } else { WayDown::TryBoot }
    }

    async fn install_once(
        &self,
        execution: &str,
        job: &InstallJob,
        touched: &Arc<AtomicBool>,
    ) -> Result<Next, install::InstallError> {
        let progress: install::Progress = {
            let (journal, execution, touched) = (self.journal.clone(), execution.to_owned(), touched.clone());
            Arc::new(move |phase: Phase, done, total| {
                if phase >= Phase::Partitioning {
                    touched.store(true, Ordering::Release);
                }
                let (execution, phase) = (execution.clone(), phase.as_str().to_owned());
                journal.set_progress(Progress { execution, phase, done, total });
            })
        };
        let write: install::WriteJournal = {
            let (journal, execution) = (self.journal.clone(), execution.to_owned());
            Arc::new(move |folder: &Path| {
                let contents = journal.for_the_new_root(&execution).map_err(std::io::Error::other)?;
                durable::replace(&folder.join(journal::FILE_NAME), &contents, 0o600)
            })
        };
        // Nothing cancels an installation but the end of the process.
        let never = CancellationToken::new();
        let context = install::Context {
            journal: write,
            now: (self.settings.now)(),
            progress,
            labels: self.settings.labels.clone(),
        };
        install::install(job, &self.system, &self.downloader, context, &never).await
    }

    /// Full jitter, doubling from a second.
    fn pause(&self, tries: u32) -> Duration {
        let ceiling = backoff::doubled(Duration::from_secs(1), tries);
        backoff::full_jitter(ceiling.min(self.settings.max_pause))
    }

    /// In the new system: the controller's acknowledgement is its verdict. Only then the system becomes the default.
    pub(super) async fn await_verdict(&self, entry: &Entry) -> Result<(), StepError> {
        let execution = entry.execution.as_str();
        self.phase(execution, phase::VERDICT);
        let mut changes = self.journal.changes();
        let accepted = changes.wait_for(|entries| entries.get(execution).is_some_and(Entry::is_acked));
        // A raw image is what boots in any case.
        let patience = if entry.action.is_raw() { Duration::MAX } else { self.settings.verdict };
        if tokio::time::timeout(patience, accepted).await.is_err() {
            // A system that cannot reach its controller, or is not the one asked for, is no better than one that does
            // not come up. The installer is still the default, and counts the trial.
            tracing::warn!(execution, "controller has not accepted the new system, back to the installer");
            return self.go_down(entry, WayDown::Reboot).await;
        }
        // A raw image is what boots already, and has no installer beside it.
        if !entry.action.is_raw() {
            let recovery = self.recovery_or_fail()?;
            off_runtime(move || Ok(recovery.set_boot_partition(DefaultBoot::System)?)).await?;
        }
        self.journal.succeed(execution).await?;
        self.tidy_recovery().await;
        Ok(())
    }

    /// Tells the installer's file, too, that a trial failed: its journal lies on a file system that may tear it.
    pub(super) async fn count_trial(&self, entry: &Entry) {
        let Some(recovery) = self.recovery() else { return };
        let (execution, trials) = (entry.execution.clone(), entry.trials.saturating_add(1));
        let counted = off_runtime(move || Ok(recovery.count_trial(&execution, trials)?));
        if let Err(error) = counted.await {
            tracing::warn!(execution = %entry.execution, error = %chain(&error), "trial not counted on the card");
        }
    }

    /// What the installer noted before it gave the machine back.
    pub(super) fn why_rolled_back(&self, execution: &str) -> Failure {
        let noted = self.recovery_folder().and_then(|folder| journal::noted(&folder, execution));
        noted.unwrap_or_else(|| {
            Failure::new("OLD_SYSTEM_CAME_BACK", "the machine restarted into the system that it ran before")
        })
    }

    /// After an update that is over, in the running system.
    pub(super) async fn tidy_after(&self, entry: &Entry) {
        if entry.action.kind() == Kind::Update && self.mode() == Mode::Running {
            self.tidy_recovery().await;
        }
    }

    /// Removes from p1 what only an unfinished update may leave there: the job, the identity, the installer's journal.
    pub(super) async fn tidy_recovery(&self) {
        let busy = self.journal.entries().unfinished().is_some_and(|entry| entry.action.kind() == Kind::Update);
        let (Some(recovery), Some(folder), false) = (self.recovery(), self.recovery_folder(), busy) else { return };
        let downloads = self.downloads();
        let tidied = off_runtime(move || {
            if folder.join("install.json").exists() {
                recovery.clear_job()?;
            }
            if recovery.marco_dir().join(journal::FILE_NAME).exists() {
                let _writable = recovery.open_for_writing()?;
                remove(&folder.join(journal::FILE_NAME));
            }
            recovery.remove_identity()?;
            if downloads.exists() {
                let _ = std::fs::remove_dir_all(&downloads);
            }
            // The rest of an installer's download takes room from the next set.
            let left = [folder.clone(), folder.join(DOWNLOADS)];
            if left.iter().any(|folder| download::is_to_sweep(folder)) {
                let _writable = recovery.open_for_writing()?;
                left.iter().for_each(|folder| download::sweep(folder, None));
            }
            Ok(())
        });
        if let Err(error) = tidied.await {
            tracing::warn!(error = %chain(&error), "recovery partition not tidied");
        }
    }

    fn recovery_or_fail(&self) -> Result<BootPart, StepError> {
        self.recovery().ok_or_else(no_recovery)
    }

    fn recovery_folder(&self) -> Option<PathBuf> {
        self.recovery().map(|recovery| recovery.marco_dir())
    }

    fn downloads(&self) -> PathBuf {
        self.system.state_dir().join(DOWNLOADS)
    }

    fn bytes_of(&self, execution: &str, phase: &'static str) -> download::Progress {
        let (journal, execution) = (self.journal.clone(), execution.to_owned());
        Arc::new(move |done, total| {
            journal.set_progress(Progress { execution: execution.clone(), phase: phase.to_owned(), done, total });
        })
    }
}

fn refused(refusal: Refusal) -> StepError {
    StepError::Failed(Failure::new(refusal.reason, refusal.message))
}

/// The file systems that the installer makes anew for this.
fn erased_by(update: &Update) -> Erase {
    let root = update.image.is_some();
    Erase { root, home: root && update.discard_home }
}

fn no_recovery() -> StepError {
    StepError::Failed(Failure::new("LAYOUT_NOT_RESIDENT", "the card has no recovery partition"))
}

fn write_journal(folder: &Path, contents: &[u8]) -> Result<(), StepError> {
    let path = folder.join(journal::FILE_NAME);
    durable::replace(&path, contents, 0o600)
        .map_err(|source| StepError::from(BootError::Io { doing: "write", path, source }))
}

fn digest_of(path: &Path) -> std::io::Result<String> {
    let mut hasher = Sha256::new();
    std::io::copy(&mut std::fs::File::open(path)?, &mut Hashing(&mut hasher))?;
    Ok(hex::encode(hasher.finalize()))
}

/// Feeds a hasher.
struct Hashing<'a>(&'a mut Sha256);

impl std::io::Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Removes a file that is of no more use; one that stays does no harm.
fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::debug!(file = %path.display(), error = %error, "file not removed");
    }
}

async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
) -> Result<T, StepError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(StepError::Failed(Failure::new("AGENT_BUG", format!("a step did not end well: {error}"))))
    })
}
