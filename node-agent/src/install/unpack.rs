//! From the network to the root as one stream: checked chunks → decompression → unpacking, the last two each on a
//! blocking thread, with bounded channels between and no temporary file.

use std::io::{BufReader, Error, ErrorKind, Read, Result};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::InstallError;
use crate::download::{Download, DownloadError};
use crate::system::{Lease, System};

/// Bytes of a block between the stages.
const BLOCK: usize = 256 * 1024;
/// Blocks that wait between the stages.
const BLOCKS: usize = 8;
/// Memory that an xz stream may ask for; `xz -9` needs 65 MiB.
const XZ_MEMORY: u64 = 80 * 1024 * 1024;
/// Window that a zstd stream may ask for, as a power of two; `zstd --long` has this one.
const ZSTD_WINDOW: u32 = 27;
/// Well under the ten seconds that the watchdog allows.
const FEED: Duration = Duration::from_secs(4);

/// Told how many bytes of the download are used up.
type Progress = Box<dyn FnMut(u64) + Send>;
/// Why the download ended, when a stage further on only sees a read that failed.
type Cause = Arc<Mutex<Option<DownloadError>>>;

/// Unpacks a tarball into `root`. When the caller gives up (drops this), the threads stop at their next read; the lease
/// is held until they did.
pub(super) async fn unpack(
    download: Download,
    first: Option<Bytes>,
    root: PathBuf,
    lease: Lease,
    system: &dyn System,
    progress: Progress,
) -> std::result::Result<(), InstallError> {
    let Download { size_bytes, chunks, receiving: _receiving } = download;
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let cause = Cause::default();
    let raw = Chunks {
        current: first.unwrap_or_default(),
        chunks,
        left: size_bytes,
        total: size_bytes,
        progress,
        stop: stop.clone(),
        cause: Arc::clone(&cause),
    };
    let stopped = stop.clone();
    let (sender, blocks) = sync_channel(BLOCKS);
    let decompressing = tokio::task::spawn_blocking(move || decompress(raw, &sender));
    let mut unpacking = tokio::task::spawn_blocking(move || {
        let _lease = lease;
        marco_archive::unpack_tar(Blocks { blocks, current: Bytes::new(), stop: stopped }, &root, &mut |_| {})
    });
    let unpacked = loop {
        tokio::select! {
            // The timer loses nothing, and the task is polled again.
            unpacked = &mut unpacking => break unpacked,
            () = tokio::time::sleep(FEED) => system.feed_watchdog(),
        }
    };
    let ended = |error: tokio::task::JoinError| InstallError::io(format!("unpacking did not end: {error}"));
    let unpacked = unpacked.map_err(ended)?;
    if unpacked.is_err() {
        // What is left of the download is of no use any more.
        stop.cancel();
    }
    let decompressed = decompressing.await.map_err(ended)?;
    // What went wrong first explains what the stages behind it saw.
    if let Some(error) = cause.lock().unwrap_or_else(PoisonError::into_inner).take() {
        return Err(error.into());
    }
    match decompressed {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(InstallError::image(format!("the image cannot be decompressed: {error}")))
        }
        _ => Ok(unpacked.map(|_| ())?),
    }
}

/// Decompresses by the first bytes, hands blocks on, and reads the rest of the download even when the tarball has ended
/// before it: only at its end is the digest of the whole checked.
fn decompress(raw: Chunks, sender: &SyncSender<Result<Bytes>>) -> Result<()> {
    let mut raw = BufReader::with_capacity(BLOCK, raw);
    let magic: Vec<u8> = std::io::BufRead::fill_buf(&mut raw)?.iter().take(6).copied().collect();
    let outcome = match magic.as_slice() {
        [0x1f, 0x8b, ..] => pump(flate2::bufread::MultiGzDecoder::new(&mut raw), sender),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => {
            let flags = liblzma::stream::CONCATENATED;
            let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, flags).map_err(Error::other)?;
            pump(liblzma::bufread::XzDecoder::new_stream(&mut raw, stream), sender)
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(&mut raw)?;
            decoder.window_log_max(ZSTD_WINDOW)?;
            pump(decoder, sender)
        }
        _ => pump(&mut raw, sender),
    };
    let outcome = outcome.and_then(|()| std::io::copy(&mut raw, &mut std::io::sink()).map(|_| ()));
    if let Err(error) = &outcome {
        // The unpacker must not take a broken stream for a short one.
        let _ = sender.send(Err(Error::new(error.kind(), error.to_string())));
    }
    outcome
}

/// Until the end, or until the unpacker has seen the end of the tarball and went away.
fn pump(mut from: impl Read, sender: &SyncSender<Result<Bytes>>) -> Result<()> {
    loop {
        let mut block = Vec::with_capacity(BLOCK);
        let read = (&mut from).take(u64::try_from(BLOCK).unwrap_or(u64::MAX)).read_to_end(&mut block)?;
        if read == 0 || sender.send(Ok(block.into())).is_err() {
            return Ok(());
        }
    }
}

/// The checked chunks as a reader.
struct Chunks {
    current: Bytes,
    chunks: mpsc::Receiver<std::result::Result<Bytes, DownloadError>>,
    left: u64,
    total: u64,
    progress: Progress,
    stop: CancellationToken,
    cause: Cause,
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if self.stop.is_cancelled() {
            return Err(Error::new(ErrorKind::BrokenPipe, "the installation was given up"));
        }
        while self.current.is_empty() {
            match self.chunks.blocking_recv() {
                Some(Ok(chunk)) => self.current = chunk,
                // The end counts only when everything was there: a task that is gone is no end.
                None if self.left == 0 => return Ok(0),
                None => return Err(Error::new(ErrorKind::UnexpectedEof, "the download ended early")),
                Some(Err(error)) => {
                    let text = error.to_string();
                    *self.cause.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return Err(Error::other(text));
                }
            }
        }
        let count = self.current.len().min(buffer.len());
        if let Some(part) = buffer.get_mut(..count) {
            self.current.copy_to_slice(part);
        }
        self.left = self.left.saturating_sub(u64::try_from(count).unwrap_or_default());
        (self.progress)(self.total - self.left);
        Ok(count)
    }
}

/// The decompressed blocks as a reader.
struct Blocks {
    blocks: Receiver<Result<Bytes>>,
    current: Bytes,
    stop: CancellationToken,
}

impl Read for Blocks {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if self.stop.is_cancelled() {
            return Err(Error::new(ErrorKind::BrokenPipe, "the installation was given up"));
        }
        while self.current.is_empty() {
            match self.blocks.recv() {
                Ok(block) => self.current = block?,
                Err(_) => return Ok(0),
            }
        }
        let count = self.current.len().min(buffer.len());
        if let Some(part) = buffer.get_mut(..count) {
            self.current.copy_to_slice(part);
        }
        Ok(count)
    }
}
