//! The steps of an update in a running system: in the old one up to the trial boot of the installer, in the new one its
//! confirmation.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio_util::sync::CancellationToken;

use super::{Addresses, Executor, StepError, WayDown};
use crate::bootpart::{BootError, BootPart, DefaultBoot, InstallJob, Instruction, JOB_VERSION, Prefix};
use crate::cause::chain;
use crate::download::{self, DownloadError};
use crate::durable;
use crate::install;
use crate::job::{Artifact, Failure, Kind, Mode, Update, phase};
use crate::journal::{self, Entry, Progress, Verdict};
use crate::step;
use crate::system::{Erase, Refusal};

/// Name of the folder of downloads beside the journal.
const DOWNLOADS: &str = "downloads";

impl Executor {
    /// Steps 1 and 2 of an update. They write nothing but the idle installer set.
    pub(super) async fn prepare_update(
        &self,
        execution: &str,
        update: &Update,
        cancel: &CancellationToken,
    ) -> Result<Prefix, StepError> {
        self.phase(execution, phase::CHECKING);
        self.system.preflight_update().await.map_err(refused)?;
        // In the log, which goes to the controller if the update fails. Not a refusal: most systems come up.
        if let Some(lacks) = self.system.trial_lacks() {
            tracing::warn!(execution, lacks, "a trial on this machine may need hands");
        }
        // A raw image replaces the whole card, so there is nothing to keep.
        if !update.raw {
            self.system.check_kept(erased_by(update)).await.map_err(refused)?;
        }
        self.judge(update, cancel).await?;
        // Without an image the bootcode goes into the system's boot partition, and the fallback installer writes it.
        let installer = if update.image.is_some() { update.bootcode.as_ref() } else { None };
        self.installer_set(execution, installer, cancel).await
    }

    /// Fails if the image cannot start this board, by the controller's facts about it. Runs before anything is armed.
    pub(super) async fn judge(&self, update: &Update, cancel: &CancellationToken) -> Result<(), StepError> {
        let Some(image) = &update.image else { return Ok(()) };
        let facts = self.downloader.facts(&image.sha256, cancel).await;
        if cancel.is_cancelled() {
            return Err(StepError::Cancelled);
        }
        // No facts (an older controller, or none that answers): the installer judges by the download's header.
        let Some(facts) = facts else { return Ok(()) };
        let board = self.system.facts()?.board;
        let judged = facts.judge(&board.family, board.device_tree());
        judged.map_err(|message| StepError::Failed(Failure::new(install::NOT_A_SYSTEM, message)))
    }

    /// Makes the set that was asked for, or the fallback, complete on p1 (the recovery partition).
    pub(super) async fn installer_set(
        &self,
        execution: &str,
        bootcode: Option<&Artifact>,
        cancel: &CancellationToken,
    ) -> Result<Prefix, StepError> {
        let recovery = self.recovery_or_fail()?;
        let Some(bootcode) = bootcode else {
            if self.mode() == Mode::Installer {
                // In the installer the set that runs is there: it needs no fallback.
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
        // Saves the download: a set is recorded with the digest of its zip.
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
            // Downloads are named by digest. Leftovers of others only take room.
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

    /// The end of step 2: writes everything that the installer needs to p1. It has no effect before the trial boot.
    pub(super) async fn hand_over(&self, entry: &Entry, update: &Update, prefix: Prefix) -> Result<(), StepError> {
        let recovery = self.recovery_or_fail()?;
        let folder = self.recovery_folder().ok_or_else(no_recovery)?;
        let journal = self.journal.for_the_installer(&entry.execution)?;
        // The present entry: the attempt may have been raised since the job began.
        let entry = self.journal.entries().get(&entry.execution).cloned().unwrap_or_else(|| entry.clone());
        // The next sequence is that of ARMED, which an installer without a journal goes on from.
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

    pub(super) fn install_job(
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
            version: JOB_VERSION,
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
            disk: self.system.disk_to_name(),
        })
    }

    /// Waits in the new system for the controller's verdict. Only if that accepts the system, makes it the default.
    pub(super) async fn await_verdict(&self, entry: &Entry) -> Result<(), StepError> {
        let execution = entry.execution.as_str();
        self.phase(execution, phase::VERDICT);
        // Nothing to go back to: a raw image boots in any case, and so does a system that was accepted before a power cut
        // took its journal's word for it. A restart would lead here again, every ten minutes.
        let stays = entry.action.is_raw() || !self.installer_boots().await;
        let patience = if stays { Duration::MAX } else { self.settings.verdict };
        // A system that cannot reach its controller, or is the wrong one, is no better than one that does not come up. The
        // installer is still the default, and counts the trial.
        match tokio::time::timeout(patience, self.journal.verdict(execution)).await {
            Ok(Verdict::Accepted) => {}
            Ok(Verdict::Refused(failure)) if stays => return Err(StepError::Failed(failure)),
            Ok(Verdict::Refused(failure)) => {
                let (reason, error) = (failure.reason, failure.message);
                tracing::warn!(execution, reason, error, "controller refuses the new system, back to the installer");
                return self.go_down(entry, WayDown::Reboot).await;
            }
            Err(_) => {
                tracing::warn!(execution, "controller has not accepted the new system, back to the installer");
                return self.go_down(entry, WayDown::Reboot).await;
            }
        }
        // A raw image is the default already.
        if !entry.action.is_raw() {
            self.make_system_default(execution).await?;
        }
        self.journal.succeed(execution).await?;
        self.tidy_recovery().await;
        Ok(())
    }

    /// Returns the reason that the installer noted before it gave the machine back.
    pub(super) fn why_rolled_back(&self, execution: &str) -> Failure {
        let noted = self.recovery_folder().and_then(|folder| journal::noted(&folder, execution));
        noted.unwrap_or_else(|| {
            Failure::new("OLD_SYSTEM_CAME_BACK", "the machine restarted into the system that it ran before")
        })
    }

    /// Tidies the recovery partition after an update that is over, in the running system only.
    pub(super) async fn tidy_after(&self, entry: &Entry) {
        if entry.action.kind() == Kind::Update && self.mode() == Mode::Running {
            self.tidy_recovery().await;
        }
    }

    /// Removes the job, the identity and the installer's journal from p1: only an unfinished update may leave them
    /// there. Removes nothing while the installer boots by default, since it needs them however the update ended.
    pub(super) async fn tidy_recovery(&self) {
        let busy = self.journal.entries().unfinished().is_some_and(|entry| entry.action.kind() == Kind::Update);
        let (Some(recovery), Some(folder), false) = (self.recovery(), self.recovery_folder(), busy) else { return };
        let (downloads, root) = (self.downloads(), self.system.root());
        let tidied = off_runtime(move || {
            // A failed switch once left the installer as the default, and this function took its key away.
            if recovery.default_boot()? == DefaultBoot::Installer {
                tracing::warn!("the installer is what boots: what it needs stays on the recovery partition");
                return Ok(());
            }
            if folder.join("install.json").exists() {
                recovery.clear_job()?;
            }
            if recovery.marco_dir().join(journal::FILE_NAME).exists() {
                let _writable = recovery.open_for_writing()?;
                remove(&folder.join(journal::FILE_NAME));
            }
            recovery.remove_identity()?;
            // A power cut right after the switch leaves it.
            if let Err(error) = install::remove_supervisor(&root) {
                tracing::warn!(error = %error, "supervisor of a trial left in the root");
            }
            recovery.forget_going_back()?;
            if downloads.exists() && step::at("remove", &downloads, &[]).is_ok() {
                let _ = std::fs::remove_dir_all(&downloads);
            }
            // Leftovers of an installer's download take room from the next set.
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

    pub(super) fn recovery_or_fail(&self) -> Result<BootPart, StepError> {
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

/// Returns the file systems that the installer formats for this update.
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

/// Writes into a hasher, for `io::copy`.
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

/// Removes a file that is no longer needed. Best effort: one that stays does no harm.
fn remove(path: &Path) {
    if let Err(error) = durable::remove(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::debug!(file = %path.display(), error = %error, "file not removed");
    }
}

pub(super) async fn off_runtime<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
) -> Result<T, StepError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(StepError::Failed(Failure::new("AGENT_BUG", format!("a step did not end well: {error}"))))
    })
}
