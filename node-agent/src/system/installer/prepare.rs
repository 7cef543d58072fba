//! Prepares the card's file systems for an installation, and closes them after it.

use std::path::Path;
use std::time::{Duration, Instant};

use super::super::disk::erasure::{Begun, Erasure};
use super::super::disk::plan::Plan;
use super::super::disk::probe::probe;
use super::super::disk::{self, Access, Disk, find, kept};
use super::super::{Card, Erase, Lease, Refusal, SETTINGS_WRONG, SystemError, Target};
use super::blocking;
use crate::settings::Settings;

/// Marker file on a new home. Until the installation is complete, the image's files for its users go there.
const NEW_HOME: &str = ".marco-new";
/// Time limit for the kernel to show a partition's device.
const PATIENCE: Duration = Duration::from_secs(10);

/// Partitions, makes file systems, and mounts them. An interrupted try starts again from the beginning.
///
/// # Errors
/// Returns an error if the card fails, or if contents that are to be kept are not understood. Then nothing was written.
pub(super) async fn prepare(
    disk: &Disk,
    card: &Card,
    settings: &Settings,
    erase: Erase,
    lease: Lease,
) -> Result<Target, SystemError> {
    let (closed, wanted, at) = (disk.clone(), settings.clone(), card.clone());
    blocking(move || {
        // An earlier try in this boot may have left them mounted.
        for at in [&at.root.join("home"), &at.root, &at.boot, &at.home] {
            disk::unmount(at)?;
        }
        // The kernel may still show the partitions of a raw image.
        if closed.plan(&wanted)? == Plan::Keep { closed.partition_resident(&wanted).map(drop) } else { Ok(()) }
    })
    .await?;
    // Everything is decided before anything is written: a refusal must leave the card as it is.
    let begun = begun(disk, card).await?;
    let decided = kept::decide(disk, settings, erase, begun).await?;
    let (closed, wanted) = (disk.clone(), settings.clone());
    let new_table = blocking(move || closed.partition_resident(&wanted)).await?;
    let (boot, root, home) = (disk.partition(4), disk.partition(2), disk.partition(3));
    for device in [&boot, &root, &home] {
        appear(device).await?;
    }
    tracing::info!(disk = %disk.device.display(), new_table, "card partitioned");
    // The boot partition first: a card that cannot be written must fail before the root is erased.
    disk.make_fat(Erasure::of_boot(), "BOOT", &settings.boot.mkfs_options).await?;
    let (new_root, new_home) = (decided.root.is_some(), decided.home.is_some());
    let begin = async |begun| {
        let recovery = card.recovery.clone();
        blocking(move || kept::begin(&recovery, begun)).await
    };
    if let Some(erasure) = decided.root {
        // Recorded before each `mkfs`: a half-made file system is not recognised after a power cut.
        begin(Begun { root: true, ..begun }).await?;
        disk.make(erasure, &settings.root.kind, "ROOT", &settings.root.mkfs_options).await?;
    }
    if let Some(erasure) = decided.home {
        begin(Begun { root: new_root, home: true }).await?;
        disk.make(erasure, &settings.home.kind, "HOME", &settings.home.mkfs_options).await?;
    }
    let (disk, card) = (disk.clone(), card.clone());
    blocking(move || {
        disk::mount(&root, &card.root, Access::ReadWrite)?;
        disk::mount(&boot, &card.boot, Access::ReadWrite)?;
        if new_home && new_root {
            // Home is mounted within the root, so that the image's users get their files.
            let at = card.root.join("home");
            disk::mount(&home, &at, Access::ReadWrite)?;
            std::fs::write(at.join(NEW_HOME), "").map_err(SystemError::io("write", at.join(NEW_HOME)))?;
            let folder = std::fs::File::open(&at).map_err(SystemError::io("open", &at))?;
            // The marker must be on the card before `end` removes the record: until `finish` one of them marks this
            // home as no user's.
            rustix::fs::syncfs(&folder).map_err(|error| SystemError::io("sync", &at)(error.into()))?;
        }
        kept::end(&card.recovery)?;
        let kind = |device: &Path| Ok::<_, SystemError>(disk::file_system(device)?.unwrap_or("auto").to_owned());
        Ok(Target {
            root_device: disk.partuuid(2)?,
            boot_device: disk.partuuid(4)?,
            home_device: disk.partuuid(3)?,
            root_type: kind(&root)?,
            home_type: kind(&home)?,
            root: card.root,
            boot: card.boot,
            lease,
        })
    })
    .await
}

/// Checks a card whose settings are wrong. Its partitions may be made anew where they are, with the defaults.
///
/// # Errors
/// Returns an error if the card has to be divided: that would be against its owner's wish.
pub(super) fn check_settings(disk: &Disk, wrong: &str) -> Result<(), SystemError> {
    if disk.plan(&Settings::default())? == Plan::Keep {
        return Ok(());
    }
    let message = format!("{wrong}; the card is not in the installer's layout, and the defaults do not divide it");
    Err(Refusal { reason: SETTINGS_WRONG, message }.into())
}

/// The decisions of an interrupted installation. A home that it made holds no owner's data yet.
async fn begun(disk: &Disk, card: &Card) -> Result<Begun, SystemError> {
    let (recovery, home, at) = (card.recovery.clone(), disk.partition(3), card.home.clone());
    blocking(move || {
        let begun = kept::begun(&recovery)?;
        Ok(Begun { home: begun.home || is_unfinished(&home, &at), ..begun })
    })
    .await
}

/// Checks that everything that is kept is understood, while the old system still boots. Nothing is written.
pub(super) async fn check_kept(disk: &Disk, card: &Card, settings: &Settings, erase: Erase) -> Result<(), SystemError> {
    kept::decide(disk, settings, erase, begun(disk, card).await?).await?;
    if erase.root {
        return Ok(());
    }
    // Boot files must fit the root, so its superblock alone is not enough: it must mount.
    let (root, at) = (disk.partition(2), card.root.clone());
    blocking(move || {
        if find::mounted_at(&root).is_some() {
            return Ok(());
        }
        disk::mount(&root, &at, Access::ReadOnly).map_err(|error| {
            let message = format!(
                "the root (p2) is to be kept, and cannot be mounted: {}; install an image, which makes it anew",
                crate::cause::chain(&error)
            );
            Refusal { reason: "PARTITION_NOT_UNDERSTOOD", message }.into()
        })
    })
    .await
}

/// Formats the boot partition again under this label, while nothing is on it. The owner's options follow it, and a
/// label among them wins.
pub(super) async fn label_boot(
    disk: &Disk,
    target: &Target,
    label: &str,
    options: &[String],
) -> Result<(), SystemError> {
    let at = target.boot.clone();
    blocking(move || disk::unmount(&at)).await?;
    disk.make_fat(Erasure::of_boot(), label, options).await?;
    let (device, at) = (disk.partition(4), target.boot.clone());
    blocking(move || disk::mount(&device, &at, Access::ReadWrite)).await
}

pub(super) async fn appear(device: &Path) -> Result<(), SystemError> {
    let begun = Instant::now();
    while !device.exists() {
        if begun.elapsed() > PATIENCE {
            return Err(SystemError::Invalid(format!("the kernel does not show {}", device.display())));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// True if an interrupted installation made this home. A home that cannot be mounted is an owner's, and kept.
pub(super) fn is_unfinished(home: &Path, at: &Path) -> bool {
    if disk::mount(home, at, Access::ReadOnly).is_err() {
        return false;
    }
    let unfinished = at.join(NEW_HOME).exists();
    let _ = disk::unmount(at);
    unfinished
}

/// Writes everything to the card and unmounts it.
pub(super) fn finish(target: &Target) -> Result<(), SystemError> {
    let home = target.root.join("home");
    let mark = home.join(NEW_HOME);
    // From here on home belongs to its users, and a later installation keeps it.
    if mark.exists() {
        std::fs::remove_file(&mark).map_err(SystemError::io("remove", &mark))?;
    }
    for at in [&home, &target.root, &target.boot] {
        let folder = match std::fs::File::open(at) {
            // The image has no home.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            opened => opened.map_err(SystemError::io("open", at))?,
        };
        rustix::fs::syncfs(&folder).map_err(|error| SystemError::io("sync", at)(error.into()))?;
        drop(folder);
        disk::unmount(at)?;
    }
    Ok(())
}

/// Creates a recovery partition with this join file on a disk without partitions.
///
/// # Errors
/// Returns an error if the disk fails, or holds data: a file system without a table, for example.
pub(super) async fn blank(disk: Disk, join: &str, mounts: &Path) -> Result<Disk, SystemError> {
    let erasure = Erasure::of_blank_disk(&probe(&disk.device).await)?;
    let empty = disk.clone();
    blocking(move || empty.partition_resident(&Settings::default())).await?;
    appear(&disk.partition(1)).await?;
    disk.make_fat(erasure, disk::RECOVERY_LABEL, &[]).await?;
    let (at, device, join) = (mounts.join("recovery"), disk.partition(1), join.to_owned());
    blocking(move || {
        disk::mount(&device, &at, Access::ReadWrite)?;
        let (folder, file) = (at.join("marco"), at.join("marco/join.toml"));
        std::fs::create_dir_all(&folder).map_err(SystemError::io("make", folder))?;
        std::fs::write(&file, join).map_err(SystemError::io("write", &file))?;
        disk::unmount(&at)
    })
    .await?;
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;

    use tempfile::TempDir;

    use super::super::super::disk::erasure::{Begun, Erasure};
    use super::super::super::disk::tests::{Loop, image};
    use super::super::super::disk::{Disk, kept};
    use super::super::super::{Card, Erase, Lease, SystemError};
    use super::{check_kept, check_settings, prepare};
    use crate::settings::Settings;

    const IMAGE: Erase = Erase { root: true, home: false };
    const BOOT_ONLY: Erase = Erase { root: false, home: false };

    fn card(dir: &TempDir) -> Card {
        let part = |name| dir.path().join(name);
        let card = Card { recovery: part("recovery"), boot: part("boot"), root: part("root"), home: part("home") };
        fs::create_dir_all(card.recovery.join("marco")).unwrap();
        card
    }

    fn settings() -> Settings {
        toml::from_str("boot.size = \"64MiB\"").unwrap()
    }

    fn refused<T>(outcome: Result<T, SystemError>) -> Option<&'static str> {
        match outcome {
            Err(SystemError::Refused(refusal)) => Some(refusal.reason),
            Err(error) => panic!("{error}"),
            Ok(_) => None,
        }
    }

    fn front(device: &Path) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        File::open(device).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[tokio::test]
    async fn nothing_is_made_anew_beside_a_home_that_is_not_understood() {
        let dir = TempDir::new().unwrap();
        let Some(on) = Loop::new(&image(&dir, 1024 << 20)) else { return };
        let (disk, card, settings) = (&on.0, card(&dir), settings());
        assert!(disk.partition_resident(&settings).unwrap());
        disk.make(Erasure::in_test(2), "ext4", "ROOT", &[]).await.unwrap();
        let secret = vec![0x5a; 1 << 20];
        File::options().write(true).open(disk.partition(3)).unwrap().write_all_at(&secret, 0).unwrap();
        let root = front(&disk.partition(2));
        for erase in [IMAGE, BOOT_ONLY] {
            assert_eq!(refused(check_kept(disk, &card, &settings, erase).await), Some("PARTITION_NOT_UNDERSTOOD"));
            let prepared = prepare(disk, &card, &settings, erase, Lease::new(())).await;
            assert_eq!(refused(prepared), Some("PARTITION_NOT_UNDERSTOOD"));
            assert!(front(&disk.partition(3)) == secret, "home was written to");
            assert!(front(&disk.partition(2)) == root, "the root was written to");
        }
        // It was being made at a power cut, so it is no owner's.
        kept::begin(&card.recovery, Begun { root: false, home: true }).unwrap();
        assert_eq!(refused(check_kept(disk, &card, &settings, IMAGE).await), None);
    }

    #[tokio::test]
    async fn a_root_that_cannot_be_mounted_gets_no_boot_files() {
        let dir = TempDir::new().unwrap();
        let Some(on) = Loop::new(&image(&dir, 1024 << 20)) else { return };
        let (disk, card, settings) = (&on.0, card(&dir), settings());
        assert!(disk.partition_resident(&settings).unwrap());
        for number in [2, 3] {
            disk.make(Erasure::in_test(number), "ext4", "X", &[]).await.unwrap();
        }
        assert_eq!(refused(check_kept(disk, &card, &settings, BOOT_ONLY).await), None);
        let _ = rustix::mount::unmount(&card.root, rustix::mount::UnmountFlags::empty());
        // The magic number is right, and so is libblkid's answer. The journal's inode and all groups are gone.
        let broken = File::options().write(true).open(disk.partition(2)).unwrap();
        broken.write_all_at(&vec![0xff; 512 << 10], 2048).unwrap();
        broken.sync_all().unwrap();
        assert_eq!(refused(check_kept(disk, &card, &settings, BOOT_ONLY).await), Some("PARTITION_NOT_UNDERSTOOD"));
        assert_eq!(refused(check_kept(disk, &card, &settings, IMAGE).await), None, "an image makes it anew");
    }

    #[test]
    fn wrong_settings_divide_no_card() {
        let dir = TempDir::new().unwrap();
        let disk = Disk { device: image(&dir, 1400 << 20) };
        assert_eq!(refused(check_settings(&disk, "marco/install.toml is wrong")), Some("SETTINGS_WRONG"));
        disk.partition_resident(&settings()).unwrap();
        assert_eq!(refused(check_settings(&disk, "marco/install.toml is wrong")), None);
    }
}
