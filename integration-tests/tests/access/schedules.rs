//! The reach of a schedule whose creator is limited to some nodes.

use anyhow::{Context as _, Result};
use integration_tests::fleet::reboot;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::fire::Outcome;
use marco_proto::v1::schedule::Overlap;
use marco_proto::v1::schedule_service_client::ScheduleServiceClient;
use marco_proto::v1::{
    AllNodes, CreateScheduleRequest, Fire, ListFiresRequest, Operation, Role, Schedule, UpdateNodeRequest, operation,
};
use prost_types::FieldMask;
use tonic::transport::Channel;

use crate::scene::{node, room, user};

/// A schedule that fires each second, also while earlier operations are open.
fn often(id: &str, operation: Operation) -> CreateScheduleRequest {
    let schedule = Schedule {
        cron: "* * * * * *".to_owned(),
        time_zone: "UTC".to_owned(),
        operation: Some(operation),
        overlap: Overlap::Queue.into(),
        ..Schedule::default()
    };
    CreateScheduleRequest { schedule: Some(schedule), schedule_id: id.to_owned(), validate_only: false }
}

/// Waits for a fire with this outcome that was decided after this call.
async fn next_fire(client: &ScheduleServiceClient<Channel>, id: &str, outcome: Outcome) -> Result<Fire> {
    let list = async || {
        let request = ListFiresRequest { parent: id.to_owned(), ..ListFiresRequest::default() };
        anyhow::Ok(client.clone().list_fires(request).await?.into_inner().fires)
    };
    // A due time may have been decided before the test's last change, so only the next one counts.
    let before = list().await?.first().and_then(|fire| fire.fire_time).map_or(0, |time| time.seconds) + 1;
    wait_until(seconds(30), &format!("{id} has a fire that is {}", outcome.as_str_name()), async || {
        let late = |fire: &Fire| fire.fire_time.is_some_and(|time| time.seconds > before);
        Ok(list().await?.into_iter().find(|fire| late(fire) && fire.outcome() == outcome))
    })
    .await
}

async fn nodes_of(fleet: &Fleet, fire: &Fire) -> Result<Vec<String>> {
    let executions = fleet.executions(&fire.operation).await?;
    let mut nodes: Vec<String> =
        executions.iter().filter_map(|found| found.name.rsplit('/').next().map(str::to_owned)).collect();
    nodes.sort();
    Ok(nodes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schedule_reaches_only_what_its_maker_may_at_each_fire_and_says_why_not() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    for (id, place) in [("in-1", "in"), ("in-2", "in"), ("out-1", "out")] {
        node(&fleet, id, place).await?;
    }
    let kim = user(&fleet, "kim", Role::Operator, Some("in")).await?;
    let mut kim = ScheduleServiceClient::new(kim.channel(fleet.addresses().api)?);
    let admin = ScheduleServiceClient::new(fleet.admin_channel());
    let two = reboot(&["in-1", "in-2"], seconds(0));
    // `All` means all nodes within the scope of the schedule's creator, at each fire.
    let all = Operation { target: Some(operation::Target::All(AllNodes {})), ..two.clone() };
    kim.create_schedule(often("all", all)).await?;
    kim.create_schedule(often("two", two)).await?;
    assert_eq!(nodes_of(&fleet, &next_fire(&admin, "all", Outcome::Fired).await?).await?, ["in-1", "in-2"]);
    assert_eq!(nodes_of(&fleet, &next_fire(&admin, "two", Outcome::Fired).await?).await?, ["in-1", "in-2"]);

    // A node leaves the scope. The schedule on all nodes continues without it. The one with a list is refused as a
    // whole, as a direct call would be.
    let left = marco_proto::v1::Node { name: "nodes/in-2".to_owned(), labels: room("out"), ..Default::default() };
    let update_mask = Some(FieldMask { paths: vec!["labels".to_owned()] });
    fleet.nodes().update_node(UpdateNodeRequest { node: Some(left), update_mask }).await?;
    assert_eq!(nodes_of(&fleet, &next_fire(&admin, "all", Outcome::Fired).await?).await?, ["in-1"]);
    let refused = next_fire(&admin, "two", Outcome::Skipped).await?;
    assert!(
        refused.operation.is_empty() && refused.reason.contains("limited to the nodes with room=in"),
        "{refused:?}"
    );
    // Kim sees the schedule, so Kim sees the reason, but no names of nodes outside.
    let request = ListFiresRequest { parent: "two".to_owned(), ..ListFiresRequest::default() };
    let seen = kim.list_fires(request).await?.into_inner().fires;
    let seen = seen.into_iter().find(|fire| fire.fire_time == refused.fire_time).context("the fire is not shown")?;
    assert_eq!((seen.reason.as_str(), seen.reason.contains("in-2")), (refused.reason.as_str(), false));
    fleet.went_well();
    Ok(())
}
