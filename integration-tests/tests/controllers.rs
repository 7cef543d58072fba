//! Several controllers on one Postgres, and a Postgres that goes away: nothing is lost, and nothing is done twice.

use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use integration_tests::fleet::{Builder, Database, execution_name, is_final, reboot, update};
use integration_tests::image::{Compression, make_image};
use integration_tests::mount::Mount;
use integration_tests::postgres::Postgres;
use integration_tests::process::{binary, run};
use integration_tests::proxy::{Direction, Proxy};
use integration_tests::tree::compare_with_source;
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::execution::State;
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::operation::State as OperationState;
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::{
    CancelOperationRequest, CreateOperationRequest, ListEventsRequest, ListNodesRequest, Operation,
    QuarantineNodeRequest, Rollout, WatchNodesRequest, WatchOperationRequest, WatchOperationResponse,
};
use tokio::task::JoinHandle;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Timeout of anything that has to settle: an agent's backoff grows up to a minute.
const SETTLE: Duration = seconds(150);

async fn on_postgres() -> Result<Builder> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    Ok(Fleet::builder().database(Database::Url(url)))
}

/// Duration of the database outage.
const OUTAGE: Duration = seconds(60);

async fn shared(controllers: usize, pis: usize, notifications: bool) -> Result<Fleet> {
    on_postgres().await?.controllers(controllers).notifications(notifications).pis(pis).start().await
}

/// Checks that the operation succeeded, that each node rebooted exactly once for it, and that each node's history says
/// so once.
async fn done_once(fleet: &Fleet, operation: &Operation, ids: &[String]) -> Result<()> {
    fleet.ends(&operation.name, SETTLE, OperationState::Succeeded).await?;
    // More events than a page would hide a second end, so one page holds all events of these tests.
    let request = ListEventsRequest { parent: operation.name.clone(), page_size: 1000, page_token: String::new() };
    let events = fleet.operations().list_events(request).await?.into_inner().events;
    for id in ids {
        assert_eq!(fleet.pi(id).reboots(&execution_name(operation, id))?, 1, "{id}: {:?}", fleet.pi(id).log()?);
        let node = format!("nodes/{id}");
        let ends = events.iter().filter(|event| event.node == node && event.to == "SUCCEEDED").count();
        assert_eq!(ends, 1, "{id}: {events:?}");
    }
    Ok(())
}

#[tokio::test]
async fn agents_move_when_their_controller_is_killed_and_their_operation_ends_once() -> Result<()> {
    let mut fleet = shared(3, 3, true).await?;
    let ids = fleet.ids().await?;
    let operation = fleet.create(reboot(&ids, seconds(4))).await?;
    for id in &ids {
        fleet.execution_is(&operation.name, id, seconds(30), State::Running).await?;
    }
    fleet.kill(0).await?;
    fleet.talk_to(2)?;
    done_once(&fleet, &operation, &ids).await?;
    fleet.all_connected().await?;
    // The agents were started with the dead controller's address only. They must have remembered the others that it
    // told them.
    fleet.kill_agents().await?;
    wait_until(SETTLE, "the nodes are away", async || {
        Ok(fleet.list_nodes().await?.iter().all(|node| !node.connected).then_some(()))
    })
    .await?;
    fleet.start_agents()?;
    fleet.all_connected().await?;
    fleet.succeeds(reboot(&ids, Duration::ZERO), SETTLE).await?;
    fleet.went_well();
    Ok(())
}

/// An operation created on one controller runs on a node whose session is with another.
async fn reaches_the_other(notifications: bool) -> Result<()> {
    let mut fleet = shared(2, 1, notifications).await?;
    let id = fleet.ids().await?.remove(0);
    fleet.talk_to(1)?;
    // Five rounds, because the slowest counts: without notifications a controller polls, and the first round may be
    // lucky.
    let mut slowest = Duration::ZERO;
    for _ in 0..5 {
        let begun = Instant::now();
        let operation = fleet.create(reboot(&[&id], seconds(600))).await?;
        let (pi, name) = (fleet.pi(&id), execution_name(&operation, &id));
        // Within two seconds, also without notifications: the controllers' poll interval bounds the delay.
        wait_until(seconds(2), "the node has it", async || Ok(pi.journal_names(&name).then_some(()))).await?;
        slowest = slowest.max(begun.elapsed());
        fleet.execution_is(&operation.name, &id, seconds(5), State::Running).await?;
        fleet.cancel(&operation.name).await?;
        fleet.ends(&operation.name, seconds(10), OperationState::Cancelled).await?;
        assert_eq!(pi.reboots(&name)?, 0);
    }
    // A quarantine must reach the controller that holds the session.
    let quarantine = QuarantineNodeRequest { name: format!("nodes/{id}"), ..QuarantineNodeRequest::default() };
    fleet.nodes().quarantine_node(quarantine).await?;
    wait_until(seconds(10), "its stream is cut", async || {
        Ok(fleet.controller_log(0)?.contains("a session is cut").then_some(()))
    })
    .await?;
    #[allow(clippy::print_stdout, reason = "a measurement")]
    {
        println!("notifications {notifications}: the node had it after {slowest:?} at most");
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn what_is_asked_of_one_controller_reaches_a_node_of_another() -> Result<()> {
    reaches_the_other(true).await
}

#[tokio::test]
async fn it_does_so_without_notifications_too() -> Result<()> {
    reaches_the_other(false).await
}

#[tokio::test]
async fn a_controller_that_was_frozen_gives_up_its_sessions_and_does_nothing_twice() -> Result<()> {
    let mut fleet = shared(2, 2, true).await?;
    let ids = fleet.ids().await?;
    let (busy, idle) = (ids[0].clone(), ids[1].clone());
    let operation = fleet.create(reboot(&[&busy], seconds(3))).await?;
    fleet.execution_is(&operation.name, &busy, seconds(30), State::Running).await?;
    fleet.freeze(0).await?;
    // The second controller holds no session yet, but it must notice the first one's death by itself.
    fleet.talk_to(1)?;
    wait_until(seconds(60), "the other one takes it for dead", async || {
        Ok(fleet.controller_log(1)?.contains("controller that died").then_some(()))
    })
    .await?;
    // Meanwhile work is created for a node whose stream still leads to the frozen controller.
    let second = fleet.create(reboot(&[&idle], Duration::ZERO)).await?;
    fleet.thaw(0).await?;
    done_once(&fleet, &operation, std::slice::from_ref(&busy)).await?;
    done_once(&fleet, &second, std::slice::from_ref(&idle)).await?;
    fleet.talk_to(0)?;
    fleet.succeeds(reboot(&ids, Duration::ZERO), SETTLE).await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_database_that_is_stopped_for_a_while_costs_no_stream_no_report_and_nothing_twice() -> Result<()> {
    let server = tokio::task::spawn_blocking(Postgres::start_own).await??;
    // Two controllers: whichever sees the database first after the outage must not take the other for dead.
    let database = Database::Url(server.database()?);
    let mut fleet = Fleet::builder().database(database).controllers(2).pis(20).start().await?;
    let ids = fleet.ids().await?;
    let (rebooting, rest) = ids.split_at(8);
    let (waiting, idle) = rest.split_at(8);
    let four_at_once = Some(Rollout { max_in_flight: 4, ..Rollout::default() });
    let operation = fleet.create(Operation { rollout: four_at_once, ..reboot(rebooting, seconds(8)) }).await?;
    // The notice is so long that all four executions are seen running at once.
    wait_until(seconds(30), "the rollout is in its middle", async || {
        let executions = fleet.executions(&operation.name).await?;
        let running = executions.iter().filter(|execution| execution.state() == State::Running).count();
        Ok((running == 4).then_some(()))
    })
    .await?;
    // These executions wait in their notice when the database goes away.
    let late = fleet.create(reboot(waiting, OUTAGE + seconds(20))).await?;
    let (watched, watched_nodes) = watch(&fleet, &late).await?;
    server.pause()?;
    let begun = Instant::now();
    while begun.elapsed() < OUTAGE {
        let asked = Instant::now();
        // Each call during the outage must fail fast with UNAVAILABLE, so that a caller can retry instead of hanging.
        let listed = fleet.nodes().list_nodes(ListNodesRequest::default()).await.unwrap_err();
        assert_eq!(listed.code(), Code::Unavailable, "{listed:?}");
        let reading = asked.elapsed();
        let created = fleet.create(reboot(idle, seconds(1))).await.unwrap_err();
        assert_eq!(created.code(), Code::Unavailable, "{created:?}");
        let writing = asked.elapsed() - reading;
        let request = WatchOperationRequest { name: late.name.clone() };
        let refused = fleet.operations().watch_operation(request).await.err().context("a watch began")?;
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        let watching = asked.elapsed() - reading - writing;
        assert!(watching < seconds(2), "a watcher waited {watching:?}");
        assert!(reading < seconds(2) && writing < seconds(2), "callers waited {reading:?} and {writing:?}");
    }
    server.resume()?;
    done_once(&fleet, &operation, rebooting).await?;
    done_once(&fleet, &late, waiting).await?;
    // The watch survived the outage: it was silent during it, and sent a full snapshot afterwards.
    let messages = watched.await??;
    let whole = messages.iter().filter(|message| message.executions.len() == waiting.len()).count();
    assert!(whole >= 2, "no snapshot after the outage: {}", messages.len());
    let last = messages.last().and_then(|message| message.operation.clone()).context("nothing was sent")?;
    assert_eq!(last.state(), OperationState::Succeeded);
    assert!(!watched_nodes.is_finished(), "the nodes' watcher was cut");
    watched_nodes.abort();
    let log = fleet.agents_log()?;
    for id in waiting.iter().chain(idle) {
        let node = format!("node={id}");
        let lines = |what: &str| log.lines().filter(|line| line.contains(&node) && line.contains(what)).count();
        // One session at the start. Nodes that rebooted opened a second one afterwards.
        let opened = if idle.contains(id) { 1 } else { 2 };
        assert_eq!(lines("session open"), opened, "{id} lost its stream");
    }
    for (operation, ids) in [(&operation, rebooting), (&late, waiting)] {
        for id in ids {
            let name = execution_name(operation, id);
            let given = log.lines().filter(|line| line.contains(&name) && line.contains(" assignment ")).count();
            assert_eq!(given, 1, "{name} was sent {given} times");
        }
    }
    fleet.succeeds(reboot(&ids, Duration::ZERO), SETTLE).await?;
    fleet.went_well();
    Ok(())
}

/// Watches an operation to its end, and the nodes without end.
async fn watch(
    fleet: &Fleet,
    operation: &Operation,
) -> Result<(JoinHandle<Result<Vec<WatchOperationResponse>>>, JoinHandle<Result<()>>)> {
    let request = WatchOperationRequest { name: operation.name.clone() };
    let mut stream = fleet.operations().watch_operation(request).await?.into_inner();
    let mut messages = vec![stream.message().await?.context("no snapshot")?];
    let mut nodes = fleet.nodes().watch_nodes(WatchNodesRequest::default()).await?.into_inner();
    nodes.message().await?.context("no snapshot of the nodes")?;
    let operation = tokio::spawn(async move {
        while let Some(message) = stream.message().await? {
            messages.push(message);
        }
        Ok(messages)
    });
    let nodes = tokio::spawn(async move {
        while nodes.message().await?.is_some() {}
        Ok(())
    });
    Ok((operation, nodes))
}

async fn health(fleet: &Fleet, number: usize) -> Result<ServingStatus> {
    let channel = fleet.admin().channel(fleet.addresses_of(number)?.api)?;
    Ok(HealthClient::new(channel).check(HealthCheckRequest::default()).await?.into_inner().status())
}

/// A database of its own on Postgres: its URL, a proxy in front of the server, and the URL that leads through the proxy.
async fn behind_a_proxy() -> Result<(String, Proxy, String)> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    let target = url.split(['@', '/']).nth(3).context("an address in the URL")?.to_owned();
    let way = Proxy::start(target.parse()?).await?;
    let through = url.replace(&target, &way.address().to_string());
    Ok((url, way, through))
}

#[tokio::test]
async fn nodes_leave_a_controller_that_alone_lost_the_database() -> Result<()> {
    // Only this controller goes through the proxy, so that it alone loses the database.
    let (url, way, own) = behind_a_proxy().await?;
    let mut fleet =
        Fleet::builder().database(Database::Url(url)).database_of(0, &own).controllers(2).pis(2).start().await?;
    let ids = fleet.ids().await?;
    // Controllers look for each other every few seconds. A controller that knows no other sends no node away.
    let together = Instant::now();
    wait_until(seconds(30), "the first has heard of the second", async || {
        Ok((together.elapsed() > seconds(8)).then_some(()))
    })
    .await?;
    // Downwards only: the connections stay open and answers never come, which is harder to notice than a refusal.
    way.hold(Direction::Down);
    fleet.talk_to(1)?;
    wait_until(seconds(60), "the nodes are with the other controller", async || {
        Ok((fleet.controller_log(1)?.matches("session begun").count() >= ids.len()).then_some(()))
    })
    .await?;
    assert_eq!(health(&fleet, 0).await?, ServingStatus::NotServing);
    assert_eq!(health(&fleet, 1).await?, ServingStatus::Serving);
    assert!(fleet.controller_log(0)?.contains("nodes are sent to other controllers"));
    fleet.succeeds(reboot(&ids, Duration::ZERO), SETTLE).await?;
    way.release(Direction::Down);
    wait_until(seconds(30), "it serves again", async || {
        Ok((health(&fleet, 0).await? == ServingStatus::Serving).then_some(()))
    })
    .await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn database_that_goes_away_during_a_start_is_waited_for() -> Result<()> {
    let (_, way, own) = behind_a_proxy().await?;
    let mut fleet = Fleet::builder().database(Database::Url(own)).pis(0).start().await?;
    for statement in ["pg_advisory_xact_lock", "seaql_migrations"] {
        fleet.kill(0).await?;
        let waits = fleet.controller_log(0)?.matches("waiting for the database").count();
        way.swallow(statement.as_bytes());
        fleet.revive(0)?;
        wait_until(seconds(60), "it serves", async || {
            Ok((health(&fleet, 0).await.ok() == Some(ServingStatus::Serving)).then_some(()))
        })
        .await?;
        assert_eq!(way.swallows_left(), 0, "{statement}");
        assert_eq!(fleet.controller_log(0)?.matches("waiting for the database").count(), waits + 1, "{statement}");
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_full_disk_is_said_by_its_name_and_no_operation_is_lost() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Ok(disk) = Mount::tmpfs(folder.path().join("disk"), "40m").await else {
        // Without root the test cannot limit a disk, and passes without having tested anything.
        assert!(!rustix::process::geteuid().is_root(), "root can mount a tmpfs");
        return Ok(());
    };
    let file = disk.folder().join("marco.db").display().to_string();
    let mut fleet = Fleet::builder().database(Database::Url(format!("sqlite://{file}"))).pis(1).start().await?;
    let ids = fleet.ids().await?;
    let mut acknowledged = Vec::new();
    // Twice: the controller must recover completely, and notice the second time too.
    for _ in 0..2 {
        let ballast = disk.folder().join("ballast");
        let mut filling = std::fs::File::create(&ballast)?;
        while std::io::Write::write_all(&mut filling, &[1; 4096]).is_ok() {}
        // The database has free pages from before, so the first operations may still fit.
        let begun = Instant::now();
        let refused = loop {
            match fleet.create(reboot(&ids, seconds(3600))).await {
                Ok(operation) => acknowledged.push(operation.name),
                Err(status) => break status,
            }
            anyhow::ensure!(begun.elapsed() < seconds(60), "operations fit for a minute");
        };
        assert_eq!(refused.code(), Code::Unavailable);
        assert!(refused.message().contains("disk full") && refused.message().contains(&file), "{refused:?}");
        wait_until(seconds(5), "the health service says so", async || {
            Ok((health(&fleet, 0).await? == ServingStatus::NotServing).then_some(()))
        })
        .await?;
        // The kernel frees the blocks only after the last descriptor is closed.
        drop(filling);
        std::fs::remove_file(&ballast)?;
        fleet.controller_is_healthy().await?;
        for _ in 0..5 {
            acknowledged.push(fleet.create(reboot(&ids, seconds(3600))).await?.name);
        }
    }
    fleet.kill_controller().await?;
    fleet.start_controller().await?;
    for name in acknowledged {
        fleet.operation(&name).await.with_context(|| format!("{name} was acknowledged and is lost"))?;
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn what_others_could_read_is_private_from_the_next_start() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    fleet.kill_controller().await?;
    let names = ["marco.db", "artifacts", "staging", "pki"];
    for name in names {
        std::fs::set_permissions(fleet.data().join(name), std::fs::Permissions::from_mode(0o755))?;
    }
    fleet.start_controller().await?;
    for name in names {
        let mode = std::fs::metadata(fleet.data().join(name))?.permissions().mode();
        assert_eq!(mode & 0o077, 0, "{name} has mode {mode:o}");
    }
    // New files must be private from the start, not only after the next start.
    let image = make_image(fleet.dir(), "private", Compression::Gzip)?;
    push(&mut fleet.artifacts(), "private", Kind::Image, Purpose::Unspecified, &image).await?;
    let mut made = 0;
    for shard in std::fs::read_dir(fleet.data().join("artifacts/sha256"))? {
        for blob in std::fs::read_dir(shard?.path())? {
            let mode = blob?.metadata()?.permissions().mode();
            assert_eq!(mode & 0o077, 0, "a stored image has mode {mode:o}");
            made += 1;
        }
    }
    assert_eq!(made, 1);
    // Certificates are public, whatever the controller's umask is.
    assert_eq!(std::fs::metadata(fleet.certs().join("ca.crt"))?.permissions().mode() & 0o777, 0o644);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_second_controller_on_one_sqlite_file_is_refused_and_told_why() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let (data, certs) = (fleet.data().display().to_string(), fleet.certs().display().to_string());
    // Port 0: the second controller must fail because of the database and not because of a port in use.
    let listen = ["--listen", "127.0.0.1:0", "--enroll-listen", "127.0.0.1:0"];
    let arguments = [&["serve", "--data-dir", &data, "--certs", &certs], listen.as_slice()].concat();
    let second = run(&binary("marco-controller")?, &arguments, seconds(30)).await?;
    assert!(!second.status.success());
    let said = &second.stderr;
    assert!(said.contains("another controller holds the database") && said.contains("Postgres"), "{said}");
    // The operating system releases the lock when its holder dies.
    fleet.kill_controller().await?;
    fleet.start_controller().await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn bytes_that_only_another_controller_has_are_fetched_from_it() -> Result<()> {
    let mut fleet = shared(3, 2, true).await?;
    let ids = fleet.ids().await?;
    let file = make_image(fleet.dir(), "image", Compression::Gzip)?;
    // The agents' sessions are with the first controller. The last one alone has the bytes.
    fleet.talk_to(2)?;
    let image = push(&mut fleet.artifacts(), "image", Kind::Image, Purpose::Unspecified, &file).await?;
    fleet.succeeds(update(&ids, &image.name, ""), SETTLE).await?;
    for id in &ids {
        compare_with_source(&fleet.dir().join("image"), fleet.pi(id).dir())?;
    }
    assert!(fleet.controller_log(0)?.contains("bytes were fetched from another controller"));
    // A controller's certificate gives access to the bytes and to no other method.
    let peer = fleet.user("controller")?;
    let mut nodes = NodeServiceClient::new(peer.channel(fleet.addresses().api)?);
    let refused = nodes.list_nodes(ListNodesRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn controllers_that_share_their_folders_share_the_bytes() -> Result<()> {
    let mut fleet = on_postgres().await?.controllers(2).shared_folders().pis(1).start().await?;
    let ids = fleet.ids().await?;
    let file = make_image(fleet.dir(), "image", Compression::Gzip)?;
    fleet.talk_to(1)?;
    let image = push(&mut fleet.artifacts(), "image", Kind::Image, Purpose::Unspecified, &file).await?;
    // The uploading controller is gone, so the bytes must come from the shared folder.
    fleet.kill(1).await?;
    fleet.talk_to(0)?;
    fleet.succeeds(update(&ids, &image.name, ""), SETTLE).await?;
    fleet.went_well();
    Ok(())
}

/// Cancels at each moment of an operation, through another controller: the final state is what the Pi did.
#[tokio::test]
async fn whoever_wins_a_race_against_a_cancel_the_final_state_is_what_the_pi_did() -> Result<()> {
    const ROUNDS: usize = 5;
    let mut fleet = shared(2, 10, true).await?;
    let ids = fleet.ids().await?;
    let mut outcomes = [0, 0];
    for round in 0..ROUNDS {
        // One controller creates the operation, the other one cancels it.
        let begins = OperationServiceClient::new(fleet.channel_of(round % 2)?);
        let ends = OperationServiceClient::new(fleet.channel_of((round + 1) % 2)?);
        let races = ids.iter().zip(0_u32..).map(|(id, number)| {
            let (mut begins, mut ends) = (begins.clone(), ends.clone());
            async move {
                let operation = Some(reboot(&[id], Duration::from_millis(400)));
                let request = CreateOperationRequest { operation, ..CreateOperationRequest::default() };
                let operation = begins.create_operation(request).await?.into_inner();
                // Spread over the notice: the first cancel comes before anything has begun, the last after the end.
                let when = Duration::from_millis(100) * number;
                tokio::time::timeout(when, std::future::pending::<()>()).await.ok();
                // A cancel after the end is refused, as it must be.
                ends.cancel_operation(CancelOperationRequest { name: operation.name.clone() }).await.ok();
                anyhow::Ok((operation, id.clone()))
            }
        });
        let operations = futures_util::future::try_join_all(races).await?;
        for (operation, id) in &operations {
            let name = execution_name(operation, id);
            let (fleet, pi) = (&fleet, fleet.pi(id));
            let execution = wait_until(SETTLE, &format!("{name} ends"), async || {
                let execution = fleet.execution(&operation.name, id).await?;
                Ok(is_final(execution.state()).then_some(execution))
            })
            .await?;
            let restarted = pi.reboots(&name)?;
            let wanted = if restarted == 1 { State::Succeeded } else { State::Cancelled };
            assert!(restarted <= 1 && execution.state() == wanted, "{restarted} restarts: {execution:?}");
            outcomes[restarted] += 1;
        }
    }
    assert!(outcomes.iter().all(|count| *count > 3), "a race that always ends the same is none: {outcomes:?}");
    fleet.went_well();
    Ok(())
}
