//! Cards: one recovery partition with the installer and a way in. The installer makes the other partitions.

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
/// Where p1 begins: cards erase in blocks of up to 4 MiB.
const START: u64 = 4 << 20;
/// How long p1 is.
const LENGTH: u64 = 256 << 20;
/// FAT32, addressed by sectors.
const FAT32_LBA: u8 = 0x0c;
/// A backup GPT takes this many sectors at the end.
const GPT_SECTORS: u64 = 33;
/// The smallest card: p1 and room for anything at all.
const SMALLEST: u64 = START + LENGTH + (64 << 20);

/// Writes a card and reads it back. A file is made, or replaced, with this size.
pub(crate) fn write(path: &Path, target: &Target, file_size: u64, contents: &Contents) -> Result<()> {
    let named = || format!("cannot write {}", path.display());
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    match target {
        // With O_EXCL the kernel refuses a device of which anything is mounted or otherwise in use.
        Target::Device { .. } => options.custom_flags(i32::try_from(OFlags::EXCL.bits()).unwrap_or_default()),
        // It will hold a token.
        Target::File { .. } => options.create(true).truncate(true).mode(0o600),
    };
    let mut disk = options.open(path).with_context(named)?;
    if matches!(target, Target::File { .. }) {
        // A file that was there keeps its mode when it is opened.
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

    // From the card, not from what this machine remembers of it.
    fadvise(disk.as_fd(), 0, None, Advice::DontNeed).context("cannot read the card back")?;
    let bar = byte_bar("verifying", contents.bytes());
    check_partition(&mut disk).with_context(|| format!("{} does not hold what was written to it", path.display()))?;
    fat::verify(Part::of(disk, START, LENGTH), contents, &|done| bar.inc(done))
        .with_context(|| format!("{} does not hold what was written to it", path.display()))?;
    bar.finish_and_clear();
    Ok(())
}

/// A table with p1 alone, and nothing left of what other tables said.
fn partition(disk: &mut File, size: u64) -> Result<()> {
    disk.seek(SeekFrom::Start(0))?;
    let zeros = vec![0; usize::try_from(START)?];
    disk.write_all(&zeros)?;
    let backup = GPT_SECTORS * SECTOR;
    disk.seek(SeekFrom::Start(size / SECTOR * SECTOR - backup))?;
    disk.write_all(zeros.get(..usize::try_from(backup)?).unwrap_or_default())?;
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
