//! The card of a running system in layout resident: found by the root's own disk.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::settings::Settings;
use crate::system::disk::erasure::Begun;
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

/// The card, once it was found, and why it was not, to be said once. A machine without one is asked again each time: it costs two reads.
#[derive(Debug, Default)]
pub(super) struct FoundCard(Mutex<(Option<Card>, String)>);

impl FoundCard {
    /// Where the partitions are; `mounts` is a folder for those that nobody else mounts.
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
            disk::mount(&recovery, &at, Access::ReadOnly)?;
            at
        }
    };
    if find::label(&recovery).as_deref() != Some(disk::RECOVERY_LABEL) && !mounted.join("marco").is_dir() {
        // Four partitions of somebody else's.
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

/// Refuses an installation that would not leave everything else on the disk of the root as it is.
pub(super) async fn keeps_the_rest(erase: Erase) -> Result<(), Refusal> {
    let Some(disk) = find::disk_of_root() else { return Ok(()) };
    match kept::decide(&disk, &Settings::default(), erase, Begun::default()).await {
        Err(SystemError::Refused(refusal)) => Err(refusal),
        Err(error) => Err(Refusal { reason: "CARD_UNREADABLE", message: crate::cause::chain(&error) }),
        Ok(_) => Ok(()),
    }
}

/// Whether the disk of the root can be put into layout resident.
pub(super) fn can_be_laid_out() -> Result<(), Refusal> {
    let planned = find::disk_of_root().map(|disk| disk.plan(&Settings::default()));
    match planned {
        Some(Err(SystemError::Refused(refusal))) => Err(refusal),
        Some(Err(error)) => Err(Refusal { reason: "CARD_UNREADABLE", message: crate::cause::chain(&error) }),
        Some(Ok(_)) | None => Ok(()),
    }
}
