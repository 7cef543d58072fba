//! One order of locks: concurrent work on the same rows waits and never deadlocks.

use futures_util::future::join_all;
use integration_tests::postgres::Postgres;
use marco_controller::operation::{ExecutionState, OperationState};
use marco_controller::store::{AuditQuery, AuditRow, ProgressRow, Record, SteerOutcome, StoreError, recorded};
use marco_proto::names::NodeId;

use crate::support::*;

/// Nodes of the operation that all tasks use.
const NODES: usize = 2000;
/// Rounds of each task.
const ROUNDS: usize = 12;

fn failed(error: &StoreError) -> String {
    let (mut text, mut source) = (error.to_string(), std::error::Error::source(error));
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Two controllers write the progress of 2,000 nodes in opposite orders, while operators pause, resume and cancel, and
/// nodes report.
pub(crate) async fn progress_cancels_and_resumes_of_one_operation_wait_for_each_other(f: Fixture) {
    let ids: Vec<String> = (0..NODES).map(|number| format!("pi-{number:04}")).collect();
    let mut nodes: Vec<NodeId> = Vec::new();
    // A token of the fixture is good for 1000 nodes.
    for chunk in ids.chunks(1000) {
        nodes.extend(f.enrolled(&chunk.iter().map(String::as_str).collect::<Vec<_>>()).await);
    }
    let mut sessions = Vec::with_capacity(NODES);
    for id in &nodes {
        sessions.push((id.clone(), f.session(id, "boot-1", start()).await));
    }
    let operation = f.create(reboot(), &nodes).await;
    let all = f.claim(&sessions, start()).await;
    assert_eq!(all.len(), NODES);
    let mut progress: Vec<ProgressRow> = all
        .iter()
        .map(|assignment| ProgressRow {
            execution: assignment.execution.clone(),
            attempt: assignment.attempt,
            sequence: 0,
            phase: "downloading".to_owned(),
            bytes_done: 0,
            bytes_total: 1000,
            cancel_refused: false,
        })
        .collect();
    let mut doing = Vec::new();
    for reversed in [false, true] {
        // Opposite orders deadlock unless both tasks lock the operation's row first.
        if reversed {
            progress.reverse();
        }
        let (store, rows) = (f.store.clone(), progress.clone());
        doing.push(tokio::spawn(async move {
            for round in 0..ROUNDS {
                let done = u64::try_from(round).unwrap() + 1;
                let rows: Vec<_> = rows.iter().map(|row| ProgressRow { bytes_done: done, ..row.clone() }).collect();
                store.flush_progress(&rows, after(1)).await.map_err(|error| failed(&error))?;
            }
            Ok::<_, String>(())
        }));
    }
    let (store, id) = (f.store.clone(), operation.clone());
    doing.push(tokio::spawn(async move {
        for _ in 0..ROUNDS {
            store.pause(&id, "pat", "to see", after(2)).await.map_err(|error| failed(&error))?;
            store.resume(&id, "pat", after(2)).await.map_err(|error| failed(&error))?;
        }
        for _ in 0..ROUNDS {
            store.request_cancel(&id, "pat", after(3)).await.map_err(|error| failed(&error))?;
        }
        Ok(())
    }));
    let (store, some) = (f.store.clone(), all.iter().step_by(40).cloned().collect::<Vec<_>>());
    let epochs: Vec<i64> = sessions.iter().step_by(40).map(|(_, epoch)| *epoch).collect();
    doing.push(tokio::spawn(async move {
        for (assignment, epoch) in some.iter().zip(epochs) {
            let said = report(assignment, 1, ExecutionState::Running, "boot-1");
            let node = &assignment.execution.node;
            store.apply_report(node, epoch, &said, after(2)).await.map_err(|error| failed(&error))?;
        }
        Ok(())
    }));
    for done in join_all(doing).await {
        // A deadlock would be retried three times. More of them would show here as an error.
        assert_eq!(done.unwrap(), Ok(()));
    }
    assert_eq!(f.operation_state(&operation).await, OperationState::Cancelling);
}

/// Aborts updates of operations as a deadlock does. A sequence counts the attempts, because a rollback does not reset
/// it.
const CONFLICTS: &str = "CREATE SEQUENCE tries; \
    CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN \
        IF nextval('tries') <= 2 THEN RAISE EXCEPTION 'for another one' USING ERRCODE = '40P01'; END IF; \
        RETURN NEW; END$$; \
    CREATE TRIGGER conflict BEFORE UPDATE ON operations FOR EACH ROW EXECUTE FUNCTION conflict()";
const NOTHING_ELSE: &str = "CREATE OR REPLACE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN \
        PERFORM nextval('tries'); RAISE EXCEPTION 'for another one' USING ERRCODE = '40001'; END$$";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_database_ends_for_another_one_is_done_again_a_few_times() {
    let f = postgres().await;
    let nodes = f.enrolled(&["pi-1"]).await;
    let operation = f.create(reboot(), &nodes).await;
    assert!(f.by_hand(&[CONFLICTS]).await.iter().all(Result::is_ok));
    let tries = || {
        let rows = Postgres::start().unwrap().rows(&f.url, "SELECT last_value AS tries FROM tries").unwrap();
        rows[0]["tries"].as_u64().unwrap()
    };
    let record = Record::new(AuditRow {
        time: start(),
        actor: "pat".to_owned(),
        credential: String::new(),
        from: String::new(),
        method: "PauseOperation".to_owned(),
        target: operation.name(),
        result: "OK".to_owned(),
        message: String::new(),
    });
    let paused = recorded(record, f.store.pause(&operation, "pat", "to see", after(1))).await.unwrap();
    assert!(matches!(paused, SteerOutcome::Changed(_)), "{paused:?}");
    // Two attempts failed; the third one wrote the change with its event and its audit row, each once.
    assert_eq!(tries(), 4);
    let events = f.store.events(&operation, 0, 10).await.unwrap();
    assert_eq!(events.iter().filter(|event| event.to == "PAUSED").count(), 1);
    assert_eq!(f.store.audit(&AuditQuery { limit: 10, ..AuditQuery::default() }).await.unwrap().len(), 1);

    assert!(f.by_hand(&[NOTHING_ELSE]).await.iter().all(Result::is_ok));
    let error = f.store.resume(&operation, "pat", after(2)).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert_eq!(tries(), 8, "it is not tried for ever");
    assert_eq!(f.operation_state(&operation).await, OperationState::Paused);
}
