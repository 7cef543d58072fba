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
