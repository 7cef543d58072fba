//! Ailments that every machine looks for in the same way.

use std::path::Path;

use super::Refusal;
use crate::health::{Ailment, Condition};
use crate::settings::Settings;

/// Bytes that the state folder must have free: a journal and its successor, which is written before the old one goes.
const STATE_ROOM: u64 = 1 << 20;

/// Reason: the card's `marco/install.toml` cannot be used.
pub(crate) const SETTINGS_WRONG: &str = "SETTINGS_WRONG";

/// Refuses an update beside settings that the installer cannot use, while the running system can still say so.
pub(crate) fn check_settings(recovery: &Path) -> Result<(), Refusal> {
    let (_, wrong) = Settings::read_or_default(recovery);
    wrong.map_or(Ok(()), |error| Err(Refusal { reason: SETTINGS_WRONG, message: crate::cause::chain(&error) }))
}

/// Says that the card's settings cannot be used. `None`: they can.
pub(crate) fn wrong_settings(recovery: &Path) -> Option<Condition> {
    let refusal = check_settings(recovery).err()?;
    let message = format!("{}; the installer goes by its defaults, and divides no card by them", refusal.message);
    Some(Condition { ailment: Ailment::Settings, message })
}

/// Checks the file system of a folder: it must be writable and have room for the journal. `None`: healthy.
pub(crate) fn ailing_disk(folder: &Path) -> Option<Condition> {
    // The agent creates the folder itself, so ask the nearest ancestor that exists.
    let there = folder.ancestors().find(|folder| folder.exists())?;
    let message = match rustix::fs::statvfs(there) {
        Ok(found) if found.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) => "is read-only".to_owned(),
        Ok(found) => match found.f_bavail.saturating_mul(found.f_frsize) {
            free if free < STATE_ROOM => format!("has {free} bytes free"),
            _ => return None,
        },
        Err(error) => format!("cannot be asked: {error}"),
    };
    Some(Condition { ailment: Ailment::Disk, message: format!("the file system of {} {message}", folder.display()) })
}
