use super::{FileSystem, Needs, Partition, Partitions, check_image, examine_image, is_disk, length, needs, read_disk};
use crate::{Error, Facts, Reason};

const MIB: usize = 1 << 20;

/// Builds a disk of 8 MiB: a FAT of 2 MiB at 1 MiB, an ext4 of 4 MiB at 4 MiB. `change` modifies it.
fn disk(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut disk: Vec<u8> = (0..8 * MIB).map(|at| u8::try_from(at / 4096 % 251).unwrap()).collect();
    disk[..MIB].fill(0);
    for (number, kind, start, length) in [(0, 0x0c, MIB, 2 * MIB), (1, 0x83, 4 * MIB, 4 * MIB)] {
        let entry = &mut disk[446 + number * 16..][..16];
        entry[4] = kind;
        entry[8..12].copy_from_slice(&u32::try_from(start / 512).unwrap().to_le_bytes());
        entry[12..16].copy_from_slice(&u32::try_from(length / 512).unwrap().to_le_bytes());
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[MIB + 82..][..5].copy_from_slice(b"FAT32");
    disk[MIB + 510..][..2].copy_from_slice(&[0x55, 0xaa]);
    disk[4 * MIB + 1080..][..2].copy_from_slice(&[0x53, 0xef]);
    change(&mut disk);
    disk
}

/// Replaces the boot record by a GPT with the same partitions.
fn gpt(disk: &mut [u8]) {
    disk[446..510].fill(0);
    disk[446 + 4] = 0xee;
    disk[446 + 8] = 1;
    disk[446 + 12] = 0xff;
    disk[512..520].copy_from_slice(b"EFI PART");
    disk[512 + 72] = 2;
    disk[512 + 80] = 128;
    disk[512 + 84] = 128;
    for (number, start, length) in [(0, MIB, 2 * MIB), (1, 4 * MIB, 4 * MIB)] {
        let entry = &mut disk[1024 + number * 128..][..128];
        entry[..16].fill(7);
        entry[32..40].copy_from_slice(&u64::try_from(start / 512).unwrap().to_le_bytes());
        entry[40..48].copy_from_slice(&u64::try_from((start + length) / 512 - 1).unwrap().to_le_bytes());
    }
}

#[derive(Default)]
struct Kept(Vec<(Partition, FileSystem, Vec<u8>)>);

impl Partitions for Kept {
    fn begin(&mut self, partition: &Partition, file_system: FileSystem) -> Result<bool, Error> {
        self.0.push((*partition, file_system, Vec::new()));
        Ok(true)
    }

    fn take(&mut self, offset: u64, block: &[u8]) -> Result<(), Error> {
        let bytes = &mut self.0.last_mut().unwrap().2;
        assert_eq!(offset, u64::try_from(bytes.len()).unwrap());
        bytes.extend_from_slice(block);
        Ok(())
    }
}

#[test]
fn the_partitions_of_either_table_arrive_whole() {
    for disk in [disk(|_| ()), disk(gpt)] {
        assert!(is_disk(&disk[..512]));
        // Odd buffer sizes: partitions must arrive complete across buffer boundaries.
        for buffer in [512, 4096 + 7, MIB] {
            let mut kept = Kept::default();
            let reader = std::io::BufReader::with_capacity(buffer, &*disk);
            let summary = read_disk(reader, &mut kept, &mut |_| ()).unwrap();
            assert_eq!((summary.partitions, summary.bytes), (2, 8 << 20));
            let kinds: Vec<_> = kept.0.iter().map(|(partition, kind, _)| (partition.number, *kind)).collect();
            assert_eq!(kinds, [(1, FileSystem::Fat), (2, FileSystem::Ext)]);
            assert!(kept.0[0].2 == disk[MIB..3 * MIB] && kept.0[1].2 == disk[4 * MIB..]);
        }
    }
}

#[test]
fn a_table_that_makes_no_sense_is_refused() {
    let overlap = |disk: &mut [u8]| disk[446 + 16 + 8..][..4].copy_from_slice(&2050_u32.to_le_bytes());
    let over_the_table = |disk: &mut [u8]| disk[446 + 8..][..4].copy_from_slice(&1_u32.to_le_bytes());
    let no_gpt = |disk: &mut [u8]| {
        gpt(disk);
        disk[512] = b'e';
    };
    let backwards = |disk: &mut [u8]| {
        gpt(disk);
        disk[1024 + 40..][..8].fill(0);
    };
    for disk in [disk(overlap), disk(over_the_table), disk(no_gpt), disk(backwards)] {
        let error = check_image(&*disk, &mut |_| ()).unwrap_err();
        assert!(matches!(&error, Error::Refused(refused) if matches!(refused.reason, Reason::Damaged(_))), "{error}");
    }
}

#[test]
fn an_image_that_ends_early_is_refused_wherever_it_ends() {
    let disk = disk(|_| ());
    // Within the table, before, inside and between partitions.
    for length in [600, 20_000, MIB, MIB + 1000, 3 * MIB, 4 * MIB + 10, 8 * MIB - 1] {
        let error = check_image(&disk[..length], &mut |_| ()).unwrap_err();
        assert!(matches!(&error, Error::Refused(refused) if refused.reason == Reason::Truncated), "{length}: {error}");
    }
}

#[test]
fn a_tarball_is_no_disk_even_when_it_has_the_signature() {
    let mut header = tar::Header::new_gnu();
    header.set_path("boot").unwrap();
    header.set_size(0);
    header.set_entry_type(tar::EntryType::Directory);
    let bytes = header.as_mut_bytes();
    // Bytes 510 and 511 of a tar header are padding, so a tool may leave anything there.
    bytes[510..].copy_from_slice(&[0x55, 0xaa]);
    bytes[450] = 0x83;
    header.set_cksum();
    let whole = [&header.as_bytes()[..], &[0; 1024]].concat();
    assert!(!is_disk(&whole[..512]));
    assert_eq!(check_image(&*whole, &mut |_| ()).unwrap().entries, 1);
    let read = check_image(&*disk(|_| ()), &mut |_| ()).unwrap();
    assert_eq!((read.entries, read.unpacked_bytes, read.disk), (2, 8 << 20, true));
}

fn refusal(change: impl FnOnce(&mut [u8])) -> Option<String> {
    examine_image(&*disk(change), None, &mut |_| ()).unwrap().facts.refusal
}

/// Builds the same disk with a FAT that holds these files. A file in a folder creates the folder.
fn booting(files: &[(&str, &str)]) -> Vec<u8> {
    let mut disk = disk(|disk| disk[MIB..3 * MIB].fill(0));
    {
        let mut part = std::io::Cursor::new(&mut disk[MIB..3 * MIB]);
        fatfs::format_volume(&mut part, fatfs::FormatVolumeOptions::new()).unwrap();
        let fat = fatfs::FileSystem::new(part, fatfs::FsOptions::new()).unwrap();
        for (path, text) in files {
            if let Some((folder, _)) = path.rsplit_once('/') {
                fat.root_dir().create_dir(folder).unwrap();
            }
            std::io::Write::write_all(&mut fat.root_dir().create_file(path).unwrap(), text.as_bytes()).unwrap();
        }
    }
    disk
}

fn looked_into(disk: &[u8]) -> Facts {
    let scratch = tempfile::tempdir().unwrap();
    let facts = examine_image(disk, Some(scratch.path()), &mut |_| ()).unwrap().facts;
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
    facts
}

const WHOLE: [(&str, &str); 4] = [
    ("CONFIG.TXT", "[pi4]\nkernel=zImage\n"),
    ("cmdline.txt", "root=/dev/mmcblk0p2"),
    ("zImage", "a kernel"),
    ("bcm2711-rpi-4-b.dtb", "a tree"),
];

#[test]
fn a_boot_partition_is_judged_by_what_it_holds() {
    let facts = looked_into(&booting(&WHOLE));
    assert_eq!(facts.refusal, None);
    assert_eq!(facts.needs.boot, 2 << 20);
    facts.judge("pi4", Some("bcm2711-rpi-4-b.dtb")).unwrap();
    assert!(facts.judge("pi5", Some("bcm2712-rpi-5-b.dtb")).unwrap_err().contains("bcm2712-rpi-5-b.dtb"));
    for (missing, words) in [(0, "config.txt"), (1, "cmdline.txt"), (2, "kernel"), (3, "device tree")] {
        let rest: Vec<_> = WHOLE.iter().enumerate().filter(|(at, _)| *at != missing).map(|(_, file)| *file).collect();
        let refused = looked_into(&booting(&rest)).refusal.unwrap();
        assert!(refused.contains("in its boot partition") && refused.contains(words), "{refused}");
    }
    // The firmware ignores an empty file, and a folder of the same name.
    let mut empty = WHOLE;
    empty[2].1 = "";
    assert!(looked_into(&booting(&empty)).refusal.unwrap().contains("kernel"));
    empty[2] = ("zImage/readme", "text");
    assert!(looked_into(&booting(&empty)).refusal.unwrap().contains("kernel"));
}

#[test]
fn files_below_a_prefix_and_of_another_case_are_found() {
    let files = [("config.txt", "os_prefix=Current/\n"), ("current/cmdline.txt", "root=/dev/mmcblk0p2")];
    let refused = looked_into(&booting(&files)).refusal.unwrap();
    assert!(
        refused.contains("kernel") && refused.contains("device tree") && !refused.contains("cmdline.txt"),
        "{refused}"
    );
}

#[test]
fn a_boot_partition_that_cannot_be_read_is_refused() {
    let mut disk = booting(&WHOLE);
    let refused = looked_into(&self::disk(|_| ())).refusal.unwrap();
    assert!(refused.contains("a boot partition that can be read"), "{refused}");
    // A sector size of zero: the superblock is invalid.
    disk[MIB + 11..][..2].fill(0);
    assert!(looked_into(&disk).refusal.unwrap().contains("fsck.fat"));
}

#[test]
fn a_folder_that_leads_in_circles_ends() {
    let mut disk = booting(&[("loop/x", "x")]);
    let at = |offset: usize| MIB + offset;
    let word = |disk: &[u8], offset: usize| usize::from(u16::from_le_bytes([disk[at(offset)], disk[at(offset) + 1]]));
    let (cluster, reserved) = (usize::from(disk[at(13)]), word(&disk, 14));
    let (fats, root_entries, per_fat) = (usize::from(disk[at(16)]), word(&disk, 17), word(&disk, 22));
    let data = (reserved + fats * per_fat) * 512 + root_entries * 32;
    // The folder was created first, so it has cluster 2. Its entries are deleted, and its cluster chain leads to
    // itself.
    for entry in 0..cluster * 512 / 32 {
        disk[at(data) + entry * 32] = 0xe5;
    }
    assert_eq!(&disk[at(54)..][..5], b"FAT12");
    let entry = at(reserved * 512) + 3;
    disk[entry] = 0x02;
    disk[entry + 1] &= 0xf0;
    let refused = looked_into(&disk).refusal.unwrap();
    assert!(refused.contains("circles"), "{refused}");
}

#[test]
fn disk_without_boot_or_root_is_refused_with_all_it_lacks() {
    assert_eq!(refusal(|_| ()), None);
    let no_root = |disk: &mut [u8]| disk[4 * MIB + 1080] = 0;
    let no_boot = |disk: &mut [u8]| disk[MIB + 82] = 0;
    let refused = refusal(no_root).unwrap();
    assert!(refused.contains("ext4") && !refused.contains("FAT"), "{refused}");
    let refused = refusal(no_boot).unwrap();
    assert!(refused.contains("FAT") && !refused.contains("lacks an ext4"), "{refused}");
    let refused = refusal(|disk| {
        no_boot(disk);
        no_root(disk);
    })
    .unwrap();
    assert!(refused.contains("FAT partition") && refused.contains("ext4 partition"), "{refused}");
    let logical = refusal(|disk| {
        no_root(disk);
        disk[446 + 16 + 4] = 0x05;
    });
    assert!(logical.unwrap().contains("image pack"));
}

#[test]
fn what_is_neither_tarball_nor_disk_says_what_it_is() {
    let mut ext4 = vec![0; 2 * MIB];
    ext4[1080..1082].copy_from_slice(&[0x53, 0xef]);
    let seven = [b"7z\xbc\xaf\x27\x1c".as_slice(), &[7; 4000]].concat();
    for (bytes, words) in [(ext4, ["without a partition table", "image pack"]), (seven, ["7z", "unpack it first"])] {
        let refused = check_image(&*bytes, &mut |_| ()).unwrap_err().to_string();
        assert!(words.iter().all(|word| refused.contains(word)), "{refused}");
    }
}

#[test]
fn the_table_tells_how_much_room_an_image_needs() {
    let mib = |mib: u64| mib << 20;
    assert_eq!(needs(&disk(|_| ())).unwrap(), Needs { boot: mib(2), root: mib(4) });
    assert_eq!(length(&disk(|_| ())).unwrap(), mib(8));
    // Unknown types demand nothing. Only the contents tell what the partitions are.
    assert_eq!(needs(&disk(gpt)).unwrap(), Needs::default());
    let typed = disk(|disk| {
        gpt(disk);
        disk[1024..1040].copy_from_slice(&super::table::GUID_FATS[0]);
        disk[1152..1168].copy_from_slice(&super::table::GUID_LINUX[0]);
    });
    assert_eq!(needs(&typed).unwrap(), Needs { boot: mib(2), root: mib(4) });
    // Of two candidates for the root the smaller one counts.
    let two = disk(|disk| {
        let entry = &mut disk[446 + 32..][..16];
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&0x4000_u32.to_le_bytes());
        entry[12..16].copy_from_slice(&0x1000_u32.to_le_bytes());
    });
    assert_eq!(needs(&two).unwrap().root, mib(2));
    assert!(needs(&[0; 20_000]).is_err() && length(&[0; 20_000]).is_err());
}

#[test]
fn the_second_table_of_a_gpt_belongs_to_the_image() {
    let backup = disk(|disk| {
        gpt(disk);
        disk[512 + 32..512 + 40].copy_from_slice(&(20_u64 << 11).to_le_bytes());
    });
    assert_eq!(length(&backup).unwrap(), (20 << 20) + 512);
    let absurd = disk(|disk| {
        gpt(disk);
        disk[512 + 32..512 + 40].fill(0xff);
    });
    assert_eq!(length(&absurd).unwrap(), u64::MAX, "no card is as large");
}
