//! Superblocks that real programs wrote (`superblocks/README`), in files and, if the kernel allows it, in partitions of
//! a loop device.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::{Answer, Contents, Seen, answer, ask, conclude, heard, look, probe};
use crate::settings::Settings;
use crate::system::disk::erasure::Begun;
use crate::system::disk::kept;
use crate::system::disk::tests::{Loop, image};
use crate::system::{Erase, SystemError};

const MIB: u64 = 1 << 20;
const IMAGE: Erase = Erase { root: true, home: false };
const BOOT_ONLY: Erase = Erase { root: false, home: false };

macro_rules! superblocks {
    ($($name:literal),*) => { [$(($name, include_bytes!(concat!("superblocks/", $name, ".zst")).as_slice())),*] };
}

/// The beginning of a partition of this format.
fn superblock(name: &str) -> Vec<u8> {
    let all = superblocks!["btrfs", "exfat", "ext4", "f2fs", "luks1", "luks2", "lvm", "ntfs", "swap", "vfat", "xfs"];
    let (_, packed) = all.into_iter().find(|(known, _)| *known == name).unwrap();
    zstd::decode_all(packed).unwrap()
}

/// Each superblock, its name in libblkid, and true if the installer can mount it.
const KINDS: [(&str, &str, bool); 11] = [
    ("btrfs", "btrfs", true),
    ("exfat", "exfat", false),
    ("ext4", "ext4", true),
    ("f2fs", "f2fs", true),
    ("luks1", "crypto_LUKS", false),
    ("luks2", "crypto_LUKS", false),
    ("lvm", "LVM2_member", false),
    ("ntfs", "ntfs", false),
    ("swap", "swap", false),
    ("vfat", "vfat", true),
    ("xfs", "xfs", true),
];

/// A sparse file with this beginning.
fn partition(dir: &TempDir, name: &str, first: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    let file = File::create(&path).unwrap();
    file.write_all_at(first, 0).unwrap();
    file.set_len(320 * MIB).unwrap();
    path
}

fn has_blkid() -> bool {
    super::BLKID.iter().any(|program| Path::new(program).exists())
}

#[tokio::test]
async fn each_kind_is_known_or_called_by_its_name() {
    let dir = TempDir::new().unwrap();
    for (name, blkid, mountable) in KINDS {
        let found = probe(&partition(&dir, name, &superblock(name))).await;
        match (mountable, has_blkid()) {
            (true, _) => assert_eq!(found, Contents::FileSystem(blkid), "{name}"),
            (false, true) => assert_eq!(found, Contents::Unknown(blkid.to_owned()), "{name}"),
            (false, false) => assert!(matches!(found, Contents::Unknown(_)), "{name}: {found:?}"),
        }
    }
    assert_eq!(probe(&partition(&dir, "blank", &[])).await, Contents::Nothing);
    // Erased flash reads as ones on some cards.
    assert_eq!(probe(&partition(&dir, "erased", &[0xff; 1 << 20])).await, Contents::Nothing);
}

#[tokio::test]
async fn data_without_a_superblock_is_not_nothing() {
    let dir = TempDir::new().unwrap();
    // Like a volume of plain dm-crypt or VeraCrypt, which has no header at all.
    let noise: Vec<u8> = (0..1 << 20_u32).map(|at| u8::try_from(at * 37 % 251).unwrap()).collect();
    // The second one has a single byte of data behind zeros. That is not blank.
    for first in [&noise[..], &[&[0; 900_000][..], b"x"].concat()] {
        let found = probe(&partition(&dir, "data", first)).await;
        assert!(matches!(found, Contents::Unknown(_)), "{found:?}");
    }
    let mut ext4 = superblock("ext4");
    // Two formats at once: mkfs would erase both without telling.
    let btrfs = superblock("btrfs");
    ext4[65536..131_072].copy_from_slice(&btrfs[65536..131_072]);
    let both = probe(&partition(&dir, "both", &ext4)).await;
    if has_blkid() {
        assert!(matches!(&both, Contents::Unknown(what) if what.contains("more than one")), "{both:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_read_is_not_nothing() {
    let dir = TempDir::new().unwrap();
    let empty = dir.path().join("empty");
    File::create(&empty).unwrap();
    for path in [dir.path().join("gone"), empty] {
        let found = probe(&path).await;
        assert!(matches!(found, Contents::Unreadable(_)), "{found:?}");
    }
}

#[test]
fn without_blkid_only_what_is_blank_or_ours_is_told() {
    let dir = TempDir::new().unwrap();
    let found = |name, first: &[u8], last: &[u8]| {
        let path = partition(&dir, name, first);
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(last, 320 * MIB - u64::try_from(last.len()).unwrap()).unwrap();
        conclude(look(&path).unwrap(), &Answer::Absent)
    };
    assert_eq!(found("ext4", &superblock("ext4"), &[]), Contents::FileSystem("ext4"));
    assert_eq!(found("blank", &[], &[]), Contents::Nothing);
    assert_eq!(found("erased", &[0xff; 1 << 20], &[0xff; 256 << 10]), Contents::Nothing);
    // A member of a RAID has its superblock at the end.
    for (first, last) in [(&[0; 8][..], &[7; 4096][..]), (&[7; 8], &[0; 8])] {
        let unknown = found("data", first, last);
        assert!(matches!(&unknown, Contents::Unknown(what) if what.contains("no blkid")), "{unknown:?}");
    }
}

#[tokio::test]
async fn blkid_that_fails_is_no_answer() {
    let path = partition(&TempDir::new().unwrap(), "blank", &[]);
    assert_eq!(ask(&[], &path).await, Answer::Absent);
    let timeout = SystemError::Command { program: "blkid".into(), message: "no end within 30 s".into() };
    for (answer, why) in [
        (ask(&["/bin/false"], &path).await, "ended with status 1"),
        (heard("/sbin/blkid", Ok((None, String::new()))), "was killed"),
        (heard("/sbin/blkid", Err(timeout)), "no end within"),
    ] {
        for (blank, kind) in [(true, None), (false, None), (false, Some("ext4"))] {
            let found = conclude(Seen { blank, blank_end: blank, kind }, &answer);
            assert!(matches!(&found, Contents::Unreadable(what) if what.contains(why)), "{found:?}");
        }
    }
}

#[test]
fn lines_about_the_place_in_the_table_are_no_contents() {
    assert_eq!(answer("DEVNAME=/dev/x\nPART_ENTRY_TYPE=0x83\n"), Answer::Nothing);
    assert_eq!(answer("TYPE=exfat\nPTTYPE=dos\n"), Answer::Type("exfat".into()));
    assert_eq!(answer("PTTYPE=dos\nPART_ENTRY_TYPE=0x83\n"), Answer::Table("dos".into()));
}

/// The first mebibyte of a partition.
fn first(device: &Path) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    File::open(device).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn reason(decided: Result<super::super::erasure::Decided, SystemError>) -> Option<&'static str> {
    match decided {
        Ok(_) => None,
        Err(SystemError::Refused(refusal)) => Some(refusal.reason),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn on_a_loop_device_nothing_that_is_kept_and_not_understood_is_erased() {
    let dir = TempDir::new().unwrap();
    let Some(card) = Loop::new(&image(&dir, 1400 * MIB)) else { return };
    let (disk, settings) = (&card.0, Settings::default());
    assert!(disk.partition_resident(&settings).unwrap());
    for (name, _, mountable) in KINDS {
        let mut bytes = superblock(name);
        bytes.resize(1 << 20, 0);
        for number in [2, 3] {
            let device = File::options().write(true).open(disk.partition(number)).unwrap();
            device.write_all_at(&bytes, 0).unwrap();
            device.sync_all().unwrap();
        }
        let expected = (!mountable).then_some("PARTITION_NOT_UNDERSTOOD");
        for erase in [IMAGE, BOOT_ONLY] {
            assert_eq!(reason(kept::decide(disk, &settings, erase, Begun::default()).await), expected, "{name}");
        }
        if mountable {
            let decided = kept::decide(disk, &settings, BOOT_ONLY, Begun::default()).await.unwrap();
            assert_eq!((decided.root, decided.home), (None, None), "{name}");
        }
        // A refusal must not have changed a byte.
        assert!(first(&disk.partition(3)) == bytes, "{name} was written to");
    }
}

/// A loop device over a file that was cut: the sectors behind its end cannot be read.
#[tokio::test]
async fn on_a_loop_device_sectors_that_cannot_be_read_are_a_refusal() {
    let dir = TempDir::new().unwrap();
    let file = image(&dir, 1400 * MIB);
    let Some(card) = Loop::new(&file) else { return };
    let (disk, settings) = (&card.0, Settings::default());
    assert!(disk.partition_resident(&settings).unwrap());
    let home = disk.parts().unwrap().into_iter().find(|part| part.number == 3).unwrap();
    let root = disk.parts().unwrap().into_iter().find(|part| part.number == 2).unwrap();
    File::options().write(true).open(&file).unwrap().set_len(home.start * 512).unwrap();
    let found = probe(&disk.partition(3)).await;
    assert!(matches!(&found, Contents::Unreadable(why) if why.contains("os error 5")), "{found:?}");
    assert_eq!(reason(kept::decide(disk, &settings, IMAGE, Begun::default()).await), Some("PARTITION_UNREADABLE"));
    // An unreadable end alone is enough: a RAID member has its superblock there.
    File::options().write(true).open(&file).unwrap().set_len((root.start + root.sectors) * 512 - 8192).unwrap();
    let found = probe(&disk.partition(2)).await;
    assert!(matches!(found, Contents::Unreadable(_)), "{found:?}");
}
