//! The card while an image is written to it as it is: the recovery partition lies behind the image, and the card's table
//! knows only that, until the image is complete. So every boot before that is the installer.

use super::super::disk::{self, Access, Disk};
use super::super::{Card, Lease, Stretch, SystemError, Target, WholeCard};
use super::{blocking, prepare};

/// Unmounts what was there before, and takes it off the card.
pub(super) fn open(disk: &Disk, card: &Card, lease: Lease) -> Result<WholeCard, SystemError> {
    for at in [&card.root.join("home"), &card.root, &card.boot, &card.home] {
        disk::unmount(at)?;
    }
    let recovery = disk.keep_recovery()?;
    Ok(WholeCard { device: disk.device.clone(), limit: recovery.start * disk::plan::SECTOR, lease })
}

/// Mounts what the image brought.
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
            // The image names its file systems itself, and nothing of that is changed.
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
