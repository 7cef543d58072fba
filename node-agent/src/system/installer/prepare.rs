//! Makes the card's file systems ready to be installed into, and closes them when everything is in them.

use std::path::Path;
use std::time::{Duration, Instant};

use super::super::disk::{self, Access, Disk};
use super::super::{Card, Erase, Lease, SystemError, Target};
use super::blocking;
use crate::settings::Settings;

/// On a home that is new: until an installation is complete, what the image has for its users goes there.
const NEW_HOME: &str = ".marco-new";
/// How long a partition's device may take to show.
const PATIENCE: Duration = Duration::from_secs(10);

/// Partitions, makes file systems, and mounts them. What is there of an interrupted try is begun again.
pub(super) async fn prepare(
    disk: &Disk,
    card: &Card,
    settings: &Settings,
    erase: Erase,
    lease: Lease,
) -> Result<Target, SystemError> {
    let (closed, wanted, at) = (disk.clone(), settings.clone(), card.clone());
    let new_table = blocking(move || {
        for at in [&at.root.join("home"), &at.root, &at.boot, &at.home] {
            disk::unmount(at)?;
        }
        closed.partition_resident(&wanted)
    })
    .await?;
    let (boot, root, home) = (disk.partition(4), disk.partition(2), disk.partition(3));
    for device in [&boot, &root, &home] {
        appear(device).await?;
    }
    tracing::info!(disk = %disk.device.display(), new_table, "card partitioned");
    disk::make_fat(&boot, "BOOT", &settings.boot.mkfs_options).await?;
    if erase.root || new_table || disk::file_system(&root).is_none() {
        disk::make(&settings.root.kind, &root, "ROOT", &settings.root.mkfs_options).await?;
    }
    let (look, at) = (home.clone(), card.home.clone());
    let unfinished = blocking(move || Ok(disk::file_system(&look).is_none() || is_unfinished(&look, &at))).await?;
    let new_home = erase.home || new_table || unfinished;
    if new_home {
        disk::make(&settings.home.kind, &home, "HOME", &settings.home.mkfs_options).await?;
    }
    let (disk, card) = (disk.clone(), card.clone());
    blocking(move || {
        disk::mount(&root, &card.root, Access::ReadWrite)?;
        disk::mount(&boot, &card.boot, Access::ReadWrite)?;
        if new_home && (erase.root || new_table) {
            let at = card.root.join("home");
            disk::mount(&home, &at, Access::ReadWrite)?;
            std::fs::write(at.join(NEW_HOME), "").map_err(SystemError::io("write", at.join(NEW_HOME)))?;
        }
        let kind = |device: &Path| disk::file_system(device).unwrap_or("auto").to_owned();
        Ok(Target {
            root_device: disk.partuuid(2)?,
            boot_device: disk.partuuid(4)?,
            home_device: disk.partuuid(3)?,
            root_type: kind(&root),
            home_type: kind(&home),
            root: card.root,
            boot: card.boot,
            lease,
        })
    })
    .await
}

/// Makes the boot partition, on which nothing is yet, anew under this label. (The owner's options come after it, and a
/// label among them counts.)
pub(super) async fn label_boot(
    device: &Path,
    target: &Target,
    label: &str,
    options: &[String],
) -> Result<(), SystemError> {
    let at = target.boot.clone();
    blocking(move || disk::unmount(&at)).await?;
    disk::make_fat(device, label, options).await?;
    let (device, at) = (device.to_owned(), target.boot.clone());
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

/// Whether an installation that made this home was interrupted. One that cannot be mounted is somebody's, and kept.
pub(super) fn is_unfinished(home: &Path, at: &Path) -> bool {
    if disk::mount(home, at, Access::ReadOnly).is_err() {
        return false;
    }
    let unfinished = at.join(NEW_HOME).exists();
    let _ = disk::unmount(at);
    unfinished
}

/// Everything to the card; then nothing of it is mounted any more.
pub(super) fn finish(target: &Target) -> Result<(), SystemError> {
    let home = target.root.join("home");
    let mark = home.join(NEW_HOME);
    if mark.exists() {
        std::fs::remove_file(&mark).map_err(SystemError::io("remove", &mark))?;
    }
    for at in [&home, &target.root, &target.boot] {
        let folder = match std::fs::File::open(at) {
            // An image without a home.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            opened => opened.map_err(SystemError::io("open", at))?,
        };
        rustix::fs::syncfs(&folder).map_err(|error| SystemError::io("sync", at)(error.into()))?;
        drop(folder);
        disk::unmount(at)?;
    }
    Ok(())
}

/// Gives a disk without any partition a recovery partition with this join file.
pub(super) async fn blank(disk: Disk, join: &str, mounts: &Path) -> Result<Disk, SystemError> {
    let empty = disk.clone();
    blocking(move || empty.partition_resident(&Settings::default())).await?;
    appear(&disk.partition(1)).await?;
    disk::make_fat(&disk.partition(1), disk::RECOVERY_LABEL, &[]).await?;
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
