//! Artifacts and their bytes.

use marco_controller::store::{Allowance, ArtifactRow, CreateOutcome, DeleteArtifactOutcome, Kind, Purpose};
use marco_proto::names::{ArtifactId, NodeId};

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
    // The returned digest is that of bytes which nothing uses any more, so that they can be deleted.
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
    // The API resolves names before it creates. The image may be deleted between the two.
    let gone = f.store.create_operation(&new, start()).await.unwrap();
    assert!(matches!(gone, CreateOutcome::ArtifactGone), "{gone:?}");
    assert!(f.store.operation(&new.id).await.unwrap().is_none());
    f.store.put_artifact(&os).await.unwrap();
    let operation = f.create(update(Some("os")), std::slice::from_ref(&node)).await;
    let refused = f.store.delete_artifact(&os.id).await.unwrap();
    assert_eq!(refused, DeleteArtifactOutcome::InUse(vec![operation.clone()]));
    let moved = ArtifactRow { sha256: digest("newer"), ..os.clone() };
    // The name moves on, but the operation's frozen digest keeps the old bytes.
    assert_eq!(f.store.put_artifact(&moved).await.unwrap(), None);
    let held = f.store.artifact_by_sha256(&os.sha256).await.unwrap().unwrap();
    assert_eq!((held.id, held.size, held.chunk_sha256), (os.id.clone(), os.size, os.chunk_sha256.clone()));
    assert!(f.store.sweep_blobs().await.unwrap().is_empty());
    f.store.request_cancel(&operation, "pat", after(1)).await.unwrap();
    // The operation has ended, so nothing holds the old bytes.
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
    // A default goes with its artifact: the board has none then, instead of one that does not exist.
    f.store.delete_artifact(&id("any")).await.unwrap();
    assert!(of("pi4").await.unwrap().is_none());
}

pub(crate) async fn node_gets_the_bytes_of_its_work_and_its_defaults(f: Fixture) {
    for name in ["os", "usual", "own"] {
        f.store.put_artifact(&artifact(name, Kind::Image, Purpose::None)).await.unwrap();
    }
    let (node, epoch) = f.online("pi-1").await;
    let (other, _) = f.online("pi-2").await;
    let may = async |node: &NodeId, name: &str| f.store.node_may_have(node, &digest(name)).await.unwrap();
    f.create(update(Some("os")), std::slice::from_ref(&node)).await;
    // Images hold passwords and Wi-Fi keys, so a node gets only those of its own work.
    assert_eq!(may(&node, "os").await, Allowance::NotAsked, "what waits is not given to it yet");
    assert_eq!(f.claim(&[(node.clone(), epoch)], after(1)).await.len(), 1);
    assert_eq!(may(&node, "os").await, Allowance::Granted);
    assert_eq!(may(&other, "os").await, Allowance::NotAsked);

    f.store.set_default(&id("usual"), "").await.unwrap();
    assert_eq!(may(&other, "usual").await, Allowance::Granted);
    // The node's board now has its own default, which replaces the general one.
    f.store.set_default(&id("own"), "pi4").await.unwrap();
    assert_eq!((may(&other, "usual").await, may(&other, "own").await), (Allowance::NotAsked, Allowance::Granted));
    f.store.set_default(&id("os"), "pi5").await.unwrap();
    assert_eq!(may(&other, "os").await, Allowance::NotAsked, "of another board");

    for outcome in f.by_hand(&["UPDATE nodes SET state = 'AWAITING_APPROVAL' WHERE id = 'pi-1'"]).await {
        outcome.unwrap();
    }
    let nobody = NodeId::parse("nobody").unwrap();
    assert_eq!(may(&node, "os").await, Allowance::NotApproved);
    assert_eq!(may(&nobody, "own").await, Allowance::NotApproved);
}

pub(crate) async fn opened_name_stays_open_until_it_becomes_something_else(f: Fixture) {
    let os = artifact("os", Kind::Image, Purpose::None);
    f.store.put_artifact(&os).await.unwrap();
    let is_open = async || f.store.artifact(&os.id).await.unwrap().unwrap().open_to_mirror;
    assert!(!is_open().await);
    assert!(f.store.open_artifact(&os.id, true).await.unwrap().unwrap().open_to_mirror);
    f.store.put_artifact(&ArtifactRow { sha256: digest("newer"), ..os.clone() }).await.unwrap();
    assert!(is_open().await, "the name was opened, not the bytes");
    f.store.open_artifact(&os.id, false).await.unwrap();
    assert!(!is_open().await);
    f.store.open_artifact(&os.id, true).await.unwrap();
    f.store
        .put_artifact(&ArtifactRow { id: id("os"), ..artifact("boot", Kind::Bootcode, Purpose::Installer) })
        .await
        .unwrap();
    assert!(!is_open().await);
    assert!(f.store.open_artifact(&id("nope"), true).await.unwrap().is_none());
}
