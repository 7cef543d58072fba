//! A soak test: schedules, virtual Pis, several controllers, and random faults of a machine room. Afterwards a checker
//! reads only the database and the virtual Pis' own logs.
//!
//! `SOAK_SECONDS`: duration of the faults (default 60). `SOAK_SEED`: repeats the choices of a run.

#![allow(clippy::print_stdout, reason = "what a run did is worth reading, also when it passed")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use integration_tests::fleet::{Database, reboot};
use integration_tests::ledger::{Dice, fires_are_complete, logs_agree, setting};
use integration_tests::postgres::Postgres;
use integration_tests::proxy::Direction;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::schedule_service_client::ScheduleServiceClient;
use marco_proto::v1::{CreateScheduleRequest, PauseScheduleRequest, Schedule, schedule};

const SCHEDULES: usize = 30;
const PIS: usize = 50;
const CONTROLLERS: usize = 3;
/// Fewest faults of a meaningful run.
const FEWEST_FAULTS: usize = 30;
/// Kinds of faults that each run must have, with their numbers in `fault`. The first faults are these in turn, later
/// ones are random.
const KINDS: [(&str, usize); 7] = [
    ("a controller killed", 0),
    ("a controller frozen", 2),
    ("the database stopped", 3),
    ("the agents killed", 4),
    ("a session cut in the middle", 5),
    ("a clock jumped", 6),
    ("all sessions cut", 7),
];
/// Age after which a frozen controller has lost its sessions.
const DEAD_AFTER: Duration = seconds(16);
/// Timeout for everything to settle after the faults; an agent's backoff grows up to a minute.
const SETTLE: Duration = seconds(240);

/// Interval of the schedule with this number, in seconds; each divides the minute.
fn period(number: usize) -> u64 {
    match number % 7 {
        0 => 5,
        1 => 6,
        2 => 10,
        3 => 12,
        4 => 15,
        5 => 20,
        _ => 30,
    }
}

async fn create_schedules(fleet: &Fleet, ids: &[String], dice: &mut Dice) -> Result<()> {
    let mut client = ScheduleServiceClient::new(fleet.admin_channel());
    for number in 0..SCHEDULES {
        let nodes: BTreeSet<&String> = (0..3).filter_map(|_| ids.get(dice.below(ids.len()))).collect();
        let nodes: Vec<&String> = nodes.into_iter().collect();
        let request = CreateScheduleRequest {
            schedule: Some(Schedule {
                cron: format!("*/{} * * * * *", period(number)),
                time_zone: "Europe/Madrid".to_owned(),
                operation: Some(reboot(&nodes, Duration::ZERO)),
                // A schedule that fires faster than its nodes reboot must not pile up operations.
                overlap: schedule::Overlap::Skip.into(),
                ..Schedule::default()
            }),
            schedule_id: format!("soak-{number:02}"),
            validate_only: false,
        };
        client.create_schedule(request).await.with_context(|| format!("schedule {number}"))?;
    }
    Ok(())
}

async fn pause_schedules(fleet: &Fleet) -> Result<()> {
    let mut client = ScheduleServiceClient::new(fleet.admin_channel());
    for number in 0..SCHEDULES {
        let request = PauseScheduleRequest { name: format!("schedules/soak-{number:02}"), reason: "over".to_owned() };
        client.pause_schedule(request).await?;
    }
    Ok(())
}

/// The present faults.
#[derive(Default)]
struct Broken {
    dead: BTreeSet<usize>,
    frozen: BTreeMap<usize, Instant>,
    database: Option<Instant>,
    agents: Option<Instant>,
}

struct Soak<'a> {
    fleet: Fleet,
    postgres: &'a Postgres,
    dice: Dice,
    broken: Broken,
    faults: BTreeMap<&'static str, usize>,
}

impl Soak<'_> {
    fn count(&mut self, fault: &'static str) {
        *self.faults.entry(fault).or_default() += 1;
    }

    /// Inflicts a random fault. At least one controller always stays, and everything can be healed.
    async fn fault(&mut self) -> Result<()> {
        let victim = self.dice.below(CONTROLLERS);
        let alone = self.broken.dead.len() + self.broken.frozen.len() + 1 >= CONTROLLERS;
        let well = !self.broken.dead.contains(&victim) && !self.broken.frozen.contains_key(&victim);
        // A kind that random choice misses would make the run fail at the end.
        let missing = KINDS.iter().find(|(kind, _)| !self.faults.contains_key(kind)).map(|(_, number)| *number);
        let any = self.dice.below(10);
        match missing.unwrap_or(any) {
            0 | 1 if well && !alone => {
                self.fleet.kill(victim).await?;
                self.broken.dead.insert(victim);
                self.count("a controller killed");
            }
            2 if well && !alone => {
                self.fleet.freeze(victim).await?;
                self.broken.frozen.insert(victim, Instant::now());
                self.count("a controller frozen");
            }
            3 if self.broken.database.is_none() => {
                self.postgres.pause()?;
                self.broken.database = Some(Instant::now());
                self.count("the database stopped");
            }
            4 if self.broken.agents.is_none() => {
                self.fleet.kill_agents().await?;
                self.broken.agents = Some(Instant::now());
                self.count("the agents killed");
            }
            5 => {
                let direction = if self.dice.below(2) == 0 { Direction::Up } else { Direction::Down };
                self.fleet.proxy().cut_after(direction, [u64::try_from(self.dice.below(20_000))?]);
                self.count("a session cut in the middle");
            }
            // Up to an hour in both directions: a controller's own clock must not decide about due times.
            6 => {
                let hour = i64::try_from(self.dice.below(7200))? - 3600;
                self.fleet.jump_clock(victim, hour)?;
                self.count("a clock jumped");
            }
            _ => {
                self.fleet.proxy().drop_connections();
                self.count("all sessions cut");
            }
        }
        Ok(())
    }

    /// Heals faults that have lasted long enough; all faults if `all`.
    async fn heal(&mut self, all: bool) -> Result<()> {
        if self.broken.database.is_some_and(|since| all || since.elapsed() > seconds(3)) {
            self.postgres.resume()?;
            self.broken.database = None;
        }
        let thawed: Vec<usize> = self
            .broken
            .frozen
            .iter()
            .filter(|(_, since)| all || since.elapsed() > DEAD_AFTER)
            .map(|(number, _)| *number)
            .collect();
        for number in thawed {
            self.fleet.thaw(number).await?;
            self.broken.frozen.remove(&number);
        }
        if self.broken.agents.is_some_and(|since| all || since.elapsed() > seconds(2)) {
            self.fleet.start_agents()?;
            self.broken.agents = None;
        }
        // A controller cannot start without its database.
        if self.broken.database.is_none() && (all || self.dice.below(3) == 0) {
            for number in std::mem::take(&mut self.broken.dead) {
                self.fleet.revive(number)?;
            }
        }
        Ok(())
    }
}

#[tokio::test]
async fn nothing_is_lost_or_done_twice_whatever_breaks() -> Result<()> {
    let length = Duration::from_secs(setting("SOAK_SECONDS", 60));
    let seed = setting("SOAK_SEED", u64::from(std::process::id()));
    println!("soak: {length:?} of faults, SOAK_SEED={seed}");
    let postgres = tokio::task::spawn_blocking(Postgres::start_own).await??;
    let url = postgres.database()?;
    let builder = Fleet::builder().database(Database::Url(url.clone())).controllers(CONTROLLERS).own_clocks().pis(PIS);
    let fleet = builder.boot_time(Duration::from_millis(300)).shutdown_time(Duration::from_millis(100)).start().await?;
    let ids = fleet.ids().await?;
    let mut dice = Dice(seed);
    create_schedules(&fleet, &ids, &mut dice).await?;

    let begun = Instant::now();
    let mut soak = Soak { fleet, postgres: &postgres, dice, broken: Broken::default(), faults: BTreeMap::new() };
    let mut ticks = tokio::time::interval(Duration::from_millis(900));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while begun.elapsed() < length {
        // No two faults at the same instant, so that the log tells them apart.
        ticks.tick().await;
        soak.fault().await?;
        soak.heal(false).await?;
    }
    soak.heal(true).await?;
    let faults: usize = soak.faults.values().sum();
    println!("soak: {faults} faults: {:?}", soak.faults);
    ensure!(faults >= FEWEST_FAULTS, "only {faults} faults: the run says nothing");
    let missing = KINDS.iter().find(|(kind, _)| !soak.faults.contains_key(kind));
    ensure!(missing.is_none(), "{missing:?} never happened");

    let mut fleet = soak.fleet;
    fleet.controller_is_healthy().await?;
    let behind = "SELECT id FROM schedules WHERE next_fire < (EXTRACT(EPOCH FROM clock_timestamp()) - 1) * 1000000";
    wait_until(SETTLE, "the schedules have caught up", async || {
        Ok(postgres.rows(&url, behind)?.is_empty().then_some(()))
    })
    .await?;
    // A pause, so that no new operations begin while the test waits for the last one to end.
    pause_schedules(&fleet).await?;
    let unfinished = "SELECT id FROM operations WHERE state NOT IN ('SUCCEEDED', 'FAILED', 'CANCELLED')";
    wait_until(SETTLE, "every operation has ended", async || {
        Ok(postgres.rows(&url, unfinished)?.is_empty().then_some(()))
    })
    .await?;

    // Paused schedules still get rows for their due times, so all queries must read one snapshot.
    let queries = [
        "SELECT id, create_time, update_time FROM schedules",
        "SELECT schedule, fire_time, outcome, reason, operation FROM fires",
        "SELECT id FROM operations",
        "SELECT operation, node, state FROM executions",
    ];
    let [schedules, fires, operations, executions] = postgres.snapshot(&url, queries)?;
    ensure!(schedules.len() == SCHEDULES, "{} schedules", schedules.len());
    let instants = fires_are_complete(&schedules, &fires, &operations, |id| {
        Ok(period(id.trim_start_matches("soak-").parse().context("the number of a schedule")?))
    })?;
    let reboots = logs_agree(&fleet, &ids, &executions)?;
    let failed = executions.iter().filter(|execution| execution["state"] == "FAILED").count();
    println!(
        "soak: {instants} instants explained, {} operations, {} executions, {reboots} reboots, {failed} failed",
        operations.len(),
        executions.len()
    );
    ensure!(instants > 0 && reboots > 0, "nothing happened");
    fleet.went_well();
    Ok(())
}
