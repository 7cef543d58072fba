//! The mark of an installer that gave the machine back to the old system. If it comes up again nevertheless, the card
//! does not boot what its files say, and going back once more would never end.

use std::path::PathBuf;

use super::{BootError, BootPart, DefaultBoot, remove_file, write_whole};
use crate::durable;
use crate::system::Booted;

impl BootPart {
    /// Returns true if a plain restart of this installer leads to the old system. The card's files alone do not tell: an
    /// owner's line in `config.txt`, or firmware that reads them otherwise, would restart the installer forever.
    pub fn can_go_back(&self, booted: Option<Booted>, boot_id: &str) -> Result<bool, BootError> {
        // The same boot without the argument of a trial leads here again.
        let by_default = booted.is_some_and(|booted| !booted.tryboot);
        if by_default || self.default_boot()? == DefaultBoot::Installer {
            return Ok(false);
        }
        let went_back = self.went_back(boot_id);
        if went_back {
            tracing::error!("installer went back to the old system and came up again: it stays");
        }
        Ok(!went_back)
    }

    /// Notes under which boot, and for which job, the installer goes back.
    pub fn note_going_back(&self, boot_id: &str) -> Result<(), BootError> {
        let _lock = self.lock()?;
        write_whole(&self.mark(), self.went_back_as(boot_id).as_bytes())
    }

    /// Returns true if an installer went back for the same job under another boot, and no running system has tidied the
    /// card since. Under the same boot it was only killed before it went.
    fn went_back(&self, boot_id: &str) -> bool {
        let Ok(text) = durable::read_text(&self.mark()) else { return false };
        let job = |text: &str| text.lines().next().map(str::to_owned);
        text != self.went_back_as(boot_id) && job(&text) == job(&self.went_back_as(boot_id))
    }

    /// Removes the mark: a running system has come up.
    pub fn forget_going_back(&self) -> Result<(), BootError> {
        if !self.mark().exists() {
            return Ok(());
        }
        let _lock = self.lock()?;
        remove_file(&self.mark())
    }

    fn mark(&self) -> PathBuf {
        self.marco_dir().join("went-back")
    }

    /// The mark's text. An older system tidies no mark, so it counts for one job only.
    fn went_back_as(&self, boot_id: &str) -> String {
        let job = self.read_job().ok().flatten().map(|job| job.execution).unwrap_or_default();
        format!("{job}\n{boot_id}\n")
    }
}
