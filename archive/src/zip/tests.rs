//! Hostile zips, assembled byte by byte. Common writers refuse to create them.

use std::io::{Cursor, Write as _};
use std::path::Path;

use flate2::Crc;
use flate2::write::DeflateEncoder;

use super::{MAX_ENTRIES, MAX_UNPACKED, check_zip, unpack_zip};
use crate::{Error, Reason};

/// An entry whose two headers can be set independently.
#[derive(Clone)]
struct Item {
    name: Vec<u8>,
    local_name: Vec<u8>,
    data: Vec<u8>,
    flags: u16,
    method: u16,
    crc: u32,
    size: u32,
    local_size: Option<u32>,
    attributes: u32,
    extra: Vec<u8>,
    descriptor: bool,
}

fn crc(data: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(data);
    crc.sum()
}

fn item(name: impl AsRef<[u8]>, data: &[u8]) -> Item {
    Item {
        name: name.as_ref().to_vec(),
        local_name: name.as_ref().to_vec(),
        data: data.to_vec(),
        flags: 1 << 11,
        method: 0,
        crc: crc(data),
        size: data.len().try_into().unwrap(),
        local_size: None,
        attributes: 0o100_644 << 16,
        extra: Vec::new(),
        descriptor: false,
    }
}

fn deflated(name: &str, data: &[u8]) -> Item {
    let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(data).unwrap();
    Item { data: encoder.finish().unwrap(), method: 8, ..item(name, data) }
}

fn u16s(out: &mut Vec<u8>, values: &[u16]) {
    values.iter().for_each(|value| out.extend(value.to_le_bytes()));
}

fn u32s(out: &mut Vec<u8>, values: &[u32]) {
    values.iter().for_each(|value| out.extend(value.to_le_bytes()));
}

fn len16(bytes: &[u8]) -> u16 {
    bytes.len().try_into().unwrap()
}

fn len32(bytes: &[u8]) -> u32 {
    bytes.len().try_into().unwrap()
}

fn zip_with_gap(items: &[Item], gap: &[u8]) -> Vec<u8> {
    let (mut out, mut central) = (Vec::new(), Vec::new());
    for item in items {
        let offset = len32(&out);
        let flags = item.flags | if item.descriptor { 1 << 3 } else { 0 };
        out.extend(b"PK\x03\x04");
        u16s(&mut out, &[20, flags, item.method, 0, 0]);
        if item.descriptor {
            u32s(&mut out, &[0, 0, 0]);
        } else {
            u32s(&mut out, &[item.crc, len32(&item.data), item.local_size.unwrap_or(item.size)]);
        }
        u16s(&mut out, &[len16(&item.local_name), 0]);
        out.extend(&item.local_name);
        out.extend(&item.data);
        if item.descriptor {
            out.extend(b"PK\x07\x08");
            u32s(&mut out, &[item.crc, len32(&item.data), item.local_size.unwrap_or(item.size)]);
        }
        central.extend(b"PK\x01\x02");
        u16s(&mut central, &[0x031e, 20, flags, item.method, 0, 0]);
        u32s(&mut central, &[item.crc, len32(&item.data), item.size]);
        u16s(&mut central, &[len16(&item.name), len16(&item.extra), 0, 0, 0]);
        u32s(&mut central, &[item.attributes, offset]);
        central.extend(&item.name);
        central.extend(&item.extra);
    }
    out.extend(gap);
    end(&mut out, &central, items.len());
    out
}

fn end(out: &mut Vec<u8>, central: &[u8], count: usize) {
    let start = len32(out);
    out.extend(central);
    out.extend(b"PK\x05\x06");
    let count = u16::try_from(count).unwrap();
    u16s(out, &[0, 0, count, count]);
    u32s(out, &[len32(central), start]);
    u16s(out, &[0]);
}

fn zip(items: &[Item]) -> Vec<u8> {
    zip_with_gap(items, b"")
}

fn reason(bytes: Vec<u8>) -> Reason {
    match check_zip(Cursor::new(bytes)) {
        Err(Error::Refused(refused)) => refused.reason,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_zip_of_a_common_writer_is_read_and_unpacked() {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    writer.add_directory("overlays", options).unwrap();
    for (name, data) in [("config.txt", &b"arm_64bit=1\n"[..]), ("overlays/README", b"x"), ("a/b/c", &[7; 100_000])] {
        writer.start_file(name, options).unwrap();
        writer.write_all(data).unwrap();
    }
    let bytes = writer.finish().unwrap().into_inner();
    let summary = check_zip(Cursor::new(&bytes)).unwrap();
    assert_eq!((summary.entries, summary.unpacked_bytes), (4, 100_013));
    assert_eq!(summary.config_txt.as_deref(), Some("arm_64bit=1\n"));
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("a")).unwrap();
    assert_eq!(unpack_zip(Cursor::new(&bytes), dir.path()).unwrap(), summary);
    assert_eq!(std::fs::read(dir.path().join("a/b/c")).unwrap(), [7; 100_000]);
    unpack_zip(Cursor::new(&bytes), dir.path()).expect("existing files are replaced");
}

#[test]
fn a_streamed_zip_with_data_descriptors_is_taken() {
    // A writer to a pipe does not know sizes and checksum in advance, and appends them.
    let items = [Item { descriptor: true, ..deflated("a", b"aaaaaaaaaa") }, item("d/", b"")];
    let items = [items[0].clone(), Item { attributes: 0o040_755 << 16 | 0x10, ..items[1].clone() }];
    assert_eq!(check_zip(Cursor::new(zip(&items))).unwrap().entries, 2);
}

#[test]
fn hostile_names_are_refused_each_with_its_reason() {
    for (name, expected) in [
        ("/etc/passwd", Reason::AbsolutePath),
        ("c:x", Reason::AbsolutePath),
        ("../x", Reason::ParentPath),
        ("a/../../x", Reason::ParentPath),
        ("a/..", Reason::ParentPath),
        ("a//x", Reason::OddPath),
        ("./x", Reason::OddPath),
        ("a\\..\\x", Reason::Backslash),
        ("a\nb", Reason::ControlCharacter),
        ("a\0b", Reason::ControlCharacter),
        ("a\u{85}b", Reason::ControlCharacter),
        ("", Reason::EmptyName),
        (&"x".repeat(256), Reason::LongName(255)),
        (&"xy".repeat(513), Reason::LongName(1024)),
        (&"x/".repeat(17), Reason::Depth(16)),
    ] {
        let entry = item(name, b"");
        // With the mode of a regular file, a folder would be refused as NotAFile first.
        let attributes = if name.ends_with('/') { 0 } else { entry.attributes };
        assert_eq!(reason(zip(&[Item { attributes, ..entry }])), expected, "{name:?}");
    }
    for name in [
        "a?",
        "a*",
        "a<b",
        "a>b",
        "a\"b",
        "a|b",
        "ab:c",
        "a.",
        "a ",
        " a",
        "CON",
        "nul.txt",
        "a/Lpt1.x",
        "KERNEL~1.IMG",
    ] {
        assert!(matches!(reason(zip(&[item(name, b"x")])), Reason::FatName(_)), "{name:?}");
    }
    assert_eq!(reason(zip(&[item(b"\xff\xfe", b"x")])), Reason::NotUtf8);
    assert_eq!(reason(zip(&[Item { flags: 0, ..item("é", b"x") }])), Reason::NotUtf8);
}

#[test]
fn names_that_fat_takes_for_one_are_refused() {
    for pair in [["a", "a"], ["Config.txt", "config.TXT"], ["Ü", "ü"], ["Overlays/x", "overlays/y"]] {
        assert_eq!(reason(zip(&pair.map(|name| item(name, b"x")))), Reason::Duplicate, "{pair:?}");
    }
    assert_eq!(reason(zip(&[item("a", b"x"), item("a/b", b"x")])), Reason::FileAndFolder);
}

#[test]
fn links_devices_and_labels_are_refused() {
    for attributes in [0o120_777 << 16, 0o020_666 << 16, 0o060_660 << 16, 0o010_644 << 16, 0o140_755 << 16, 0x08, 0x10]
    {
        assert_eq!(reason(zip(&[Item { attributes, ..item("a", b"/etc") }])), Reason::NotAFile, "{attributes:o}");
    }
    assert_eq!(reason(zip(&[Item { attributes: 0, ..item("a/", b"contents") }])), Reason::NotAFile);
}

#[test]
fn encryption_and_other_methods_are_refused() {
    // Traditional encryption, strong encryption, and a masked directory.
    for flag in [1, 1 << 6, 1 << 13] {
        assert_eq!(reason(zip(&[Item { flags: flag, ..item("a", b"x") }])), Reason::Encrypted);
    }
    assert_eq!(reason(zip(&[Item { method: 14, ..item("a", b"x") }])), Reason::Method(14));
}

#[test]
fn two_headers_that_differ_are_refused() {
    let name = Item { local_name: b"b".to_vec(), ..item("a", b"x") };
    assert_eq!(reason(zip(&[name])), Reason::HeaderMismatch("the name"));
    let size = Item { local_size: Some(7), ..item("a", b"x") };
    assert_eq!(reason(zip(std::slice::from_ref(&size))), Reason::HeaderMismatch("the size"));
    let described = Item { descriptor: true, ..size };
    assert_eq!(reason(zip(&[described])), Reason::HeaderMismatch("the data descriptor"));
    // Info-ZIP's Unicode path with the name `b` for the entry `a`.
    let mut unicode = vec![0x75, 0x70, 6, 0, 1, 0, 0, 0, 0, b'b'];
    assert!(matches!(reason(zip(&[Item { extra: unicode.clone(), ..item("a", b"x") }])), Reason::HeaderMismatch(_)));
    unicode[9] = b'a';
    check_zip(Cursor::new(zip(&[Item { extra: unicode, ..item("a", b"x") }]))).unwrap();
    let mut flags = zip(&[item("a", b"x")]);
    flags[6] ^= 2;
    assert_eq!(reason(flags), Reason::HeaderMismatch("the flags"));
}

#[test]
fn contents_that_are_not_what_the_headers_say_are_refused() {
    assert_eq!(reason(zip(&[Item { crc: 1, ..item("a", b"x") }])), Reason::Checksum);
    let honest = deflated("a", &[1; 5000]);
    for size in [4999, 5001] {
        assert_eq!(reason(zip(&[Item { size, ..honest.clone() }])), Reason::HeaderMismatch("the size"));
    }
    let mut padded = honest.clone();
    padded.data.extend(b"hidden");
    assert_eq!(reason(zip(&[padded])), Reason::HeaderMismatch("the packed size"));
    let mut broken = honest;
    broken.data[0] = 0xff;
    assert!(matches!(reason(zip(&[broken])), Reason::Damaged(_)));
}

#[test]
fn overlapping_entries_and_gaps_are_refused() {
    assert_eq!(reason(zip_with_gap(&[item("a", b"x")], b"hidden")), Reason::Overlap);
    // Two directory entries for the same bytes: the overlap bomb, with many names and one block of data.
    let one = zip(&[item("a", b"x")]);
    let directory = one.len() - 22 - 47;
    let mut bytes = one[..directory].to_vec();
    let central = one[directory..one.len() - 22].to_vec();
    let mut second = central.clone();
    *second.last_mut().unwrap() = b'b';
    end(&mut bytes, &[central, second].concat(), 2);
    assert!(matches!(reason(bytes), Reason::HeaderMismatch(_) | Reason::Overlap));
    let mut prefixed = b"#!/bin/sh\n".to_vec();
    prefixed.extend(zip(&[item("a", b"x")]));
    assert!(matches!(reason(prefixed), Reason::Damaged(_)), "a prefix shifts the directory");
}

#[test]
fn bombs_are_refused_before_they_are_unpacked() {
    // The limits apply to the headers, before anything is decompressed.
    let many: Vec<Item> = (0..=MAX_ENTRIES).map(|n| item(format!("f{n}"), b"")).collect();
    assert_eq!(reason(zip(&many)), Reason::TooManyEntries(MAX_ENTRIES));
    assert_eq!(reason(zip(&[deflated("a", &vec![0; 4 << 20])])), Reason::Ratio(200));
    check_zip(Cursor::new(zip(&[deflated("a", &vec![0; 1 << 20])]))).expect("a small one may pack well");
    let huge = u32::try_from(MAX_UNPACKED / 2).unwrap();
    let halves: Vec<Item> =
        (0..3).map(|n| Item { size: huge, method: 8, data: vec![3; 2 << 20], ..item(format!("{n}"), b"") }).collect();
    assert_eq!(reason(zip(&halves)), Reason::TooLarge(MAX_UNPACKED));
}

#[test]
fn what_is_no_whole_zip_is_refused() {
    assert!(matches!(reason(Vec::new()), Reason::Damaged(_)));
    assert!(matches!(reason(b"not a zip at all".repeat(100)), Reason::Damaged(_)));
    assert_eq!(reason(zip(&[])), Reason::Empty);
    let whole = zip(&[deflated("a", &[1; 5000]), item("b", b"x")]);
    for len in 0..whole.len() {
        assert!(check_zip(Cursor::new(&whole[..len])).is_err(), "cut at {len}");
        assert!(check_zip(Cursor::new(&whole[len + 1..])).is_err(), "begun at {len}");
    }
    let mut trailing = whole;
    trailing.push(0);
    assert!(matches!(reason(trailing), Reason::Damaged(_)));
}

#[test]
fn a_flipped_bit_is_never_taken_for_something_else() {
    let whole = zip(&[deflated("kernel8.img", b"a kernel, a kernel, a kernel"), item("b", b"x")]);
    let good = check_zip(Cursor::new(&whole)).unwrap();
    for bit in 0..whole.len() * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        if let Ok(summary) = check_zip(Cursor::new(&flipped)) {
            // A flip may hit a field without effect, such as a time. The files must be the same.
            assert_eq!(summary.files, good.files, "bit {bit} changed what is unpacked");
        }
    }
}

#[test]
fn nothing_is_written_outside_or_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
    std::fs::create_dir(&inside).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
    std::os::unix::fs::symlink(outside.join("file"), inside.join("file")).unwrap();
    assert!(unpack_zip(Cursor::new(zip(&[item("link/x", b"x")])), &inside).is_err());
    assert!(unpack_zip(Cursor::new(zip(&[item("../out/x", b"x")])), &inside).is_err());
    unpack_zip(Cursor::new(zip(&[item("file", b"x")])), &inside).expect("the link itself is replaced");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    assert!(Path::new(&inside.join("file")).symlink_metadata().unwrap().is_file());
}
