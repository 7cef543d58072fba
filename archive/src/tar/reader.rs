//! Members of a tar stream, one after another, each header read once and with bounded memory.

use std::io::{BufRead, ErrorKind};

use super::header::{BLOCK, Block, Header, MAX_PATH};
use super::pax::{Extended, check_global};
use super::sparse::{Map, Part, TextMap};
use crate::error::read_error;
use crate::{Error, Reason, Refused};

/// Largest extended header: extended attributes are at most 64 KiB each, and files have few.
const MAX_EXTENDED: u64 = 1 << 20;
/// Most zeros after the end: tar pads to whole records, the largest of which are about this long.
const MAX_TAIL: u64 = 16 << 20;
/// The largest size that fits a header's octal digits.
const MAX_OCTAL: u64 = 0o77_777_777_777;

/// What a member is.
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

/// A member.
#[derive(Debug)]
pub(crate) struct Member {
    /// As it stands in the archive.
    pub path: Vec<u8>,
    pub kind: Kind,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Of the file, holes included.
    pub size: u64,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// What it says about itself that cannot be restored anywhere.
    pub lost: u64,
}

/// Takes a block of a member's contents, with its offset in the file.
pub(super) type Take<'a> = dyn FnMut(u64, &[u8]) -> Result<(), Error> + 'a;

/// A stream that is read once.
pub(super) struct TarReader<R> {
    source: R,
    /// Stored parts of the present member that were not handed out, last first.
    parts: Vec<Part>,
    /// Bytes from the end of the present member's data to the next block.
    padding: u64,
}

/// Headers that belong to the next member.
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

    /// The next member; `None` when the archive has ended and the stream with it. Contents that were not asked for are
    /// skipped.
    pub(super) fn next_member(&mut self) -> Result<Option<Member>, Error> {
        self.contents(&mut |_, _| Ok(()))?;
        let mut pending = Pending::default();
        loop {
            let block = self.block()?;
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
                    let data = self.small(header.size).map_err(refused_by(&header))?;
                    let name = data.split(|&byte| byte == 0).next().unwrap_or_default().to_vec();
                    let slot = if header.typeflag == b'L' { &mut pending.long_name } else { &mut pending.long_link };
                    put(slot, name).map_err(refused)?;
                }
                _ => return self.member(&block, header, pending).map(Some),
            }
        }
    }

    /// Hands the present member's stored bytes out as they lie in the source's buffer, each block with its offset in the
    /// file.
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
            // Before POSIX a folder was a file whose name ends with a slash.
            0 if path.ends_with(b"/") => Kind::Folder,
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
            // Readers differ on whether data follows, and so on what the next header is.
            return Err(refused(Reason::SizeMismatch));
        }
        self.padding = stored.next_multiple_of(512) - stored;
        let (size, parts) = match (header.typeflag, extended.sparse) {
            (b'S', None) => self.gnu_sparse(block, stored).map_err(refused_path(&path))?,
            (b'0' | 0 | b'7', Some(sparse)) if kind == Kind::File => {
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

    /// GNU's old format: the map stands in the header and in blocks behind it.
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

    /// Reads a map of format 1.0 off the front of the data; the bytes of data that are left.
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

    /// The data of an extended header, with its padding.
    fn small(&mut self, size: u64) -> Result<Vec<u8>, Error> {
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

    /// After the first block of zeros: there must be nothing but zeros, whose end proves that the stream is whole.
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
        // The end is two blocks of zeros: with one the stream may have been cut.
        if tail < 512 { Err(archive(Reason::Truncated)) } else { Ok(()) }
    }
}

/// How many bytes follow the header. A pax size counts (POSIX); where the header itself says something else that it could
/// have said, another reader would find other members in the same bytes, and so the archive is refused.
fn stored_size(header: u64, extended: Option<u64>) -> Result<u64, Reason> {
    match extended {
        None => Ok(header),
        Some(size) if size == header => Ok(size),
        Some(size) if size > MAX_OCTAL && (header == 0 || header == MAX_OCTAL || header == size & MAX_OCTAL) => {
            Ok(size)
        }
        Some(_) => Err(Reason::SizeMismatch),
    }
}

/// A name from the header, or from one extension; two would leave it to the reader which one counts.
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
        Some(_) => Err(Reason::Damaged("a member has two extended headers of a kind".to_owned())),
    }
}

/// What the source has ready; never empty.
fn available<R: BufRead>(source: &mut R) -> Result<&[u8], Error> {
    loop {
        match source.fill_buf() {
            Ok([]) => return Err(archive(Reason::Truncated)),
            // Asked for again: a borrow that is returned from one arm of a loop would last for all of it.
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

/// Names the member in an error that came without a name.
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
