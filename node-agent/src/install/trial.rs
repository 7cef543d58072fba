//! Parts of a new system that it has only while it is on trial: kernel parameters, and the supervisor.
//!
//! A kernel that panics halts by default (`PANIC_TIMEOUT=0` in Debian's and Raspberry Pi OS's kernels), one that hangs is
//! fed its watchdog by itself, and an init that hangs is noticed by nobody. Without these parts such a trial never returns
//! to the installer.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::agent::elf;
use crate::supervise;
use crate::system::drivers;
use crate::system::rooted::{Kind, Rooted};

mod end;

pub(super) use end::remove_below;

/// Begin and end of the trial's parameters. The kernel takes a name with a dot for a module's parameter and passes nothing on
/// to init.
const BEGIN: &str = "marco.trial=begin";
const END: &str = "marco.trial=end";
/// Seconds after a panic until the kernel restarts (kernel documentation, kernel-parameters): a person can read it.
const PANIC: &str = "panic=10";
/// The kernel feeds a watchdog that the firmware started for this many seconds, and then expects the supervisor to do it
/// (kernel documentation, watchdog-parameters). Long enough to check a large file system before that.
const OPEN_TIMEOUT: u64 = 600;
/// Raspberry Pi OS's initramfs stops the firmware's watchdog unless it finds this word.
const KEEP_ARMED: &str = "watchdog_disarm=0";
/// Seconds that the firmware gives the kernel to take over the watchdog. Longer ones do not fit into its counter.
const FIRMWARE_TIMEOUT: u64 = 15;

/// Supervision of a new system's trial.
#[derive(Debug, Clone)]
pub(super) struct Supervision {
    /// The supervisor. `None`: this machine has none.
    pub(super) program: Option<PathBuf>,
    /// Time from the kernel's start until the supervisor resets the machine.
    pub(super) limit: Duration,
}

impl Supervision {
    /// Puts the supervisor into the new root. Done before the command line names it: a power cut in between must not leave
    /// a line whose init does not exist. Returns false if this trial goes without one: a good system is not refused for
    /// that.
    pub(super) fn install(&self, root: &Rooted) -> io::Result<bool> {
        // Boot files alone are tried with the old root, which may hold one of an earlier trial.
        root.remove(supervise::RECORD)?;
        let Some(program) = &self.program else { return Ok(false) };
        if !elf::fits(program, root) {
            // As process 1 it would end the trial by a panic.
            tracing::warn!("new system is for another processor than this agent, so its trial has no supervisor");
            return Ok(false);
        }
        Self::placed(copy(program, root), root)
    }

    /// Decides what follows from this result of the copy.
    fn placed(copied: io::Result<()>, root: &Rooted) -> io::Result<bool> {
        match copied {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                tracing::warn!(error = %error, "no room for the supervisor in the new system, so its trial has none");
                root.remove(supervise::PROGRAM)?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Adds the trial's parameters to a command line. The kernel takes the last of several values, so an image's own
    /// `panic=` and `init=` go to the front: they hold again after the trial.
    pub(super) fn add_parameters(&self, cmdline: &str, supervised: bool) -> String {
        let own = ["panic=", "watchdog.open_timeout=", "init="];
        let (theirs, rest): (Vec<&str>, Vec<&str>) =
            cmdline.split_whitespace().partition(|word| own.iter().any(|key| word.starts_with(key)));
        let mut words: Vec<String> = [BEGIN, PANIC, KEEP_ARMED].map(str::to_owned).into();
        if supervised {
            words.push(format!("watchdog.open_timeout={}", OPEN_TIMEOUT.min(self.limit.as_secs())));
            words.extend(supervise::parameters(self.limit));
        }
        words.push(END.to_owned());
        let words = theirs.into_iter().chain(words.iter().map(String::as_str)).chain(rest);
        words.collect::<Vec<_>>().join(" ") + "\n"
    }
}

fn copy(program: &Path, root: &Rooted) -> io::Result<()> {
    let mut file = root.create(supervise::PROGRAM, 0o755)?;
    io::copy(&mut File::open(program)?, &mut file)?;
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o755))?;
    file.sync_all()
}

/// Removes the supervisor and its record from an accepted system's root. Its parameters must be gone by then.
pub(crate) fn remove_supervisor(root: &Path) -> io::Result<()> {
    let root = Rooted::open(root)?;
    root.remove(supervise::PROGRAM)?;
    root.remove(supervise::RECORD)
}

/// Lines for `config.txt` that make the firmware start the watchdog on a trial boot. Empty if the root has a kernel that
/// loads the watchdog's driver as a module: it might not take over within the few seconds that the counter holds, and each
/// trial would end by a reset.
pub(super) fn firmware_lines(root: &Rooted) -> String {
    let kernels = root.list(drivers::MODULES).unwrap_or_default();
    let kernels: Vec<_> = kernels.iter().filter(|(_, kind)| *kind == Kind::Folder).collect();
    let built_in = |name: &std::ffi::OsStr| {
        let list = root
            .read(Path::new(drivers::MODULES).join(name).join(drivers::BUILT_IN))
            .ok()
            .flatten()
            .unwrap_or_default();
        drivers::has_watchdog(&String::from_utf8_lossy(&list))
    };
    if kernels.is_empty() || !kernels.iter().all(|(name, _)| built_in(name)) {
        return String::new();
    }
    format!("[tryboot]\nkernel_watchdog_timeout={FIRMWARE_TIMEOUT}\n[all]\n")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;
    use std::{fs, io};

    use super::elf::tests::header;
    use super::end::remove_from;
    use super::{Supervision, firmware_lines, remove_supervisor};
    use crate::supervise::{PROGRAM, RECORD};
    use crate::system::rooted::Rooted;

    fn supervision(program: Option<PathBuf>) -> Supervision {
        Supervision { program, limit: Duration::from_secs(840) }
    }

    const SECTOR: u64 = 512;

    #[test]
    fn parameters_come_and_go_within_the_first_sector() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cmdline.txt");
        let long = format!("console=tty1 panic=-1 init=/own {} root=PARTUUID=00-02 rootwait", "x".repeat(600));
        for (line, panic, init) in
            [("console=tty1 root=/dev/mmcblk0p2\n", "", ""), (long.as_str(), "panic=-1", "init=/own")]
        {
            let armed = supervision(None).add_parameters(line, true);
            let last = |text: &str, key: &str| {
                text.split_whitespace().rev().find(|word| word.starts_with(key)).unwrap_or_default().to_owned()
            };
            assert_eq!(last(&armed, "panic="), "panic=10");
            assert_eq!(last(&armed, "init="), format!("init=/{PROGRAM}"));
            assert_eq!(last(&armed, "marco.limit="), "marco.limit=840");
            assert_eq!(last(&armed, "watchdog.open_timeout="), "watchdog.open_timeout=600");
            assert!(u64::try_from(armed.find("marco.trial=end").unwrap()).unwrap() < SECTOR - 20);
            fs::write(&file, &armed).unwrap();
            let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(&file).unwrap());
            assert!(remove_from(&file).unwrap());
            assert_eq!(std::os::unix::fs::MetadataExt::ino(&fs::metadata(&file).unwrap()), inode, "in place");
            let after = fs::read_to_string(&file).unwrap();
            assert_eq!(after.len(), armed.len());
            let words = |text: &str| {
                let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
                words.sort();
                words
            };
            assert_eq!(words(&after), words(line));
            assert_eq!((last(&after, "panic="), last(&after, "init=")), (panic.to_owned(), init.to_owned()));
            assert!(!remove_from(&file).unwrap(), "once is enough");
            assert_eq!(fs::read_to_string(&file).unwrap(), after);
        }
    }

    #[test]
    fn supervisor_comes_and_goes_with_the_trial() {
        let dir = tempfile::tempdir().unwrap();
        let (program, root) = (dir.path().join("program"), dir.path().join("root"));
        fs::write(&program, "ELF").unwrap();
        fs::create_dir_all(root.join("var/lib/marco-agent")).unwrap();
        fs::write(root.join(RECORD), "800").unwrap();
        let rooted = Rooted::open(&root).unwrap();
        assert!(supervision(Some(program.clone())).install(&rooted).unwrap());
        assert!(rooted.is_file(PROGRAM, true));
        assert!(!root.join(RECORD).exists(), "time of an earlier trial");
        fs::write(root.join(RECORD), "30").unwrap();
        remove_supervisor(&root).unwrap();
        assert!(rooted.list("var/lib/marco-agent").unwrap().is_empty());
        // Without a supervisor no command line names one.
        assert!(!supervision(None).install(&rooted).unwrap());
        assert!(!rooted.is_there(PROGRAM));
        let line = supervision(None).add_parameters("quiet", false);
        assert!(!line.contains("init=") && !line.contains("open_timeout") && line.contains("panic=10"), "{line}");
    }

    #[test]
    fn system_for_another_processor_or_without_room_is_tried_without_a_supervisor() {
        let dir = tempfile::tempdir().unwrap();
        let (program, root) = (dir.path().join("program"), dir.path().join("root"));
        fs::write(&program, header(2, 183)).unwrap();
        fs::create_dir_all(root.join("sbin")).unwrap();
        fs::write(root.join("sbin/init"), header(1, 40)).unwrap();
        let rooted = Rooted::open(&root).unwrap();
        assert!(!supervision(Some(program.clone())).install(&rooted).unwrap());
        assert!(!rooted.is_there(PROGRAM));
        fs::write(root.join("sbin/init"), header(2, 183)).unwrap();
        assert!(supervision(Some(program)).install(&rooted).unwrap());
        assert!(!Supervision::placed(Err(io::ErrorKind::StorageFull.into()), &rooted).unwrap());
        assert!(!rooted.is_there(PROGRAM), "half a program is left");
        assert!(Supervision::placed(Err(io::ErrorKind::Other.into()), &rooted).is_err());
    }

    #[test]
    fn firmware_watches_only_kernels_that_take_over_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let root = Rooted::open(dir.path()).unwrap();
        assert_eq!(firmware_lines(&root), "");
        let list = |kernel: &str, text: &str| {
            fs::create_dir_all(dir.path().join("lib/modules").join(kernel)).unwrap();
            fs::write(dir.path().join("lib/modules").join(kernel).join("modules.builtin"), text).unwrap();
        };
        list("6.12-rpi-v8", "kernel/fs/ext4/ext4.ko\nkernel/drivers/watchdog/bcm2835_wdt.ko\n");
        assert_eq!(firmware_lines(&root), "[tryboot]\nkernel_watchdog_timeout=15\n[all]\n");
        list("6.1-arm64", "kernel/fs/ext4/ext4.ko\n");
        assert_eq!(firmware_lines(&root), "");
    }
}
