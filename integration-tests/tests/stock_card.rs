//! The first update of a stock card, which has one boot partition and no installer. Until the new system is installed
//! the old one comes back. Afterwards the card is in layout resident.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{Pi, update};
use integration_tests::image::{Compression, make_bootcode, make_image};
use integration_tests::tree::list;
use integration_tests::upload::{header, push, upload};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{CardLayout, NodeMode, SetDefaultArtifactRequest};

/// Timeout of an update of a small Pi.
const UPDATE: Duration = seconds(180);

/// A fleet whose only Pi has a stock card. An installer's set is the default bootcode.
async fn fleet() -> Result<Fleet> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let zip = make_bootcode("set")?;
    let set = upload(&mut fleet.artifacts(), header("set", Kind::Bootcode, Purpose::Installer, &zip), &zip).await?;
    let request = SetDefaultArtifactRequest { name: set.name, ..SetDefaultArtifactRequest::default() };
    fleet.artifacts().set_default_artifact(request).await?;
    for marker in ["first", "second"] {
        let file = make_image(fleet.dir(), marker, Compression::Gzip)?;
        push(&mut fleet.artifacts(), marker, Kind::Image, Purpose::Unspecified, &file).await?;
    }
    let token = fleet.dir().join("token");
    fs::write(&token, fleet.token(1).await?)?;
    fleet.start_new_agents(&["--token-file".into(), token.display().to_string(), "--stock".into()])?;
    let connected = async || Ok(fleet.node("pi-01").await.ok().filter(|node| node.connected));
    let node = wait_until(UPDATE, "the node is there", connected).await?;
    assert_eq!(layout(&node)?, (NodeMode::Running, CardLayout::Single));
    Ok(fleet)
}

fn layout(node: &marco_proto::v1::Node) -> Result<(NodeMode, CardLayout)> {
    Ok((node.mode(), node.system.as_ref().context("no system")?.layout()))
}

/// All files of the first partition except the agent's own.
fn first_partition(pi: &Pi) -> Result<BTreeMap<String, Vec<u8>>> {
    let folder = pi.path("recovery");
    let mut files = BTreeMap::new();
    for path in list(&folder)? {
        let name = path.display().to_string();
        let ours = name.starts_with("marco") || name.starts_with("b0") || name == "installer-config.txt";
        if !ours && folder.join(&path).is_file() {
            files.insert(name, fs::read(folder.join(&path))?);
        }
    }
    Ok(files)
}

#[tokio::test]
async fn its_first_update_makes_it_resident_and_the_second_is_like_any_other() -> Result<()> {
    let fleet = fleet().await?;
    let pi = fleet.pi("pi-01");
    let before = first_partition(&pi)?;
    // A stock card has the vendor's firmware on it, and boots without any installer.
    assert!(before.contains_key("start4.elf") && !before.contains_key("autoboot.txt"));
    fleet.succeeds(update(&["pi-01"], "first", ""), UPDATE).await?;
    assert_eq!(layout(&fleet.node("pi-01").await?)?, (NodeMode::Running, CardLayout::Resident));
    let after = first_partition(&pi)?;
    for (name, bytes) in before.iter().filter(|(name, _)| *name != "config.txt") {
        assert_eq!(after.get(name), Some(bytes), "{name} was changed");
    }
    assert_eq!(pi.read("recovery/marco/config.stock")?.as_bytes(), before.get("config.txt").context("config.txt")?);
    // The trial boot, the copied key and the job are needed only until the new system was accepted.
    wait_until(seconds(20), "the agent has tidied up", async || {
        let left = ["tryboot.txt", "marco/node.key", "marco/install.json"];
        Ok((!left.iter().any(|name| pi.path("recovery").join(name).exists())).then_some(()))
    })
    .await?;
    assert!(pi.read("boot/kernel8.img")?.contains("first"));
    fleet.succeeds(update(&["pi-01"], "second", ""), UPDATE).await?;
    assert!(pi.read("boot/kernel8.img")?.contains("second"));
    Ok(())
}

#[tokio::test]
async fn an_update_that_cannot_be_done_leaves_it_as_it_was() -> Result<()> {
    let fleet = fleet().await?;
    let pi = fleet.pi("pi-01");
    // Files of an operator's own experiment, which the update must not destroy when it is rolled back.
    let misleading = "[all]\ntryboot_a_b=1\n[tryboot]\nboot_partition=3\n";
    fs::write(pi.path("recovery/autoboot.txt"), misleading)?;
    fs::write(pi.path("recovery/tryboot.txt"), "# somebody tries a kernel\nkernel=trial.img\n")?;
    // Too small for the installation, which the installer notices before it erases anything.
    fs::write(pi.path("card-size"), "500\n")?;
    let before = first_partition(&pi)?;
    let operation = fleet.create(update(&["pi-01"], "first", "")).await?;
    fleet.ends(&operation.name, UPDATE, OperationState::Failed).await?;
    let execution = fleet.execution(&operation.name, "pi-01").await?;
    let reason = execution.error.clone().unwrap_or_default().reason;
    assert_eq!((execution.state(), reason.as_str()), (State::RolledBack, "DISK_TOO_SMALL"));
    assert_eq!(layout(&fleet.node("pi-01").await?)?, (NodeMode::Running, CardLayout::Single));
    wait_until(seconds(20), "the card is as it was", async || Ok((first_partition(&pi)? == before).then_some(()))).await
}

#[tokio::test]
async fn a_power_cut_after_the_card_was_touched_ends_in_the_new_system() -> Result<()> {
    let fleet = fleet().await?;
    let pi = fleet.pi("pi-01");
    let operation = fleet.create(update(&["pi-01"], "first", "")).await?;
    wait_until(UPDATE, "the installer is the default", async || {
        Ok(pi.path("recovery/autoboot.txt").exists().then_some(()))
    })
    .await?;
    pi.cut_power()?;
    fleet.ends(&operation.name, UPDATE, OperationState::Succeeded).await?;
    assert_eq!(layout(&fleet.node("pi-01").await?)?, (NodeMode::Running, CardLayout::Resident));
    Ok(())
}
