use super::Facts;
use crate::examine_image;

/// An entry of a test tarball; its path is given separately.
#[derive(Clone, Copy)]
enum Entry<'a> {
    File(&'a str),
    Folder,
    Link(&'a str),
    Hard(&'a str),
}

use Entry::{File, Folder, Hard, Link};

const SYSTEM: [(&str, Entry<'_>); 8] = [
    ("etc/os-release", File("ID=test\n")),
    ("etc/fstab", File("PARTUUID=0-1 /boot/firmware vfat defaults 0 2\n")),
    ("usr/sbin/init", File("#!/bin/sh\n")),
    ("sbin", Link("usr/sbin")),
    ("boot/firmware/config.txt", File("arm_64bit=1\n")),
    ("boot/firmware/cmdline.txt", File("root=PARTUUID=0-2\n")),
    ("boot/firmware/kernel8.img", File("kernel")),
    ("boot/firmware/bcm2711-rpi-4-b.dtb", File("tree")),
];

fn tarball<'a>(entries: impl IntoIterator<Item = (&'a str, Entry<'a>)>) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, entry) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(0);
        match entry {
            File(text) => {
                header.set_size(text.len().try_into().unwrap());
                tar.append_data(&mut header, name, text.as_bytes()).unwrap();
            }
            Folder => {
                header.set_entry_type(tar::EntryType::Directory);
                tar.append_data(&mut header, name, &b""[..]).unwrap();
            }
            Link(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                tar.append_link(&mut header, name, target).unwrap();
            }
            Hard(target) => {
                header.set_entry_type(tar::EntryType::Link);
                tar.append_link(&mut header, name, target).unwrap();
            }
        }
    }
    tar.into_inner().unwrap()
}

fn facts<'a>(entries: impl IntoIterator<Item = (&'a str, Entry<'a>)>) -> Facts {
    examine_image(&*tarball(entries), None, &mut |_| ()).unwrap().facts
}

fn without(names: &[&str]) -> Vec<(&'static str, Entry<'static>)> {
    SYSTEM.into_iter().filter(|(name, _)| !names.iter().any(|without| name.ends_with(without))).collect()
}

fn refusal<'a>(entries: impl IntoIterator<Item = (&'a str, Entry<'a>)>) -> String {
    facts(entries).refusal.expect("it was taken")
}

#[test]
fn a_system_is_taken_and_judged_for_each_board() {
    let facts = facts(SYSTEM);
    assert_eq!(facts.refusal, None);
    facts.judge("pi4", Some("bcm2711-rpi-4-b.dtb")).unwrap();
    let refused = facts.judge("pi3", Some("bcm2710-rpi-3-b.dtb")).unwrap_err();
    assert!(refused.contains("bcm2710-rpi-3-b.dtb"), "{refused}");
    // An unknown board is not judged. The installer still checks the real files.
    facts.judge("", None).expect("a board that is not known is not judged");
    Facts::default().judge("pi4", Some("bcm2711-rpi-4-b.dtb")).expect("what is not known is no refusal");
}

#[test]
fn each_missing_part_is_named_and_all_at_once() {
    let parts = [("init", "init"), ("kernel8.img", "kernel"), ("cmdline.txt", "cmdline.txt"), (".dtb", "device tree")];
    for (without_it, word) in parts {
        let refused = refusal(without(&[without_it]));
        assert!(refused.contains(word), "{without_it}: {refused}");
    }
    let refused = refusal(without(&["init", "kernel8.img", "cmdline.txt", ".dtb"]));
    assert!(parts.iter().all(|(_, word)| refused.contains(word)), "{refused}");
    // Without any boot file no folder is chosen, and everything missing is listed in one answer.
    let refused = refusal([("usr/sbin/init", File("#!"))]);
    assert!(parts[1..].iter().all(|(_, word)| refused.contains(word)), "{refused}");
}

#[test]
fn empty_files_count_for_nothing() {
    let mut entries = without(&["kernel8.img"]);
    entries.push(("boot/firmware/kernel8.img", File("")));
    assert!(refusal(entries).contains("a kernel"));
}

#[test]
fn links_are_followed_to_init_and_kernel() {
    // Absolute, relative and hard links: distributions use all three for the init.
    for (name, entry) in [
        ("sbin/init", Link("../lib/systemd/systemd")),
        ("sbin/init", Link("/lib/systemd/systemd")),
        ("sbin/init", Hard("lib/systemd/systemd")),
    ] {
        let mut entries = without(&["sbin/init", "sbin"]);
        entries.extend([("lib/systemd/systemd", File("elf")), (name, entry)]);
        assert_eq!(facts(entries).refusal, None);
    }
    let mut dangling = without(&["init"]);
    dangling.push(("usr/sbin/init", Link("/usr/lib/gone")));
    assert!(refusal(dangling).contains("init"));
    let mut kernel = without(&["kernel8.img"]);
    kernel.extend([("boot/vmlinuz-6", File("k")), ("boot/firmware/kernel8.img", Link("../vmlinuz-6"))]);
    assert_eq!(facts(kernel).refusal, None);
}

// NixOS has no /sbin/init; its command line names one.
#[test]
fn init_may_be_what_the_command_line_names() {
    let mut entries = without(&["init", "cmdline.txt"]);
    entries.extend([
        ("boot/firmware/cmdline.txt", File("root=x init=/nix/store/abc/init\n")),
        ("nix/store/abc/init", File("elf")),
    ]);
    assert_eq!(facts(entries).refusal, None);
}

// The layout of Ubuntu 25.10. Push and installer once read `os_prefix` differently, so such images failed after the
// root was erased.
#[test]
fn files_below_os_prefix_and_in_the_old_boot_folder_are_found() {
    let ubuntu = [
        ("boot/firmware/config.txt", File("os_prefix=current/\nkernel=vmlinuz\n[tryboot]\nos_prefix=new/\n")),
        ("boot/firmware/current/vmlinuz", File("k")),
        ("boot/firmware/current/cmdline.txt", File("root=LABEL=writable\n")),
        ("boot/firmware/current/bcm2711-rpi-4-b.dtb", File("tree")),
    ];
    let with = |files: &[(&'static str, Entry<'static>)]| {
        let mut entries = without(&["config.txt", "cmdline.txt", "kernel8.img", ".dtb"]);
        entries.extend_from_slice(files);
        entries
    };
    let found = facts(with(&ubuntu));
    assert_eq!(found.refusal, None);
    found.judge("pi4", Some("bcm2711-rpi-4-b.dtb")).unwrap();
    assert!(found.judge("pi5", Some("bcm2712-rpi-5-b.dtb")).is_err());
    let refused = refusal(with(&[ubuntu[0], ubuntu[1], ubuntu[3]]));
    assert!(refused.contains("current/cmdline.txt"), "{refused}");
    let old = [
        ("boot/config.txt", File("#\n")),
        ("boot/cmdline.txt", File("root=x\n")),
        ("boot/kernel.img", File("k")),
        ("boot/bcm2708-rpi-b.dtb", File("t")),
    ];
    assert_eq!(facts(with(&old)).refusal, None);
    // Raspberry Pi OS leaves notes at the old place. They are not boot files.
    let mut notes = SYSTEM.to_vec();
    notes.extend([("boot/config.txt", File("DO NOT EDIT\n")), ("boot/cmdline.txt", File("DO NOT EDIT\n"))]);
    assert_eq!(facts(notes).refusal, None);
}

/// [`SYSTEM`] without its boot files, and these.
fn booting<'a>(files: &[(&'a str, Entry<'a>)]) -> Vec<(&'a str, Entry<'a>)> {
    let mut entries = without(&["config.txt", "cmdline.txt", "kernel8.img", ".dtb"]);
    entries.extend_from_slice(files);
    entries
}

// A linked config.txt once switched the whole judgement off, and the installer found the missing kernel on an erased card.
#[test]
fn linked_boot_files_are_judged_like_others() {
    let early_bookworm = [
        ("boot/config.txt", Link("firmware/config.txt")),
        ("boot/cmdline.txt", Link("firmware/cmdline.txt")),
        ("boot/overlays", Link("firmware/overlays")),
    ];
    let hard = [
        ("boot/firmware/a-config.txt", File("kernel=vmlinuz\n")),
        ("boot/firmware/config.txt", Hard("boot/firmware/a-config.txt")),
    ];
    let absolute = [("boot/firmware/config.txt", Link("/boot/real.txt")), ("boot/real.txt", File("kernel=vmlinuz\n"))];
    let included = [
        ("boot/firmware/config.txt", File("include more.txt\n")),
        ("boot/firmware/more.txt", Link("../more.txt")),
        ("boot/more.txt", File("kernel=vmlinuz\n")),
    ];
    // The name that was packed first gets another file. The link keeps the contents.
    let replaced = [hard[0], hard[1], ("boot/firmware/a-config.txt", File("kernel=gone\n"))];
    let tree = ("boot/firmware/bcm2711-rpi-4-b.dtb", File("tree"));
    let cmdline = ("boot/firmware/cmdline.txt", File("root=x\n"));
    let kernel = ("boot/firmware/vmlinuz", File("k"));
    for entries in [hard.as_slice(), &absolute, &included, &replaced] {
        let found = facts(booting(&[entries, &[tree, cmdline, kernel]].concat()));
        assert_eq!(found.refusal, None);
        found.judge("pi4", Some("bcm2711-rpi-4-b.dtb")).unwrap();
        found.judge("pi5", Some("bcm2712-rpi-5-b.dtb")).expect_err("it is judged for no board");
        let refused = refusal(booting(&[entries, &[tree, cmdline]].concat()));
        assert!(refused.contains("a kernel (vmlinuz)"), "{refused}");
    }
    let mut entries = SYSTEM.to_vec();
    entries.extend(early_bookworm);
    assert_eq!(facts(entries).refusal, None);
    let mut entries = without(&["kernel8.img"]);
    entries.extend(early_bookworm);
    assert!(refusal(entries).contains("a kernel"));
    // Empty files and devices behind a link count for nothing, as files do.
    let mut entries = without(&["kernel8.img"]);
    entries.extend([("boot/empty", File("")), ("boot/firmware/kernel8.img", Hard("boot/empty"))]);
    assert!(refusal(entries).contains("a kernel"));
}

#[test]
fn linked_boot_folder_is_judged_below_its_target() {
    let files = |kernel: &'static str| {
        [
            ("boot", Folder),
            ("boot/firmware", Link(".")),
            ("boot/config.txt", File("#\n")),
            ("boot/cmdline.txt", File("root=x\n")),
            ("boot/bcm2711-rpi-4-b.dtb", File("tree")),
            (kernel, File("k")),
        ]
    };
    let found = facts(booting(&files("boot/kernel8.img")));
    assert_eq!(found.refusal, None);
    assert!(found.boot_files.contains("kernel8.img"), "{found:?}");
    assert!(refusal(booting(&files("boot/nothing"))).contains("a kernel"));
    // Nothing is there, so nothing would be after the installation.
    assert!(refusal(booting(&[("boot/firmware", Link("../gone"))])).contains("a kernel"));
}

#[test]
fn boot_files_that_cannot_be_read_are_refused_with_the_cure() {
    let elsewhere = [("boot", Folder), ("boot/firmware", Link("../efi")), ("efi/config.txt", File("#\n"))];
    let refused = refusal(booting(&elsewhere));
    assert!(refused.contains("/boot/firmware is a link to /efi") && refused.contains("make it a folder"), "{refused}");

    let large = "#".repeat(70_000);
    for entries in [
        [("etc/my.txt", File("#\n")), ("boot/firmware/config.txt", Hard("etc/my.txt"))],
        [("etc/my.txt", File("#\n")), ("boot/firmware/config.txt", Link("../../etc/my.txt"))],
        [("etc/my.txt", File("#\n")), ("boot/firmware/config.txt", File(&large))],
    ] {
        let mut all = without(&["config.txt"]);
        all.extend(entries);
        let refused = refusal(all);
        assert!(refused.contains("config.txt is no file of at most 64 KiB"), "{refused}");
    }

    let names: Vec<String> = (0..4001).map(|number| format!("boot/firmware/{number}")).collect();
    let many = SYSTEM.into_iter().chain(names.iter().map(|name| (name.as_str(), File("x"))));
    let refused = refusal(many);
    assert!(refused.contains("more than 4000 files"), "{refused}");
}

#[test]
fn what_is_no_root_is_named_with_the_cure() {
    let below: Vec<(String, Entry<'static>)> = SYSTEM
        .into_iter()
        .filter(|(name, _)| *name != "sbin")
        .map(|(name, entry)| (format!("rootfs/{name}"), entry))
        .collect();
    let below = || below.iter().map(|(name, entry)| (name.as_str(), *entry));
    let refused = refusal(below());
    assert!(refused.contains("everything is below rootfs/: pack with -C rootfs ."), "{refused}");
    let refused = refusal(below().chain([("README", File("read\n"))]));
    assert!(refused.contains("below rootfs/: pack with -C rootfs ."), "{refused}");

    let save = [("oci-layout", File("{}")), ("index.json", File("{}")), ("blobs/sha256/abc", File("layer"))];
    // docker save writes `oci-layout` since version 25, `manifest.json` before.
    let old = [("manifest.json", File("[]")), ("abc/layer.tar", File("layer")), ("repositories", File("{}"))];
    for entries in [save, old] {
        let refused = refusal(entries);
        assert!(refused.contains("output of docker save: use docker export"), "{refused}");
    }
    let refused = refusal([("2026-kiosk.img.xz", File("packed")), ("README.txt", File("write this\n"))]);
    assert!(refused.contains("holds the image of a disk: push that"), "{refused}");
    let mut sector = vec![0_u8; 600];
    sector[446 + 4] = 0x0c;
    sector[510] = 0x55;
    let text = String::from_utf8(sector).unwrap();
    // 0xaa alone is not UTF-8, so the byte is patched into the finished tarball.
    let mut tar = tarball([("card", File(&text))]);
    tar[512 + 511] = 0xaa;
    let refused = examine_image(&*tar, None, &mut |_| ()).unwrap().facts.refusal.unwrap();
    assert!(refused.contains("image of a disk"), "{refused}");
    let refused = refusal([("boot.tar.xz", File("packed")), ("root.tar.xz", File("packed"))]);
    assert!(refused.contains("another tarball"), "{refused}");
}

#[test]
fn texts_that_nobody_needs_are_not_kept() {
    let mut entries = SYSTEM.to_vec();
    // Password hashes must not reach the controller's database.
    entries.push(("boot/firmware/userconf.txt", File("pi:secret\n")));
    let facts = facts(entries);
    assert_eq!(facts.texts.keys().collect::<Vec<_>>(), ["config.txt"]);
}
