//! Known formats that are neither a tarball nor a whole-disk image, detected by their first bytes, with a remedy for
//! each.

use crate::disk::is_disk;
use crate::tar::is_header;
use crate::{Reason, Refused};

/// Decompressed bytes needed to detect all formats. btrfs has its magic number behind the first 64 KiB.
pub(crate) const FRONT: u64 = 0x1_0048;

/// Offset, magic bytes, and the name of the format with the remedy.
const MARKS: &[(usize, &[u8], &str)] = &[
    (0, b"PK\x03\x04", "a zip: an image is a tarball or a disk image, and a zip a bootcode"),
    (0, b"PK\x05\x06", "an empty zip: an image is a tarball or a disk image"),
    (0, b"BZh", "compressed with bzip2: unpack it with bunzip2; gzip, xz and zstd are taken"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first (7z x FILE), and push what was in it"),
    (0, b"Rar!\x1a\x07", "a rar archive: unpack it first, and push what was in it"),
    (0, b"LZIP", "compressed with lzip: unpack it with lzip -d; gzip, xz and zstd are taken"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4: unpack it with lz4 -d; gzip, xz and zstd are taken"),
    (0, b"\x89LZO\0\r\n\x1a\n", "compressed with lzop: unpack it with lzop -d; gzip, xz and zstd are taken"),
    (0, b"\x5d\0\0", "compressed with the old lzma: unpack it with unlzma; gzip, xz and zstd are taken"),
    (0, b"\x1f\x8b", "compressed twice: unpack it once"),
    (0, b"\xfd7zXZ\0", "compressed twice: unpack it once"),
    (0, b"\x28\xb5\x2f\xfd", "compressed twice: unpack it once"),
    (0, b"070701", "a cpio archive: unpack it, and pack the folder with tar"),
    (0, b"070707", "a cpio archive: unpack it, and pack the folder with tar"),
    (0, b"!<arch>\n", "a package (ar), not a system: push a tarball of a root or a disk image"),
    (0, b"QFI\xfb", "a qcow2 disk: convert it with qemu-img convert -O raw FILE IMAGE.img"),
    (0, b"KDMV", "a VMDK disk: convert it with qemu-img convert -O raw FILE IMAGE.img"),
    (0, b"vhdxfile", "a VHDX disk: convert it with qemu-img convert -O raw FILE IMAGE.img"),
    (0, b"\x3a\xff\x26\xed", "an Android sparse image: convert it with simg2img FILE IMAGE.img"),
    (
        0,
        b"hsqs",
        "a squashfs, a file system without a partition table: unpack it with unsquashfs, and pack the folder with tar",
    ),
    (0, b"LUKS\xba\xbe", "an encrypted file system: open and mount it, and use marcoctl image pack"),
    (32769, b"CD001", "an ISO 9660 image of a CD: a Pi does not boot it; push a disk image or a tarball of a root"),
];

/// File systems without a partition table: offset, magic bytes and name.
const FILE_SYSTEMS: &[(usize, &[u8], &str)] = &[
    (1080, b"\x53\xef", "ext4"),
    (0, b"XFSB", "XFS"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
    (82, b"FAT", "FAT"),
    (54, b"FAT", "FAT"),
];

/// Refuses known foreign formats. Tarballs, disk images and unknown files pass. `front`: the first decompressed bytes;
/// fewer than [`FRONT`] detect fewer formats.
///
/// # Errors
/// `Refused` with the name of the format and the remedy.
pub fn refuse(front: &[u8]) -> Result<(), Refused> {
    // A disk image or a tarball may contain a foreign magic number by chance.
    if is_disk(front) || front.get(..512).is_some_and(is_header) {
        return Ok(());
    }
    let has = |place: usize, mark: &[u8]| front.get(place..).is_some_and(|rest| rest.starts_with(mark));
    let refused = |what: String| Err(Refused::archive(Reason::Foreign(what)));
    if let Some((_, _, what)) = MARKS.iter().find(|(place, mark, _)| has(*place, mark)) {
        return refused((*what).to_owned());
    }
    match FILE_SYSTEMS.iter().find(|(place, mark, _)| has(*place, mark)) {
        Some((_, _, name)) => refused(format!(
            "a file system without a partition table ({name}): mount it and use marcoctl image pack, or push the image of \
             the whole disk"
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{FILE_SYSTEMS, MARKS, refuse};

    /// What the formats' own tools wrote (Debian 12): the tool, pieces of its output by offset, and a word of the answer.
    #[allow(clippy::type_complexity, reason = "a table that is read once")]
    const WRITTEN: [(&str, &[(usize, &str)], &str); 26] = [
        ("7zz a", &[(0, "377abcaf271c000445351d8db2050000")], "7z x FILE"),
        ("bzip2", &[(0, "425a6839314159265359ffbeaaa90001")], "bunzip2"),
        ("lzip", &[(0, "4c5a4950010c0011880647e22a17ec1f")], "lzip -d"),
        ("lz4", &[(0, "04224d186440a745080000f34623204e")], "lz4 -d"),
        ("lzop", &[(0, "894c5a4f000d0a1a0a104020a0094001")], "lzop -d"),
        ("lzma", &[(0, "5d00008000ffffffffffffffff001188")], "unlzma"),
        ("xz", &[(0, "fd377a585a000004e6d6b44602002101")], "compressed twice"),
        ("zstd", &[(0, "28b52ffd64b80a2d2e003a53cc0e2ae0")], "compressed twice"),
        ("gzip", &[(0, "1f8b0808e3930d6b000366008d565d6f")], "compressed twice"),
        ("zip", &[(0, "504b0304140000000800607a7e5d218e")], "a zip"),
        ("cpio -H newc", &[(0, "30373037303130304246303231463030")], "cpio"),
        ("cpio -H odc", &[(0, "30373037303731373730303036303130")], "cpio"),
        ("ar", &[(0, "213c617263683e0a662f202020202020")], "a package"),
        ("qemu-img, qcow2", &[(0, "514649fb000000030000000000000000")], "qcow2"),
        ("qemu-img, vmdk", &[(0, "4b444d56010000000300000000400000")], "VMDK"),
        ("qemu-img, vhdx", &[(0, "7668647866696c65510045004d005500")], "VHDX"),
        ("img2simg", &[(0, "3aff26ed010000001c000c0000100000")], "simg2img"),
        ("mksquashfs", &[(0, "6873717302000000e5930d6b00000200")], "unsquashfs"),
        ("cryptsetup luksFormat", &[(0, "4c554b53babe00020000000000004000")], "encrypted"),
        ("xorrisofs", &[(32768, "01434430303101002020202020202020")], "ISO 9660"),
        ("mkfs.ext4", &[(1072, "e5930d6b0000ffff53ef010001000000")], "(ext4): mount it"),
        ("mkfs.xfs", &[(0, "58465342000010000000000000019000")], "(XFS): mount it"),
        ("mkfs.f2fs", &[(1024, "1020f5f201000f000900000003000000")], "(F2FS): mount it"),
        (
            "mkfs.btrfs",
            &[(65536, "4597cc02"), (0x1_0030, "00000100000000000100000000000000 5f42485266535f4d")],
            "(btrfs)",
        ),
        (
            "mkfs.fat -F 16",
            &[(0, "eb3c906d6b66732e6661740002040400"), (46, "4e414d452020202046415431362020200e1f"), (510, "55aa")],
            "(FAT): mount it",
        ),
        (
            "mkfs.fat -F 32",
            &[(0, "eb58906d6b66732e6661740002010200"), (80, "202046415433322020200e1f"), (510, "55aa")],
            "(FAT): mount it",
        ),
    ];

    #[test]
    fn output_of_real_tools_is_known() {
        for (tool, pieces, word) in WRITTEN {
            let mut front = vec![0; 0x1_0048];
            for (place, text) in pieces {
                let digits: Vec<u32> = text.chars().filter_map(|digit| digit.to_digit(16)).collect();
                for (at, pair) in digits.chunks(2).enumerate() {
                    front[place + at] = u8::try_from(pair[0] * 16 + pair[1]).unwrap();
                }
            }
            let refused = refuse(&front).expect_err(tool).to_string();
            assert!(refused.contains(word), "{tool}: {refused}");
        }
    }

    #[test]
    fn each_mark_is_known_and_says_what_to_do() {
        for (place, mark, word) in MARKS.iter().chain(FILE_SYSTEMS) {
            let mut front = vec![0; 0x1_0048];
            front[*place..*place + mark.len()].copy_from_slice(mark);
            let refused = refuse(&front).unwrap_err().to_string();
            assert!(refused.contains(word), "{refused}");
        }
        refuse(&[0; 0x1_0048]).unwrap();
        refuse(b"./").unwrap();
    }
}
