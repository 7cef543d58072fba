//! The end of a trial: its parameters leave the command line of the accepted system.

use std::fs::OpenOptions;
use std::io::{self, Error, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::{BEGIN, END};
use crate::bootpart::read_from_card;
use crate::{step, supervise};

/// Largest file that is searched, in bytes. The firmware reads a line of a few KiB, and no device tree holds the words.
const LARGEST: u64 = 64 * 1024;
/// Folders within folders that are searched. `os_prefix` and `include` name one or two.
const DEPTH: usize = 4;

/// Position of the first of the trial's parameters. `None`: there are none, or only a part of them.
fn parameters(text: &[u8]) -> Option<Range<usize>> {
    let find = |word: &str, from: usize| {
        let rest = text.get(from..)?;
        rest.windows(word.len()).position(|window| window == word.as_bytes()).map(|at| from + at)
    };
    let from = find(BEGIN, 0)?;
    Some(from..find(END, from)? + END.len())
}

/// True if anything of a trial is left. Such a line names an init that goes away with the trial, so a system that boots by
/// it would panic and restart forever.
fn is_marked(text: &[u8]) -> bool {
    let program = format!("init=/{}", supervise::PROGRAM);
    [BEGIN, END, &program].iter().any(|word| text.windows(word.len()).any(|window| window == word.as_bytes()))
}

/// Removes the trial's parameters from this file and reads that back past the page cache. Returns false if it had none.
///
/// # Errors
/// Returns an error if a part of them is left, for instance because the system has rewritten its command line.
pub(super) fn remove_from(file: &Path) -> io::Result<bool> {
    let Some(mut text) = read_from_card(file)? else { return Ok(false) };
    if !is_marked(&text) {
        return Ok(false);
    }
    // In place, not a new file that takes the name: a rename writes the FAT, the folder and the file, and each can be torn.
    // The installer puts the words into the first sector, and one write of a sector is old or new after a power cut.
    let opened = OpenOptions::new().write(true).open(file)?;
    while let Some(range) = parameters(&text) {
        let offset = u64::try_from(range.start).map_err(Error::other)?;
        let Some(words) = text.get_mut(range.clone()) else { break };
        words.fill(b' ');
        step::at("write in place", file, &text)?;
        opened.write_all_at(text.get(range).unwrap_or_default(), offset)?;
    }
    opened.sync_all()?;
    // A card may acknowledge a write that it has not kept.
    let kept = read_from_card(file)?.unwrap_or_default();
    if is_marked(&kept) || kept != text {
        let message = format!("{} still has kernel parameters of the trial", file.display());
        return Err(Error::new(ErrorKind::InvalidData, message));
    }
    Ok(true)
}

/// Removes the trial's parameters from every file of the boot partition, and returns the number of files that had them.
/// Not only from the one that the firmware read: a first boot may have named another one, which the next boot takes.
pub(in crate::install) fn remove_below(folder: &Path) -> io::Result<usize> {
    search(folder, DEPTH)
}

fn search(folder: &Path, depth: usize) -> io::Result<usize> {
    let mut removed = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let (kind, path) = (entry.file_type()?, entry.path());
        if kind.is_dir() && depth > 0 {
            removed += search(&path, depth - 1)?;
        } else if kind.is_file() && entry.metadata()?.len() <= LARGEST && remove_from(&path)? {
            removed += 1;
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{LARGEST, remove_below, remove_from};

    const WORDS: &str = "marco.trial=begin panic=10 init=/var/lib/marco-agent/supervise marco.trial=end";

    #[test]
    fn other_files_stay_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cmdline.txt");
        for text in ["", "root=/dev/mmcblk0p2", "init=/sbin/init marco.limit=840"] {
            fs::write(&file, text).unwrap();
            assert!(!remove_from(&file).unwrap(), "{text}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        assert!(!remove_from(&dir.path().join("gone")).unwrap());
    }

    #[test]
    fn part_of_the_parameters_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("cmdline.txt");
        for text in [
            "marco.trial=end marco.trial=begin",
            "marco.trial=begin panic=10",
            "quiet marco.trial=end",
            "quiet init=/var/lib/marco-agent/supervise",
        ] {
            fs::write(&file, text).unwrap();
            let error = remove_from(&file).unwrap_err();
            assert!(error.to_string().contains("cmdline.txt still has kernel parameters of the trial"), "{error}");
        }
    }

    #[test]
    fn every_file_that_the_next_boot_may_take_loses_them() {
        let dir = tempfile::tempdir().unwrap();
        let far = format!("{} {WORDS} quiet {WORDS}", "x".repeat(600));
        fs::create_dir_all(dir.path().join("current/old")).unwrap();
        let files = ["cmdline.txt", "current/cmdline.txt", "current/old/cmdline.bak"];
        for (file, text) in files.iter().zip([WORDS, &far, WORDS]) {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let large = "x".repeat(usize::try_from(LARGEST).unwrap()) + WORDS;
        fs::write(dir.path().join("kernel.img"), &large).unwrap();
        assert_eq!(remove_below(dir.path()).unwrap(), 3);
        for file in files {
            let text = fs::read_to_string(dir.path().join(file)).unwrap();
            assert!(!text.contains("init=") && !text.contains("marco"), "{file}: {text}");
        }
        assert_eq!(fs::read_to_string(dir.path().join("current/cmdline.txt")).unwrap().len(), far.len());
        assert_eq!(fs::read_to_string(dir.path().join("kernel.img")).unwrap(), large);
        assert_eq!(remove_below(dir.path()).unwrap(), 0);
    }
}
