//! Four controllers, each a process of its own, race for the same due times of the same schedules on one Postgres. The
//! outcome is read from the database only.

#![allow(clippy::print_stdout, reason = "who fired how much is worth reading, also when it passed")]

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use integration_tests::fleet::{Database, reboot};
use integration_tests::postgres::Postgres;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::schedule_service_client::ScheduleServiceClient;
use marco_proto::v1::{CreateScheduleRequest, Schedule, schedule};
use serde_json::Value;

const CONTROLLERS: usize = 4;
/// Number of schedules. Each fires every second, so 500 due times take 20 seconds.
const SCHEDULES: usize = 25;
const INSTANTS: i64 = 20;
/// Microseconds of a second, the database's unit of time.
const SECOND: i64 = 1_000_000;

struct Race {
    fleet: Fleet,
    server: &'static Postgres,
    url: String,
    /// The first due time that all schedules have, in microseconds since 1970.
    first: i64,
}

/// The recorded outcome of a due time.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Row {
    outcome: String,
    reason: String,
    operation: Option<String>,
}

fn text<'a>(row: &'a Value, name: &str) -> &'a str {
    row.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn number(row: &Value, name: &str) -> Option<i64> {
    row.get(name).and_then(Value::as_i64)
}

/// Schedule and due time of a row.
fn instant(row: &Value) -> Result<(String, i64)> {
    let at = number(row, "fire_time").with_context(|| format!("no instant: {row}"))?;
    Ok((text(row, "schedule").to_owned(), at))
}

impl Race {
    async fn start(missed_after: Option<Duration>) -> Result<Self> {
        let server = tokio::task::spawn_blocking(Postgres::start).await??;
        let url = server.database()?;
        let builder = Fleet::builder().database(Database::Url(url.clone())).controllers(CONTROLLERS).own_clocks();
        let builder = match missed_after {
            Some(late) => builder.missed_after(late),
            None => builder,
        };
        let fleet = builder.pis(1).start().await?;
        let ids = fleet.ids().await?;
        let mut client = ScheduleServiceClient::new(fleet.admin_channel());
        for number in 0..SCHEDULES {
            let schedule = Schedule {
                cron: "* * * * * *".to_owned(),
                time_zone: "Europe/Madrid".to_owned(),
                // The operations themselves do not matter here: one Pi stays in its notice, and all others wait for it.
                operation: Some(reboot(&ids, seconds(3600))),
                overlap: schedule::Overlap::Queue.into(),
                ..Schedule::default()
            };
            let request = CreateScheduleRequest {
                schedule: Some(schedule),
                schedule_id: format!("race-{number:02}"),
                validate_only: false,
            };
            client.create_schedule(request).await.with_context(|| format!("schedule {number}"))?;
        }
        let latest = "SELECT MAX(create_time) AS latest FROM schedules";
        let created = server.rows(&url, latest)?.first().and_then(|row| number(row, "latest"));
        let first = (created.context("no schedule")? / SECOND + 1) * SECOND;
        Ok(Self { fleet, server, url, first })
    }

    /// Waits until each schedule is past the due time with this number.
    async fn pass(&self, instant: i64) -> Result<()> {
        let until = self.first + instant * SECOND;
        let behind = format!("SELECT id FROM schedules WHERE next_fire <= {until}");
        wait_until(seconds(120), &format!("instant {instant} is decided about"), async || {
            Ok(self.server.rows(&self.url, &behind)?.is_empty().then_some(()))
        })
        .await
    }

    /// The outcomes of the first `instants` due times of each schedule. Checks that each has exactly one row, that each
    /// fired one has exactly one operation, and that there are no other operations.
    fn decided(&self, instants: i64) -> Result<Vec<Row>> {
        // Schedules fire meanwhile: a fire between two separate reads would look like an operation without a row.
        let queries = [
            "SELECT schedule, fire_time, outcome, reason, operation FROM fires",
            "SELECT id, schedule, fire_time FROM operations",
        ];
        let [fires, made] = self.server.snapshot(&self.url, queries)?;
        let mut rows: BTreeMap<(String, i64), Vec<Row>> = BTreeMap::new();
        for row in fires {
            let decided = Row {
                outcome: text(&row, "outcome").to_owned(),
                reason: text(&row, "reason").to_owned(),
                operation: Some(text(&row, "operation").to_owned()).filter(|name| !name.is_empty()),
            };
            rows.entry(instant(&row)?).or_default().push(decided);
        }
        let mut operations: BTreeMap<(String, i64), Vec<String>> = BTreeMap::new();
        for row in made {
            operations.entry(instant(&row)?).or_default().push(text(&row, "id").to_owned());
        }
        for (instant, made) in &operations {
            let rows = rows.get(instant).map(Vec::as_slice).unwrap_or_default();
            let named: Vec<String> = rows.iter().filter_map(|row| row.operation.clone()).collect();
            ensure!(made.len() == 1 && named == *made, "{instant:?} made {made:?}, its rows are {rows:?}");
        }
        let mut all = Vec::new();
        for number in 0..SCHEDULES {
            for instant in 0..instants {
                let key = (format!("race-{number:02}"), self.first + instant * SECOND);
                let found = rows.get(&key).map(Vec::as_slice).unwrap_or_default();
                let [row] = found else { anyhow::bail!("{key:?} has the rows {found:?}") };
                let fired = row.outcome == "FIRED";
                ensure!(fired == operations.contains_key(&key) && fired == row.operation.is_some(), "{key:?}: {row:?}");
                all.push(row.clone());
            }
        }
        Ok(all)
    }

    /// Number of fires in each controller's log.
    fn shares(&self) -> Result<Vec<usize>> {
        let fired = |number| Ok(self.fleet.controller_log(number)?.matches("a schedule fired").count());
        (0..CONTROLLERS).map(fired).collect()
    }
}

#[tokio::test]
async fn four_controllers_make_one_operation_of_each_of_500_instants() -> Result<()> {
    let mut race = Race::start(None).await?;
    race.pass(INSTANTS).await?;
    let decided = race.decided(INSTANTS)?;
    assert_eq!(decided.len(), 500);
    assert!(decided.iter().all(|row| row.outcome == "FIRED"), "{decided:?}");
    let shares = race.shares()?;
    println!("race: {} instants, {} operations, fired by {shares:?}", decided.len(), decided.len());
    // The control: if one controller did all the work, there was no race.
    assert!(shares.iter().filter(|share| **share > 0).count() > 1, "one of them did it all: {shares:?}");
    race.fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn kills_and_a_clock_an_hour_off_neither_lose_nor_double_an_instant() -> Result<()> {
    /// Allowed lateness. An outage of all controllers exceeds it. Delays on a busy machine do not, so that all other
    /// due times fire.
    const LATE: Duration = seconds(30);
    let mut race = Race::start(Some(LATE)).await?;
    // An hour ahead: this controller must still take due times by the database's clock.
    race.fleet.jump_clock(3, 3600)?;
    race.pass(5).await?;
    race.fleet.kill(1).await?;
    race.pass(8).await?;
    race.fleet.kill(2).await?;
    race.fleet.jump_clock(3, -3600)?;
    race.pass(INSTANTS).await?;
    let decided = race.decided(INSTANTS)?;
    assert_eq!(decided.len(), 500);
    assert!(decided.iter().all(|row| row.outcome == "FIRED"), "{decided:?}");
    let shares = race.shares()?;
    println!("race with kills: {} instants, {} operations, fired by {shares:?}", decided.len(), decided.len());

    // First only the controller with the wrong clock is left, then none, then that one again.
    race.fleet.kill(0).await?;
    race.pass(INSTANTS + 3).await?;
    race.fleet.kill(3).await?;
    let next =
        "SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::BIGINT - MIN(next_fire) AS late FROM schedules";
    wait_until(seconds(60), "instants are overdue for longer than they may be", async || {
        let late = race.server.rows(&race.url, next)?.first().and_then(|row| number(row, "late"));
        Ok(late.filter(|late| *late > i64::try_from(LATE.as_micros()).unwrap_or(i64::MAX) + 3 * SECOND))
    })
    .await?;
    race.fleet.revive(3)?;
    race.pass(INSTANTS + 14).await?;
    let all = race.decided(INSTANTS + 14)?;
    let missed: Vec<&Row> = all.iter().filter(|row| row.outcome == "MISSED").collect();
    println!("race with an outage: {} instants, {} of them missed", all.len(), missed.len());
    assert!(missed.len() >= SCHEDULES, "each schedule missed some");
    // Only an order of magnitude: a busy machine may revive a controller late.
    let at_least_ten_seconds = |row: &&Row| {
        let late = row.reason.strip_prefix("found ").and_then(|reason| reason.strip_suffix("s late"));
        late.is_some_and(|late| late.len() >= 2)
    };
    assert!(missed.iter().all(at_least_ten_seconds), "{missed:?}");
    assert!(all.iter().all(|row| row.outcome == "FIRED" || row.outcome == "MISSED"), "{all:?}");
    race.fleet.went_well();
    Ok(())
}
