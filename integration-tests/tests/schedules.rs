//! Schedules through the API and marcoctl: refusals, fires, and the reboots of a Pi.

use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::client::{bad_fields, reason};
use integration_tests::fleet::{execution_name, reboot};
use integration_tests::process::{Output, binary, run};
use integration_tests::{Fleet, seconds, wait_until};
use marco_controller::schedule::operation_uuid;
use marco_proto::v1::fire::Outcome;
use marco_proto::v1::operation::State;
use marco_proto::v1::schedule_service_client::ScheduleServiceClient;
use marco_proto::v1::{
    CreateScheduleRequest, DeleteScheduleRequest, Fire, ListFiresRequest, ListSchedulesRequest, MaintenanceWindow,
    Operation, RunScheduleRequest, Schedule, UpdateScheduleRequest,
};
use tonic::Code;
use tonic::transport::Channel;

fn schedules(fleet: &Fleet) -> Result<ScheduleServiceClient<Channel>> {
    Ok(ScheduleServiceClient::new(fleet.admin().channel(fleet.addresses().api)?))
}

async fn marcoctl(fleet: &Fleet, arguments: &[&str]) -> Result<Output> {
    let address = fleet.addresses().api.to_string();
    let certs = fleet.certs().display().to_string();
    let mut all = vec!["--controller", &address, "--certs", &certs];
    all.extend_from_slice(arguments);
    run(&binary("marcoctl")?, &all, seconds(60)).await
}

fn nightly(operation: Operation) -> Schedule {
    Schedule {
        cron: "0 3 * * *".to_owned(),
        time_zone: "Europe/Madrid".to_owned(),
        operation: Some(operation),
        ..Default::default()
    }
}

fn create(id: &str, schedule: Schedule) -> CreateScheduleRequest {
    CreateScheduleRequest { schedule: Some(schedule), schedule_id: id.to_owned(), validate_only: false }
}

async fn fires(fleet: &Fleet, id: &str) -> Result<Vec<Fire>> {
    let request = ListFiresRequest { parent: id.to_owned(), page_size: 1000, ..Default::default() };
    Ok(schedules(fleet)?.list_fires(request).await?.into_inner().fires)
}

#[tokio::test]
async fn a_schedule_reboots_a_pi_once_for_each_operation_that_it_made() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    // Each second, so that the test sees fires soon.
    let often = Schedule { cron: "* * * * * *".to_owned(), ..nightly(reboot(&[&id], Duration::ZERO)) };
    let created = schedules(&fleet)?.create_schedule(create("often", often)).await?.into_inner();
    assert_eq!((created.name.as_str(), created.creator.is_empty()), ("schedules/often", false));
    let made = wait_until(seconds(60), "two fires", async || {
        let made: Vec<Fire> =
            fires(&fleet, "often").await?.into_iter().filter(|fire| !fire.operation.is_empty()).collect();
        Ok((made.len() >= 2).then_some(made))
    })
    .await?;
    // The schedule is in the store alone, so that a restart must not lose it.
    fleet.kill_controller().await?;
    fleet.start_controller().await?;
    fleet.controller_is_healthy().await?;
    wait_until(seconds(60), "it goes on after the restart", async || {
        Ok((fires(&fleet, "often").await?.iter().filter(|fire| !fire.operation.is_empty()).count() > made.len())
            .then_some(()))
    })
    .await?;
    let paused = marcoctl(&fleet, &["schedules", "pause", "often", "--reason", "enough"]).await?.success()?;
    assert!(paused.contains("PAUSED") && paused.contains("enough"), "{paused}");
    wait_until(seconds(30), "instants of a paused schedule are skipped", async || {
        Ok(fires(&fleet, "often").await?.first().is_some_and(|fire| fire.reason.ends_with("enough")).then_some(()))
    })
    .await?;
    // The API lists fires newest first.
    let mut all = fires(&fleet, "often").await?;
    all.reverse();
    for pair in all.windows(2) {
        let [one, two] = pair else { continue };
        let apart = two.fire_time.context("no time")?.seconds - one.fire_time.context("no time")?.seconds;
        assert_eq!(apart, 1, "an instant has no row: {one:?} {two:?}");
    }
    for fire in all.iter().filter(|fire| fire.outcome() == Outcome::Fired) {
        let operation = fleet.ends(&fire.operation, seconds(60), State::Succeeded).await?;
        assert_eq!((operation.schedule.as_str(), operation.fire_time), ("schedules/often", fire.fire_time));
        // The operation's id is derived from the schedule and the time. Two controllers that fire at once therefore
        // create one.
        let time = |time: Option<prost_types::Timestamp>| {
            let time = time.context("no time")?;
            chrono::DateTime::from_timestamp(time.seconds, u32::try_from(time.nanos)?).context("no time")
        };
        let derived = operation_uuid("often", time(created.create_time)?, time(fire.fire_time)?);
        assert_eq!(operation.name, format!("operations/{derived}"));
        assert_eq!(fleet.pi(&id).reboots(&execution_name(&operation, &id))?, 1);
    }
    for fire in all.iter().filter(|fire| fire.outcome() != Outcome::Fired) {
        assert!(fire.operation.is_empty() && !fire.reason.is_empty(), "{fire:?}");
    }
    // The same request id twice must run the schedule once.
    let run = RunScheduleRequest { name: "schedules/often".to_owned(), request_id: "again".to_owned() };
    let first = schedules(&fleet)?.run_schedule(run.clone()).await?.into_inner();
    let again = schedules(&fleet)?.run_schedule(run.clone()).await?.into_inner();
    assert_eq!(first.name, again.name);
    fleet.ends(&first.name, seconds(60), State::Succeeded).await?;
    // The answer to a repeated request stays the same after the schedule is deleted.
    schedules(&fleet)?.delete_schedule(DeleteScheduleRequest { name: run.name.clone() }).await?;
    let late = schedules(&fleet)?.run_schedule(run.clone()).await?.into_inner();
    assert_eq!((late.state(), late.name), (State::Succeeded, first.name));
    let fresh = RunScheduleRequest { request_id: "another".to_owned(), ..run };
    let Err(status) = schedules(&fleet)?.run_schedule(fresh).await else { panic!("a schedule that is gone ran") };
    assert_eq!(reason(&status), "SCHEDULE_NOT_FOUND");
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn changes_at_any_moment_neither_lose_nor_stop_an_instant() -> Result<()> {
    const CHANGES: i64 = 60;
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let often = Schedule { cron: "* * * * * *".to_owned(), ..nightly(reboot(&["pi-01"], Duration::ZERO)) };
    schedules(&fleet)?.create_schedule(create("busy", often)).await?;
    let mut client = schedules(&fleet)?;
    for number in 0..CHANGES {
        // Alternates changes that touch the times with one that does not. The due times stay the same throughout.
        let path = if number % 3 == 0 { "cron" } else { "jitter" };
        let changed = Schedule {
            name: "busy".to_owned(),
            cron: if number % 2 == 0 { "0-59 * * * * *" } else { "* * * * * *" }.to_owned(),
            jitter: Some(prost_types::Duration { seconds: number, nanos: 0 }),
            ..Schedule::default()
        };
        let update_mask = Some(prost_types::FieldMask { paths: vec![path.to_owned()] });
        client
            .update_schedule(UpdateScheduleRequest { schedule: Some(changed), update_mask, validate_only: false })
            .await?;
        // 71 ms is no divisor of a second, so that the changes drift over all phases of it.
        tokio::time::timeout(Duration::from_millis(71), std::future::pending::<()>()).await.ok();
    }
    let last = wait_until(seconds(20), "it fires", async || {
        Ok(fires(&fleet, "busy").await?.first().and_then(|fire| fire.fire_time))
    })
    .await?;
    wait_until(seconds(20), "it goes on", async || {
        Ok(fires(&fleet, "busy")
            .await?
            .first()
            .filter(|fire| fire.fire_time.is_some_and(|time| time.seconds > last.seconds))
            .map(|_| ()))
    })
    .await?;
    let times: Vec<i64> =
        fires(&fleet, "busy").await?.iter().filter_map(|fire| fire.fire_time).map(|t| t.seconds).collect();
    assert!(times.windows(2).all(|pair| pair.first().zip(pair.last()).is_some_and(|(a, b)| a - b == 1)), "{times:?}");
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn every_bad_schedule_is_refused_with_its_field_and_nothing_is_stored() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    // Targets are resolved at each fire, so a node that does not exist yet is no error.
    let good = nightly(reboot(&["pi-01"], Duration::ZERO));
    let later = Some(prost_types::Timestamp { seconds: 4_000_000_000, nanos: 0 });
    let long = Some(prost_types::Duration { seconds: 90_000, nanos: 0 });
    let template = |operation| Schedule { operation: Some(operation), ..good.clone() };
    let timed = Operation { schedule_time: later, ..reboot(&["pi-01"], Duration::ZERO) };
    let window = |cron: &str, zone: &str| {
        let duration = Some(prost_types::Duration { seconds: 3600, nanos: 0 });
        let window = MaintenanceWindow { cron: cron.to_owned(), duration, time_zone: zone.to_owned() };
        template(Operation { window: Some(window), ..reboot(&["pi-01"], Duration::ZERO) })
    };
    let cron = |cron: &str| Schedule { cron: cron.to_owned(), ..good.clone() };
    let zone = |zone: &str| Schedule { time_zone: zone.to_owned(), ..good.clone() };
    let cases: [(&str, Schedule, &[&str], &str); 18] = [
        ("a window that never opens", window("0 22 30 2 *", ""), &["schedule.operation.window.cron"], "never fires"),
        ("a window nowhere", window("0 22 * * *", "utc"), &["schedule.operation.window.time_zone"], "mean UTC?"),
        ("a cron of AWS", cron("45 12 * * TUE,THU *"), &["schedule.cron"], "TUE is a day of the week"),
        ("a space in a list", cron("0 3 * * 1, 3"), &["schedule.cron"], "is empty"),
        ("an L alone", cron("0 2 * * L"), &["schedule.cron"], "last Friday"),
        ("a small letter", zone("europe/madrid"), &["schedule.time_zone"], "did you mean Europe/Madrid?"),
        ("an abbreviation", zone("CEST"), &["schedule.time_zone"], "Europe/Madrid"),
        ("an offset", zone("+03:00"), &["schedule.time_zone"], "Etc/GMT-3"),
        ("a word and an offset", zone("UTC+2"), &["schedule.time_zone"], "Etc/GMT-2"),
        ("no cron", Schedule { cron: String::new(), ..good.clone() }, &["schedule.cron"], "0 fields"),
        ("a wrong cron", Schedule { cron: "61 * * * *".to_owned(), ..good.clone() }, &["schedule.cron"], "61"),
        ("never", Schedule { cron: "0 0 30 2 *".to_owned(), ..good.clone() }, &["schedule.cron"], "never fires"),
        (
            "an unknown zone",
            Schedule { time_zone: "Europe/Atlantis".to_owned(), ..good.clone() },
            &["schedule.time_zone"],
            "Europe/Atlantis",
        ),
        ("no template", Schedule { operation: None, ..good.clone() }, &["schedule.operation"], "missing"),
        (
            "an empty template",
            template(Operation::default()),
            &["schedule.operation.action", "schedule.operation.target"],
            "",
        ),
        ("a time in the template", template(timed), &["schedule.operation.schedule_time"], "each fire"),
        ("too much jitter", Schedule { jitter: long, ..good.clone() }, &["schedule.jitter"], "1day"),
        ("an unknown policy", Schedule { overlap: 9, ..good.clone() }, &["schedule.overlap"], "policy"),
    ];
    for (what, schedule, fields, word) in cases {
        let Err(status) = schedules(&fleet)?.create_schedule(create("bad", schedule)).await else {
            panic!("{what} was taken")
        };
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status}");
        assert_eq!(bad_fields(&status), fields, "{what}");
        assert!(status.message().contains(word), "{what}: {status}");
    }
    let Err(status) = schedules(&fleet)?.create_schedule(create("../x", good.clone())).await else {
        panic!("a bad id was taken")
    };
    assert_eq!(bad_fields(&status), ["schedule_id"]);
    let stored = schedules(&fleet)?.list_schedules(ListSchedulesRequest::default()).await?.into_inner();
    assert_eq!(stored.schedules, []);

    schedules(&fleet)?.create_schedule(create("good", good.clone())).await?;
    let Err(status) = schedules(&fleet)?.create_schedule(create("good", good.clone())).await else {
        panic!("an id was taken twice")
    };
    assert_eq!((status.code(), reason(&status).as_str()), (Code::AlreadyExists, "SCHEDULE_EXISTS"));
    let changed = Schedule { name: "good".to_owned(), cron: "0 4 * * *".to_owned(), ..Schedule::default() };
    let update_mask = Some(prost_types::FieldMask { paths: vec!["cron".to_owned()] });
    let update = UpdateScheduleRequest { schedule: Some(changed), update_mask, validate_only: false };
    let updated = schedules(&fleet)?.update_schedule(update).await?.into_inner();
    assert_eq!((updated.cron.as_str(), updated.time_zone.as_str()), ("0 4 * * *", "Europe/Madrid"));
    assert!(updated.operation.is_some_and(|operation| operation.target.is_some()));
    // A change is checked as a new one is.
    for (path, changed, word) in
        [("cron", cron("0 0 30 2 *"), "never fires"), ("time_zone", zone("CEST"), "Europe/Madrid")]
    {
        let schedule = Some(Schedule { name: "good".to_owned(), ..changed });
        let update_mask = Some(prost_types::FieldMask { paths: vec![path.to_owned()] });
        let update = UpdateScheduleRequest { schedule, update_mask, validate_only: false };
        let Err(status) = schedules(&fleet)?.update_schedule(update).await else { panic!("{path} was taken") };
        assert_eq!((status.code(), bad_fields(&status)), (Code::InvalidArgument, vec![format!("schedule.{path}")]));
        assert!(status.message().contains(word), "{status}");
    }
    // No node is named pi-01, and a manual run resolves the targets at once.
    let run = RunScheduleRequest { name: "good".to_owned(), request_id: String::new() };
    let Err(status) = schedules(&fleet)?.run_schedule(run).await else { panic!("it ran on no node") };
    assert_eq!(reason(&status), "NODE_NOT_FOUND");
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn marcoctl_shows_the_coming_fires_in_the_zone_and_in_utc() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    // The nights of 2026 in which Madrid changes its clocks: 02:30 does not exist on 29 March, and is there twice on 25
    // October.
    let asked = ["schedules", "next", "--cron", "0,30 2 * * *", "--zone", "Europe/Madrid"];
    let gap = [&asked[..], &["--from", "2026-03-28T02:00:00Z", "--count", "3"]].concat();
    assert_eq!(
        marcoctl(&fleet, &gap).await?.success()?,
        "2026-03-29T03:00:00+02:00 2026-03-29T01:00:00Z\n\
         2026-03-30T02:00:00+02:00 2026-03-30T00:00:00Z\n\
         2026-03-30T02:30:00+02:00 2026-03-30T00:30:00Z\n"
    );
    let overlap = [&asked[..], &["--from", "2026-10-24T22:00:00Z", "--count", "3"]].concat();
    assert_eq!(
        marcoctl(&fleet, &overlap).await?.success()?,
        "2026-10-25T02:00:00+02:00 2026-10-25T00:00:00Z\n\
         2026-10-25T02:30:00+02:00 2026-10-25T00:30:00Z\n\
         2026-10-26T02:00:00+01:00 2026-10-26T01:00:00Z\n"
    );
    let new = ["schedules", "create", "winter", "--cron", "0 12 24 12 *", "--action", "power-off", "--all"];
    marcoctl(&fleet, &new).await?.success()?;
    let stored = ["schedules", "next", "winter", "--from", "2026-01-01T00:00:00+01:00", "--count", "1"];
    assert_eq!(marcoctl(&fleet, &stored).await?.success()?, "2026-12-24T12:00:00+00:00 2026-12-24T12:00:00Z\n");
    let listed = marcoctl(&fleet, &["schedules", "list", "-o", "json"]).await?.success()?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    assert_eq!(listed["schedules"][0]["name"], "schedules/winter");
    assert_eq!(listed["schedules"][0]["missedFire"], "MISSED_FIRE_SKIP");
    for wrong in [["--cron", "never", "--zone", "UTC"], ["--cron", "0 0 * * *", "--zone", "Mars"]] {
        let refused = marcoctl(&fleet, &[&["schedules", "next"], &wrong[..]].concat()).await?;
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        assert!(refused.stderr.contains(if wrong[1] == "never" { "cron" } else { "Mars" }), "{refused:?}");
    }
    let changes =
        ["schedules", "update", "winter", "--cron", "0 13 24 12 *", "--message", "Merry Christmas", "-o", "json"];
    let changed = marcoctl(&fleet, &changes).await?.success()?;
    let changed: serde_json::Value = serde_json::from_str(&changed)?;
    let next = marcoctl(&fleet, &["schedules", "next", "winter", "--count", "1"]).await?.success()?;
    let next = serde_json::json!(next.split_whitespace().last().context("no fire")?);
    assert_eq!((&changed["cron"], &changed["nextFireTime"]), (&serde_json::json!("0 13 24 12 *"), &next));
    assert_eq!(changed["operation"]["powerOff"]["message"], "Merry Christmas");
    assert!(changed["operation"]["all"].is_object() && changed["missedFire"] == "MISSED_FIRE_SKIP", "{changed}");
    let shown = marcoctl(&fleet, &["schedules", "get", "winter"]).await?.success()?;
    assert!(shown.contains("0 13 24 12 *") && shown.contains("Merry Christmas"), "{shown}");
    let nothing = marcoctl(&fleet, &["schedules", "update", "winter"]).await?;
    assert_eq!(nothing.status.code(), Some(2), "{nothing:?}");
    marcoctl(&fleet, &["schedules", "delete", "winter"]).await?.success()?;
    assert_eq!(marcoctl(&fleet, &["schedules", "get", "winter"]).await?.status.code(), Some(1));
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn what_is_rarely_meant_is_asked_for_and_nothing_is_stored_before() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let create = ["schedules", "create", "odd", "--cron", "0 3 * * *", "--action"];
    let cases: [(&[&str], &str); 5] = [
        (&["reboot", "pi-nobody"], "nodes/pi-nobody"),
        (&["reboot", "--selector", "room=attic"], "no node has the label room=attic"),
        (&["update", "--image", "nothing", &id], "artifacts/nothing"),
        (&["reboot", "--all", "--group-by", "swich", "--max-per-group", "1"], "swich"),
        (&["update", "--image", "nothing", "pi-nobody"], "nodes/pi-nobody"),
    ];
    for (flags, said) in cases {
        let refused = marcoctl(&fleet, &[&create[..], flags].concat()).await?;
        assert_eq!(refused.status.code(), Some(1), "{flags:?}: {refused:?}");
        assert!(refused.stderr.contains(said) && refused.stderr.contains("--force"), "{flags:?}: {refused:?}");
        assert_eq!(marcoctl(&fleet, &["schedules", "get", "odd"]).await?.status.code(), Some(1), "it was stored");
    }
    let both = marcoctl(&fleet, &[&create[..], &["update", "--image", "nothing", "pi-nobody"]].concat()).await?;
    assert!(both.stderr.contains("artifacts/nothing"), "all that is missing is said: {both:?}");
    let often = ["schedules", "create", "often", "--cron", "* * * * * *", "--action", "reboot", &id];
    let refused = marcoctl(&fleet, &often).await?;
    assert!(refused.status.code() == Some(1) && refused.stderr.contains("every second"), "{refused:?}");

    // Sound schedules raise no doubt. With `--force` a doubtful one is stored, and marcoctl prints the doubt as a
    // warning.
    let sound = ["schedules", "create", "sound", "--cron", "0 3 29 2 *", "--zone", "Europe/Madrid", "--action"];
    let window = ["reboot", &id, "--window-cron", "0 2 * * 7L", "--window-duration", "4h"];
    let made = marcoctl(&fleet, &[&sound[..], &window].concat()).await?.success()?;
    assert!(made.contains("at 03:00, on day 29 of the month, in February"), "{made}");
    let changes = ["schedules", "update", "sound", "pi-nobody"];
    assert_eq!(marcoctl(&fleet, &changes).await?.status.code(), Some(1));
    let forced = marcoctl(&fleet, &[&changes[..], &["--force"]].concat()).await?;
    assert!(forced.status.success() && forced.stderr.contains("warning: ") && forced.stdout.contains("pi-nobody"));

    // The window takes the schedule's zone, and follows when that changes.
    let zone = async || -> Result<String> {
        let stored = schedules(&fleet)?.list_schedules(ListSchedulesRequest::default()).await?.into_inner();
        let operation = stored.schedules.into_iter().next().and_then(|schedule| schedule.operation);
        Ok(operation.and_then(|operation| operation.window).context("no window")?.time_zone)
    };
    assert_eq!(zone().await?, "Europe/Madrid");
    marcoctl(&fleet, &["schedules", "update", "sound", "--zone", "Asia/Tokyo", "--force"]).await?.success()?;
    assert_eq!(zone().await?, "Asia/Tokyo");

    // `schedules list` shows the outcome of the last due time.
    let mut often = often.to_vec();
    // With `queue` each due time creates an operation, so the last one has one too.
    often.extend(["--overlap", "queue", "--notice", "0s", "--force"]);
    marcoctl(&fleet, &often).await?.success()?;
    wait_until(seconds(60), "the list shows an operation of the last instant", async || {
        let listed = marcoctl(&fleet, &["schedules", "list"]).await?.success()?;
        Ok((listed.contains("LAST") && listed.contains("FIRED, ")).then_some(()))
    })
    .await?;
    marcoctl(&fleet, &["schedules", "delete", "often"]).await?.success()?;
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_cron_is_said_in_words_and_one_that_never_fires_is_an_error() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let from = ["--from", "2026-11-29T12:00:00Z", "--count", "2"];
    for (cron, words, fires) in [
        ("0 2 * * 7L", "on the last Sunday of the month", ["2026-12-27T02:00:00Z", "2027-01-31T02:00:00Z"]),
        (
            "0 2 * * 1,7L",
            "on Monday and the last Sunday of the month",
            ["2026-11-30T02:00:00Z", "2026-12-07T02:00:00Z"],
        ),
        (
            "0 3 */2 * 1",
            "on the days 1, 3 and so on to 31 of the month, if that is Monday",
            ["2026-12-07T03:00:00Z", "2026-12-21T03:00:00Z"],
        ),
    ] {
        let next = marcoctl(&fleet, &[&["schedules", "next", "--cron", cron], &from[..]].concat()).await?;
        assert!(next.stderr.contains(words) && next.stderr.contains("time zones: 20"), "{cron}: {next:?}");
        let utc: Vec<&str> = next.stdout.lines().filter_map(|line| line.split(' ').nth(1)).collect();
        assert_eq!(utc, fires, "{cron}: {next:?}");
    }
    // Zones whose rules changed lately: each must come from the newer of the two copies of the time zone database.
    for zone in [["America/Vancouver", "10"], ["America/Edmonton", "09"], ["Africa/Casablanca", "03"]] {
        let [name, hour] = zone;
        let asked = ["schedules", "next", "--cron", "0 3 1 12 *", "--zone", name, "--from", "2026-11-29T12:00:00Z"];
        let next = marcoctl(&fleet, &asked).await?.success()?;
        assert!(next.contains(&format!(" 2026-12-01T{hour}:00:00Z")), "{name}: {next}");
    }
    for never in ["0 0 30 2 *", "0 22 30 2 *", "0 0 31 4,6 *"] {
        let refused = marcoctl(&fleet, &["schedules", "next", "--cron", never]).await?;
        assert_eq!((refused.status.code(), refused.stdout.as_str()), (Some(1), ""), "{never}: {refused:?}");
        assert!(refused.stderr.contains("never fires"), "{never}: {refused:?}");
        let window = ["operations", "reboot", "--all", "--window-cron", never, "--window-duration", "1h"];
        let refused = marcoctl(&fleet, &window).await?;
        assert!(!refused.status.success() && refused.stderr.contains("never fires"), "{never}: {refused:?}");
    }
    fleet.went_well();
    Ok(())
}
