//! A bad network and bad files: cut downloads, broken uploads, hostile archives.

use std::path::Path;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use integration_tests::client::reason;
use integration_tests::fleet::update;
use integration_tests::hostile;
use integration_tests::image::{Compression, lay_out_root, noise, pack, sha256};
use integration_tests::proxy::Direction;
use integration_tests::tree::{compare_with_source, list};
use integration_tests::upload::{Upload, header, push, upload};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::names::{CHUNK_SIZE, MESSAGE_SIZE};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{ListArtifactsRequest, UploadHeader};
use tonic::Code;

const MIB: u64 = 1024 * 1024;

/// All files that the controller keeps of artifacts, complete and staged.
fn kept(fleet: &Fleet) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for folder in ["artifacts", "staging"] {
        let folder = fleet.data().join(folder);
        if folder.exists() {
            files.extend(
                list(&folder)?
                    .into_iter()
                    .filter(|path| folder.join(path).is_file())
                    .map(|path| path.display().to_string()),
            );
        }
    }
    Ok(files)
}

async fn nothing_is_left(fleet: &Fleet, what: &str) -> Result<()> {
    let left = kept(fleet)?;
    assert!(left.is_empty(), "{what} left something behind: {left:?}");
    let listed = fleet.artifacts().list_artifacts(ListArtifactsRequest::default()).await?.into_inner();
    assert_eq!(listed.artifacts, [], "{what} is listed");
    Ok(())
}

fn small_image(dir: &Path) -> Result<Vec<u8>> {
    let root = dir.join("small");
    lay_out_root(&root, "small")?;
    Ok(std::fs::read(pack(&root, &dir.join("small.tar.gz"), Compression::Gzip)?)?)
}

#[tokio::test]
async fn a_download_cut_ten_times_sends_at_most_one_chunk_again_for_each_cut() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let ids = fleet.ids().await?;
    let root = fleet.dir().join("large");
    lay_out_root(&root, "large")?;
    std::fs::write(root.join("usr/lib/marker/large"), noise("large", usize::try_from(61 * MIB)?))?;
    // Uncompressed, so that the bytes on the wire can be counted against the size of the file.
    let file = pack(&root, &fleet.dir().join("large.tar"), Compression::None)?;
    let size = std::fs::metadata(&file)?.len();
    assert!(size >= 64 * MIB, "{size}");
    let image = push(&mut fleet.artifacts(), "large", Kind::Image, Purpose::Unspecified, &file).await?;

    // Each cut is in the middle of a chunk. A download that started over would need far more bytes.
    let cuts =
        [5_100_000, 4_900_001, 6_300_017, 7_900_000, 5_000_000, 4_800_333, 6_000_000, 5_555_555, 7_000_000, 4_700_000];
    let before = fleet.proxy().bytes(Direction::Down);
    fleet.proxy().cut_after(Direction::Down, cuts);
    let operation = fleet.create(update(&ids, &image.name, "")).await?;
    fleet.ends(&operation.name, seconds(300), OperationState::Succeeded).await?;

    assert_eq!(fleet.proxy().cuts_left(Direction::Down), 0, "not all cuts happened");
    let sent = fleet.proxy().bytes(Direction::Down) - before;
    // TLS, HTTP/2 and the session add their share; five percent is generous.
    let allowed = (size + u64::try_from(cuts.len())? * u64::from(CHUNK_SIZE)) * 105 / 100;
    assert!(sent >= size && sent <= allowed, "{sent} bytes were sent for {size}; {allowed} are allowed");
    // `/etc/marco-release` names the digest; the comparison of all files proves it.
    assert!(fleet.pi(&ids[0]).read("root/etc/marco-release")?.contains(&image.sha256));
    compare_with_source(&root, fleet.pi(&ids[0]).dir())?;
    Ok(())
}

#[tokio::test]
async fn a_flipped_bit_is_refused_and_leaves_nothing() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let good = small_image(fleet.dir())?;
    let promise = header("small", Kind::Image, Purpose::Unspecified, &good);
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 0x10;
    let status = upload(&mut fleet.artifacts(), promise.clone(), &bad).await.err().context("it was taken")?;
    assert!(matches!(status.code(), Code::InvalidArgument | Code::DataLoss), "{status:?}");
    assert_ne!(reason(&status), "");
    nothing_is_left(&fleet, "a flipped bit").await?;
    // A failed attempt does not block the name or the digest.
    assert_eq!(upload(&mut fleet.artifacts(), promise, &good).await?.sha256, sha256(&good));

    // The same flip under the digest of the flipped bytes is a damaged gzip, and refused as such.
    let damaged = header("damaged", Kind::Image, Purpose::Unspecified, &bad);
    let status = upload(&mut fleet.artifacts(), damaged, &bad).await.err().context("a damaged image was taken")?;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    Ok(())
}

#[tokio::test]
async fn an_image_that_ends_early_is_refused_and_leaves_nothing() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let whole = small_image(fleet.dir())?;
    let part = &whole[..whole.len() * 2 / 3];
    // Digest and size match; the archive itself is cut short.
    let promise = header("part", Kind::Image, Purpose::Unspecified, part);
    let status = upload(&mut fleet.artifacts(), promise, part).await.err().context("it was taken")?;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    nothing_is_left(&fleet, "a truncated image").await
}

#[tokio::test]
async fn an_upload_that_does_not_end_is_cut_at_its_promised_size() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let promised = noise("endless", 600_000);
    let promise = header("endless", Kind::Image, Purpose::Unspecified, &promised);
    let endless = Upload::begin(&mut fleet.artifacts(), promise).await?;
    let block = Bytes::from(noise("more", MESSAGE_SIZE));
    let mut offset = 0;
    let refused = tokio::time::timeout(seconds(30), async {
        while endless.send(offset, block.clone()).await {
            offset += u64::try_from(MESSAGE_SIZE).unwrap_or_default();
        }
    });
    refused.await.context("the controller takes whatever it gets")?;
    // Flow control lets little through before the refusal arrives.
    assert!(offset < 16 * MIB, "{offset} bytes were taken for 600,000");
    let status = endless.finish().await.err().context("it was taken")?;
    assert!(matches!(status.code(), Code::InvalidArgument | Code::OutOfRange), "{status:?}");
    nothing_is_left(&fleet, "an endless upload").await
}

#[tokio::test]
async fn an_absurd_size_or_a_senseless_header_is_refused_before_any_byte() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let good = header("name", Kind::Image, Purpose::Unspecified, b"0123456789");
    for (what, bad) in [
        ("a size of 2^63", UploadHeader { size_bytes: 1 << 63, ..good.clone() }),
        ("a size of nothing", UploadHeader { size_bytes: 0, ..good.clone() }),
        ("a short digest", UploadHeader { sha256: "abc".to_owned(), ..good.clone() }),
        ("a digest that is a path", UploadHeader { sha256: format!("../{}", "a".repeat(61)), ..good.clone() }),
        ("a name that is a path", UploadHeader { name: "../../etc/cron.d/x".to_owned(), ..good.clone() }),
        ("no kind", UploadHeader { kind: 0, ..good.clone() }),
    ] {
        let status =
            Upload::begin(&mut fleet.artifacts(), bad).await.err().with_context(|| format!("{what} was taken"))?;
        assert!(matches!(status.code(), Code::InvalidArgument | Code::ResourceExhausted), "{what}: {status:?}");
    }
    nothing_is_left(&fleet, "a bad header").await
}

#[tokio::test]
async fn an_upload_goes_on_where_it_was_cut_also_after_a_restart_of_the_controller() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let image = small_image(fleet.dir())?;
    let promise = header("resumed", Kind::Image, Purpose::Unspecified, &image);
    let half = image.len() / 2;
    let mut sent = 0;
    let first = Upload::begin(&mut fleet.artifacts(), promise.clone()).await?;
    assert_eq!(first.offset, 0);
    for piece in image[..half].chunks(MESSAGE_SIZE) {
        assert!(first.send(sent, Bytes::copy_from_slice(piece)).await, "the upload ended early");
        sent += u64::try_from(piece.len())?;
    }
    // Cut without ending the stream. The sent bytes reach the disk a little later.
    wait_until(seconds(20), "the sent half is staged", async || {
        let staged = list(&fleet.data().join("staging")).unwrap_or_default();
        let size = staged.iter().filter_map(|path| std::fs::metadata(fleet.data().join("staging").join(path)).ok());
        Ok(size.into_iter().any(|file| file.len() >= sent).then_some(()))
    })
    .await?;
    drop(first);
    fleet.kill_controller().await?;
    fleet.start_controller().await?;

    let second = Upload::begin(&mut fleet.artifacts(), promise.clone()).await?;
    assert!(second.offset > 0 && second.offset <= sent, "it wants to go on at {}, {sent} were sent", second.offset);
    drop(second);
    let artifact = upload(&mut fleet.artifacts(), promise.clone(), &image).await?;
    assert_eq!((artifact.sha256, artifact.size_bytes), (sha256(&image), u64::try_from(image.len())?));
    // Pushing an artifact that is stored already sends no bytes.
    let again = Upload::begin(&mut fleet.artifacts(), promise).await?;
    assert_eq!(again.offset, u64::try_from(image.len())?);
    Ok(())
}

#[tokio::test]
async fn check_of_an_upload_does_not_hold_up_the_end() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    // One file of zeros: a few megabytes that take minutes to decompress.
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut file = tar::Header::new_gnu();
    file.set_path("zeros")?;
    file.set_size(16 << 30);
    file.set_cksum();
    std::io::Write::write_all(&mut encoder, file.as_bytes())?;
    for _ in 0..256 {
        std::io::Write::write_all(&mut encoder, &vec![0; 1 << 20])?;
    }
    let image = encoder.finish()?;
    // Sixty-four gzip members of a quarter of a gigabyte each.
    let image = image.repeat(64);
    let length = u64::try_from(image.len())?;
    let promise = header("zeros", Kind::Image, Purpose::Unspecified, &image);
    let sending = Upload::begin(&mut fleet.artifacts(), promise).await?;
    for (number, block) in image.chunks(MESSAGE_SIZE).enumerate() {
        let offset = u64::try_from(number * MESSAGE_SIZE)?;
        assert!(sending.send(offset, Bytes::copy_from_slice(block)).await, "the upload ended early");
    }
    let checked = tokio::spawn(sending.finish());
    wait_until(seconds(60), "all bytes are staged", async || {
        let staged = list(&fleet.data().join("staging"))?;
        let size = staged.iter().filter_map(|path| std::fs::metadata(fleet.data().join("staging").join(path)).ok());
        Ok(size.into_iter().any(|file| file.len() == length).then_some(()))
    })
    .await?;
    // A check that ignored the shutdown would hold it up for minutes.
    let status = fleet.terminate_controller(seconds(5)).await?;
    assert!(status.success(), "{status:?}");
    let ended = checked.await?.err().context("it was taken")?;
    assert!(matches!(ended.code(), Code::Aborted | Code::Unavailable | Code::Unknown | Code::Internal), "{ended:?}");
    Ok(())
}

#[tokio::test]
async fn every_hostile_archive_is_refused_with_its_reason_and_leaves_nothing() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let cases = hostile::archives()?;
    assert!(cases.len() >= 60, "only {} hostile archives", cases.len());
    for case in cases {
        let begun = std::time::Instant::now();
        let promise = header("hostile", case.kind, case.purpose, &case.bytes);
        let answer = upload(&mut fleet.artifacts(), promise, &case.bytes).await;
        let status = answer.err().with_context(|| format!("{} was taken", case.what))?;
        assert_eq!(status.code(), Code::InvalidArgument, "{}: {status:?}", case.what);
        assert_ne!(reason(&status), "", "{}: no reason for programs", case.what);
        assert!(status.message().len() > 20, "{}: {:?} says nothing", case.what, status.message());
        assert!(begun.elapsed() < seconds(10), "{} took {:?}", case.what, begun.elapsed());
        nothing_is_left(&fleet, case.what).await?;
    }
    // A bomb that was unpacked in memory would show here.
    let worst = fleet.memory(0, "VmHWM")?;
    assert!(worst < 128 * MIB, "the controller had {worst} bytes at its worst");
    // After all that the controller still accepts good archives.
    let good = small_image(fleet.dir())?;
    upload(&mut fleet.artifacts(), header("good", Kind::Image, Purpose::Unspecified, &good), &good).await?;
    Ok(())
}
