//! Rollouts on virtual Pis: limited concurrency, automatic pauses, and resuming.

use std::fs;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{execution_name, reboot, update};
use integration_tests::image::{Compression, make_image};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::execution::WaitReason;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::rollout::FailureLimit;
use marco_proto::v1::{
    Event, ExplainExecutionRequest, ListEventsRequest, MaintenanceWindow, ResumeOperationRequest,
    RetryOperationRequest, Rollout,
};

async fn events(fleet: &Fleet, operation: &str) -> Result<Vec<Event>> {
    let request = ListEventsRequest { parent: operation.to_owned(), page_size: 1000, page_token: String::new() };
    Ok(fleet.operations().list_events(request).await?.into_inner().events)
}

/// The most nodes that were between assignment and end at the same time, by the events.
fn most_in_flight(events: &[Event]) -> i32 {
    let (mut now, mut most) = (0, 0);
    for event in events.iter().filter(|event| !event.node.is_empty()) {
        match (event.from.as_str(), event.to.as_str()) {
            ("PENDING", "ASSIGNED") => now += 1,
            (_, "SUCCEEDED" | "FAILED" | "ROLLED_BACK") => now -= 1,
            _ => {}
        }
        most = most.max(now);
    }
    most
}

#[tokio::test]
async fn nodes_go_a_few_at_a_time_and_who_waits_is_told_for_whom() -> Result<()> {
    let fleet = Fleet::builder().pis(8).boot_time(seconds(1)).start().await?;
    let ids = fleet.ids().await?;
    let mut operation = reboot(&ids, seconds(1));
    operation.rollout = Some(Rollout { max_in_flight: 2, canary: 1, ..Rollout::default() });
    let created = fleet.create(operation).await?;
    assert_eq!(created.rollout.as_ref().context("no rollout")?.max_in_flight, 2);
    let last = ids.last().context("no Pi")?;
    fleet
        .execution_becomes(&created.name, last, seconds(20), "waiting for a slot", |execution| {
            execution.wait_reason() == WaitReason::NoSlot
        })
        .await?;
    let name = execution_name(&created, last);
    let explained =
        fleet.operations().explain_execution(ExplainExecutionRequest { name: name.clone() }).await?.into_inner();
    assert!(explained.holders.iter().all(|holder| holder.starts_with(&created.name) && *holder != name));
    // The rollout has progressed since, so the explanation names a slot only if the execution still waits.
    let still_waits = explained.execution.as_ref().is_some_and(|found| found.wait_reason() == WaitReason::NoSlot);
    assert!(!still_waits || explained.explanation.contains("slot"), "{explained:?}");
    fleet.ends(&created.name, seconds(120), OperationState::Succeeded).await?;
    let events = events(&fleet, &created.name).await?;
    assert_eq!(most_in_flight(&events), 2);
    let first_end = events.iter().position(|event| event.to == "SUCCEEDED").context("nobody succeeded")?;
    let before = events.iter().take(first_end).filter(|event| event.to == "ASSIGNED").count();
    assert_eq!(before, 1, "the canary goes alone");
    for id in &ids {
        assert_eq!(fleet.pi(id).reboots(&execution_name(&created, id))?, 1);
    }
    Ok(())
}

#[tokio::test]
async fn nodes_that_cannot_do_it_pause_the_rest_and_a_retry_takes_only_those() -> Result<()> {
    let fleet = Fleet::builder().pis(6).start().await?;
    let ids = fleet.ids().await?;
    // There is no default bootcode, and these nodes have lost their fallback.
    for id in ids.iter().take(3) {
        fs::remove_file(fleet.pi(id).path("recovery/marco/fallback.zip"))?;
    }
    let file = make_image(fleet.dir(), "next", Compression::Gzip)?;
    let image = push(&mut fleet.artifacts(), "next", Kind::Image, Purpose::Unspecified, &file).await?;
    let mut operation = update(&ids, &image.name, "");
    operation.rollout =
        Some(Rollout { max_in_flight: 3, failure_limit: Some(FailureLimit::MaxFailures(0)), ..Rollout::default() });
    let created = fleet.create(operation).await?;
    // The first failure pauses the operation. The other two were running by then, and may end.
    let paused = wait_until(seconds(60), "the operation pauses by itself, and the three have failed", async || {
        let operation = fleet.operation(&created.name).await?;
        let failed = operation.counts.unwrap_or_default().failed;
        Ok((operation.state() == OperationState::Paused && failed == 3).then_some(operation))
    })
    .await?;
    assert!(paused.state_reason.starts_with("max_failures passed"), "{}", paused.state_reason);
    assert_eq!(paused.paused_by, "controller");
    assert_eq!(paused.counts.context("no counts")?.pending, 3);
    fleet.operations().resume_operation(ResumeOperationRequest { name: created.name.clone() }).await?;
    let ended = fleet.ends(&created.name, seconds(180), OperationState::Failed).await?;
    assert_eq!(ended.paused_by, "", "it was let go on");
    assert_eq!(most_in_flight(&events(&fleet, &created.name).await?), 3);
    let request = RetryOperationRequest { name: created.name.clone(), request_id: String::new() };
    let retried = fleet.operations().retry_operation(request).await?.into_inner();
    assert_eq!(retried.rollout, created.rollout);
    let executions = fleet.executions(&retried.name).await?;
    let nodes: Vec<String> = executions.iter().map(|execution| execution.node.clone()).collect();
    // Nodes that succeeded must not install the same image twice.
    assert_eq!(nodes, ids.iter().take(3).map(|id| format!("nodes/{id}")).collect::<Vec<_>>());
    fleet.cancel(&retried.name).await?;
    Ok(())
}

#[tokio::test]
async fn a_node_waits_for_the_window_and_is_told_when_it_opens() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let ids = fleet.ids().await?;
    let id = ids.first().context("no Pi")?;
    let window = |cron: &str| {
        let duration = Some(prost_types::Duration { seconds: 3600, nanos: 0 });
        Some(MaintenanceWindow { cron: cron.to_owned(), duration, time_zone: "Europe/Madrid".to_owned() })
    };
    let mut yearly = reboot(&ids, seconds(0));
    // One hour a year. The test fails if it runs in that hour.
    yearly.window = window("0 3 29 7 *");
    let created = fleet.create(yearly).await?;
    let execution = fleet.execution(&created.name, id).await?;
    assert_eq!(execution.wait_reason(), WaitReason::WindowClosed);
    let opens = execution.next_attempt_time.context("no next attempt")?;
    let expires = created.expire_time.context("no expiry")?;
    assert_eq!(expires.seconds - opens.seconds, 24 * 3600, "it lives until after its first window");
    let request = ExplainExecutionRequest { name: execution.name.clone() };
    let explained = fleet.operations().explain_execution(request).await?.into_inner();
    assert!(explained.explanation.contains("opens next at"), "{explained:?}");

    let mut always = reboot(&ids, seconds(0));
    always.window = window("* * * * *");
    fleet.succeeds(always, seconds(60)).await?;
    assert_eq!(fleet.pi(id).reboots(&execution.name)?, 0);

    let mut wrong = reboot(&ids, seconds(0));
    wrong.window = window("25 o'clock");
    let refused = fleet.create(wrong).await.err().context("it was taken")?;
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(refused.message().contains("operation.window.cron"), "{refused:?}");
    Ok(())
}
