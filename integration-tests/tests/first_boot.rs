//! First-boot data (users, keys, cloud-init) on a node's card reaches each system that is installed there. Data for all
//! nodes is combined with the data for the node's labels, as the controller has them at that moment.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use integration_tests::fleet::update;
use integration_tests::image::{Compression, lay_out_root, make_bootcode, pack, system_set, zip_of};
use integration_tests::upload::{header, push, upload};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::{Artifact, Node, NodeMode, UpdateNodeRequest};
use prost_types::FieldMask;

const UPDATE: Duration = seconds(180);
/// A secret that must not be in any log.
const SECRET: &str = "correct-horse-battery-staple";

async fn label(fleet: &Fleet, id: &str, room: &str) -> Result<()> {
    let labels = [("room".to_owned(), room.to_owned())].into();
    let node = Node { name: format!("nodes/{id}"), labels, ..Node::default() };
    let update_mask = Some(FieldMask { paths: vec!["labels".to_owned()] });
    fleet.nodes().update_node(UpdateNodeRequest { node: Some(node), update_mask }).await?;
    Ok(())
}

/// An image with cloud-init that looks for its data by a label, as Ubuntu's.
async fn image(fleet: &Fleet, name: &str) -> Result<Artifact> {
    let root = fleet.dir().join(name);
    lay_out_root(&root, name)?;
    let folder = root.join("etc/cloud/cloud.cfg.d");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("99-fake-cloud.cfg"), "datasource:\n  NoCloud:\n    fs_label: system-boot\n")?;
    fs::write(root.join("boot/firmware/network-config"), "of the image\n")?;
    let file = pack(&root, &fleet.dir().join(format!("{name}.tar")), Compression::None)?;
    push(&mut fleet.artifacts(), name, Kind::Image, Purpose::Unspecified, &file).await
}

fn give(fleet: &Fleet, id: &str) -> Result<()> {
    for (name, text) in [
        ("userconf.txt", "pi:hash\n".to_owned()),
        ("user-data", "for every node\n".to_owned()),
        ("room=a1/user-data", format!("for room a1: {SECRET}\n")),
        ("room=a2/user-data", "for room a2\n".to_owned()),
        ("room=a2/meta-data", "instance-id: a2\n".to_owned()),
    ] {
        let path = fleet.pi(id).path("recovery/marco/first-boot").join(name);
        fs::create_dir_all(path.parent().unwrap_or(&path))?;
        fs::write(path, text)?;
    }
    Ok(())
}

#[tokio::test]
async fn two_nodes_with_different_labels_get_different_data() -> Result<()> {
    let mut fleet = Fleet::builder().pis(3).logs("debug").start().await?;
    let ids = fleet.ids().await?;
    let [first, second, third] = ids.as_slice() else { anyhow::bail!("three Pis") };
    for (id, room) in [(first, "a1"), (second, "a2"), (third, "a3")] {
        give(&fleet, id)?;
        label(&fleet, id, room).await?;
    }
    let image = image(&fleet, "with-cloud-init").await?;
    fleet.succeeds(update(&ids, &image.name, ""), UPDATE).await?;
    let boot = |id: &str, name: &str| fleet.pi(id).read(&format!("boot/{name}"));
    assert_eq!(boot(first, "user-data")?, format!("for room a1: {SECRET}\n"));
    assert_eq!(boot(second, "user-data")?, "for room a2\n");
    assert_eq!(boot(third, "user-data")?, "for every node\n");
    // cloud-init needs an instance id, and it must stay the same.
    let instances = [(first, format!("instance-id: {first}\n")), (second, "instance-id: a2\n".to_owned())];
    for (id, meta_data) in &instances {
        assert_eq!(boot(id, "meta-data")?, *meta_data);
        assert_eq!(boot(id, "network-config")?, "of the image\n");
        assert_eq!(boot(id, "userconf.txt")?, "pi:hash\n");
    }

    // An update of the boot files only must keep the data, and must not create the user again.
    let zip = zip_of(&system_set("newer"))?;
    let boot_files =
        upload(&mut fleet.artifacts(), header("newer", Kind::Bootcode, Purpose::System, &zip), &zip).await?;
    fleet.succeeds(update(&[first], "", &boot_files.name), UPDATE).await?;
    assert_eq!(boot(first, "user-data")?, format!("for room a1: {SECRET}\n"));
    assert_eq!(boot(first, "meta-data")?, instances[0].1);
    assert!(boot(first, "userconf.txt").is_err());

    // First-boot data holds password hashes and Wi-Fi keys.
    for log in ["agents.log", "pis/pi-01/recovery/marco/install.log", "pis/pi-01/log.jsonl"] {
        let text = fs::read_to_string(fleet.dir().join(log))?;
        assert!(!text.is_empty() && !text.contains(SECRET), "{log} has what is secret");
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn labels_that_an_idle_installer_got_since_it_connected_count() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let token = fleet.dir().join("token");
    fs::write(&token, fleet.token(1).await?)?;
    give(&fleet, "pi-01")?;
    fleet.start_new_agents(&["--token-file".into(), token.display().to_string(), "--blank".into()])?;
    wait_until(seconds(60), "the installer waits for an image", async || {
        let node = fleet.node("pi-01").await.ok();
        Ok(node.filter(|node| node.connected && node.mode() == NodeMode::Installer))
    })
    .await?;
    // Only now, after the installer has connected: its session knows no label yet.
    label(&fleet, "pi-01", "a2").await?;
    let zip = make_bootcode("any")?;
    let set = upload(&mut fleet.artifacts(), header("any", Kind::Bootcode, Purpose::Installer, &zip), &zip).await?;
    let image = image(&fleet, "with-cloud-init").await?;
    fleet.succeeds(update(&["pi-01"], &image.name, &set.name), UPDATE).await?;
    assert_eq!(fleet.pi("pi-01").read("boot/user-data")?, "for room a2\n");
    fleet.went_well();
    Ok(())
}
