//! Due times that fail: each affects only its own schedule, and comes only once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use chrono::{DateTime, TimeDelta};
use integration_tests::seconds;
use marco_controller::calendar::END_OF_TIME;
use marco_controller::schedule::{FireOutcome, MaintenanceWindow, MissedFire, Overlap, operation_uuid};
use marco_controller::scheduler::Prepare;
use marco_controller::store::{NewOperation, OperationQuery, Origin, ScheduleRow};
use marco_proto::names::OperationId;

use crate::schedules::{fires_of, minutely, operations, outcomes, preparing, scheduler};
use crate::support::*;

/// Panics for the schedule with this name, for its first `times` fires.
fn panicking(name: &'static str, times: u32, otherwise: Prepare) -> Prepare {
    let left = Arc::new(AtomicU32::new(times));
    Arc::new(move |schedule: ScheduleRow, fire_time, begins| {
        let panics = schedule.id.as_str() == name
            && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        if panics {
            panic!("`DateTime + TimeDelta` overflowed");
        }
        otherwise(schedule, fire_time, begins)
    })
}

pub(crate) async fn panic_of_one_schedule_pauses_it_and_stops_no_other(f: Fixture) {
    let (bad, good) = (minutely("bad"), minutely("good"));
    for new in [&bad, &good] {
        f.store.create_schedule(new).await.unwrap();
    }
    let fires = scheduler(&f.store, start(), panicking("bad", 3, preparing(&[], 0)));
    for minute in 0..5 {
        fires.round(after(60 * minute + 1)).await.unwrap();
        let row = f.store.schedule(&bad.id).await.unwrap().unwrap();
        assert_eq!(row.paused, minute >= 2, "after {minute} minutes");
        assert_eq!(row.next_fire, Some(after(60 * (minute + 1))), "its instants go on");
    }
    let expected: Vec<_> = (0..5).map(|minute| (60 * minute, FireOutcome::Fired)).collect();
    assert_eq!(outcomes(&f.store, &good.id).await, expected);

    let rows = fires_of(&f.store, &bad.id).await;
    assert!(rows.iter().all(|row| row.outcome == FireOutcome::Skipped && row.operation.is_none()), "{rows:?}");
    assert_eq!(rows[0].reason, "it failed: a defect: `DateTime + TimeDelta` overflowed");
    assert!(rows[4].reason.starts_with("the schedule was paused: it failed 3 times in a row"), "{}", rows[4].reason);
    let row = f.store.schedule(&bad.id).await.unwrap().unwrap();
    assert!(row.pause_reason.ends_with("`DateTime + TimeDelta` overflowed"), "{}", row.pause_reason);

    // The defect is fixed, so the schedule continues.
    let row = f.store.resume_schedule(&bad.id, None, after(290)).await.unwrap().unwrap();
    assert_eq!((row.paused, row.failures, row.failure.as_str(), row.pause_reason.as_str()), (false, 0, "", ""));
    fires.round(after(301)).await.unwrap();
    assert_eq!(outcomes(&f.store, &bad.id).await[5], (300, FireOutcome::Fired));
}

pub(crate) async fn failures_that_do_not_follow_each_other_pause_nothing(f: Fixture) {
    let new = minutely("flaky");
    f.store.create_schedule(&new).await.unwrap();
    for minute in 0..9 {
        // Two fires fail, one succeeds, and so on.
        let times = u32::from(minute % 3 != 2);
        // A new scheduler each time: failures are counted in the store and not in memory.
        let fires = scheduler(&f.store, start(), panicking("flaky", times, preparing(&[], 0)));
        fires.round(after(60 * minute + 1)).await.unwrap();
        let row = f.store.schedule(&new.id).await.unwrap().unwrap();
        assert_eq!((row.paused, i64::from(row.failures)), (false, (minute + 1) % 3));
        assert_eq!(row.failure.is_empty(), minute % 3 == 2, "{}", row.failure);
    }
    let fired = outcomes(&f.store, &new.id).await.iter().filter(|(_, became)| *became == FireOutcome::Fired).count();
    assert_eq!(fired, 3);
}

pub(crate) async fn unreadable_schedule_is_paused_with_the_reason(f: Fixture) {
    // Earlier releases accepted these.
    let month = ScheduleRow { cron: "45 12 * * TUE,THU *".to_owned(), ..minutely("aws") };
    let zone = ScheduleRow { time_zone: "Mars/Olympus".to_owned(), ..minutely("mars") };
    let never = ScheduleRow { cron: "0 0 30 2 *".to_owned(), ..minutely("never") };
    let good = minutely("good");
    for new in [&month, &zone, &never, &good] {
        f.store.create_schedule(new).await.unwrap();
    }
    let fires = scheduler(&f.store, start(), preparing(&[], 0));
    for seconds in [1, 61] {
        fires.round(after(seconds)).await.unwrap();
    }
    for (id, why) in [(&month.id, "TUE is a day of the week"), (&zone.id, "Mars/Olympus")] {
        let row = f.store.schedule(id).await.unwrap().unwrap();
        assert_eq!((row.paused, row.next_fire, row.last_fire), (true, None, Some(start())));
        assert!(row.pause_reason.contains(why) && row.failure.contains("schedules update"), "{row:?}");
        assert_eq!(outcomes(&f.store, id).await, [(0, FireOutcome::Skipped)], "said once");
    }
    // The due time that was promised is kept; there is none after it.
    let over = f.store.schedule(&never.id).await.unwrap().unwrap();
    assert_eq!((over.paused, over.next_fire), (false, None));
    assert_eq!(outcomes(&f.store, &good.id).await, [(0, FireOutcome::Fired), (60, FireOutcome::Fired)]);
    let row = f.store.resume_schedule(&month.id, Some(after(120)), after(100)).await.unwrap().unwrap();
    assert_eq!(row.next_fire, Some(after(120)));
}

pub(crate) async fn row_that_nobody_can_read_holds_up_no_other(f: Fixture) {
    let (newer, good) = (minutely("a-newer"), minutely("good"));
    for new in [&newer, &good] {
        f.store.create_schedule(new).await.unwrap();
    }
    f.by_hand(&["UPDATE schedules SET overlap = 'BEFORE' WHERE id = 'a-newer'"]).await.remove(0).unwrap();
    let fires = scheduler(&f.store, start(), preparing(&[], 0));
    fires.round(after(1)).await.unwrap();
    assert_eq!(outcomes(&f.store, &good.id).await, [(0, FireOutcome::Fired)]);
    // The list leaves the row out, as it cannot show it.
    let listed = f.store.schedules(None, 10).await.unwrap();
    assert_eq!(listed.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["good"]);
    // Another controller can read the row, so it must not have been changed.
    f.by_hand(&["UPDATE schedules SET overlap = 'QUEUE' WHERE id = 'a-newer'"]).await.remove(0).unwrap();
    fires.round(after(2)).await.unwrap();
    assert_eq!(outcomes(&f.store, &newer.id).await, [(0, FireOutcome::Fired)]);
}

pub(crate) async fn day_without_a_controller_ends_in_one_round_for_each_policy(f: Fixture) {
    // More instants than are walked one by one; the clock stands within a second, as clocks do.
    let now = after(101_400) + TimeDelta::milliseconds(250);
    let mut each_second = Vec::new();
    for (id, missed_fire, paused) in
        [("skip", MissedFire::Skip, false), ("once", MissedFire::Once, false), ("paused", MissedFire::Skip, true)]
    {
        let overlap = Overlap::Skip;
        let new = ScheduleRow { cron: "* * * * * *".to_owned(), missed_fire, paused, overlap, ..minutely(id) };
        f.store.create_schedule(&new).await.unwrap();
        each_second.push(new);
    }
    let hourly = ScheduleRow { cron: "0 * * * *".to_owned(), missed_fire: MissedFire::Once, ..minutely("z-hourly") };
    f.store.create_schedule(&hourly).await.unwrap();
    // A node that does nothing: the first operation of a schedule does not end, and the others overlap it.
    let nodes = f.enrolled(&["pi-1"]).await;
    let fires = scheduler(&f.store, start(), preparing(&nodes, 0));
    tokio::time::timeout(seconds(180), fires.round(now)).await.expect("the round does not end").unwrap();
    for new in &each_second {
        let row = f.store.schedule(&new.id).await.unwrap().unwrap();
        assert_eq!(row.next_fire, Some(after(101_401)), "{}", new.id);
        let rows = fires_of(&f.store, &new.id).await;
        let fired = rows.iter().filter(|row| row.outcome == FireOutcome::Fired).count();
        assert_eq!(fired, usize::from(!new.paused), "{}", new.id);
        let told = rows.iter().find(|row| row.reason.contains("that are not listed")).unwrap();
        assert!(told.reason.contains("so were more than 100000 before it"), "{told:?}");
    }
    assert_eq!(
        outcomes(&f.store, &hourly.id).await.last().unwrap().1,
        FireOutcome::Fired,
        "those after them are heard"
    );
}

pub(crate) async fn window_that_never_opens_stops_no_round(f: Fixture) {
    let nodes = f.enrolled(&["pi-1"]).await;
    let window = |cron: &str| {
        let duration = Duration::from_secs(3600);
        Some(MaintenanceWindow { cron: cron.to_owned(), duration, time_zone: String::new() })
    };
    let never = NewOperation { window: window("0 0 30 2 *"), ..new_operation(reboot(), &nodes) };
    let damaged = NewOperation { window: window("0 0 * * *"), ..new_operation(reboot(), &nodes) };
    let good = NewOperation { window: window("0 0 * * *"), ..new_operation(reboot(), &nodes) };
    for new in [&never, &damaged, &good] {
        f.store.create_operation(new, start()).await.unwrap();
    }
    // As earlier releases stored them: the end of chrono's calendar, and an unknown form of window.
    let old_end = DateTime::<chrono::Utc>::MAX_UTC.timestamp_micros();
    let old =
        format!("UPDATE operations SET closed_until = {old_end}, expire_time = {old_end} WHERE id = '{}'", never.id);
    let other =
        format!("UPDATE operations SET maintenance_window = '{{\"moon\":\"full\"}}' WHERE id = '{}'", damaged.id);
    for done in f.by_hand(&[&old, &other]).await {
        done.unwrap();
    }
    let opens = good.window.as_ref().unwrap().closed_until(start()).unwrap();
    let moved: BTreeSet<_> = f.store.move_windows(opens).await.unwrap().into_iter().collect();
    assert_eq!(moved, [damaged.id.clone(), good.id.clone()].into(), "the damaged one stays closed, the good one opens");
    assert!(f.store.move_windows(opens + TimeDelta::seconds(1)).await.unwrap().is_empty());
    let read = f.store.operation(&never.id).await.unwrap().unwrap();
    assert_eq!(read.expire_time, END_OF_TIME, "nothing beyond the year 9999 leaves the store");
}

/// Prepares operations as the API does: the id is derived from the schedule and the due time.
fn deriving() -> Prepare {
    Arc::new(move |schedule: ScheduleRow, fire_time, begins| {
        let id = operation_uuid(schedule.id.as_str(), schedule.create_time, fire_time);
        let origin = Origin { schedule: schedule.id, fire_time: Some(fire_time), starts: Default::default() };
        let new = NewOperation {
            id: OperationId::parse(&id.to_string()).unwrap(),
            origin: Some(origin),
            schedule_time: begins,
            ..new_operation(reboot(), &[])
        };
        Box::pin(async move { Ok(new) })
    })
}

pub(crate) async fn lost_instant_makes_the_same_operation_again(f: Fixture) {
    let new = minutely("nightly");
    f.store.create_schedule(&new).await.unwrap();
    let fires = scheduler(&f.store, start(), deriving());
    fires.round(after(61)).await.unwrap();
    let before = operations(&f.store).await;
    assert_eq!(before.len(), 2);

    // A fail-over lost the last commits: of the second due time everything, of the first only its outcome.
    let second = before[1].id.as_str();
    let lose = [
        "DELETE FROM fires".to_owned(),
        format!("DELETE FROM events WHERE operation = '{second}'"),
        format!("DELETE FROM operations WHERE id = '{second}'"),
        format!("UPDATE schedules SET next_fire = {}, last_fire = NULL", start().timestamp_micros()),
    ];
    for done in f.by_hand(&lose.iter().map(String::as_str).collect::<Vec<_>>()).await {
        done.unwrap();
    }
    fires.round(after(62)).await.unwrap();
    let again = operations(&f.store).await;
    let ids =
        |rows: &[marco_controller::store::OperationRow]| rows.iter().map(|row| row.id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&again), ids(&before), "the nodes know the ids");
    let named: Vec<_> = fires_of(&f.store, &new.id).await.into_iter().filter_map(|row| row.operation).collect();
    assert_eq!(named, ids(&before));

    // A new schedule of the same name gives other ids.
    f.store.delete_schedule(&new.id).await.unwrap();
    f.store.create_schedule(&ScheduleRow { create_time: after(-29), ..new.clone() }).await.unwrap();
    fires.round(after(63)).await.unwrap();
    assert_eq!(operations(&f.store).await.len(), 4);
}

pub(crate) async fn coming_instants_follow_new_rules(f: Fixture) {
    // Stored under other time zone rules, or when the expression was read differently.
    let moved = ScheduleRow { cron: "0 3 * * *".to_owned(), next_fire: Some(after(7000)), ..minutely("moved") };
    let same = ScheduleRow { next_fire: Some(after(60)), ..minutely("same") };
    let due = ScheduleRow { cron: "0 3 * * *".to_owned(), next_fire: Some(start()), ..minutely("due") };
    let unreadable =
        ScheduleRow { cron: "0 3 * JULY *".to_owned(), next_fire: Some(after(7000)), ..minutely("unreadable") };
    for new in [&moved, &same, &due, &unreadable] {
        f.store.create_schedule(new).await.unwrap();
    }
    // On Postgres the database's clock counts, and it is earlier than all these times.
    let fires = scheduler(&f.store, start(), preparing(&[], 0));
    fires.aim().await.unwrap();
    let now = fires.now().await.unwrap();
    let expected = marco_controller::schedule::Recurrence::parse("0 3 * * *", "Europe/Madrid").unwrap().next_after(now);
    let next = async |row: &ScheduleRow| f.store.schedule(&row.id).await.unwrap().unwrap().next_fire;
    assert_eq!(next(&moved).await, expected);
    assert_eq!(next(&unreadable).await, unreadable.next_fire, "it says so when its instant comes");
    if now == start() {
        assert_eq!((next(&same).await, next(&due).await), (same.next_fire, due.next_fire));
        let row = f.store.schedule(&same.id).await.unwrap().unwrap();
        assert_eq!(row.revision, 1, "what is right is not touched");
    }
}

pub(crate) async fn operations_are_listed_by_when_they_were_made(f: Fixture) {
    let mut made = Vec::new();
    for number in 0..7_i64 {
        // Ids in the opposite order, as those of late due times may be.
        let id = operation_uuid("nightly", start(), after(-number));
        let new = NewOperation { id: OperationId::parse(&id.to_string()).unwrap(), ..new_operation(reboot(), &[]) };
        f.store.create_operation(&new, after(number)).await.unwrap();
        made.push(new.id);
    }
    made.reverse();
    assert!(made.is_sorted());
    let mut listed = Vec::new();
    let mut last = None;
    loop {
        let query = OperationQuery { after: last.clone(), limit: 3, ..OperationQuery::default() };
        let page = f.store.operations(&query).await.unwrap();
        let Some(end) = page.last() else { break };
        last = Some(end.id.clone());
        listed.extend(page.into_iter().map(|row| row.id));
    }
    assert_eq!(listed, made, "newest first");
}
