//! Builds a bootcode: a zip of boot files that starts the installer, from a system's root or its packages.

mod boards;
mod cpio;
mod elf;
mod initramfs;
mod kernel;
mod modules;
mod package;
mod programs;
mod set;
mod source;

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail};
use chrono::{DateTime, SecondsFormat};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::args::{BuildBootcode, Packing};
use crate::progress::Steps;
use kernel::Kernel;
use source::Source;

/// Result of a build, printed by `--output json`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Built {
    /// Path of the zip.
    pub(crate) file: String,
    /// Size of the zip in bytes.
    pub(crate) size: u64,
    /// SHA-256 of the zip, hexadecimal.
    pub(crate) sha256: String,
    /// Version of the kernel.
    pub(crate) kernel: String,
    /// Architecture of the kernel.
    pub(crate) arch: String,
    /// Boards that the zip supports.
    pub(crate) boards: Vec<String>,
    /// Files in the zip.
    pub(crate) files: Vec<Listed>,
    /// Files in the initramfs, without folders, links and devices.
    pub(crate) initramfs: Vec<Listed>,
    /// Modules in loading order.
    pub(crate) modules: Vec<String>,
    /// Firmware files that modules may request and that the source lacks.
    pub(crate) missing_firmware: Vec<String>,
    /// Remarks for the operator.
    pub(crate) notes: Vec<String>,
}

/// A file with its digest.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Listed {
    /// Path in the zip or the initramfs.
    pub(crate) name: String,
    /// Size in bytes.
    pub(crate) size: u64,
    /// SHA-256, hexadecimal.
    pub(crate) sha256: String,
}

/// Builds the zip and writes it.
pub(crate) fn build(flags: &BuildBootcode) -> Result<Built> {
    let steps = Steps::start();
    let source = Source::open(&flags.roots, &flags.packages, &mut |package| {
        let name = package.file_name().unwrap_or_default().to_string_lossy();
        steps.now(&format!("unpacking {name}"));
    })?;
    let kernel = Kernel::choose(&source, flags.arch, flags.kernel.as_deref())?;
    let modules = modules::Modules::open(&kernel.modules, &kernel.version)?;
    let boards = boards::choose(&flags.boards, &kernel, &modules)?;
    let time = build_time(flags, &kernel)?;
    let packing = packing(flags.compress, &kernel)?;

    steps.now("collecting modules and programs");
    let text = DateTime::from_timestamp(i64::from(time), 0).context("the build time is none")?;
    let text = text.to_rfc3339_opts(SecondsFormat::Secs, true);
    let initramfs = initramfs::collect(flags, &source, &kernel, &boards, text)?;
    let (mut files, notes) = set::collect(&source, &kernel, &boards, flags.cmdline.as_deref())?;
    steps.now("compressing the initramfs");
    files.insert("initramfs".to_owned(), pack(&cpio::write(&initramfs.tree, time), packing)?);
    steps.now("writing and checking the zip");
    let summary = set::write_zip(&files, &flags.file)?;

    let (size, sha256) = digest_of(&flags.file)?;
    let inside = initramfs.tree.iter().filter_map(|(name, node)| match node {
        cpio::Node::File(bytes, _) => Some(listed(name, bytes)),
        _ => None,
    });
    Ok(Built {
        file: flags.file.display().to_string(),
        size,
        sha256,
        kernel: kernel.version.clone(),
        arch: kernel.arch.to_string(),
        boards: boards.iter().map(ToString::to_string).collect(),
        files: summary
            .files
            .iter()
            .map(|file| Listed { name: file.name.clone(), size: file.size, sha256: hex::encode(file.sha256) })
            .collect(),
        initramfs: inside.collect(),
        modules: initramfs.modules,
        missing_firmware: initramfs.missing_firmware,
        notes,
    })
}

fn listed(name: &str, bytes: &[u8]) -> Listed {
    Listed {
        name: name.to_owned(),
        size: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        sha256: hex::encode(Sha256::digest(bytes)),
    }
}

fn digest_of(path: &Path) -> Result<(u64, String)> {
    let bytes = source::read(path)?;
    Ok((u64::try_from(bytes.len())?, hex::encode(Sha256::digest(&bytes))))
}

/// Returns the time for all entries: SOURCE_DATE_EPOCH, else the newer one of agent and kernel. The same files thus
/// always give the same bytes.
fn build_time(flags: &BuildBootcode, kernel: &Kernel) -> Result<u32> {
    if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
        return text.trim().parse().context("SOURCE_DATE_EPOCH is no number of seconds");
    }
    let seconds = |path: &Path| -> Result<u64> {
        let time = path.metadata().and_then(|data| data.modified());
        let time = time.with_context(|| format!("cannot read {}", path.display()))?;
        Ok(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
    };
    let newest = seconds(&flags.agent)?.max(seconds(&kernel.image)?);
    // A file from the future must not put a future time into the archive.
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    u32::try_from(newest.min(now)).context("a file is from the next century")
}

/// Chooses the compression of the initramfs: the requested one if the kernel can read it, else the best one that the
/// kernel certainly reads.
fn packing(asked: Option<Packing>, kernel: &Kernel) -> Result<Packing> {
    let config = kernel.config_lines()?;
    let knows = |packing: Packing| {
        let option = match packing {
            Packing::Zstd => "CONFIG_RD_ZSTD=y",
            Packing::Gzip => "CONFIG_RD_GZIP=y",
        };
        config.as_ref().map(|text| text.lines().any(|line| line == option))
    };
    match asked {
        Some(packing) if knows(packing) == Some(false) => bail!(
            "the kernel {} cannot read an initramfs compressed with {packing}: CONFIG_RD_{} is not set",
            kernel.version,
            packing.to_string().to_uppercase()
        ),
        Some(packing) => Ok(packing),
        // Without the kernel's configuration only gzip is safe.
        None if knows(Packing::Zstd) == Some(true) => Ok(Packing::Zstd),
        None => Ok(Packing::Gzip),
    }
}

fn pack(archive: &[u8], packing: Packing) -> Result<Vec<u8>> {
    use std::io::Write as _;
    match packing {
        // The kernel accepts windows of up to 128 MiB. This level uses 8 MiB.
        Packing::Zstd => zstd::encode_all(archive, 15).context("cannot compress the initramfs"),
        Packing::Gzip => {
            // The builder writes neither name nor time, so the same files give the same bytes.
            let mut packer = flate2::GzBuilder::new().write(Vec::new(), flate2::Compression::best());
            packer.write_all(archive).and_then(|()| packer.finish()).context("cannot compress the initramfs")
        }
    }
}
