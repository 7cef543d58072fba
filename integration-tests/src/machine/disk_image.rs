//! A compressed whole-disk image, as distributions publish them: a partition table, a FAT with the boot files, and an
//! ext4 with the root.

use std::fs::{self, File};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::process::{run, tool};
use crate::wait::seconds;

/// Bytes of a sector in an MBR.
const SECTOR: u64 = 512;
const MIB: u64 = 1024 * 1024;
/// Smaller than the card's boot partition, and large enough for an installer beside the boot files in layout single.
const BOOT: u64 = 120 * MIB;
/// Smaller than the card's root, so that the root has to grow.
const ROOT: u64 = 96 * MIB;
/// Timeout of one step on a busy machine.
const LIMIT: std::time::Duration = seconds(180);

/// Makes the disk image `TREE.img.zst` from a tree with its boot files in `boot/firmware`, and returns its path.
pub async fn make(tree: &Path) -> Result<PathBuf> {
    let work = tempfile::tempdir()?;
    let (fat, ext4) = (work.path().join("boot"), work.path().join("root"));
    File::create(&fat)?.set_len(BOOT)?;
    // One sector per cluster, because a FAT32 this small would otherwise have too few clusters to be one.
    command("mkfs.vfat", &["-F", "32", "-s", "1", &shown(&fat)]).await?;
    let mut files: Vec<String> =
        fs::read_dir(tree.join("boot/firmware"))?.map(|entry| Ok(shown(&entry?.path()))).collect::<Result<_>>()?;
    // In the order of names, so that the same tree gives the same image.
    files.sort();
    let fat_shown = shown(&fat);
    let mut copy = vec!["-s", "-i", fat_shown.as_str()];
    copy.extend(files.iter().map(String::as_str));
    copy.push("::");
    command("mcopy", &copy).await?;

    // The root has only an empty folder as the mount point of the FAT.
    let rest = work.path().join("tree");
    command("cp", &["-a", &shown(tree), &shown(&rest)]).await?;
    fs::remove_dir_all(rest.join("boot/firmware"))?;
    fs::create_dir(rest.join("boot/firmware"))?;
    File::create(&ext4)?.set_len(ROOT)?;
    command("mke2fs", &["-q", "-F", "-t", "ext4", "-d", &shown(&rest), &shown(&ext4)]).await?;

    let disk = work.path().join("disk");
    let mut whole = File::create(&disk)?;
    whole.write_all(&table()?)?;
    for (file_system, offset) in [(&fat, MIB), (&ext4, MIB + BOOT)] {
        whole.seek(SeekFrom::Start(offset))?;
        io::copy(&mut File::open(file_system)?, &mut whole)?;
    }
    let to = tree.with_extension("img.zst");
    zstd::stream::copy_encode(File::open(&disk)?, File::create(&to)?, 1).context("compressing the image")?;
    Ok(to)
}

/// The MBR: a bootable FAT32 and a Linux partition.
fn table() -> Result<[u8; 512]> {
    let mut mbr = [0; 512];
    for (place, kind, start, length) in [(446, 0x0c, MIB, BOOT), (462, 0x83, MIB + BOOT, ROOT)] {
        let entry: &mut [u8] = mbr.get_mut(place..place + 16).context("an entry")?;
        let (start, length) = (u32::try_from(start / SECTOR)?, u32::try_from(length / SECTOR)?);
        entry.copy_from_slice(
            &[&[0, 0, 0, 0, kind, 0, 0, 0], &start.to_le_bytes()[..], &length.to_le_bytes()[..]].concat(),
        );
    }
    mbr.get_mut(510..).context("the end")?.copy_from_slice(&[0x55, 0xaa]);
    Ok(mbr)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

async fn command(program: &str, arguments: &[&str]) -> Result<()> {
    run(&tool(program)?, arguments, LIMIT).await?.success().with_context(|| program.to_owned()).map(drop)
}
