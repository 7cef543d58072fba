//! Tests of unpacking, and a builder of tarballs for all tests of this module.

use std::fs;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};

use super::{check_tar, unpack_tar};

/// A member whose header may contradict its data.
#[derive(Clone)]
pub(super) struct Member {
    pub path: Vec<u8>,
    pub kind: u8,
    pub link: Vec<u8>,
    pub data: Vec<u8>,
    /// Size in the header. `None`: the length of `data`.
    pub size: Option<u64>,
    pub mode: u32,
    pub mtime: u64,
}

pub(super) fn member(path: &str, kind: u8) -> Member {
    Member {
        path: path.into(),
        kind,
        link: Vec::new(),
        data: Vec::new(),
        size: None,
        mode: 0o644,
        mtime: 1_000_000_000,
    }
}

/// Builds a pax header for the member that follows.
pub(super) fn pax(records: &[(&str, &str)]) -> Member {
    let mut data = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        // The length includes its own digits (POSIX), so it is searched.
        let length = (rest..).find(|length| rest + length.to_string().len() == *length).unwrap();
        data.extend(format!("{length} {key}={value}\n").into_bytes());
    }
    Member { data, ..member("PaxHeaders/x", b'x') }
}

/// Writes the checksum into a header.
pub(super) fn seal(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

pub(super) fn tar(members: &[Member]) -> Vec<u8> {
    let mut out = Vec::new();
    for member in members {
        let mut header = [0; 512];
        header[..member.path.len()].copy_from_slice(&member.path);
        let size = member.size.unwrap_or(member.data.len().try_into().unwrap());
        for (at, text) in [
            (100, format!("{:07o}", member.mode)),
            (108, "0000000".to_owned()),
            (116, "0000000".to_owned()),
            (124, format!("{size:011o}")),
            (136, format!("{:011o}", member.mtime)),
            (257, "ustar\x0000".to_owned()),
            (329, "0000001".to_owned()),
            (337, "0000003".to_owned()),
        ] {
            header[at..at + text.len()].copy_from_slice(text.as_bytes());
        }
        header[156] = member.kind;
        header[157..157 + member.link.len()].copy_from_slice(&member.link);
        seal(&mut header);
        out.extend(header);
        out.extend(&member.data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn data(path: &str, data: &[u8]) -> Member {
    Member { data: data.to_vec(), ..member(path, b'0') }
}

fn to(path: &str, kind: u8, target: &str) -> Member {
    Member { link: target.into(), ..member(path, kind) }
}

#[test]
fn everything_a_system_has_is_unpacked_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let members = [
        Member { mode: 0o750, mtime: 5, ..member("./", b'5') },
        // Mode 0555: the members below must be written before the mode is set.
        Member { mode: 0o555, mtime: 1234, ..member("./usr/", b'5') },
        Member { mode: 0o4755, ..data("./usr/sudo", b"binary") },
        to("./usr/link", b'1', "./usr/sudo"),
        Member { mtime: 77, ..to("./sh", b'2', "/usr/sudo") },
        member("./fifo", b'6'),
        data("./no/parents/f", &[3; 700_000]),
        pax(&[("path", &format!("{}/{}", "d".repeat(200), "f".repeat(250))), ("mtime", "1000000000.5")]),
        data("short", b"long name"),
        Member { data: [b"g".repeat(150), b"\0".to_vec()].concat(), ..member("././@LongLink", b'L') },
        data("ggg", b"gnu"),
    ];
    let bytes = tar(&members);
    let mut last = 0;
    let checked = check_tar(&*bytes, &mut |done| last = done).unwrap();
    let unpacked = unpack_tar(&*bytes, dir.path(), &mut |_| ()).unwrap();
    assert_eq!((checked.entries, checked.unpacked_bytes), (9, 700_018));
    assert_eq!(last, checked.unpacked_bytes);
    assert_eq!((unpacked.entries, unpacked.unpacked_bytes), (checked.entries, checked.unpacked_bytes));
    let at = |path: &str| dir.path().join(path).symlink_metadata().unwrap();
    assert_eq!((at("").mode() & 0o7777, at("").mtime()), (0o750, 5));
    assert_eq!((at("usr").mode() & 0o7777, at("usr").mtime()), (0o555, 1234));
    assert_eq!(
        (at("usr/sudo").mode() & 0o7777, at("usr/sudo").nlink(), at("usr/sudo").mtime()),
        (0o4755, 2, 1_000_000_000)
    );
    assert_eq!((fs::read_link(dir.path().join("sh")).unwrap().to_str(), at("sh").mtime()), (Some("/usr/sudo"), 77));
    assert!(at("fifo").file_type().is_fifo());
    assert_eq!(
        (at("no").mode() & 0o7777, fs::read(dir.path().join("no/parents/f")).unwrap()),
        (0o755, vec![3; 700_000])
    );
    let long = at(&format!("{}/{}", "d".repeat(200), "f".repeat(250)));
    assert_eq!((long.mtime_nsec(), long.len()), (500_000_000, 9));
    assert_eq!(fs::read(dir.path().join("g".repeat(150))).unwrap(), b"gnu");
}

#[test]
fn unpacking_again_replaces_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("f"), "untouched").unwrap();
    // Links from an earlier system must be replaced, not followed.
    symlink(outside.path(), dir.path().join("d")).unwrap();
    symlink(outside.path().join("f"), dir.path().join("f")).unwrap();
    let members = [data("d/f", b"new"), data("f", b"new"), to("l", b'2', "f"), to("h", b'1', "f")];
    for _ in 0..2 {
        unpack_tar(&*tar(&members), dir.path(), &mut |_| ()).unwrap();
    }
    assert_eq!(fs::read(outside.path().join("f")).unwrap(), b"untouched");
    assert_eq!(fs::read(dir.path().join("d/f")).unwrap(), b"new");
    assert!(dir.path().join("d").symlink_metadata().unwrap().is_dir(), "a link on the way is replaced");
}

#[test]
fn hostile_tarballs_leave_nothing_outside() {
    let dir = tempfile::tempdir().unwrap();
    let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
    fs::create_dir(&inside).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    let absolute = outside.to_str().unwrap();
    for members in [
        vec![data("../out/x", b"x")],
        vec![data(&format!("{absolute}/x"), b"x")],
        vec![to("l", b'2', "../out"), data("l/x", b"x")],
        vec![to("l", b'2', absolute), data("l/x", b"x")],
        // Each step looks harmless alone: `a` is the folder itself, `a/l` its parent.
        vec![to("a", b'2', "."), to("a/l", b'2', ".."), data("a/l/out/x", b"x")],
        vec![to("h", b'1', "../out/secret"), data("h", b"x")],
        vec![to("l", b'2', "../out"), to("h", b'1', "l/secret")],
        vec![to("l", b'2', "../out/x"), to("h", b'1', "l"), data("h/y", b"x")],
    ] {
        unpack_tar(&*tar(&members), &inside, &mut |_| ()).unwrap_err();
    }
    let replaced = [to("l", b'2', "../out/secret"), data("l", b"replaced")];
    unpack_tar(&*tar(&replaced), &inside, &mut |_| ()).unwrap();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
}

#[test]
fn a_path_through_a_link_inside_lands_where_the_link_leads() {
    let dir = tempfile::tempdir().unwrap();
    let members =
        [to("lib", b'2', "usr/lib"), member("usr/lib/", b'5'), data("lib/modules/x", b"x"), member("lib/", b'5')];
    unpack_tar(&*tar(&members), dir.path(), &mut |_| ()).unwrap();
    assert!(dir.path().join("usr/lib/modules/x").is_file());
    assert!(dir.path().join("lib").symlink_metadata().unwrap().is_symlink());
}

#[test]
fn holes_stay_holes_in_every_sparse_format() {
    let size: u64 = 64 << 20;
    let mut old = data("old", b"");
    let text_map = format!("2\n0\n4\n{}\n4\n", 32 << 20);
    let mut new = text_map.into_bytes();
    new.resize(512, 0);
    new.extend(b"headtail");
    let real = size.to_string();
    let map = format!("0,4,{},4", 32 << 20);
    old.kind = b'S';
    old.data = b"headtail".to_vec();
    let mut bytes = tar(&[old]);
    bytes[257..265].copy_from_slice(b"ustar  \0");
    for (at, value) in [(386, 0), (398, 4), (410, 32 << 20), (422, 4), (483, size)] {
        bytes[at..at + 12].copy_from_slice(format!("{value:011o}\0").as_bytes());
    }
    seal(&mut bytes[..512]);
    bytes.truncate(1024);
    bytes.extend(tar(&[
        pax(&[
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", "new"),
            ("GNU.sparse.realsize", &real),
        ]),
        data("GNUSparseFile.1/new", &new),
        pax(&[
            ("GNU.sparse.map", &map),
            ("GNU.sparse.size", &real),
            ("GNU.sparse.name", "mid"),
            ("GNU.sparse.numblocks", "2"),
        ]),
        data("GNUSparseFile.1/mid", b"headtail"),
        data("after", b"after"),
    ]));
    let dir = tempfile::tempdir().unwrap();
    let summary = unpack_tar(&*bytes, dir.path(), &mut |_| ()).unwrap();
    assert_eq!(summary.unpacked_bytes, 3 * size + 5);
    for name in ["old", "new", "mid"] {
        let file = fs::File::open(dir.path().join(name)).unwrap();
        let mut part = [0; 8];
        file.read_exact_at(&mut part, 0).unwrap();
        assert_eq!(&part, b"head\0\0\0\0", "{name}");
        file.read_exact_at(&mut part, 32 << 20).unwrap();
        assert_eq!(&part, b"tail\0\0\0\0", "{name}");
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), size);
        // Reading zeros proves nothing about holes; the allocated blocks do.
        assert!(metadata.blocks() * 512 < 1 << 20, "{name} takes {} blocks", metadata.blocks());
    }
}

#[test]
fn attributes_and_devices_are_restored_or_counted() {
    let dir = tempfile::tempdir().unwrap();
    let members = [pax(&[("SCHILY.xattr.user.marco", "value")]), data("f", b"x"), member("null", b'3')];
    let summary = unpack_tar(&*tar(&members), dir.path(), &mut |_| ()).unwrap();
    let mut value = [0; 16];
    let attribute = rustix::fs::getxattr(dir.path().join("f"), "user.marco", &mut value);
    // Rights differ between machines: root and user namespaces may create devices, others may not.
    let device = dir.path().join("null").symlink_metadata().is_ok_and(|made| {
        made.file_type().is_char_device()
            && made.rdev() == rustix::fs::makedev(1, 3)
            && made.permissions().mode() & 0o777 == 0o644
    });
    let restored = u64::from(attribute == Ok(5)) + u64::from(device);
    assert_eq!(summary.not_restored + restored, 2);
}

#[test]
fn a_tarball_of_a_common_writer_is_read() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir_all(dir.path().join("in").join("x".repeat(120))).unwrap();
    fs::write(dir.path().join("in").join("x".repeat(120)).join("y".repeat(120)), "data").unwrap();
    let mut builder = ::tar::Builder::new(Vec::new());
    builder.append_dir_all(".", dir.path().join("in")).unwrap();
    let bytes = builder.into_inner().unwrap();
    fs::create_dir(dir.path().join("out")).unwrap();
    unpack_tar(&*bytes, &dir.path().join("out"), &mut |_| ()).unwrap();
    assert_eq!(fs::read(dir.path().join("out").join("x".repeat(120)).join("y".repeat(120))).unwrap(), b"data");
}
