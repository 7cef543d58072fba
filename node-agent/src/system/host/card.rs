//! The card of a running system, found by the disk of its root.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::settings::Settings;
use crate::system::disk::erasure::{self, Begun};
use crate::system::disk::plan::Part;
use crate::system::disk::{self, Access, Disk, find, kept};
use crate::system::{Card, Erase, Refusal, SystemError};

/// A stock card: a FAT that is its system's boot partition, a root, and nothing else that could be lost.
fn stock(disk: &Disk, parts: &[Part]) -> Option<Card> {
    let numbers: Vec<u32> = parts.iter().map(|part| part.number).collect();
    if numbers != [1, 2] || !parts.iter().any(|part| part.number == 1 && part.is_fat()) {
        return None;
    }
    let first = disk.partition(1);
    let boot = find::mounted_at(&first)
        .filter(|at| matches!(disk::file_system(&first), Ok(Some("vfat"))) && at.join("config.txt").is_file())?;
    Some(Card { recovery: boot.clone(), boot, root: "/".into(), home: "/home".into() })
}

/// The card once it is found, and the last problem, so that each is logged once. Without a card every call looks again:
/// it costs two reads, and a card may be mounted later.
#[derive(Debug, Default)]
pub(super) struct FoundCard(Mutex<(Option<Card>, String)>);

impl FoundCard {
    /// The card's mount points. `mounts` is the folder for partitions that the system does not mount itself.
    pub(super) fn get(&self, mounts: &Path) -> Option<Card> {
        let mut found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (card, problem) = &mut *found;
        if card.is_none() {
            *card = look(mounts).unwrap_or_else(|error| {
                let error = crate::cause::chain(&error);
                if error != *problem {
                    tracing::warn!(error, "card not usable");
                    *problem = error;
                }
                None
            });
        }
        card.clone()
    }
}

fn look(mounts: &Path) -> Result<Option<Card>, SystemError> {
    let Some(disk) = find::disk_of_root() else { return Ok(None) };
    let parts = disk.parts()?;
    let recovery = disk.partition(1);
    if !disk::plan::is_resident(&parts) {
        return Ok(stock(&disk, &parts));
    }
    let at = mounts.join("recovery");
    let mounted = match find::mounted_at(&recovery) {
        Some(somewhere) => somewhere,
        None => {
            // Read-only: a FAT that is not written cannot be torn by a power cut.
            disk::mount(&recovery, &at, Access::ReadOnly)?;
            at
        }
    };
    if find::label(&recovery).as_deref() != Some(disk::RECOVERY_LABEL) && !mounted.join("marco").is_dir() {
        // A card with four partitions that Marco did not lay out.
        if mounted == mounts.join("recovery") {
            disk::unmount(&mounted)?;
        }
        return Ok(None);
    }
    let boot = match find::mounted_at(&disk.partition(4)) {
        Some(somewhere) => somewhere,
        None => {
            let at = mounts.join("boot");
            disk::mount(&disk.partition(4), &at, Access::ReadOnly)?;
            at
        }
    };
    Ok(Some(Card { recovery: mounted, boot, root: "/".into(), home: "/home".into() }))
}

/// The signature of the root's disk, if a job for the installer has to name it.
pub(super) fn disk_to_name() -> Option<String> {
    find::to_be_named(&find::disk_of_root()?)
}

/// Refuses an installation that would change anything else on the root's disk.
pub(super) async fn keeps_the_rest(erase: Erase) -> Result<(), Refusal> {
    match find::partition_of("/") {
        Some((disk, root)) => keeps_the_rest_of(&disk, root, erase).await,
        None => Ok(()),
    }
}

/// Same, for a system whose root is this partition of the disk.
async fn keeps_the_rest_of(disk: &Disk, root: u32, erase: Erase) -> Result<(), Refusal> {
    if erase.root {
        erasure::root_is_p2(root)?;
    }
    // Defaults: the installer decides again with `install.toml` and the record of an interrupted try.
    match kept::decide(disk, &Settings::default(), erase, Begun::default()).await {
        Err(SystemError::Refused(refusal)) => Err(refusal),
        Err(error) => Err(Refusal { reason: "CARD_UNREADABLE", message: crate::cause::chain(&error) }),
        Ok(_) => Ok(()),
    }
}

/// Checks that the disk of the root can be put into layout resident.
pub(super) fn can_be_laid_out() -> Result<(), Refusal> {
    let planned = find::disk_of_root().map(|disk| disk.plan(&Settings::default()));
    match planned {
        Some(Err(SystemError::Refused(refusal))) => Err(refusal),
        Some(Err(error)) => Err(Refusal { reason: "CARD_UNREADABLE", message: crate::cause::chain(&error) }),
        Some(Ok(_)) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use super::keeps_the_rest_of;
    use crate::settings::Settings;
    use crate::system::Erase;
    use crate::system::disk::tests::{Loop, image};

    const IMAGE: Erase = Erase { root: true, home: false };

    #[tokio::test]
    async fn encrypted_home_is_refused_while_the_old_system_runs() {
        let dir = tempfile::TempDir::new().unwrap();
        let Some(card) = Loop::new(&image(&dir, 1400 << 20)) else { return };
        card.0.partition_resident(&Settings::default()).unwrap();
        assert_eq!(keeps_the_rest_of(&card.0, 2, IMAGE).await, Ok(()), "its home is blank");
        let reason = async |root, erase| keeps_the_rest_of(&card.0, root, erase).await.unwrap_err().reason;
        assert_eq!(reason(3, IMAGE).await, "LAYOUT_NOT_UNDERSTOOD", "p2 is not the root");
        let luks = zstd::decode_all(include_bytes!("../disk/probe/superblocks/luks2.zst").as_slice()).unwrap();
        let home = File::options().write(true).open(card.0.partition(3)).unwrap();
        home.write_all_at(&luks, 0).and_then(|()| home.sync_all()).unwrap();
        assert_eq!(reason(2, IMAGE).await, "PARTITION_NOT_UNDERSTOOD");
        assert_eq!(keeps_the_rest_of(&card.0, 2, Erase { home: true, ..IMAGE }).await, Ok(()));
    }
}
