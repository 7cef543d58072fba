//! Restarts that the new system asks for itself, for example after its first boot. Each is a trial boot again, within the
//! limit of the whole trial.
//!
//! systemd passes the content of a file on to reboot(2), so the keeper leaves the argument of a trial boot there. It does so
//! only after it has recorded the time used: a system that restarts again and again must end, too.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use super::RECORD;
use crate::durable;

/// Root of process 1, as the keeper sees it in its own /proc.
const ROOT: &str = "/proc/1/root";
/// systemd's file with the argument of a reboot (systemd-reboot.service(8)). Without its folder this is no systemd.
const PARAMETER: &str = "run/systemd/reboot-param";
/// Argument for a trial boot: the default partition, and the firmware's word.
const TRYBOOT: &str = "0 tryboot";
/// Pause before the next try to leave the argument.
const SOON: Duration = Duration::from_secs(2);
/// Longest wait for a record that is being written, in tries, and the pause between two.
const TRIES: u32 = 20;
const TRY: Duration = Duration::from_millis(100);
/// Interval of records once the argument is left.
const RECORDS: Duration = Duration::from_secs(15);

/// Reads the time that earlier boots of this trial have used. Only for process 1, whose root is the new system's.
pub(super) fn used() -> Duration {
    read(&Path::new("/").join(RECORD))
}

fn read(record: &Path) -> Duration {
    match std::fs::read_to_string(record) {
        // An unreadable record counts as the whole limit: it must not make a trial endless.
        Ok(text) => Duration::from_secs(text.trim().parse().unwrap_or(u64::MAX)),
        Err(_) => Duration::ZERO,
    }
}

/// True once the trial is over. Held while something is written, so that nothing is written after it.
#[derive(Clone, Default)]
pub(super) struct Over(Arc<Mutex<bool>>);

impl Over {
    /// Ends the records. Waits for one that is being written, but not for a card that hangs.
    pub(super) fn set(&self) {
        for _ in 0..TRIES {
            match self.0.try_lock() {
                Ok(mut over) => {
                    *over = true;
                    return;
                }
                Err(_) => sleep(TRY),
            }
        }
    }
}

/// Records the time that the trial has used, again and again, until it is over. Runs in a thread of its own: a card that
/// hangs stops it.
pub(super) fn keep(over: &Over, total: impl Fn() -> Duration) {
    let mut account = Account { root: ROOT.into(), left: false };
    while account.note_unless(over, total()) {
        sleep(if account.left { RECORDS } else { SOON });
    }
}

struct Account {
    root: PathBuf,
    /// The argument was left. Only once: the agent removes it before a restart that leads back to the installer.
    left: bool,
}

impl Account {
    /// Records the time, unless the trial is over. Returns false then.
    fn note_unless(&mut self, over: &Over, total: Duration) -> bool {
        let over = over.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !*over {
            // Best effort: without it a restart that the system asks for counts as a failed trial.
            let _ = self.note(total);
        }
        !*over
    }

    fn note(&mut self, total: Duration) -> io::Result<()> {
        let parameter = self.root.join(PARAMETER);
        if !parameter.parent().is_some_and(Path::is_dir) {
            return Ok(());
        }
        durable::replace(&self.root.join(RECORD), total.as_secs().to_string().as_bytes(), 0o600)?;
        if !self.left {
            std::fs::write(&parameter, TRYBOOT)?;
            self.left = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::{Account, Over, PARAMETER, RECORD, read};

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn restart_is_a_trial_again_only_after_its_time_is_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let (parameter, record) = (dir.path().join(PARAMETER), dir.path().join(RECORD));
        let mut account = Account { root: dir.path().to_owned(), left: false };
        account.note(MINUTE).unwrap();
        assert!(!record.exists(), "no systemd, nothing to record");
        fs::create_dir_all(parameter.parent().unwrap()).unwrap();
        // A file in place of the folder: the root cannot be written, as in an emergency mode.
        fs::write(dir.path().join("var"), "").unwrap();
        assert!(account.note(MINUTE).is_err());
        assert!(!parameter.exists(), "a restart would be a trial without an end");
        fs::remove_file(dir.path().join("var")).unwrap();
        account.note(MINUTE).unwrap();
        assert_eq!(fs::read_to_string(&parameter).unwrap(), "0 tryboot");
        assert_eq!(read(&record), MINUTE);
        // The agent takes it away before it gives the machine back to the installer.
        fs::remove_file(&parameter).unwrap();
        account.note(MINUTE * 2).unwrap();
        assert!(!parameter.exists());
        assert_eq!(read(&record), MINUTE * 2);
    }

    #[test]
    fn nothing_is_written_after_the_acceptance() {
        let dir = tempfile::tempdir().unwrap();
        let (parameter, record) = (dir.path().join(PARAMETER), dir.path().join(RECORD));
        fs::create_dir_all(parameter.parent().unwrap()).unwrap();
        fs::create_dir_all(record.parent().unwrap()).unwrap();
        let (mut account, over) = (Account { root: dir.path().to_owned(), left: false }, Over::default());
        over.set();
        assert!(!account.note_unless(&over, MINUTE));
        assert!(!parameter.exists(), "the owner's next restart would be a trial boot");
        assert!(!record.exists());
    }

    #[test]
    fn unreadable_record_leaves_no_time() {
        let dir = tempfile::tempdir().unwrap();
        let record = dir.path().join("record");
        assert_eq!(read(&record), Duration::ZERO);
        fs::write(&record, "").unwrap();
        assert_eq!(read(&record), Duration::MAX.min(Duration::from_secs(u64::MAX)));
    }
}
