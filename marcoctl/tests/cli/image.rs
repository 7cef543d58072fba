//! Packs a tree of difficult files, unpacks it by the project's unpacker and by GNU tar, and compares.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat, setxattr};
use tempfile::TempDir;
use tokio::process::Command;

use crate::made::write;
use crate::running::{Run, alone, as_nobody};

/// Size of a file with 8 KiB of data.
const HOLLOW: u64 = 1 << 30;

fn traps(root: &Path) {
    write(root, "etc/passwd", b"root\n");
    write(root, "etc/machine-id", b"0123\n");
    write(root, "etc/ssh/ssh_host_ed25519_key", b"secret\n");
    write(root, "var/lib/marco-agent/node.key", b"secret\n");
    write(root, "proc/1/stat", b"\n");
    // Names longer than the fields of a ustar header.
    write(root, &format!("{}/{}", "d".repeat(120), "f".repeat(200)), b"long\n");
    // Linux allows any byte but NUL and the slash.
    std::fs::write(root.join(OsStr::from_bytes(b"line\nfeed \xff\xfe")), "odd\n").unwrap();
    std::fs::hard_link(root.join("etc/passwd"), root.join("etc/passwd-")).unwrap();
    symlink("../no where", root.join("etc/dangling")).unwrap();
    symlink("/".repeat(3) + &"t".repeat(150), root.join("etc/long")).unwrap();
    write(root, "usr/bin/sudo", b"\x7fELF");
    std::fs::set_permissions(root.join("usr/bin/sudo"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    std::fs::set_permissions(root.join("etc"), std::fs::Permissions::from_mode(0o700)).unwrap();
    let hollow = std::fs::File::create(root.join("hollow")).unwrap();
    hollow.write_all_at(&[1; 4096], 300 << 20).unwrap();
    hollow.write_all_at(&[2; 4096], 700 << 20).unwrap();
    hollow.set_len(HOLLOW).unwrap();
    // The map of a file without data has only the empty part that marks the end.
    std::fs::File::create(root.join("all-hole")).unwrap().set_len(1 << 20).unwrap();
    // Before 1970 and with a fraction: a ustar header can hold neither.
    let old = std::time::UNIX_EPOCH - std::time::Duration::new(3600, 250_000_000);
    std::fs::File::open(root.join("usr/bin/sudo")).unwrap().set_modified(old).unwrap();
    // A pax value may contain line feeds, equals signs and NULs.
    setxattr(root.join("etc/passwd"), "user.note", b"a\nb=\0c", XattrFlags::empty()).unwrap();
    if rustix::process::geteuid().is_root() {
        // The user id does not fit into the octal digits of a header.
        std::os::unix::fs::chown(root.join("hollow"), Some(3_000_000), Some(70_000)).unwrap();
        mknodat(CWD, root.join("null"), FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(1, 3)).unwrap();
        // cap_net_raw in the format of setcap(8).
        let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        write(root, "usr/bin/ping", b"\x7fELF");
        setxattr(root.join("usr/bin/ping"), "security.capability", &capability, XattrFlags::empty()).unwrap();
    }
    mknodat(CWD, root.join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
}

async fn pack(folder: &TempDir, name: &str, more: &[&str]) -> Run {
    let (root, file) = (folder.path().join("root"), folder.path().join(name));
    let mut arguments = vec!["image", "pack", root.to_str().unwrap(), "-o", file.to_str().unwrap()];
    arguments.extend(more);
    alone(&arguments).await
}

fn made_up() -> TempDir {
    let folder = TempDir::new().unwrap();
    std::fs::create_dir(folder.path().join("root")).unwrap();
    traps(&folder.path().join("root"));
    folder
}

/// Returns the changes that rsync would make to turn one tree into the other, checksums included.
async fn differences(from: &Path, to: &Path) -> String {
    let output = Command::new("rsync")
        .args(["-naXAHc", "--delete", "--itemize-changes", "-8"])
        .arg(format!("{}/", from.display()))
        .arg(format!("{}/", to.display()))
        .output()
        .await
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn a_tree_with_traps_comes_back_as_it_was_by_our_unpacker_and_by_gnu_tar() {
    let folder = made_up();
    // --keep-identity: everything must come back for the comparison.
    let run = pack(&folder, "all.tar", &["--keep-identity", "--no-default-excludes"]).await;
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:?}");
    let tarball = folder.path().join("all.tar");
    assert!(tarball.metadata().unwrap().len() < 1 << 20, "holes were stored");
    let (root, ours, gnu) = (folder.path().join("root"), folder.path().join("ours"), folder.path().join("gnu"));
    std::fs::create_dir(&ours).unwrap();
    std::fs::create_dir(&gnu).unwrap();
    let reader = std::io::BufReader::new(std::fs::File::open(&tarball).unwrap());
    let summary = marco_archive::unpack_tar(reader, &ours, &mut |_| {}).unwrap();
    assert_eq!(differences(&root, &ours).await, "");
    assert!(ours.join("hollow").metadata().unwrap().blocks() < 1024, "{summary:?}");
    let status = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "-xpf"])
        .arg(&tarball)
        .arg("-C")
        .arg(&gnu)
        .status()
        .await
        .unwrap();
    assert!(status.success());
    assert_eq!(differences(&root, &gnu).await, "");
}

#[tokio::test]
async fn what_makes_a_machine_itself_is_left_out_in_every_compression() {
    let folder = made_up();
    // Each compression has its own encoder.
    for name in ["a.tar", "a.tar.gz", "a.tar.xz", "a.tar.zst"] {
        let run = pack(&folder, name, &["--exclude", "*hollow", "--output", "json"]).await;
        assert_eq!(run.code, 0, "{run:?}");
        let output = Command::new("tar").arg("-tf").arg(folder.path().join(name)).output().await.unwrap();
        let list = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{output:?}");
        for kept in ["./etc/passwd\n", "./proc/\n", "./var/lib/marco-agent/\n", "./etc/ssh/\n"] {
            assert!(list.contains(kept), "{name}: {kept} is missing: {list}");
        }
        for left_out in ["machine-id", "ssh_host", "node.key", "./proc/1", "hollow"] {
            assert!(!list.contains(left_out), "{name}: {left_out} is in it");
        }
        assert_eq!(run.json()["entries"], list.lines().count());
    }
    // Several threads of xz write several blocks; a plain decoder must read them.
    let mut packed = std::io::BufReader::new(std::fs::File::open(folder.path().join("a.tar.xz")).unwrap());
    let plain = liblzma::bufread::XzDecoder::new(&mut packed);
    marco_archive::check_tar(std::io::BufReader::new(plain), &mut |_| {}).unwrap();
}

#[tokio::test]
async fn a_name_that_says_no_compression_is_refused() {
    let folder = made_up();
    let run = pack(&folder, "image.zip", &[]).await;
    assert!(run.code == 1 && run.stderr.contains(".tar.zst"), "{run:?}");
    assert!(!folder.path().join("image.zip").exists());
}

#[tokio::test]
async fn what_may_not_be_read_is_named_and_nothing_is_left_behind() {
    let folder = made_up();
    let secret = folder.path().join("root/usr/bin/sudo");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o000)).unwrap();
    // Root may read everything, so another user must pack.
    let run = if rustix::process::geteuid().is_root() {
        for path in [folder.path().to_owned(), folder.path().join("root/etc")] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
        }
        let (root, file) = (folder.path().join("root"), folder.path().join("a.tar"));
        let arguments = ["image", "pack", root.to_str().unwrap(), "-o", file.to_str().unwrap()];
        as_nobody(folder.path(), &arguments).await
    } else {
        pack(&folder, "a.tar", &[]).await
    };
    assert!(run.code == 1 && run.stderr.contains("usr/bin/sudo: Permission denied"), "{run:?}");
    assert!(!folder.path().join("a.tar").exists());
}
