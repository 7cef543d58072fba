//! Nodes that were away, and nodes with faults: cancelled work is not done, and no fault is silent.

use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{execution_name, reboot};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::execution::State;
use marco_proto::v1::node_condition::Type;
use marco_proto::v1::operation::State as OperationState;

async fn one_pi() -> Result<(Fleet, String)> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    Ok((fleet, id))
}

/// The conditions that a node reports.
async fn ills(fleet: &Fleet, id: &str) -> Result<Vec<Type>> {
    Ok(fleet.node(id).await?.conditions.iter().map(|ill| ill.r#type()).collect())
}

#[tokio::test]
async fn work_cancelled_during_an_outage_is_not_done() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    let operation = fleet.create(reboot(&[&id], seconds(3600))).await?;
    fleet.execution_is(&operation.name, &id, seconds(30), State::Running).await?;
    let pi = fleet.pi(&id);
    let warnings = || Ok::<_, anyhow::Error>(pi.read("wall.log")?.matches("This machine reboots in").count());
    wait_until(seconds(30), "users are warned", async || Ok((warnings()? == 1).then_some(()))).await?;
    fleet.kill_agents().await?;
    fleet.cancel(&operation.name).await?;
    fleet.start_agents()?;
    fleet.ends(&operation.name, seconds(60), OperationState::Cancelled).await?;
    assert_eq!((warnings()?, pi.reboots(&execution_name(&operation, &id))?), (1, 0));
    // The node accepts new work.
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    Ok(())
}

#[tokio::test]
async fn node_whose_journal_cannot_be_written_says_so_and_recovers() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    assert!(ills(&fleet, &id).await?.is_empty());
    let pi = fleet.pi(&id);
    // A folder in place of the temporary file makes each write of the journal fail, also for root.
    let in_the_way = pi.path("root/var/lib/marco-agent/journal.json.new");
    std::fs::create_dir_all(in_the_way.join("x"))?;
    for _ in 0..2 {
        let operation = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
        fleet.ends(&operation.name, seconds(30), OperationState::Failed).await?;
        let execution = fleet.execution(&operation.name, &id).await?;
        assert_eq!(execution.error.context("no error")?.reason, "JOURNAL_NOT_WRITABLE");
        // An earlier version assigned it again three times a second, and warned users every few seconds.
        assert_eq!(execution.attempt, 1, "it is given once");
    }
    wait_until(
        seconds(30),
        "it is shown ill",
        async || Ok((ills(&fleet, &id).await? == [Type::Journal]).then_some(())),
    )
    .await?;
    assert!(fleet.node(&id).await?.connected);
    assert_eq!(pi.boots()?, 1);
    std::fs::remove_dir_all(in_the_way)?;
    wait_until(seconds(60), "it is well", async || Ok(ills(&fleet, &id).await?.is_empty().then_some(()))).await?;
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    Ok(())
}

#[tokio::test]
async fn weak_power_and_a_wrong_clock_are_shown() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    let pi = fleet.pi(&id);
    std::fs::write(pi.path("under-voltage"), "")?;
    std::fs::write(pi.path("clock"), "1970-01-01T00:00:00Z")?;
    // The agent checks the power supply when it starts, and the clock after it has heard a controller.
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    wait_until(seconds(30), "both are shown", async || {
        Ok((ills(&fleet, &id).await? == [Type::Clock, Type::UnderVoltage]).then_some(()))
    })
    .await
}
