//! A chaos test: three controllers on one Postgres under load, each with its own proxy to it, and all faults of a
//! machine room, first in turn and then mixed. Afterwards it compares the acknowledgements, the database and the nodes'
//! own logs.
//!
//! `CHAOS_SECONDS`: duration of the faults (default 120). `CHAOS_SEED`: repeats the choices of a run.

#![allow(clippy::print_stdout, reason = "what a run did is worth reading, also when it passed")]

mod faults;
mod load;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use integration_tests::fleet::Database;
use integration_tests::ledger::{Dice, fires_are_complete, logs_agree, setting};
use integration_tests::postgres::Postgres;
use integration_tests::{Fleet, seconds, wait_until};
use tokio_util::sync::CancellationToken;

use faults::Chaos;
use load::{Asked, SCHEDULES};

const PIS: usize = 40;
const CONTROLLERS: usize = 3;
/// The database's limit: 16 for each of three controllers, as many again for connections that were cut off, and some
/// for observers.
const CONNECTIONS: u32 = 130;
/// Timeout for everything to settle after the faults.
const QUIET: Duration = seconds(120);
/// Time after the faults in which nodes may not be idle, under the same load.
const WATCHED: Duration = seconds(45);
/// Longest time that a healthy node may wait for due work, in microseconds.
const IDLE: i64 = 30_000_000;

/// Query for nodes that are connected to a live controller and have been without their due work for too long. Times are
/// the database's, because a controller's clock may be wrong.
fn idle_nodes() -> String {
    let now = "(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)";
    format!(
        "SELECT n.id AS id, o.id AS operation, n.controller_id AS controller FROM nodes n \
         JOIN executions e ON e.node = n.id AND e.state = 'PENDING' AND e.not_before = 0 \
         JOIN operations o ON o.id = e.operation AND o.state = 'RUNNING' AND o.schedule_time < {now} - {IDLE} \
         JOIN controllers c ON c.id = n.controller_id AND c.beat_time > {now} - 5000000 \
         WHERE n.state = 'APPROVED' AND n.session_time < {now} - {IDLE} \
         AND NOT EXISTS (SELECT 1 FROM executions b WHERE b.node = n.id \
             AND b.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING')) \
         AND NOT EXISTS (SELECT 1 FROM executions b WHERE b.node = n.id AND b.update_time > {now} - {IDLE})"
    )
}

/// Returns an error if a healthy node is held or idle. Returns how often it looked for idle nodes: 0 or 1.
fn look(chaos: &Chaos) -> Result<u32> {
    // No fault excuses this: every node has its identity for itself.
    nobody_is_held(chaos)?;
    // As long as a healthy node may be idle: before, each fault of everybody would excuse it.
    if !chaos.has_been_calm_for(seconds(30)) {
        return Ok(0);
    }
    nobody_is_idle(chaos.postgres(), chaos.url())?;
    Ok(1)
}

/// Returns an error if a node has been idle for too long and no fault excuses that.
fn nobody_is_idle(postgres: &Postgres, url: &str) -> Result<()> {
    // A database that cannot be queried excuses all nodes.
    let Ok(idle) = postgres.rows(url, &idle_nodes()) else { return Ok(()) };
    ensure!(idle.is_empty(), "for more than 30 s these have work that is due and are not given it: {idle:?}");
    Ok(())
}

/// Returns an error if a node is held, with its row and the lines about it in the controllers' logs.
fn nobody_is_held(chaos: &Chaos) -> Result<()> {
    let Ok(held) = chaos.postgres().rows(chaos.url(), "SELECT * FROM nodes WHERE state <> 'APPROVED'") else {
        return Ok(());
    };
    let Some(node) = held.first() else { return Ok(()) };
    let id = node["id"].as_str().unwrap_or_default();
    println!("chaos: {} nodes are held, the first of them: {node}", held.len());
    for number in 0..CONTROLLERS {
        println!("chaos: controller {number} says of {id}:");
        let log = chaos.fleet().controller_log(number)?;
        log.lines().filter(|line| line.contains(id)).for_each(|line| println!("  {line}"));
    }
    bail!("{id} is healthy, and is held as {}: {}", node["state"], node["state_reason"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by make chaos: it takes minutes, and the machine for itself"]
async fn whatever_breaks_acknowledgements_store_and_nodes_agree() -> Result<()> {
    let length = Duration::from_secs(setting("CHAOS_SECONDS", 120));
    let seed = setting("CHAOS_SEED", u64::from(std::process::id()));
    println!("chaos: {length:?} of faults, CHAOS_SEED={seed}");
    let primary = tokio::task::spawn_blocking(|| Postgres::start_own_for(CONNECTIONS)).await??;
    let url = primary.database()?;
    let mut fleet = Fleet::builder()
        .database(Database::Url(url.clone()))
        .controllers(CONTROLLERS)
        .database_proxies()
        .own_clocks()
        .pis(PIS)
        .boot_time(Duration::from_millis(300))
        .start()
        .await?;
    fleet.all_connected().await?;
    let ids = fleet.ids().await?;
    load::create_schedules(&fleet, &ids, &mut Dice(seed)).await?;
    let channels = (0..CONTROLLERS).map(|number| fleet.channel_of(number)).collect::<Result<Vec<_>>>()?;
    let stop = CancellationToken::new();
    let asked = Arc::new(Asked::default());
    // Another seed than that of the faults, so that the two sequences are independent.
    let asking = tokio::spawn(load::ask(channels, ids.clone(), Arc::clone(&asked), Dice(seed ^ 1), stop.clone()));

    let begun = Instant::now();
    let mut chaos = Chaos::new(fleet, primary, url, Dice(seed), length);
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut looks = 0;
    while begun.elapsed() < length {
        ticks.tick().await;
        chaos.step().await?;
        looks += look(&chaos)?;
    }
    chaos.heal_all().await?;
    let watched = Instant::now();
    // The load goes on, and now nothing excuses a node without its work.
    while watched.elapsed() < WATCHED {
        ticks.tick().await;
        looks += look(&chaos)?;
    }
    // A shorter run has no time for all kinds of faults.
    let (mut fleet, postgres, url) = chaos.end(length >= seconds(100))?;
    println!("chaos: looked for idle nodes {looks} times");
    ensure!(looks > 0, "nobody looked for idle nodes");
    stop.cancel();
    asking.await?;

    for number in 0..CONTROLLERS {
        fleet.talk_to(number)?;
        fleet.controller_is_healthy().await.with_context(|| format!("controller {number}"))?;
    }
    let quiet = Instant::now();
    let behind = "SELECT id FROM schedules WHERE NOT paused AND next_fire < (EXTRACT(EPOCH FROM clock_timestamp()) - 1) * 1000000";
    wait_until(QUIET, "the schedules have caught up", async || {
        // Processes that took all connections have only just ended, so errors are retried.
        Ok(postgres.rows(&url, behind).ok().filter(Vec::is_empty).map(|_| ()))
    })
    .await?;
    load::pause_schedules(&fleet).await?;
    // A request without an acknowledgement may or may not be stored. Retrying under the same id settles that.
    load::settle(&asked, &fleet).await?;
    let unfinished = "SELECT o.id AS operation, e.node AS node, o.state AS state, e.state AS part, e.phase AS phase \
                      FROM operations o JOIN executions e ON e.operation = o.id \
                      WHERE o.state NOT IN ('SUCCEEDED', 'FAILED', 'CANCELLED') \
                      AND e.state NOT IN ('SUCCEEDED', 'FAILED', 'ROLLED_BACK', 'CANCELLED', 'EXPIRED')";
    let left = QUIET.saturating_sub(quiet.elapsed());
    let ended = wait_until(left, "every operation has ended", async || {
        Ok(postgres.rows(&url, unfinished).ok().filter(Vec::is_empty).map(|_| ()))
    })
    .await;
    ended.with_context(|| format!("stuck: {:?}", postgres.rows(&url, unfinished)))?;

    let [schedules, fires, fired, stored, executions] = postgres.snapshot(
        &url,
        [
            "SELECT id, create_time, update_time FROM schedules",
            "SELECT schedule, fire_time, outcome, reason, operation FROM fires",
            "SELECT id FROM operations WHERE schedule IS NOT NULL",
            "SELECT id, request_id FROM operations WHERE request_id IS NOT NULL",
            "SELECT operation, node, state FROM executions",
        ],
    )?;
    ensure!(schedules.len() == SCHEDULES, "{} schedules", schedules.len());
    let instants = fires_are_complete(&schedules, &fires, &fired, load::period)?;
    let acknowledged = asked.compare(&stored)?;
    let reboots = logs_agree(&fleet, &ids, &executions)?;
    let failed = executions.iter().filter(|execution| execution["state"] == "FAILED").count();
    println!(
        "chaos: {instants} instants explained, {acknowledged} acknowledgements kept, {} executions, {reboots} reboots, \
         {failed} failed",
        executions.len()
    );
    ensure!(acknowledged > 0 && reboots > 0, "nothing happened");
    for number in 0..CONTROLLERS {
        ensure!(!fleet.controller_log(number)?.contains("panicked"), "controller {number} panicked");
    }
    fleet.went_well();
    Ok(())
}
