//! Hostile tarballs: each is a harmless one with something bad added.

use anyhow::{Context as _, Result};

use crate::image::noise;

/// Size of a header, and what all data is padded to.
const BLOCK: usize = 512;

pub(super) fn archives() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let damaged_header = {
        let mut entry = file("etc/hostname", b"x")?;
        // The checksum no longer fits.
        *entry.get_mut(5).context("a header")? ^= 1;
        tarball(&[entry])
    };
    let through_link = [link(b'2', "out", "../../../../tmp")?, file("out/evil", b"x")?];
    let cut = {
        let whole = tarball(&[file("large", &noise("cut", 100_000))?]);
        whole.get(..60_000).unwrap_or_default().to_vec()
    };
    let bad_gzip = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, &tarball(&[file("noise", &noise("gzip", 50_000))?]))?;
        let mut bytes = encoder.finish()?;
        // The checksum at the end.
        let at = bytes.len() - 6;
        *bytes.get_mut(at).context("a trailer")? ^= 0xff;
        bytes
    };
    Ok(vec![
        ("tar: a name that climbs out", tarball(&[file("../evil", b"x")?])),
        ("tar: a name that climbs out in its middle", tarball(&[file("usr/../../evil", b"x")?])),
        ("tar: an absolute name", tarball(&[file("/etc/passwd", b"x")?])),
        ("tar: a file written through a link out of the root", tarball(&through_link)),
        ("tar: a hard link out of the root", tarball(&[link(b'1', "shadow", "../../etc/shadow")?])),
        ("tar: a hard link to what is not in the archive", tarball(&[link(b'1', "shadow", "etc/shadow")?])),
        ("tar: a name with a NUL, in an extended header", tarball(&[pax("path", b"evil\0name")?, file("x", b"x")?])),
        ("tar: a name that climbs out, in an extended header", tarball(&[pax("path", b"../evil")?, file("x", b"x")?])),
        (
            "tar: two sizes, so that readers see different archives",
            tarball(&[pax("size", b"0")?, file("outer", &file("../inner", b"x")?)?]),
        ),
        ("tar: an extended header that is no record", tarball(&[raw(b'x', "pax", "", b"nonsense")?, file("x", b"x")?])),
        ("tar: a damaged header", damaged_header),
        ("tar: cut short", cut),
        ("tar: noise", noise("not a tar", 20_000)),
        ("tar: nothing in it", vec![0; 2 * BLOCK]),
        ("tar: a gzip with a wrong checksum", bad_gzip),
    ])
}

/// Harmless entries, then these, then the end mark.
fn tarball(entries: &[Vec<u8>]) -> Vec<u8> {
    let harmless = raw(b'5', "etc/", "", b"").unwrap_or_default();
    let mut bytes = harmless;
    bytes.extend(entries.iter().flatten());
    bytes.extend([0; 2 * BLOCK]);
    bytes
}

fn file(name: &str, data: &[u8]) -> Result<Vec<u8>> {
    raw(b'0', name, "", data)
}

fn link(kind: u8, name: &str, target: &str) -> Result<Vec<u8>> {
    raw(kind, name, target, b"")
}

/// An extended header for the entry that follows.
fn pax(key: &str, value: &[u8]) -> Result<Vec<u8>> {
    let rest = key.len() + value.len() + 3;
    // The length counts itself.
    let length = (1..4).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length);
    let mut record = format!("{} {key}=", length.context("a record of under 1000 bytes")?).into_bytes();
    record.extend(value);
    record.push(b'\n');
    raw(b'x', "PaxHeaders/x", "", &record)
}

/// A ustar header (<https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html>) and data.
fn raw(kind: u8, name: &str, target: &str, data: &[u8]) -> Result<Vec<u8>> {
    let mut header = vec![0_u8; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| -> Result<()> {
        header.get_mut(at..at + bytes.len()).context("a field")?.copy_from_slice(bytes);
        Ok(())
    };
    put(0, name.as_bytes())?;
    put(100, b"0000644\0")?;
    put(108, b"0000000\0")?;
    put(116, b"0000000\0")?;
    put(124, format!("{:011o}\0", data.len()).as_bytes())?;
    put(136, b"00000000000\0")?;
    put(148, b"        ")?;
    put(156, &[kind])?;
    put(157, target.as_bytes())?;
    put(257, b"ustar\x0000")?;
    let sum: u32 = header.iter().copied().map(u32::from).sum();
    header.get_mut(148..156).context("a field")?.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header.extend(data);
    header.resize(BLOCK + data.len().next_multiple_of(BLOCK), 0);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::{file, link, pax, tarball};

    /// Else every archive here would be refused for a fault of its writer.
    #[test]
    fn what_this_writes_is_a_tarball() {
        let entries = [
            file("a", b"text").unwrap(),
            link(b'1', "b", "a").unwrap(),
            pax("path", b"long").unwrap(),
            file("c", b"").unwrap(),
        ];
        let bytes = tarball(&entries);
        let mut names = Vec::new();
        for entry in tar::Archive::new(bytes.as_slice()).entries().unwrap() {
            names.push(entry.unwrap().path().unwrap().display().to_string());
        }
        assert_eq!(names, ["etc/", "a", "b", "long"]);
    }
}
