//! `marcoctl artifacts push`: hashes a file, sends the missing bytes and waits for the check, over any number of
//! connections.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use indicatif::ProgressBar;
use marco_proto::names::{ArtifactId, MESSAGE_SIZE};
use marco_proto::v1::upload_artifact_request::Part as Sent;
use marco_proto::v1::upload_artifact_response::Part as Answer;
use marco_proto::v1::{Artifact, Chunk, UploadArtifactRequest, UploadHeader, artifact};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::kind_of;
use crate::args::{Kind, Purpose, Push};
use crate::connect::Connection;
use crate::failure::{Failure, is_cut};
use crate::progress::{byte_bar, count_bytes};

/// First and longest pause between two attempts. With the default number of attempts they outlast a controller's
/// restart.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// Messages in the channel: enough to keep the disk busy, and 1 MiB of memory.
const WAITING: usize = 4;
/// Bytes read at once while hashing.
const HASH_BLOCK: usize = 1024 * 1024;
/// Timeout for the controller's first answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Checks the arguments before anything is read or sent.
pub(super) fn check(flags: &Push) -> Result<(), Failure> {
    let unusable = |message: String| Failure::Usage { message, hint: String::new() };
    let facts = std::fs::metadata(&flags.file)
        .map_err(|error| unusable(format!("cannot read {}: {error}", flags.file.display())))?;
    if !facts.is_file() {
        return Err(unusable(format!("{} is not a file", flags.file.display())));
    }
    if flags.kind == Kind::Image && flags.purpose.is_some() {
        return Err(unusable("an image has no --purpose; only a bootcode has".to_owned()));
    }
    name_of(flags).map(|_| ())
}

/// Stores the file.
pub(super) async fn push(flags: &Push, connection: &Connection) -> Result<Artifact, Failure> {
    // The digest comes first: the controller answers with the offset up to which it already has the bytes.
    let (size_bytes, sha256) = hash(flags).await?;
    let purpose = match (flags.kind, flags.purpose) {
        (Kind::Image, _) => artifact::Purpose::Unspecified,
        (Kind::Bootcode, Some(Purpose::System)) => artifact::Purpose::System,
        (Kind::Bootcode, Some(Purpose::Installer) | None) => artifact::Purpose::Installer,
    };
    let header = UploadHeader {
        name: name_of(flags)?.name(),
        kind: kind_of(flags.kind).into(),
        purpose: purpose.into(),
        size_bytes,
        sha256,
    };
    let bar = byte_bar("sending", size_bytes);
    let artifact = send_until_stored(flags, &header, connection, &bar).await;
    bar.finish_and_clear();
    artifact
}

async fn send_until_stored(
    flags: &Push,
    header: &UploadHeader,
    connection: &Connection,
    bar: &ProgressBar,
) -> Result<Artifact, Failure> {
    let mut reached = 0;
    let mut fruitless = 0;
    let mut pause = PAUSES.0;
    loop {
        let status = match send_once(flags, header, connection, bar).await? {
            Attempt::Stored(artifact) => return Ok(*artifact),
            Attempt::Cut { status, offset } => {
                // The first answer is the controller's offset. Only bytes that the controller has count as progress.
                if offset > reached {
                    reached = offset;
                    fruitless = 0;
                    pause = PAUSES.0;
                }
                status
            }
        };
        fruitless += 1;
        if fruitless >= flags.tries {
            return Err(Failure::Unreachable {
                message: format!(
                    "{fruitless} attempts in a row got no further than byte {reached} of {}: {}",
                    header.size_bytes,
                    status.message()
                ),
                hint: "start the same push again later; it goes on where this one stopped".to_owned(),
            });
        }
        // A push over a bad link may pause for seconds. The bar must not look stuck.
        bar.set_message("waiting");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

enum Attempt {
    Stored(Box<Artifact>),
    Cut { status: Status, offset: u64 },
}

/// Runs one stream: header, offset, bytes, check.
async fn send_once(
    flags: &Push,
    header: &UploadHeader,
    connection: &Connection,
    bar: &ProgressBar,
) -> Result<Attempt, Failure> {
    let (sender, receiver) = mpsc::channel(WAITING);
    // The channel is empty and has room for four messages.
    let first = UploadArtifactRequest { part: Some(Sent::Header(header.clone())) };
    // The controller answers only after the header, so it must be in the channel before the call starts.
    sender.try_send(first).map_err(|_| anyhow!("the header could not be sent"))?;

    let mut client = connection.artifacts();
    let call = client.upload_artifact(ReceiverStream::new(receiver));
    let mut answers = match tokio::time::timeout(ANSWER_TIMEOUT, call).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) if may_go_on(&status) => return Ok(Attempt::Cut { status, offset: 0 }),
        Ok(Err(status)) => return Err(status.into()),
        Err(_) => return Ok(Attempt::Cut { status: Status::unavailable("the controller does not answer"), offset: 0 }),
    };

    let mut sender = Some(sender);
    let mut feeding = None;
    // Zero until the controller answers, which counts as no progress.
    let mut begun_at = 0;
    let outcome = loop {
        let answer = match answers.message().await {
            Ok(Some(answer)) => answer.part,
            Ok(None) => break Err(Status::unavailable("the controller ended the stream early")),
            Err(status) => break Err(status),
        };
        match answer {
            Some(Answer::Offset(offset)) => {
                // Only the first offset starts the sending. `take` also closes the stream at the end of the file.
                if let Some(sender) = sender.take() {
                    begun_at = offset;
                    bar.set_message("sending");
                    bar.set_position(offset);
                    // The skipped bytes took no time and would falsify the estimate.
                    bar.reset_eta();
                    let file = tokio::fs::File::from_std(open(&flags.file, offset)?);
                    feeding = Some(tokio::spawn(feed(file, offset..header.size_bytes, sender, bar.clone())));
                }
            }
            Some(Answer::CheckedBytes(done)) => count_bytes(bar, "checking", done),
            Some(Answer::Artifact(artifact)) => break Ok(artifact),
            None => {}
        }
    };
    drop(answers);
    // An unreadable or changed file is a better explanation than the controller's error about the bytes.
    if let Some(feeding) = feeding {
        // The stream is over, so the rest of the file is not needed.
        feeding.abort();
        match feeding.await {
            Ok(fed) => fed?,
            Err(error) if error.is_cancelled() => {}
            Err(error) => return Err(anyhow!(error).context("sending was interrupted").into()),
        }
    }
    match outcome {
        Ok(artifact) => Ok(Attempt::Stored(Box::new(artifact))),
        Err(status) if may_go_on(&status) => Ok(Attempt::Cut { status, offset: begun_at }),
        Err(status) => Err(status.into()),
    }
}

/// Returns true if the upload can be resumed. ABORTED: the controller still holds the broken stream as the writer.
fn may_go_on(status: &Status) -> bool {
    is_cut(status) || status.code() == Code::Aborted
}

fn open(path: &Path, offset: u64) -> anyhow::Result<File> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    file.seek(SeekFrom::Start(offset)).with_context(|| format!("cannot read {} from byte {offset}", path.display()))?;
    Ok(file)
}

/// Reads the file into the channel. Errors are about the file. A broken stream is not an error here.
async fn feed(
    mut file: tokio::fs::File,
    range: Range<u64>,
    sender: mpsc::Sender<UploadArtifactRequest>,
    bar: ProgressBar,
) -> anyhow::Result<()> {
    let mut offset = range.start;
    while offset < range.end {
        let wanted = usize::try_from(range.end - offset).unwrap_or(usize::MAX).min(MESSAGE_SIZE);
        let mut block = vec![0; wanted];
        file.read_exact(&mut block).await.map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => anyhow!("the file became shorter while it was sent"),
            _ => anyhow!(error).context("the file cannot be read"),
        })?;
        let chunk = Chunk { offset, data: Bytes::from(block) };
        // The receiver is gone with the stream, and the stream's own status tells the reason.
        if sender.send(UploadArtifactRequest { part: Some(Sent::Chunk(chunk)) }).await.is_err() {
            return Ok(());
        }
        offset += u64::try_from(wanted)?;
        bar.set_position(offset);
    }
    Ok(())
}

/// Returns size and SHA-256 of the file.
async fn hash(flags: &Push) -> Result<(u64, String), Failure> {
    let path = flags.file.clone();
    // Hashing blocks, and gigabytes take minutes.
    let work = move || {
        let mut file = open(&path, 0)?;
        let bar = byte_bar("hashing", file.metadata().map(|facts| facts.len()).unwrap_or(0));
        let mut digest = Sha256::new();
        let mut block = vec![0; HASH_BLOCK];
        let mut size = 0;
        loop {
            let read = match file.read(&mut block) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
            };
            digest.update(block.get(..read).context("more was read than asked for")?);
            size += u64::try_from(read)?;
            bar.set_position(size);
        }
        bar.finish_and_clear();
        Ok((size, hex::encode(digest.finalize())))
    };
    let hashed: anyhow::Result<_> = tokio::task::spawn_blocking(work).await.context("hashing was interrupted")?;
    Ok(hashed?)
}

/// Returns the id under which the file is stored.
fn name_of(flags: &Push) -> Result<ArtifactId, Failure> {
    let text = match &flags.name {
        Some(name) => name.clone(),
        None => {
            let file = flags.file.file_name().unwrap_or_default().to_string_lossy();
            default_name(&file).to_owned()
        }
    };
    ArtifactId::parse(&text)
        .map_err(|error| Failure::Usage { message: error.to_string(), hint: "choose a name with --name ID".to_owned() })
}

/// Strips `.tar`, `.tar.*`, `.tgz`, `.zip` or `.img*` from a file's name.
fn default_name(file: &str) -> &str {
    let lower = file.to_ascii_lowercase();
    let stem = lower
        .strip_suffix(".tgz")
        .or_else(|| lower.strip_suffix(".zip"))
        .or_else(|| lower.strip_suffix(".tar"))
        .or_else(|| one_more_suffix(&lower, ".tar."))
        .or_else(|| image_stem(&lower));
    // ASCII lower case keeps the position of every byte, so the length also fits the original name.
    stem.filter(|stem| !stem.is_empty()).and_then(|stem| file.get(..stem.len())).unwrap_or(file)
}

/// Strips `.tar.` and the single suffix that follows it.
fn one_more_suffix<'a>(file: &'a str, before: &str) -> Option<&'a str> {
    let (stem, suffix) = file.rsplit_once(before)?;
    (!suffix.is_empty() && !suffix.contains('.')).then_some(stem)
}

/// Strips `.img` with its suffix: `.img`, `.imgz`, `.img.xz` and the like.
fn image_stem(file: &str) -> Option<&str> {
    let (stem, rest) = file.rsplit_once(".img")?;
    (!rest.strip_prefix('.').unwrap_or(rest).contains('.')).then_some(stem)
}

#[cfg(test)]
mod tests {
    use super::default_name;

    #[test]
    fn the_default_name_is_the_files_without_what_says_how_it_is_packed() {
        for (file, name) in [
            ("raspios-lite.tar", "raspios-lite"),
            ("raspios-lite.tar.gz", "raspios-lite"),
            ("raspios-lite.tar.zst", "raspios-lite"),
            ("raspios-lite.TAR.XZ", "raspios-lite"),
            ("raspios.tgz", "raspios"),
            ("boot-6.12.zip", "boot-6.12"),
            ("2030-01-01.img", "2030-01-01"),
            ("2030-01-01.img.xz", "2030-01-01"),
            ("2030-01-01.imgz", "2030-01-01"),
            ("ArchLinuxARM-rpi-2-latest.tar.gz", "ArchLinuxARM-rpi-2-latest"),
            ("kernel-6.12", "kernel-6.12"),
            ("a.tar.b.tar.gz", "a.tar.b"),
            (".zip", ".zip"),
        ] {
            assert_eq!(default_name(file), name, "{file}");
        }
    }
}
