//! Hostile zips: each is a complete installer's set with one bad entry added.

use anyhow::Result;

use crate::image::{installer_set, make_bootcode, noise, zip_of};

/// A zip entry; each field can be forged.
#[derive(Debug, Clone)]
struct Entry {
    /// Name in the central directory.
    name: Vec<u8>,
    /// Name in the local header; `None`: the same.
    local_name: Option<Vec<u8>>,
    /// Unix mode with the file type.
    mode: u32,
    flags: u16,
    method: u16,
    /// CRC-32 in the headers; `None`: that of the data.
    checksum: Option<u32>,
    /// Unpacked size in both headers; `None`: that of the data.
    size: Option<u32>,
    /// Extra field of the central directory.
    extra: Vec<u8>,
    data: Vec<u8>,
}

impl Entry {
    fn file(name: impl AsRef<[u8]>, data: &[u8]) -> Self {
        Self {
            name: name.as_ref().to_vec(),
            local_name: None,
            mode: 0o100_644,
            flags: 0,
            method: 0,
            checksum: None,
            size: None,
            extra: Vec::new(),
            data: data.to_vec(),
        }
    }
}

pub(super) fn archives() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let named = |name: &[u8]| with(Entry::file(name, b"x"));
    let good = make_bootcode("hostile")?;
    let mut zips = vec![
        ("zip: a name that climbs out", named(b"../evil")?),
        ("zip: a name that climbs out in its middle", named(b"overlays/../../evil")?),
        ("zip: an absolute name", named(b"/etc/passwd")?),
        ("zip: a backslash", named(b"..\\evil")?),
        ("zip: a NUL in a name", named(b"evil\0.txt")?),
        ("zip: a control character in a name", named(b"evil\x1b[2J.txt")?),
        ("zip: a name that FAT cannot have", named(b"C:evil")?),
        ("zip: a name that ends with a dot", named(b"evil.")?),
        ("zip: the name of a device", named(b"CON.txt")?),
        ("zip: an empty name", named(b"")?),
        ("zip: two names that differ in case only", named(b"KERNEL8.IMG")?),
        ("zip: a file below a file", named(b"cmdline.txt/evil")?),
        ("zip: a symbolic link", with(Entry { mode: 0o120_777, ..Entry::file("link", b"/etc/passwd") })?),
        ("zip: a device", with(Entry { mode: 0o060_600, ..Entry::file("sda", b"") })?),
        ("zip: an encrypted entry", with(Entry { flags: 1, ..Entry::file("secret", b"0123456789abc") })?),
        (
            "zip: one name for readers, another for unpackers",
            with(Entry { local_name: Some(b"../evil".to_vec()), ..Entry::file("goodie", b"x") })?,
        ),
        ("zip: cut short", good.get(..good.len() - 30).unwrap_or_default().to_vec()),
        ("zip: not a zip", noise("not a zip", 5000)),
    ];
    let mut bomb = installer_set("bomb");
    // Zeros compress a thousandfold.
    bomb.push(("bomb".to_owned(), vec![0; 64 * 1024 * 1024]));
    zips.push(("zip: a bomb", zip_of(&bomb)?));
    let mut many = installer_set("many");
    many.extend((0..5000).map(|number| (format!("overlays/{number}.dtbo"), Vec::new())));
    zips.push(("zip: too many entries", zip_of(&many)?));
    zips.extend(lies()?);
    zips.extend(hidden(&good)?);
    Ok(zips)
}

fn lies() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let file = |name: &str| Entry::file(name, b"0123456789");
    // Info-ZIP's Unicode Path field (APPNOTE 4.6.9): a second name, which some readers prefer.
    let unicode_path = [&[0x75, 0x70, 12, 0, 1, 0, 0, 0, 0][..], b"../evil"].concat();
    Ok(vec![
        // The shape of CVE-2025-29787: a link, and a file written through it.
        ("zip: a file through a link", {
            let mut entries = set();
            entries.push(Entry { mode: 0o120_777, ..Entry::file("out", b"../../../tmp") });
            entries.push(Entry::file("out/evil", b"x"));
            write(&entries)?
        }),
        ("zip: a pipe", with(Entry { mode: 0o010_644, ..file("pipe") })?),
        ("zip: a character device", with(Entry { mode: 0o020_666, ..Entry::file("null", b"") })?),
        ("zip: a socket", with(Entry { mode: 0o140_755, ..Entry::file("socket", b"") })?),
        ("zip: a name twice", with(file("config.txt"))?),
        ("zip: two folders that differ in case only", with(file("OVERLAYS/x.dtbo"))?),
        ("zip: an empty part in a path", with(file("overlays//x"))?),
        ("zip: a dot in a path", with(file("overlays/./x"))?),
        ("zip: a short name of FAT", with(file("KERNEL~1.IMG"))?),
        ("zip: a name that ends with a blank", with(file("evil "))?),
        ("zip: a drive", with(file("c:/evil"))?),
        ("zip: a name that is no UTF-8", with(Entry { flags: 1 << 11, ..Entry::file(b"\xff\xfe", b"x") })?),
        ("zip: deeper than FAT is used", with(file(&format!("{}x", "d/".repeat(20))))?),
        ("zip: a second name in an extra field", with(Entry { extra: unicode_path, ..file("goodie") })?),
        ("zip: sizes of 64 bits", with(Entry { extra: vec![1, 0, 8, 0, 9, 0, 0, 0, 0, 0, 0, 0], ..file("large") })?),
        ("zip: a wrong checksum", with(Entry { checksum: Some(7), ..file("flipped") })?),
        ("zip: a wrong size", with(Entry { size: Some(7), ..file("short") })?),
        ("zip: unpacks to more than a partition", with(Entry { size: Some(u32::MAX - 1), method: 8, ..file("huge") })?),
        ("zip: an unknown method", with(Entry { method: 14, ..file("lzma") })?),
    ])
}

/// Zips in which two readers see different contents.
fn hidden(good: &[u8]) -> Result<Vec<(&'static str, Vec<u8>)>> {
    // The end record is the last 22 bytes, because there is no archive comment.
    let end = good.len() - 22;
    let mut disks = good.to_vec();
    disks.get_mut(end + 4..end + 6).unwrap_or_default().copy_from_slice(&[1, 0]);
    let mut fewer = good.to_vec();
    for at in [end + 8, end + 10] {
        if let Some(count) = fewer.get_mut(at) {
            *count -= 1;
        }
    }
    Ok(vec![
        ("zip: something before it", [b"#!/bin/sh\n", good].concat()),
        ("zip: something behind it", [good, b"more"].concat()),
        ("zip: a second zip behind it", [good, good].concat()),
        ("zip: one of several parts", disks),
        ("zip: fewer entries than its directory has", fewer),
    ])
}

fn set() -> Vec<Entry> {
    installer_set("hostile").iter().map(|(name, data)| Entry::file(name, data)).collect()
}

/// An installer's set with this entry added.
fn with(bad: Entry) -> Result<Vec<u8>> {
    let mut entries = set();
    entries.push(bad);
    write(&entries)
}

/// Encodes a zip: <https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT>, sections 4.3.7, 4.3.12 and 4.3.16.
fn write(entries: &[Entry]) -> Result<Vec<u8>> {
    let (mut zip, mut directory) = (Vec::new(), Vec::new());
    for entry in entries {
        let offset = u32::try_from(zip.len())?;
        let mut checksum = flate2::Crc::new();
        checksum.update(&entry.data);
        let checksum = entry.checksum.unwrap_or(checksum.sum());
        let packed = u32::try_from(entry.data.len())?;
        let size = entry.size.unwrap_or(packed);
        // Version needed, flags, method, time, date, checksum, both sizes.
        let common = |name: &[u8], extra: usize| -> Result<Vec<u8>> {
            let mut fields = Vec::new();
            for short in [20, entry.flags, entry.method, 0, 0x21] {
                fields.extend(u16::to_le_bytes(short));
            }
            for long in [checksum, packed, size] {
                fields.extend(long.to_le_bytes());
            }
            fields.extend(u16::try_from(name.len())?.to_le_bytes());
            fields.extend(u16::try_from(extra)?.to_le_bytes());
            Ok(fields)
        };
        let local_name = entry.local_name.as_ref().unwrap_or(&entry.name);
        zip.extend(b"PK\x03\x04");
        zip.extend(common(local_name, 0)?);
        zip.extend(local_name);
        zip.extend(&entry.data);

        directory.extend(b"PK\x01\x02");
        // Made by Unix, so that the upper half of the external attributes is a mode.
        directory.extend([30, 3]);
        directory.extend(common(&entry.name, entry.extra.len())?);
        // Comment length, disk, internal attributes.
        directory.extend([0; 6]);
        directory.extend((entry.mode << 16).to_le_bytes());
        directory.extend(offset.to_le_bytes());
        directory.extend(&entry.name);
        directory.extend(&entry.extra);
    }
    let count = u16::try_from(entries.len())?.to_le_bytes();
    let (offset, size) = (u32::try_from(zip.len())?, u32::try_from(directory.len())?);
    zip.extend(directory);
    zip.extend(b"PK\x05\x06");
    zip.extend([0; 4]);
    zip.extend(count);
    zip.extend(count);
    zip.extend(size.to_le_bytes());
    zip.extend(offset.to_le_bytes());
    zip.extend([0; 2]);
    Ok(zip)
}

#[cfg(test)]
mod tests {
    use super::{Entry, with};
    use std::io::{Cursor, Read as _};

    /// Otherwise each archive here would be refused for a fault of its writer.
    #[test]
    fn what_this_writes_is_a_zip() {
        let bytes = with(Entry::file("harmless", b"text")).unwrap();
        let mut zip = zip::ZipArchive::new(Cursor::new(bytes)).unwrap();
        let mut text = String::new();
        zip.by_name("harmless").unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
        assert_eq!(zip.by_name("harmless").unwrap().unix_mode(), Some(0o100_644));
    }
}
