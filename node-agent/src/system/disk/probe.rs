//! Tells what a partition holds that may be an owner's. The agent reads it first, because libblkid takes an unreadable
//! sector for an empty one. Then it asks libblkid, which knows many more formats than this program.

use std::fs::File;
use std::io::{Error, ErrorKind, Result, Seek as _, SeekFrom};
use std::path::Path;
use std::time::Duration;

use super::fill;
use crate::system::{SystemError, command};

/// Bytes read at the beginning: every superblock that libblkid knows, except those at the end.
const FRONT: usize = 1 << 20;
/// Bytes read at the end: some RAID formats have their superblocks there.
const BACK: u64 = 256 << 10;
/// Paths of blkid: in the installer, and on systems with and without a merged `/usr`.
const BLKID: [&str; 2] = ["/sbin/blkid", "/usr/sbin/blkid"];
/// Time limit. blkid reads less than a mebibyte.
const BLKID_TIME: Duration = Duration::from_secs(30);
/// Exit statuses of `blkid -p` (blkid(8)): nothing found, and more than one format found.
const NOTHING: i32 = 2;
const AMBIVALENT: i32 = 8;

/// The contents of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Contents {
    /// No data: the beginning is blank, and libblkid finds nothing in the rest.
    Nothing,
    /// A file system that the installer can mount, named as in mount(2).
    FileSystem(&'static str),
    /// Other contents, described in words.
    Unknown(String),
    /// The contents cannot be read, with the error.
    Unreadable(String),
}

/// Findings from the bytes alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    /// True if the beginning is all zeros or all ones: some cards read erased blocks as ones.
    pub(super) blank: bool,
    /// The same of the end.
    pub(super) blank_end: bool,
    /// File system by its magic number, of those that an installation makes.
    pub(super) kind: Option<&'static str>,
}

/// Reads every place where a superblock can be.
pub(super) fn look(device: &Path) -> Result<Seen> {
    let mut file = File::open(device)?;
    let size = file.seek(SeekFrom::End(0))?;
    // Zero bytes can always be read, and would count as blank.
    if size == 0 {
        return Err(Error::new(ErrorKind::UnexpectedEof, "it has no sectors"));
    }
    let mut front = vec![0; usize::try_from(size).unwrap_or(FRONT).min(FRONT)];
    whole(&file, &mut front, 0)?;
    let from = size.saturating_sub(BACK);
    let mut back = vec![0; usize::try_from(size - from).unwrap_or_default()];
    // Also for read errors: `blkid -p` reports "nothing found" for a device whose every sector fails.
    whole(&file, &mut back, from)?;
    Ok(Seen { blank: is_blank(&front), blank_end: is_blank(&back), kind: magic(&front) })
}

fn is_blank(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0) || bytes.iter().all(|byte| *byte == 0xff)
}

fn whole(file: &File, buffer: &mut [u8], at: u64) -> Result<()> {
    let count = fill(file, buffer, at)?;
    if count < buffer.len() {
        let message = format!("it ends at byte {}", at + u64::try_from(count).unwrap_or_default());
        return Err(Error::new(ErrorKind::UnexpectedEof, message));
    }
    Ok(())
}

/// File system by the magic number in these first bytes.
fn magic(front: &[u8]) -> Option<&'static str> {
    /// Type, offset of the magic number, and its bytes.
    const MAGIC: [(&str, usize, &[u8]); 6] = [
        ("ext4", 1024 + 56, &[0x53, 0xef]),
        ("btrfs", 65536 + 64, b"_BHRfS_M"),
        ("f2fs", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
        ("xfs", 0, b"XFSB"),
        ("vfat", 82, b"FAT32"),
        ("vfat", 54, b"FAT1"),
    ];
    let found = MAGIC.iter().find(|(_, place, magic)| front.get(*place..place + magic.len()) == Some(magic));
    found.map(|(kind, ..)| *kind)
}

/// Finds the contents of a partition. It returns doubts and failures as [`Contents`], so that no caller can take an
/// error for emptiness.
pub(crate) async fn probe(device: &Path) -> Contents {
    let path = device.to_owned();
    let seen = tokio::task::spawn_blocking(move || look(&path)).await.unwrap_or_else(|error| Err(Error::other(error)));
    match seen {
        Err(error) => Contents::Unreadable(error.to_string()),
        Ok(seen) => conclude(seen, &ask(&BLKID, device).await),
    }
}

/// The answer of libblkid.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    /// A format, by libblkid's name.
    Type(String),
    /// A partition table in place of a file system.
    Table(String),
    Nothing,
    Ambivalent,
    /// This system has no blkid.
    Absent,
    /// blkid was asked and did not answer.
    Failed(String),
}

async fn ask(programs: &[&str], device: &Path) -> Answer {
    let Some(program) = programs.iter().find(|program| Path::new(program).exists()) else { return Answer::Absent };
    let device = device.to_string_lossy();
    heard(program, command::output(&[program, "-p", "-o", "export", &*device], BLKID_TIME).await)
}

/// Reads the outcome of blkid: its status (`None` after a signal) and its output.
fn heard(program: &str, outcome: std::result::Result<(Option<i32>, String), SystemError>) -> Answer {
    match outcome {
        Ok((Some(0), text)) => answer(&text),
        Ok((Some(NOTHING), _)) => Answer::Nothing,
        Ok((Some(AMBIVALENT), _)) => Answer::Ambivalent,
        Ok((Some(status), _)) => Answer::Failed(format!("{program} ended with status {status}")),
        Ok((None, _)) => Answer::Failed(format!("{program} was killed")),
        Err(error) => Answer::Failed(error.to_string()),
    }
}

/// Reads the lines `KEY=value`. For a partition without a type they only describe its place in the table.
fn answer(text: &str) -> Answer {
    let value = |key| text.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
    match (value("TYPE="), value("PTTYPE=")) {
        (Some(kind), _) => Answer::Type(kind),
        (None, Some(table)) => Answer::Table(table),
        (None, None) => Answer::Nothing,
    }
}

fn conclude(seen: Seen, answer: &Answer) -> Contents {
    let unknown = |what: String| Contents::Unknown(what);
    match answer {
        Answer::Type(name) => match mountable(name) {
            Some(kind) => Contents::FileSystem(kind),
            None => unknown(name.clone()),
        },
        Answer::Table(name) => unknown(format!("a partition table ({name})")),
        Answer::Ambivalent => unknown("more than one file system or volume (wipefs -n lists them)".to_owned()),
        Answer::Nothing if seen.blank => Contents::Nothing,
        // libblkid also checks the superblock, so its "nothing" outweighs a magic number.
        Answer::Nothing => unknown(match seen.kind {
            Some(kind) => format!("what looks like {kind}, with a superblock that is damaged"),
            None => "data of no known kind, as an encrypted volume without a header is".to_owned(),
        }),
        // It may have failed at the very sectors that hold the data, or known a format behind a blank beginning.
        Answer::Failed(why) => Contents::Unreadable(why.clone()),
        // Without libblkid, only blank partitions and the installer's own formats are certain.
        Answer::Absent => match seen.kind {
            Some(kind) => Contents::FileSystem(kind),
            // Some members of a RAID have their superblock at the end, behind a blank beginning.
            None if seen.blank && seen.blank_end => Contents::Nothing,
            None => unknown(
                "data of another kind than the installer knows by itself; there is no blkid here, which could name it"
                    .to_owned(),
            ),
        },
    }
}

/// libblkid's name of a format as a type for mount(2). `None`: the installer cannot mount it.
fn mountable(name: &str) -> Option<&'static str> {
    Some(match name {
        // One kernel driver mounts all three.
        "ext2" | "ext3" | "ext4" => "ext4",
        "btrfs" => "btrfs",
        "f2fs" => "f2fs",
        "xfs" => "xfs",
        "vfat" => "vfat",
        _ => return None,
    })
}

#[cfg(test)]
mod tests;
