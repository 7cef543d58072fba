//! Schedules: the outcome of each due time, for any number of schedulers and at any moment.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::future::join_all;
use integration_tests::{seconds, wait_until};
use marco_controller::clock::ManualClock;
use marco_controller::operation::{ExecutionState, OperationState, Target, WaitReason};
use marco_controller::schedule::{FireOutcome, MissedFire, Overlap};
use marco_controller::scheduler::{Fires, Prepare, Unprepared};
use marco_controller::store::{
    FireQuery, FireRow, NewOperation, OperationQuery, OperationRow, Origin, ScheduleRow, Scope, Store, Template,
};
use marco_proto::names::{ExecutionId, NodeId, OperationId, ScheduleId};

use crate::support::*;

const PATIENCE: TimeDelta = TimeDelta::minutes(5);

/// A schedule that fires each minute; its first due time is `start()`.
pub(crate) fn minutely(id: &str) -> ScheduleRow {
    ScheduleRow {
        id: ScheduleId::parse(id).unwrap(),
        cron: "* * * * *".to_owned(),
        time_zone: "Europe/Madrid".to_owned(),
        template: Template { action: reboot(), target: Target::All, rollout: None, window: None },
        missed_fire: MissedFire::Skip,
        overlap: Overlap::Queue,
        jitter: Duration::ZERO,
        expire_after: Duration::from_secs(24 * 3600),
        paused: false,
        pause_reason: String::new(),
        creator: "pat".to_owned(),
        scope: Scope::everything(),
        create_time: after(-30),
        update_time: after(-30),
        revision: 1,
        next_fire: Some(start()),
        last_fire: None,
        failures: 0,
        failure: String::new(),
    }
}

/// Prepares operations for these nodes. Each node starts `apart` seconds after the one before.
pub(crate) fn preparing(nodes: &[NodeId], apart: i64) -> Prepare {
    let nodes = nodes.to_vec();
    Arc::new(move |schedule: ScheduleRow, fire_time, begins| {
        let starts =
            nodes.iter().zip(0..).map(|(node, place)| (node.clone(), begins + TimeDelta::seconds(apart * place)));
        let origin = Origin { schedule: schedule.id, fire_time: Some(fire_time), starts: starts.collect() };
        let expire_time = begins + schedule.expire_after;
        let new = NewOperation {
            origin: Some(origin),
            schedule_time: begins,
            expire_time,
            ..new_operation(reboot(), &nodes)
        };
        Box::pin(async move { Ok(new) })
    })
}

pub(crate) fn scheduler(store: &Store, clock: DateTime<Utc>, prepare: Prepare) -> Fires {
    Fires::new(store.clone(), Arc::new(ManualClock::new(clock)), prepare, PATIENCE)
}

pub(crate) async fn fires_of(store: &Store, id: &ScheduleId) -> Vec<FireRow> {
    let query = FireQuery { limit: 100_000, ..FireQuery::default() };
    let mut rows = store.fires(id, &query).await.unwrap();
    rows.reverse();
    rows
}

pub(crate) async fn outcomes(store: &Store, id: &ScheduleId) -> Vec<(i64, FireOutcome)> {
    let rows = fires_of(store, id).await;
    rows.into_iter().map(|row| ((row.fire_time - start()).num_seconds(), row.outcome)).collect()
}

pub(crate) async fn operations(store: &Store) -> Vec<OperationRow> {
    let mut all = store.operations(&OperationQuery { limit: 100_000, ..OperationQuery::default() }).await.unwrap();
    all.sort_by_key(|row| row.fire_time);
    all
}

pub(crate) async fn a_schedule_is_read_back_as_it_was_stored(f: Fixture) {
    let new = minutely("nightly");
    assert!(f.store.create_schedule(&new).await.unwrap());
    assert!(!f.store.create_schedule(&ScheduleRow { cron: "1 1 * * *".to_owned(), ..new.clone() }).await.unwrap());
    assert_eq!(f.store.schedule(&new.id).await.unwrap(), Some(new.clone()));
    let changed = ScheduleRow { jitter: Duration::from_secs(60), next_fire: None, ..new.clone() };
    assert!(f.store.update_schedule(&changed, after(1)).await.unwrap());
    // A change carries the revision that it read, so the second one is refused.
    assert!(!f.store.update_schedule(&changed, after(2)).await.unwrap(), "it has changed since");
    let paused = f.store.pause_schedule(&new.id, "exam", after(3)).await.unwrap().unwrap();
    assert_eq!((paused.paused, paused.pause_reason.as_str(), paused.update_time), (true, "exam", after(3)));
    assert_eq!((paused.jitter, paused.next_fire), (Duration::from_secs(60), None));
    assert!(!f.store.resume_schedule(&new.id, None, after(4)).await.unwrap().unwrap().paused);
    f.store.create_schedule(&minutely("a-first")).await.unwrap();
    let ids: Vec<String> =
        f.store.schedules(None, 10).await.unwrap().into_iter().map(|row| row.id.to_string()).collect();
    assert_eq!(ids, ["a-first", "nightly"]);
    assert!(f.store.delete_schedule(&new.id).await.unwrap());
    assert!(!f.store.delete_schedule(&new.id).await.unwrap());
    assert!(f.store.resume_schedule(&new.id, None, after(4)).await.unwrap().is_none());
}

pub(crate) async fn each_of_500_instants_fires_once_however_many_schedulers_race(f: Fixture) {
    let nodes = f.enrolled(&["pi-1"]).await;
    let new = minutely("race");
    f.store.create_schedule(&new).await.unwrap();
    let mut stores = vec![f.store.clone()];
    for _ in 1..4 {
        // SQLite has a single controller, so all schedulers share its store.
        stores.push(if f.folder.is_some() { f.store.clone() } else { Store::open(&f.url).await.unwrap() });
    }
    let racers: Vec<Arc<Fires>> =
        stores.iter().map(|store| Arc::new(scheduler(store, start(), preparing(&nodes, 0)))).collect();
    for minute in 0..500 {
        let now = after(60 * minute + 1);
        let rounds = racers.iter().map(|fires| {
            let fires = Arc::clone(fires);
            tokio::spawn(async move { fires.round(now).await.unwrap() })
        });
        // All rounds at once, on the same due time.
        for ended in join_all(rounds).await {
            ended.unwrap();
        }
    }
    let expected: Vec<_> = (0..500).map(|minute| (60 * minute, FireOutcome::Fired)).collect();
    assert_eq!(outcomes(&f.store, &new.id).await, expected);
    let made = operations(&f.store).await;
    assert_eq!(made.len(), 500);
    for (row, minute) in made.iter().zip(0..) {
        assert_eq!((row.schedule.as_ref(), row.fire_time), (Some(&new.id), Some(after(60 * minute))));
    }
    // In both directions: each operation has a fire, and each fire its operation.
    let named: BTreeSet<_> = fires_of(&f.store, &new.id).await.into_iter().filter_map(|row| row.operation).collect();
    assert_eq!(named, made.into_iter().map(|row| row.id).collect());
}

pub(crate) async fn instants_that_are_found_too_late_are_each_a_row(f: Fixture) {
    let nodes = f.enrolled(&["pi-1"]).await;
    let skip = minutely("skip");
    let once = ScheduleRow { missed_fire: MissedFire::Once, ..minutely("once") };
    // Only one late due time: the next one is half an hour later.
    let rare = ScheduleRow { cron: "*/30 * * * *".to_owned(), ..once.clone() };
    let rare = ScheduleRow { id: ScheduleId::parse("rare").unwrap(), ..rare };
    for new in [&skip, &once, &rare] {
        f.store.create_schedule(new).await.unwrap();
    }
    let fires = scheduler(&f.store, start(), preparing(&nodes, 0));
    // The scheduler was down until half a minute before the 45th minute.
    let now = after(44 * 60 + 30);
    fires.round(now).await.unwrap();
    fires.round(now).await.unwrap();
    for id in [&skip.id, &once.id] {
        let found = outcomes(&f.store, id).await;
        let expected =
            (0..45).map(|minute| (60 * minute, if minute < 40 { FireOutcome::Missed } else { FireOutcome::Fired }));
        assert_eq!(found, expected.collect::<Vec<_>>(), "one that is in time is fire enough");
    }
    assert_eq!(fires_of(&f.store, &skip.id).await[0].reason, "found 44m 30s late");
    let rows = fires_of(&f.store, &rare.id).await;
    assert_eq!(rows.iter().map(|row| row.outcome).collect::<Vec<_>>(), [FireOutcome::Missed, FireOutcome::Fired]);
    assert_eq!(rows[1].reason, "made up for: found 14m 30s late");
    let made_up = f.store.operation(rows[1].operation.as_ref().unwrap()).await.unwrap().unwrap();
    assert_eq!((made_up.fire_time, made_up.schedule_time), (Some(after(30 * 60)), now));
    let row = f.store.schedule(&rare.id).await.unwrap().unwrap();
    assert_eq!((row.next_fire, row.last_fire), (Some(after(3600)), Some(after(1800))));
}

pub(crate) async fn a_long_outage_is_summed_up_after_a_thousand_rows(f: Fixture) {
    let new = minutely("long");
    f.store.create_schedule(&new).await.unwrap();
    // Only the latest thousand missed due times get rows. The newest of these counts the others.
    scheduler(&f.store, start(), preparing(&[], 0)).round(after(3000 * 60)).await.unwrap();
    let query = FireQuery { limit: 100_000, outcomes: vec![FireOutcome::Missed], ..FireQuery::default() };
    let missed = f.store.fires(&new.id, &query).await.unwrap();
    assert_eq!(missed.len(), 1000);
    // 3001 due times, of which 6 are in time.
    assert_eq!(missed[0].fire_time, after(2994 * 60));
    assert!(missed[0].reason.ends_with("so were 1995 before it that are not listed"), "{}", missed[0].reason);
    assert_eq!(operations(&f.store).await.len(), 6);
}

pub(crate) async fn an_unfinished_operation_is_not_overtaken(f: Fixture) {
    let nodes = f.enrolled(&["pi-1"]).await;
    let skip = ScheduleRow { overlap: Overlap::Skip, ..minutely("skip") };
    f.store.create_schedule(&skip).await.unwrap();
    let fires = scheduler(&f.store, start(), preparing(&nodes, 0));
    fires.round(after(1)).await.unwrap();
    let first = operations(&f.store).await.remove(0);
    fires.round(after(61)).await.unwrap();
    let rows = fires_of(&f.store, &skip.id).await;
    assert_eq!((rows[1].outcome, rows[1].operation.as_ref()), (FireOutcome::Skipped, None));
    assert_eq!(rows[1].reason, format!("{} of this schedule has not ended", first.id.name()));
    // Once the first operation has ended, the next due time fires again.
    f.store.request_cancel(&first.id, "pat", after(62)).await.unwrap();
    assert_eq!(f.operation_state(&first.id).await, OperationState::Cancelled);
    fires.round(after(121)).await.unwrap();
    assert_eq!(outcomes(&f.store, &skip.id).await[2], (120, FireOutcome::Fired));

    // A queueing schedule creates its operation at once. The node runs it after the first.
    let queue = minutely("queue");
    f.store.create_schedule(&queue).await.unwrap();
    fires.round(after(121)).await.unwrap();
    let fired = [(0, FireOutcome::Fired), (60, FireOutcome::Fired), (120, FireOutcome::Fired)];
    assert_eq!(outcomes(&f.store, &queue.id).await, fired);
}

pub(crate) async fn what_queues_is_done_one_after_another_in_the_order_of_its_instants(f: Fixture) {
    let nodes = f.enrolled(&["pi-1"]).await;
    let queue = minutely("queue");
    f.store.create_schedule(&queue).await.unwrap();
    scheduler(&f.store, start(), preparing(&nodes, 0)).round(after(121)).await.unwrap();
    let order: Vec<OperationId> =
        fires_of(&f.store, &queue.id).await.into_iter().map(|fire| fire.operation.unwrap()).collect();
    assert_eq!(order.len(), 3);
    // The node was away at all three due times, so the queue is full when it comes.
    let epoch = f.session(&nodes[0], "boot-0", after(122)).await;
    let sessions = [(nodes[0].clone(), epoch)];
    for (place, operation) in order.iter().enumerate() {
        let claimed = f.claim(&sessions, after(122)).await;
        let ids: Vec<&OperationId> = claimed.iter().map(|assignment| &assignment.execution.operation).collect();
        assert_eq!(ids, [operation]);
        // All others wait while one is running.
        assert!(f.claim(&sessions, after(122)).await.is_empty());
        if let Some(next) = order.get(place + 1) {
            let waiting = ExecutionId { operation: next.clone(), node: nodes[0].clone() };
            assert_eq!(f.execution(&waiting).await.wait_reason, Some(WaitReason::NodeBusy));
        }
        let boot_id = format!("boot-{}", place + 1);
        f.report(epoch, &report(&claimed[0], 1, ExecutionState::Rebooting, "boot-0"), after(123)).await;
        f.report(epoch, &report(&claimed[0], 2, ExecutionState::Succeeded, &boot_id), after(124)).await;
        assert_eq!(f.operation_state(operation).await, OperationState::Succeeded);
    }
}

pub(crate) async fn a_change_that_saw_less_than_the_scheduler_decided_is_refused(f: Fixture) {
    let seen = minutely("changed");
    f.store.create_schedule(&seen).await.unwrap();
    let fires = scheduler(&f.store, start(), preparing(&[], 0));
    fires.round(after(1)).await.unwrap();
    let stale = ScheduleRow { jitter: Duration::from_secs(60), ..seen.clone() };
    // Otherwise the change would write the old `next_fire` back, and a due time would fire twice.
    assert!(!f.store.update_schedule(&stale, after(2)).await.unwrap(), "its next instant has been decided about");
    let now = f.store.schedule(&seen.id).await.unwrap().unwrap();
    assert_eq!(now.next_fire, Some(after(60)));
    let fresh = ScheduleRow { jitter: Duration::from_secs(60), ..now };
    assert!(f.store.update_schedule(&fresh, after(3)).await.unwrap());
    fires.round(after(61)).await.unwrap();
    let fired = [(0, FireOutcome::Fired), (60, FireOutcome::Fired)];
    assert_eq!(outcomes(&f.store, &seen.id).await, fired);
}

pub(crate) async fn a_paused_schedule_skips_and_says_so(f: Fixture) {
    let new = minutely("paused");
    f.store.create_schedule(&new).await.unwrap();
    f.store.pause_schedule(&new.id, "exam week", after(-1)).await.unwrap();
    let fires = scheduler(&f.store, start(), preparing(&[], 0));
    fires.round(after(601)).await.unwrap();
    let rows = fires_of(&f.store, &new.id).await;
    // A gap in the rows would mean a defect, so a pause has rows too.
    assert_eq!(rows.len(), 11);
    for row in rows {
        assert_eq!(row.outcome, FireOutcome::Skipped);
        assert!(row.reason.starts_with("the schedule was paused: exam week"), "{}", row.reason);
    }
    f.store.resume_schedule(&new.id, None, after(602)).await.unwrap();
    fires.round(after(661)).await.unwrap();
    assert_eq!(outcomes(&f.store, &new.id).await[11], (660, FireOutcome::Fired));
    assert_eq!(operations(&f.store).await.len(), 1);
}

pub(crate) async fn a_template_that_cannot_be_carried_out_is_a_skip_with_the_reason(f: Fixture) {
    let new = minutely("odd");
    f.store.create_schedule(&new).await.unwrap();
    let refuse: Prepare =
        Arc::new(|_, _, _| Box::pin(async { Err(Unprepared::Refused("the target matches no node".to_owned())) }));
    scheduler(&f.store, start(), refuse).round(after(1)).await.unwrap();
    let gone: Prepare = Arc::new(|schedule, fire_time, _| {
        let origin =
            Origin { schedule: schedule.id, fire_time: Some(fire_time), starts: std::collections::BTreeMap::new() };
        let new = NewOperation { origin: Some(origin), ..new_operation(update(Some("removed")), &[]) };
        Box::pin(async move { Ok(new) })
    });
    scheduler(&f.store, start(), gone).round(after(61)).await.unwrap();
    let rows = fires_of(&f.store, &new.id).await;
    assert_eq!(rows.iter().map(|row| row.outcome).collect::<Vec<_>>(), [FireOutcome::Skipped; 2]);
    assert_eq!(rows[0].reason, "the target matches no node");
    assert!(rows[1].reason.contains("deleted"), "{}", rows[1].reason);
    assert!(operations(&f.store).await.is_empty());
}

pub(crate) async fn a_node_begins_after_its_own_share_of_the_jitter(f: Fixture) {
    let nodes = f.enrolled(&["pi-1", "pi-2"]).await;
    let mut sessions = Vec::new();
    for id in &nodes {
        sessions.push((id.clone(), f.session(id, "boot-1", start()).await));
    }
    let new = ScheduleRow { cron: "0 0 1 1 *".to_owned(), ..minutely("spread") };
    f.store.create_schedule(&new).await.unwrap();
    scheduler(&f.store, start(), preparing(&nodes, 100)).round(after(1)).await.unwrap();
    let operation = operations(&f.store).await.remove(0).id;
    let second = ExecutionId { operation, node: node("pi-2") };
    let row = f.execution(&second).await;
    assert_eq!((row.wait_reason, row.not_before), (Some(WaitReason::NotDue), Some(after(100))));
    let assigned = f.claim(&sessions, after(2)).await;
    assert_eq!(assigned.iter().map(|given| given.execution.node.as_str()).collect::<Vec<_>>(), ["pi-1"]);
    assert_eq!(f.store.release_due(after(99)).await.unwrap(), 0);
    assert!(f.claim(&sessions, after(99)).await.is_empty());
    assert_eq!(f.store.release_due(after(100)).await.unwrap(), 1);
    assert_eq!(f.execution(&second).await.wait_reason, Some(WaitReason::Due));
    let assigned = f.claim(&sessions, after(100)).await;
    assert_eq!(assigned.into_iter().map(|given| given.execution).collect::<Vec<_>>(), [second]);
}

/// Four controllers on one Postgres, in real time. One clock is an hour ahead and one an hour behind. Two controllers
/// are killed while they work.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn kills_and_wrong_clocks_neither_lose_nor_double_a_fire() {
    const SCHEDULES: i64 = 60;
    let f = postgres().await;
    let nodes = f.enrolled(&["pi-1"]).await;
    let began = f.store.database_time().await.unwrap().unwrap();
    let first = DateTime::from_timestamp(began.timestamp() + 1, 0).unwrap();
    for number in 0..SCHEDULES {
        let cron = "* * * * * *".to_owned();
        let new = ScheduleRow { cron, next_fire: Some(first), ..minutely(&format!("s-{number}")) };
        f.store.create_schedule(&new).await.unwrap();
    }
    let stop = tokio_util::sync::CancellationToken::new();
    let mut controllers = Vec::new();
    for wrong_by in [0, 3600, -3600, 0] {
        let store = Store::open(&f.url).await.unwrap();
        let fires = scheduler(&store, began + TimeDelta::seconds(wrong_by), preparing(&nodes, 0));
        let stop = stop.clone();
        controllers.push(tokio::spawn(async move {
            while !stop.is_cancelled() {
                // On Postgres this is the database's clock, which is why the wrong clocks do no harm.
                let now = fires.now().await.unwrap();
                fires.round(now).await.unwrap();
                tokio::task::yield_now().await;
            }
        }));
    }
    let reached = async |second: i64| {
        let until = first + TimeDelta::seconds(second);
        let ahead = || async {
            let row = f.store.schedules_due(until, 1).await?.pop();
            Ok(row.is_none_or(|row| row.next_fire > Some(until)).then_some(()))
        };
        wait_until(seconds(120), "the schedules go on", ahead).await.unwrap();
    };
    reached(2).await;
    // Aborted in the middle of a round, like a process that is killed.
    controllers[0].abort();
    reached(4).await;
    controllers[3].abort();
    reached(9).await;
    stop.cancel();
    for controller in controllers.drain(..).skip(1).take(2) {
        controller.await.unwrap();
    }
    let mut fired = 0;
    for number in 0..SCHEDULES {
        let rows = fires_of(&f.store, &ScheduleId::parse(&format!("s-{number}")).unwrap()).await;
        assert!(rows.len() >= 10);
        for (row, second) in rows.iter().zip(0..) {
            assert_eq!(row.fire_time, first + TimeDelta::seconds(second), "an instant is lost or doubled");
            assert_eq!(row.outcome, FireOutcome::Fired);
            let late = row.record_time - row.fire_time;
            assert!(late >= TimeDelta::zero() && late < PATIENCE, "it was found {late} late");
        }
        fired += rows.len();
    }
    let made = operations(&f.store).await;
    assert!(fired >= 500);
    assert_eq!(made.len(), fired);
    let instants: BTreeSet<_> = made.iter().map(|row| (row.schedule.clone(), row.fire_time)).collect();
    assert_eq!(instants.len(), fired);
}
