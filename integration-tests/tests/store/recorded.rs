//! Each change is stored in one transaction with its audit row.

use std::sync::Arc;

use integration_tests::postgres::Postgres;
use integration_tests::proxy::{Direction, Proxy};
use marco_controller::store::{AuditQuery, AuditRow, Record, SessionOutcome, SessionStart, Store, recorded};
use marco_proto::names::NodeId;

use crate::support::*;

fn row(method: &str) -> AuditRow {
    AuditRow {
        time: start(),
        actor: "pat".to_owned(),
        credential: "certificates/0a".to_owned(),
        from: "127.0.0.1:4000".to_owned(),
        method: method.to_owned(),
        target: "operations/x".to_owned(),
        result: "OK".to_owned(),
        message: String::new(),
    }
}

/// Number of cuts, spread evenly over the bytes that a change and its row send.
const STEPS: u64 = 150;

async fn rows(f: &Fixture) -> Vec<AuditRow> {
    let query = AuditQuery { limit: 100, ..AuditQuery::default() };
    f.store.audit(&query).await.unwrap().into_iter().map(|(_, row)| row).collect()
}

pub(crate) async fn a_change_that_cannot_be_recorded_is_not_made(f: Fixture) {
    let nodes = f.enrolled(&["pi-1"]).await;
    // A trigger that refuses the row stands for any failure of the second write. The change must fail with it.
    let (break_it, mend_it): (&[&str], &[&str]) = if f.folder.is_some() {
        (
            &["CREATE TRIGGER refuse BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no rows'); END"],
            &["DROP TRIGGER refuse"],
        )
    } else {
        (
            &[
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'no rows'; END$$",
                "CREATE TRIGGER refuse BEFORE INSERT ON audit FOR EACH ROW EXECUTE FUNCTION refuse()",
            ],
            &["DROP TRIGGER refuse ON audit"],
        )
    };
    assert!(f.by_hand(break_it).await.iter().all(Result::is_ok));
    let record = Record::new(row("CreateOperation"));
    let new = new_operation(reboot(), &nodes);
    recorded(Arc::clone(&record), f.store.create_operation(&new, start())).await.unwrap_err();
    assert!(!record.is_stored());
    assert!(f.store.operation(&new.id).await.unwrap().is_none());
    assert!(f.by_hand(mend_it).await.iter().all(Result::is_ok));

    recorded(Arc::clone(&record), f.store.create_operation(&new, start())).await.unwrap();
    assert!(record.is_stored());
    // A second change of the same call gets no row of its own: the audit has one row for each call.
    recorded(Arc::clone(&record), f.store.pause(&new.id, "pat", "", start())).await.unwrap();
    assert_eq!(rows(&f).await, [row("CreateOperation")]);
}

pub(crate) async fn what_was_not_done_is_not_recorded_as_done(f: Fixture) {
    let record = Record::new(row("UpdateNode"));
    let missing = node("pi-9");
    recorded(Arc::clone(&record), f.store.update_node(&missing, None, None, Some("x"))).await.unwrap();
    recorded(Arc::clone(&record), f.store.quarantine(&missing, "why", start())).await.unwrap();
    assert!(!record.is_stored());
    assert!(rows(&f).await.is_empty());
}

pub(crate) async fn what_the_controller_does_by_itself_is_recorded_with_it(f: Fixture) {
    let id = f.enrolled(&["pi-1"]).await.remove(0);
    let of_itself = || Record::new(AuditRow { method: String::new(), ..row("") });
    let begin = async |record: &Arc<Record>, boot_id: &str, serial: &str, at: i64| {
        let hello = SessionStart { key_sha256: "key-pi-1".to_owned(), ..hello(boot_id, serial, after(at)) };
        recorded(Arc::clone(record), f.store.begin_session(&id, &hello, after(at))).await.unwrap()
    };
    let record = of_itself();
    begin(&record, "boot-1", &serial_of("pi-1"), 1).await;
    assert!(!record.is_stored(), "a node said hello, and nothing was done to it");
    let record = of_itself();
    begin(&record, "boot-2", "another-board", 2).await;
    assert_eq!((record.is_stored(), record.row().method.as_str()), (true, "HOLD"));
    let record = of_itself();
    let cloned = begin(&record, "boot-1", "another-board", 3).await;
    assert!(matches!(cloned, SessionOutcome::Cloned), "{cloned:?}");
    assert_eq!((record.is_stored(), record.row().method.as_str()), (true, "QUARANTINE"));
    let told: Vec<String> = rows(&f).await.into_iter().map(|row| row.method).collect();
    assert_eq!(told, ["QUARANTINE", "HOLD"]);
}

/// Cuts the connection to the database at `STEPS` places within the bytes of a change and its row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_is_cut_leaves_both_or_neither() {
    let url = tokio::task::spawn_blocking(|| Postgres::start().unwrap().database().unwrap()).await.unwrap();
    let direct = Fixture { store: Store::open(&url).await.unwrap(), url: url.clone(), folder: None };
    let nodes: Vec<NodeId> = direct.enrolled(&["pi-1"]).await;
    let host = url.split('@').nth(1).unwrap().split('/').next().unwrap();
    let proxy = Proxy::start(host.parse().unwrap()).await.unwrap();
    let through = url.replace(host, &proxy.address().to_string());
    let store = Store::open(&through).await.unwrap();
    let create = async || {
        let record = Record::new(row("CreateOperation"));
        let new = new_operation(reboot(), &nodes);
        recorded(Arc::clone(&record), store.create_operation(&new, start())).await.map(|_| ())
    };
    // A new connection for each try, so that the number of bytes tells how far the try got.
    proxy.drop_connections();
    let before = proxy.bytes(Direction::Up);
    while create().await.is_err() {}
    let length = proxy.bytes(Direction::Up) - before;
    let mut cut = 0;
    for step in 1..=STEPS {
        proxy.drop_connections();
        proxy.cut_after(Direction::Up, [length * step / STEPS]);
        while proxy.cuts_left(Direction::Up) > 0 {
            cut += usize::from(create().await.is_err());
        }
    }
    assert!(cut > 0, "nothing was cut");
    // Both counts come from one snapshot: the last COMMIT may still be under way, although its caller has given up.
    let server = Postgres::start().unwrap();
    let counts = ["SELECT COUNT(*) AS rows FROM operations", "SELECT COUNT(*) AS rows FROM audit"];
    let [operations, recorded] = server.snapshot(&url, counts).unwrap().map(|rows| rows[0]["rows"].as_u64().unwrap());
    assert_eq!(operations, recorded, "of {cut} cuts one fell between a change and its row");
}
