//! One pass over an artifact's bytes. One thread computes the digests, another decompresses and checks the archive, and
//! a bounded pipe connects them.

use std::fs::File;
use std::io::{self, BufRead as _, Read, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::thread;

use bytes::Bytes;
use marco_archive::{Compression, Examined, Facts, Reason, Refused};
use marco_proto::names::CHUNK_SIZE;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::io::{StreamReader, SyncIoBridge};
use tokio_util::sync::CancellationToken;

use super::{ArtifactError, Content, Digest, Packing, StoredBlob, failed};

/// Bytes of a block in the pipe.
const BLOCK: usize = 256 << 10;
/// Blocks in the pipe: 2 MiB.
const PIPE: usize = 8;

/// Computes the digests and checks the contents. Must run on a blocking thread of the runtime. Temporary data goes into
/// unnamed files in the folder `scratch`.
pub(super) fn check(
    file: &File,
    scratch: &Path,
    expected: Digest,
    size: u64,
    content: Content,
    stop: &CancellationToken,
    progress: &impl Fn(u64),
) -> Result<StoredBlob, ArtifactError> {
    // Bounded: the slower side sets the pace, and memory does not grow with the image.
    let (sender, receiver) = mpsc::channel(PIPE);
    // Scoped threads: they borrow the file and never outlive the check.
    let (digests, checked) = thread::scope(|scope| {
        let hasher = scope.spawn(move || hash(file, size, &sender, stop));
        let checked = match content {
            Content::Image | Content::KnownImage => check_image(receiver, scratch, stop, progress),
            Content::InstallerBootcode | Content::SystemBootcode => {
                // A zip is read from its end, so it is read from the file and not from the pipe.
                drop(receiver);
                check_bootcode(file, content, stop)
            }
        };
        (hasher.join(), checked)
    });
    let (got, chunk_sha256) =
        digests.unwrap_or_else(|_| Err(failed("compute a digest")(io::Error::other("the thread panicked"))))?;
    if stop.is_cancelled() {
        return Err(ArtifactError::Stopping);
    }
    // The digest goes first, because it explains the rest: contents with other bytes than announced cannot be right.
    if got != expected {
        return Err(ArtifactError::WrongDigest { expected, got });
    }
    let (packing, entries, unpacked_bytes, facts) = checked?;
    // Only at a push: a stored image may be older than the rules.
    let refusal = facts.as_ref().and_then(|facts| facts.refusal.clone()).filter(|_| content == Content::Image);
    if let Some(refusal) = refusal {
        return Err(Refused { entry: None, reason: Reason::NotASystem(refusal) }.into());
    }
    Ok(StoredBlob { sha256: got, size, chunk_size: CHUNK_SIZE, chunk_sha256, unpacked_bytes, entries, packing, facts })
}

type Checked = Result<(Packing, u64, u64, Option<Facts>), ArtifactError>;

/// Reads the file once, for the digest of the whole and of each chunk. Blocks go down the pipe while it has a reader.
fn hash(
    file: &File,
    size: u64,
    pipe: &mpsc::Sender<io::Result<Bytes>>,
    stop: &CancellationToken,
) -> Result<(Digest, Vec<u8>), ArtifactError> {
    let (mut whole, mut chunk) = (Sha256::new(), Sha256::new());
    let mut chunks = Vec::new();
    let chunk_size = u64::from(CHUNK_SIZE);
    let mut offset = 0;
    while offset < size {
        if stop.is_cancelled() {
            return Err(ArtifactError::Stopping);
        }
        let left = (size - offset).min(chunk_size - offset % chunk_size);
        let mut block = vec![0; usize::try_from(left).unwrap_or(usize::MAX).min(BLOCK)];
        file.read_exact_at(&mut block, offset).map_err(failed("read an upload"))?;
        whole.update(&block);
        chunk.update(&block);
        offset += u64::try_from(block.len()).unwrap_or(u64::MAX);
        if offset % chunk_size == 0 || offset == size {
            // In the same pass: a second one over a large image costs minutes on a slow disk.
            chunks.extend_from_slice(&chunk.finalize_reset());
        }
        // A reader that has refused the contents is gone; the digest is needed all the same.
        let _ = pipe.blocking_send(Ok(block.into()));
    }
    Ok((Digest(whole.finalize().into()), chunks))
}

fn check_image(
    receiver: mpsc::Receiver<io::Result<Bytes>>,
    scratch: &Path,
    stop: &CancellationToken,
    progress: &impl Fn(u64),
) -> Checked {
    let source = StreamReader::new(ReceiverStream::new(receiver));
    // A bridge to blocking reads: the archive's readers are synchronous.
    let mut source = SyncIoBridge::new_with_handle(source, Handle::current());
    let compression = Compression::detect(source.fill_buf().map_err(failed("read an upload"))?);
    let inner = compression.decoder(source).map_err(failed("decompress an upload"))?;
    let inner = Stoppable { inner, stop };
    let mut reader = io::BufReader::with_capacity(BLOCK, Explained { inner, compression, window: None });
    let checked = marco_archive::examine_image(&mut reader, Some(scratch), &mut |done| progress(done));
    match (checked, reader.get_ref().window) {
        (Ok(Examined { summary, facts }), _) => {
            let packing = if summary.disk { Packing::Disk(compression) } else { Packing::Tar(compression) };
            Ok((packing, summary.entries, summary.unpacked_bytes, Some(facts)))
        }
        (Err(_), Some(window)) => Err(ArtifactError::Format(format!("the image is refused: {window}"))),
        (Err(marco_archive::Error::Refused(refused)), None) => Err(refused.into()),
        (Err(marco_archive::Error::Io { action, source }), None) => Err(ArtifactError::Io { action, source }),
    }
}

/// Reads until the controller stops. Also checked between outputs, because a little input may become much output.
struct Stoppable<'a, R> {
    inner: R,
    stop: &'a CancellationToken,
}

impl<R: Read> Read for Stoppable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.inner.read(buffer)
    }
}

impl<R: io::Seek> io::Seek for Stoppable<'_, R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.inner.seek(to)
    }
}

/// The decompressed bytes. An error means that the compressed data is bad: errors of the disk end the digest first.
struct Explained<R> {
    inner: R,
    compression: Compression,
    /// Advice about a decompression window that is too large; `None`: it was not the problem.
    window: Option<&'static str>,
}

impl<R: Read> Read for Explained<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buffer).map_err(|error| match error.kind() {
            // These two have a meaning for the caller; a new kind would hide it.
            io::ErrorKind::UnexpectedEof | io::ErrorKind::Interrupted => error,
            _ => {
                let name = self.compression.as_str();
                let error = error.to_string();
                self.window = self.compression.explain_window(&error);
                io::Error::new(io::ErrorKind::InvalidData, format!("the {name} stream cannot be read: {error}"))
            }
        })
    }
}

fn check_bootcode(mut file: &File, content: Content, stop: &CancellationToken) -> Checked {
    file.seek(SeekFrom::Start(0)).map_err(failed("read an upload"))?;
    let summary = match marco_archive::check_zip(Stoppable { inner: file, stop }) {
        Ok(summary) => summary,
        Err(marco_archive::Error::Refused(refused)) => return Err(refused.into()),
        Err(marco_archive::Error::Io { action, source }) => return Err(ArtifactError::Io { action, source }),
    };
    match content {
        Content::InstallerBootcode => marco_archive::check_installer_set(&summary)?,
        Content::SystemBootcode => marco_archive::check_system_set(&summary)?,
        Content::Image | Content::KnownImage => {
            return Err(Refused { entry: None, reason: Reason::Damaged("a zip is no image".to_owned()) }.into());
        }
    }
    Ok((Packing::Zip, summary.entries, summary.unpacked_bytes, None))
}
