//! The tree: everything that Linux stores in a file system and that is easily lost on the way.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::Path;

use anyhow::Result;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, makedev};

use crate::{command, name};

/// A sparse file of a gigabyte with a few bytes of data.
pub(crate) const SPARSE: &str = "usr/traps/sparse";

pub(crate) async fn lay(root: &Path) -> Result<()> {
    let traps = root.join("usr/traps");
    fs::create_dir_all(&traps)?;
    names(&traps)?;
    links(root, &traps)?;
    attributes(&traps).await?;
    special(&traps)?;
    sparse(root)?;
    let many = traps.join("many");
    // Many small files: an installation must not sync each of them.
    for number in 0..10_000 {
        let folder = many.join(format!("{:02}", number % 100));
        if number < 100 {
            fs::create_dir_all(&folder)?;
        }
        fs::write(folder.join(format!("{number}")), format!("file {number}\n").repeat(number % 40))?;
    }
    times(&traps)
}

fn names(traps: &Path) -> Result<()> {
    // The longest name that ext4 has.
    let long = [b'n'; 255];
    for bytes in [
        &b"a\nnewline"[..],
        b"not utf-8 \xff\xfe\x80",
        b"\xc3\xa9 and e\xcc\x81",
        b" blanks ",
        b"-rf",
        b"back\\slash",
        b"tab\tand\rreturn",
        b"quote'\"*?[$(x)",
        b"...",
        &long,
    ] {
        fs::write(traps.join(name(bytes)), bytes)?;
    }
    let mut deep = traps.join("deep");
    for level in 0..20 {
        deep.push(format!("{level}-{}", "d".repeat(90)));
    }
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("file"), "far down")?;
    // Longer than the header's field and than a path of most programs: it needs an extended header.
    symlink(name(&[b't'; 3000]), traps.join("long-target"))?;
    Ok(())
}

fn links(root: &Path, traps: &Path) -> Result<()> {
    let several = traps.join("several-names");
    fs::write(&several, "one file")?;
    fs::hard_link(&several, root.join("etc/another-name"))?;
    fs::hard_link(&several, traps.join(name(b"a third\xff")))?;
    symlink("../../nowhere/\nat all", traps.join("dangling"))?;
    // A link to itself must be copied and never followed.
    symlink("loop", traps.join("loop"))?;
    symlink("/etc/hostname", traps.join("absolute"))?;
    // Also symbolic links can have several names.
    fs::hard_link(traps.join("dangling"), traps.join("dangling-too"))?;
    Ok(())
}

async fn attributes(traps: &Path) -> Result<()> {
    let file = traps.join("attributes");
    fs::write(&file, "x")?;
    fs::create_dir(traps.join("folder"))?;
    for path in [&file, &traps.join("folder")] {
        rustix::fs::setxattr(path, "user.note", b"bytes \0\n\xff of any kind", XattrFlags::empty())?;
        rustix::fs::setxattr(path, "trusted.note", &[b'l'; 2000], XattrFlags::empty())?;
        rustix::fs::setxattr(path, "user.empty", b"", XattrFlags::empty())?;
    }
    rustix::fs::lsetxattr(traps.join("dangling"), "trusted.link", b"a link's", XattrFlags::empty())?;
    let (ping, acl, inherits) = (traps.join("ping"), traps.join("acl"), traps.join("inherits"));
    fs::write(&ping, "program")?;
    fs::write(&acl, "x")?;
    fs::create_dir(&inherits)?;
    command("setcap", &["cap_net_raw,cap_net_admin=ep", &ping.display().to_string()]).await?;
    let shown = (acl.display().to_string(), inherits.display().to_string());
    command("setfacl", &["-m", "user:1234:rwx,group:4321:r--,mask::r-x", &shown.0]).await?;
    command("setfacl", &["-m", "user:1234:rwx,default:user:1234:rwx,default:mask::rwx", &shown.1]).await?;
    for (what, owner, mode) in [
        ("setuid", 0, 0o4755),
        ("setgid", 65534, 0o2711),
        ("closed", 1000, 0o000),
        ("everybodys", 3_000_000_000, 0o666),
    ] {
        let path = traps.join(what);
        fs::write(&path, what)?;
        std::os::unix::fs::chown(&path, Some(owner), Some(owner + 1))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    for (what, mode) in [("sticky", 0o1777), ("setgid-folder", 0o2775), ("closed-folder", 0o500)] {
        let path = traps.join(what);
        fs::create_dir(&path)?;
        fs::write(path.join("inside"), what)?;
        std::os::unix::fs::chown(&path, Some(33), Some(33))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    // Changing the owner of a file clears its capabilities, so `ping` keeps its owner.
    std::os::unix::fs::lchown(traps.join("dangling"), Some(7), Some(8))?;
    Ok(())
}

fn special(traps: &Path) -> Result<()> {
    for (what, kind, device) in [
        ("null", FileType::CharacterDevice, makedev(1, 3)),
        // Both numbers are beyond 8 bits, the limit of old kernels.
        ("far-device", FileType::CharacterDevice, makedev(4095, 123_456)),
        ("disk", FileType::BlockDevice, makedev(179, 2)),
        ("fifo", FileType::Fifo, 0),
    ] {
        let path = traps.join(what);
        rustix::fs::mknodat(CWD, &path, kind, Mode::from_raw_mode(0o640), device)?;
        std::os::unix::fs::chown(&path, Some(0), Some(6))?;
    }
    rustix::fs::setxattr(traps.join("null"), "trusted.device", b"a device's", XattrFlags::empty())?;
    Ok(())
}

fn sparse(root: &Path) -> Result<()> {
    let file = File::create(root.join(SPARSE))?;
    file.set_len(1 << 30)?;
    for (offset, text) in [(0, "begin"), (300_000_001, "somewhere"), ((1 << 30) - (1 << 20), "near the end")] {
        file.write_all_at(text.as_bytes(), offset)?;
    }
    File::create(root.join("usr/traps/only-a-hole"))?.set_len(50 << 20)?;
    Ok(())
}

/// Must be last: adding an entry to a folder changes the folder's time.
fn times(traps: &Path) -> Result<()> {
    for (what, seconds, nanoseconds) in [
        ("before-1970", -300_000_000, 250_000_000),
        ("dangling", -1, 999_999_999),
        ("folder", 0, 0),
        ("fifo", 12, 34),
        ("several-names", 4_102_444_800, 1),
        ("sticky", 1_000_000_000, 123_456_789),
    ] {
        let path = traps.join(what);
        if what == "before-1970" {
            fs::write(&path, "the moon is near")?;
        }
        let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}
