//! A Raspberry Pi that runs its installer: the agent is the only program of an initramfs, and the card can be erased.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rustix::system::RebootCommand;

use super::disk::plan::{Part, Plan};
use super::disk::{self, Access, Disk, find};
use super::host::board;
use super::rooted::Rooted;
use super::test_firmware::TestFirmware;
use super::{
    Booted, Card, Down, Erase, Facts, Force, Layout, Lease, Mode, OwnLog, RawTarget, Ready, Reboot, Refusal, Room,
    Stretch, System, SystemError, SystemFacts, Target, WholeCard,
};
use crate::health::Condition;
use crate::settings::{Policy, Settings, SettingsError};

mod prepare;
mod raw;
mod watchdog;
mod whole;

use watchdog::Watchdog;

/// Folder of the card's mount points.
const MOUNTS: &str = "/run/marco";
/// The running program, which an installation copies into the new root.
const PROGRAM: &str = "/proc/self/exe";
/// Time limit: checking a FAT of 256 MiB takes seconds, on a failing card perhaps more.
const CHECK_TIME: Duration = Duration::from_secs(120);
const FSCK_FAT: &str = "/sbin/fsck.vfat";
/// Only in a bootcode to which an operator added a shell.
const SHELL: &str = "/bin/sh";

/// This machine, in its installer.
pub struct Installer {
    disk: Disk,
    card: Card,
    settings: Settings,
    wrong: Option<SettingsError>,
    test: Option<TestFirmware>,
    /// Held by every writer into the target.
    target: Arc<tokio::sync::Mutex<()>>,
    watchdog: Watchdog,
    /// Called right before the machine goes down.
    last_words: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    /// New place of the recovery partition after the next restart. `None`: it stays.
    move_to: Mutex<Option<Part>>,
    log: OwnLog,
}

impl std::fmt::Debug for Installer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Installer").field("disk", &self.disk).finish_non_exhaustive()
    }
}

impl Installer {
    /// Finds the card and mounts its recovery partition. `None`: no card has one yet.
    ///
    /// # Errors
    /// The card is there, but cannot be used.
    pub async fn find() -> Result<Option<Self>, SystemError> {
        let test = TestFirmware::find(Path::new("/"));
        let found = blocking(|| Ok(find::card(&Path::new(MOUNTS).join("look"))?)).await?;
        let disk = match found {
            Some(disk) => disk,
            None => match test.as_ref().and_then(|test| test.join.as_deref()) {
                // Only a disk without any partition: nothing on it can be lost.
                Some(join) => match find::disks().into_iter().find(|disk| disk.parts().is_ok_and(|all| all.is_empty()))
                {
                    Some(disk) => prepare::blank(disk, join, Path::new(MOUNTS)).await?,
                    None => return Ok(None),
                },
                None => return Ok(None),
            },
        };
        let part = |name| Path::new(MOUNTS).join(name);
        let card = Card { recovery: part("recovery"), boot: part("boot"), root: part("root"), home: part("home") };
        let recovery = disk.partition(1);
        if Path::new(FSCK_FAT).exists() {
            // fsck's exit status only reports repairs. Damage that it cannot repair shows at the mount.
            let checked = super::command::run(&[FSCK_FAT, "-a", &recovery.to_string_lossy()], CHECK_TIME).await;
            tracing::debug!(outcome = ?checked, "recovery partition checked");
        }
        let (mounted, at) = (disk.clone(), card.clone());
        blocking(move || {
            disk::unmount(&at.recovery)?;
            disk::mount(&recovery, &at.recovery, Access::ReadWrite)?;
            // The old system is mounted for its keys. A blank card has none.
            for (number, at) in [(2, &at.root), (4, &at.boot)] {
                disk::unmount(at)?;
                std::fs::create_dir_all(at).map_err(SystemError::io("make", at))?;
                let device = mounted.partition(number);
                // A damaged old system must not stop the installation that replaces it.
                if device.exists()
                    && !disk::is_blank(&device).unwrap_or(false)
                    && let Err(error) = disk::mount(&device, at, Access::ReadOnly)
                {
                    tracing::warn!(number, error = %crate::cause::chain(&error), "old file system not mounted");
                }
            }
            Ok(())
        })
        .await?;
        // The error is kept for `wrong_settings`: the caller first sets up the log on the card, which then shows it.
        let (settings, wrong) = Settings::read_or_default(&card.recovery);
        Ok(Some(Self {
            disk,
            card,
            settings,
            wrong,
            test,
            target: Arc::default(),
            watchdog: Watchdog::start(),
            last_words: Mutex::default(),
            move_to: Mutex::default(),
            log: OwnLog::default(),
        }))
    }

    /// Restarts an installer on a trial boot, which found no card to work on, into the old system. Returns if it is on no
    /// trial, which makes this restart the last one, or if the machine stays up.
    pub fn leave_without_a_card() {
        let test = TestFirmware::find(Path::new("/"));
        let booted = test.as_ref().map_or_else(|| board::booted(Path::new("/")), |test| Some(test.booted));
        if booted.is_none_or(|booted| !booted.tryboot) {
            return;
        }
        tracing::error!("no card to work on, the old system is started again");
        if let Some(test) = &test {
            test.announce(Reboot::Plain);
        }
        if let Err(error) = rustix::system::reboot(RebootCommand::Restart) {
            tracing::error!(error = %error, "machine does not restart");
        }
    }

    /// The settings on the card, or the defaults for wrong ones: an installer that ended instead could not say so.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The error of wrong settings.
    pub fn wrong_settings(&self) -> Option<&SettingsError> {
        self.wrong.as_ref()
    }

    /// Refuses an installation that would divide the card by the defaults because its settings are wrong.
    async fn check_settings(&self) -> Result<(), SystemError> {
        let Some(wrong) = &self.wrong else { return Ok(()) };
        let (disk, wrong) = (self.disk.clone(), crate::cause::chain(wrong));
        blocking(move || prepare::check_settings(&disk, &wrong)).await
    }

    /// Sets a function that is called right before the machine goes down, for data that must be on the card by then.
    pub fn on_going_down(&self, last_words: impl FnOnce() + Send + 'static) {
        *self.last_words.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(last_words));
    }

    /// New place for the recovery partition, if it lies in the way. `None`: it can stay.
    async fn recovery_in_the_way_of(&self, room: Room) -> Result<Option<Part>, SystemError> {
        let (disk, settings) = (self.disk.clone(), self.settings.clone());
        blocking(move || match room {
            Room::Whole(image) => disk.behind(image),
            Room::Resident(_) => match disk.plan(&settings)? {
                Plan::Move(to) => Ok(Some(to)),
                Plan::Keep | Plan::Write(_) => Ok(None),
            },
        })
        .await
    }

    /// Sets the source of the log that is kept on the card.
    pub fn log_is_from(&self, read: impl Fn() -> Vec<u8> + Send + Sync + 'static) {
        self.log.is_from(read);
    }

    /// Goes down at once. There are no services to stop, but the card's file systems are closed first.
    async fn go_down(&self, down: Down, how: Reboot) -> Result<(), SystemError> {
        if let Some(last_words) = self.last_words.lock().unwrap_or_else(PoisonError::into_inner).take() {
            last_words();
        }
        let (card, disk) = (self.card.clone(), self.disk.clone());
        let move_to = self.move_to.lock().unwrap_or_else(PoisonError::into_inner).take();
        blocking(move || {
            rustix::fs::sync();
            // Home first: it is mounted within the root.
            for at in [&card.root.join("home"), &card.root, &card.boot, &card.recovery] {
                // A file may still be open. Then its file system is synced and made read-only instead.
                if let Err(error) = disk::unmount(at).or_else(|_| disk::make_read_only(at)) {
                    tracing::warn!(error = %crate::cause::chain(&error), "file system not closed");
                }
            }
            rustix::fs::sync();
            // Only now, since nothing writes to the recovery partition any longer.
            move_to.map_or(Ok(()), |to| disk.move_recovery(to))
        })
        .await?;
        if let (Some(test), Down::Reboot) = (&self.test, down) {
            test.announce(how);
        }
        let failed = SystemError::io("restart", "/");
        match (down, how) {
            (Down::Reboot, Reboot::TryBoot) => marco_syscalls::restart_with(c"0 tryboot").map(|_| ()).map_err(failed),
            (Down::Reboot, Reboot::Plain) => {
                rustix::system::reboot(RebootCommand::Restart).map_err(|error| failed(error.into()))
            }
            (Down::PowerOff, _) => {
                rustix::system::reboot(RebootCommand::PowerOff).map_err(|error| failed(error.into()))
            }
        }
    }
}

#[async_trait]
impl System for Installer {
    fn boot_id(&self) -> Result<String, SystemError> {
        super::host::boot_id(Path::new("/"))
    }

    fn facts(&self) -> Result<Facts, SystemError> {
        let found = board::read(Path::new("/"));
        let board = match &self.test {
            Some(test) => test.board(found),
            None => found,
        };
        // A table that cannot be read tells no layout. An installation refuses it later, with the reason.
        let parts = self.disk.parts().unwrap_or_default();
        let layout = match (disk::plan::is_resident(&parts), parts.is_empty()) {
            (true, _) => Layout::Resident,
            (false, false) => Layout::Single,
            (false, true) => Layout::Unknown,
        };
        Ok(Facts { board, system: SystemFacts { os: "Marco installer".into(), layout, ..super::host::kernel_facts() } })
    }

    fn mode(&self) -> Mode {
        Mode::Installer
    }

    fn booted(&self) -> Option<Booted> {
        self.test.as_ref().map_or_else(|| board::booted(Path::new("/")), |test| Some(test.booted))
    }

    fn card(&self) -> Option<Card> {
        Some(self.card.clone())
    }

    fn disk_to_name(&self) -> Option<String> {
        find::to_be_named(&self.disk)
    }

    fn root(&self) -> PathBuf {
        self.card.root.clone()
    }

    fn state_dir(&self) -> PathBuf {
        self.card.recovery.join("marco")
    }

    fn identity_dir(&self) -> PathBuf {
        self.card.recovery.join("marco")
    }

    fn holds_system(&self) -> bool {
        // If in doubt, the card holds a system: data that cannot be read may still be an owner's.
        let device = self.disk.partition(2);
        let there = device.exists() && !disk::is_blank(&device).unwrap_or(false);
        let entries = Rooted::open(&self.card.root).and_then(|root| root.list("")).unwrap_or_default();
        let mounted = find::mounted_at(&self.disk.partition(2)).is_some();
        there && (!mounted || entries.iter().any(|(name, _)| name != "lost+found"))
    }

    fn agent_program(&self) -> Option<PathBuf> {
        Some(PROGRAM.into())
    }

    async fn announce(&self, down: Down, delay: Duration, message: &str) -> Result<bool, SystemError> {
        // No user can be logged in to an initramfs.
        tracing::info!("{}", super::announcement(down, delay, message));
        Ok(false)
    }

    async fn withdraw(&self) -> Result<(), SystemError> {
        tracing::info!("{}", super::WITHDRAWN);
        Ok(())
    }

    async fn reboot(&self, how: Reboot, _execution: Option<&str>, _message: &str) -> Result<(), SystemError> {
        self.go_down(Down::Reboot, how).await
    }

    async fn power_off(&self, _execution: Option<&str>, _message: &str) -> Result<(), SystemError> {
        self.go_down(Down::PowerOff, Reboot::Plain).await
    }

    async fn force(&self, down: Down, how: Reboot, _force: Force, _execution: Option<&str>) -> Result<(), SystemError> {
        self.go_down(down, how).await
    }

    fn conditions(&self) -> Vec<Condition> {
        super::ailing_disk(&self.state_dir()).into_iter().chain(super::wrong_settings(&self.card.recovery)).collect()
    }

    async fn preflight_update(&self) -> Result<(), Refusal> {
        Ok(())
    }

    async fn check_kept(&self, erase: Erase) -> Result<(), Refusal> {
        let checked = async {
            self.check_settings().await?;
            prepare::check_kept(&self.disk, &self.card, &self.settings, erase).await
        };
        checked.await.map_err(|error| match error {
            SystemError::Refused(refusal) => refusal,
            error => Refusal { reason: "CARD_UNREADABLE", message: crate::cause::chain(&error) },
        })
    }

    async fn check_target(&self, room: Room) -> Result<Ready, SystemError> {
        if let Room::Resident(needs) = room {
            let (disk, settings) = (self.disk.clone(), self.settings.clone());
            blocking(move || disk.fits(&settings, needs)).await?;
        }
        let moves = self.recovery_in_the_way_of(room).await?.is_some();
        Ok(if moves { Ready::AfterRestart } else { Ready::Now })
    }

    async fn move_recovery(&self, room: Room) -> Result<(), SystemError> {
        let to = self.recovery_in_the_way_of(room).await?;
        *self.move_to.lock().unwrap_or_else(PoisonError::into_inner) = to;
        Ok(())
    }

    async fn prepare_target(&self, erase: Erase) -> Result<Target, SystemError> {
        self.check_settings().await?;
        let lease = Lease::new(Arc::clone(&self.target).lock_owned().await);
        prepare::prepare(&self.disk, &self.card, &self.settings, erase, lease).await
    }

    async fn label_boot(&self, target: &Target, label: &str) -> Result<(), SystemError> {
        prepare::label_boot(&self.disk, target, label, &self.settings.boot.mkfs_options).await
    }

    fn takes_disk_images(&self) -> bool {
        true
    }

    async fn raw_target(&self, target: &Target) -> Result<RawTarget, SystemError> {
        raw::open(&self.disk, target).await
    }

    async fn mount_raw(&self, target: &Target) -> Result<(), SystemError> {
        raw::mount(&self.disk, &self.card, target).await
    }

    async fn whole_card(&self) -> Result<WholeCard, SystemError> {
        let lease = Lease::new(Arc::clone(&self.target).lock_owned().await);
        let (disk, card) = (self.disk.clone(), self.card.clone());
        blocking(move || whole::open(&disk, &card, lease)).await
    }

    async fn mount_whole(&self, boot: Stretch, root: Stretch, lease: Lease) -> Result<Target, SystemError> {
        whole::mount(&self.disk, &self.card, boot, root, lease).await
    }

    async fn finish_whole(&self, target: Target, first: [u8; 512]) -> Result<(), SystemError> {
        let disk = self.disk.clone();
        blocking(move || {
            prepare::finish(&target)?;
            disk.write_first(&first)
        })
        .await
    }

    async fn finish_target(&self, target: Target) -> Result<(), SystemError> {
        blocking(move || prepare::finish(&target)).await
    }

    fn keep_line(&self, _line: &str) {
        // The process that started the agent already keeps the whole log.
    }

    fn kept_log(&self) -> Vec<u8> {
        // It begins with the log of earlier starts that the card had.
        self.log.read()
    }

    fn gives_up_after(&self) -> Option<Duration> {
        let failure = &self.settings.failure;
        let shell = Path::new(SHELL).exists();
        match failure.policy {
            Policy::Retry => None,
            Policy::Shell if !shell => None,
            Policy::Reboot | Policy::PowerOff | Policy::Shell => Some(failure.after),
        }
    }

    async fn give_up(&self) -> Result<(), SystemError> {
        tracing::warn!(policy = ?self.settings.failure.policy, "the installation failed");
        match self.settings.failure.policy {
            Policy::Retry => Ok(()),
            Policy::Reboot => self.go_down(Down::Reboot, Reboot::Plain).await,
            Policy::PowerOff => self.go_down(Down::PowerOff, Reboot::Plain).await,
            Policy::Shell => super::command::on_console(&[SHELL, "-i"]).await,
        }
    }

    fn feed_watchdog(&self) {
        self.watchdog.feed();
    }
}

/// Runs work on files and devices off the runtime, which it would block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SystemError> + Send + 'static,
) -> Result<T, SystemError> {
    let ended = tokio::task::spawn_blocking(work).await;
    ended.map_err(|error| SystemError::Invalid(format!("work on the card did not end: {error}")))?
}
