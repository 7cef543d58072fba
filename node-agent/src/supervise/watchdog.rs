//! The hardware watchdog, while a system is on trial.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// State of the device after it was given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// It stands still, or the kernel feeds it.
    Still,
    /// It cannot be stopped (`nowayout`), so it must be fed until the machine restarts.
    Running,
}

/// The device, opened as soon as it is there: its driver may be a module that is loaded late.
pub(super) struct Watchdog {
    device: Option<File>,
    path: PathBuf,
    /// The driver's setting of the same name.
    nowayout: PathBuf,
}

impl Watchdog {
    /// The watchdog below this root.
    pub(super) fn new(root: &Path) -> Self {
        let nowayout = root.join("sys/class/watchdog/watchdog0/nowayout");
        Self { device: None, path: root.join("dev/watchdog"), nowayout }
    }

    /// Opens the device if it is there and free, which starts it, and feeds it. Returns true the first time that it is fed.
    pub(super) fn feed(&mut self) -> bool {
        let found = self.device.is_none();
        if found {
            // It stays closed if the image's init has it: systemd feeds it itself then (`RuntimeWatchdogSec`).
            let opened =
                rustix::fs::open(&self.path, OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty());
            self.device = opened.ok().map(File::from);
        }
        // Its own timeout stays: a Pi's driver takes one that is too long for a far shorter one.
        self.write(b"\0") && found
    }

    /// Gives the device back, so that the system can use it. The kernel goes on feeding one that the firmware started.
    pub(super) fn give_back(&mut self) -> Left {
        // A kernel without these files does not tell, and one that goes on counting would reset an accepted system.
        let running = std::fs::read_to_string(&self.nowayout).map_or(true, |value| value.trim() != "0");
        if self.device.is_some() && running {
            return Left::Running;
        }
        // The magic character: without it the device goes on counting after the close (kernel, watchdog-api).
        self.write(b"V");
        self.device = None;
        Left::Still
    }

    fn write(&mut self, bytes: &[u8]) -> bool {
        self.device.as_mut().is_some_and(|device| device.write_all(bytes).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{Left, Watchdog};

    #[test]
    fn device_is_fed_when_it_appears_and_given_back_by_magic() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("dev")).unwrap();
        let device = dir.path().join("dev/watchdog");
        let mut watchdog = Watchdog::new(dir.path());
        assert!(!watchdog.feed(), "it is not there yet");
        fs::write(&device, "").unwrap();
        assert!(watchdog.feed());
        assert!(!watchdog.feed(), "only the first time");
        assert_eq!(watchdog.give_back(), Left::Running, "nothing tells that it can be stopped");
        let setting = dir.path().join("sys/class/watchdog/watchdog0");
        fs::create_dir_all(&setting).unwrap();
        fs::write(setting.join("nowayout"), "0\n").unwrap();
        assert_eq!(watchdog.give_back(), Left::Still);
        assert_eq!(fs::read(&device).unwrap(), b"\0\0V");
    }

    #[test]
    fn device_that_cannot_be_stopped_is_fed_on() {
        let dir = tempfile::tempdir().unwrap();
        let setting = dir.path().join("sys/class/watchdog/watchdog0");
        fs::create_dir_all(&setting).unwrap();
        fs::create_dir_all(dir.path().join("dev")).unwrap();
        fs::write(setting.join("nowayout"), "1\n").unwrap();
        let device = dir.path().join("dev/watchdog");
        fs::write(&device, "").unwrap();
        let mut watchdog = Watchdog::new(dir.path());
        watchdog.feed();
        assert_eq!(watchdog.give_back(), Left::Running);
        watchdog.feed();
        assert_eq!(fs::read(&device).unwrap(), b"\0\0");
    }
}
