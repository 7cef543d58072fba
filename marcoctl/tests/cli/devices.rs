//! Packs systems from image files and devices. The disks are made by other projects' tools. Mounting needs root.

use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use tokio::process::Command;

use crate::made::write;
use crate::running::{Run, alone};

const MIB: u64 = 1 << 20;

/// Returns false, with a visible note, if this process may not mount.
pub(crate) fn may_mount(test: &str) -> bool {
    let may = rustix::process::geteuid().is_root();
    if !may {
        // Not by `eprintln!`: the test harness captures it and shows it for failed tests only.
        let _ = writeln!(std::io::stderr(), "NOT RUN: {test} mounts file systems, which needs root");
    }
    may
}

/// Runs a program, which must succeed, and returns its output.
async fn tool(program: &str, arguments: &[impl AsRef<OsStr> + std::fmt::Debug]) -> String {
    let output = Command::new(program).args(arguments).output().await.unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A disk image with partitions and file systems.
struct Disk {
    folder: TempDir,
}

impl Disk {
    /// Creates the disk. `table`: input for sfdisk(8), sizes in MiB.
    async fn new(table: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let disk = Self { folder };
        std::fs::File::create(disk.path()).unwrap().set_len(100 * MIB).unwrap();
        let script = disk.folder.path().join("table");
        std::fs::write(&script, format!("label: dos\nlabel-id: 0x0a1b2c3d\n{table}")).unwrap();
        // sfdisk reads its script from stdin only, hence the shell.
        let sfdisk = format!("/usr/sbin/sfdisk --quiet {} < {}", disk.path().display(), script.display());
        tool("sh", &["-c", &sfdisk]).await;
        disk
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("disk.img")
    }

    /// Adds a FAT with these files.
    async fn fat(&self, start: u64, size: u64, label: &str, files: &[(&str, &str)]) {
        let image = format!("{}@@{start}M", self.path().display());
        let sectors = (size * MIB / 512).to_string();
        tool("mformat", &["-i", &image, "-v", label, "-N", "abcd0102", "-T", &sectors, "::"]).await;
        for (name, text) in files {
            let file = self.folder.path().join("file");
            std::fs::write(&file, text).unwrap();
            if let Some((folder, _)) = name.rsplit_once('/') {
                tool("mmd", &["-D", "s", "-i", &image, &format!("::{folder}")]).await;
            }
            tool("mcopy", &["-i", &image, file.to_str().unwrap(), &format!("::{name}")]).await;
        }
    }

    /// Adds an ext4 with the contents of a folder.
    async fn ext4(&self, start: u64, size: u64, from: &Path) {
        let offset = format!("offset={}", start * MIB);
        let (from, disk, size) = (from.to_str().unwrap(), self.path(), format!("{size}M"));
        let arguments = ["-q", "-F", "-t", "ext4", "-d", from, "-E", &offset, disk.to_str().unwrap(), &size];
        tool("/usr/sbin/mke2fs", &arguments).await;
    }

    /// Packs the disk, or the given source.
    async fn pack(&self, source: &str) -> Run {
        alone(&["image", "pack", source, "-o", self.tarball().to_str().unwrap(), "--output", "json"]).await
    }

    fn tarball(&self) -> PathBuf {
        self.folder.path().join("system.tar")
    }

    /// Returns tar(1)'s listing, without the slashes after folders.
    async fn list(&self) -> Vec<String> {
        let listing = tool("tar", &["-tf".as_ref(), self.tarball().as_os_str()]).await;
        listing.lines().map(|line| line.trim_end_matches('/').to_owned()).collect()
    }

    async fn read(&self, name: &str) -> String {
        tool("tar", &["-xOf".as_ref(), self.tarball().as_os_str(), name.as_ref()]).await
    }

    /// Asserts that nothing of the disk is mounted, and that its loop devices disappear soon. Other programs, such as
    /// udev, may keep a new device open for a moment.
    async fn is_let_go(&self) {
        let path = self.path();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(path.to_str().unwrap()), "{mounts}");
        let free = async {
            loop {
                let devices = tool("/usr/sbin/losetup", &["--list", "--noheadings", "--output", "BACK-FILE"]).await;
                if !devices.contains(path.to_str().unwrap()) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), free).await.expect("a device of it stays");
    }
}

/// A part of a disk mounted for writing. Dropping it unmounts.
struct Mounted {
    folder: TempDir,
}

impl Mounted {
    async fn new(disk: &Disk, start: u64, size: u64) -> Self {
        let options = format!("loop,offset={},sizelimit={}", start * MIB, size * MIB);
        Self::at(disk.path().to_str().unwrap(), &options).await
    }

    async fn at(device: &str, options: &str) -> Self {
        let folder = TempDir::new().unwrap();
        tool("mount", &["-o", options, device, folder.path().to_str().unwrap()]).await;
        Self { folder }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = rustix::mount::unmount(self.folder.path(), rustix::mount::UnmountFlags::DETACH);
        assert!(unmounted.is_ok() || std::thread::panicking(), "{} stays mounted", self.folder.path().display());
    }
}

/// A loop device of a file, with devices for its partitions. Dropping it detaches both.
struct Loop(String);

impl Loop {
    async fn new(file: &str) -> Self {
        let device = Self(tool("/usr/sbin/losetup", &["--find", "--show", file]).await.trim().to_owned());
        tool("partx", &["--update", &device.0]).await;
        device
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // The partitions must go first: the kernel keeps them when the device is detached.
        for (program, what) in [("partx", "--delete"), ("/usr/sbin/losetup", "--detach")] {
            #[expect(clippy::disallowed_methods, reason = "what is dropped cannot wait for a runtime")]
            let done = std::process::Command::new(program).args([what, &self.0]).status();
            assert!(done.is_ok_and(|done| done.success()) || std::thread::panicking(), "{} stays", self.0);
        }
    }
}

/// Creates a system's root with this fstab.
fn system(folder: &Path, fstab: &str) -> PathBuf {
    let root = folder.join("root");
    write(&root, "etc/fstab", fstab.as_bytes());
    write(&root, "etc/machine-id", b"0123\n");
    write(&root, "etc/hostname", b"kiosk\n");
    write(&root, "usr/bin/tool", b"\x7fELF");
    // On the real system the mounted boot partition hides this file.
    write(&root, "boot/firmware/hidden-below-the-mount", b"no\n");
    write(&root, "home/pi/note", b"hello\n");
    std::fs::set_permissions(root.join("usr/bin/tool"), std::fs::Permissions::from_mode(0o4755)).unwrap();
    std::os::unix::fs::chown(root.join("home/pi"), Some(1000), Some(1000)).unwrap();
    root
}

#[tokio::test]
async fn an_image_file_of_a_stock_card_is_packed_with_its_boot_partition() {
    if !may_mount("an_image_file_of_a_stock_card_is_packed_with_its_boot_partition") {
        return;
    }
    let disk = Disk::new("start=1MiB, size=16MiB, type=c\nstart=20MiB, size=40MiB, type=83\n").await;
    let boot = [("config.txt", "arm_64bit=1\n"), ("overlays/README", "r\n"), ("marco/join.toml", "secret\n")];
    disk.fat(1, 16, "bootfs", &boot).await;
    let root = system(disk.folder.path(), "PARTUUID=0a1b2c3d-01 /boot/firmware vfat defaults 0 2\n");
    disk.ext4(20, 40, &root).await;
    // Compared at the end: packing must not change one byte of a card, not even the time of its last mount.
    let before = std::fs::read(disk.path()).unwrap();
    let run = disk.pack(disk.path().to_str().unwrap()).await;
    assert_eq!((run.code, run.json()["skipped"].clone()), (0, serde_json::json!([])), "{run:?}");
    let list = disk.list().await;
    for kept in
        ["./etc/hostname", "./boot/firmware/config.txt", "./boot/firmware/overlays/README", "./home/pi/note", "./usr"]
    {
        assert!(list.iter().any(|name| name == kept), "{kept} is missing: {list:#?}");
    }
    for left_out in ["hidden-below-the-mount", "join.toml", "machine-id", "lost+found"] {
        assert!(!list.iter().any(|name| name.contains(left_out)), "{left_out}: {list:#?}");
    }
    assert_eq!(disk.read("./boot/firmware/config.txt").await, "arm_64bit=1\n");
    let long = tool("tar", &["-tvf".as_ref(), disk.tarball().as_os_str(), "--numeric-owner".as_ref()]).await;
    // The setuid bit and the owner are lost easily.
    let of = |name: &str| long.lines().find(|line| line.ends_with(name)).unwrap().to_owned();
    assert!(of("./usr/bin/tool").starts_with("-rwsr-xr-x") && of("./home/pi/").contains("1000/1000"), "{long}");
    assert!(of("./boot/firmware/config.txt").starts_with("-rwxr-xr-x 0/0"), "{long}");
    assert!(before == std::fs::read(disk.path()).unwrap(), "the disk was written to");
    disk.is_let_go().await;
}

#[tokio::test]
async fn a_card_of_our_layout_gives_the_systems_boot_partition_and_not_the_installers() {
    if !may_mount("a_card_of_our_layout_gives_the_systems_boot_partition_and_not_the_installers") {
        return;
    }
    let table = "start=1MiB, size=10MiB, type=c\nstart=32MiB, size=20MiB, type=83\nstart=60MiB, size=20MiB, type=83\n\
                 start=12MiB, size=16MiB, type=c\n";
    let disk = Disk::new(table).await;
    disk.fat(1, 10, "RECOVERY", &[("autoboot.txt", "[all]\n"), ("marco/join.toml", "secret\n")]).await;
    disk.fat(12, 16, "bootfs", &[("config.txt", "kernel=kernel8.img\n")]).await;
    // No line mentions the boot partition, so the only FAT other than RECOVERY is taken.
    let root = system(disk.folder.path(), "PARTUUID=0a1b2c3d-02 / ext4 defaults 0 1\n");
    disk.ext4(32, 20, &root).await;
    let home = disk.folder.path().join("homes");
    write(&home, "pi/photo", b"mine\n");
    disk.ext4(60, 20, &home).await;

    let card = disk.path().display().to_string();
    let run = disk.pack(&card).await;
    let skipped =
        [format!("{card}:p1: another partition (FAT RECOVERY)"), format!("{card}:p3: another partition (ext4)")];
    assert_eq!((run.code, run.json()["skipped"].clone()), (0, serde_json::json!(skipped)), "{run:?}");
    assert_eq!(disk.read("./boot/firmware/config.txt").await, "kernel=kernel8.img\n");
    assert!(!disk.list().await.iter().any(|name| name.contains("photo") || name.contains("autoboot")));

    // The same on a device. It is refused while its system is mounted.
    let device = Loop::new(&card).await;
    assert!(Path::new(&format!("{}p4", device.0)).exists());
    let packed = disk.pack(&device.0).await;
    let mounted = Mounted::at(&format!("{}p2", device.0), "defaults").await;
    let refused = disk.pack(&device.0).await;
    drop(mounted);
    drop(device);
    assert_eq!(packed.code, 0, "{packed:?}");
    assert!(refused.code == 1 && refused.stderr.contains("p2 is mounted at"), "{refused:?}");
    assert_eq!(disk.read("./etc/hostname").await, "kiosk\n");
    assert_eq!(disk.read("./boot/firmware/config.txt").await, "kernel=kernel8.img\n");
    disk.is_let_go().await;
}

#[tokio::test]
async fn what_somebody_has_mounted_is_not_read_past_them() {
    if !may_mount("what_somebody_has_mounted_is_not_read_past_them") {
        return;
    }
    let disk = Disk::new("start=1MiB, size=16MiB, type=c\nstart=20MiB, size=40MiB, type=83\n").await;
    disk.fat(1, 16, "bootfs", &[("config.txt", "arm_64bit=1\n")]).await;
    let root = system(disk.folder.path(), "PARTUUID=0a1b2c3d-01 /boot/firmware vfat defaults 0 2\n");
    disk.ext4(20, 40, &root).await;
    // An ext4 in the unused end of the boot partition. This kernel may not support FAT, and any mount there must count.
    disk.ext4(13, 4, &root.join("home")).await;
    let card = disk.path().display().to_string();
    for (start, size, named) in [(20, 40, "p2"), (13, 4, "p1")] {
        let mounted = Mounted::new(&disk, start, size).await;
        let at = format!("is mounted at {}", mounted.folder.path().display());
        let run = disk.pack(&card).await;
        assert!(run.code == 1 && run.stderr.contains(&at) && run.stderr.contains(named), "{named}: {run:?}");
        assert!(!disk.tarball().exists(), "{named}");
        drop(mounted);
        disk.is_let_go().await;
    }
    assert_eq!(disk.pack(&card).await.code, 0);
    assert_eq!(disk.read("./boot/firmware/config.txt").await, "arm_64bit=1\n");
    disk.is_let_go().await;
}

#[tokio::test]
async fn what_holds_no_system_or_was_cut_off_is_refused_and_let_go() {
    if !may_mount("what_holds_no_system_or_was_cut_off_is_refused_and_let_go") {
        return;
    }
    let disk = Disk::new("start=1MiB, size=40MiB, type=83\n").await;
    let home = disk.folder.path().join("homes");
    write(&home, "pi/photo", b"mine\n");
    disk.ext4(1, 40, &home).await;
    let card = disk.path().display().to_string();
    let run = disk.pack(&card).await;
    assert!(run.code == 1 && run.stderr.contains(&format!("none is on {card}:p1")), "{run:?}");
    disk.is_let_go().await;

    // The flag in the superblock for a journal that must be replayed.
    let file = std::fs::OpenOptions::new().write(true).read(true).open(disk.path()).unwrap();
    let mut features = [0];
    file.read_exact_at(&mut features, MIB + 0x460).unwrap();
    file.write_all_at(&[features[0] | 4], MIB + 0x460).unwrap();
    let run = disk.pack(&card).await;
    assert!(run.code == 1 && run.stderr.contains("e2fsck -p"), "{run:?}");
    file.write_all_at(&[0; 512], 0).unwrap();
    let run = disk.pack(&card).await;
    assert!(run.code == 1 && run.stderr.contains("neither a file system nor a partition table"), "{run:?}");
    assert!(!disk.tarball().exists());
    disk.is_let_go().await;
}

#[tokio::test]
async fn who_may_not_mount_is_told_so() {
    if !may_mount("who_may_not_mount_is_told_so") {
        return;
    }
    let disk = Disk::new("start=1MiB, size=40MiB, type=83\n").await;
    let root = system(disk.folder.path(), "");
    disk.ext4(1, 40, &root).await;
    // The other user must reach the disk and write the tarball. Only the right to mount is missing.
    std::fs::set_permissions(disk.folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    std::fs::set_permissions(disk.path(), std::fs::Permissions::from_mode(0o644)).unwrap();
    let (card, tarball) = (disk.path().display().to_string(), disk.tarball().display().to_string());
    let arguments = ["image", "pack", &card, "-o", &tarball];
    let run = crate::running::as_nobody(disk.folder.path(), &arguments).await;
    assert!(run.code == 1 && run.stderr.contains("run this with sudo"), "{run:?}");
    disk.is_let_go().await;
}
