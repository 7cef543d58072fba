//! The recorded history of an operation, and late nodes: how they are shown, abandoned, and still heard.

use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::client::{bad_fields, reason};
use integration_tests::fleet::{execution_name, reboot};
use integration_tests::process::{Output, binary, run};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::{AbandonExecutionRequest, Event, ListEventsRequest, ListExecutionsRequest};
use tonic::Code;

async fn marcoctl(fleet: &Fleet, arguments: &[&str]) -> Result<Output> {
    let address = fleet.addresses().api.to_string();
    let certs = fleet.certs().display().to_string();
    let mut all = vec!["--controller", &address, "--certs", &certs];
    all.extend_from_slice(arguments);
    run(&binary("marcoctl")?, &all, seconds(60)).await
}

async fn page(fleet: &Fleet, parent: &str, size: i32, token: &str) -> Result<(Vec<Event>, String), tonic::Status> {
    let request = ListEventsRequest { parent: parent.to_owned(), page_size: size, page_token: token.to_owned() };
    let page = fleet.operations().list_events(request).await?.into_inner();
    Ok((page.events, page.next_page_token))
}

#[tokio::test]
async fn events_are_read_by_cursor_while_more_of_them_come() -> Result<()> {
    let mut fleet = Fleet::builder().pis(3).start().await?;
    let ids = fleet.ids().await?;
    let created = fleet.create(reboot(&ids, Duration::ZERO)).await?;
    let (begins, expires) = (created.schedule_time.context("no time")?, created.expire_time.context("no expiry")?);
    assert_eq!(expires.seconds - begins.seconds, 24 * 3600);
    let name = created.name.as_str();
    // The first page is read before most events exist.
    let (mut all, mut token) = page(&fleet, name, 1, "").await?;
    fleet.ends(name, seconds(60), OperationState::Succeeded).await?;
    // An empty token means that the list had ended already, so it is read again now.
    if token.is_empty() {
        (all, token) = page(&fleet, name, 1, "").await?;
    }
    while !token.is_empty() {
        let (events, next) = page(&fleet, name, 2, &token).await?;
        assert!(events.len() == 2 || next.is_empty(), "{events:?}");
        all.extend(events);
        token = next;
    }
    assert_eq!(all, page(&fleet, name, 1000, "").await?.0);
    for (event, number) in all.iter().zip(1..) {
        assert_eq!(event.number, number, "{event:?}");
        assert!(event.time.is_some() && !event.actor.is_empty() && !event.to.is_empty(), "{event:?}");
    }
    for id in &ids {
        let of_node = |event: &&Event| event.node == format!("nodes/{id}");
        let path: Vec<&str> = all.iter().filter(of_node).map(|event| event.to.as_str()).collect();
        assert!(path.starts_with(&["ASSIGNED", "RUNNING"]) && path.ends_with(&["SUCCEEDED"]), "{path:?}");
        let by_node = all.iter().filter(of_node).find(|event| event.to == "RUNNING").context("no RUNNING")?;
        assert_eq!(by_node.actor, format!("nodes/{id}"));
    }
    let damaged = page(&fleet, name, 2, "nonsense").await.err().context("any token was taken")?;
    assert_eq!((damaged.code(), bad_fields(&damaged)), (Code::InvalidArgument, vec!["page_token".to_owned()]));
    let request = ListExecutionsRequest { parent: name.to_owned(), page_size: 1, ..Default::default() };
    let other = fleet.operations().list_executions(request).await?.into_inner().next_page_token;
    // A token carries its list, so that one of another list is not taken for a position in this one.
    assert!(!other.is_empty() && page(&fleet, name, 2, &other).await.is_err(), "a token of another list was taken");
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_late_node_is_explained_on_one_screen_given_up_and_its_late_truth_still_counts() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).own_clocks().shutdown_time(seconds(6)).start().await?;
    let id = fleet.ids().await?.remove(0);
    let created = fleet.create(reboot(&[&id], seconds(8))).await?;
    let mut name = execution_name(&created, &id);
    fleet
        .execution_becomes(&created.name, &id, seconds(20), "waiting for the notice", |execution| {
            execution.phase == "waiting for the notice to pass"
        })
        .await?;
    let abandon = AbandonExecutionRequest { name: name.clone() };
    let early = fleet.operations().abandon_execution(abandon).await.err().context("it was given up in time")?;
    assert_eq!((early.code(), reason(&early).as_str()), (Code::FailedPrecondition, "NOT_OVERDUE"));
    fleet.kill_agents().await?;
    // The clock jumps instead of the test waiting for the deadline.
    fleet.jump_clock(0, 3600)?;
    // After a jump of the clock, as after a suspend, nodes first get time to reconnect.
    let late =
        fleet.execution_becomes(&created.name, &id, seconds(120), "overdue", |execution| execution.overdue).await?;
    assert_eq!(late.state(), State::Running);
    assert_eq!(late.overdue_reason, "waiting for the notice to pass: that takes longer than 2m 8s");
    let explained = marcoctl(&fleet, &["operations", "explain", &created.name]).await?.success()?;
    for word in ["OVERDUE", late.overdue_reason.as_str(), "operations abandon"] {
        assert!(explained.contains(word), "no {word} in {explained}");
    }
    // A terminal has 24 lines.
    assert!(explained.lines().count() <= 24, "{explained}");
    marcoctl(&fleet, &["operations", "abandon", &created.name, &id]).await?.success()?;
    fleet.ends(&created.name, seconds(20), OperationState::Failed).await?;
    let given_up = fleet.execution(&created.name, &id).await?;
    assert_eq!(given_up.error.context("no error")?.reason, "NEVER_RETURNED");
    // The agent returns within its notice, learns that the execution was abandoned, and does not reboot.
    fleet.start_agents()?;
    fleet.all_connected().await?;

    // A node that was rebooting reports the outcome, however late.
    let created = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    let given_up = std::mem::replace(&mut name, execution_name(&created, &id));
    let pi = fleet.pi(&id);
    wait_until(seconds(30), "the Pi goes down", async || Ok((pi.reboots(&name)? > 0).then_some(()))).await?;
    assert_eq!(pi.reboots(&given_up)?, 0, "it was given up");
    fleet.kill_agents().await?;
    fleet.jump_clock(0, 7200)?;
    fleet.execution_becomes(&created.name, &id, seconds(120), "overdue", |execution| execution.overdue).await?;
    marcoctl(&fleet, &["operations", "abandon", &created.name, &id]).await?.success()?;
    fleet.ends(&created.name, seconds(20), OperationState::Failed).await?;
    fleet.start_agents()?;
    let heard = wait_until(seconds(90), "the node tells how it ended", async || {
        let execution = fleet.execution(&created.name, &id).await?;
        Ok((execution.state() == State::Succeeded).then_some(execution))
    })
    .await?;
    assert!(heard.error.is_none() && fleet.pi(&id).reboots(&name)? == 1, "{heard:?}");
    assert_eq!(fleet.operation(&created.name).await?.state(), OperationState::Succeeded);
    fleet.went_well();
    Ok(())
}
