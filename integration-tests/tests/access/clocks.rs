//! A controller with a wrong clock that becomes right again: nodes and operators recover by themselves, and no node
//! renews endlessly.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use integration_tests::certs::NodeKey;
use integration_tests::client::reason;
use integration_tests::fleet::reboot;
use integration_tests::process::{Output, binary, run};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::{AuditFilter, ListAuditEventsRequest, ListNodesRequest, Role};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::scene::{access, api_token, enrollment, wish};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;
/// Nodes of a fleet whose controller gets a wrong clock.
const NODES: usize = 3;
/// Duration of the observation afterwards. A node that renews each second has done so many times by then.
const LOOK: Duration = Duration::from_secs(20);

/// Number of renewals, by the agents' logs.
fn renewals(fleet: &Fleet) -> Result<usize> {
    Ok(fleet.agents_log()?.matches("certificate renewed").count())
}

async fn says(fleet: &Fleet, text: &str) -> Result<()> {
    wait_until(seconds(30), text, async || Ok(fleet.controller_log(0)?.contains(text).then_some(()))).await
}

/// Sets the controller's clock `ahead` seconds off, and waits until the controller uses the new time.
async fn set_clock(fleet: &Fleet, ahead: i64) -> Result<()> {
    let said = "the controller's clock was set";
    let before = fleet.controller_log(0)?.matches(said).count();
    fleet.jump_clock(0, ahead)?;
    wait_until(seconds(30), "the controller goes by another time", async || {
        Ok((fleet.controller_log(0)?.matches(said).count() > before).then_some(()))
    })
    .await
}

/// Waits until all nodes are connected, as seen by an operator with a right clock on a new connection.
async fn everybody_is_in(fleet: &Fleet, nodes: usize) -> Result<()> {
    wait_until(seconds(90), "nodes and operators are in again", async || {
        let mut operator = NodeServiceClient::new(fleet.channel_of(0)?);
        let Ok(listed) = operator.list_nodes(ListNodesRequest::default()).await else { return Ok(None) };
        let connected = listed.into_inner().nodes.iter().filter(|node| node.connected).count();
        Ok((connected == nodes).then_some(()))
    })
    .await?;
    list_nodes(fleet).await?.success()?;
    Ok(())
}

/// The output of an operator's `nodes list`.
async fn list_nodes(fleet: &Fleet) -> Result<Output> {
    let address = format!("localhost:{}", fleet.addresses().api.port());
    let certs = fleet.certs().display().to_string();
    let arguments = ["--controller", &address, "--certs", &certs, "nodes", "list"];
    run(&binary("marcoctl")?, &arguments, seconds(30)).await
}

/// Keeps the nodes working for a while.
async fn works(fleet: &Fleet) -> Result<()> {
    let ids = fleet.ids().await?;
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let begun = Instant::now();
    while begun.elapsed() < LOOK {
        fleet.succeeds(reboot(&ids, Duration::ZERO), seconds(60)).await?;
    }
    Ok(())
}

/// Restarts the agents, and waits until each has a session.
async fn meet(fleet: &mut Fleet) -> Result<()> {
    fleet.kill_agents().await?;
    let sessions = fleet.agents_log()?.matches("session open").count();
    fleet.start_agents()?;
    wait_until(seconds(60), "the nodes meet the controller", async || {
        Ok((fleet.agents_log()?.matches("session open").count() >= sessions + NODES).then_some(()))
    })
    .await
}

/// Nodes meet a controller whose clock is `wrong` seconds off, renew, and meet it again when it is `right` seconds off.
async fn wrong_and_right_again(wrong: i64, right: i64) -> Result<()> {
    let mut fleet = Fleet::builder().pis(NODES).own_clocks().start().await?;
    if right != 0 {
        set_clock(&fleet, right).await?;
        meet(&mut fleet).await?;
    }
    let before = renewals(&fleet)?;
    set_clock(&fleet, wrong).await?;
    // Agents believe the session's time, store it, and renew by it at their next start.
    meet(&mut fleet).await?;
    meet(&mut fleet).await?;
    wait_until(seconds(60), "each node renewed by the wrong time", async || {
        Ok((renewals(&fleet)? >= before + NODES).then_some(()))
    })
    .await?;
    // A clock that is a year ahead also makes the certificates of operators expire.
    if wrong >= 365 * DAY {
        let shut_out = list_nodes(&fleet).await?;
        assert!(!shut_out.status.success() && shut_out.stderr.contains("clock"), "{shut_out:?}");
    }
    set_clock(&fleet, right).await?;
    fleet.kill_agents().await?;
    fleet.start_agents()?;
    everybody_is_in(&fleet, NODES).await?;
    works(&fleet).await?;
    // One renewal by the wrong time, and one by the right time. One more if a node met both times with its first
    // certificate.
    let renewed = renewals(&fleet)? - before;
    assert!(renewed <= 3 * NODES, "{renewed} renewals of {NODES} nodes");
    let filter = AuditFilter { method: "RenewCertificate".to_owned(), ..AuditFilter::default() };
    let request = ListAuditEventsRequest { filter: Some(filter), page_size: 1000, ..Default::default() };
    let asked = access(&fleet).list_audit_events(request).await?.into_inner().audit_events.len() - before;
    assert!(asked <= 5 * NODES, "{asked} renewals asked for by {NODES} nodes");
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_days_ahead_and_back_is_healed() -> Result<()> {
    wrong_and_right_again(20 * DAY, 0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_year_ahead_and_back_is_healed() -> Result<()> {
    wrong_and_right_again(365 * DAY, 0).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forty_days_behind_and_back_is_healed() -> Result<()> {
    wrong_and_right_again(60 * DAY, 100 * DAY).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_hour_behind_does_no_harm() -> Result<()> {
    let mut fleet = Fleet::builder().pis(2).own_clocks().start().await?;
    set_clock(&fleet, -HOUR).await?;
    fleet.kill_agents().await?;
    fleet.start_agents()?;
    everybody_is_in(&fleet, 2).await?;
    let ids = fleet.ids().await?;
    fleet.succeeds(reboot(&[&ids[0], &ids[1]], Duration::ZERO), seconds(60)).await?;
    let asked = wish(&fleet.token(1).await?, &NodeKey::generate()?, "by-hand", "")?;
    enrollment(&fleet, fleet.addresses().enroll)?.enroll(asked).await?;
    assert_eq!(renewals(&fleet)?, 0);
    // At its next start it finds that its last rows are from the future.
    fleet.kill_controller().await?;
    fleet.jump_clock(0, -2 * HOUR)?;
    fleet.start_controller().await?;
    says(&fleet, "is before the last row of its database").await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn controller_without_a_clock_signs_nothing_and_says_so() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).own_clocks().start().await?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    // A minute after the epoch, as a machine without a real-time clock starts.
    let in_1970 = 60 - i64::try_from(now)?;
    let token = fleet.token(1).await?;
    let secret = api_token(&fleet, "monitor", Role::Viewer, None).await?;
    let health = async || {
        // By token, because in 1970 the certificate of no operator is valid yet.
        let mut request = tonic::Request::new(HealthCheckRequest::default());
        request.metadata_mut().insert("authorization", format!("Bearer {secret}").parse()?);
        let mut client = HealthClient::new(fleet.admin().anonymous().channel(fleet.addresses().api)?);
        Ok::<_, anyhow::Error>(client.check(request).await?.into_inner().status())
    };
    assert_eq!(health().await?, ServingStatus::Serving);

    // First case: the clock becomes wrong while the controller runs.
    set_clock(&fleet, in_1970).await?;
    wait_until(seconds(30), "its health says it", async || {
        Ok((health().await? == ServingStatus::NotServing).then_some(()))
    })
    .await?;
    let key = NodeKey::generate()?;
    let refused = enrollment(&fleet, fleet.addresses().enroll)?
        .enroll(wish(&token, &key, "by-hand", "")?)
        .await
        .err()
        .context("it signed in 1970")?;
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unavailable, "CLOCK_WRONG"));
    assert!(refused.message().contains("1970-01-01"), "{}", refused.message());
    set_clock(&fleet, 0).await?;
    wait_until(seconds(30), "it serves again", async || Ok((health().await? == ServingStatus::Serving).then_some(())))
        .await?;

    // Second case: the clock is wrong at the start. The controller waits, logs why, and continues by itself.
    fleet.kill(0).await?;
    fleet.jump_clock(0, in_1970)?;
    fleet.revive(0)?;
    says(&fleet, "waiting for the clock").await?;
    says(&fleet, "timedatectl").await?;
    let certificate = std::fs::read(fleet.certs().join("controller.crt"))?;
    fleet.jump_clock(0, 0)?;
    fleet.controller_is_healthy().await?;
    // A certificate that it had signed in 1970 would be useless later.
    assert_eq!(std::fs::read(fleet.certs().join("controller.crt"))?, certificate);
    everybody_is_in(&fleet, 1).await?;
    enrollment(&fleet, fleet.addresses().enroll)?.enroll(wish(&token, &key, "by-hand", "")?).await?;
    assert_eq!(renewals(&fleet)?, 0);
    fleet.went_well();
    Ok(())
}
