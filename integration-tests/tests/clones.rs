//! Two nodes with one identity, a card that moved into another board, and nodes that only look like either.

use std::time::Duration;

use anyhow::Result;
use integration_tests::fleet::{Builder, Pi, execution_name, reboot};
use integration_tests::postgres::Postgres;
use integration_tests::{Database, Fleet, seconds, wait_until};
use marco_proto::v1::access_service_client::AccessServiceClient;
use marco_proto::v1::execution::WaitReason;
use marco_proto::v1::{
    AllNodes, ApproveNodeRequest, AuditFilter, ListAuditEventsRequest, Operation, execution, node, operation,
};

/// Timeout until the controller notices; a superseded node waits at least five seconds before it comes back.
const NOTICED: Duration = seconds(60);

async fn on_postgres() -> Result<Builder> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    Ok(Fleet::builder().database(Database::Url(url)).controllers(2))
}

async fn state_is(fleet: &Fleet, id: &str, wanted: node::State) -> Result<marco_proto::v1::Node> {
    wait_until(NOTICED, &format!("{id} is {}", wanted.as_str_name()), async || {
        let node = fleet.node(id).await?;
        Ok((node.state() == wanted).then_some(node))
    })
    .await
}

/// Checks that the audit has exactly one entry of what the controller did to a node by itself.
async fn is_audited(fleet: &Fleet, id: &str, what: &str) -> Result<()> {
    let filter = AuditFilter { method: what.to_owned(), resource: format!("nodes/{id}"), ..AuditFilter::default() };
    let request = ListAuditEventsRequest { filter: Some(filter), ..ListAuditEventsRequest::default() };
    let events = AccessServiceClient::new(fleet.admin_channel()).list_audit_events(request).await?.into_inner();
    let callers: Vec<&str> = events.audit_events.iter().map(|event| event.caller.as_str()).collect();
    assert_eq!(callers, ["controller"], "{what} of {id}");
    Ok(())
}

/// Cuts a Pi's power, and waits until it has booted again. The controller would take a later cut for a reboot.
async fn boots_by_itself(pi: &Pi) -> Result<()> {
    pi.cut_power()?;
    wait_until(NOTICED, "it has booted anew", async || {
        let log = pi.log()?;
        // The last boot must be after the last cut, because the copied log has boots from before.
        let last = |event: &str| log.iter().rposition(|line| line.event == event);
        Ok((last("power-cut").is_some() && last("boot") > last("power-cut")).then_some(()))
    })
    .await
}

/// Checks that both agents of one identity are quarantined, and that neither runs the node's operations. The fleet's
/// second node does run them, which shows that there was time.
async fn both_are_shut_out(mut fleet: Fleet, controller_of_the_copy: usize, other_boot: bool) -> Result<()> {
    let ids = fleet.ids().await?;
    let [id, witness] = ids.as_slice() else { anyhow::bail!("two Pis, and not {ids:?}") };
    let copied = fleet.copy_card(id, "pi-", controller_of_the_copy).await?;
    if other_boot {
        boots_by_itself(&copied.pi).await?;
    }
    let node = state_is(&fleet, id, node::State::Quarantined).await?;
    assert!(node.state_reason.contains("two nodes have this identity"), "{}", node.state_reason);
    // The controller that held the other stream has cut it.
    wait_until(seconds(10), "no stream of it is left", async || Ok((!fleet.node(id).await?.connected).then_some(())))
        .await?;
    let logs = (0..=controller_of_the_copy).map(|number| fleet.controller_log(number)).collect::<Result<String>>()?;
    let begun = logs.lines().filter(|line| line.contains("session begun") && !line.contains(witness)).count();
    // The first session and the copy's one or two; none after the return, which was the second reconnect.
    assert!(begun <= if other_boot { 4 } else { 2 }, "{begun} sessions were begun");
    assert!(logs.contains("a node was shut out or held"), "it is not in the log");
    is_audited(&fleet, id, "QUARANTINE").await?;

    // An operation on all nodes skips the quarantined one; an operation that names it waits.
    let boots = (fleet.pi(id).boots()?, copied.pi.boots()?);
    let named = fleet.create(reboot(&[id, witness], Duration::ZERO)).await?;
    fleet.execution_is(&named.name, witness, NOTICED, execution::State::Succeeded).await?;
    let target = Some(operation::Target::All(AllNodes {}));
    let all = Operation { target, ..reboot(&[witness], Duration::ZERO) };
    let all = fleet.succeeds(all, NOTICED).await?;
    assert_eq!(fleet.executions(&all.name).await?.len(), 1, "an operation for all takes one that is shut out");
    let waits = fleet.execution(&named.name, id).await?;
    assert_eq!((waits.state(), waits.wait_reason()), (execution::State::Pending, WaitReason::NodeQuarantined));
    let name = execution_name(&named, id);
    assert_eq!((fleet.pi(id).reboots(&name)?, copied.pi.reboots(&name)?), (0, 0));
    assert_eq!((fleet.pi(id).boots()?, copied.pi.boots()?), boots, "somebody obeyed");
    assert_eq!(fleet.pi(witness).reboots(&execution_name(&named, witness))?, 1);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_copied_card_shuts_both_nodes_out_within_two_reconnects() -> Result<()> {
    both_are_shut_out(Fleet::builder().pis(2).start().await?, 0, false).await
}

#[tokio::test]
async fn a_copy_that_booted_by_itself_is_noticed_too() -> Result<()> {
    both_are_shut_out(Fleet::builder().pis(2).start().await?, 0, true).await
}

#[tokio::test]
async fn a_copy_at_another_controller_is_noticed_too() -> Result<()> {
    both_are_shut_out(on_postgres().await?.pis(2).start().await?, 1, true).await
}

/// Checks that a card in another board waits for one approval, and then works.
async fn waits_for_one_approval(mut fleet: Fleet, controller: usize) -> Result<()> {
    let id = fleet.ids().await?.remove(0);
    fleet.kill_agents().await?;
    let moved = fleet.copy_card(&id, "spare-", controller).await?;
    boots_by_itself(&moved.pi).await?;
    let node = state_is(&fleet, &id, node::State::AwaitingApproval).await?;
    assert!(node.state_reason.contains("its card is in the board"), "{}", node.state_reason);
    wait_until(NOTICED, "it is connected and waits", async || Ok(fleet.node(&id).await?.connected.then_some(())))
        .await?;
    is_audited(&fleet, &id, "HOLD").await?;
    fleet
        .nodes()
        .approve_node(ApproveNodeRequest { name: format!("nodes/{id}"), ..ApproveNodeRequest::default() })
        .await?;
    let operation = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
    fleet.ends(&operation.name, seconds(60), operation::State::Succeeded).await?;
    assert_eq!(moved.pi.reboots(&execution_name(&operation, &id))?, 1);
    // It stays approved in its new board.
    assert_eq!(fleet.node(&id).await?.state(), node::State::Approved);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_card_moved_to_a_spare_board_waits_for_one_approval() -> Result<()> {
    waits_for_one_approval(Fleet::builder().pis(1).start().await?, 0).await
}

#[tokio::test]
async fn it_does_so_at_another_controller_too() -> Result<()> {
    waits_for_one_approval(on_postgres().await?.pis(1).start().await?, 1).await
}

#[tokio::test]
async fn a_node_that_merely_reboots_a_hundred_times_is_let_in_each_time() -> Result<()> {
    // Boots take almost no time, so that a hundred of them fit into a test.
    let fast = Duration::from_millis(1);
    let mut fleet = Fleet::builder().pis(1).boot_time(fast).start().await?;
    let id = fleet.ids().await?.remove(0);
    for boot in 1..=100 {
        fleet.pi(&id).cut_power()?;
        wait_until(seconds(60), "it is there again, under its new boot id", async || {
            let log = fleet.pi(&id).log()?;
            let boots: Vec<_> = log.iter().filter(|line| line.event == "boot").collect();
            let node = fleet.node(&id).await?;
            assert_eq!(node.state(), node::State::Approved, "after {boot} reboots: {}", node.state_reason);
            let there = boots.len() > boot && boots.last().is_some_and(|last| last.boot_id == node.boot_id);
            Ok((there && node.connected).then_some(()))
        })
        .await?;
    }
    fleet.went_well();
    Ok(())
}
