//! The contents of a partition that may be somebody's. It is read here first, since libblkid takes a sector that cannot be
//! read for one with nothing in it; then libblkid is asked, which knows many more kinds than this program.

use std::fs::File;
use std::io::{Error, ErrorKind, Result, Seek as _, SeekFrom};
use std::path::Path;
use std::time::Duration;

use super::fill;
use crate::system::command;

/// Bytes that are read at the beginning: every superblock that libblkid knows, but for those at the end.
const FRONT: usize = 1 << 20;
/// Bytes that are read at the end: RAID members have their superblocks there.
const BACK: u64 = 256 << 10;
/// Paths of the program: in the installer, and on systems with and without a merged `/usr`.
const BLKID: [&str; 2] = ["/sbin/blkid", "/usr/sbin/blkid"];
/// It reads less than a mebibyte.
const BLKID_TIME: Duration = Duration::from_secs(30);
/// Exit status of `blkid -p`: nothing found, and more than one thing found (blkid(8)).
const NOTHING: i32 = 2;
const AMBIVALENT: i32 = 8;

/// The contents of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Contents {
    /// Nothing: its beginning was emptied, and libblkid finds nothing in the rest.
    Nothing,
    /// A file system that the installer can mount, by its name for mount(2).
    FileSystem(&'static str),
    /// Something else, in words.
    Unknown(String),
    /// It cannot be read, and why.
    Unreadable(String),
}

/// The findings of the bytes alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    /// The beginning holds nothing: all zeros, or all ones, as an erased card may read.
    pub(super) blank: bool,
    /// The file system by its magic number, one that an installation makes.
    pub(super) kind: Option<&'static str>,
}

/// Reads what superblocks can lie in.
pub(super) fn look(device: &Path) -> Result<Seen> {
    let mut file = File::open(device)?;
    let size = file.seek(SeekFrom::End(0))?;
    if size == 0 {
        return Err(Error::new(ErrorKind::UnexpectedEof, "it has no sectors"));
    }
    let mut front = vec![0; usize::try_from(size).unwrap_or(FRONT).min(FRONT)];
    whole(&file, &mut front, 0)?;
    let from = size.saturating_sub(BACK);
    let mut back = vec![0; usize::try_from(size - from).unwrap_or_default()];
    whole(&file, &mut back, from)?;
    let blank = front.iter().all(|byte| *byte == 0) || front.iter().all(|byte| *byte == 0xff);
    Ok(Seen { blank, kind: magic(&front) })
}

fn whole(file: &File, buffer: &mut [u8], at: u64) -> Result<()> {
    let count = fill(file, buffer, at)?;
    if count < buffer.len() {
        let message = format!("it ends at byte {}", at + u64::try_from(count).unwrap_or_default());
        return Err(Error::new(ErrorKind::UnexpectedEof, message));
    }
    Ok(())
}

/// The file system that these first bytes say it is.
fn magic(front: &[u8]) -> Option<&'static str> {
    /// The type, the place, and the bytes there.
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

/// Finds out what lies on a partition. Every doubt is an answer of its own: nothing here is an error that a caller could
/// take for emptiness.
pub(crate) async fn probe(device: &Path) -> Contents {
    let path = device.to_owned();
    let seen = tokio::task::spawn_blocking(move || look(&path)).await.unwrap_or_else(|error| Err(Error::other(error)));
    match seen {
        Err(error) => Contents::Unreadable(error.to_string()),
        Ok(seen) => conclude(seen, &ask(device).await),
    }
}

/// An answer of libblkid.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    /// A kind, by its name there.
    Type(String),
    /// A partition table where a file system should be.
    Table(String),
    Nothing,
    Ambivalent,
    /// It could not be asked.
    Silent(String),
}

async fn ask(device: &Path) -> Answer {
    let Some(program) = BLKID.into_iter().find(|program| Path::new(program).exists()) else {
        return Answer::Silent("there is no blkid here, which could name it".to_owned());
    };
    let device = device.to_string_lossy();
    match command::output(&[program, "-p", "-o", "export", &*device], BLKID_TIME).await {
        Ok((Some(0), text)) => answer(&text),
        Ok((Some(NOTHING), _)) => Answer::Nothing,
        Ok((Some(AMBIVALENT), _)) => Answer::Ambivalent,
        Ok((status, _)) => Answer::Silent(format!("{program} ended with status {status:?}")),
        Err(error) => Answer::Silent(error.to_string()),
    }
}

/// Of the lines `KEY=value`: a partition without a type has only lines about its place in the table.
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
        Answer::Nothing => unknown(match seen.kind {
            Some(kind) => format!("what looks like {kind}, with a superblock that is damaged"),
            None => "data of no known kind, as an encrypted volume without a header is".to_owned(),
        }),
        // Without libblkid: what is blank or ours is still told apart from what may be anything.
        Answer::Silent(why) => match seen.kind {
            Some(kind) => Contents::FileSystem(kind),
            None if seen.blank => Contents::Nothing,
            None => unknown(format!("data of another kind than the installer knows by itself; {why}")),
        },
    }
}

/// The type for mount(2) of what libblkid calls so.
fn mountable(name: &str) -> Option<&'static str> {
    Some(match name {
        // One driver mounts all three.
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
