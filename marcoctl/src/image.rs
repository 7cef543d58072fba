//! Packs a system's root into a tarball.

mod boot;
mod compress;
mod device;
mod excludes;
mod mounted;
mod source;
mod table;
mod tarball;
mod walk;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::args::PackImage;
use crate::progress::{byte_bar, count_bytes};
use compress::Compressor;
use excludes::Excludes;
use source::Source;
use tarball::Tarball;
use walk::Walk;

/// Result of packing, printed by `--output json`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Packed {
    /// Path of the tarball.
    pub(crate) file: String,
    /// Size of the tarball in bytes.
    pub(crate) size: u64,
    /// Number of files, folders, links and other entries.
    pub(crate) entries: u64,
    /// Bytes of the files, holes included.
    pub(crate) unpacked_bytes: u64,
    /// Things left out that no exclude pattern names: sockets, other file systems and other partitions.
    pub(crate) skipped: Vec<String>,
}

/// Packs a system. The tarball gets its name only once it is complete.
pub(crate) async fn pack(flags: PackImage) -> Result<Packed> {
    let mut source = Source::open(&flags.source).await?;
    tokio::task::spawn_blocking(move || pack_source(&flags, &mut source)).await.context("packing was given up")?
}

fn pack_source(flags: &PackImage, source: &mut Source) -> Result<Packed> {
    let named = || format!("cannot write {}", flags.file.display());
    let excludes = Excludes::new(&flags.exclude, !flags.no_default_excludes, !flags.keep_identity)?;
    let folder = flags.file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(folder).with_context(named)?;
    // The tarball may lie inside the packed root. Its inode is skipped.
    let own = file.as_file().metadata().with_context(named)?;
    let out = file.as_file().try_clone().with_context(named)?;
    let compressor = Compressor::for_name(&flags.file, out, flags.level)?;

    let bar = byte_bar("packing", 0);
    count_bytes(&bar, "packing", 0);
    let mut walk = Walk {
        root: &source.root,
        shown: &source.shown,
        boot: source.boot.as_ref(),
        excludes: &excludes,
        tarball: Tarball::new(compressor),
        own: (own.dev(), own.ino()),
        cross: flags.cross_file_systems,
        links: Default::default(),
        entries: 0,
        bytes: 0,
        skipped: std::mem::take(&mut source.left_out),
        progress: &|done| bar.set_position(done),
    };
    walk.run()?;
    let Walk { tarball, entries, bytes, skipped, .. } = walk;
    tarball.finish().and_then(Compressor::finish).with_context(named)?;
    bar.finish_and_clear();
    // The tarball may contain files that only root may read.
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o600)).with_context(named)?;
    // Synced before the rename, so that a power cut leaves no empty file under the name.
    file.as_file().sync_all().with_context(named)?;
    let size = file.as_file().metadata().with_context(named)?.len();
    file.persist(&flags.file).with_context(named)?;
    Ok(Packed { file: flags.file.display().to_string(), size, entries, unpacked_bytes: bytes, skipped })
}
