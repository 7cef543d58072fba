//! What would become of an operation, asked before it is created.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::fleet::{reboot, update};
use integration_tests::image::{Compression, make_image};
use integration_tests::process::{binary, run};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::operation_check::Verdict;
use marco_proto::v1::{CheckOperationRequest, ListOperationsRequest, Operation, OperationCheck};
use tonic::{Code, Status};

async fn check(fleet: &Fleet, operation: Operation) -> Result<Vec<OperationCheck>, Status> {
    let request = CheckOperationRequest { operation: Some(operation) };
    Ok(fleet.operations().check_operation(request).await?.into_inner().checks)
}

#[tokio::test]
async fn what_a_node_would_refuse_is_told_before_it_is_asked_to() -> Result<()> {
    let mut fleet = Fleet::builder().pis(2).start().await?;
    let ids = fleet.ids().await?;
    let [good, weak] = ids.as_slice() else { anyhow::bail!("two Pis") };
    let file = make_image(fleet.dir(), "next", Compression::Gzip)?;
    push(&mut fleet.artifacts(), "next", Kind::Image, Purpose::Unspecified, &file).await?;
    fleet.kill_agents().await?;
    fs::write(fleet.pi(weak).path("under-voltage"), "")?;
    fleet.start_agents()?;
    fleet.all_connected().await?;
    // The node that was connected before may be seen before it says hello anew.
    let told = wait_until(seconds(30), "the node says that it is weak", async || {
        let told = check(&fleet, update(&ids, "next", "")).await?;
        Ok(told.iter().any(|check| check.verdict() == Verdict::Refused).then_some(told))
    })
    .await?;
    let [first, second] = told.as_slice() else { anyhow::bail!("{told:?}") };
    assert_eq!((first.node.as_str(), first.verdict()), (format!("nodes/{good}").as_str(), Verdict::Ready));
    assert_eq!((second.node.as_str(), second.reason.as_str()), (format!("nodes/{weak}").as_str(), "UNDER_VOLTAGE"));
    let told = check(&fleet, reboot(&ids, Duration::ZERO)).await?;
    assert!(told.iter().all(|check| check.verdict() == Verdict::Ready), "a reboot writes no card: {told:?}");

    // What a creation refuses is refused, and nothing was stored by all of that.
    let error = check(&fleet, update(&ids, "no-such-image", "")).await.err().context("an image that is not there")?;
    assert_eq!(error.code(), Code::NotFound, "{error}");
    let certs = fleet.certs().display().to_string();
    let api = fleet.addresses().api.to_string();
    let line = ["--controller", &api, "--certs", &certs, "operations", "update", "--all"];
    let printed =
        run(&binary("marcoctl")?, &[&line[..], &["--image", "next", "--dry-run"]].concat(), seconds(30)).await?;
    assert_eq!(printed.status.code(), Some(1), "{printed:?}");
    assert!(printed.stdout.contains("UNDER_VOLTAGE") && printed.stdout.contains("READY"), "{printed:?}");
    let stored = fleet.operations().list_operations(ListOperationsRequest::default()).await?.into_inner();
    assert!(stored.operations.is_empty(), "{stored:?}");

    // And it was right.
    let created = fleet.create(update(&[weak], "next", "")).await?;
    fleet.ends(&created.name, seconds(60), OperationState::Failed).await?;
    let error = fleet.execution(&created.name, weak).await?.error.context("no reason")?;
    assert_eq!(error.reason, "UNDER_VOLTAGE");

    // A node that is away would wait.
    fleet.kill_agents().await?;
    wait_until(seconds(60), "the node is away", async || {
        let told = check(&fleet, reboot(&[good], Duration::ZERO)).await?;
        Ok(told.iter().all(|check| check.verdict() == Verdict::Waits && check.reason == "NODE_OFFLINE").then_some(()))
    })
    .await?;
    fleet.went_well();
    Ok(())
}
