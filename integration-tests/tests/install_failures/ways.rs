//! Every way of an installation that fails ends without hands: in the old system, or in an installer that can be asked again.

use std::fs;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{Pi, execution_name, update};
use integration_tests::image::noise;
use integration_tests::mount::Mount;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{AbandonExecutionRequest, ExplainExecutionRequest, NodeMode};

use super::{INSTALL, MIB, image, not_tested, other_image};

/// True if this Pi boots its installer by default.
fn installer_boots(pi: &Pi) -> Result<bool> {
    let autoboot = pi.read("recovery/autoboot.txt")?;
    Ok(autoboot.split("[tryboot]").next().context("autoboot.txt")?.contains("boot_partition=1"))
}

async fn touched(pi: &Pi) -> Result<()> {
    wait_until(INSTALL, "the card is touched", async || Ok(installer_boots(pi)?.then_some(()))).await
}

async fn is_in(fleet: &Fleet, mode: NodeMode) -> Result<()> {
    wait_until(INSTALL, &format!("the node is connected, {mode:?}"), async || {
        let node = fleet.node("pi-01").await?;
        Ok((node.connected && node.mode() == mode).then_some(()))
    })
    .await
}

async fn reason(fleet: &Fleet, operation: &str) -> Result<(State, String)> {
    let execution = fleet.execution(operation, "pi-01").await?;
    Ok((execution.state(), execution.error.unwrap_or_default().reason))
}

#[tokio::test]
async fn node_whose_switch_failed_is_reached_in_its_installer() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let good = image(&fleet, "good").await?;
    let large =
        other_image(&fleet, "large", |root| Ok(fs::write(root.join("usr/lib/marker/large"), noise("x", 20 * MIB))?))
            .await?;
    let pi = fleet.pi("pi-01");
    let operation = fleet.create(update(&["pi-01"], &large.name, "")).await?;
    touched(&pi).await?;
    let Ok(mount) = Mount::read_only(pi.path("recovery/autoboot.txt")).await else {
        not_tested("only root may make a file one that cannot be written");
        return Ok(());
    };
    fleet.ends(&operation.name, INSTALL, OperationState::Failed).await?;
    assert_eq!(reason(&fleet, &operation.name).await?, (State::Failed, "BOOT_PARTITION_IO".to_owned()));
    // The new system runs all the same, but only until the next boot.
    is_in(&fleet, NodeMode::Running).await?;
    pi.cut_power()?;
    is_in(&fleet, NodeMode::Installer).await?;
    drop(mount);
    fleet.succeeds(update(&["pi-01"], &good.name, ""), INSTALL).await?;
    assert!(!installer_boots(&pi)?);
    Ok(())
}

#[tokio::test]
async fn lost_job_leads_back_to_the_old_system_without_hands() -> Result<()> {
    let fleet = Fleet::builder().pis(1).shutdown_time(seconds(2)).start().await?;
    let good = image(&fleet, "good").await?;
    let pi = fleet.pi("pi-01");
    fs::write(pi.path("root/precious"), "mine")?;
    let operation = fleet.create(update(&["pi-01"], &good.name, "")).await?;
    fleet.execution_is(&operation.name, "pi-01", INSTALL, State::Rebooting).await?;
    fs::remove_file(pi.path("recovery/marco/install.json"))?;
    fleet.ends(&operation.name, INSTALL, OperationState::Failed).await?;
    assert_eq!(reason(&fleet, &operation.name).await?, (State::RolledBack, "INSTALL_JOB_LOST".to_owned()));
    is_in(&fleet, NodeMode::Running).await?;
    assert_eq!(pi.read("root/precious")?, "mine");
    fleet.succeeds(update(&["pi-01"], &good.name, ""), INSTALL).await?;
    Ok(())
}

#[tokio::test]
async fn card_that_takes_no_file_system_ends_failed_and_heals() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let good = image(&fleet, "good").await?;
    let pi = fleet.pi("pi-01");
    fs::write(pi.path("mkfs-fails"), "")?;
    let operation = fleet.create(update(&["pi-01"], &good.name, "")).await?;
    fleet.ends(&operation.name, INSTALL, OperationState::Failed).await?;
    assert_eq!(reason(&fleet, &operation.name).await?, (State::Failed, "SYSTEM_ERROR".to_owned()));
    is_in(&fleet, NodeMode::Installer).await?;
    fs::remove_file(pi.path("mkfs-fails"))?;
    fleet.succeeds(update(&["pi-01"], &good.name, ""), INSTALL).await?;
    Ok(())
}

#[tokio::test]
async fn operator_replaces_the_image_of_a_node_that_is_at_work_in_its_installer() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let (wrong, right) = (image(&fleet, "wrong").await?, image(&fleet, "right").await?);
    let pi = fleet.pi("pi-01");
    fs::write(pi.path("mkfs-fails"), "")?;
    let operation = fleet.create(update(&["pi-01"], &wrong.name, "")).await?;
    touched(&pi).await?;
    fleet.execution_is(&operation.name, "pi-01", INSTALL, State::Running).await?;
    let next = fleet.create(update(&["pi-01"], &right.name, "")).await?;
    let request = ExplainExecutionRequest { name: execution_name(&next, "pi-01") };
    let explained = fleet.operations().explain_execution(request).await?.into_inner();
    let abandon = format!("operations abandon {} pi-01", operation.name);
    assert!(explained.suggestions.iter().any(|said| said.contains(&abandon)), "{:?}", explained.suggestions);

    let request = AbandonExecutionRequest { name: execution_name(&operation, "pi-01") };
    let given_up = fleet.operations().abandon_execution(request).await?.into_inner();
    assert_eq!((given_up.state(), given_up.overdue), (State::Failed, false));
    fs::remove_file(pi.path("mkfs-fails"))?;
    fleet.ends(&next.name, INSTALL, OperationState::Succeeded).await?;
    let node = fleet.node("pi-01").await?;
    assert_eq!(node.system.context("no system")?.image_sha256, right.sha256);
    // The first execution ends by the node's own report.
    let (state, why) = reason(&fleet, &operation.name).await?;
    assert_eq!(state, State::Failed);
    assert!(["REPLACED", "CALLED_OFF", "NEVER_RETURNED"].contains(&why.as_str()), "{why}");
    Ok(())
}
