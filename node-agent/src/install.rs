//! The installer: an image streamed, checked, unpacked into the root and the boot partition, with no temporary file.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use chrono::{DateTime, SecondsFormat, Utc};
use marco_archive::Compression;
use marco_archive::disk::Needs;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::bootpart::{BootError, BootPart, DefaultBoot, InstallJob, Instruction};
use crate::download::{self, Download, DownloadError, Downloader};
use crate::job::{CALLED_OFF, Labels, phase};
use crate::settings::Settings;
use crate::system::rooted::Rooted;
use crate::system::{
    Board, Card, Erase, Lease, NO_PARTITIONS, Ready, Release, Room, System, SystemError, Target, release,
};
use first_boot::give_on;
use personal::Keep;
use trial::Supervision;
use unpack::Destination;
use verdict::Verdict;

mod agent;
mod boot_files;
mod cloud_init;
mod first_boot;
mod personal;
mod plan;
mod raw;
mod stream;
mod trial;
mod unpack;
mod verdict;
mod whole;
mod write_back;

pub use agent::LONG_VERSION;
pub(crate) use boot_files::end_trial;
pub(crate) use trial::remove_supervisor;

/// The agent's state folder within a root.
const STATE_DIR: &str = "var/lib/marco-agent";
/// Reason of a failure: the image cannot start this board.
pub(crate) const NOT_A_SYSTEM: &str = "NOT_A_SYSTEM";
/// Bytes of the stream between two reports of progress.
const STEP: u64 = 512 * 1024;

/// Receives the phase, the bytes done and the bytes in all (0: unknown).
pub type Progress = Arc<dyn Fn(Phase, u64, u64) + Send + Sync>;
/// Writes the running execution, in state trial, into the agent's state folder of the new root. Blocking.
pub type WriteJournal = Arc<dyn Fn(&Path) -> std::io::Result<()> + Send + Sync>;

/// Inputs of an installation, and its callbacks.
#[derive(Clone)]
pub struct Context {
    /// Writes the journal of the new root.
    pub journal: WriteJournal,
    /// The controller's time, for `/etc/marco-release`.
    pub now: DateTime<Utc>,
    /// Receives progress. The first report of [`Phase::Partitioning`] comes before anything of the card is touched.
    pub progress: Progress,
    /// The node's labels; `None`: no controller has said them yet.
    pub labels: watch::Receiver<Option<Labels>>,
    /// Returns false if the installation was called off. Asked right before the card is touched for the first time.
    pub stands: Arc<dyn Fn() -> bool + Send + Sync>,
}

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
    /// Writing host name, keys, agent and identity into the new root.
    Personalising,
    /// Writing everything to the card.
    Syncing,
}

impl Phase {
    /// Returns the word for a report.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => phase::CONNECTING,
            Self::Partitioning => phase::PARTITIONING,
            Self::Unpacking => phase::UNPACKING,
            Self::BootFiles => phase::WRITING_BOOT_FILES,
            Self::Personalising => phase::PERSONALISING,
            Self::Syncing => phase::SYNCING,
        }
    }
}

/// The system that has to boot after an installation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The new system.
    System,
    /// The installer, which then begins again: it has made room for itself.
    Installer,
}

/// An installation failed. The installer stays the default boot if the card was touched.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct InstallError {
    /// A stable word for programs, for example `NOT_A_SYSTEM`.
    pub reason: &'static str,
    /// A sentence for people.
    pub message: String,
    /// Another try with the same artifact can end otherwise (a cut connection, not a bad image).
    pub retryable: bool,
}

impl InstallError {
    fn io(message: impl Into<String>) -> Self {
        Self { reason: "DISK_IO", message: message.into(), retryable: true }
    }

    fn disk(doing: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |error| {
            if error.kind() == std::io::ErrorKind::StorageFull {
                let message = format!("the card has no room: cannot {doing}");
                return Self { reason: "NO_ROOM", message, retryable: false };
            }
            Self::io(format!("cannot {doing}: {error}"))
        }
    }

    fn image(message: impl Into<String>) -> Self {
        Self { reason: "IMAGE_REFUSED", message: message.into(), retryable: false }
    }

    fn not_a_system(message: impl Into<String>) -> Self {
        Self { reason: NOT_A_SYSTEM, message: message.into(), retryable: false }
    }
}

/// Joins the error and its causes in one sentence, for people far from the log.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl From<DownloadError> for InstallError {
    fn from(error: DownloadError) -> Self {
        let retryable = matches!(error, DownloadError::GivenUp { .. } | DownloadError::Io(_));
        Self { reason: error.reason(), message: sentence(&error), retryable }
    }
}

impl From<BootError> for InstallError {
    fn from(error: BootError) -> Self {
        let retryable = !matches!(error, BootError::Refused(_));
        Self { reason: error.reason(), message: sentence(&error), retryable }
    }
}

impl From<SystemError> for InstallError {
    fn from(error: SystemError) -> Self {
        if let SystemError::Refused(refusal) = error {
            return Self { reason: refusal.reason, message: refusal.message, retryable: false };
        }
        let retryable = !matches!(error, SystemError::Unsupported(_));
        Self { reason: "SYSTEM_ERROR", message: sentence(&error), retryable }
    }
}

impl From<marco_archive::Error> for InstallError {
    fn from(error: marco_archive::Error) -> Self {
        match error {
            marco_archive::Error::Refused(refused) => Self::image(refused.to_string()),
            marco_archive::Error::Io { action, source } if source.kind() == std::io::ErrorKind::StorageFull => {
                let message = format!("the card has no room: cannot {action}");
                Self { reason: "NO_ROOM", message, retryable: false }
            }
            error => Self::io(sentence(&error)),
        }
    }
}

/// Runs the job on the card: first chunk (or whole zip) verified → the job's set and the installer made the default
/// (step 4 of an update) → file systems → everything unpacked → personalised → on the card. Then a restart is due.
///
/// # Errors
/// Each with its reason: `IMAGE_REFUSED` and `BOOTCODE_REFUSED` (the archive breaks a rule), `NOT_A_SYSTEM` (it has
/// no boot files for this board), `NO_ROOM`, `DISK_IO`, and those of downloads and of the recovery partition.
pub async fn install(
    job: &InstallJob,
    system: &Arc<dyn System>,
    downloader: &Downloader,
    context: Context,
    cancel: &CancellationToken,
) -> Result<Next, InstallError> {
    let card = system.card().ok_or(SystemError::Unsupported("only a card in layout resident can be installed"))?;
    let board = system.facts()?.board;
    let part = BootPart::new(&card.recovery, &board);
    let work = Work { job, system, downloader, part, card, board, context };
    match &job.instruction {
        Instruction::Install { sha256, raw: false, .. } => work.image(sha256, cancel).await,
        Instruction::Install { sha256, raw: true, .. } => work.whole(sha256, cancel).await,
        Instruction::BootOnly { sha256 } => work.boot_only(sha256, cancel).await,
    }
}

/// An installation and what it needs.
struct Work<'a> {
    job: &'a InstallJob,
    system: &'a Arc<dyn System>,
    downloader: &'a Downloader,
    part: BootPart,
    card: Card,
    board: Board,
    context: Context,
}

impl Work<'_> {
    /// Removes leftovers of interrupted installations from the recovery partition, which has room for one download.
    async fn sweep_downloads(&self, keep: Option<&str>) -> Result<(), InstallError> {
        let (folder, keep) = (self.part.marco_dir(), keep.map(str::to_owned));
        blocking(move || {
            download::sweep(&folder, keep.as_deref());
            Ok(())
        })
        .await
    }

    async fn image(&self, sha256: &str, cancel: &CancellationToken) -> Result<Next, InstallError> {
        self.sweep_downloads(None).await?;
        self.phase(Phase::Connecting);
        let mut download = self.downloader.stream(sha256, cancel).await?;
        // Shows the kind of the image, and that bytes arrive, before anything is touched.
        let first = download.chunks.recv().await.transpose()?;

        let verdict = Verdict::of(&download, first.as_deref().unwrap_or_default())?;
        self.judge(&download)?;
        let disk = verdict.disk;
        // Before the card's kind: an image that does not fit is refused on every card.
        let room = Room::Resident(verdict.needs(&download)?);
        self.system.check_target(room).await?;
        if disk && !self.system.takes_disk_images() {
            return Err(SystemError::Unsupported(NO_PARTITIONS).into());
        }

        // Before the commit: an installer that gets no labels can still go back.
        self.labels_are_known().await?;
        let keep = self.keep().await?;
        let erase = Erase { root: true, home: self.job.discard_home };
        if self.commit(room, erase).await? == Ready::AfterRestart {
            return Ok(Next::Installer);
        }
        let mut target = self.system.prepare_target(erase).await?;

        let into = match disk {
            true => Destination::Partitions(self.system.raw_target(&target).await?),
            false => Destination::Folder(target.root.clone()),
        };
        self.unpack(download, verdict.compression, first, into, target.lease.clone()).await?;
        if disk {
            self.system.mount_raw(&target).await?;
            // The image brings its own file system, whatever `install.toml` says.
            "ext4".clone_into(&mut target.root_type);
        }

        self.phase(Phase::BootFiles);
        let given = self.given().await?;
        if !disk {
            self.label_boot(&target, &given, None).await?;
        }
        let supervision = self.supervision();
        let (fitted, board, node) = (target.clone(), self.board.clone(), self.job.node.clone());
        blocking(move || {
            let (root, boot) = open(&fitted)?;
            let mount = if disk { boot_files::mounted(&root)? } else { boot_files::find(&root, &board)? };
            if !disk {
                boot_files::move_from(&root, mount, &boot)?;
            }
            boot_files::check(&boot, &board)?;
            boot_files::fit(&root, &boot, &board, &fitted, &supervision)?;
            give_on(&given, &root, &boot, &node)?;
            let disk = InstallError::disk("rewrite /etc/fstab");
            let fstab = root.read("etc/fstab").map_err(&disk)?.unwrap_or_default();
            let fstab = plan::fstab(&String::from_utf8_lossy(&fstab), &fitted, mount);
            root.write("etc/fstab", fstab.as_bytes(), 0o644).map_err(disk)
        })
        .await?;

        let release = Release { image_sha256: sha256.to_owned(), ..self.release() };
        self.personalise(&target, keep, &release).await?;
        self.name(&target, &release).await?;
        self.system.finish_target(target).await?;
        self.installed(Next::System)
    }

    /// Fails if the image cannot start this board, by the controller's facts. Without facts this passes, and the
    /// installation notices it after unpacking.
    fn judge(&self, download: &Download) -> Result<(), InstallError> {
        // Unknown is no refusal: a wrong one could not be overruled, and the real files are checked later.
        let Some(facts) = &download.facts else { return Ok(()) };
        facts.judge(&self.board.family, self.board.device_tree()).map_err(InstallError::not_a_system)
    }

    /// Saves the node's own files before anything touches the old system.
    async fn keep(&self) -> Result<Keep, InstallError> {
        let (part, old, job) = (self.part.clone(), self.card.root.clone(), self.job.clone());
        blocking(move || Keep::save(&part, Rooted::open(&old).ok().as_ref(), &job)).await
    }

    /// Streams the image to its place, and reports progress.
    async fn unpack(
        &self,
        download: Download,
        compression: Compression,
        first: Option<Bytes>,
        into: Destination,
        lease: Lease,
    ) -> Result<Option<whole::Written>, InstallError> {
        self.phase(Phase::Unpacking);
        let (progress, total, mut told) = (Arc::clone(&self.context.progress), download.size_bytes, 0);
        let tell = Box::new(move |done: u64| {
            if done == total || done >= told + STEP {
                told = done;
                progress(Phase::Unpacking, done, total);
            }
        });
        unpack::unpack(download, compression, first, into, lease, self.system.as_ref(), tell).await
    }

    /// Makes the new system this node's own.
    async fn personalise(&self, target: &Target, keep: Keep, release: &Release) -> Result<(), InstallError> {
        self.phase(Phase::Personalising);
        let (personal, node) = (target.clone(), self.job.node.clone());
        let (program, identity) = (self.system.agent_program(), self.system.identity_dir());
        let text = release.render()?;
        blocking(move || {
            let root = open(&personal)?.0;
            keep.restore(&root, &node).map_err(InstallError::disk("make the system this node's own"))?;
            if let Some(program) = program {
                let kept = agent::install(&root, &program).map_err(InstallError::disk("install the agent"))?;
                tracing::info!(the_images_own = kept, "agent installed");
                agent::identify(&root, &identity).map_err(InstallError::disk("install the node's identity"))?;
            }
            root.write(release::ROOT_FILE, text.as_bytes(), 0o644).map_err(InstallError::disk("write the release"))
        })
        .await
    }

    async fn boot_only(&self, sha256: &str, cancel: &CancellationToken) -> Result<Next, InstallError> {
        self.phase(Phase::Connecting);
        let zip = download::file_in(&self.part.marco_dir(), sha256);
        self.sweep_downloads(Some(sha256)).await?;
        let progress = Arc::clone(&self.context.progress);
        let tell: download::Progress = Arc::new(move |done, total| progress(Phase::Connecting, done, total));
        // Boot files are small: all of the zip is on the card and checked before anything is replaced.
        self.downloader.to_file(sha256, &zip, tell, cancel).await?;
        let (path, board) = (zip.clone(), self.board.clone());
        let brings_data = blocking(move || {
            let summary = marco_archive::check_zip(open_zip(&path)?).map_err(bootcode)?;
            marco_archive::check_system_set(&summary).map_err(|refused| bootcode(refused.into()))?;
            let facts = marco_archive::Facts::of_zip(&summary);
            facts.judge(&board.family, board.device_tree()).map_err(InstallError::not_a_system)?;
            Ok(summary.files.iter().any(|file| file.name == cloud_init::USER_DATA))
        })
        .await?;

        self.labels_are_known().await?;
        let erase = Erase { root: false, home: false };
        if self.commit(Room::Resident(Needs::default()), erase).await? == Ready::AfterRestart {
            return Ok(Next::Installer);
        }
        let target = self.system.prepare_target(erase).await?;
        self.phase(Phase::BootFiles);
        // Without the data of its first boot cloud-init takes itself to be on another machine.
        let given = self.given().await?.of_cloud_init();
        self.label_boot(&target, &given, Some(brings_data)).await?;
        let supervision = self.supervision();
        let (fitted, board, path, node) = (target.clone(), self.board.clone(), zip.clone(), self.job.node.clone());
        blocking(move || {
            marco_archive::unpack_zip(open_zip(&path)?, &fitted.boot).map_err(bootcode)?;
            let (root, boot) = open(&fitted)?;
            boot_files::check(&boot, &board)?;
            boot_files::fit(&root, &boot, &board, &fitted, &supervision)?;
            if cloud_init::is_there(&root) { give_on(&given, &root, &boot, &node) } else { Ok(()) }
        })
        .await?;
        let release = Release { boot_sha256: sha256.to_owned(), ..self.release() };
        self.name(&target, &release).await?;
        self.system.finish_target(target).await?;
        blocking(move || crate::durable::remove(&zip).map_err(InstallError::disk("remove the zip"))).await?;
        self.installed(Next::System)
    }

    fn supervision(&self) -> Supervision {
        // The root is erased by now: settings that are wrong are told in the log, and are no reason to stop here.
        let (settings, _) = Settings::read_or_default(&self.card.recovery);
        Supervision { program: self.system.supervisor_program(), limit: settings.trial.limit }
    }

    /// Step 4 of an update: from here on every boot is this installer, which starts over by itself. Then the card may
    /// be touched, at once or after a restart.
    async fn commit(&self, room: Room, erase: Erase) -> Result<Ready, InstallError> {
        // Refused while the old system still boots.
        if matches!(room, Room::Resident(_)) {
            self.system.check_kept(erase).await.map_err(SystemError::from)?;
        }
        let ready = self.system.check_target(room).await?;
        self.phase(Phase::Partitioning);
        let (part, prefix, stands) = (self.part.clone(), self.job.prefix, Arc::clone(&self.context.stands));
        blocking(move || {
            // Not asked again later: once the installer is the default, there is nothing to go back to.
            if !stands() && part.default_boot()? == DefaultBoot::System {
                let message = "it was called off before the card was touched";
                return Err(InstallError { reason: CALLED_OFF, message: message.into(), retryable: false });
            }
            part.make_default(prefix)?;
            Ok(part.set_boot_partition(DefaultBoot::Installer)?)
        })
        .await?;
        if ready == Ready::AfterRestart {
            tracing::info!(execution = %self.job.execution, "the recovery partition moves, and the installer begins again");
            self.system.move_recovery(room).await?;
        }
        Ok(ready)
    }

    /// Writes the last files, which name this execution.
    async fn name(&self, target: &Target, release: &Release) -> Result<(), InstallError> {
        self.phase(Phase::Syncing);
        let (named, journal, text) = (target.clone(), Arc::clone(&self.context.journal), release.render()?);
        blocking(move || {
            let (root, boot) = open(&named)?;
            let disk = InstallError::disk("write what names this installation");
            boot.write(release::BOOT_FILE, text.as_bytes(), 0o644).map_err(&disk)?;
            // By its descriptor: a link in the image must not lead the journal out of the root.
            let folder = root.folder(STATE_DIR).map_err(&disk)?;
            journal(Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd()))).map_err(disk)
        })
        .await
    }

    fn installed(&self, next: Next) -> Result<Next, InstallError> {
        tracing::info!(execution = %self.job.execution, "installed");
        Ok(next)
    }

    fn release(&self) -> Release {
        let time = self.context.now.to_rfc3339_opts(SecondsFormat::Secs, true);
        Release { execution: self.job.execution.clone(), time, ..Release::default() }
    }

    fn phase(&self, phase: Phase) {
        self.system.feed_watchdog();
        tracing::info!(execution = %self.job.execution, phase = phase.as_str(), "installing");
        self.system.keep_line(&format!("{}: {}", self.job.execution, phase.as_str()));
        (self.context.progress)(phase, 0, 0);
    }
}

/// Opens both file systems. The lease is in the target that the caller holds.
fn open(target: &Target) -> Result<(Rooted, Rooted), InstallError> {
    let rooted = |path: &Path| Rooted::open(path).map_err(InstallError::disk("open the new file systems"));
    Ok((rooted(&target.root)?, rooted(&target.boot)?))
}

fn open_zip(path: &Path) -> Result<std::fs::File, InstallError> {
    std::fs::File::open(path).map_err(InstallError::disk("open the boot files' zip"))
}

/// Converts an error, with the reason for boot files instead of that for an image.
fn bootcode(error: marco_archive::Error) -> InstallError {
    let error = InstallError::from(error);
    if error.reason == "IMAGE_REFUSED" { InstallError { reason: "BOOTCODE_REFUSED", ..error } } else { error }
}

/// Runs work on files on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, InstallError> + Send + 'static,
) -> Result<T, InstallError> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.map_err(|error| InstallError::io(format!("a step of the installation did not end: {error}")))?
}

#[cfg(test)]
mod tests;
