//! Phases that nodes report and the controller's deadlines for them; and machines that do not go down when they are
//! told to.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{execution_name, poweroff, reboot, update};
use integration_tests::image::{Compression, make_image};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds};
use marco_controller::operation::Phase;
use marco_proto::v1::ExplainExecutionRequest;
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::State as OperationState;

#[test]
fn the_controller_has_a_deadline_for_each_phase_that_an_agent_reports() {
    // Controller and agent share no code, so that their lists could drift apart.
    let known: BTreeSet<&str> = Phase::ALL.iter().map(|phase| phase.as_str()).collect();
    let reported: BTreeSet<&str> = node_agent::job::phase::ALL.iter().copied().collect();
    assert_eq!(known, reported);
}

#[test]
fn controller_and_node_wait_equally_long_for_a_verdict() {
    assert_eq!(Phase::Verdict.limit(), marco_proto::names::VERDICT_DEADLINE);
}

/// The events of a Pi's own log; a boot with its partition, and with `trial` if it was one.
fn told(fleet: &Fleet, id: &str) -> Result<Vec<String>> {
    let lines = fleet.pi(id).read("log.jsonl")?;
    let line = |text: &str| -> Result<String> {
        let line: serde_json::Value = serde_json::from_str(text)?;
        let get = |name: &str| line.get(name).cloned().unwrap_or_default();
        let event = get("event").as_str().unwrap_or_default().to_owned();
        Ok(match get("partition").as_u64() {
            Some(partition) if get("tryboot").as_bool() == Some(true) => format!("{event} p{partition} trial"),
            Some(partition) => format!("{event} p{partition}"),
            None => event,
        })
    };
    lines.lines().map(line).collect()
}

#[tokio::test]
async fn a_machine_that_does_not_go_down_is_told_more_strongly_and_goes_down_once() -> Result<()> {
    let mut fleet = Fleet::builder().pis(3).start().await?;
    let ids = fleet.ids().await?;
    let [service, worse, off] = ids.as_slice() else { anyhow::bail!("three Pis") };
    fs::write(fleet.pi(service).path("stuck"), "")?;
    fs::write(fleet.pi(worse).path("stuck"), "services")?;
    fs::write(fleet.pi(off).path("stuck"), "services")?;
    let restarted = fleet.create(reboot(&[service, worse], Duration::ZERO)).await?;
    let switched_off = fleet.create(poweroff(&[off])).await?;
    // The first command had no effect, so the agent escalates, and that is visible.
    let stuck = fleet
        .execution_becomes(&restarted.name, worse, seconds(30), "told again", |execution| {
            execution.phase == "restarting by force"
        })
        .await?;
    assert_eq!(stuck.state(), State::Rebooting);
    let request = ExplainExecutionRequest { name: stuck.name };
    let explained = fleet.operations().explain_execution(request).await?.into_inner();
    assert!(explained.explanation.contains("restarting by force"), "{explained:?}");
    fleet.ends(&restarted.name, seconds(60), OperationState::Succeeded).await?;
    for id in [service, worse] {
        assert_eq!(fleet.pi(id).reboots(&execution_name(&restarted, id))?, 1);
        assert_eq!(told(&fleet, id)?, ["boot p4", "reboot", "boot p4"]);
    }
    // It is off. The controller believes that after a minute of silence.
    fleet.ends(&switched_off.name, seconds(120), OperationState::Succeeded).await?;
    assert_eq!(told(&fleet, off)?, ["boot p4", "power-off"]);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn an_update_keeps_the_argument_of_its_trial_boots_however_strongly_the_machine_is_told() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    fs::write(fleet.pi(&id).path("stuck"), "services")?;
    let file = make_image(fleet.dir(), "next", Compression::Gzip)?;
    let image = push(&mut fleet.artifacts(), "next", Kind::Image, Purpose::Unspecified, &file).await?;
    fleet.succeeds(update(&[&id], &image.name, ""), seconds(120)).await?;
    // A forced restart that dropped the argument would boot the old system instead of the trial.
    assert_eq!(told(&fleet, &id)?, ["boot p4", "reboot", "boot p1 trial", "reboot", "boot p4 trial"]);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_machine_that_stays_up_whatever_it_is_told_fails_and_can_be_told_again() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let stuck = fleet.pi(&id).path("stuck");
    fs::write(&stuck, "everything")?;
    let created = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    fleet.ends(&created.name, seconds(90), OperationState::Failed).await?;
    let failed = fleet.execution(&created.name, &id).await?;
    let error = failed.error.clone().context("no error")?;
    assert_eq!((failed.state(), error.reason.as_str()), (State::Failed, "REBOOT_DID_NOT_HAPPEN"));
    assert_eq!(told(&fleet, &id)?, ["boot p4"]);
    fs::remove_file(&stuck)?;
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    fleet.went_well();
    Ok(())
}
