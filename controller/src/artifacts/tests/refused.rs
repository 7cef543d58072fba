//! Contents that a push refuses.

use super::*;

#[tokio::test]
async fn a_bootcode_must_be_able_to_boot_what_it_is_for() {
    let (dir, store) = fresh();
    let blob = push(&store, &bootcode(""), Content::InstallerBootcode).await.unwrap();
    assert_eq!((blob.packing, blob.entries), (Packing::Zip, 7));
    push(&store, &bootcode("initramfs8"), Content::SystemBootcode).await.unwrap();
    for missing in ["kernel8.img", "overlays/README", "config.txt"] {
        let error = push(&store, &bootcode(missing), Content::InstallerBootcode).await.unwrap_err();
        assert!(
            matches!(&error, ArtifactError::Refused(refused) if matches!(refused.reason, Reason::Lacks(_))),
            "{error}"
        );
    }
    assert_eq!(files(dir.path()), 2);
}

#[tokio::test]
async fn files_of_another_kind_are_refused_with_what_they_are() {
    let (dir, store) = fresh();
    let error = push(&store, &bootcode(""), Content::Image).await.unwrap_err().to_string();
    assert!(error.contains("this is a zip"), "{error}");
    let error = push(&store, b"BZh91AY&SY", Content::Image).await.unwrap_err().to_string();
    assert!(error.contains("bzip2"), "{error}");
    push(&store, &tarball(10), Content::InstallerBootcode).await.unwrap_err();
    push(&store, &noise(10_000), Content::Image).await.unwrap_err();
    assert_eq!(files(dir.path()), 0);
}

#[tokio::test]
async fn streams_that_need_too_much_memory_are_refused() {
    let (_dir, store) = fresh();
    // A frame header that asks for a window of 2 GiB: descriptor, window (21 << 3), then an empty last block.
    let zstd = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 0x01, 0x00, 0x00];
    let error = push(&store, &zstd, Content::Image).await.unwrap_err().to_string();
    assert!(error.contains("zstd -19 --long=24"), "{error}");
}

/// The node has the same decoder, and would refuse them after its root is emptied.
#[tokio::test]
async fn streams_that_the_installer_cannot_unpack_are_refused() {
    let (dir, store) = fresh();
    let data = tarball(1000);
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&data).unwrap();
    let xz = xz.finish().unwrap();
    let mut encoder = GzipEncoder::new(Vec::new());
    encoder.write_all(&data).await.unwrap();
    encoder.shutdown().await.unwrap();
    let gzip = encoder.into_inner();
    let mut reserved = gzip.clone();
    reserved[3] |= 0x80;
    for (bytes, what) in [
        ([xz.as_slice(), &[0; 2]].concat(), "xz with padding of 2 bytes"),
        ([xz.as_slice(), &[0; 6], &xz].concat(), "xz with padding of 6 bytes between two streams"),
        (reserved, "gzip with a reserved flag"),
        ([gzip.as_slice(), b"more"].concat(), "gzip with something else behind it"),
    ] {
        push(&store, &bytes, Content::Image).await.expect_err(what);
    }
    assert_eq!(files(dir.path()), 0);
    push(&store, &[xz.as_slice(), &[0; 4]].concat(), Content::Image).await.unwrap();
}

#[tokio::test]
async fn a_window_of_16_mib_is_taken_and_a_larger_one_refused_with_the_command_that_helps() {
    let (_dir, store) = fresh();
    let data = tarball(1000);
    let zstd = |window| {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.long_distance_matching(true).unwrap();
        encoder.window_log(window).unwrap();
        encoder.write_all(&data).unwrap();
        encoder.finish().unwrap()
    };
    let xz = |dictionary| {
        let mut options = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
        options.dict_size(dictionary);
        let mut filters = liblzma::stream::Filters::new();
        filters.lzma2(&options);
        let check = liblzma::stream::Check::Crc64;
        let stream = liblzma::stream::Stream::new_stream_encoder(&filters, check).unwrap();
        let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
        encoder.write_all(&data).unwrap();
        encoder.finish().unwrap()
    };
    for (fits, too_large, command) in [
        (zstd(24), zstd(25), "zstd -d --long=31 --stdout IMAGE | zstd -19 --long=24 -o NEW"),
        (xz(16 << 20), xz(24 << 20), "xz -dc IMAGE | xz --lzma2=dict=16MiB > NEW"),
    ] {
        push(&store, &fits, Content::Image).await.unwrap();
        let error = push(&store, &too_large, Content::Image).await.unwrap_err().to_string();
        assert!(error.contains("16 MiB") && error.contains(command), "{error}");
    }
}
