//! From the network to the root as one stream: checked chunks → decompression → unpacking → the card, each stage on a
//! thread of its own, with bounded channels between and no temporary file.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::Duration;

use bytes::Bytes;
use marco_archive::Compression;
use tokio_util::sync::CancellationToken;

use super::stream::{Cause, Chunks, Progress, decompress, pipe};
use super::whole::{self, Place, Written};
use super::write_back::WriteBack;
use super::{InstallError, raw};
use crate::download::Download;
use crate::system::{Lease, RawTarget, System};

/// Interval of feeding the watchdog, well under the ten seconds that it allows.
const FEED: Duration = Duration::from_secs(4);

/// Target of an image.
pub(super) enum Destination {
    /// A tarball, into this folder.
    Folder(PathBuf),
    /// A whole-disk image, into these partitions.
    Partitions(RawTarget),
    /// A whole-disk image, onto the card as it is.
    Card(Place),
}

/// Unpacks an image. If the caller gives up (drops this), the threads stop at their next read; the lease is held until
/// they have.
pub(super) async fn unpack(
    download: Download,
    compression: Compression,
    first: Option<Bytes>,
    into: Destination,
    lease: Lease,
    system: &dyn System,
    progress: Progress,
) -> Result<Option<Written>, InstallError> {
    // `receiving` is kept: the download ends with it.
    let Download { size_bytes, chunks, receiving: _receiving, .. } = download;
    let stop = CancellationToken::new();
    // Also if this future is dropped, for example for another image.
    let _stop = stop.clone().drop_guard();
    let cause = Cause::default();
    let raw = Chunks::new(first, chunks, size_bytes, progress, stop.clone(), Cause::clone(&cause));
    let (sender, blocks) = pipe(stop.clone());
    let decompressing = tokio::task::spawn_blocking(move || decompress(raw, compression, &sender));
    let mut unpacking = tokio::task::spawn_blocking(move || {
        // The file systems must not be unmounted while this thread writes.
        let _lease = lease;
        let root = match into {
            Destination::Folder(root) => root,
            Destination::Partitions(target) => return raw::write(blocks, &target).map(|()| None),
            Destination::Card(card) => return whole::write(blocks, &card).map(Some),
        };
        let disk = |error| InstallError::disk("write to the card")(error);
        crate::step::at("unpack", &root, &[]).map_err(disk)?;
        let mut write_back = WriteBack::of_folder(&root).map_err(disk)?;
        let summary = marco_archive::unpack_tar(blocks, &root, &mut |bytes| write_back.unpacked(bytes))?;
        if summary.not_restored > 0 {
            tracing::warn!(count = summary.not_restored, "owners, devices or attributes of the image not restored");
        }
        write_back.finish().map_err(disk).map(|()| None)
    });
    let unpacked = loop {
        tokio::select! {
            // Cancel-safe: the timer starts again, and the task is polled again.
            unpacked = &mut unpacking => break unpacked,
            () = tokio::time::sleep(FEED) => system.feed_watchdog(),
        }
    };
    let ended = |error: tokio::task::JoinError| InstallError::io(format!("unpacking did not end: {error}"));
    let unpacked = unpacked.map_err(ended)?;
    if unpacked.is_err() {
        // The rest of the download is not needed.
        stop.cancel();
    }
    let decompressed = decompressing.await.map_err(ended)?;
    // The first failure explains those of the later stages.
    if let Some(error) = cause.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(error.into());
    }
    match decompressed {
        // A broken pipe is our own stop: then the unpacker has the reason.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(InstallError::image(format!("the image cannot be decompressed: {error}")))
        }
        _ => unpacked,
    }
}
