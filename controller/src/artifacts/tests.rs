use std::io::{Cursor, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use async_compression::tokio::write::{GzipEncoder, XzEncoder, ZstdEncoder};
use bytes::Bytes;
use marco_archive::{Compression, Reason};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;

use super::{ArtifactError, Artifacts, Content, Digest, MAX_SIZE, Packing, StoredBlob};

mod refused;

/// Incompressible bytes, the same in every run.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(len).collect()
}

/// The files that a system needs, without noise.
const SYSTEM: [(&str, &str); 5] = [
    ("sbin/init", "#!"),
    ("boot/firmware/config.txt", "#\n"),
    ("boot/firmware/cmdline.txt", "root=x"),
    ("boot/firmware/kernel8.img", "kernel"),
    ("boot/firmware/bcm2711-rpi-4-b.dtb", "tree"),
];
/// Bytes of those.
const SYSTEM_BYTES: u64 = 20;

fn tarball(len: usize) -> Vec<u8> {
    tarball_of(len, &SYSTEM)
}

fn tarball_of(len: usize, files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut append = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(bytes.len().try_into().unwrap());
        builder.append_data(&mut header, name, bytes).unwrap();
    };
    append("etc/noise", &noise(len));
    for (name, text) in files {
        append(name, text.as_bytes());
    }
    builder.into_inner().unwrap()
}

fn bootcode(without: &str) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, data) in [
        ("kernel8.img", "kernel"),
        ("cmdline.txt", "root=/dev/mmcblk0p2"),
        ("bcm2711-rpi-4-b.dtb", "tree"),
        ("overlays/README", "x"),
        ("overlays/overlay_map.dtb", "map"),
        ("initramfs8", "initramfs"),
        ("config.txt", "auto_initramfs=0\ninitramfs initramfs8 followkernel\n"),
    ] {
        if name != without {
            writer.start_file(name, zip::write::SimpleFileOptions::default()).unwrap();
            writer.write_all(data.as_bytes()).unwrap();
        }
    }
    writer.finish().unwrap().into_inner()
}

fn digest(data: &[u8]) -> Digest {
    Digest(Sha256::digest(data).into())
}

fn size(data: &[u8]) -> u64 {
    data.len().try_into().unwrap()
}

async fn push(store: &Artifacts, data: &[u8], content: Content) -> Result<StoredBlob, ArtifactError> {
    push_as(store, data, digest(data), content).await
}

async fn push_as(
    store: &Artifacts,
    data: &[u8],
    sha256: Digest,
    content: Content,
) -> Result<StoredBlob, ArtifactError> {
    let mut upload = store.begin(sha256, size(data)).await?;
    let rest = &data[usize::try_from(upload.offset()).unwrap()..];
    for part in rest.chunks(256 << 10) {
        upload.append(upload.offset(), Bytes::copy_from_slice(part)).await?;
    }
    upload.finish(content, |_| ()).await
}

fn fresh() -> (TempDir, Artifacts) {
    let dir = tempfile::tempdir().unwrap();
    let store = Artifacts::open(dir.path()).unwrap();
    (dir, store)
}

/// Files under the data directory.
fn files(dir: &Path) -> usize {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { files(&path) } else { 1 }).sum()
}

async fn compressed(compression: Compression, data: &[u8]) -> Vec<u8> {
    macro_rules! encode {
        ($encoder:ty) => {{
            let mut encoder = <$encoder>::new(Vec::new());
            encoder.write_all(data).await.unwrap();
            encoder.shutdown().await.unwrap();
            encoder.into_inner()
        }};
    }
    match compression {
        Compression::Gzip => encode!(GzipEncoder<Vec<u8>>),
        Compression::Xz => encode!(XzEncoder<Vec<u8>>),
        Compression::Zstd => encode!(ZstdEncoder<Vec<u8>>),
        Compression::None => data.to_vec(),
    }
}

#[tokio::test]
async fn a_stored_image_has_the_digests_of_its_bytes() {
    let (_dir, store) = fresh();
    let data = tarball((9 << 20) + 123);
    let blob = push(&store, &data, Content::Image).await.unwrap();
    assert_eq!((blob.sha256, blob.size, blob.packing), (digest(&data), size(&data), Packing::Tar(Compression::None)));
    assert_eq!((blob.entries, blob.unpacked_bytes), (6, (9 << 20) + 123 + SYSTEM_BYTES));
    assert_eq!(blob.facts.unwrap().refusal, None);
    let chunks: Vec<u8> = data.chunks(4 << 20).flat_map(|chunk| Sha256::digest(chunk).to_vec()).collect();
    assert_eq!(blob.chunk_sha256, chunks);
    let reader = store.reader(blob.sha256).await.unwrap();
    assert_eq!(reader.size(), size(&data));
    assert_eq!(reader.read_chunk(0, usize::MAX).await.unwrap(), data);
    assert_eq!(reader.read_chunk(size(&data) - 5, 100).await.unwrap(), data[data.len() - 5..]);
    assert!(reader.read_chunk(size(&data) + 5, 100).await.unwrap().is_empty());
}

#[tokio::test]
async fn every_compression_is_read_through() {
    let (_dir, store) = fresh();
    let data = tarball(300_000);
    for compression in [Compression::None, Compression::Gzip, Compression::Xz, Compression::Zstd] {
        let packed = compressed(compression, &data).await;
        let blob = push(&store, &packed, Content::Image).await.unwrap();
        assert_eq!((blob.packing, blob.unpacked_bytes), (Packing::Tar(compression), 300_000 + SYSTEM_BYTES));
    }
    let halves = data.split_at(1000);
    let members =
        [compressed(Compression::Gzip, halves.0).await, compressed(Compression::Gzip, halves.1).await].concat();
    push(&store, &members, Content::Image).await.expect("a file of several gzip members is one stream");
}

#[tokio::test]
async fn damaged_streams_are_refused_and_leave_nothing_behind() {
    let (dir, store) = fresh();
    let data = tarball(300_000);
    for compression in [Compression::None, Compression::Gzip, Compression::Xz, Compression::Zstd] {
        let packed = compressed(compression, &data).await;
        for cut in [1, 100, packed.len() / 2, packed.len() - 600, packed.len() - 1] {
            let error = push(&store, &packed[..cut], Content::Image).await.unwrap_err();
            assert!(matches!(error, ArtifactError::Refused(_)), "{compression:?} cut at {cut}: {error}");
        }
        // Zstandard's own checksum is optional, and left out by this encoder.
        if matches!(compression, Compression::Gzip | Compression::Xz) {
            let mut broken = packed.clone();
            broken[packed.len() / 2] ^= 0x10;
            let error = push(&store, &broken, Content::Image).await.unwrap_err();
            assert!(matches!(error, ArtifactError::Refused(_)), "{compression:?} broken: {error}");
        }
        let error = push(&store, &[&*packed, b"trailing"].concat(), Content::Image).await.unwrap_err();
        assert!(matches!(error, ArtifactError::Refused(_)), "{compression:?} with a tail: {error}");
    }
    assert_eq!(files(dir.path()), 0);
}

#[tokio::test]
async fn a_flipped_bit_is_found_by_the_digest() {
    let (dir, store) = fresh();
    let mut data = tarball(100_000);
    let announced = digest(&data);
    data[50_000] ^= 1;
    let error = push_as(&store, &data, announced, Content::Image).await.unwrap_err();
    assert!(matches!(error, ArtifactError::WrongDigest { expected, .. } if expected == announced), "{error}");
    assert_eq!(files(dir.path()), 0);
}

#[tokio::test]
async fn an_endless_upload_is_stopped_at_its_size() {
    let (_dir, store) = fresh();
    let data = tarball(10);
    let mut upload = store.begin(digest(&data), size(&data)).await.unwrap();
    upload.append(0, Bytes::from(data.clone())).await.unwrap();
    let error = upload.append(size(&data), Bytes::from_static(b"x")).await.unwrap_err();
    assert!(matches!(error, ArtifactError::TooLong(_)));
    for wrong in [0, MAX_SIZE + 1] {
        assert!(matches!(store.begin(digest(b"x"), wrong).await.unwrap_err(), ArtifactError::InvalidSize(_)));
    }
}

#[tokio::test]
async fn an_upload_goes_on_at_the_byte_where_it_was_cut() {
    let (dir, store) = fresh();
    let data = tarball(2000);
    let mut cuts = 0;
    let blob = loop {
        let mut upload = store.begin(digest(&data), size(&data)).await.unwrap();
        let at = usize::try_from(upload.offset()).unwrap();
        let part = &data[at..(at + 37).min(data.len())];
        upload.append(upload.offset(), Bytes::copy_from_slice(part)).await.unwrap();
        let wrong = upload.append(upload.offset() + 1, Bytes::from_static(b"x")).await.unwrap_err();
        assert!(matches!(wrong, ArtifactError::WrongOffset { .. }));
        let incomplete = upload.offset() < size(&data);
        match upload.finish(Content::Image, |_| ()).await {
            Err(ArtifactError::Incomplete { .. }) if incomplete => cuts += 1,
            other => break other.unwrap(),
        }
    };
    assert_eq!(cuts, (data.len() - 1) / 37);
    assert_eq!(store.reader(blob.sha256).await.unwrap().read_chunk(0, usize::MAX).await.unwrap(), data);
    assert_eq!(files(dir.path()), 1);
}

#[tokio::test]
async fn the_same_bytes_have_one_writer() {
    let (_dir, store) = fresh();
    let data = tarball(1000);
    let first = store.begin(digest(&data), size(&data)).await.unwrap();
    let second = store.begin(digest(&data), size(&data)).await.unwrap_err();
    assert!(matches!(second, ArtifactError::Busy));
    store.begin(digest(b"other"), 5).await.expect("other bytes are another matter");
    drop(first);
    push(&store, &data, Content::Image).await.unwrap();
}

#[tokio::test]
async fn many_pushes_of_the_same_bytes_end_with_one_file() {
    let (dir, store) = fresh();
    let data = tarball(100_000);
    let pushes = (0..8).map(|_| push(&store, &data, Content::Image));
    let mut stored = 0;
    for result in futures_util::future::join_all(pushes).await {
        match result {
            Ok(_) => stored += 1,
            Err(error) => assert!(matches!(error, ArtifactError::Busy), "{error}"),
        }
    }
    assert!(stored >= 1);
    assert_eq!(files(dir.path()), 1);
}

#[tokio::test]
async fn bytes_that_are_stored_are_not_sent_again_but_checked_again() {
    let (dir, store) = fresh();
    let data = tarball(1000);
    let first = push(&store, &data, Content::Image).await.unwrap();
    let upload = store.begin(digest(&data), size(&data)).await.unwrap();
    assert_eq!(upload.offset(), size(&data));
    assert_eq!(upload.finish(Content::Image, |_| ()).await.unwrap(), first);
    drop(upload);
    push(&store, &data, Content::SystemBootcode).await.expect_err("a tarball is no bootcode");
    store.reader(digest(&data)).await.expect("and stays an image");
    let error = store.begin(digest(&data), size(&data) + 1).await.unwrap_err();
    assert!(matches!(error, ArtifactError::WrongSize { .. }));
    // Bytes that the disk damaged are brought back by the next push.
    let path = store.blob(digest(&data));
    std::fs::write(&path, vec![0; data.len()]).unwrap();
    assert!(matches!(push(&store, &data, Content::Image).await.unwrap_err(), ArtifactError::WrongDigest { .. }));
    push(&store, &data, Content::Image).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), data);
    assert_eq!(files(dir.path()), 1);
}

#[tokio::test]
async fn stale_uploads_are_swept_and_those_under_way_are_not() {
    let (dir, store) = fresh();
    for (data, cut) in [(tarball(1000), true), (tarball(2000), false)] {
        let mut upload = store.begin(digest(&data), size(&data)).await.unwrap();
        upload.append(0, Bytes::from_static(&[0; 100])).await.unwrap();
        if cut {
            drop(upload);
            assert_eq!(store.sweep(SystemTime::now() - Duration::from_secs(3600)).await.unwrap(), 0);
        } else {
            assert_eq!(store.sweep(SystemTime::now() + Duration::from_secs(3600)).await.unwrap(), 1);
            assert_eq!(files(dir.path()), 1);
        }
    }
}

#[tokio::test]
async fn removed_bytes_are_gone_but_for_those_who_read_them() {
    let (_dir, store) = fresh();
    let data = tarball(1000);
    push(&store, &data, Content::Image).await.unwrap();
    let reader = store.reader(digest(&data)).await.unwrap();
    assert!(store.remove(digest(&data)).await.unwrap());
    assert!(!store.remove(digest(&data)).await.unwrap());
    assert_eq!(reader.read_chunk(0, usize::MAX).await.unwrap(), data);
    assert!(matches!(store.reader(digest(&data)).await.unwrap_err(), ArtifactError::NotFound(_)));
}

#[tokio::test]
async fn image_that_is_no_system_is_refused_and_leaves_nothing() {
    let (dir, store) = fresh();
    let data = tarball_of(1000, &SYSTEM[..3]);
    let error = push(&store, &data, Content::Image).await.unwrap_err().to_string();
    assert!(error.contains("a kernel") && error.contains("device tree"), "{error}");
    assert_eq!(files(dir.path()), 0);
    // An image of older rules is copied from another controller and examined when it is used.
    push(&store, &data, Content::KnownImage).await.unwrap();
    assert!(store.judge(digest(&data)).await.unwrap().refusal.unwrap().contains("a kernel"));
    assert!(matches!(store.judge(digest(b"x")).await.unwrap_err(), ArtifactError::NotFound(_)));
}

#[tokio::test]
async fn bytes_that_a_push_relies_on_are_not_removed() {
    let (_dir, store) = fresh();
    let data = tarball(1000);
    let sha256 = digest(&data);
    let mut staged = store.begin(sha256, size(&data)).await.unwrap();
    staged.append(0, Bytes::from(data.clone())).await.unwrap();
    staged.finish(Content::Image, |_| ()).await.unwrap();
    // The bytes are stored, and their row is not committed yet.
    assert!(!store.remove(sha256).await.unwrap());
    drop(staged);
    let (one, two) = (store.begin(sha256, size(&data)).await.unwrap(), store.begin(sha256, size(&data)).await.unwrap());
    assert!(!store.remove(sha256).await.unwrap());
    drop((one, two));
    assert!(!store.remove_if(sha256, async { Ok::<_, ArtifactError>(false) }).await.unwrap(), "it is needed");
    assert!(store.remove(sha256).await.unwrap());
    let begun = store.begin(sha256, size(&data)).await.unwrap();
    assert_eq!(begun.offset(), 0, "a push that comes after wants the bytes again");
}

#[tokio::test]
async fn push_and_removal_never_end_with_a_push_without_bytes() {
    let (_dir, store) = fresh();
    let data = tarball(50_000);
    let sha256 = digest(&data);
    for _ in 0..30 {
        let pushed = async {
            let mut upload = store.begin(sha256, size(&data)).await?;
            let at = usize::try_from(upload.offset()).unwrap();
            upload.append(upload.offset(), Bytes::copy_from_slice(&data[at..])).await?;
            upload.finish(Content::Image, |_| ()).await?;
            // The row is committed now: the bytes must be there.
            Ok::<_, ArtifactError>(store.reader(sha256).await.map(|_| ()))
        };
        let removed = async {
            for _ in 0..20 {
                store.remove(sha256).await.unwrap();
                tokio::task::yield_now().await;
            }
        };
        match tokio::join!(pushed, removed).0 {
            Ok(there) => there.unwrap(),
            Err(error) => assert!(matches!(error, ArtifactError::Busy), "{error}"),
        }
    }
}

async fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzipEncoder::new(Vec::new());
    encoder.write_all(bytes).await.unwrap();
    encoder.shutdown().await.unwrap();
    encoder.into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_under_way_ends_when_the_controller_stops() {
    let dir = tempfile::tempdir().unwrap();
    let stop = tokio_util::sync::CancellationToken::new();
    let store = Artifacts::open(dir.path()).unwrap().stopping(stop.clone());
    // A few bytes that unpack to many; reading them all takes far longer.
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").unwrap();
    header.set_size(32 << 30);
    header.set_cksum();
    let mut data = packed(header.as_bytes()).await;
    data.extend(packed(&vec![0; 64 << 20]).await.repeat(512));
    let mut upload = store.begin(digest(&data), size(&data)).await.unwrap();
    upload.append(0, Bytes::from(data.clone())).await.unwrap();
    let stopping = stop.clone();
    let begun = std::time::Instant::now();
    let checked = upload.finish(Content::Image, move |_| stopping.cancel()).await;
    assert!(matches!(checked, Err(ArtifactError::Stopping)), "{checked:?}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    drop(upload);
    assert_eq!(store.begin(digest(&data), size(&data)).await.unwrap().offset(), size(&data), "what came is kept");
}

#[tokio::test]
async fn stored_files_are_listed_with_their_age() {
    let (dir, store) = fresh();
    let data = tarball(10);
    push(&store, &data, Content::Image).await.unwrap();
    std::fs::write(dir.path().join("artifacts/sha256/stray"), "nobody's").unwrap();
    let found = store.stored().await.unwrap();
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), [digest(&data)]);
    assert!(found.values().all(|time| *time <= SystemTime::now() + Duration::from_secs(1)));
}

#[test]
fn a_digest_is_lower_case_hexadecimal() {
    let text = digest(b"x").to_string();
    assert_eq!(Digest::parse(&text).unwrap(), digest(b"x"));
    for bad in ["", "../../etc/passwd", &text.to_uppercase(), text.trim_start_matches(|_| true), &text.repeat(2)] {
        assert!(Digest::parse(bad).is_err(), "{bad}");
    }
}
