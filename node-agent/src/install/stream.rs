//! The stages between the network and the disk: checked chunks as a reader, decompression on a thread of its own, and
//! its blocks as a reader again. Nothing is copied on the way that need not be.

use std::io::{BufRead, Error, ErrorKind, Read, Result, copy, sink};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf as _, Bytes};
use marco_archive::Compression;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::download::DownloadError;

/// Bytes of a block between the stages.
const BLOCK: usize = 256 * 1024;
/// Blocks that wait between the stages.
const BLOCKS: usize = 8;

/// Receives the number of bytes of the download that are used up.
pub(super) type Progress = Box<dyn FnMut(u64) + Send>;
/// Error that ended the download: later stages only see a read that failed.
pub(super) type Cause = Arc<Mutex<Option<DownloadError>>>;

/// Creates the channel for decompressed blocks, and the one on which used blocks go back.
pub(super) fn pipe(stop: CancellationToken) -> (Sender, Blocks) {
    let (sender, blocks) = sync_channel(BLOCKS);
    // Room for all blocks: those that wait, the one that is filled, and the one that is read.
    let (used, free) = sync_channel(BLOCKS + 2);
    (Sender { sender, free }, Blocks { blocks, used, current: Block::default(), at: 0, stop })
}

/// Decompresses, hands blocks on, and reads the rest of the download even when the archive has ended
/// before it: only at its end is the digest of the whole checked.
pub(super) fn decompress(mut raw: Chunks, compression: Compression, sender: &Sender) -> Result<()> {
    let outcome = decompress_all(&mut raw, compression, sender).and_then(|()| copy(&mut raw, &mut sink()).map(|_| ()));
    if let Err(error) = &outcome {
        // The unpacker must not take a broken stream for a short one.
        let _ = sender.sender.send(Err(Error::new(error.kind(), error.to_string())));
    }
    outcome
}

fn decompress_all(raw: &mut Chunks, compression: Compression, sender: &Sender) -> Result<()> {
    let outcome = compression.decoder(raw).and_then(|decoder| sender.pump(decoder));
    // A decoder's own words do not say what to do about a window that is too large.
    outcome.map_err(|error| match compression.explain_window(&error.to_string()) {
        Some(window) => Error::new(ErrorKind::InvalidData, window),
        None => error,
    })
}

/// A block, filled as far as `length`.
#[derive(Default)]
struct Block {
    bytes: Vec<u8>,
    length: usize,
}

/// The end of the pipe that decompresses.
pub(super) struct Sender {
    sender: SyncSender<Result<Block>>,
    free: Receiver<Vec<u8>>,
}

impl Sender {
    /// Hands blocks on until the input ends, or until the unpacker has seen the archive's end and went away.
    fn pump(&self, mut from: impl Read) -> Result<()> {
        loop {
            let mut bytes = self.free.try_recv().unwrap_or_else(|_| vec![0; BLOCK]);
            let mut length = 0;
            while let Some(rest) = bytes.get_mut(length..).filter(|rest| !rest.is_empty()) {
                match from.read(rest) {
                    Ok(0) => break,
                    Ok(read) => length += read,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            if length == 0 || self.sender.send(Ok(Block { bytes, length })).is_err() {
                return Ok(());
            }
        }
    }
}

/// The checked chunks as a reader.
pub(super) struct Chunks {
    current: Bytes,
    chunks: mpsc::Receiver<std::result::Result<Bytes, DownloadError>>,
    left: u64,
    total: u64,
    progress: Progress,
    stop: CancellationToken,
    cause: Cause,
}

impl Chunks {
    /// Creates the reader of a download of `total` bytes, whose first chunk was taken off already.
    pub(super) fn new(
        first: Option<Bytes>,
        chunks: mpsc::Receiver<std::result::Result<Bytes, DownloadError>>,
        total: u64,
        progress: Progress,
        stop: CancellationToken,
        cause: Cause,
    ) -> Self {
        Self { current: first.unwrap_or_default(), chunks, left: total, total, progress, stop, cause }
    }
}

impl BufRead for Chunks {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        given_up(&self.stop)?;
        while self.current.is_empty() {
            // Frees the used chunk before the wait: chunks are most of an installer's memory.
            self.current = Bytes::new();
            match self.chunks.blocking_recv() {
                Some(Ok(chunk)) => self.current = chunk,
                // A closed channel is the end only after all bytes; otherwise the task of the download is gone.
                None if self.left == 0 => break,
                None => return Err(Error::new(ErrorKind::UnexpectedEof, "the download ended early")),
                Some(Err(error)) => {
                    let text = error.to_string();
                    *self.cause.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return Err(Error::other(text));
                }
            }
        }
        // In pieces, for progress: a decoder takes everything that it gets at once.
        Ok(self.current.get(..BLOCK.min(self.current.len())).unwrap_or_default())
    }

    fn consume(&mut self, count: usize) {
        self.current.advance(count.min(self.current.len()));
        self.left = self.left.saturating_sub(u64::try_from(count).unwrap_or_default());
        (self.progress)(self.total - self.left);
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        read(self, buffer)
    }
}

/// The end of the pipe that unpacks.
pub(super) struct Blocks {
    blocks: Receiver<Result<Block>>,
    used: SyncSender<Vec<u8>>,
    current: Block,
    at: usize,
    stop: CancellationToken,
}

impl BufRead for Blocks {
    fn fill_buf(&mut self) -> Result<&[u8]> {
        given_up(&self.stop)?;
        if self.at == self.current.length {
            let used = std::mem::take(&mut self.current);
            self.at = 0;
            if !used.bytes.is_empty() {
                // An error: the decompressor has ended, and needs no more blocks.
                let _ = self.used.try_send(used.bytes);
            }
            // A closed channel is the end: a failure is sent as an error before it.
            if let Ok(block) = self.blocks.recv() {
                self.current = block?;
            }
        }
        Ok(self.current.bytes.get(self.at..self.current.length).unwrap_or_default())
    }

    fn consume(&mut self, count: usize) {
        self.at = self.current.length.min(self.at + count);
    }
}

impl Read for Blocks {
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        read(self, buffer)
    }
}

fn read(from: &mut impl BufRead, buffer: &mut [u8]) -> Result<usize> {
    let mut ready = from.fill_buf()?;
    let count = ready.read(buffer)?;
    from.consume(count);
    Ok(count)
}

fn given_up(stop: &CancellationToken) -> Result<()> {
    if stop.is_cancelled() {
        // `unpack` tells by this kind that the image is not to blame.
        return Err(Error::new(ErrorKind::BrokenPipe, "the installation was given up"));
    }
    Ok(())
}
