//! Hostile zips: each is a complete installer's set with one bad entry added.

use anyhow::Result;

use crate::image::{installer_set, make_bootcode, noise, zip_of};

/// An entry, field by field.
#[derive(Debug, Clone)]
struct Entry {
    /// In the central directory.
    name: Vec<u8>,
    /// Before the data, when it is to be another.
    local_name: Option<Vec<u8>>,
    /// Unix mode, with the kind of file.
    mode: u32,
    flags: u16,
    data: Vec<u8>,
}

impl Entry {
    fn file(name: impl AsRef<[u8]>, data: &[u8]) -> Self {
        Self { name: name.as_ref().to_vec(), local_name: None, mode: 0o100_644, flags: 0, data: data.to_vec() }
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
    bomb.push(("bomb".to_owned(), vec![0; 64 * 1024 * 1024]));
    zips.push(("zip: a bomb", zip_of(&bomb)?));
    let mut many = installer_set("many");
    many.extend((0..5000).map(|number| (format!("overlays/{number}.dtbo"), Vec::new())));
    zips.push(("zip: too many entries", zip_of(&many)?));
    Ok(zips)
}

/// An installer's set and this.
fn with(bad: Entry) -> Result<Vec<u8>> {
    let mut entries: Vec<Entry> = installer_set("hostile").iter().map(|(name, data)| Entry::file(name, data)).collect();
    entries.push(bad);
    write(&entries)
}

/// The format: <https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT>, sections 4.3.7, 4.3.12 and 4.3.16.
fn write(entries: &[Entry]) -> Result<Vec<u8>> {
    let (mut zip, mut directory) = (Vec::new(), Vec::new());
    for entry in entries {
        let offset = u32::try_from(zip.len())?;
        let mut checksum = flate2::Crc::new();
        checksum.update(&entry.data);
        let size = u32::try_from(entry.data.len())?;
        // Version needed, flags, method (stored), time, date, checksum, both sizes.
        let common = |name: &[u8]| -> Result<Vec<u8>> {
            let mut fields = Vec::new();
            for short in [20, entry.flags, 0, 0, 0x21] {
                fields.extend(u16::to_le_bytes(short));
            }
            for long in [checksum.sum(), size, size] {
                fields.extend(long.to_le_bytes());
            }
            fields.extend(u16::try_from(name.len())?.to_le_bytes());
            fields.extend([0, 0]);
            Ok(fields)
        };
        let local_name = entry.local_name.as_ref().unwrap_or(&entry.name);
        zip.extend(b"PK\x03\x04");
        zip.extend(common(local_name)?);
        zip.extend(local_name);
        zip.extend(&entry.data);

        directory.extend(b"PK\x01\x02");
        // Made by Unix, so that the upper half of the external attributes is a mode.
        directory.extend([30, 3]);
        directory.extend(common(&entry.name)?);
        // Comment length, disk, internal attributes.
        directory.extend([0; 6]);
        directory.extend((entry.mode << 16).to_le_bytes());
        directory.extend(offset.to_le_bytes());
        directory.extend(&entry.name);
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

    /// Else every archive here would be refused for a fault of its writer.
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
