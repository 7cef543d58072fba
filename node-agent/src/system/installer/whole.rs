//! The card during the installation of an unchanged image. The recovery partition lies behind the image, and until the
//! image is complete the card's table lists only that, so that every boot until then is the installer.

use super::super::disk::{self, Access, Disk};
use super::super::{Card, Lease, Stretch, SystemError, Target, WholeCard};
use super::{blocking, prepare};

/// Unmounts the old partitions and removes them from the table.
pub(super) fn open(disk: &Disk, card: &Card, lease: Lease) -> Result<WholeCard, SystemError> {
    for at in [&card.root.join("home"), &card.root, &card.boot, &card.home] {
        disk::unmount(at)?;
    }
    let recovery = disk.keep_recovery()?;
    Ok(WholeCard { device: disk.device.clone(), limit: recovery.start * disk::plan::SECTOR, lease })
}

/// Mounts the image's partitions.
pub(super) async fn mount(
    disk: &Disk,
    card: &Card,
    boot: Stretch,
    root: Stretch,
    lease: Lease,
) -> Result<Target, SystemError> {
    let shown = disk.clone();
    blocking(move || shown.show(boot, root)).await?;
    let (boot, root) = (disk.partition(4), disk.partition(2));
    for device in [&boot, &root] {
        prepare::appear(device).await?;
    }
    let card = card.clone();
    blocking(move || {
        disk::mount(&root, &card.root, Access::ReadWrite)?;
        disk::mount(&boot, &card.boot, Access::ReadWrite)?;
        Ok(Target {
            // The image's own fstab and command line stay unchanged, so no names are needed.
            root_device: String::new(),
            boot_device: String::new(),
            home_device: String::new(),
            root_type: disk::file_system(&root)?.unwrap_or("auto").to_owned(),
            home_type: String::new(),
            root: card.root,
            boot: card.boot,
            lease,
        })
    })
    .await
}
