//! Writer for pax tarballs: the `tar` crate's headers, with extended headers for everything that does not fit (long
//! names, nanoseconds, times before 1970, extended attributes, holes in GNU's format 1.0).

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

const BLOCK: usize = 512;
/// Maximum of a header's octal digits, for sizes and for owners.
const MAX_SIZE: u64 = 0o77_777_777_777;
const MAX_ID: u32 = 0o7_777_777;
/// Placeholder name in a header whose real name is in its extended header.
const PAX_NAME: &[u8] = b"./PaxHeaders/entry";
const SPARSE_NAME: &[u8] = b"./GNUSparseFile.0/entry";

/// Metadata of an entry.
#[derive(Debug, Clone, Default)]
pub(super) struct Entry {
    /// Path with `./` in front.
    pub(super) path: Vec<u8>,
    /// Target of a link, else empty.
    pub(super) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since 1970 (may be negative) and nanoseconds.
    pub(super) mtime: (i64, i64),
    pub(super) device: (u32, u32),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An unfinished tarball.
pub(super) struct Tarball<W> {
    out: W,
}

impl<W: Write> Tarball<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out }
    }

    /// Writes an entry without contents.
    pub(super) fn bare(&mut self, entry: &Entry, kind: EntryType) -> io::Result<()> {
        self.head(entry, kind, 0, Vec::new(), None)
    }

    /// Writes a file. `parts`: offsets and lengths of the stored parts of a file with holes; `data` yields them in
    /// order.
    pub(super) fn file(
        &mut self,
        entry: &Entry,
        size: u64,
        parts: Option<&[(u64, u64)]>,
        data: &mut dyn Read,
    ) -> io::Result<()> {
        let (map, stored) = match parts {
            None => (Vec::new(), size),
            Some(parts) => {
                let map = sparse_map(parts);
                let stored = parts.iter().map(|(_, length)| length).sum::<u64>();
                (map, stored)
            }
        };
        let mut records = Vec::new();
        if parts.is_some() {
            push(&mut records, b"GNU.sparse.major", b"1");
            push(&mut records, b"GNU.sparse.minor", b"0");
            // Readers without this format see a file of the placeholder's name, and do not take the map for contents of
            // `path`.
            push(&mut records, b"GNU.sparse.name", &entry.path);
            push(&mut records, b"GNU.sparse.realsize", size.to_string().as_bytes());
        }
        let whole = stored + u64::try_from(map.len()).unwrap_or_default();
        self.head(entry, EntryType::Regular, whole, records, parts.map(|_| SPARSE_NAME))?;
        self.out.write_all(&map)?;
        let copied = io::copy(&mut data.take(stored), &mut self.out)?;
        // The header with the size is already written, so a shorter file cannot be represented.
        if copied != stored {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter while it was read"));
        }
        self.pad(stored)
    }

    /// Writes the two final blocks.
    pub(super) fn finish(mut self) -> io::Result<W> {
        // POSIX: two blocks of zeros. Our reader refuses an archive with fewer.
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out)
    }

    fn head(
        &mut self,
        entry: &Entry,
        kind: EntryType,
        size: u64,
        mut records: Vec<u8>,
        other_name: Option<&[u8]>,
    ) -> io::Result<()> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(entry.mode & 0o7777);
        if !set(&mut header.as_old_mut().name, other_name.unwrap_or(&entry.path)) {
            push(&mut records, b"path", &entry.path);
            set(&mut header.as_old_mut().name, PAX_NAME);
        }
        if !set(&mut header.as_old_mut().linkname, &entry.link) {
            push(&mut records, b"linkpath", &entry.link);
        }
        // Ids that do not fit go into the extended header, and the field stays 0.
        for (key, id) in [(b"uid", entry.uid), (b"gid", entry.gid)] {
            if id > MAX_ID {
                push(&mut records, key, id.to_string().as_bytes());
            }
        }
        header.set_uid(u64::from(if entry.uid > MAX_ID { 0 } else { entry.uid }));
        header.set_gid(u64::from(if entry.gid > MAX_ID { 0 } else { entry.gid }));
        if size > MAX_SIZE {
            push(&mut records, b"size", size.to_string().as_bytes());
        }
        header.set_size(if size > MAX_SIZE { 0 } else { size });
        let (seconds, nanos) = entry.mtime;
        header.set_mtime(u64::try_from(seconds).unwrap_or(0));
        if seconds < 0 || nanos != 0 {
            push(&mut records, b"mtime", time(seconds, nanos).as_bytes());
        }
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(entry.device.0)?;
            header.set_device_minor(entry.device.1)?;
        }
        for (name, value) in &entry.xattrs {
            push(&mut records, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
        }
        if !records.is_empty() {
            let mut extended = Header::new_ustar();
            extended.set_entry_type(EntryType::XHeader);
            set(&mut extended.as_old_mut().name, PAX_NAME);
            extended.set_mode(0o644);
            let length = u64::try_from(records.len()).unwrap_or_default();
            extended.set_size(length);
            extended.set_cksum();
            self.out.write_all(extended.as_bytes())?;
            self.out.write_all(&records)?;
            self.pad(length)?;
        }
        header.set_cksum();
        self.out.write_all(header.as_bytes())
    }

    fn pad(&mut self, length: u64) -> io::Result<()> {
        let rest = usize::try_from(length.next_multiple_of(512) - length).unwrap_or_default();
        self.out.write_all([0; BLOCK].get(..rest).unwrap_or_default())
    }
}

/// Copies a text into a field. Returns false, without a change, if it does not fit.
fn set(field: &mut [u8; 100], text: &[u8]) -> bool {
    match field.get_mut(..text.len()) {
        Some(place) => {
            place.copy_from_slice(text);
            true
        }
        None => false,
    }
}

/// Appends a record of an extended header. Its length includes the digits of the length itself.
fn push(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    // One more digit may make the length itself longer by one, so it is searched.
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// Formats a time for pax: `-1.25` means 0.75 s after -2.
fn time(seconds: i64, nanos: i64) -> String {
    if nanos == 0 {
        return seconds.to_string();
    }
    // The kernel counts nanoseconds upwards from the full second, also before 1970. pax writes a decimal number.
    let (sign, seconds, nanos) =
        if seconds < 0 { ("-", -(seconds + 1), 1_000_000_000 - nanos) } else { ("", seconds, nanos) };
    let text = format!("{sign}{seconds}.{nanos:09}");
    text.trim_end_matches('0').to_owned()
}

/// Renders a map in GNU's format 1.0: one number per line, padded to whole blocks.
fn sparse_map(parts: &[(u64, u64)]) -> Vec<u8> {
    let mut text = format!("{}\n", parts.len());
    for (offset, length) in parts {
        text.push_str(&format!("{offset}\n{length}\n"));
    }
    let mut map = text.into_bytes();
    map.resize(map.len().next_multiple_of(BLOCK), 0);
    map
}

#[cfg(test)]
mod tests {
    use super::{push, time};

    #[test]
    fn a_records_length_counts_itself() {
        for size in [1, 5, 6, 90, 91, 92, 93, 980, 990, 1000] {
            let mut record = Vec::new();
            push(&mut record, b"path", &vec![b'x'; size]);
            let text = String::from_utf8(record.clone()).unwrap();
            let (length, _) = text.split_once(' ').unwrap();
            assert_eq!(length.parse::<usize>().unwrap(), record.len());
        }
    }

    #[test]
    fn times_before_1970_count_backwards() {
        assert_eq!(time(1, 500_000_000), "1.5");
        assert_eq!(time(-2, 750_000_000), "-1.25");
        assert_eq!(time(-1, 1), "-0.999999999");
        assert_eq!(time(-7, 0), "-7");
    }
}
