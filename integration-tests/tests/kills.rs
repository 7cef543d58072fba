//! Agent and controller killed (`-9`) at each point of an operation: at most one reboot, one final state, nothing lost.

use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{execution_name, reboot, update};
use integration_tests::image::{Compression, make_image, noise, pack};
use integration_tests::proxy::Direction;
use integration_tests::tree::compare_with_source;
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{ListEventsRequest, NodeMode, Operation};

/// Timeout of anything that settles after a kill: reconnecting backs off, and the machine is busy.
const SETTLE: Duration = seconds(120);

async fn one_pi() -> Result<(Fleet, String)> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    Ok((fleet, id))
}

/// Checks that the operation succeeds with exactly `reboots` reboots, and that its history has exactly one final state
/// of the node.
async fn done_once(fleet: &Fleet, operation: &Operation, id: &str, reboots: usize) -> Result<()> {
    fleet.ends(&operation.name, SETTLE, OperationState::Succeeded).await?;
    assert_eq!(fleet.pi(id).reboots(&execution_name(operation, id))?, reboots, "{:?}", fleet.pi(id).log()?);
    let request = ListEventsRequest { parent: operation.name.clone(), page_size: 1000, page_token: String::new() };
    let events = fleet.operations().list_events(request).await?.into_inner().events;
    let finals = ["SUCCEEDED", "FAILED", "ROLLED_BACK", "CANCELLED", "EXPIRED"];
    let ends = events.iter().filter(|event| !event.node.is_empty() && finals.contains(&event.to.as_str())).count();
    assert_eq!(ends, 1, "{events:?}");
    let numbers: Vec<u64> = events.iter().map(|event| event.number).collect();
    let wanted: Vec<u64> = (1..=u64::try_from(events.len())?).collect();
    assert_eq!(numbers, wanted, "the events have gaps");
    // A later operation succeeds too: the node is not stuck, and repeats nothing of the first one meanwhile.
    fleet.succeeds(reboot(&[id], Duration::ZERO), SETTLE).await?;
    assert_eq!(fleet.pi(id).reboots(&execution_name(operation, id))?, reboots, "it was done again");
    Ok(())
}

#[tokio::test]
async fn agent_killed_before_its_acknowledgement_of_an_assignment_arrives() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    fleet.proxy().hold(Direction::Up);
    let operation = fleet.create(reboot(&[&id], seconds(600))).await?;
    let (pi, name) = (fleet.pi(&id), execution_name(&operation, &id));
    wait_until(seconds(30), "the agent has journalled the assignment", async || {
        Ok(pi.journal_names(&name).then_some(()))
    })
    .await?;
    assert_eq!(fleet.execution(&operation.name, &id).await?.state(), State::Assigned, "its acknowledgement arrived");
    fleet.kill_agents().await?;
    // The messages it had sent are lost with the connection.
    fleet.proxy().drop_connections();
    fleet.proxy().release(Direction::Up);
    fleet.start_agents()?;
    // The journal has the execution, so the node accepted it: the controller must not assign it a second time.
    let execution = fleet.execution_is(&operation.name, &id, seconds(60), State::Running).await?;
    assert_eq!(execution.name, name);
    fleet.cancel(&operation.name).await?;
    fleet.ends(&operation.name, SETTLE, OperationState::Cancelled).await?;
    assert_eq!(pi.reboots(&name)?, 0);
    fleet.succeeds(reboot(&[&id], Duration::ZERO), SETTLE).await?;
    Ok(())
}

#[tokio::test]
async fn agent_killed_before_an_assignment_reaches_it() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    // The assignment waits in the proxy, and never reaches the agent.
    fleet.proxy().hold(Direction::Down);
    let operation = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    fleet.execution_is(&operation.name, &id, seconds(30), State::Assigned).await?;
    fleet.kill_agents().await?;
    fleet.proxy().drop_connections();
    fleet.proxy().release(Direction::Down);
    fleet.start_agents()?;
    done_once(&fleet, &operation, &id, 1).await
}

#[tokio::test]
async fn agent_killed_after_it_acknowledged_an_assignment() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    let operation = fleet.create(reboot(&[&id], seconds(8))).await?;
    fleet.execution_is(&operation.name, &id, seconds(30), State::Running).await?;
    fleet.kill_agents().await?;
    assert_eq!(fleet.pi(&id).reboots(&execution_name(&operation, &id))?, 0, "it was killed too late for this test");
    fleet.start_agents()?;
    done_once(&fleet, &operation, &id, 1).await
}

#[tokio::test]
async fn agent_killed_while_it_downloads() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    let root = fleet.dir().join("slow");
    integration_tests::image::lay_out_root(&root, "slow")?;
    std::fs::write(root.join("usr/lib/marker/large"), noise("slow", 24 * 1024 * 1024))?;
    let file = pack(&root, &fleet.dir().join("slow.tar"), Compression::None)?;
    let image = push(&mut fleet.artifacts(), "slow", Kind::Image, Purpose::Unspecified, &file).await?;
    // Slow enough that the kill comes in the middle of the download.
    fleet.proxy().throttle(Direction::Down, 4 * 1024 * 1024);
    let operation = fleet.create(update(&[&id], &image.name, "")).await?;
    fleet
        .execution_becomes(&operation.name, &id, SETTLE, "amid its download", |execution| {
            execution.state() == State::Running
                && execution.bytes_done > 0
                && execution.bytes_done < execution.bytes_total
        })
        .await?;
    fleet.kill_agents().await?;
    fleet.proxy().throttle(Direction::Down, 0);
    fleet.start_agents()?;
    // One reboot into the installer, one into the new system.
    done_once(&fleet, &operation, &id, 2).await?;
    compare_with_source(&root, fleet.pi(&id).dir())?;
    Ok(())
}

#[tokio::test]
async fn agent_killed_after_the_point_of_no_return() -> Result<()> {
    // A long shutdown leaves time to kill the agent between the command and the restart.
    let mut fleet = Fleet::builder().pis(1).shutdown_time(seconds(6)).start().await?;
    let id = fleet.ids().await?.remove(0);
    let operation = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    let (pi, name) = (fleet.pi(&id), execution_name(&operation, &id));
    wait_until(seconds(30), "the Pi goes down", async || Ok((pi.reboots(&name)? > 0).then_some(()))).await?;
    assert_eq!(pi.boots()?, 1, "it was back before it could be killed");
    fleet.kill_agents().await?;
    fleet.start_agents()?;
    done_once(&fleet, &operation, &id, 1).await
}

#[tokio::test]
async fn agent_killed_between_its_last_word_and_the_reboot() -> Result<()> {
    // The kill comes at several delays after the journal names the execution: some before the command, some after it.
    for wait in [0, 1, 3, 10, 30] {
        let (mut fleet, id) = one_pi().await?;
        let operation = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
        let (pi, name) = (fleet.pi(&id), execution_name(&operation, &id));
        wait_until(seconds(30), "the agent has it", async || Ok(pi.journal_names(&name).then_some(()))).await?;
        // No condition to wait for: the delay itself is what the test varies.
        tokio::time::timeout(Duration::from_millis(wait), std::future::pending::<()>()).await.ok();
        fleet.kill_agents().await?;
        fleet.start_agents()?;
        fleet.ends(&operation.name, SETTLE, OperationState::Succeeded).await?;
        assert_eq!(pi.reboots(&name)?, 1, "{wait} ms: {:?}", pi.log()?);
    }
    Ok(())
}

#[tokio::test]
async fn agent_killed_while_the_pi_boots() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).boot_time(seconds(3)).start().await?;
    let id = fleet.ids().await?.remove(0);
    let operation = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    let (pi, name) = (fleet.pi(&id), execution_name(&operation, &id));
    wait_until(seconds(30), "the Pi goes down", async || Ok((pi.reboots(&name)? > 0).then_some(()))).await?;
    wait_until(seconds(30), "its session is gone", async || Ok((!fleet.node(&id).await?.connected).then_some(())))
        .await?;
    fleet.kill_agents().await?;
    fleet.start_agents()?;
    done_once(&fleet, &operation, &id, 1).await
}

#[tokio::test]
async fn agent_killed_in_the_installer_and_after_the_trial_boot() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).shutdown_time(seconds(1)).boot_time(seconds(1)).start().await?;
    let id = fleet.ids().await?.remove(0);
    let file = make_image(fleet.dir(), "image", Compression::Gzip)?;
    let image = push(&mut fleet.artifacts(), "image", Kind::Image, Purpose::Unspecified, &file).await?;
    let operation = fleet.create(update(&[&id], &image.name, "")).await?;
    wait_until(SETTLE, "the installer is at work", async || {
        Ok((fleet.node(&id).await?.mode() == NodeMode::Installer).then_some(()))
    })
    .await?;
    fleet.kill_agents().await?;
    let (pi, name) = (fleet.pi(&id), execution_name(&operation, &id));
    assert_eq!(pi.reboots(&name)?, 1, "it was killed too late for this test");
    fleet.start_agents()?;
    wait_until(SETTLE, "the trial boot was commanded", async || Ok((pi.reboots(&name)? == 2).then_some(()))).await?;
    fleet.kill_agents().await?;
    fleet.start_agents()?;
    done_once(&fleet, &operation, &id, 2).await?;
    compare_with_source(&fleet.dir().join("image"), pi.dir())?;
    Ok(())
}

#[tokio::test]
async fn agent_killed_before_its_new_system_was_accepted() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    let file = make_image(fleet.dir(), "image", Compression::Gzip)?;
    let image = push(&mut fleet.artifacts(), "image", Kind::Image, Purpose::Unspecified, &file).await?;
    let operation = fleet.create(update(&[&id], &image.name, "")).await?;
    let (pi, name) = (fleet.pi(&id), execution_name(&operation, &id));
    wait_until(SETTLE, "the trial boot was commanded", async || Ok((pi.reboots(&name)? == 2).then_some(()))).await?;
    // The new system boots, but none of its messages pass.
    fleet.proxy().hold(Direction::Down);
    fleet.proxy().drop_connections();
    wait_until(SETTLE, "the new system boots", async || Ok((pi.boots()? == 3).then_some(()))).await?;
    fleet.kill_agents().await?;
    // The firmware must still boot the installer by default: an unproved system gets trial boots only.
    let autoboot = pi.read("recovery/autoboot.txt")?;
    let default = autoboot.split("[tryboot]").next().context("autoboot.txt")?;
    assert!(default.contains("boot_partition=1"), "the system was made the default before it was accepted: {autoboot}");
    fleet.proxy().drop_connections();
    fleet.proxy().release(Direction::Down);
    fleet.start_agents()?;
    done_once(&fleet, &operation, &id, 2).await
}

#[tokio::test]
async fn controller_killed_after_it_stored_an_operation() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    // The node is unreachable, so the operation is stored and nothing more happens.
    fleet.proxy().hold(Direction::Up);
    fleet.proxy().hold(Direction::Down);
    fleet.proxy().drop_connections();
    wait_until(seconds(30), "the node is offline", async || Ok((!fleet.node(&id).await?.connected).then_some(())))
        .await?;
    let operation = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    fleet.kill_controller().await?;
    fleet.proxy().drop_connections();
    fleet.start_controller().await?;
    fleet.proxy().release(Direction::Up);
    fleet.proxy().release(Direction::Down);
    done_once(&fleet, &operation, &id, 1).await
}

#[tokio::test]
async fn controller_killed_at_once_after_it_answered_a_creation() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    let operation = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    fleet.kill_controller().await?;
    fleet.start_controller().await?;
    done_once(&fleet, &operation, &id, 1).await
}

#[tokio::test]
async fn controller_killed_after_it_sent_an_assignment_that_did_not_arrive() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    fleet.proxy().hold(Direction::Down);
    let operation = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    fleet.execution_is(&operation.name, &id, seconds(30), State::Assigned).await?;
    fleet.kill_controller().await?;
    fleet.proxy().drop_connections();
    fleet.proxy().release(Direction::Down);
    fleet.start_controller().await?;
    done_once(&fleet, &operation, &id, 1).await
}

#[tokio::test]
async fn controller_killed_after_it_sent_an_assignment_whose_answer_did_not_arrive() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    fleet.proxy().hold(Direction::Up);
    let operation = fleet.create(reboot(&[&id], seconds(5))).await?;
    let (pi, name) = (fleet.pi(&id), execution_name(&operation, &id));
    wait_until(seconds(30), "the agent has it", async || Ok(pi.journal_names(&name).then_some(()))).await?;
    fleet.kill_controller().await?;
    fleet.proxy().drop_connections();
    fleet.proxy().release(Direction::Up);
    fleet.start_controller().await?;
    done_once(&fleet, &operation, &id, 1).await
}

#[tokio::test]
async fn controller_killed_before_its_acknowledgement_of_a_report_arrives() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    let operation = fleet.create(reboot(&[&id], seconds(5))).await?;
    fleet.execution_is(&operation.name, &id, seconds(30), State::Running).await?;
    // Reports are stored, but the agent does not learn it.
    fleet.proxy().hold(Direction::Down);
    fleet.execution_is(&operation.name, &id, seconds(30), State::Rebooting).await?;
    fleet.kill_controller().await?;
    fleet.proxy().drop_connections();
    fleet.proxy().release(Direction::Down);
    fleet.start_controller().await?;
    done_once(&fleet, &operation, &id, 1).await
}

#[tokio::test]
async fn controller_killed_before_a_report_arrives_and_away_until_the_node_is_back() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    let operation = fleet.create(reboot(&[&id], seconds(3))).await?;
    fleet.execution_is(&operation.name, &id, seconds(30), State::Running).await?;
    fleet.kill_controller().await?;
    // The node continues without the controller.
    let pi = fleet.pi(&id);
    wait_until(seconds(60), "the node is back", async || Ok((pi.boots()? == 2).then_some(()))).await?;
    fleet.start_controller().await?;
    done_once(&fleet, &operation, &id, 1).await
}
