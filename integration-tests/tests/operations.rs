//! Reboot and power-off: immediate, scheduled, expired, cancelled, and requested twice.

use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use integration_tests::client::reason;
use integration_tests::fleet::{execution_name, poweroff, reboot, update};
use integration_tests::image::{Compression, make_image};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::execution::{State, WaitReason};
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{
    CheckOperationRequest, CreateOperationRequest, DeleteArtifactRequest, DeleteNodeRequest, ExplainExecutionRequest,
    ListOperationsRequest, Operation, RetryOperationRequest,
};
use tonic::Code;

/// The time `time` from now.
fn after(time: Duration) -> prost_types::Timestamp {
    (SystemTime::now() + time).into()
}

async fn one_pi() -> Result<(Fleet, String)> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    Ok((fleet, id))
}

#[tokio::test]
async fn a_reboot_is_done_once_and_proved_by_a_new_boot_id() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    let before = fleet.node(&id).await?.boot_id;
    let operation = fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    let pi = fleet.pi(&id);
    assert_eq!(pi.reboots(&execution_name(&operation, &id))?, 1);
    let log = pi.log()?;
    let last = log.last().context("an empty log")?;
    assert_eq!(last.event, "boot");
    assert_ne!(last.boot_id, before);
    let execution = fleet.execution(&operation.name, &id).await?;
    assert_eq!(execution.boot_id, last.boot_id);
    let counts = operation.counts.context("no counts")?;
    assert_eq!((counts.total, counts.succeeded), (1, 1));
    Ok(())
}

#[tokio::test]
async fn a_powered_off_pi_stays_off_until_its_button_is_pressed() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    let operation = fleet.create(poweroff(&[&id])).await?;
    let pi = fleet.pi(&id);
    wait_until(seconds(30), "the Pi is off", async || {
        Ok(pi.log()?.last().is_some_and(|line| line.event == "power-off").then_some(()))
    })
    .await?;
    // A power-off counts only after the node has been away for a minute; before, it could be a reboot.
    fleet.ends(&operation.name, seconds(120), OperationState::Succeeded).await?;
    assert_eq!(pi.count("power-off", &execution_name(&operation, &id))?, 1);
    assert_eq!(pi.boots()?, 1, "it came back by itself");
    let off = fleet.node(&id).await?;
    assert_eq!((off.connected, off.powered_off_by), (false, operation.name.clone()));
    // A waiting execution gives the reason for the node's absence. So does the check before an operation is created.
    let waits = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    fleet
        .execution_becomes(&waits.name, &id, seconds(10), "waiting for the node", |execution| {
            execution.wait_reason() == WaitReason::NodeOffline
        })
        .await?;
    let request = ExplainExecutionRequest { name: execution_name(&waits, &id) };
    let explained = fleet.operations().explain_execution(request).await?.into_inner().explanation;
    let request = CheckOperationRequest { operation: Some(reboot(&[&id], Duration::ZERO)) };
    let checked = fleet.operations().check_operation(request).await?.into_inner().checks.remove(0).message;
    for said in [explained, checked] {
        assert!(said.contains(&format!("powered off on purpose by {}", operation.name)), "{said}");
    }
    fleet.cancel(&waits.name).await?;

    pi.power_on()?;
    let back = wait_until(seconds(30), "the Pi is back", async || {
        Ok(Some(fleet.node(&id).await?).filter(|node| node.connected))
    })
    .await?;
    assert_eq!(back.powered_off_by, "");
    assert_eq!(pi.boots()?, 2);
    assert!(!pi.path("power-on").exists(), "the button is stuck");
    Ok(())
}

#[tokio::test]
async fn a_power_off_whose_stream_breaks_while_the_shutdown_hangs_is_not_believed_before_its_last_words() -> Result<()>
{
    let (fleet, id) = one_pi().await?;
    let pi = fleet.pi(&id);
    // The virtual Pi's shutdown hangs while this file is there.
    std::fs::write(pi.path("hang"), "agent")?;
    let operation = fleet.create(poweroff(&[&id])).await?;
    wait_until(seconds(30), "the Pi goes down", async || {
        Ok(pi.log()?.last().is_some_and(|line| line.event == "power-off").then_some(()))
    })
    .await?;
    let connected = async || Ok(fleet.node(&id).await?.connected.then_some(()));
    wait_until(seconds(30), "the Pi is connected while it goes down", connected).await?;
    fleet.proxy().drop_connections();
    let gone = async || Ok((!fleet.node(&id).await?.connected).then_some(()));
    wait_until(seconds(30), "the stream is broken", gone).await?;
    wait_until(seconds(30), "the Pi connects again on its way down", connected).await?;
    assert_eq!(fleet.execution(&operation.name, &id).await?.state(), State::Rebooting);
    std::fs::remove_file(pi.path("hang"))?;
    fleet.ends(&operation.name, seconds(120), OperationState::Succeeded).await?;
    assert_eq!(pi.boots()?, 1, "it came back by itself");
    Ok(())
}

#[tokio::test]
async fn a_scheduled_operation_waits_for_its_time_and_says_so() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    let mut operation = reboot(&[&id], Duration::ZERO);
    // Enough time for the next two calls, also on a busy machine.
    let due = after(seconds(8));
    operation.schedule_time = Some(due);
    let created = fleet.create(operation).await?;
    assert_eq!(created.state(), OperationState::Scheduled);
    let execution = fleet.execution(&created.name, &id).await?;
    assert_eq!((execution.state(), execution.wait_reason()), (State::Pending, WaitReason::NotDue));
    fleet.ends(&created.name, seconds(60), OperationState::Succeeded).await?;
    let execution = fleet.execution(&created.name, &id).await?;
    let assigned = SystemTime::try_from(execution.assign_time.context("never assigned")?)?;
    assert!(assigned >= SystemTime::try_from(due)?, "it was assigned before its time");
    assert_eq!(fleet.pi(&id).reboots(&execution.name)?, 1);
    Ok(())
}

#[tokio::test]
async fn what_a_node_missed_expires_and_is_never_done_later() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    fleet.kill_agents().await?;
    wait_until(seconds(30), "the node is offline", async || Ok((!fleet.node(&id).await?.connected).then_some(())))
        .await?;
    let mut operation = reboot(&[&id], Duration::ZERO);
    // Long enough that the test sees it wait before it expires.
    operation.expire_time = Some(after(seconds(8)));
    let created = fleet.create(operation).await?;
    fleet
        .execution_becomes(&created.name, &id, seconds(10), "waiting for the node", |execution| {
            execution.wait_reason() == WaitReason::NodeOffline
        })
        .await?;
    fleet.ends(&created.name, seconds(30), OperationState::Failed).await?;
    assert_eq!(fleet.execution(&created.name, &id).await?.state(), State::Expired);

    fleet.start_agents()?;
    fleet.all_connected().await?;
    // A later operation succeeds, so the node had every chance to run the expired one.
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    assert_eq!(fleet.pi(&id).reboots(&execution_name(&created, &id))?, 0);
    Ok(())
}

#[tokio::test]
async fn a_cancelled_operation_that_waits_is_never_assigned() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    let mut operation = reboot(&[&id], Duration::ZERO);
    operation.schedule_time = Some(after(seconds(3)));
    let created = fleet.create(operation).await?;
    fleet.cancel(&created.name).await?;
    fleet.ends(&created.name, seconds(10), OperationState::Cancelled).await?;
    let execution = fleet.execution(&created.name, &id).await?;
    assert_eq!((execution.state(), execution.attempt), (State::Cancelled, 0));

    // After its time another operation runs, and this one still does not.
    let due = SystemTime::now() + seconds(3);
    wait_until(seconds(10), "its time has passed", async || Ok((SystemTime::now() > due).then_some(()))).await?;
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    assert_eq!(fleet.pi(&id).reboots(&execution.name)?, 0);
    Ok(())
}

#[tokio::test]
async fn a_cancel_during_the_notice_stops_the_reboot() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    let created = fleet.create(reboot(&[&id], seconds(600))).await?;
    fleet.execution_is(&created.name, &id, seconds(30), State::Running).await?;
    fleet.cancel(&created.name).await?;
    fleet.ends(&created.name, seconds(30), OperationState::Cancelled).await?;
    assert_eq!(fleet.execution(&created.name, &id).await?.state(), State::Cancelled);
    // The node is free again, and runs only the next operation.
    let next = fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    let pi = fleet.pi(&id);
    assert_eq!(pi.reboots(&execution_name(&created, &id))?, 0);
    assert_eq!(pi.reboots(&execution_name(&next, &id))?, 1);
    Ok(())
}

#[tokio::test]
async fn a_cancel_after_the_point_of_no_return_is_too_late_and_the_end_says_what_happened() -> Result<()> {
    let fleet = Fleet::builder().pis(1).shutdown_time(seconds(4)).start().await?;
    let id = fleet.ids().await?.remove(0);
    let created = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    let pi = fleet.pi(&id);
    let name = execution_name(&created, &id);
    // The point of no return is the shutdown: a long one gives the cancel time to arrive.
    wait_until(seconds(30), "the Pi goes down", async || Ok((pi.reboots(&name)? > 0).then_some(()))).await?;
    let cancelled = fleet.cancel(&created.name).await?;
    assert_eq!(cancelled.state(), OperationState::Cancelling);
    fleet.ends(&created.name, seconds(60), OperationState::Succeeded).await?;
    assert!(fleet.execution(&created.name, &id).await?.cancel_requested);
    assert_eq!(pi.reboots(&name)?, 1);
    Ok(())
}

#[tokio::test]
async fn the_same_request_twice_is_one_operation() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    let request =
        CreateOperationRequest { operation: Some(reboot(&[&id], Duration::ZERO)), request_id: "a-request".to_owned() };
    let first = fleet.operations().create_operation(request.clone()).await?.into_inner();
    let second = fleet.operations().create_operation(request.clone()).await?.into_inner();
    assert_eq!(first.name, second.name);
    fleet.ends(&first.name, seconds(60), OperationState::Succeeded).await?;
    // The answer is the same long after the end.
    let third = fleet.operations().create_operation(request.clone()).await?.into_inner();
    assert_eq!((third.state(), third.name), (OperationState::Succeeded, first.name.clone()));

    let other = CreateOperationRequest { operation: Some(poweroff(&[&id])), ..request };
    let status = fleet.operations().create_operation(other).await.err().context("another body was taken")?;
    assert!(
        matches!(status.code(), Code::AlreadyExists | Code::InvalidArgument | Code::FailedPrecondition),
        "{status:?}"
    );
    let all = fleet.operations().list_operations(ListOperationsRequest::default()).await?.into_inner().operations;
    assert_eq!(all.iter().map(|operation| operation.name.as_str()).collect::<Vec<_>>(), [first.name.as_str()]);
    assert_eq!(fleet.pi(&id).reboots(&execution_name(&first, &id))?, 1);
    Ok(())
}

#[tokio::test]
async fn a_repeated_request_gets_the_first_result_whatever_went_since() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    let file = make_image(fleet.dir(), "image", Compression::Gzip)?;
    let image = push(&mut fleet.artifacts(), "image", Kind::Image, Purpose::Unspecified, &file).await?;
    let ends = SystemTime::now() + seconds(4);
    let request = |operation: Operation, request_id: &str| CreateOperationRequest {
        operation: Some(operation),
        request_id: request_id.to_owned(),
    };
    // First case: its expiry passes.
    let short = request(Operation { expire_time: Some(ends.into()), ..reboot(&[&id], seconds(600)) }, "short");
    let first = fleet.operations().create_operation(short.clone()).await?.into_inner();
    // Second case: its image is deleted. A cancelled operation that never began does not need the image.
    let later = Operation { schedule_time: Some(after(seconds(3600))), ..update(&[&id], &image.name, "") };
    let installs = request(later, "installs");
    let second = fleet.operations().create_operation(installs.clone()).await?.into_inner();
    fleet.cancel(&second.name).await?;
    fleet.artifacts().delete_artifact(DeleteArtifactRequest { name: image.name.clone() }).await?;
    // Third case: the retry of an operation that was itself retried, and whose node is gone.
    let retry = RetryOperationRequest { name: second.name.clone(), request_id: "retry".to_owned() };
    let refused = fleet.operations().retry_operation(retry.clone()).await.err().context("its image is gone")?;
    assert_eq!(refused.code(), Code::NotFound, "{refused:?}");
    fleet.cancel(&first.name).await?;
    fleet.ends(&first.name, seconds(30), OperationState::Cancelled).await?;
    let retry = RetryOperationRequest { name: first.name.clone(), ..retry };
    let third = fleet.operations().retry_operation(retry.clone()).await?.into_inner();
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await.ok();
    fleet.kill_agents().await?;
    fleet.nodes().delete_node(DeleteNodeRequest { name: id.clone(), force: true }).await?;

    wait_until(seconds(20), "its time is over", async || Ok((SystemTime::now() > ends).then_some(()))).await?;
    for (request, made) in [(&short, &first), (&installs, &second)] {
        let again = fleet.operations().create_operation(request.clone()).await?.into_inner();
        assert_eq!(again.name, made.name);
    }
    assert_eq!(fleet.operations().retry_operation(retry).await?.into_inner().name, third.name);
    // Another body under the same id stays a conflict. The same body under a new id is checked again.
    let other = request(reboot(&[&id], seconds(1)), "short");
    let status = fleet.operations().create_operation(other).await.err().context("another body was taken")?;
    assert_eq!((status.code(), reason(&status).as_str()), (Code::AlreadyExists, "REQUEST_ID_REUSED"));
    for (request, code) in [(short, Code::InvalidArgument), (installs, Code::NotFound)] {
        let anew = CreateOperationRequest { request_id: "another".to_owned(), ..request };
        let status = fleet.operations().create_operation(anew).await.err().context("it was taken")?;
        assert_eq!(status.code(), code, "{status:?}");
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_node_does_one_thing_at_a_time() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    let first = fleet.create(reboot(&[&id], seconds(3))).await?;
    fleet.execution_is(&first.name, &id, seconds(30), State::Running).await?;
    let second = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    fleet
        .execution_becomes(&second.name, &id, seconds(10), "waiting for the first", |execution| {
            execution.wait_reason() == WaitReason::NodeBusy
        })
        .await?;
    fleet.ends(&first.name, seconds(60), OperationState::Succeeded).await?;
    fleet.ends(&second.name, seconds(60), OperationState::Succeeded).await?;
    let order: Vec<String> =
        fleet.pi(&id).log()?.into_iter().filter(|l| l.event == "reboot").map(|l| l.execution).collect();
    assert_eq!(order, [execution_name(&first, &id), execution_name(&second, &id)]);
    Ok(())
}

#[tokio::test]
async fn a_controller_that_is_asked_to_end_ends_in_time_and_forgets_nothing() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    let created = fleet.create(reboot(&[&id], seconds(4))).await?;
    fleet.execution_is(&created.name, &id, seconds(30), State::Running).await?;
    let mut watch = fleet.nodes().watch_nodes(marco_proto::v1::WatchNodesRequest::default()).await?.into_inner();
    let status = fleet.terminate_controller(seconds(20)).await?;
    assert!(status.success(), "{status}");
    // The server ended the open stream. A client of a stream that was merely cut would wait forever.
    tokio::time::timeout(seconds(5), async { while let Ok(Some(_)) = watch.message().await {} }).await?;
    fleet.start_controller().await?;
    fleet.ends(&created.name, seconds(90), OperationState::Succeeded).await?;
    assert_eq!(fleet.pi(&id).reboots(&execution_name(&created, &id))?, 1);
    Ok(())
}
