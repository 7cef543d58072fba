//! Writes cards: one recovery partition with the installer and the join data. The installer creates the other
//! partitions.

mod contents;
mod device;
mod fat;
mod first_boot;
mod folders;

use std::fs::{File, OpenOptions, Permissions};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use mbrman::{BOOT_ACTIVE, CHS, MBR, MBRPartitionEntry};
use rustix::fs::{Advice, OFlags, fadvise};

use crate::part::Part;
use crate::progress::byte_bar;
pub(crate) use contents::{Contents, Join, Set};
pub(crate) use device::{Target, device_number, inspect, mounted_at, partitions, word};

const SECTOR: u64 = 512;
/// Start of p1 in bytes. Cards erase blocks of up to 4 MiB.
const START: u64 = 4 << 20;
/// Length of p1 in bytes.
const LENGTH: u64 = 256 << 20;
/// Partition type of a FAT32 with LBA.
const FAT32_LBA: u8 = 0x0c;
/// Sectors of a backup GPT at the end of a disk.
const GPT_SECTORS: u64 = 33;
/// Minimum size of a card in bytes: p1 and some room for a system.
const SMALLEST: u64 = START + LENGTH + (64 << 20);

/// Writes a card and verifies it. `file_size`: size of a new image file; ignored for a device.
pub(crate) fn write(path: &Path, target: &Target, file_size: u64, contents: &Contents) -> Result<()> {
    let named = || format!("cannot write {}", path.display());
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    match target {
        // With O_EXCL the kernel refuses a device if any part of it is in use.
        Target::Device { .. } => options.custom_flags(i32::try_from(OFlags::EXCL.bits()).unwrap_or_default()),
        // The file will contain a join token.
        Target::File { .. } => options.create(true).truncate(true).mode(0o600),
    };
    let mut disk = options.open(path).with_context(named)?;
    if matches!(target, Target::File { .. }) {
        // An existing file keeps its mode when it is opened.
        disk.set_permissions(Permissions::from_mode(0o600)).with_context(named)?;
        disk.set_len(file_size).with_context(named)?;
    }
    let size = disk.seek(SeekFrom::End(0)).with_context(named)?;
    if size < SMALLEST {
        bail!("{} is too small: it has {} MiB, and {} are needed", path.display(), size >> 20, SMALLEST >> 20);
    }
    partition(&mut disk, size).with_context(named)?;

    let bar = byte_bar("writing", contents.bytes());
    fat::write(Part::of(disk.try_clone().with_context(named)?, START, LENGTH), contents, &|done| bar.inc(done))
        .with_context(named)?;
    disk.sync_all().with_context(named)?;
    bar.finish_and_clear();

    // The read must come from the card, not from this machine's page cache.
    fadvise(disk.as_fd(), 0, None, Advice::DontNeed).context("cannot read the card back")?;
    let bar = byte_bar("verifying", contents.bytes());
    check_partition(&mut disk).with_context(|| format!("{} does not hold what was written to it", path.display()))?;
    fat::verify(Part::of(disk, START, LENGTH), contents, &|done| bar.inc(done))
        .with_context(|| format!("{} does not hold what was written to it", path.display()))?;
    bar.finish_and_clear();
    Ok(())
}

/// Writes a table with p1 only, and erases all traces of other tables.
fn partition(disk: &mut File, size: u64) -> Result<()> {
    disk.seek(SeekFrom::Start(0))?;
    // Everything before p1: boot record, primary GPT, and superblocks of a file system without a table.
    let zeros = vec![0; usize::try_from(START)?];
    disk.write_all(&zeros)?;
    // Partitioning tools would find an old GPT by its backup at the end.
    let backup = GPT_SECTORS * SECTOR;
    disk.seek(SeekFrom::Start(size / SECTOR * SECTOR - backup))?;
    disk.write_all(zeros.get(..usize::try_from(backup)?).unwrap_or_default())?;
    // Linux derives the PARTUUID from it. Equal signatures would confuse two cards in one machine.
    let mut signature = [0; 4];
    getrandom::fill(&mut signature).context("no randomness")?;
    let mut table = MBR::new_from(disk, u32::try_from(SECTOR)?, signature)?;
    *table.get_mut(1).context("the table has no first entry")? = entry()?;
    table.write_into(disk)?;
    Ok(())
}

fn entry() -> Result<MBRPartitionEntry> {
    Ok(MBRPartitionEntry {
        boot: BOOT_ACTIVE,
        first_chs: CHS::empty(),
        sys: FAT32_LBA,
        last_chs: CHS::empty(),
        starting_lba: u32::try_from(START / SECTOR)?,
        sectors: u32::try_from(LENGTH / SECTOR)?,
    })
}

fn check_partition(disk: &mut File) -> Result<()> {
    let table = MBR::read_from(disk, u32::try_from(SECTOR)?)?;
    let found = table.get(1).context("there is no partition")?;
    let wanted = entry()?;
    if (found.starting_lba, found.sectors, found.sys) != (wanted.starting_lba, wanted.sectors, wanted.sys) {
        bail!("the partition table is another one");
    }
    Ok(())
}
