//! Hostile tarballs, assembled block by block. Common writers refuse to create them.

use super::check_tar;
use super::unpack_tests::{Member, member, pax, tar};
use crate::{Error, Reason};

fn reason(bytes: &[u8]) -> Reason {
    match check_tar(bytes, &mut |_| ()) {
        Err(Error::Refused(refused)) => refused.reason,
        other => panic!("not refused: {other:?}"),
    }
}

fn taken(members: &[Member]) {
    check_tar(&*tar(members), &mut |_| ()).unwrap();
}

#[test]
fn hostile_paths_are_refused_each_with_its_reason() {
    for (path, expected) in [
        ("/etc/passwd", Reason::AbsolutePath),
        ("../x", Reason::ParentPath),
        ("a/../../x", Reason::ParentPath),
        ("a/..", Reason::ParentPath),
        ("./../x", Reason::ParentPath),
        ("", Reason::EmptyName),
        (".", Reason::EmptyName),
    ] {
        assert_eq!(reason(&tar(&[member(path, b'0')])), expected, "{path:?}");
    }
    // The header holds 100 bytes. Longer names need an extended header, so each limit is tested through one.
    let long = pax(&[("path", &"x".repeat(256))]);
    assert_eq!(reason(&tar(&[long, member("x", b'0')])), Reason::LongName(255));
    let deep = pax(&[("path", &"x/".repeat(200))]);
    assert_eq!(reason(&tar(&[deep, member("x", b'5')])), Reason::Depth(128));
    let endless = pax(&[("path", &"x/".repeat(2048))]);
    assert_eq!(reason(&tar(&[endless, member("x", b'5')])), Reason::LongName(4095));
    assert_eq!(reason(&tar(&[pax(&[("path", "a\0b")]), member("x", b'0')])), Reason::ControlCharacter);
    assert_eq!(reason(&tar(&[pax(&[("path", "/etc/x")]), member("x", b'0')])), Reason::AbsolutePath);
    assert_eq!(reason(&tar(&[pax(&[("path", "")]), member("x", b'0')])), Reason::EmptyName);
    // A harmless name in the header hides the real one in the GNU extension.
    let long_name = Member { data: b"../../x\0".to_vec(), ..member("././@LongLink", b'L') };
    assert_eq!(reason(&tar(&[long_name, member("x", b'0')])), Reason::ParentPath);
}

#[test]
fn nothing_is_written_through_a_link_that_leads_out() {
    for target in ["/etc", "..", "../..", "a/../../x", "/"] {
        let link = Member { link: target.into(), ..member("d", b'2') };
        assert_eq!(reason(&tar(&[link.clone(), member("d/x", b'0')])), Reason::ThroughLink, "{target}");
        assert_eq!(reason(&tar(&[link.clone(), member("d/x/y", b'0')])), Reason::ThroughLink, "{target}");
        assert_eq!(reason(&tar(&[link.clone(), member("d", b'5')])), Reason::ThroughLink, "{target}");
        taken(&[link.clone(), member("d", b'0')]);
        taken(&[link]);
    }
    // A chain of links, and a link to itself.
    let chain = [("a", "b"), ("b", "c/../../x")].map(|(path, to)| Member { link: to.into(), ..member(path, b'2') });
    assert_eq!(reason(&tar(&[chain[0].clone(), chain[1].clone(), member("a/x", b'0')])), Reason::ThroughLink);
    let own = Member { link: "a".into(), ..member("a", b'2') };
    assert_eq!(reason(&tar(&[own, member("a/x", b'0')])), Reason::ThroughLink);
    // A hard link to a symbolic link is that link.
    let link = Member { link: "/etc".into(), ..member("a", b'2') };
    let hard = Member { link: "a".into(), ..member("b", b'1') };
    assert_eq!(reason(&tar(&[link, hard, member("b/x", b'0')])), Reason::ThroughLink);
}

#[test]
fn a_path_may_go_through_a_link_that_stays_inside() {
    // A merged /usr: packages contain paths through the link.
    let usr = Member { link: "usr/lib".into(), ..member("lib", b'2') };
    taken(&[member("usr/lib/", b'5'), usr, member("lib/modules/x.ko", b'0'), member("lib/", b'5')]);
}

#[test]
fn hard_links_only_lead_to_what_the_archive_made() {
    for target in ["etc/shadow", "d", "h", "later"] {
        let hard = Member { link: target.into(), ..member("h", b'1') };
        assert_eq!(reason(&tar(&[member("d/", b'5'), hard, member("later", b'0')])), Reason::HardLink, "{target}");
    }
    let absolute = Member { link: "/etc/shadow".into(), ..member("h", b'1') };
    assert_eq!(reason(&tar(&[absolute])), Reason::AbsolutePath);
    let parent = Member { link: "../etc/shadow".into(), ..member("h", b'1') };
    assert_eq!(reason(&tar(&[parent])), Reason::ParentPath);
    let out = Member { link: "/".into(), ..member("d", b'2') };
    let through = Member { link: "d/etc/shadow".into(), ..member("h", b'1') };
    assert_eq!(reason(&tar(&[out, through])), Reason::ThroughLink);
    taken(&[member("f", b'0'), Member { link: "./f".into(), ..member("h", b'1') }]);
}

#[test]
fn a_folder_is_never_replaced_and_a_file_never_entered() {
    assert_eq!(reason(&tar(&[member("d/", b'5'), member("d", b'0')])), Reason::FileAndFolder);
    assert_eq!(
        reason(&tar(&[member("d/x", b'0'), Member { link: "/etc".into(), ..member("d", b'2') }])),
        Reason::FileAndFolder
    );
    assert_eq!(reason(&tar(&[member("f", b'0'), member("f/x", b'0')])), Reason::FileAndFolder);
    assert_eq!(reason(&tar(&[member("f", b'0'), member("f", b'5')])), Reason::FileAndFolder);
}

#[test]
fn kinds_that_a_system_does_not_have_are_refused() {
    // GNU's volume, multi-volume and dump entries, Solaris ACLs, and unknown flags.
    for kind in [b'V', b'M', b'N', b'D', b'A', b'Z', b'9', 0xff] {
        assert_eq!(reason(&tar(&[member("x", kind)])), Reason::Kind(char::from(kind)));
    }
    for kind in [b'2', b'1'] {
        assert_eq!(reason(&tar(&[member("x", kind)])), Reason::EmptyName);
    }
}

#[test]
fn headers_that_disagree_about_a_size_are_refused() {
    // The shape of CVE-2025-62518: the pax header says 1024 bytes, the header itself none. Those bytes contain another
    // archive.
    let hidden = tar(&[member("hidden", b'0')]);
    let outer = Member { data: hidden.clone(), size: Some(0), ..member("x", b'0') };
    let size = hidden.len().to_string();
    assert_eq!(reason(&tar(&[pax(&[("size", &size)]), outer.clone()])), Reason::SizeMismatch);
    let other = Member { size: Some(512), ..outer };
    assert_eq!(reason(&tar(&[pax(&[("size", &size)]), other])), Reason::SizeMismatch);
    for kind in [b'1', b'2', b'3', b'4', b'5', b'6'] {
        let member = Member { data: vec![0; 512], link: "x".into(), ..member("d", kind) };
        assert_eq!(reason(&tar(&[member])), Reason::SizeMismatch, "kind {}", char::from(kind));
    }
    let same = Member { data: b"four".to_vec(), ..member("x", b'0') };
    taken(&[pax(&[("size", "4")]), same]);
}

#[test]
fn extended_headers_that_readers_take_differently_are_refused() {
    let twice = [pax(&[("path", "a")]), pax(&[("path", "b")]), member("x", b'0')];
    assert!(matches!(reason(&tar(&twice)), Reason::Damaged(_)));
    assert!(matches!(reason(&tar(&[pax(&[("path", "a"), ("path", "b")]), member("x", b'0')])), Reason::Damaged(_)));
    let long_name = Member { data: b"a\0".to_vec(), ..member("././@LongLink", b'L') };
    assert!(matches!(reason(&tar(&[pax(&[("path", "b")]), long_name, member("x", b'0')])), Reason::Damaged(_)));
    assert!(matches!(reason(&tar(&[pax(&[("path", "b")])])), Reason::Damaged(_)), "for no member");
    for global in ["path", "size", "linkpath", "GNU.sparse.name", "SCHILY.xattr.user.x"] {
        let global = Member { kind: b'g', ..pax(&[(global, "1")]) };
        assert!(matches!(reason(&tar(&[global, member("x", b'0')])), Reason::Damaged(_)));
    }
    // A harmless global header is accepted: `git archive` writes one with the commit's id.
    taken(&[Member { kind: b'g', ..pax(&[("comment", "abc")]) }, member("x", b'0')]);
    for data in ["5 a=b\n", "99 a=b\n", "a=b\n", "6 a=bc", "0 \n", "-6 a=b\n", "18446744073709551615 a=b\n", " 6 a=b\n"]
    {
        let broken = Member { data: data.into(), ..member("h", b'x') };
        assert!(matches!(reason(&tar(&[broken, member("x", b'0')])), Reason::Damaged(_)), "{data:?}");
    }
    let huge = Member { size: Some(1 << 32), ..member("h", b'x') };
    assert_eq!(reason(&tar(&[huge, member("x", b'0')])), Reason::LongHeader(1 << 20));
}

#[test]
fn wrong_maps_of_sparse_files_are_refused() {
    let keys = |map: &'static str, size: &'static str| {
        pax(&[("GNU.sparse.map", map), ("GNU.sparse.size", size), ("GNU.sparse.name", "f")])
    };
    let file = Member { data: vec![1; 8], ..member("x", b'0') };
    taken(&[keys("0,4,1000,4", "2000"), file.clone()]);
    for (map, size) in [
        ("0,4", "2000"),
        ("0,4,2,4", "2000"),
        ("4,4,0,4", "2000"),
        ("0,4,1000,4", "1003"),
        ("0,8,4", "9"),
        ("0,18446744073709551615", "9"),
    ] {
        assert_eq!(reason(&tar(&[keys(map, size), file.clone()])), Reason::Sparse, "{map}");
    }
    let huge = pax(&[("GNU.sparse.map", "0,8"), ("GNU.sparse.size", "999999999999999"), ("GNU.sparse.name", "f")]);
    // The claimed size counts, not the stored bytes: holes take space once they are written.
    assert!(matches!(reason(&tar(&[huge, file.clone()])), Reason::TooLarge(_)));
    assert_eq!(reason(&tar(&[pax(&[("GNU.sparse.offset", "0")]), file.clone()])), Reason::Sparse);
    assert_eq!(reason(&tar(&[pax(&[("SCHILY.realsize", "9")]), file])), Reason::Sparse);
}

#[test]
fn what_is_no_whole_archive_is_refused() {
    assert_eq!(reason(b""), Reason::Truncated);
    assert!(matches!(reason(&b"not a tar at all ".repeat(100)), Reason::Damaged(_)));
    assert_eq!(reason(&[0; 1024]), Reason::Empty);
    let whole = tar(&[Member { data: vec![1; 700], ..member("a", b'0') }, member("b", b'0')]);
    for len in 0..whole.len() {
        assert_eq!(reason(&whole[..len]), Reason::Truncated, "cut at {len}");
    }
    assert!(matches!(reason(&[&*whole, b"more"].concat()), Reason::Damaged(_)));
    // GNU tar stops at the first end unless told otherwise (`--ignore-zeros`), so readers disagree.
    assert!(matches!(reason(&[&*whole, &*whole].concat()), Reason::Damaged(_)), "a second archive behind the first");
    check_tar(&*[&*whole, &[0; 8192]].concat(), &mut |_| ()).expect("padding to a record");
    let mut flipped = whole;
    flipped[0] ^= 1;
    assert!(matches!(reason(&flipped), Reason::Damaged(_)));
}

#[test]
fn numbers_that_are_none_are_refused() {
    for (at, field) in [
        (124, &b"00000000009\0"[..]),
        (124, b"-1\0\0\0\0\0\0\0\0\0\0"),
        (100, b"0 00644\0"),
        (124, &[0x80, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ] {
        let mut bytes = tar(&[member("x", b'0')]);
        bytes[at..at + field.len()].copy_from_slice(field);
        super::unpack_tests::seal(&mut bytes[..512]);
        assert!(matches!(reason(&bytes), Reason::Damaged(_)), "{field:?}");
    }
}
