//! The central directory and the local headers, which must agree (PKWARE's APPNOTE.TXT, section 4.3).

use std::io::{ErrorKind, Read, Seek, SeekFrom};

use super::names::Names;
use super::{MAX_ENTRIES, MAX_RATIO, MAX_UNPACKED, RATIO_FREE};
use crate::{Error, Reason, Refused};

/// Maximum size of the central directory in bytes: 4096 entries with 1 KiB of names and extra fields each.
const MAX_DIRECTORY: u64 = 4 << 20;
/// Size of the end record in bytes, without its comment.
const END_SIZE: u64 = 22;
const END_SIGNATURE: [u8; 4] = *b"PK\x05\x06";
const CENTRAL_SIGNATURE: u32 = 0x0201_4b50;
const LOCAL_SIGNATURE: u32 = 0x0403_4b50;
const DESCRIPTOR_SIGNATURE: u32 = 0x0807_4b50;
const LOCAL_SIZE: u64 = 30;

const FLAG_ENCRYPTED: u16 = 1 | 1 << 6 | 1 << 13;
const FLAG_DESCRIPTOR: u16 = 1 << 3;
const FLAG_PATCH: u16 = 1 << 5;
const FLAG_UTF8: u16 = 1 << 11;

/// Compression method of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Store,
    Deflate,
}

/// An entry with checked headers.
#[derive(Debug)]
pub(super) struct Entry {
    /// Path without the slash at the end of a folder's name.
    pub name: String,
    pub folder: bool,
    pub method: Method,
    pub crc: u32,
    pub packed_size: u64,
    pub size: u64,
    pub data_start: u64,
}

/// A header of the central directory.
struct Central {
    raw_name: Vec<u8>,
    flags: u16,
    method: u16,
    crc: u32,
    packed_size: u32,
    size: u32,
    attributes: u32,
    local_offset: u32,
}

/// Reader of little-endian fields. Returns `Truncated` at the end of the bytes.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Refused> {
        let (head, tail) = self.0.split_at_checked(len).ok_or_else(|| Refused::archive(Reason::Truncated))?;
        self.0 = tail;
        Ok(head)
    }
    fn u16(&mut self) -> Result<u16, Refused> {
        Ok(self.take(2)?.iter().rev().fold(0, |sum, &byte| sum << 8 | u16::from(byte)))
    }
    fn u32(&mut self) -> Result<u32, Refused> {
        Ok(self.take(4)?.iter().rev().fold(0, |sum, &byte| sum << 8 | u32::from(byte)))
    }
}

/// Returns all entries in the order of the central directory, with headers and names checked.
pub(super) fn read<R: Read + Seek>(reader: &mut R) -> Result<Vec<Entry>, Error> {
    let (count, directory, directory_start) = read_directory(reader)?;
    let mut fields = Fields(&directory);
    let mut names = Names::default();
    let mut entries = Vec::new();
    let mut extents = Vec::new();
    let mut unpacked: u64 = 0;
    for _ in 0..count {
        let central = read_central(&mut fields)?;
        let refused = |reason| Error::from(Refused::entry(&central.raw_name, reason));
        let (name, folder, method) = check_central(&central).map_err(refused)?;
        names.add(&name, folder).map_err(refused)?;
        unpacked += u64::from(central.size);
        if unpacked > MAX_UNPACKED {
            return Err(refused(Reason::TooLarge(MAX_UNPACKED)));
        }
        let (data_start, end) = check_local(reader, &central)?;
        extents.push((u64::from(central.local_offset), end));
        entries.push(Entry {
            name,
            folder,
            method,
            crc: central.crc,
            packed_size: u64::from(central.packed_size),
            size: u64::from(central.size),
            data_start,
        });
    }
    if !fields.0.is_empty() {
        return Err(damaged("the central directory has more than its entries"));
    }
    // Every byte belongs to exactly one entry. Nothing is hidden, and no bytes are unpacked twice (the overlap bomb).
    extents.sort_unstable();
    let mut at = 0;
    for (start, end) in extents {
        if start != at {
            return Err(Refused::archive(Reason::Overlap).into());
        }
        at = end;
    }
    if at != directory_start {
        return Err(Refused::archive(Reason::Overlap).into());
    }
    Ok(entries)
}

/// Returns the number of entries, the bytes of the central directory, and its offset.
fn read_directory<R: Read + Seek>(reader: &mut R) -> Result<(u16, Vec<u8>, u64), Error> {
    let length = reader.seek(SeekFrom::End(0)).map_err(Error::io("seek in the zip"))?;
    // The end record has a comment of up to 64 KiB behind it, so it is searched from the end.
    let tail_start = length.saturating_sub(END_SIZE + u64::from(u16::MAX));
    let tail = read_at(reader, tail_start, length - tail_start)?;
    let end_at = tail
        .windows(END_SIGNATURE.len())
        .rposition(|window| window == END_SIGNATURE)
        .ok_or_else(|| damaged("there is no end record; this is no zip, or it is cut short"))?;
    let end_start = tail_start + u64::try_from(end_at).unwrap_or(u64::MAX);
    let mut end = Fields(tail.get(end_at..).unwrap_or_default());
    end.take(4)?;
    let (disk, directory_disk, count_here, count) = (end.u16()?, end.u16()?, end.u16()?, end.u16()?);
    let (size, start, comment) = (end.u32()?, end.u32()?, end.u16()?);
    if end.0.len() != usize::from(comment) {
        // The comment must end with the file. Otherwise a signature inside it gives another reader another directory.
        return Err(damaged("bytes follow the end record"));
    }
    if count == u16::MAX || size == u32::MAX || start == u32::MAX {
        return Err(damaged("it has zip64 fields, which boot files never need; pack it again without them"));
    }
    if disk != 0 || directory_disk != 0 || count_here != count {
        return Err(damaged("it is one of several parts"));
    }
    if u64::from(count) > MAX_ENTRIES {
        return Err(Refused::archive(Reason::TooManyEntries(MAX_ENTRIES)).into());
    }
    if count == 0 {
        return Err(Refused::archive(Reason::Empty).into());
    }
    let (size, start) = (u64::from(size), u64::from(start));
    if size > MAX_DIRECTORY {
        return Err(damaged("the central directory is too large"));
    }
    // Data in front of the archive (a self-extracting zip) would shift all offsets for lenient readers.
    if start + size != end_start {
        return Err(damaged("the central directory does not end where the end record begins"));
    }
    Ok((count, read_at(reader, start, size)?, start))
}

fn read_central(fields: &mut Fields<'_>) -> Result<Central, Refused> {
    if fields.u32()? != CENTRAL_SIGNATURE {
        return Err(Refused::archive(Reason::Damaged("a central header has no signature".to_owned())));
    }
    fields.take(4)?; // versions
    let (flags, method) = (fields.u16()?, fields.u16()?);
    fields.take(4)?; // time and date
    let (crc, packed_size, size) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let (name, extra, comment) = (fields.u16()?, fields.u16()?, fields.u16()?);
    let disk = fields.u16()?;
    fields.take(2)?; // internal attributes
    let (attributes, local_offset) = (fields.u32()?, fields.u32()?);
    let raw_name = fields.take(usize::from(name))?.to_vec();
    let extra = fields.take(usize::from(extra))?;
    fields.take(usize::from(comment))?;
    if disk != 0 {
        return Err(Refused::entry(&raw_name, Reason::Damaged("it is on another part".to_owned())));
    }
    check_extra(&raw_name, extra)?;
    Ok(Central { raw_name, flags, method, crc, packed_size, size, attributes, local_offset })
}

/// Refuses extra fields that would change name or size for another reader.
fn check_extra(raw_name: &[u8], extra: &[u8]) -> Result<(), Refused> {
    let mut fields = Fields(extra);
    // Some writers pad with one to three zero bytes, too few for a header.
    while fields.0.len() >= 4 {
        let (id, len) = (fields.u16()?, fields.u16()?);
        let data = fields
            .take(usize::from(len))
            .map_err(|_| Refused::entry(raw_name, Reason::Damaged("an extra field is cut short".to_owned())))?;
        match id {
            0x0001 => {
                let why = "it has zip64 fields, which boot files never need; pack it again without them";
                return Err(Refused::entry(raw_name, Reason::Damaged(why.to_owned())));
            }
            // Info-ZIP's Unicode path. Readers that know it use this name instead of the header's.
            0x7075 if data.get(5..) != Some(raw_name) => {
                return Err(Refused::entry(raw_name, Reason::HeaderMismatch("the name (Unicode path field)")));
            }
            _ => {}
        }
    }
    Ok(())
}

fn check_central(central: &Central) -> Result<(String, bool, Method), Reason> {
    if central.flags & FLAG_ENCRYPTED != 0 {
        return Err(Reason::Encrypted);
    }
    if central.flags & FLAG_PATCH != 0 {
        return Err(Reason::Damaged("it is a patch".to_owned()));
    }
    let method = match central.method {
        0 => Method::Store,
        8 => Method::Deflate,
        other => return Err(Reason::Method(other)),
    };
    // Without compression the sizes are equal. A difference would shift the next entry.
    if method == Method::Store && central.packed_size != central.size {
        return Err(Reason::HeaderMismatch("the packed size"));
    }
    let name = std::str::from_utf8(&central.raw_name).map_err(|_| Reason::NotUtf8)?;
    // Without the flag, the name's encoding is the reader's choice (CP437, or its locale).
    if !name.is_ascii() && central.flags & FLAG_UTF8 == 0 {
        return Err(Reason::NotUtf8);
    }
    let (name, folder) = match name.strip_suffix('/') {
        Some(folder) => (folder, true),
        None => (name, false),
    };
    // Upper half: Unix mode. It is honoured for any "made by" system. Lower half: MS-DOS attributes.
    let wanted_type = if folder { 0o040_000 } else { 0o100_000 };
    let unix_type = (central.attributes >> 16) & 0o170_000;
    let dos_folder = central.attributes & 0x10 != 0;
    let dos_label = central.attributes & 0x08 != 0;
    if (unix_type != 0 && unix_type != wanted_type) || (dos_folder && !folder) || dos_label {
        return Err(Reason::NotAFile);
    }
    if folder && central.size != 0 {
        return Err(Reason::NotAFile);
    }
    let (size, packed) = (u64::from(central.size), u64::from(central.packed_size));
    if size > RATIO_FREE && size > packed.saturating_mul(MAX_RATIO) {
        return Err(Reason::Ratio(MAX_RATIO));
    }
    Ok((name.to_owned(), folder, method))
}

/// Compares the local header and the optional data descriptor with the central header. Returns the offset of the
/// contents and the end of the entry.
fn check_local<R: Read + Seek>(reader: &mut R, central: &Central) -> Result<(u64, u64), Error> {
    let refused = |reason| Error::from(Refused::entry(&central.raw_name, reason));
    let mismatch = |what| refused(Reason::HeaderMismatch(what));
    let start = u64::from(central.local_offset);
    let header = read_at(reader, start, LOCAL_SIZE)?;
    let mut fields = Fields(&header);
    if fields.u32()? != LOCAL_SIGNATURE {
        return Err(mismatch("where the entry begins"));
    }
    fields.take(2)?; // version
    let (flags, method) = (fields.u16()?, fields.u16()?);
    fields.take(4)?; // time and date
    let (crc, packed_size, size) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let (name_len, extra_len) = (u64::from(fields.u16()?), u64::from(fields.u16()?));
    let described = flags & FLAG_DESCRIPTOR != 0;
    // With a descriptor, the sizes follow the contents, and the local header may have zeros.
    let fits = |local: u32, value: u32| local == value || (described && local == 0);
    if flags != central.flags {
        return Err(mismatch("the flags"));
    }
    if method != central.method {
        return Err(mismatch("the method"));
    }
    if !fits(crc, central.crc) {
        return Err(mismatch("the checksum"));
    }
    if !fits(packed_size, central.packed_size) || !fits(size, central.size) {
        return Err(mismatch("the size"));
    }
    let rest = read_at(reader, start + LOCAL_SIZE, name_len + extra_len)?;
    let mut fields = Fields(&rest);
    if fields.take(central.raw_name.len()).ok() != Some(central.raw_name.as_slice())
        || name_len != u64::try_from(central.raw_name.len()).unwrap_or(u64::MAX)
    {
        return Err(mismatch("the name"));
    }
    check_extra(&central.raw_name, fields.0)?;
    let data_start = start + LOCAL_SIZE + name_len + extra_len;
    let data_end = data_start + u64::from(central.packed_size);
    if !described {
        return Ok((data_start, data_end));
    }
    let descriptor = read_at(reader, data_end, 16)?;
    let mut fields = Fields(&descriptor);
    let mut end = data_end + 12;
    let mut first = fields.u32()?;
    if first == DESCRIPTOR_SIGNATURE {
        // The signature is optional. A checksum that equals it is read as the signature, and the comparison then fails.
        first = fields.u32()?;
        end += 4;
    }
    if (first, fields.u32()?, fields.u32()?) != (central.crc, central.packed_size, central.size) {
        return Err(mismatch("the data descriptor"));
    }
    Ok((data_start, end))
}

fn read_at<R: Read + Seek>(reader: &mut R, start: u64, len: u64) -> Result<Vec<u8>, Error> {
    reader.seek(SeekFrom::Start(start)).map_err(Error::io("seek in the zip"))?;
    let mut bytes = Vec::new();
    match reader.take(len).read_to_end(&mut bytes) {
        Ok(read) if u64::try_from(read).ok() == Some(len) => Ok(bytes),
        Ok(_) => Err(Refused::archive(Reason::Truncated).into()),
        Err(err) if err.kind() == ErrorKind::UnexpectedEof => Err(Refused::archive(Reason::Truncated).into()),
        Err(err) => Err(Error::io("read the zip")(err)),
    }
}

fn damaged(what: &str) -> Error {
    Refused::archive(Reason::Damaged(what.to_owned())).into()
}
