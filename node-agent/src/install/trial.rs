//! Kernel parameters of a new system that it has only while it is on trial.
//!
//! A kernel that panics halts by default (`PANIC_TIMEOUT=0` in Debian's and Raspberry Pi OS's kernels). Without `panic=` a
//! trial that cannot mount its root or has no init never returns to the installer.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Begin and end of the trial's parameters. The kernel takes a name with a dot for a module's parameter and passes nothing on
/// to init.
const BEGIN: &str = "marco.trial=begin";
const END: &str = "marco.trial=end";
/// Seconds after a panic until the kernel restarts (kernel documentation, kernel-parameters): a person can read it.
const PANIC: &str = "panic=10";
/// The parameters must lie in the first sector of the file: then a power cut leaves the old sector or the new one.
const SECTOR: u64 = 512;

/// Adds the trial's parameters to a command line. The kernel takes the last of several values, so an image's own `panic=` goes
/// to the front: it holds again after the trial.
pub(super) fn add_parameters(cmdline: &str) -> String {
    let (theirs, rest): (Vec<&str>, Vec<&str>) =
        cmdline.split_whitespace().partition(|word| word.starts_with("panic="));
    let words = theirs.into_iter().chain([BEGIN, PANIC, END]).chain(rest);
    words.collect::<Vec<_>>().join(" ") + "\n"
}

/// Replaces the trial's parameters by as many spaces. `None`: it has none.
fn without_parameters(start: &[u8]) -> Option<Vec<u8>> {
    let find = |word: &str| start.windows(word.len()).position(|window| window == word.as_bytes());
    let (from, to) = (find(BEGIN)?, find(END)? + END.len());
    let mut changed = start.to_owned();
    // Marks in the wrong order are not ours.
    changed.get_mut(from..to)?.fill(b' ');
    Some(changed)
}

/// Removes the trial's parameters from the command line in this file, by one write of a sector. Returns false if there were
/// none. The change is on the disk when this returns.
pub(super) fn remove_parameters(file: &Path) -> io::Result<bool> {
    let opened = OpenOptions::new().read(true).write(true).open(file)?;
    let mut start = Vec::new();
    (&opened).take(SECTOR).read_to_end(&mut start)?;
    let Some(changed) = without_parameters(&start) else { return Ok(false) };
    // In place, not a new file that takes the name: a rename writes the FAT, the folder and the file, and each can be torn.
    crate::step::at("write in place", file, &changed)?;
    opened.write_all_at(&changed, 0)?;
    opened.sync_all()?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{SECTOR, add_parameters, remove_parameters};

    #[test]
    fn parameters_come_and_go_within_the_first_sector() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cmdline.txt");
        let long = format!("console=tty1 panic=-1 {} root=PARTUUID=00-02 rootwait", "x".repeat(600));
        for (line, panics) in [("console=tty1 root=/dev/mmcblk0p2\n", ""), (long.as_str(), "panic=-1")] {
            let armed = add_parameters(line);
            assert_eq!(armed.split_whitespace().rev().find(|word| word.starts_with("panic=")), Some("panic=10"));
            assert!(u64::try_from(armed.find("marco.trial=end").unwrap()).unwrap() < SECTOR - 20);
            fs::write(&file, &armed).unwrap();
            assert!(remove_parameters(&file).unwrap());
            let after = fs::read_to_string(&file).unwrap();
            assert_eq!(after.len(), armed.len());
            let words = |text: &str| {
                let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
                words.sort();
                words
            };
            assert_eq!(words(&after), words(line));
            assert_eq!(after.split_whitespace().find(|word| word.starts_with("panic=")).unwrap_or_default(), panics);
            assert!(!remove_parameters(&file).unwrap(), "once is enough");
            assert_eq!(fs::read_to_string(&file).unwrap(), after);
        }
    }

    #[test]
    fn other_files_stay_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cmdline.txt");
        for text in ["", "root=/dev/mmcblk0p2", "marco.trial=end marco.trial=begin", "marco.trial=begin panic=10"] {
            fs::write(&file, text).unwrap();
            assert!(!remove_parameters(&file).unwrap(), "{text}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        assert!(remove_parameters(&dir.path().join("gone")).is_err());
    }
}
