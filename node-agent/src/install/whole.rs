//! A whole-disk image, written to the whole card as it is. Its first sector, which holds the table, is written last: until
//! then the table is the recovery partition's, and every boot the installer.

use std::fs::File;
use std::io::{BufRead, Error, ErrorKind, Read, Result};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use marco_archive::disk::{FRONT, FileSystem, Partition, Partitions, length, read_disk};
use rustix::fs::FallocateFlags;
use tokio_util::sync::CancellationToken;

use super::first_boot::give_on;
use super::unpack::Destination;
use super::write_back::WriteBack;
use super::{InstallError, Next, Phase, Verdict, Work, blocking, boot_files, open};
use crate::system::{Erase, Ready, Release, Room, Stretch};

/// Bytes of the sector that is written last.
const FIRST: usize = 512;
/// Offset from which the card may be emptied at once; the bytes before belong to the table.
const EMPTIED: u64 = 1 << 20;

/// The part of the card that the image may take.
pub(super) struct Place {
    /// Device of the card.
    pub(super) device: PathBuf,
    /// Offset before which the image must end: the recovery partition begins there.
    pub(super) limit: u64,
}

/// Result of writing an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Written {
    /// The first sector, which is not on the card yet.
    first: [u8; FIRST],
    /// The first FAT, from which the image boots.
    boot: Stretch,
    /// The first ext2, ext3 or ext4.
    root: Stretch,
}

impl Work<'_> {
    /// Writes the image to the whole card, and this node's own files into the image's file systems. They stay as they
    /// are otherwise: command line, fstab and the resizing at the first boot are the image's.
    pub(super) async fn whole(
        &self,
        sha256: &str,
        cancel: &CancellationToken,
    ) -> std::result::Result<Next, InstallError> {
        self.phase(Phase::Connecting);
        let mut download = self.downloader.stream(sha256, cancel).await?;
        let first = download.chunks.recv().await.transpose()?;
        let verdict = Verdict::of(&download, first.as_deref().unwrap_or_default())?;
        if !verdict.disk {
            return Err(InstallError::image("it was to be written as it is, but is no image of a whole disk"));
        }
        self.judge(&download)?;
        // The room must be known before the commit, which moves the recovery partition out of the image's way.
        if verdict.front.len() < FRONT {
            return Err(InstallError::image(
                "its partition table does not lie within the first 4 MiB of the compressed image, so the card's room cannot \
                 be told: compress it again",
            ));
        }
        let bytes = length(&verdict.front)?;

        self.labels_are_known().await?;
        let keep = self.keep().await?;
        let erase = Erase { root: true, home: true };
        if self.commit(Room::Whole(bytes), erase).await? == Ready::AfterRestart {
            return Ok(Next::Installer);
        }
        let card = self.system.whole_card().await?;
        let place = Place { device: card.device, limit: card.limit };
        let written =
            self.unpack(download, verdict.compression, first, Destination::Card(place), card.lease.clone()).await?;
        let written = written.ok_or_else(|| InstallError::io("nothing was written to the card"))?;

        // By offset: the table that would name the partitions is not on the card yet.
        let target = self.system.mount_whole(written.boot, written.root, card.lease).await?;
        self.phase(Phase::BootFiles);
        let given = self.given().await?;
        let (mounted, board, node) = (target.clone(), self.board.clone(), self.job.node.clone());
        blocking(move || {
            let (root, boot) = open(&mounted)?;
            // Checked, not fitted: a raw image has no trial boot, and its texts are its own.
            boot_files::check(&boot, &board)?;
            give_on(&given, &root, &boot, &node)
        })
        .await?;
        let release = Release { image_sha256: sha256.to_owned(), ..self.release() };
        self.personalise(&target, keep, &release).await?;
        self.name(&target, &release).await?;
        self.system.finish_whole(target, written.first).await?;
        self.installed(Next::System)
    }
}

/// Reader that hands the image to the search for its partitions, and writes every byte that is used up to the card.
struct Onto<R> {
    from: R,
    card: File,
    limit: u64,
    at: u64,
    first: [u8; FIRST],
    /// The card holds nothing but zeros from [`EMPTIED`] on.
    blank: bool,
    failed: Option<Error>,
}

impl<R: BufRead> Onto<R> {
    fn put(&mut self, count: usize) -> Result<()> {
        let block = self.from.fill_buf()?;
        let block = block.get(..count.min(block.len())).unwrap_or_default();
        let offset = usize::try_from(self.at).unwrap_or(usize::MAX);
        for (place, byte) in self.first.iter_mut().skip(offset).zip(block) {
            *place = *byte;
        }
        // Until the first sector is written, the old table stands and every boot is the installer.
        let held_back = FIRST.saturating_sub(offset).min(block.len());
        let (start, rest) = (self.at + u64::try_from(held_back).unwrap_or_default(), block.get(held_back..));
        let rest = rest.unwrap_or_default();
        if self.blank && start >= EMPTIED && rest.iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        // The recovery partition is the only way back now.
        if start + u64::try_from(rest.len()).unwrap_or(u64::MAX) > self.limit {
            return Err(ErrorKind::StorageFull.into());
        }
        self.card.write_all_at(rest, start)
    }
}

impl<R: BufRead> BufRead for Onto<R> {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        if self.failed.is_some() {
            return Err(Error::other("the card cannot be written to"));
        }
        self.from.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        // `consume` cannot fail, so the next read does.
        if let Err(error) = self.put(count) {
            self.failed.get_or_insert(error);
        }
        self.from.consume(count);
        self.at += u64::try_from(count).unwrap_or_default();
    }
}

impl<R: BufRead> Read for Onto<R> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

/// The partitions of the image from which a system starts.
#[derive(Default)]
struct Found {
    boot: Option<Partition>,
    root: Option<Partition>,
}

impl Partitions for Found {
    fn begin(
        &mut self,
        partition: &Partition,
        file_system: FileSystem,
    ) -> std::result::Result<bool, marco_archive::Error> {
        match file_system {
            FileSystem::Fat => self.boot.get_or_insert(*partition),
            FileSystem::Ext => self.root.get_or_insert(*partition),
            FileSystem::Other => partition,
        };
        // Only noted: all bytes go to the card anyway.
        Ok(false)
    }

    fn take(&mut self, _: u64, _: &[u8]) -> std::result::Result<(), marco_archive::Error> {
        Ok(())
    }
}

/// Writes all of the image but its first sector. Blocking.
pub(super) fn write(from: impl BufRead, place: &Place) -> std::result::Result<Written, InstallError> {
    let disk = InstallError::disk("write the image to the card");
    let card = File::options().write(true).open(&place.device).map_err(&disk)?;
    // Spares the card all zeros of the image, if it can do that.
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let blank = place.limit > EMPTIED && rustix::fs::fallocate(&card, flags, EMPTIED, place.limit - EMPTIED).is_ok();
    let synced = card.try_clone().map_err(&disk)?;
    let mut write_back = WriteBack::start(move || synced.sync_data()).map_err(&disk)?;
    let mut onto = Onto { from, card, limit: place.limit, at: 0, first: [0; FIRST], blank, failed: None };
    let mut found = Found::default();
    let read = read_disk(&mut onto, &mut found, &mut |bytes| write_back.unpacked(bytes));
    if let Some(error) = onto.failed {
        return Err(disk(error));
    }
    read?;
    write_back.finish().map_err(&disk)?;
    onto.card.sync_all().map_err(&disk)?;
    let stretch = |partition: Option<Partition>, what: &str| -> std::result::Result<Stretch, InstallError> {
        let lacks = || InstallError::not_a_system(format!("the disk image has no {what}"));
        let Partition { start, length, .. } = partition.ok_or_else(lacks)?;
        Ok(Stretch { start, length })
    };
    Ok(Written {
        first: onto.first,
        boot: stretch(found.boot, "FAT to boot from")?,
        root: stretch(found.root, "ext4 for the root")?,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use super::{Place, write};
    use crate::install::raw::tests::disk;
    use crate::system::Stretch;

    const MIB: usize = 1 << 20;

    /// A card full of nines, on which an image may take `limit` bytes.
    fn card(limit: usize) -> (tempfile::TempDir, Place) {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("card");
        fs::write(&device, vec![9; 16 * MIB]).unwrap();
        (dir, Place { device, limit: limit.try_into().unwrap() })
    }

    #[test]
    fn all_of_an_image_but_its_first_sector_is_on_the_card_before_the_recovery_partition() {
        let (_dir, place) = card(8 * MIB);
        let disk = disk();
        let written = write(&*disk, &place).unwrap();
        assert_eq!(written.first, disk[..512]);
        let stretch = |start: usize, length: usize| Stretch {
            start: (start * MIB).try_into().unwrap(),
            length: (length * MIB).try_into().unwrap(),
        };
        assert_eq!((written.boot, written.root), (stretch(1, 1), stretch(2, 4)));
        let found = fs::read(&place.device).unwrap();
        assert!(found[..512] == [9; 512], "the table was touched");
        assert!(found[512..disk.len()] == disk[512..]);
        assert!(found[8 * MIB..].iter().all(|&byte| byte == 9), "the recovery partition was touched");
    }

    #[test]
    fn zeros_are_holes_where_the_card_can_be_emptied() {
        let (_dir, place) = card(8 * MIB);
        write(std::io::BufReader::with_capacity(64 << 10, &*disk()), &place).unwrap();
        let used = fs::metadata(&place.device).unwrap().blocks() * 512;
        assert!(used < 10 << 20, "{used} bytes");
    }

    #[test]
    fn an_image_that_would_reach_the_recovery_partition_stops_before_it() {
        let (_dir, place) = card(4 * MIB);
        let mut disk = disk();
        disk[3 * MIB..].fill(7);
        let error = write(&*disk, &place).unwrap_err();
        assert_eq!((error.reason, error.retryable), ("NO_ROOM", false));
        assert!(fs::read(&place.device).unwrap()[4 * MIB..].iter().all(|&byte| byte == 9));
    }

    #[test]
    fn an_image_that_ends_early_or_has_no_root_leaves_the_old_table() {
        let (_dir, place) = card(8 * MIB);
        let mut rootless = disk();
        rootless[2 * MIB + 1080] = 0;
        for (image, reason) in [(&disk()[..5 * MIB], "IMAGE_REFUSED"), (&rootless, "NOT_A_SYSTEM")] {
            assert_eq!(write(image, &place).unwrap_err().reason, reason);
            assert!(fs::read(&place.device).unwrap()[..512] == [9; 512]);
        }
    }
}
