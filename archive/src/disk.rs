//! Whole-disk images as a stream. The partition table is read off the front, then each partition passes once, in order.

mod boot;
mod table;

use std::io::{BufRead, Cursor, ErrorKind, Read as _};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::facts::{Facts, LIST, listed};
use crate::tar::{examine_tar, is_header};
use crate::{Error, Reason, Refused, TarSummary, foreign};
use boot::BootPartition;
use table::read_table;
pub use table::{FRONT, Meant, Partition};

/// Size of a sector in bytes.
pub(crate) const SECTOR: usize = 512;
/// Maximum size of an image in bytes. This is larger than any card used in a Pi.
const MAX_DISK: u64 = 256 << 30;
/// Bytes between two calls of `progress`.
const PROGRESS_STEP: u64 = 1 << 20;
/// Offset and value of the magic number of ext2, ext3 and ext4 (kernel documentation, filesystems/ext4, "Super Block").
const EXT_MAGIC: (usize, [u8; 2]) = (1080, [0x53, 0xef]);

/// File system of a partition, determined by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// FAT12, FAT16 or FAT32.
    Fat,
    /// ext2, ext3 or ext4.
    Ext,
    /// Any other file system, or none.
    Other,
}

/// Receives the contents of partitions.
pub trait Partitions {
    /// Starts a partition. Returns false to skip its contents.
    ///
    /// # Errors
    /// Returns an error if the partition cannot be stored, for example because it is too large.
    fn begin(&mut self, partition: &Partition, file_system: FileSystem) -> Result<bool, Error>;

    /// Receives bytes of the partition that was started last, in order. `offset` counts from the partition's start.
    ///
    /// # Errors
    /// Returns an error if the bytes cannot be stored.
    fn take(&mut self, offset: u64, block: &[u8]) -> Result<(), Error>;
}

/// Totals of a disk image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskSummary {
    /// Number of partitions in its table.
    pub partitions: u64,
    /// Size of the whole image in bytes.
    pub bytes: u64,
    /// True if the table has an extended partition. Its logical partitions are not read.
    pub extended: bool,
}

/// Returns true if a stream that starts with these bytes is a disk image and not a tarball. Needs a whole sector.
pub fn is_disk(start: &[u8]) -> bool {
    table::is_boot_record(start)
}

/// Returns the partitions of a disk image in the order of their offsets. `front`: its first [`FRONT`] bytes.
///
/// # Errors
/// `Refused` if the table is invalid.
pub fn partitions(front: &[u8]) -> Result<Vec<Partition>, Error> {
    read_table(front)
}

/// Returns the bytes that an image takes on a card. `front`: its first [`FRONT`] bytes.
///
/// # Errors
/// As for [`partitions`].
pub fn length(front: &[u8]) -> Result<u64, Error> {
    table::length(front)
}

/// Room that the file systems of an image need, in bytes. 0: not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// Room for the boot partition.
    pub boot: u64,
    /// Room for the root.
    pub root: u64,
}

/// Returns the minimum room that an image needs, from its table alone. Only the contents, far behind the table, tell
/// which partition is the root. Of several candidates the smallest one counts, so an image that fits is never refused.
///
/// # Errors
/// As for [`partitions`].
pub fn needs(front: &[u8]) -> Result<Needs, Error> {
    let partitions = read_table(front)?;
    let smallest = |meant| {
        let lengths = partitions.iter().filter(|partition| partition.meant == meant).map(|found| found.length);
        lengths.min().unwrap_or_default()
    };
    Ok(Needs { boot: smallest(Meant::Fat), root: smallest(Meant::Linux) })
}

/// Reads a decompressed disk image to its end and passes its partitions to `partitions`. `progress` receives the bytes
/// so far, once per MiB and at the end.
///
/// # Errors
/// `Refused` if the table is invalid or the stream ends before the last partition; `Io` if reading fails; and any error
/// of `partitions`.
pub fn read_disk<R: BufRead>(
    reader: R,
    partitions: &mut dyn Partitions,
    progress: &mut dyn FnMut(u64),
) -> Result<DiskSummary, Error> {
    let mut stream = Stream { reader, at: 0, reported: 0, progress };
    let front = stream.front()?;
    let table = read_table(&front)?;
    for partition in &table {
        stream.skip_to(partition.start)?;
        stream.partition(partition, partitions)?;
    }
    stream.rest()?;
    let bytes = stream.at;
    (stream.progress)(bytes);
    let extended = table::has_extended(&front);
    Ok(DiskSummary { partitions: u64::try_from(table.len()).unwrap_or(u64::MAX), bytes, extended })
}

/// Result of reading an image to its end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Examined {
    /// Totals. Entries are members of a tarball, or partitions of a disk.
    pub summary: TarSummary,
    /// Facts by which the image is judged as a system.
    pub facts: Facts,
}

/// Reads an image to its end and checks every rule. The image is a decompressed tarball or disk image; entries are
/// members or partitions. `progress` receives the unpacked bytes so far, once per MiB and at the end.
///
/// # Errors
/// As for [`check_tar`](crate::check_tar) and [`read_disk`]. Other known formats are refused by name.
pub fn check_image<R: BufRead>(reader: R, progress: &mut dyn FnMut(u64)) -> Result<TarSummary, Error> {
    examine_image(reader, None, progress).map(|examined| examined.summary)
}

/// Like [`check_image`], and also collects the facts. An image that no Pi can start is reported in the facts, not as an
/// error. `scratch`: a folder for a temporary copy of a disk image's boot partition (up to 1 GiB). `None`: the boot
/// partition is not inspected.
///
/// # Errors
/// As for [`check_image`]; `Io` if the boot partition cannot be stored.
pub fn examine_image<R: BufRead>(
    mut reader: R,
    scratch: Option<&Path>,
    progress: &mut dyn FnMut(u64),
) -> Result<Examined, Error> {
    let mut start = Vec::with_capacity(SECTOR);
    (&mut reader).take(512).read_to_end(&mut start).map_err(crate::error::read_error)?;
    let disk = is_disk(&start);
    // The formats are told apart by one sector. Naming a foreign format takes more, see `foreign::FRONT`.
    if !disk && !is_header(&start) {
        let rest = foreign::FRONT.saturating_sub(u64::try_from(start.len()).unwrap_or_default());
        (&mut reader).take(rest).read_to_end(&mut start).map_err(crate::error::read_error)?;
        foreign::refuse(&start)?;
    }
    // The stream cannot be rewound, so the bytes that were inspected are put back in front of it.
    let whole = Cursor::new(start).chain(reader);
    if !disk {
        let (summary, facts) = examine_tar(whole, progress)?;
        return Ok(Examined { summary, facts });
    }
    let mut found = Found { scratch, ..Found::default() };
    let read = read_disk(whole, &mut found, progress)?;
    let summary =
        TarSummary { entries: read.partitions, unpacked_bytes: read.bytes, disk: true, ..TarSummary::default() };
    Ok(Examined { summary, facts: found.facts(read.extended) })
}

/// File systems and boot files found in a disk image.
#[derive(Default)]
struct Found<'a> {
    fat: bool,
    ext: bool,
    needs: Needs,
    others: Vec<String>,
    scratch: Option<&'a Path>,
    boot: Option<BootPartition>,
}

impl Found<'_> {
    fn facts(self, extended: bool) -> Facts {
        let mut lacks = Vec::new();
        if !self.fat {
            lacks.push("a FAT partition to boot from".to_owned());
        }
        if !self.ext {
            lacks.push("an ext4 partition for the root".to_owned());
        }
        let cure = if extended && !self.ext {
            "it has logical partitions, which a Pi's card of ours has not: mount its root and use marcoctl image pack; "
        } else if !self.ext && !self.others.is_empty() {
            "of another file system than ext4: mount its root and use marcoctl image pack; "
        } else if lacks.is_empty() {
            ""
        } else {
            "push the image of a whole card; "
        };
        let mut facts = Facts::default();
        match self.boot.map_or(Ok(None), BootPartition::list) {
            // Too large to keep gives no facts. What is not known is no reason to refuse.
            Ok(None) => {}
            Ok(Some(folder)) => {
                let missing = folder.best().lacks;
                if !missing.is_empty() {
                    lacks.push(format!("in its boot partition {}", listed(&missing)));
                }
                facts = folder.facts();
            }
            Err(error) => {
                lacks.push(format!("a boot partition that can be read ({error}; fsck.fat tells more)"));
            }
        }
        if lacks.is_empty() {
            return Facts { needs: self.needs, ..facts };
        }
        let others =
            if self.others.is_empty() { String::new() } else { format!(" (there is {})", self.others.join(", ")) };
        let lacks = lacks.join(" and ");
        Facts::refused(format!(
            "this disk image is no system that a Pi can start: it lacks {lacks}{others}; {cure}{LIST}"
        ))
    }
}

impl Partitions for Found<'_> {
    fn begin(&mut self, partition: &Partition, file_system: FileSystem) -> Result<bool, Error> {
        match file_system {
            // The installer copies the first FAT and the first ext file system to the card. Others are ignored.
            FileSystem::Fat if !self.fat => {
                (self.fat, self.needs.boot) = (true, partition.length);
                self.boot = self.scratch.map(|folder| BootPartition::new(folder, partition.length)).transpose()?;
                return Ok(self.boot.is_some());
            }
            FileSystem::Ext if !self.ext => (self.ext, self.needs.root) = (true, partition.length),
            // A few are enough for the message.
            FileSystem::Other if self.others.len() < 4 => {
                self.others.push(format!("something else in partition {}", partition.number));
            }
            FileSystem::Fat | FileSystem::Ext | FileSystem::Other => {}
        }
        Ok(false)
    }

    fn take(&mut self, offset: u64, block: &[u8]) -> Result<(), Error> {
        self.boot.as_mut().map_or(Ok(()), |boot| boot.take(offset, block))
    }
}

struct Stream<'a, R> {
    reader: R,
    at: u64,
    reported: u64,
    progress: &'a mut dyn FnMut(u64),
}

impl<R: BufRead> Stream<'_, R> {
    /// Reads the bytes that may hold the table. No common tool starts a partition within them.
    fn front(&mut self) -> Result<Vec<u8>, Error> {
        let mut front = Vec::with_capacity(FRONT);
        while front.len() < FRONT {
            let missing = FRONT - front.len();
            let ready = self.ready()?;
            if ready.is_empty() {
                return Err(Refused::archive(Reason::Truncated).into());
            }
            let part = ready.get(..missing.min(ready.len())).unwrap_or_default();
            front.extend_from_slice(part);
            let count = part.len();
            self.consume(count)?;
        }
        Ok(front)
    }

    fn skip_to(&mut self, start: u64) -> Result<(), Error> {
        while self.at < start {
            let left = usize::try_from(start - self.at).unwrap_or(usize::MAX);
            let count = self.ready()?.len().min(left);
            if count == 0 {
                return Err(Refused::archive(Reason::Truncated).into());
            }
            self.consume(count)?;
        }
        Ok(())
    }

    fn partition(&mut self, partition: &Partition, to: &mut dyn Partitions) -> Result<(), Error> {
        let end = partition.start + partition.length;
        // The first bytes show the file system. `begin` needs it before the contents are passed on.
        let mut first = Vec::new();
        while first.len() < EXT_MAGIC.0 + 2 && self.at < end {
            let left = usize::try_from(end - self.at).unwrap_or(usize::MAX);
            let ready = self.ready()?;
            if ready.is_empty() {
                return Err(Refused::archive(Reason::Truncated).into());
            }
            let part = ready.get(..left.min(ready.len()).min(SECTOR * 8)).unwrap_or_default();
            first.extend_from_slice(part);
            let count = part.len();
            self.consume(count)?;
        }
        if !to.begin(partition, file_system(&first))? {
            return self.skip_to(end);
        }
        to.take(0, &first)?;
        while self.at < end {
            let (offset, left) = (self.at - partition.start, usize::try_from(end - self.at).unwrap_or(usize::MAX));
            let ready = self.ready()?;
            let block = ready.get(..left.min(ready.len())).unwrap_or_default();
            if block.is_empty() {
                return Err(Refused::archive(Reason::Truncated).into());
            }
            to.take(offset, block)?;
            let count = block.len();
            self.consume(count)?;
        }
        Ok(())
    }

    /// Reads the rest after the last partition: padding, or the backup table of a GPT. A truncated compressed stream
    /// shows only at its end.
    fn rest(&mut self) -> Result<(), Error> {
        loop {
            let count = self.ready()?.len();
            if count == 0 {
                return Ok(());
            }
            self.consume(count)?;
        }
    }

    fn ready(&mut self) -> Result<&[u8], Error> {
        // Two calls: the borrow checker would extend a borrow returned from the loop to the whole loop.
        loop {
            match self.reader.fill_buf() {
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(crate::error::read_error(error)),
            }
        }
        self.reader.fill_buf().map_err(crate::error::read_error)
    }

    fn consume(&mut self, count: usize) -> Result<(), Error> {
        self.reader.consume(count);
        self.at += u64::try_from(count).unwrap_or(u64::MAX);
        if self.at > MAX_DISK {
            return Err(Refused::archive(Reason::TooLarge(MAX_DISK)).into());
        }
        if self.at - self.reported >= PROGRESS_STEP {
            self.reported = self.at;
            (self.progress)(self.at);
        }
        Ok(())
    }
}

fn file_system(first: &[u8]) -> FileSystem {
    let at = |offset: usize, length: usize| first.get(offset..offset + length).unwrap_or_default();
    if at(EXT_MAGIC.0, 2) == EXT_MAGIC.1 {
        FileSystem::Ext
    // The signature of a boot sector alone is not enough: NTFS and exFAT have it too.
    } else if at(510, 2) == [0x55, 0xaa] && (at(54, 3) == b"FAT" || at(82, 3) == b"FAT") {
        FileSystem::Fat
    } else {
        FileSystem::Other
    }
}

#[cfg(test)]
mod tests;
