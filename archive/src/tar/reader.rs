//! Reads the members of a tar stream one after another. Each header is read once, and memory is bounded.

use std::io::{BufRead, ErrorKind};

use super::header::{BLOCK, Block, Header, MAX_PATH};
use super::pax::{Extended, check_global};
use super::sparse::{Map, Part, TextMap};
use crate::error::read_error;
use crate::{Error, Reason, Refused};

/// Maximum size of an extended header. Extended attributes are at most 64 KiB each, and a file has few.
const MAX_EXTENDED: u64 = 1 << 20;
/// Maximum number of zero bytes after the end. tar pads to whole records, and the largest records are about this long.
const MAX_TAIL: u64 = 16 << 20;
/// Largest size that fits into the octal digits of a header.
const MAX_OCTAL: u64 = 0o77_777_777_777;

/// Type of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Folder,
    /// A symbolic link to this target.
    Symlink(Vec<u8>),
    /// A hard link to this path of the archive.
    HardLink(Vec<u8>),
    /// A character device, by major and minor number.
    Character(u32, u32),
    /// A block device, by major and minor number.
    Block(u32, u32),
    Fifo,
}

/// One member of the archive: its headers combined, without its contents.
#[derive(Debug)]
pub(crate) struct Member {
    /// Path as written in the archive, unchecked.
    pub path: Vec<u8>,
    pub kind: Kind,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds since the Unix epoch, and nanoseconds.
    pub mtime: (i64, u32),
    /// Size of the file in bytes, holes included.
    pub size: u64,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Number of attributes that cannot be restored on any machine (ACLs with names instead of numbers).
    pub lost: u64,
}

/// Callback for a block of a member's contents. The first argument is its offset in the file.
pub(super) type Take<'a> = dyn FnMut(u64, &[u8]) -> Result<(), Error> + 'a;

/// Reader of a tar stream. The stream needs no seek.
pub(super) struct TarReader<R> {
    source: R,
    /// Stored parts of the current member that were not handed out yet, in reverse order.
    parts: Vec<Part>,
    /// Bytes from the end of the current member's data to the next block.
    padding: u64,
}

/// Extended headers read so far that apply to the next member.
#[derive(Default)]
struct Pending {
    extended: Option<Extended>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: BufRead> TarReader<R> {
    pub(super) fn new(source: R) -> Self {
        Self { source, parts: Vec::new(), padding: 0 }
    }

    /// Returns the next member, or `None` once the archive and the stream have both ended. Skips contents that the
    /// caller did not read.
    pub(super) fn next_member(&mut self) -> Result<Option<Member>, Error> {
        self.contents(&mut |_, _| Ok(()))?;
        let mut pending = Pending::default();
        loop {
            let block = self.block()?;
            // An extended header without a member is an error: readers differ on whether it would be ignored.
            if block == [0; BLOCK] {
                if pending.extended.is_some() || pending.long_name.is_some() || pending.long_link.is_some() {
                    return Err(archive(Reason::Damaged("a header belongs to no member".to_owned())));
                }
                self.finish()?;
                return Ok(None);
            }
            let header = Header::parse(&block).map_err(archive)?;
            let refused = |reason| Error::from(Refused::entry(&header.path, reason));
            match header.typeflag {
                b'x' => {
                    let data = self.small(header.size).map_err(refused_by(&header))?;
                    put(&mut pending.extended, Extended::parse(&data).map_err(refused)?).map_err(refused)?;
                }
                b'g' => {
                    let data = self.small(header.size).map_err(refused_by(&header))?;
                    check_global(&data).map_err(refused)?;
                }
                b'L' | b'K' => {
                    // GNU tar terminates a long name with a NUL and counts the NUL in the size.
                    let data = self.small(header.size).map_err(refused_by(&header))?;
                    let name = data.split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
                    let slot = if header.typeflag == b'L' { &mut pending.long_name } else { &mut pending.long_link };
                    put(slot, name).map_err(refused)?;
                }
                _ => return self.member(&block, header, pending).map(Some),
            }
        }
    }

    /// Passes the stored bytes of the current member to `take`, straight from the source's buffer.
    pub(super) fn contents(&mut self, take: &mut Take<'_>) -> Result<(), Error> {
        while let Some((mut offset, mut left)) = self.parts.pop() {
            while left > 0 {
                let available = available(&mut self.source)?;
                let count = usize::try_from(left).unwrap_or(usize::MAX).min(available.len());
                take(offset, available.get(..count).unwrap_or_default())?;
                self.source.consume(count);
                let done = u64::try_from(count).unwrap_or(u64::MAX);
                offset += done;
                left -= done;
            }
        }
        let mut padding = [0; BLOCK];
        let length = usize::try_from(std::mem::take(&mut self.padding)).unwrap_or_default();
        fill(&mut self.source, padding.get_mut(..length).unwrap_or_default())
    }

    fn member(&mut self, block: &Block, header: Header, pending: Pending) -> Result<Member, Error> {
        let extended = pending.extended.unwrap_or_default();
        let mut path = override_once(header.path, pending.long_name, extended.path)?;
        let name_of_error = path.clone();
        let refused = |reason| Error::from(Refused::entry(&name_of_error, reason));
        let link = override_once(header.link, pending.long_link, extended.link)?;
        let stored = stored_size(header.size, extended.size).map_err(refused)?;
        let mut kind = match header.typeflag {
            // Before POSIX, a folder was a file whose name ends with a slash.
            0 if path.ends_with(b"/") => Kind::Folder,
            // `7` is a contiguous file of POSIX. GNU tar and libarchive unpack it as a regular one.
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' => Kind::Character(header.device.0, header.device.1),
            b'4' => Kind::Block(header.device.0, header.device.1),
            b'5' => Kind::Folder,
            b'6' => Kind::Fifo,
            other => return Err(refused(Reason::Kind(char::from(other)))),
        };
        if let Kind::Symlink(target) | Kind::HardLink(target) = &mut kind {
            if target.is_empty() {
                return Err(refused(Reason::EmptyName));
            }
            if target.len() > MAX_PATH {
                return Err(refused(Reason::LongName(MAX_PATH)));
            }
            if target.contains(&0) {
                return Err(refused(Reason::ControlCharacter));
            }
        }
        if kind != Kind::File && stored != 0 {
            // Readers disagree on whether data follows such a header, and so on the position of the next header.
            return Err(refused(Reason::SizeMismatch));
        }
        self.padding = stored.next_multiple_of(512) - stored;
        let (size, parts) = match (header.typeflag, extended.sparse) {
            (b'S', None) => self.gnu_sparse(block, stored).map_err(refused_path(&path))?,
            (b'0' | 0 | b'7', Some(sparse)) if kind == Kind::File => {
                // GNU tar stores a placeholder in `path` and the real name in this key.
                if let Some(name) = sparse.name {
                    path = name;
                }
                let real = sparse.real_size.ok_or_else(|| refused(Reason::Sparse))?;
                let mut map = Map::new(real);
                match (sparse.major, sparse.minor, sparse.map) {
                    (Some(1), Some(0), None) => {
                        let left = self.text_map(&mut map, stored).map_err(refused_path(&path))?;
                        (real, map.finish(left).map_err(refused)?)
                    }
                    (None | Some(0), None | Some(1), Some(list)) => {
                        map.push_list(&list).map_err(refused)?;
                        (real, map.finish(stored).map_err(refused)?)
                    }
                    _ => return Err(refused(Reason::Sparse)),
                }
            }
            (_, Some(_)) => return Err(refused(Reason::Sparse)),
            (_, None) => (stored, vec![(0, stored)]),
        };
        self.parts = parts.into_iter().rev().collect();
        Ok(Member {
            path,
            kind,
            mode: header.mode,
            uid: extended.uid.unwrap_or(header.uid),
            gid: extended.gid.unwrap_or(header.gid),
            mtime: extended.mtime.unwrap_or((header.mtime, 0)),
            size,
            xattrs: extended.xattrs,
            lost: extended.lost,
        })
    }

    /// Reads a map in GNU's old format: in the header, and in the blocks that follow it.
    fn gnu_sparse(&mut self, block: &Block, stored: u64) -> Result<(u64, Vec<Part>), Error> {
        let real = super::header::number(block.get(483..495).unwrap_or_default()).map_err(archive)?;
        let mut map = Map::new(real);
        let mut more = map.push_gnu(block, true).map_err(archive)?;
        while more {
            let next = self.block()?;
            more = map.push_gnu(&next, false).map_err(archive)?;
        }
        Ok((real, map.finish(stored).map_err(archive)?))
    }

    /// Reads a map of format 1.0 off the front of the data. Returns the number of data bytes that remain.
    fn text_map(&mut self, map: &mut Map, stored: u64) -> Result<u64, Error> {
        let mut text = TextMap::default();
        let mut left = stored;
        loop {
            left = left.checked_sub(512).ok_or_else(|| archive(Reason::Sparse))?;
            let block = self.block()?;
            if text.push(&block, map).map_err(archive)? {
                return Ok(left);
            }
        }
    }

    /// Reads the data of an extended header, and its padding.
    fn small(&mut self, size: u64) -> Result<Vec<u8>, Error> {
        // The limit is checked before the buffer is allocated: the size comes from the archive.
        let length = usize::try_from(size).ok().filter(|_| size <= MAX_EXTENDED);
        let length = length.ok_or_else(|| archive(Reason::LongHeader(MAX_EXTENDED)))?;
        let mut data = vec![0; length.next_multiple_of(BLOCK)];
        fill(&mut self.source, &mut data)?;
        data.truncate(length);
        Ok(data)
    }

    fn block(&mut self) -> Result<Block, Error> {
        let mut block = [0; BLOCK];
        fill(&mut self.source, &mut block)?;
        Ok(block)
    }

    /// Reads the rest after the first block of zeros. Only zeros may follow, and their end proves that the stream is
    /// complete.
    fn finish(&mut self) -> Result<(), Error> {
        let mut tail: u64 = 0;
        loop {
            let (read, zeros) = match self.source.fill_buf() {
                Ok([]) => break,
                Ok(read) => (read.len(), read.iter().all(|&byte| byte == 0)),
                Err(err) if err.kind() == ErrorKind::Interrupted => continue,
                Err(err) => return Err(read_error(err)),
            };
            self.source.consume(read);
            tail += u64::try_from(read).unwrap_or(u64::MAX);
            if !zeros || tail > MAX_TAIL {
                return Err(archive(Reason::Damaged("something follows its end".to_owned())));
            }
        }
        // POSIX ends an archive with two blocks of zeros. After only one, the stream may have been cut.
        if tail < 512 { Err(archive(Reason::Truncated)) } else { Ok(()) }
    }
}

/// Returns the number of bytes that follow the header. A pax size takes precedence (POSIX). If the header could have
/// held the same value but holds a different one, another reader would find other members in the same bytes. Such an
/// archive is refused.
fn stored_size(header: u64, extended: Option<u64>) -> Result<u64, Reason> {
    match extended {
        None => Ok(header),
        Some(size) if size == header => Ok(size),
        // Values above the octal limit do not fit. Writers put zero, the maximum or the truncated value into the
        // header.
        Some(size) if size > MAX_OCTAL && (header == 0 || header == MAX_OCTAL || header == size & MAX_OCTAL) => {
            Ok(size)
        }
        Some(_) => Err(Reason::SizeMismatch),
    }
}

/// Returns the name from the header or from the one extension that gives it. Two extensions are refused: readers
/// disagree on which one applies.
fn override_once(header: Vec<u8>, gnu: Option<Vec<u8>>, pax: Option<Vec<u8>>) -> Result<Vec<u8>, Error> {
    match (gnu, pax) {
        (None, None) => Ok(header),
        (Some(name), None) | (None, Some(name)) => Ok(name),
        (Some(name), Some(_)) => {
            Err(Refused::entry(&name, Reason::Damaged("two extended headers name it".to_owned())).into())
        }
    }
}

fn put<T>(slot: &mut Option<T>, value: T) -> Result<(), Reason> {
    match slot.replace(value) {
        None => Ok(()),
        // A second header of the same kind: some readers use the first one, others the last.
        Some(_) => Err(Reason::Damaged("a member has two extended headers of a kind".to_owned())),
    }
}

/// Returns the bytes that the source has buffered, never an empty slice.
fn available<R: BufRead>(source: &mut R) -> Result<&[u8], Error> {
    loop {
        match source.fill_buf() {
            Ok([]) => return Err(archive(Reason::Truncated)),
            // The buffer is requested again below. The borrow checker would extend a borrow returned here to the whole
            // loop.
            Ok(_) => break,
            Err(err) if err.kind() == ErrorKind::Interrupted => {}
            Err(err) => return Err(read_error(err)),
        }
    }
    source.fill_buf().map_err(read_error)
}

fn fill<R: BufRead>(source: &mut R, buffer: &mut [u8]) -> Result<(), Error> {
    source.read_exact(buffer).map_err(read_error)
}

fn archive(reason: Reason) -> Error {
    Refused::archive(reason).into()
}

/// Adds the member's name to an error that has none.
fn refused_by(header: &Header) -> impl FnOnce(Error) -> Error + use<> {
    refused_path(&header.path)
}

fn refused_path(path: &[u8]) -> impl FnOnce(Error) -> Error + use<> {
    let path = path.to_vec();
    move |err| match err {
        Error::Refused(Refused { entry: None, reason }) => Refused::entry(&path, reason).into(),
        other => other,
    }
}
