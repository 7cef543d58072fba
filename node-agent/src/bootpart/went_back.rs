//! The mark of an installer that gave the machine back to the old system. If it comes up again nevertheless, the card
//! does not boot what its files say, and going back once more would never end.

use std::path::PathBuf;

use super::{BootError, BootPart, remove_file, write_whole};

impl BootPart {
    /// Notes under which boot, and for which job, the installer goes back.
    pub fn note_going_back(&self, boot_id: &str) -> Result<(), BootError> {
        let _lock = self.lock()?;
        write_whole(&self.mark(), self.went_back_as(boot_id).as_bytes())
    }

    /// Returns true if an installer went back for the same job under another boot, and no running system has tidied the
    /// card since. Under the same boot it was only killed before it went.
    pub fn went_back(&self, boot_id: &str) -> bool {
        let Ok(text) = std::fs::read_to_string(self.mark()) else { return false };
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
