//! Tests on a plain file and, if the kernel allows it, on a loop device: real tables, real file systems, real mounts.
//! FAT is made there but not mounted, since some kernels that run these tests lack it.

#![expect(clippy::disallowed_methods, reason = "losetup ends at once")]

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::erasure::{Begun, Erasure};
use super::plan::{FAT, LINUX, Part, Plan, SECTOR, is_resident};
use super::{Access, Disk, Stretch, SystemError, file_system, kept, mount, unmount};
use crate::settings::Settings;
use crate::system::Erase;

const MIB: u64 = 1 << 20;

/// A sparse file of this size.
pub(in crate::system) fn image(dir: &TempDir, size: u64) -> PathBuf {
    let path = dir.path().join("card.img");
    fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn settings() -> Settings {
    toml::from_str("boot.size = \"64MiB\"").unwrap()
}

/// A loop device of an image; gone when dropped.
pub(in crate::system) struct Loop(pub(in crate::system) Disk);

impl Loop {
    /// `None`: the test may not use loop devices.
    pub(in crate::system) fn new(image: &Path) -> Option<Self> {
        let output = Command::new("/sbin/losetup").args(["-fP", "--show"]).arg(image).output().ok()?;
        if !output.status.success() {
            writeln!(std::io::stderr(), "not tried on a loop device: {}", String::from_utf8_lossy(&output.stderr))
                .unwrap();
            return None;
        }
        let device = String::from_utf8(output.stdout).unwrap().trim().into();
        Some(Self(Disk { device }))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        for number in 1..=4 {
            if let Ok(device) = self.0.open(true) {
                let _ = marco_syscalls::delete_partition(&device, number);
            }
        }
        let _ = Command::new("/sbin/losetup").arg("-d").arg(&self.0.device).status();
    }
}

/// A mount point. Unmounted when dropped, so that a failed test leaves nothing mounted.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &Path, at: PathBuf, access: Access) -> Self {
        mount(device, &at, access).unwrap();
        Self(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A test may have unmounted it already.
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_blank_file_gets_the_four_partitions_and_keeps_them() {
    let dir = TempDir::new().unwrap();
    let disk = Disk { device: image(&dir, 1024 * MIB) };
    assert_eq!(disk.parts().unwrap(), []);
    assert!(disk.partition_resident(&settings()).unwrap());
    let parts = disk.parts().unwrap();
    assert!(is_resident(&parts), "{parts:?}");
    let name = disk.partuuid(2).unwrap();
    // A changed `install.toml` must not divide a card again that holds a system.
    assert!(!disk.partition_resident(&Settings::default()).unwrap(), "kept, whatever the sizes are now");
    assert_eq!((disk.parts().unwrap(), disk.partuuid(2).unwrap()), (parts, name.clone()));
    assert!(name.starts_with("PARTUUID=") && name.ends_with("-02") && name.len() == 20, "{name}");
}

#[test]
fn a_recovery_partition_stays_as_it_is_byte_for_byte() {
    let dir = TempDir::new().unwrap();
    let disk = Disk { device: image(&dir, 1024 * MIB) };
    let blank = disk.partition_resident(&settings()).unwrap();
    assert!(blank);
    // Only the first of the four, with data in it, and behind it the remains of an old file system.
    let mut file = fs::OpenOptions::new().read(true).write(true).open(&disk.device).unwrap();
    let mut table = mbrman::MBR::read_from(&mut file, 512).unwrap();
    let signature = table.header.disk_signature;
    for number in 2..=4 {
        table[number] = mbrman::MBRPartitionEntry::empty();
    }
    table.write_into(&mut file).unwrap();
    file.seek(SeekFrom::Start(4 * MIB)).unwrap();
    file.write_all(b"recovery").unwrap();
    file.seek(SeekFrom::Start(260 * MIB)).unwrap();
    file.write_all(b"old file system").unwrap();
    assert!(disk.partition_resident(&settings()).unwrap());
    let parts = disk.parts().unwrap();
    assert_eq!(parts[0], Part { number: 1, kind: FAT, start: 8192, sectors: 256 * 2048 });
    let bytes = fs::read(&disk.device).unwrap();
    let at = |mib: usize| &bytes[mib << 20..][..16];
    // The remains must be gone: they would be taken for a file system of the new partition.
    assert_eq!((&at(4)[..8], at(260)), (b"recovery".as_slice(), [0; 16].as_slice()));
    assert_eq!(disk.table().unwrap().unwrap().header.disk_signature, signature);
}

#[test]
fn a_file_that_is_too_small_is_refused_and_not_touched() {
    let dir = TempDir::new().unwrap();
    let disk = Disk { device: image(&dir, 300 * MIB) };
    let error = disk.partition_resident(&settings()).unwrap_err();
    assert!(error.to_string().contains("too small"), "{error}");
    // Not even a table: the card may hold data of its owner.
    assert!(fs::read(&disk.device).unwrap().iter().all(|byte| *byte == 0));
}

/// A card in a file whose MBR says: p1 FAT, p2 of this type. In an extended p2 is one logical partition, p5.
fn card_with_p2(dir: &TempDir, kind: u8) -> Disk {
    let entry = |kind: u8, start: u32, sectors: u32| {
        let mut bytes = vec![0, 0, 0, 0, kind, 0, 0, 0];
        bytes.extend(start.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes
    };
    let table = |entries: &[Vec<u8>]| {
        let mut sector = vec![0; 446];
        entries.iter().for_each(|entry| sector.extend(entry));
        sector.resize(510, 0);
        sector.extend(super::BOOT_SIGNATURE);
        sector
    };
    let (start, sectors) = (264 << 11, 512 << 11);
    let disk = Disk { device: image(dir, 1024 * MIB) };
    let file = disk.open(true).unwrap();
    file.write_all_at(&table(&[entry(FAT, 8192, 256 << 11), entry(kind, start, sectors)]), 0).unwrap();
    file.write_all_at(&table(&[entry(LINUX, 2048, sectors - 2048)]), u64::from(start) * SECTOR).unwrap();
    disk
}

#[tokio::test]
async fn card_with_logical_partitions_is_not_laid_out() {
    let image = Erase { root: true, home: false };
    for (kind, reason) in [(LINUX, None), (0x05, Some("its extended partition 2")), (0x8e, Some("(type 0x8e)"))] {
        let dir = TempDir::new().unwrap();
        let disk = card_with_p2(&dir, kind);
        let numbers: Vec<u32> = disk.parts().unwrap().iter().map(|part| part.number).collect();
        assert_eq!(numbers, [1, 2]);
        let decided = kept::decide(&disk, &settings(), image, Begun::default()).await;
        match (decided, reason) {
            (Ok(_), None) => {}
            (Err(SystemError::Refused(refusal)), Some(part)) => {
                assert_eq!(refusal.reason, "LAYOUT_NOT_UNDERSTOOD");
                assert!(refusal.message.contains(part), "{}", refusal.message);
            }
            (decided, _) => panic!("{kind:#x}: {decided:?}"),
        }
        // The operator gave everything up.
        let all = Erase { root: true, home: true };
        assert!(kept::decide(&disk, &settings(), all, Begun::default()).await.is_ok(), "{kind:#x}");
    }
}

#[tokio::test]
async fn on_a_loop_device_partitions_appear_while_another_one_is_mounted() {
    let dir = TempDir::new().unwrap();
    let Some(card) = Loop::new(&image(&dir, 1024 * MIB)) else { return };
    let disk = &card.0;
    assert!(disk.partition_resident(&settings()).unwrap());
    disk.make(Erasure::in_test(1), "ext4", "RECOVERY", &[]).await.unwrap();
    let mounted = Mounted::new(&disk.partition(1), dir.path().join("p1"), Access::ReadWrite);
    let at = &mounted.0;
    fs::write(at.join("keep"), "this").unwrap();
    // A card that has only its recovery partition.
    let mut device = disk.open(true).unwrap();
    let mut table = disk.table().unwrap().unwrap();
    for number in 2..=4 {
        table[number] = mbrman::MBRPartitionEntry::empty();
    }
    table.write_into(&mut device).unwrap();
    disk.tell_kernel(&disk.parts().unwrap()).unwrap();
    assert!(disk.partition(1).exists() && !disk.partition(2).exists());

    assert!(disk.partition_resident(&settings()).unwrap());
    for (number, kind) in [(2, "ext4"), (3, "ext4")] {
        assert_eq!(file_system(&disk.partition(number)).unwrap(), None);
        let erasure = Erasure::in_test(number);
        disk.make(erasure, kind, "LABEL", &["-m".into(), "1".into()]).await.unwrap();
        assert_eq!(file_system(&disk.partition(number)).unwrap(), Some(kind));
    }
    if Path::new("/sbin/mkfs.vfat").exists() {
        disk.make_fat(Erasure::of_boot(), "BOOT", &[]).await.unwrap();
        assert_eq!(file_system(&disk.partition(4)).unwrap(), Some("vfat"));
        assert_eq!(super::find::label(&disk.partition(4)).as_deref(), Some("BOOT"));
    }
    let also_mounted = Mounted::new(&disk.partition(2), dir.path().join("p2"), Access::ReadOnly);
    let root = &also_mounted.0;
    assert!(root.join("lost+found").exists() && fs::write(root.join("x"), "").is_err());
    assert_eq!(super::find::mounted_at(&disk.partition(2)), Some(root.clone()));
    unmount(root).unwrap();
    // Twice: unmounting an unmounted folder is no error.
    unmount(root).unwrap();
    assert_eq!(fs::read_to_string(at.join("keep")).unwrap(), "this");
    unmount(at).unwrap();
}

#[tokio::test]
async fn the_door_of_a_partition_that_is_mounted_for_reading_opens_for_a_write_only() {
    let dir = TempDir::new().unwrap();
    let Some(card) = Loop::new(&image(&dir, 1024 * MIB)) else { return };
    let disk = &card.0;
    assert!(disk.partition_resident(&settings()).unwrap());
    disk.make(Erasure::in_test(1), "ext4", "RECOVERY", &[]).await.unwrap();
    let mounted = Mounted::new(&disk.partition(1), dir.path().join("p1"), Access::ReadOnly);
    let at = &mounted.0;
    let part = crate::bootpart::BootPart::new(at, &crate::system::Board::default());
    assert!(fs::write(at.join("x"), "").is_err());
    part.set_boot_partition(crate::bootpart::DefaultBoot::Installer).unwrap();
    assert!(fs::read_to_string(at.join("autoboot.txt")).unwrap().contains("boot_partition=1"));
    assert!(fs::write(at.join("x"), "").is_err(), "closed again");
    {
        let _open = part.open_for_writing().unwrap();
        fs::write(at.join("x"), "").unwrap();
    }
    assert!(fs::write(at.join("y"), "").is_err());

    // A program that is being started holds the agent's open files until its `exec`.
    let open = part.open_for_writing().unwrap();
    let child = fs::File::create(at.join("z")).unwrap();
    let (closing, closed) = std::sync::mpsc::channel();
    let closes = std::thread::spawn(move || {
        drop(open);
        closing.send(()).unwrap();
    });
    assert!(closed.recv_timeout(Duration::from_millis(200)).is_err(), "it was closed, or given up");
    drop(child);
    closes.join().unwrap();
    assert!(fs::write(at.join("y"), "").is_err(), "it stays open");
    unmount(at).unwrap();
}

#[tokio::test]
async fn a_recovery_partition_goes_behind_an_image_and_comes_back() {
    let dir = TempDir::new().unwrap();
    let Some(card) = Loop::new(&image(&dir, 1024 * MIB)) else { return };
    let disk = &card.0;
    assert!(disk.partition_resident(&settings()).unwrap());
    // Noise, so that a block copied to a wrong place shows.
    let noise: Vec<u8> =
        (0..64 * MIB).flat_map(|at| u32::try_from(at % 65521 * 65537).unwrap().to_le_bytes()).collect();
    fs::OpenOptions::new().write(true).open(disk.partition(1)).unwrap().write_all(&noise).unwrap();
    let front = disk.parts().unwrap()[0];

    let end = disk.behind(500 * MIB).unwrap().unwrap();
    disk.move_recovery(end).unwrap();
    assert_eq!(disk.parts().unwrap(), [end], "nothing else is in the table");
    // The kernel's view after a restart.
    disk.tell_kernel(&disk.parts().unwrap()).unwrap();
    assert!(fs::read(disk.partition(1)).unwrap() == noise && !disk.partition(2).exists());
    assert_eq!(disk.behind(500 * MIB).unwrap(), None);

    // The image's partitions are shown at their places, and are not in the table.
    let (boot, root) = (Stretch { start: MIB, length: 8 * MIB }, Stretch { start: 9 * MIB, length: 32 * MIB });
    disk.show(boot, root).unwrap();
    let size = |number| fs::File::open(disk.partition(number)).unwrap().seek(SeekFrom::End(0)).unwrap();
    assert_eq!((size(4), size(2)), (boot.length, root.length));
    assert_eq!(disk.keep_recovery().unwrap(), end);
    assert!(!disk.partition(4).exists() && !disk.partition(2).exists());

    let Plan::Move(to) = disk.plan(&settings()).unwrap() else { panic!("it fits behind the end") };
    assert_eq!(to, front);
    // The recovery partition must be moved first: nothing fits behind it.
    assert!(disk.partition_resident(&settings()).is_err());
    disk.move_recovery(to).unwrap();
    disk.tell_kernel(&disk.parts().unwrap()).unwrap();
    assert!(disk.partition_resident(&settings()).unwrap());
    assert!(fs::read(disk.partition(1)).unwrap() == noise);
    assert!(is_resident(&disk.parts().unwrap()));
}

#[test]
fn the_first_sector_of_an_image_is_its_table() {
    let dir = TempDir::new().unwrap();
    let disk = Disk { device: image(&dir, 1024 * MIB) };
    assert!(disk.partition_resident(&settings()).unwrap());
    let other = Disk { device: dir.path().join("other") };
    fs::File::create(&other.device).unwrap().set_len(2048 * MIB).unwrap();
    assert!(other.partition_resident(&settings()).unwrap());
    let first = fs::read(&other.device).unwrap()[..512].try_into().unwrap();
    disk.write_first(&first).unwrap();
    assert_eq!(
        (disk.parts().unwrap(), disk.partuuid(2).unwrap()),
        (other.parts().unwrap(), other.partuuid(2).unwrap())
    );
}

#[test]
fn a_table_that_cannot_be_read_is_not_a_card_without_one() {
    let dir = TempDir::new().unwrap();
    let disk = Disk { device: image(&dir, 1024 * MIB) };
    assert!(disk.table().unwrap().is_none(), "it can be read, and is blank");
    // A chain of logical partitions that leads nowhere.
    let mut file = fs::OpenOptions::new().write(true).open(&disk.device).unwrap();
    let mut sector = [0; 512];
    sector[446 + 4] = 0x05;
    sector[446 + 8..446 + 16].copy_from_slice(&[0, 8, 0, 0, 0, 0, 16, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    file.write_all(&sector).unwrap();
    let mut first = [0; 512];
    first[446 + 4] = 0x83;
    first[446 + 8..446 + 16].copy_from_slice(&[1, 0, 0, 0, 8, 0, 0, 0]);
    first[446 + 16 + 4] = 0x05;
    first[446 + 16 + 8..446 + 32].copy_from_slice(&[0, 4, 0, 0, 8, 0, 0, 0]);
    first[510..].copy_from_slice(&[0x55, 0xaa]);
    file.seek(SeekFrom::Start(0x800 * 512)).unwrap();
    file.write_all(&first).unwrap();
    assert!(disk.parts().is_err() && disk.partition_resident(&settings()).is_err());
    assert_eq!(fs::read(&disk.device).unwrap()[..512], sector, "it was written to");
    // A disk that is too short for one sector.
    fs::write(dir.path().join("short"), "x").unwrap();
    assert!(Disk { device: dir.path().join("short") }.parts().is_err());
}

#[test]
fn room_is_that_of_the_partitions_that_are_there_or_will_be() {
    let dir = TempDir::new().unwrap();
    let disk = Disk { device: image(&dir, 1024 * MIB) };
    let root = |mib: u64| marco_archive::disk::Needs { root: mib << 20, boot: 0 };
    let planned: Settings = toml::from_str("boot.size = \"64MiB\"\nroot.size = \"256MiB\"").unwrap();
    for _ in 0..2 {
        disk.fits(&planned, root(256)).unwrap();
        assert!(disk.fits(&planned, root(257)).is_err());
        // In the second round the partitions exist, and the settings' sizes do not count.
        disk.partition_resident(&planned).unwrap();
    }
    assert!(disk.fits(&settings(), root(257)).is_err());
}
