//! Hostile tarballs: each is a harmless one with one fault added.

use anyhow::{Context as _, Result};

use crate::image::noise;

/// Size of a header; data is padded to multiples of it.
const BLOCK: usize = 512;

pub(super) fn archives() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let damaged_header = {
        let mut entry = file("etc/hostname", b"x")?;
        // The header's checksum does not match any more.
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
        // A byte of the checksum at the end.
        let at = bytes.len() - 6;
        *bytes.get_mut(at).context("a trailer")? ^= 0xff;
        bytes
    };
    let mut all = vec![
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
    ];
    all.extend(links()?);
    all.extend(lying_headers()?);
    all.extend(streams()?);
    Ok(all)
}

fn links() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let out = || link(b'2', "out", "../../../../tmp");
    let chain = [link(b'2', "a", "b")?, link(b'2', "b", "c/../../../x")?, file("a/evil", b"x")?];
    let by_hard_link = [link(b'2', "a", "/tmp")?, link(b'1', "b", "a")?, file("b/evil", b"x")?];
    let own = [link(b'2', "loop", "loop")?, file("loop/x", b"x")?];
    Ok(vec![
        // The shape of CVE-2026-33056: a folder entry over a link changes the mode of the link's target.
        ("tar: a folder over a link out of the root", tarball(&[out()?, folder("out", 0o777)?])),
        ("tar: a file deep below a link out of the root", tarball(&[out()?, file("out/a/b/evil", b"x")?])),
        ("tar: a link through a link out of the root", tarball(&[out()?, link(b'2', "out/evil", "x")?])),
        ("tar: a device through a link out of the root", tarball(&[out()?, raw(b'4', "out/sda", "", b"")?])),
        ("tar: a hard link through a link out of the root", tarball(&[out()?, link(b'1', "h", "out/passwd")?])),
        ("tar: a chain of links out of the root", tarball(&chain)),
        ("tar: a link out of the root under a second name", tarball(&by_hard_link)),
        ("tar: a link to itself", tarball(&own)),
        ("tar: an absolute hard link", tarball(&[link(b'1', "shadow", "/etc/shadow")?])),
        ("tar: a hard link to itself", tarball(&[link(b'1', "h", "h")?])),
        ("tar: a hard link to a folder", tarball(&[link(b'1', "h", "etc")?])),
        ("tar: a link to nothing", tarball(&[link(b'2', "l", "")?])),
        ("tar: a link's name in an extended header that climbs out", {
            tarball(&[pax("linkpath", b"../../etc/shadow")?, link(b'1', "h", "etc/hostname")?])
        }),
        ("tar: a file where a folder is", tarball(&[file("etc", b"x")?])),
        ("tar: a folder where a file is", tarball(&[file("f", b"x")?, folder("f", 0o755)?])),
        ("tar: a file below a file", tarball(&[file("f", b"x")?, file("f/x", b"x")?])),
    ])
}

fn lying_headers() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let hidden = tarball(&[file("hidden", b"x")?]);
    let size = hidden.len().to_string();
    // The shape of CVE-2025-62518: one reader takes the size from the extended header, another from the header itself.
    let smuggled = [pax("size", size.as_bytes())?, sized(b'0', "outer", "", &hidden, 0)?];
    let long = |kind: u8, name: &[u8]| raw(kind, "././@LongLink", "", name);
    Ok(vec![
        ("tar: an archive smuggled past a size of nothing", tarball(&smuggled)),
        ("tar: a size in a folder", tarball(&[raw(b'5', "d/", "", &[0; BLOCK])?])),
        ("tar: a size in a link", tarball(&[raw(b'2', "l", "x", &[0; BLOCK])?])),
        ("tar: larger than any card", tarball(&[sized(b'0', "huge", "", b"", (1 << 33) - 1)?])),
        ("tar: a long name that climbs out", tarball(&[long(b'L', b"../../evil\0")?, file("x", b"x")?])),
        ("tar: a long hard link out", {
            tarball(&[long(b'K', b"../../etc/shadow\0")?, link(b'1', "h", "etc/hostname")?])
        }),
        (
            "tar: two extended headers for one entry",
            tarball(&[pax("path", b"a")?, pax("path", b"b")?, file("x", b"x")?]),
        ),
        ("tar: two kinds of long name for one entry", {
            tarball(&[pax("path", b"a")?, long(b'L', b"b\0")?, file("x", b"x")?])
        }),
        ("tar: an extended header for no entry", tarball(&[pax("path", b"a")?])),
        ("tar: an extended header of four gigabytes", {
            tarball(&[sized(b'x', "h", "", b"", 1 << 32)?, file("x", b"x")?])
        }),
        (
            "tar: a record that says it is longer than it is",
            tarball(&[raw(b'x', "h", "", b"99 path=a\n")?, file("x", b"x")?]),
        ),
        ("tar: a global header that renames everything", {
            let mut global = pax("path", b"evil")?;
            reseal(&mut global, 156, b"g")?;
            tarball(&[global, file("x", b"x")?])
        }),
        ("tar: an entry of an unknown kind", tarball(&[raw(b'D', "x", "", b"")?])),
        ("tar: a size that is no number", {
            let mut entry = file("x", b"x")?;
            reseal(&mut entry, 124, b"-1\0\0\0\0\0\0\0\0\0\0")?;
            tarball(&[entry])
        }),
        ("tar: a sparse file whose pieces overlap", { tarball(&[pax3("0,4,2,4", "2000")?, file("x", &[1; 8])?]) }),
        ("tar: a sparse file larger than any card", tarball(&[pax3("0,8", "999999999999999")?, file("x", &[1; 8])?])),
        (
            "tar: a thousand folders in each other",
            tarball(&[pax("path", "x/".repeat(450).as_bytes())?, folder("x", 0o755)?]),
        ),
        ("tar: a name of 300 bytes", tarball(&[pax("path", "x".repeat(300).as_bytes())?, file("x", b"x")?])),
    ])
}

fn streams() -> Result<Vec<(&'static str, Vec<u8>)>> {
    let good = tarball(&[file("etc/hostname", b"x")?]);
    let one_block = good.get(..good.len() - BLOCK).context("an end")?.to_vec();
    let zstd = zstd::encode_all(tarball(&[file("noise", &noise("zstd", 50_000))?]).as_slice(), 1)?;
    Ok(vec![
        ("tar: a second archive behind the first", [good.clone(), good.clone()].concat()),
        ("tar: half an end", one_block),
        ("tar: a zstd stream that is cut", zstd.get(..zstd.len() / 2).unwrap_or_default().to_vec()),
        ("tar: a zstd window of a gigabyte", {
            // Magic; no single segment, no checksum; window 2^30 (RFC 8878, section 3.1.1.1); an empty last block.
            vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, (30 - 10) << 3, 0x01, 0x00, 0x00]
        }),
        ("tar: an xz dictionary of four gigabytes", xz_with_a_large_dictionary()),
        ("tar: bzip2", b"BZh91AY&SY".to_vec()),
        ("tar: a zip", crate::image::make_bootcode("not an image")?),
        ("tar: 64 MiB of zeros behind the end", {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            std::io::Write::write_all(&mut encoder, &good)?;
            for _ in 0..64 {
                std::io::Write::write_all(&mut encoder, &vec![0; 1 << 20])?;
            }
            encoder.finish()?
        }),
    ])
}

/// Headers of a stream and of a block (<https://tukaani.org/xz/xz-file-format.txt>, sections 2.1.1 and 3.1): LZMA2 with
/// the largest dictionary that the format allows.
fn xz_with_a_large_dictionary() -> Vec<u8> {
    let sealed = |bytes: &[u8]| {
        let mut checksum = flate2::Crc::new();
        checksum.update(bytes);
        [bytes, &checksum.sum().to_le_bytes()].concat()
    };
    let mut xz = b"\xfd7zXZ\0".to_vec();
    xz.extend(sealed(&[0, 4]));
    xz.extend(sealed(&[2, 0, 0x21, 1, 40, 0, 0, 0]));
    xz.extend([0; 64]);
    xz
}

/// A harmless entry, these entries, then the end mark.
fn tarball(entries: &[Vec<u8>]) -> Vec<u8> {
    // A tarball that is refused must be so for its fault, and not because it is empty.
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

fn folder(name: &str, mode: u32) -> Result<Vec<u8>> {
    let mut entry = raw(b'5', name, "", b"")?;
    reseal(&mut entry, 100, format!("{mode:07o}\0").as_bytes())?;
    Ok(entry)
}

/// A pax extended header for the next entry.
fn pax(key: &str, value: &[u8]) -> Result<Vec<u8>> {
    raw(b'x', "PaxHeaders/x", "", &record(key, value)?)
}

/// A pax extended header that makes the next entry a sparse file.
fn pax3(map: &str, size: &str) -> Result<Vec<u8>> {
    let records = [("GNU.sparse.map", map), ("GNU.sparse.size", size), ("GNU.sparse.name", "sparse")];
    let records = records.into_iter().map(|(key, value)| record(key, value.as_bytes()));
    raw(b'x', "PaxHeaders/x", "", &records.collect::<Result<Vec<_>>>()?.concat())
}

fn record(key: &str, value: &[u8]) -> Result<Vec<u8>> {
    let rest = key.len() + value.len() + 3;
    // The length field counts its own digits.
    let length = (1..4).map(|digits| rest + digits).find(|length| length.to_string().len() + rest == *length);
    let mut record = format!("{} {key}=", length.context("a record of under 1000 bytes")?).into_bytes();
    record.extend(value);
    record.push(b'\n');
    Ok(record)
}

/// An entry: a ustar header (<https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html>) and its data.
fn raw(kind: u8, name: &str, target: &str, data: &[u8]) -> Result<Vec<u8>> {
    sized(kind, name, target, data, data.len().try_into()?)
}

/// Overwrites a field of an entry's header and corrects the checksum.
fn reseal(entry: &mut [u8], at: usize, field: &[u8]) -> Result<()> {
    let header = entry.get_mut(..BLOCK).context("a header")?;
    header.get_mut(at..at + field.len()).context("a field")?.copy_from_slice(field);
    header.get_mut(148..156).context("a field")?.fill(b' ');
    let sum: u32 = header.iter().copied().map(u32::from).sum();
    header.get_mut(148..156).context("a field")?.copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(())
}

/// An entry whose header states `size`, which may differ from the size of the data.
fn sized(kind: u8, name: &str, target: &str, data: &[u8], size: u64) -> Result<Vec<u8>> {
    let mut header = vec![0_u8; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| -> Result<()> {
        header.get_mut(at..at + bytes.len()).context("a field")?.copy_from_slice(bytes);
        Ok(())
    };
    put(0, name.as_bytes())?;
    put(100, b"0000644\0")?;
    put(108, b"0000000\0")?;
    put(116, b"0000000\0")?;
    put(124, format!("{size:011o}\0").as_bytes())?;
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

    /// Otherwise each archive here would be refused for a fault of its writer.
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
