//! Rows that another transaction holds: callers are answered all the same, and other work goes on.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use integration_tests::postgres::Postgres;
use integration_tests::{seconds, wait_until};
use marco_controller::store::{Assignment, CreateOutcome, NewOperation, RequestKey, Store, StoreError, deadline};
use marco_proto::names::OperationId;

use crate::support::*;
use crate::trap::{Snap, Trap};

/// Number of sessions of this database for which the condition holds.
async fn sessions(f: &Fixture, condition: &str) -> usize {
    let query = format!("SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND {condition}");
    let url = f.url.clone();
    tokio::task::spawn_blocking(move || Postgres::start().unwrap().rows(&url, &query).unwrap().len()).await.unwrap()
}

async fn wait_for(f: &Fixture, condition: &str) {
    wait_until(seconds(10), condition, async || Ok((sessions(f, condition).await > 0).then_some(()))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn callers_are_answered_though_others_hold_the_row_and_every_permit() {
    let f = postgres().await;
    let nodes = f.enrolled(&["pi-1"]).await;
    let operation = f.create(reboot(), &nodes).await;
    let hold = format!("SELECT 1 FROM operations WHERE id = '{operation}' FOR UPDATE; SELECT pg_sleep(60)");
    let _holder = Postgres::start().unwrap().session(&f.url, &hold).unwrap();
    wait_for(&f, "wait_event = 'PgSleep'").await;
    // The database answers meanwhile, so nobody takes it for silent.
    let reader = f.store.clone();
    let reading = tokio::spawn(async move {
        loop {
            reader.ping().await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    // More callers than may write at a time.
    let calls = (0..40).map(|_| async {
        let begun = Instant::now();
        let answer = deadline::of_caller(f.store.pause(&operation, "pat", "", start())).await;
        (answer.unwrap_err(), begun.elapsed())
    });
    let answers = join_all(calls).await;
    let contended = answers.iter().filter(|(error, _)| error.is_contention()).count();
    assert!(contended >= 12, "{contended} reached the row: {answers:?}");
    for (error, took) in &answers {
        assert!(error.is_contention() || format!("{error:?}").contains("busy"), "{error:?}");
        // A caller's budget is 1.7 s. In rows of twelve they took 1.7, 3.4, 5.1 and 6.8 s.
        assert!(*took < seconds(3), "a caller waited {took:?}");
    }
    assert_eq!(f.store.ailment(), None, "a row that others hold is no outage");
    reading.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn controller_that_froze_with_the_row_of_all_nodes_holds_up_no_other_work() {
    let f = postgres().await;
    // The first statement that locks operations in a claim.
    let trap = Trap::lay(&f.url, "SELECT id FROM operations WHERE id IN", Snap::Freeze).await;
    let frozen = Store::open(&trap.url(&f.url)).await.unwrap();
    let nodes = f.enrolled(&["pi-1", "pi-2", "pi-3", "pi-4"]).await;
    let mut live = Vec::new();
    for id in &nodes {
        live.push((id.clone(), f.session(id, "boot-1", start()).await));
    }
    let all = f.create(reboot(), &nodes[..3]).await;
    trap.set(1);
    let claiming = {
        let (store, first) = (frozen.clone(), live[..1].to_vec());
        tokio::spawn(async move { store.claim("c1", &first, start()).await })
    };
    wait_until(seconds(10), "it froze", async || Ok((trap.left() == 0).then_some(()))).await.unwrap();
    wait_for(&f, "state = 'idle in transaction'").await;
    let other = f.create(reboot(), &nodes[3..]).await;
    let begun = Instant::now();
    let claimed = f.store.claim("c1", &live, start()).await.unwrap();
    assert!(begun.elapsed() < seconds(3), "a round stood still for {:?}", begun.elapsed());
    assert!(claimed.iter().any(|one| one.execution.operation == other), "the other work goes on: {claimed:?}");
    // Postgres ends the frozen transaction 3 s after its last statement.
    let of_all = |claimed: &[Assignment]| claimed.iter().filter(|one| one.execution.operation == all).count();
    let had = std::cell::Cell::new(of_all(&claimed));
    wait_until(seconds(8), "all nodes have work", async || {
        had.set(had.get() + of_all(&f.store.claim("c1", &live, start()).await?));
        Ok((had.get() == 3).then_some(()))
    })
    .await
    .unwrap();
    let lost = claiming.await.unwrap();
    assert!(matches!(lost, Err(StoreError::Unavailable(_))), "{lost:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn request_that_froze_with_its_controller_is_answered_by_another_one_within_seconds() {
    let f = postgres().await;
    let trap = Trap::lay(&f.url, "INSERT INTO executions", Snap::Freeze).await;
    let frozen = Store::open(&trap.url(&f.url)).await.unwrap();
    let nodes = f.enrolled(&["pi-1"]).await;
    let request = || NewOperation {
        request: Some(RequestKey { request_id: "r1".to_owned(), body_sha256: "a".to_owned() }),
        ..new_operation(reboot(), &nodes)
    };
    trap.set(1);
    let first = request();
    let creating = tokio::spawn(async move { frozen.create_operation(&first, start()).await });
    wait_until(seconds(10), "it froze", async || Ok((trap.left() == 0).then_some(()))).await.unwrap();
    wait_for(&f, "state = 'idle in transaction'").await;
    // The client asks another controller, with the same request id, until it is answered.
    let begun = Instant::now();
    let made: OperationId = wait_until(seconds(20), "the retry is answered", async || {
        let again = request();
        let asked = Instant::now();
        let answer = deadline::of_caller(f.store.create_operation(&again, start())).await;
        // The caller's budget is 1.7 s.
        assert!(asked.elapsed() < seconds(4), "a caller waited {:?}", asked.elapsed());
        match answer {
            Ok(CreateOutcome::Created(row) | CreateOutcome::Existing(row)) => Ok(Some(row.id)),
            Ok(other) => panic!("{other:?}"),
            Err(error) => {
                assert!(error.is_contention(), "{error:?}");
                Ok(None)
            }
        }
    })
    .await
    .unwrap();
    // Postgres ends the frozen transaction 3 s after its last statement.
    assert!(begun.elapsed() < seconds(6), "it took {:?}", begun.elapsed());
    assert!(matches!(creating.await.unwrap(), Err(StoreError::Unavailable(_))));
    let all = marco_controller::store::OperationQuery { limit: 10, ..Default::default() };
    let stored: Vec<_> = f.store.operations(&all).await.unwrap().into_iter().map(|row| row.id).collect();
    assert_eq!(stored, [made], "one operation");
    assert_eq!(f.store.ailment(), None);
}
