//! Artifacts and their bytes.

use marco_controller::store::{ArtifactRow, CreateOutcome, DeleteArtifactOutcome, Kind, Purpose};
use marco_proto::names::ArtifactId;

use crate::support::*;

fn id(text: &str) -> ArtifactId {
    ArtifactId::parse(text).unwrap()
}

pub(crate) async fn a_name_moves_to_other_bytes(f: Fixture) {
    let first = artifact("os", Kind::Image, Purpose::None);
    assert_eq!(f.store.put_artifact(&first).await.unwrap(), None);
    assert_eq!(f.store.put_artifact(&first).await.unwrap(), None, "the same again");
    assert_eq!(f.store.artifact(&first.id).await.unwrap(), Some(first.clone()));
    let alias = ArtifactRow { id: id("alias"), ..first.clone() };
    f.store.put_artifact(&alias).await.unwrap();
    let second = ArtifactRow { sha256: digest("other"), ..first.clone() };
    assert_eq!(f.store.put_artifact(&second).await.unwrap(), None, "another name has the old bytes");
    assert_eq!(f.store.artifact_by_sha256(&first.sha256).await.unwrap(), Some(alias.clone()));
    let third = ArtifactRow { sha256: digest("third"), ..first.clone() };
    assert_eq!(f.store.put_artifact(&third).await.unwrap(), Some(second.sha256));
    let page = f.store.artifacts(Some(&alias.id), 10, Some(Kind::Image)).await.unwrap();
    assert_eq!(page, [third]);
    assert!(f.store.artifacts(None, 10, Some(Kind::Bootcode)).await.unwrap().is_empty());
}

pub(crate) async fn what_an_unfinished_operation_needs_is_not_removed(f: Fixture) {
    let os = artifact("os", Kind::Image, Purpose::None);
    let (node, _) = f.online("pi-1").await;
    let new = new_operation(update(Some("os")), std::slice::from_ref(&node));
    let gone = f.store.create_operation(&new, start()).await.unwrap();
    assert!(matches!(gone, CreateOutcome::ArtifactGone), "{gone:?}");
    assert!(f.store.operation(&new.id).await.unwrap().is_none());
    f.store.put_artifact(&os).await.unwrap();
    let operation = f.create(update(Some("os")), std::slice::from_ref(&node)).await;
    let refused = f.store.delete_artifact(&os.id).await.unwrap();
    assert_eq!(refused, DeleteArtifactOutcome::InUse(vec![operation.clone()]));
    let moved = ArtifactRow { sha256: digest("newer"), ..os.clone() };
    assert_eq!(f.store.put_artifact(&moved).await.unwrap(), None);
    let held = f.store.artifact_by_sha256(&os.sha256).await.unwrap().unwrap();
    assert_eq!((held.id, held.size, held.chunk_sha256), (os.id.clone(), os.size, os.chunk_sha256.clone()));
    assert!(f.store.sweep_blobs().await.unwrap().is_empty());
    f.store.request_cancel(&operation, "pat", after(1)).await.unwrap();
    assert_eq!(f.store.sweep_blobs().await.unwrap(), std::slice::from_ref(&os.sha256));
    assert!(f.store.artifact_by_sha256(&os.sha256).await.unwrap().is_none());
    let deleted = f.store.delete_artifact(&os.id).await.unwrap();
    assert_eq!(deleted, DeleteArtifactOutcome::Deleted { bytes_unused: Some(digest("newer")) });
    assert_eq!(f.store.delete_artifact(&os.id).await.unwrap(), DeleteArtifactOutcome::NotFound);
}

pub(crate) async fn defaults_are_by_board_with_one_for_any(f: Fixture) {
    for name in ["b4", "any"] {
        f.store.put_artifact(&artifact(name, Kind::Bootcode, Purpose::Installer)).await.unwrap();
    }
    let of = |board: &'static str| f.store.default_for(board, Kind::Bootcode, Purpose::Installer);
    assert!(of("pi4").await.unwrap().is_none());
    let row = f.store.set_default(&id("any"), "").await.unwrap().unwrap();
    assert_eq!(row.default_for, ["*"]);
    f.store.set_default(&id("b4"), "pi4").await.unwrap();
    assert_eq!(of("pi4").await.unwrap().unwrap().id, id("b4"));
    assert_eq!(of("pi5").await.unwrap().unwrap().id, id("any"));
    assert!(f.store.default_for("pi4", Kind::Bootcode, Purpose::System).await.unwrap().is_none());
    let all = f.store.defaults(Kind::Bootcode, Purpose::Installer).await.unwrap();
    assert_eq!(all.keys().map(String::as_str).collect::<Vec<_>>(), ["*", "pi4"]);
    f.store.set_default(&id("any"), "pi4").await.unwrap();
    assert_eq!(f.store.artifact(&id("any")).await.unwrap().unwrap().default_for, ["*", "pi4"]);
    assert!(f.store.set_default(&id("nope"), "pi4").await.unwrap().is_none());
    f.store.delete_artifact(&id("any")).await.unwrap();
    assert!(of("pi4").await.unwrap().is_none());
}
