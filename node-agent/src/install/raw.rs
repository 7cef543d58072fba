//! A whole-disk image into a card in layout resident: its FAT goes to the boot partition and its ext4 to the root, as they
//! stream by.

use std::fs::File;
use std::io::{BufRead, Error, ErrorKind, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use marco_archive::disk::{FileSystem, Partition, Partitions, read_disk};
use rustix::fs::FallocateFlags;

use super::InstallError;
use super::write_back::WriteBack;
use crate::system::RawTarget;

/// A partition of the card that is filled from the image.
struct Place {
    what: &'static str,
    file: File,
    size: u64,
    /// It holds nothing but zeros, so none need be written.
    blank: bool,
    filled: bool,
}

impl Place {
    fn open(what: &'static str, device: &Path) -> std::io::Result<Self> {
        let mut file = File::options().write(true).open(device)?;
        let size = file.seek(SeekFrom::End(0))?;
        // Costs nothing on a card that can do it, and spares the card all zeros of the image.
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let blank = rustix::fs::fallocate(&file, flags, 0, size).is_ok();
        Ok(Self { what, file, size, blank, filled: false })
    }
}

/// Both places, and the one that is being filled.
struct Places {
    boot: Place,
    root: Place,
    filling: Option<FileSystem>,
}

impl Places {
    fn place(&mut self, file_system: FileSystem) -> Option<&mut Place> {
        match file_system {
            FileSystem::Fat => Some(&mut self.boot),
            FileSystem::Ext => Some(&mut self.root),
            FileSystem::Other => None,
        }
    }
}

impl Partitions for Places {
    fn begin(&mut self, partition: &Partition, file_system: FileSystem) -> Result<bool, marco_archive::Error> {
        self.filling = None;
        // The first of each kind. The card has no place for others, such as recovery systems and swap.
        let Some(place) = self.place(file_system).filter(|place| !place.filled) else { return Ok(false) };
        // Refused before the commit if the room was known then. A first chunk that unpacks to little does not show the
        // table.
        if partition.length > place.size {
            let (what, needed, size) = (place.what, partition.length, place.size);
            let action = format!("put the image's {what} of {needed} bytes into one of {size} bytes");
            return Err(marco_archive::Error::Io { action, source: Error::from(ErrorKind::StorageFull) });
        }
        place.filled = true;
        self.filling = Some(file_system);
        Ok(true)
    }

    fn take(&mut self, offset: u64, block: &[u8]) -> Result<(), marco_archive::Error> {
        let Some(place) = self.filling.and_then(|file_system| self.place(file_system)) else { return Ok(()) };
        if place.blank && block.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        let action = || format!("write the card's {}", place.what);
        place.file.write_all_at(block, offset).map_err(|source| marco_archive::Error::Io { action: action(), source })
    }
}

/// Writes the image's file systems to the card. Blocking.
pub(super) fn write(from: impl BufRead, target: &RawTarget) -> Result<(), InstallError> {
    let disk = InstallError::disk("write the partitions of the card");
    let boot = Place::open("boot partition", &target.boot).map_err(&disk)?;
    let root = Place::open("root", &target.root).map_err(&disk)?;
    let files = [boot.file.try_clone().map_err(&disk)?, root.file.try_clone().map_err(&disk)?];
    let mut write_back = WriteBack::start(move || files.iter().try_for_each(File::sync_data)).map_err(&disk)?;
    let mut places = Places { boot, root, filling: None };
    read_disk(from, &mut places, &mut |bytes| write_back.unpacked(bytes))?;
    write_back.finish().map_err(&disk)?;
    for place in [&places.boot, &places.root] {
        if !place.filled {
            let kind = if place.what == "root" { "ext4" } else { "FAT" };
            return Err(InstallError::not_a_system(format!("the disk image has no {kind} for the {}", place.what)));
        }
        // The write-back ends with its last full step.
        place.file.sync_all().map_err(&disk)?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::MetadataExt as _;

    use super::write;
    use crate::system::RawTarget;

    const MIB: usize = 1 << 20;

    /// A FAT of 1 MiB at 1 MiB and an ext4 of 4 MiB at 2 MiB, most of it zeros.
    pub(in crate::install) fn disk() -> Vec<u8> {
        let mut disk = vec![0; 6 * MIB];
        for (number, kind, start, length) in [(0, 0x0c, MIB, MIB), (1, 0x83, 2 * MIB, 4 * MIB)] {
            let entry = &mut disk[446 + number * 16..][..16];
            entry[4] = kind;
            entry[8..12].copy_from_slice(&u32::try_from(start / 512).unwrap().to_le_bytes());
            entry[12..16].copy_from_slice(&u32::try_from(length / 512).unwrap().to_le_bytes());
        }
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[MIB + 82..][..5].copy_from_slice(b"FAT32");
        disk[MIB + 510..][..2].copy_from_slice(&[0x55, 0xaa]);
        disk[2 * MIB + 1080..][..2].copy_from_slice(&[0x53, 0xef]);
        disk[6 * MIB - 5000..].fill(7);
        disk
    }

    fn card(root: u64) -> (tempfile::TempDir, RawTarget) {
        let dir = tempfile::tempdir().unwrap();
        let target = RawTarget { boot: dir.path().join("p4"), root: dir.path().join("p2") };
        fs::write(&target.boot, vec![9; 2 * MIB]).unwrap();
        // Something was there before.
        fs::write(&target.root, vec![9; MIB]).unwrap();
        File::options().write(true).open(&target.root).unwrap().set_len(root).unwrap();
        (dir, target)
    }

    #[test]
    fn the_images_file_systems_are_on_the_partitions_and_zeros_are_not_written() {
        let (_dir, target) = card(8 << 20);
        let disk = disk();
        write(&*disk, &target).unwrap();
        assert!(fs::read(&target.boot).unwrap()[..MIB] == disk[MIB..2 * MIB]);
        let root = fs::read(&target.root).unwrap();
        assert!(root.len() == 8 * MIB && root[..4 * MIB] == disk[2 * MIB..]);
    }

    #[test]
    fn zeros_are_holes_where_the_card_can_be_emptied() {
        let (_dir, target) = card(8 << 20);
        write(std::io::BufReader::with_capacity(64 << 10, &*disk()), &target).unwrap();
        let root = fs::metadata(&target.root).unwrap();
        assert!(root.blocks() * 512 < 1 << 20, "{} blocks", root.blocks());
    }

    #[test]
    fn a_partition_that_is_too_large_is_refused() {
        let (_dir, target) = card(3 << 20);
        let error = write(&*disk(), &target).unwrap_err();
        assert_eq!((error.reason, error.retryable), ("NO_ROOM", false));
        assert!(error.message.contains("root of 4194304 bytes into one of 3145728 bytes"), "{error}");
    }

    #[test]
    fn an_image_without_a_root_is_no_system() {
        let (_dir, target) = card(8 << 20);
        let mut disk = disk();
        disk[2 * MIB + 1080] = 0;
        let error = write(&*disk, &target).unwrap_err();
        assert!(error.reason == "NOT_A_SYSTEM" && error.message.contains("no ext4 for the root"), "{error}");
    }
}
