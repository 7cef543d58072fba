//! The database itself.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use integration_tests::postgres::Postgres;
use integration_tests::{seconds, wait_until};
use marco_controller::store::{AuditQuery, AuditRow, Store, StoreError};

use crate::support::*;

pub(crate) async fn a_database_is_opened_again_with_everything_in_it(f: Fixture) {
    let nodes = f.enrolled(&["pi-1"]).await;
    let operation = f.create(reboot(), &nodes).await;
    if f.folder.is_some() {
        let second = Store::open(&f.url).await;
        assert!(matches!(second, Err(StoreError::Locked(_))), "one process holds the file");
    }
    // Releases the lock on SQLite's file.
    drop(f.store);
    let store = Store::open(&f.url).await.unwrap();
    store.ping().await.unwrap();
    assert_eq!(store.operation(&operation).await.unwrap().unwrap().counts.pending, 1);
    assert_eq!(store.database_time().await.unwrap().is_some(), f.folder.is_none());
    // A database in memory would lose everything at the next start.
    for bad in ["mysql://x", "sqlite://", "sqlite://:memory:", "postgres", ""] {
        assert!(matches!(Store::open(bad).await, Err(StoreError::Url(_))), "{bad}");
    }
}

pub(crate) async fn a_call_is_audited(f: Fixture) {
    let row = AuditRow {
        time: start(),
        actor: "pat".to_owned(),
        credential: "certificates/0a".to_owned(),
        from: "127.0.0.1:4000".to_owned(),
        method: "CreateOperation".to_owned(),
        target: "operations/x".to_owned(),
        result: "OK".to_owned(),
        message: String::new(),
    };
    f.store.record_audit(&row).await.unwrap();
    let refused = AuditRow {
        time: after(5),
        actor: "kim".to_owned(),
        result: "PERMISSION_DENIED".to_owned(),
        message: "no".to_owned(),
        ..row.clone()
    };
    f.store.record_audit(&refused).await.unwrap();
    let all = f.store.audit(&AuditQuery { limit: 10, ..AuditQuery::default() }).await.unwrap();
    assert_eq!(all.iter().map(|(_, row)| row.clone()).collect::<Vec<_>>(), [refused.clone(), row.clone()]);
    let older = AuditQuery { limit: 10, before: Some(all[0].0), ..AuditQuery::default() };
    assert_eq!(f.store.audit(&older).await.unwrap(), all[1..]);
    for (query, found) in [
        (AuditQuery { actor: "kim".to_owned(), ..AuditQuery::default() }, 1),
        (AuditQuery { method: "CreateOperation".to_owned(), ..AuditQuery::default() }, 2),
        (AuditQuery { target: "operations/y".to_owned(), ..AuditQuery::default() }, 0),
        (AuditQuery { since: Some(after(5)), ..AuditQuery::default() }, 1),
        (AuditQuery { refused: true, ..AuditQuery::default() }, 1),
    ] {
        let query = AuditQuery { limit: 10, ..query };
        assert_eq!(f.store.audit(&query).await.unwrap().len(), found, "{query:?}");
    }

    // A trigger protects the audit from this program, and from mistakes of an administrator.
    let statements = ["UPDATE audit SET actor = 'nobody'", "DELETE FROM audit"];
    let answers = f.by_hand(&statements).await;
    assert!(answers.iter().all(|answer| answer.as_ref().is_err_and(|why| why.contains("only grows"))), "{answers:?}");
    assert_eq!(f.store.audit(&AuditQuery { limit: 10, ..AuditQuery::default() }).await.unwrap(), all);
}

pub(crate) async fn a_change_is_hinted(f: Fixture) {
    let mut hints = f.store.subscribe_changes();
    // Only hints from now on count.
    hints.mark_unchanged();
    f.token("t", 1).await;
    assert!(hints.has_changed().unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_controllers_bring_up_one_postgres_database() {
    let url = tokio::task::spawn_blocking(|| Postgres::start().unwrap().database().unwrap()).await.unwrap();
    // Four migrations at once: an advisory lock lets one of them work, and the others wait.
    for store in join_all((0..4).map(|_| Store::open(&url))).await {
        store.unwrap().ping().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_of_postgres_is_said_and_survived() {
    let server = tokio::task::spawn_blocking(|| Postgres::start_own().unwrap()).await.unwrap();
    let store = Store::open(&server.database().unwrap()).await.unwrap();
    server.pause().unwrap();
    let begun = Instant::now();
    // Several calls, because the first one may use a connection that was open before.
    for _ in 0..3 {
        let error = store.approved_nodes(&BTreeMap::new()).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "callers are not held up");
    server.resume().unwrap();
    assert!(store.approved_nodes(&BTreeMap::new()).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn error_of_postgres_names_its_cause_once() {
    let (server, url) = tokio::task::spawn_blocking(|| {
        let server = Postgres::start_own().unwrap();
        let url = server.database().unwrap();
        let hba = server.rows(&url, "SELECT current_setting('hba_file') AS place").unwrap().remove(0);
        let hba = hba["place"].as_str().unwrap();
        // The test's server trusts everyone. This role needs its password.
        server.by_hand(&url, "CREATE ROLE kim LOGIN PASSWORD 'right'").unwrap().unwrap();
        let rules = "VALUES ('host all kim all scram-sha-256'), ('host all all all trust')";
        server.by_hand(&url, &format!("COPY ({rules}) TO '{hba}'")).unwrap().unwrap();
        server.by_hand(&url, "SELECT pg_reload_conf()").unwrap().unwrap();
        (server, url)
    })
    .await
    .unwrap();
    let (at, database) = url.rsplit_once('/').unwrap();
    let address = server.address();
    let of_kim = |password: &str| format!("postgres://kim:{password}@{address}/{database}");
    for (url, cause) in [
        (of_kim("s3cret"), "password authentication failed for user \"kim\""),
        (format!("{at}/nowhere"), "database \"nowhere\" does not exist"),
        (format!("postgres://kim:s3cret@no-such-host.invalid/{database}"), "failed to lookup address information"),
    ] {
        // The rules are read by the server in its own time.
        let said = wait_until(seconds(20), cause, async || match Store::open(&url).await {
            Ok(_) => Ok(None),
            Err(error) => Ok(Some(marco_controller::chain(&error)).filter(|said| said.contains(cause))),
        })
        .await
        .unwrap();
        assert_eq!(said.matches(cause).count(), 1, "{url}: {said}");
        assert!(!said.contains("s3cret"), "{said}");
        let place = if url.contains("invalid") { "no-such-host.invalid:5432".to_owned() } else { address.to_string() };
        assert_eq!(said.matches(&place).count(), 1, "{url}: {said}");
    }
}
