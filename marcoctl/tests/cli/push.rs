//! Pushes over broken connections.

use std::path::PathBuf;

use tempfile::TempDir;

use crate::controller::{Controller, Facts};
use crate::proxy::Proxy;
use crate::running::marcoctl;

const MIB: usize = 1024 * 1024;

/// Creates a file whose contents reveal misplaced blocks.
fn file(name: &str, size: usize) -> (TempDir, PathBuf, Vec<u8>) {
    let folder = TempDir::new().unwrap();
    let bytes: Vec<u8> = (0..size).map(|place| ((place * 31) ^ (place >> 11)).to_le_bytes()[0]).collect();
    let path = folder.path().join(name);
    std::fs::write(&path, &bytes).unwrap();
    (folder, path, bytes)
}

#[tokio::test]
async fn a_pushed_file_arrives_whole_under_its_default_name() {
    let controller = Controller::start(Facts::default()).await;
    let (_folder, path, bytes) = file("kiosk-1.2.tar.zst", MIB + 77);
    let run = controller.run(&["-o", "json", "artifacts", "push", path.to_str().unwrap(), "--kind", "image"]).await;
    // Stderr is empty: without a terminal no bar is drawn.
    assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{run:?}");
    let json = run.json();
    assert_eq!(json["name"], "artifacts/kiosk-1.2");
    assert_eq!(json["kind"], "KIND_IMAGE");
    assert_eq!(json["sizeBytes"], bytes.len().to_string());
    let facts = controller.facts.lock().unwrap();
    assert_eq!(facts.uploads[json["sha256"].as_str().unwrap()], bytes);
}

#[tokio::test]
async fn a_push_that_is_cut_goes_on_where_it_broke() {
    let controller = Controller::start(Facts::default()).await;
    let (_folder, path, bytes) = file("big.tar", 12 * MIB);
    let proxy = Proxy::cutting(controller.address, 3, 3 * MIB).await;
    let arguments = ["-o", "json", "artifacts", "push", path.to_str().unwrap(), "--kind", "image"];
    let run = marcoctl(proxy.address, &controller.certs(), &arguments).await;
    assert_eq!(run.code, 0, "{run:?}");
    assert_eq!(proxy.cuts(), 3);
    let facts = controller.facts.lock().unwrap();
    // assert_eq would print 12 MiB.
    assert!(facts.uploads[run.json()["sha256"].as_str().unwrap()] == bytes, "the bytes differ");
    // Each stream starts where the previous one ended. Only the first one starts at zero.
    assert!(facts.offsets.len() >= 4 && facts.offsets.is_sorted(), "{:?}", facts.offsets);
    assert!(facts.offsets[1..].iter().all(|offset| *offset > 0), "{:?}", facts.offsets);
}

#[tokio::test]
async fn a_push_that_never_gets_further_is_given_up_as_not_reachable() {
    let controller = Controller::start(Facts::default()).await;
    let (_folder, path, _) = file("big.tar", MIB);
    // 20 KiB are enough for the TLS handshake, but not for one message with file data.
    let proxy = Proxy::cutting(controller.address, usize::MAX, 20 * 1024).await;
    let arguments = ["artifacts", "push", path.to_str().unwrap(), "--kind", "image", "--tries", "3"];
    let run = marcoctl(proxy.address, &controller.certs(), &arguments).await;
    assert_eq!(run.code, 3, "{run:?}");
}

#[tokio::test]
async fn a_refused_push_says_why() {
    let controller =
        Controller::start(Facts { bad_archive: Some("entry ../x leaves the archive"), ..Default::default() }).await;
    let (_folder, path, _) = file("bad.zip", 1000);
    let run = controller.run(&["artifacts", "push", path.to_str().unwrap(), "--kind", "bootcode"]).await;
    assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{run:?}");
    assert!(run.stderr.contains("entry ../x leaves the archive"), "{run:?}");
    let facts = controller.facts.lock().unwrap();
    assert_eq!(facts.headers[0].name, "artifacts/bad");
    assert_eq!(facts.headers[0].purpose(), marco_proto::v1::artifact::Purpose::Installer);
}
