//! Dry runs: the checks of an operation before it is created.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::certs::NodeKey;
use integration_tests::fleet::{reboot, update};
use integration_tests::image::{Compression, make_image};
use integration_tests::process::{binary, run};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::execution::State;
use marco_proto::v1::operation::{State as OperationState, Target};
use marco_proto::v1::operation_check::Verdict;
use marco_proto::v1::{
    AllNodes, Board, CheckOperationRequest, CreateJoinTokenRequest, EnrollRequest, ListOperationsRequest, Node,
    Operation, OperationCheck, QuarantineNodeRequest, Rollout, SetDefaultArtifactRequest, UpdateNodeRequest,
};
use prost_types::FieldMask;
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
    // The controller may still show the node's state from before its new Hello.
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

    // A dry run refuses whatever a creation refuses, and stores nothing.
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

    // The dry run was right: the operation fails for the same reason.
    let created = fleet.create(update(&[weak], "next", "")).await?;
    fleet.ends(&created.name, seconds(60), OperationState::Failed).await?;
    let error = fleet.execution(&created.name, weak).await?.error.context("no reason")?;
    assert_eq!(error.reason, "UNDER_VOLTAGE");

    // An operation on a node that is away waits.
    fleet.kill_agents().await?;
    wait_until(seconds(60), "the node is away", async || {
        let told = check(&fleet, reboot(&[good], Duration::ZERO)).await?;
        Ok(told.iter().all(|check| check.verdict() == Verdict::Waits && check.reason == "NODE_OFFLINE").then_some(()))
    })
    .await?;
    fleet.went_well();
    Ok(())
}

/// Enrols a node that never connects.
async fn absent(fleet: &Fleet, id: &str, require_approval: bool) -> Result<()> {
    let request = CreateJoinTokenRequest { require_approval, ..CreateJoinTokenRequest::default() };
    let token = fleet.nodes().create_join_token(request).await?.into_inner().token;
    let key = NodeKey::generate()?;
    let channel = fleet.admin().anonymous().channel(fleet.addresses().enroll)?;
    let request = EnrollRequest {
        token,
        certificate_request: key.request(&key)?.pem,
        node_id: id.to_owned(),
        board: Some(Board::default()),
    };
    EnrollmentServiceClient::new(channel).enroll(request).await?;
    Ok(())
}

/// Checks that the dry run predicts the reason for which the execution then waits.
async fn waits_for(fleet: &Fleet, id: &str, reason: &str) -> Result<()> {
    let asked = check(fleet, reboot(&[id], Duration::ZERO)).await?;
    let [asked] = asked.as_slice() else { anyhow::bail!("{asked:?}") };
    assert_eq!((asked.verdict(), asked.reason.as_str()), (Verdict::Waits, reason), "{id}: {asked:?}");
    assert!(asked.message.contains(id), "{asked:?}");
    let created = fleet.create(reboot(&[id], Duration::ZERO)).await?;
    let waits = fleet.execution(&created.name, id).await?;
    assert_eq!(waits.wait_reason().as_str_name(), format!("WAIT_REASON_{reason}"), "{id}");
    Ok(())
}

#[tokio::test]
async fn a_dry_run_says_what_the_operation_then_waits_for() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let busy = fleet.ids().await?.remove(0);
    absent(&fleet, "away", false).await?;
    absent(&fleet, "held", true).await?;
    absent(&fleet, "out", false).await?;
    let quarantine = QuarantineNodeRequest { name: "nodes/out".to_owned(), reason: "smoke".to_owned() };
    fleet.nodes().quarantine_node(quarantine).await?;
    // A long notice keeps the node busy during the whole test.
    let work = fleet.create(reboot(&[&busy], seconds(600))).await?;
    fleet.execution_is(&work.name, &busy, seconds(60), State::Running).await?;
    for (id, reason) in [
        ("away", "NODE_OFFLINE"),
        ("held", "AWAITING_APPROVAL"),
        ("out", "NODE_QUARANTINED"),
        (busy.as_str(), "NODE_BUSY"),
    ] {
        waits_for(&fleet, id, reason).await?;
    }
    fleet.went_well();
    Ok(())
}

/// The warnings of a check: the reason, whether a client should ask for confirmation, and the message.
async fn warnings(fleet: &Fleet, operation: Operation) -> Result<Vec<(String, bool, String)>> {
    let request = CheckOperationRequest { operation: Some(operation) };
    let warnings = fleet.operations().check_operation(request).await?.into_inner().warnings;
    Ok(warnings.into_iter().map(|warning| (warning.reason, warning.ask, warning.message)).collect())
}

#[tokio::test]
async fn what_looks_like_a_mistake_is_said_before_it_is_done() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    absent(&fleet, "a", false).await?;
    absent(&fleet, "b", false).await?;
    absent(&fleet, "out", false).await?;
    let labelled = Node { name: "nodes/a".into(), labels: [("switch".into(), "1".into())].into(), ..Node::default() };
    let update_mask = Some(FieldMask { paths: vec!["labels".to_owned()] });
    fleet.nodes().update_node(UpdateNodeRequest { node: Some(labelled), update_mask }).await?;
    let quarantine = QuarantineNodeRequest { name: "nodes/out".to_owned(), reason: "smoke".to_owned() };
    fleet.nodes().quarantine_node(quarantine).await?;

    let plain = reboot(&["a", "b"], Duration::ZERO);
    assert!(warnings(&fleet, plain.clone()).await?.is_empty());
    let told = warnings(&fleet, reboot(&["a", "out"], Duration::ZERO)).await?;
    assert!(
        matches!(&told[..], [(reason, true, said)] if reason == "NODE_QUARANTINED" && said.ends_with(": out")),
        "{told:?}"
    );
    // An operation on all nodes skips a quarantined one, so there is nothing to warn of.
    let all = Operation { target: Some(Target::All(AllNodes {})), ..plain.clone() };
    assert!(warnings(&fleet, all.clone()).await?.is_empty());

    let grouped = |label: &str| Operation {
        rollout: Some(Rollout { group_by: label.to_owned(), max_in_flight_per_group: 1, ..Rollout::default() }),
        ..all.clone()
    };
    let told = warnings(&fleet, grouped("switch")).await?;
    assert!(matches!(&told[..], [(reason, false, said)] if reason == "NO_GROUP" && said.ends_with(": b")), "{told:?}");
    let told = warnings(&fleet, grouped("swich")).await?;
    assert!(
        matches!(&told[..], [(_, _, said)] if said.contains("label swich") && said.ends_with(": a, b")),
        "{told:?}"
    );

    // Ten years is the limit.
    let years = |years: u64| {
        let time = std::time::SystemTime::now() + seconds(years * 366 * 24 * 3600);
        Operation { schedule_time: Some(time.into()), ..plain.clone() }
    };
    assert!(warnings(&fleet, years(9)).await?.is_empty());
    let told = warnings(&fleet, years(11)).await?;
    assert!(matches!(&told[..], [(reason, true, _)] if reason == "FAR_AHEAD"), "{told:?}");

    // marcoctl shows the same warnings, and asks for `--force` on the same ones.
    let certs = fleet.certs().display().to_string();
    let api = fleet.addresses().api.to_string();
    let line = ["--controller", &api, "--certs", &certs];
    let marcoctl = async |rest: &[&str]| run(&binary("marcoctl")?, &[&line[..], rest].concat(), seconds(30)).await;
    let dry = ["operations", "reboot", "--all", "--group-by", "swich", "--max-per-group", "1", "--dry-run"];
    let printed = marcoctl(&dry).await?.success()?;
    assert!(printed.contains("warning: without the label swich") && printed.contains("one group"), "{printed}");
    for doubtful in [&["out"][..], &["a", "--at", "2099-01-01T00:00:00Z"]] {
        let asked = [&["operations", "reboot"], doubtful].concat();
        let refused = marcoctl(&asked).await?;
        assert_eq!((refused.status.code(), refused.stdout.as_str()), (Some(1), ""), "{refused:?}");
        assert!(refused.stderr.contains("--force"), "{refused:?}");
        marcoctl(&[&asked[..], &["--force"]].concat()).await?.success()?;
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn artifact_in_use_is_deleted_only_by_force() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let ids = fleet.ids().await?;
    for name in ["plain", "default", "running"] {
        let file = make_image(fleet.dir(), name, Compression::Gzip)?;
        push(&mut fleet.artifacts(), name, Kind::Image, Purpose::Unspecified, &file).await?;
    }
    let request = SetDefaultArtifactRequest { name: "default".to_owned(), board: String::new() };
    fleet.artifacts().set_default_artifact(request).await?;
    fleet.succeeds(update(&ids, "running", ""), seconds(120)).await?;
    let certs = fleet.certs().display().to_string();
    let api = fleet.addresses().api.to_string();
    let line = ["--controller", &api, "--certs", &certs, "artifacts", "delete"];
    let delete = async |rest: &[&str]| run(&binary("marcoctl")?, &[&line[..], rest].concat(), seconds(30)).await;
    for (name, said) in [("default", "is the default for every board"), ("running", "is what pi-01 runs")] {
        let refused = delete(&["plain", name]).await?;
        assert_eq!((refused.status.code(), refused.stdout.as_str()), (Some(1), ""), "{refused:?}");
        assert!(refused.stderr.contains(said) && refused.stderr.contains("--force"), "{refused:?}");
    }
    delete(&["plain"]).await?.success()?;
    let partly = delete(&["default", "typo", "running", "--force"]).await?;
    assert_eq!((partly.status.code(), partly.stdout.as_str()), (Some(1), "default  deleted\nrunning  deleted\n"));
    assert!(partly.stderr.contains("typo  not deleted: "), "{partly:?}");
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn an_installer_that_waits_for_an_image_would_not_reboot() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let token = fleet.dir().join("token");
    fs::write(&token, fleet.token(1).await?)?;
    fleet.start_new_agents(&["--token-file".to_owned(), token.display().to_string(), "--blank".to_owned()])?;
    let id = wait_until(seconds(60), "the installer is connected", async || {
        let node = fleet.list_nodes().await?.into_iter().find(|node| node.connected);
        Ok(node.map(|node| node.name.trim_start_matches("nodes/").to_owned()))
    })
    .await?;
    waits_for(&fleet, &id, "NODE_INSTALLING").await?;
    let file = make_image(fleet.dir(), "next", Compression::Gzip)?;
    push(&mut fleet.artifacts(), "next", Kind::Image, Purpose::Unspecified, &file).await?;
    let told = check(&fleet, update(&[&id], "next", "")).await?;
    assert!(told.iter().all(|check| check.verdict() == Verdict::Ready), "{told:?}");
    fleet.went_well();
    Ok(())
}
