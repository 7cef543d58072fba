//! A card with only the installer on it: the node enrols from there, and the controller decides which image it gets.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::image::{Compression, make_image};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::{
    Artifact, ListOperationsRequest, NodeMode, Operation, SetDefaultArtifactRequest, operation::State,
};

/// Timeout of an installation of a small Pi.
const INSTALL: Duration = seconds(120);

/// A fleet whose only Pi has a blank card. `named`: the image in the card's `installer-config.txt`; `None`: there is no
/// such file.
async fn fleet(named: Option<&str>) -> Result<Fleet> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    join(&mut fleet, named).await?;
    Ok(fleet)
}

async fn join(fleet: &mut Fleet, named: Option<&str>) -> Result<()> {
    let file = fleet.dir().join("token");
    fs::write(&file, fleet.token(1).await?)?;
    if let Some(named) = named {
        let card = fleet.pi("pi-01").path("recovery");
        // The virtual Pi keeps the files of a card that exists already.
        fs::create_dir_all(&card)?;
        fs::write(card.join("installer-config.txt"), format!("export OS_IMG={named}\nexport UNKNOWN=1\n"))?;
    }
    fleet.start_new_agents(&["--token-file".into(), file.display().to_string(), "--blank".into()])
}

async fn image(fleet: &Fleet, name: &str) -> Result<Artifact> {
    let file = make_image(fleet.dir(), name, Compression::Gzip)?;
    push(&mut fleet.artifacts(), name, Kind::Image, Purpose::Unspecified, &file).await
}

async fn make_default(fleet: &Fleet, image: &Artifact) -> Result<()> {
    let request = SetDefaultArtifactRequest { name: image.name.clone(), ..SetDefaultArtifactRequest::default() };
    fleet.artifacts().set_default_artifact(request).await?;
    Ok(())
}

async fn operations(fleet: &Fleet) -> Result<Vec<Operation>> {
    Ok(fleet.operations().list_operations(ListOperationsRequest::default()).await?.into_inner().operations)
}

/// Waits for the only operation to succeed, and returns it.
async fn installed(fleet: &Fleet) -> Result<Operation> {
    let operation = wait_until(INSTALL, "the controller makes an operation", async || {
        Ok(operations(fleet).await?.into_iter().next())
    })
    .await?;
    fleet.ends(&operation.name, INSTALL, State::Succeeded).await?;
    // The controller looks again every few seconds, and must not make a second one.
    assert_eq!(operations(fleet).await?.len(), 1);
    Ok(operation)
}

#[tokio::test]
async fn it_gets_the_default_image_of_its_board() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let image = image(&fleet, "first").await?;
    make_default(&fleet, &image).await?;
    join(&mut fleet, None).await?;
    let operation = installed(&fleet).await?;
    assert_eq!(operation.creator, "marco-controller/pi-01");
    let node = fleet.node("pi-01").await?;
    assert_eq!(node.mode(), NodeMode::Running);
    assert_eq!(node.system.context("no system")?.image_sha256, image.sha256);
    Ok(())
}

#[tokio::test]
async fn without_an_image_it_waits_in_its_installer_and_gets_the_one_that_comes() -> Result<()> {
    let fleet = fleet(None).await?;
    wait_until(INSTALL, "the node is there", async || Ok(fleet.node("pi-01").await.ok().filter(|node| node.connected)))
        .await?;
    let other = image(&fleet, "not-the-default").await?;
    // The controller looks every five seconds; this is long enough for two looks.
    let looked = tokio::time::Instant::now();
    let idle = wait_until(seconds(30), "the controller has looked for an image", async || {
        let node = fleet.node("pi-01").await?;
        assert_eq!((node.mode(), node.active_execution.as_str()), (NodeMode::Installer, ""));
        assert_eq!(operations(&fleet).await?, []);
        Ok((looked.elapsed() > seconds(11)).then_some(node))
    })
    .await?;
    assert!(idle.connected);
    make_default(&fleet, &other).await?;
    installed(&fleet).await?;
    Ok(())
}

#[tokio::test]
async fn the_image_that_a_2015_file_on_the_card_names_comes_first() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let (named, default) = (image(&fleet, "named").await?, image(&fleet, "default").await?);
    make_default(&fleet, &default).await?;
    join(&mut fleet, Some("named.tar.gz")).await?;
    installed(&fleet).await?;
    assert_eq!(fleet.node("pi-01").await?.system.context("no system")?.image_sha256, named.sha256);
    let log = fleet.agents_log()?;
    assert!(log.contains("installer-config.txt says what this installer does not know") && log.contains("UNKNOWN"));
    Ok(())
}

#[tokio::test]
async fn the_name_of_2015_is_the_last_resort() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    // The name for the first Pi. A Pi 4 must get the other one.
    image(&fleet, "ArchLinuxARM-rpi-latest").await?;
    let for_a_pi_4 = image(&fleet, "ArchLinuxARM-rpi-2-latest").await?;
    join(&mut fleet, Some("no-such-image")).await?;
    installed(&fleet).await?;
    assert_eq!(fleet.node("pi-01").await?.system.context("no system")?.image_sha256, for_a_pi_4.sha256);
    Ok(())
}
