//! Nodes that were away, nodes with faults, and a database that lost commits: cancelled work is not done, no fault is
//! silent, and nothing is done twice.

use std::time::Duration;

use anyhow::{Context as _, Result};
use chrono::{DateTime, TimeDelta, Utc};
use integration_tests::client::reason;
use integration_tests::fleet::{Database, execution_name, reboot};
use integration_tests::postgres::Postgres;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::execution::State;
use marco_proto::v1::node_condition::Type;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::schedule_service_client::ScheduleServiceClient;
use marco_proto::v1::{
    CreateScheduleRequest, ListEventsRequest, ListFiresRequest, MaintenanceWindow, Operation, RetryOperationRequest,
    Rollout, Schedule,
};
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

async fn one_pi() -> Result<(Fleet, String)> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    Ok((fleet, id))
}

/// The conditions that a node reports.
async fn ills(fleet: &Fleet, id: &str) -> Result<Vec<Type>> {
    Ok(fleet.node(id).await?.conditions.iter().map(|ill| ill.r#type()).collect())
}

#[tokio::test]
async fn work_cancelled_during_an_outage_is_not_done() -> Result<()> {
    let (mut fleet, id) = one_pi().await?;
    let operation = fleet.create(reboot(&[&id], seconds(3600))).await?;
    fleet.execution_is(&operation.name, &id, seconds(30), State::Running).await?;
    let pi = fleet.pi(&id);
    let warnings = || Ok::<_, anyhow::Error>(pi.read("wall.log")?.matches("This machine reboots in").count());
    wait_until(seconds(30), "users are warned", async || Ok((warnings()? == 1).then_some(()))).await?;
    fleet.kill_agents().await?;
    fleet.cancel(&operation.name).await?;
    fleet.start_agents()?;
    fleet.ends(&operation.name, seconds(60), OperationState::Cancelled).await?;
    assert_eq!((warnings()?, pi.reboots(&execution_name(&operation, &id))?), (1, 0));
    // The node accepts new work.
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    Ok(())
}

#[tokio::test]
async fn node_whose_journal_cannot_be_written_says_so_and_recovers() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    assert!(ills(&fleet, &id).await?.is_empty());
    let pi = fleet.pi(&id);
    // A folder in place of the temporary file makes each write of the journal fail, also for root.
    let in_the_way = pi.path("root/var/lib/marco-agent/journal.json.new");
    std::fs::create_dir_all(in_the_way.join("x"))?;
    for _ in 0..2 {
        let operation = fleet.create(reboot(&[&id], Duration::ZERO)).await?;
        fleet.ends(&operation.name, seconds(30), OperationState::Failed).await?;
        let execution = fleet.execution(&operation.name, &id).await?;
        assert_eq!(execution.error.context("no error")?.reason, "JOURNAL_NOT_WRITABLE");
        // An earlier version assigned it again three times a second, and warned users every few seconds.
        assert_eq!(execution.attempt, 1, "it is given once");
    }
    wait_until(
        seconds(30),
        "it is shown ill",
        async || Ok((ills(&fleet, &id).await? == [Type::Journal]).then_some(())),
    )
    .await?;
    assert!(fleet.node(&id).await?.connected);
    assert_eq!(pi.boots()?, 1);
    std::fs::remove_dir_all(in_the_way)?;
    wait_until(seconds(60), "it is well", async || Ok(ills(&fleet, &id).await?.is_empty().then_some(()))).await?;
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    Ok(())
}

#[tokio::test]
async fn weak_power_and_a_wrong_clock_are_shown() -> Result<()> {
    let (fleet, id) = one_pi().await?;
    let pi = fleet.pi(&id);
    std::fs::write(pi.path("under-voltage"), "")?;
    std::fs::write(pi.path("clock"), "1970-01-01T00:00:00Z")?;
    // The agent checks the power supply when it starts, and the clock after it has heard a controller.
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    wait_until(seconds(30), "both are shown", async || {
        Ok((ills(&fleet, &id).await? == [Type::Clock, Type::UnderVoltage]).then_some(()))
    })
    .await
}

#[tokio::test]
async fn controller_on_a_read_only_postgres_says_so_and_serves_again() -> Result<()> {
    let server = tokio::task::spawn_blocking(Postgres::start_own).await??;
    let url = server.database()?;
    let mut fleet = Fleet::builder().database(Database::Url(url.clone())).pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    // As a server that was demoted to a standby.
    let read_only = |value: &str| -> Result<()> {
        let set = format!("ALTER SYSTEM SET default_transaction_read_only = {value}");
        for statement in [set.as_str(), "SELECT pg_reload_conf()"] {
            server.by_hand(&url, statement)?.map_err(anyhow::Error::msg)?;
        }
        Ok(())
    };
    read_only("on")?;
    let mut health = HealthClient::new(fleet.admin_channel());
    wait_until(seconds(30), "it says NOT_SERVING", async || {
        let status = health.clone().check(HealthCheckRequest::default()).await?.into_inner().status();
        Ok((status == ServingStatus::NotServing).then_some(()))
    })
    .await?;
    let refused = fleet.create(reboot(&[&id], Duration::ZERO)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
    // Reads go on, and so does the stream.
    assert!(fleet.node(&id).await?.connected);
    let address = url.split('@').nth(1).context("no address")?;
    let log = fleet.controller_log(0)?;
    assert!(log.contains(&format!("read-only: postgres://{address}")), "the log does not say why");
    read_only("off")?;
    fleet.controller_is_healthy().await?;
    assert_eq!(health.check(HealthCheckRequest::default()).await?.into_inner().status(), ServingStatus::Serving);
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn window_of_an_earlier_release_that_never_opens_is_not_retried() -> Result<()> {
    let server = tokio::task::spawn_blocking(Postgres::start).await??;
    let url = server.database()?;
    let mut fleet = Fleet::builder().database(Database::Url(url.clone())).pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let hour = Some(prost_types::Duration { seconds: 3600, nanos: 0 });
    // Open around the clock.
    let window = MaintenanceWindow { cron: "0 * * * *".to_owned(), duration: hour, time_zone: "UTC".to_owned() };
    let operation = Operation { window: Some(window), ..reboot(&[&id], seconds(3600)) };
    let operation = fleet.create(operation).await?;
    fleet.execution_is(&operation.name, &id, seconds(30), State::Running).await?;
    fleet.cancel(&operation.name).await?;
    fleet.ends(&operation.name, seconds(30), OperationState::Cancelled).await?;
    // Today such a window is refused; this one was stored before that.
    let never =
        "UPDATE operations SET maintenance_window = replace(maintenance_window::text, '0 * * * *', '0 0 30 2 *')";
    server.by_hand(&url, never)?.map_err(anyhow::Error::msg)?;
    let retry = RetryOperationRequest { name: operation.name.clone(), ..RetryOperationRequest::default() };
    let refused = fleet.operations().retry_operation(retry).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::FailedPrecondition, "WINDOW_NEVER_OPENS"));
    fleet.went_well();
    Ok(())
}

/// A schedule on two Pis whose instant came: one Pi is done, the other one waits in its notice.
struct HalfDone {
    fleet: Fleet,
    server: &'static Postgres,
    url: String,
    instant: DateTime<Utc>,
    operation: Operation,
}

impl HalfDone {
    async fn start() -> Result<Self> {
        let server = tokio::task::spawn_blocking(Postgres::start).await??;
        let url = server.database()?;
        let fleet = Fleet::builder().database(Database::Url(url.clone())).pis(2).start().await?;
        let ids = fleet.ids().await?;
        // One instant, which comes in a moment; the next one comes in a year.
        #[allow(clippy::disallowed_methods, reason = "the controller of this fleet has the machine's own clock")]
        let soon = Utc::now() + TimeDelta::seconds(5);
        let one_after_the_other = Some(Rollout { max_in_flight: 1, ..Rollout::default() });
        let schedule = Schedule {
            cron: soon.format("%-S %-M %-H %-d %-m *").to_string(),
            time_zone: "UTC".to_owned(),
            operation: Some(Operation { rollout: one_after_the_other, ..reboot(&ids, seconds(10)) }),
            ..Schedule::default()
        };
        let request =
            CreateScheduleRequest { schedule: Some(schedule), schedule_id: "nightly".to_owned(), validate_only: false };
        let made = ScheduleServiceClient::new(fleet.admin_channel()).create_schedule(request).await?.into_inner();
        let next = made.next_fire_time.context("no next instant")?;
        let instant = DateTime::from_timestamp(next.seconds, 0).context("no time")?;
        assert!(instant - soon < TimeDelta::seconds(60), "{instant}");
        let name = wait_until(seconds(30), "it fires", async || {
            let request = ListFiresRequest { parent: "schedules/nightly".to_owned(), ..ListFiresRequest::default() };
            let mut client = ScheduleServiceClient::new(fleet.admin_channel());
            let fires = client.list_fires(request).await?.into_inner().fires;
            Ok(fires.first().map(|fire| fire.operation.clone()).filter(|name| !name.is_empty()))
        })
        .await?;
        wait_until(seconds(60), "one is done, the other one in its notice", async || {
            let mut states: Vec<State> = fleet.executions(&name).await?.iter().map(|each| each.state()).collect();
            states.sort();
            Ok((states == [State::Running, State::Succeeded]).then_some(()))
        })
        .await?;
        let operation = fleet.operation(&name).await?;
        Ok(Self { fleet, server, url, instant, operation })
    }

    fn by_hand(&self, statement: &str) -> Result<()> {
        self.server.by_hand(&self.url, statement)?.map_err(anyhow::Error::msg)
    }

    /// Takes the operation out of the database, as a fail-over to a standby does that had not got it. The controller
    /// must not run.
    fn lose(&self) -> Result<()> {
        let operation = self.operation.name.trim_start_matches("operations/");
        let rows = |table: &str, column: &str| format!("DELETE FROM {table} WHERE {column} = '{operation}'");
        for (table, column) in
            [("fires", "operation"), ("events", "operation"), ("executions", "operation"), ("operations", "id")]
        {
            self.by_hand(&rows(table, column))?;
        }
        Ok(())
    }

    /// Makes the instant the schedule's next one, as it was before the lost commits.
    fn fire_again(&self) -> Result<()> {
        let instant = self.instant.timestamp_micros();
        self.by_hand(&format!("UPDATE schedules SET next_fire = {instant}, last_fire = NULL"))
    }

    /// Checks that the same operation was made again and succeeded, and that each Pi rebooted once for it.
    async fn done_once(&mut self) -> Result<()> {
        let Self { fleet, operation, .. } = self;
        wait_until(seconds(30), "the instant fires again", async || Ok(fleet.operation(&operation.name).await.ok()))
            .await?;
        fleet.ends(&operation.name, seconds(150), OperationState::Succeeded).await?;
        for id in fleet.ids().await? {
            let pi = fleet.pi(&id);
            assert_eq!(pi.reboots(&execution_name(operation, &id))?, 1, "{id}: {:?}", pi.log()?);
            assert_eq!(pi.boots()?, 2, "{id}: {:?}", pi.log()?);
            let node = fleet.node(&id).await?;
            assert!(node.conflicts.is_empty(), "{id}: {:?}", node.conflicts);
        }
        let parent = operation.name.clone();
        let request = ListEventsRequest { parent, page_size: 1000, ..ListEventsRequest::default() };
        let events = fleet.operations().list_events(request).await?.into_inner().events;
        assert!(events.iter().all(|event| event.to != "FAILED"), "{events:?}");
        fleet.went_well();
        Ok(())
    }
}

#[tokio::test]
async fn an_instant_that_fires_again_after_a_loss_reboots_nobody_twice() -> Result<()> {
    let mut scene = HalfDone::start().await?;
    scene.fleet.kill_controller().await?;
    scene.lose()?;
    scene.fire_again()?;
    scene.fleet.start_controller().await?;
    scene.done_once().await
}

#[tokio::test]
async fn a_report_of_a_lost_operation_is_kept_until_its_instant_fires_again() -> Result<()> {
    let mut scene = HalfDone::start().await?;
    scene.fleet.kill_controller().await?;
    scene.lose()?;
    scene.fleet.start_controller().await?;
    // The Pi in its notice says what it is at, and no operation is known that it belongs to.
    let fleet = &scene.fleet;
    let unknown = wait_until(seconds(60), "a report is kept", async || {
        let nodes = fleet.list_nodes().await?;
        Ok(nodes.into_iter().flat_map(|node| node.conflicts).next())
    })
    .await?;
    assert!(unknown.execution.starts_with(&scene.operation.name), "{unknown:?}");
    // It goes on meanwhile, and its success is no loss.
    for id in fleet.ids().await? {
        let (pi, name) = (fleet.pi(&id), execution_name(&scene.operation, &id));
        wait_until(seconds(60), "both rebooted", async || Ok((pi.reboots(&name)? == 1).then_some(()))).await?;
    }
    scene.fire_again()?;
    scene.done_once().await
}
