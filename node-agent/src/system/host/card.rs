//! The card of a running system in layout resident: found by the root's own disk.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use crate::system::disk::{self, Access, find};
use crate::system::{Card, SystemError};

/// The card, once it was found. A machine without one is asked again each time: it costs two reads.
#[derive(Debug, Default)]
pub(super) struct FoundCard(Mutex<Option<Card>>);

impl FoundCard {
    /// Where the partitions are; `mounts` is a folder for those that nobody else mounts.
    pub(super) fn get(&self, mounts: &Path) -> Option<Card> {
        let mut found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if found.is_none() {
            *found = look(mounts).unwrap_or_else(|error| {
                tracing::warn!(error = %crate::cause::chain(&error), "card not usable");
                None
            });
        }
        found.clone()
    }
}

fn look(mounts: &Path) -> Result<Option<Card>, SystemError> {
    let Some(disk) = find::disk_of_root() else { return Ok(None) };
    let parts = disk.parts()?;
    let recovery = disk.partition(1);
    if !disk::plan::is_resident(&parts) || find::label(&recovery).as_deref() != Some(disk::RECOVERY_LABEL) {
        return Ok(None);
    }
    let at = mounts.join("recovery");
    let mounted = match find::mounted_at(&recovery) {
        Some(somewhere) => somewhere,
        None => {
            disk::mount(&recovery, &at, Access::ReadOnly)?;
            at
        }
    };
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
