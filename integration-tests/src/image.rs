//! Images and boot files for tests: made from a folder, small, and real enough for the installer.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Cursor, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};
use zip::write::SimpleFileOptions;

use crate::tree::list;

/// Compression of a tarball.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Uncompressed: `.tar`.
    None,
    /// `.tar.gz`.
    Gzip,
    /// `.tar.zst`.
    Zstd,
}

/// Lays out a root file system that boots on a virtual Pi. `marker` makes two of them differ. It contains what is
/// easily lost on the way: links of both kinds, modes, empty folders, names that are not ASCII, an empty and a large
/// file.
pub fn lay_out_root(root: &Path, marker: &str) -> Result<()> {
    for folder in [
        "boot/firmware/overlays",
        "dev",
        "etc/ssh",
        "home",
        "proc",
        "root",
        "sys",
        "tmp",
        "usr/bin",
        "usr/lib/marker",
        "usr/sbin",
        "var/lib",
        "var/log",
    ] {
        fs::create_dir_all(root.join(folder))?;
    }
    for (path, text) in [
        ("etc/os-release", format!("PRETTY_NAME=\"Test OS {marker}\"\nID=test\n")),
        ("etc/hostname", "raspberrypi\n".to_owned()),
        (
            "etc/fstab",
            "PARTUUID=00000000-02 / ext4 defaults 0 1\nPARTUUID=00000000-01 /boot/firmware vfat defaults 0 2\n"
                .to_owned(),
        ),
        ("usr/lib/marker/name", marker.to_owned()),
        ("usr/lib/marker/empty", String::new()),
        ("usr/lib/marker/Straße – 東京", "names are bytes\n".to_owned()),
        (
            "usr/lib/marker/a-name-that-does-not-fit-into-the-hundred-bytes-that-the-header-of-the-oldest-tar-format-has-for-it",
            "long\n".to_owned(),
        ),
    ] {
        fs::write(root.join(path), text)?;
    }
    let program = format!("#!/bin/sh\necho {marker}\n");
    for path in ["usr/sbin/init", "usr/bin/tool"] {
        fs::write(root.join(path), &program)?;
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(0o755))?;
    }
    // setuid, sticky and private modes are the ones that a careless unpacker loses.
    fs::set_permissions(root.join("usr/bin/tool"), fs::Permissions::from_mode(0o4755))?;
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::set_permissions(root.join("root"), fs::Permissions::from_mode(0o700))?;
    symlink("usr/sbin", root.join("sbin"))?;
    // Absolute and dangling links are legal in a root, and must not lead the unpacker out of it.
    symlink("/usr/lib/marker/name", root.join("etc/absolute-link"))?;
    symlink("../nowhere", root.join("etc/dangling-link"))?;
    fs::hard_link(root.join("usr/bin/tool"), root.join("usr/bin/the-same-tool"))?;
    // Not a multiple of any block size.
    fs::write(root.join("usr/lib/marker/noise"), noise(marker, 3 * 1024 * 1024 + 17))?;
    lay_out_boot(&root.join("boot/firmware"), marker)
}

/// Lays out a system's own boot files for a Pi 4. The virtual Pi's firmware looks for them; nothing executes them.
pub fn lay_out_boot(boot: &Path, marker: &str) -> Result<()> {
    fs::create_dir_all(boot.join("overlays"))?;
    for (name, text) in [
        ("kernel8.img", format!("kernel of {marker}\n").repeat(100)),
        ("cmdline.txt", "console=tty1 root=PARTUUID=00000000-02 rootfstype=ext4 rootwait\n".to_owned()),
        ("config.txt", "arm_64bit=1\n[pi4]\narm_boost=1\n".to_owned()),
        ("bcm2711-rpi-4-b.dtb", format!("device tree of {marker}\n")),
        ("overlays/README", "overlays\n".to_owned()),
        ("overlays/overlay_map.dtb", "map\n".to_owned()),
    ] {
        fs::write(boot.join(name), text)?;
    }
    Ok(())
}

/// Pseudo-random bytes that do not compress; the same seed gives the same bytes.
pub fn noise(seed: &str, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 32);
    let mut counter = 0_u64;
    while bytes.len() < length {
        // A hash in counter mode: no two blocks are equal, so no compressor finds anything.
        bytes.extend_from_slice(&Sha256::new().chain_update(seed).chain_update(counter.to_le_bytes()).finalize());
        counter += 1;
    }
    bytes.truncate(length);
    bytes
}

/// Packs a folder as `tar -C ROOT -c .` would.
pub fn pack(root: &Path, to: &Path, compression: Compression) -> Result<PathBuf> {
    let file = File::create(to).with_context(|| format!("creating {}", to.display()))?;
    match compression {
        Compression::None => append(root, file)?.flush()?,
        Compression::Gzip => {
            append(root, flate2::write::GzEncoder::new(file, flate2::Compression::fast()))?.finish()?;
        }
        Compression::Zstd => {
            append(root, zstd::Encoder::new(file, 1)?)?.finish()?;
        }
    }
    Ok(to.to_owned())
}

fn append<W: Write>(root: &Path, to: W) -> Result<W> {
    let mut tarball = tar::Builder::new(to);
    // Links must stay links: the tar crate would otherwise pack their targets.
    tarball.follow_symlinks(false);
    tarball.append_dir(".", root)?;
    // By device and inode: the path under which a file with several names was packed first. Its other names become
    // links to that.
    let mut first_names: BTreeMap<(u64, u64), PathBuf> = BTreeMap::new();
    // In a sorted order, so that the same tree gives the same tarball.
    for path in list(root)? {
        let (full, name) = (root.join(&path), Path::new(".").join(&path));
        let metadata = fs::symlink_metadata(&full)?;
        let file = (metadata.dev(), metadata.ino());
        if let Some(first) = first_names.get(&file) {
            let mut header = tar::Header::new_gnu();
            header.set_metadata(&metadata);
            header.set_entry_type(tar::EntryType::Link);
            header.set_size(0);
            tarball.append_link(&mut header, &name, first)?;
            continue;
        }
        if metadata.is_file() && metadata.nlink() > 1 {
            first_names.insert(file, name.clone());
        }
        tarball.append_path_with_name(&full, &name).with_context(|| format!("packing {}", full.display()))?;
    }
    Ok(tarball.into_inner()?)
}

/// Makes an image with the tree of [`lay_out_root`]. The source tree stays in `folder/MARKER`.
pub fn make_image(folder: &Path, marker: &str, compression: Compression) -> Result<PathBuf> {
    let root = folder.join(marker);
    lay_out_root(&root, marker)?;
    let ending = match compression {
        Compression::None => "tar",
        Compression::Gzip => "tar.gz",
        Compression::Zstd => "tar.zst",
    };
    pack(&root, &folder.join(format!("{marker}.{ending}")), compression)
}

/// The files of an installer's boot set that controller and agent accept.
pub fn installer_set(marker: &str) -> Vec<(String, Vec<u8>)> {
    [
        ("kernel8.img", format!("installer kernel {marker}")),
        ("initramfs8", format!("installer initramfs {marker}")),
        ("cmdline.txt", "console=tty1\n".to_owned()),
        ("config.txt", "arm_64bit=1\nauto_initramfs=0\ninitramfs initramfs8 followkernel\n".to_owned()),
        ("bcm2711-rpi-4-b.dtb", format!("installer device tree {marker}")),
        ("overlays/README", "overlays\n".to_owned()),
        ("overlays/overlay_map.dtb", "map\n".to_owned()),
    ]
    .map(|(name, text)| (name.to_owned(), text.into_bytes()))
    .into()
}

/// The boot files of a system, for an update without an image.
pub fn system_set(marker: &str) -> Vec<(String, Vec<u8>)> {
    [
        ("kernel8.img", format!("system kernel {marker}")),
        ("cmdline.txt", "console=tty1 root=/dev/mmcblk0p2 rootwait\n".to_owned()),
        ("config.txt", "arm_64bit=1\n".to_owned()),
        ("bcm2711-rpi-4-b.dtb", format!("system device tree {marker}")),
    ]
    .map(|(name, text)| (name.to_owned(), text.into_bytes()))
    .into()
}

/// Packs files as a zip.
pub fn zip_of(files: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut zip = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in files {
        zip.start_file(name, SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated))?;
        zip.write_all(bytes)?;
    }
    Ok(zip.finish()?.into_inner())
}

/// An installer's boot set as a zip.
pub fn make_bootcode(marker: &str) -> Result<Vec<u8>> {
    zip_of(&installer_set(marker))
}

/// SHA-256, lower-case hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// A disk image of 8 MiB: an MBR, a FAT of 3 MiB with these files, and 4 MiB of which only the magic number of ext4 is
/// written.
///
/// # Errors
///
/// Returns an error if the files do not fit.
pub fn disk_image(boot: &[(&str, &str)]) -> Result<Vec<u8>> {
    const MIB: usize = 1 << 20;
    let mut disk = vec![0; 8 * MIB];
    disk.splice(446..462, [0, 0, 0, 0, 0x0c, 0, 0, 0, 0, 8, 0, 0, 0, 24, 0, 0]);
    disk.splice(462..478, [0, 0, 0, 0, 0x83, 0, 0, 0, 0, 32, 0, 0, 0, 32, 0, 0]);
    disk.splice(510..512, [0x55, 0xaa]);
    // The superblock of ext4 begins at byte 1024, its magic number at byte 56 of that.
    disk.splice(4 * MIB + 1080..4 * MIB + 1082, [0x53, 0xef]);
    let mut part = Cursor::new(disk.get_mut(MIB..4 * MIB).context("a partition")?);
    fatfs::format_volume(&mut part, fatfs::FormatVolumeOptions::new())?;
    let fat = fatfs::FileSystem::new(part, fatfs::FsOptions::new())?;
    for (name, contents) in boot {
        fat.root_dir().create_file(name)?.write_all(contents.as_bytes())?;
    }
    fat.unmount()?;
    Ok(disk)
}
