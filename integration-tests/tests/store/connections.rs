//! Connections that fail in the middle of a transaction, and connection poolers.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use integration_tests::postgres::{Postgres, pgbouncers};
use integration_tests::proxy::{Direction, Proxy};
use integration_tests::{not_tested, seconds, wait_until};
use marco_controller::store::{Store, StoreError, deadline};

use crate::support::*;
use crate::trap::{Snap, Trap};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_answer_was_lost_is_stored_and_costs_nothing_else() {
    let f = postgres().await;
    let trap = Trap::lay(&f.url, "COMMIT", Snap::Cut).await;
    let through = Store::open(&trap.url(&f.url)).await.unwrap();
    let cut = Fixture { store: through, url: f.url.clone(), folder: None };
    trap.set(3);
    let mut uncertain = Vec::new();
    // The answer to COMMIT is lost, so the caller cannot know that the row is stored.
    while trap.left() > 0 {
        let new = token(&format!("cut-{}", trap.left()));
        let error = cut.store.create_token(&new, start()).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        uncertain.push(new);
    }
    // Later writes are visible to everyone once they are acknowledged.
    for number in 0..20 {
        let new = token(&format!("after-{number}"));
        cut.store.create_token(&new, start()).await.unwrap();
        uncertain.push(new);
    }
    let stored = f.store.tokens(None, 100).await.unwrap();
    for new in uncertain {
        assert!(stored.iter().any(|row| row.id == new.id), "{} is lost", new.id.name());
    }
    assert!(cut.store.ailment().is_none(), "writes succeed again");
    let open =
        "SELECT pid FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND datname = current_database()";
    let url = f.url.clone();
    let left = tokio::task::spawn_blocking(move || Postgres::start().unwrap().rows(&url, open).unwrap()).await.unwrap();
    assert!(left.is_empty(), "transactions were left open: {left:?}");
}

/// The servers of the store's connections.
async fn servers(f: &Fixture) -> Vec<serde_json::Value> {
    let query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'marco-controller' \
                 AND datname = current_database() ORDER BY pid";
    let url = f.url.clone();
    tokio::task::spawn_blocking(move || Postgres::start().unwrap().rows(&url, query).unwrap()).await.unwrap()
}

/// Twenty writes, of which each is there when it is acknowledged.
async fn writes_last(f: &Fixture) {
    for number in 0..20 {
        let new = token(&format!("after-{number}"));
        f.store.create_token(&new, start()).await.unwrap();
        let stored = f.store.tokens(None, 100).await.unwrap();
        assert!(stored.iter().any(|row| row.id == new.id), "{number} is lost");
    }
    assert_eq!(f.store.ailment(), None);
    assert_eq!(locked(f).await, 0, "transactions were left open");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connection_whose_commit_was_refused_is_not_used_again() {
    let f = postgres().await;
    // Postgres checks this at COMMIT, as it does with serialization failures. The connection stays open.
    let refuse = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused'; END $$; \
                  CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON tokens DEFERRABLE INITIALLY DEFERRED FOR EACH ROW \
                  WHEN (NEW.id = 'refused') EXECUTE FUNCTION refuse()";
    f.by_hand(&[refuse]).await.remove(0).unwrap();
    f.store.create_token(&token("before"), start()).await.unwrap();
    let before = servers(&f).await;
    for _ in 0..3 {
        let error = f.store.create_token(&token("refused"), start()).await.unwrap_err();
        assert!(format!("{error:?}").contains("refused"), "{error:?}");
    }
    wait_until(seconds(10), "the connection is replaced", async || {
        let now = servers(&f).await;
        Ok(before.iter().any(|server| !now.contains(server)).then_some(()))
    })
    .await
    .unwrap();
    writes_last(&f).await;
    assert!(f.store.tokens(None, 100).await.unwrap().iter().all(|row| row.id != token("refused").id));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connection_whose_rollback_was_not_answered_is_not_used_again() {
    let f = postgres().await;
    let trap = Trap::lay(&f.url, "ROLLBACK", Snap::Mute).await;
    let store = Store::open(&trap.url(&f.url)).await.unwrap();
    let muted = Fixture { store, url: f.url.clone(), folder: None };
    let (id, epoch, assignment) = muted.assigned(reboot()).await;
    let stale = report(&assignment, 1, marco_controller::operation::ExecutionState::Running, "boot-1");
    // As many as may write at a time: each drops its transaction, and is answered before that is rolled back.
    trap.set(12);
    for _ in 0..12 {
        let outcome = muted.store.apply_report(&id, epoch + 1, &stale, start()).await.unwrap();
        assert!(matches!(outcome, marco_controller::store::ReportOutcome::NotHolder), "{outcome:?}");
    }
    // Each gave its permit back, though no answer came.
    let begun = Instant::now();
    writes_last(&muted).await;
    assert!(begun.elapsed() < seconds(8), "writers waited {:?}", begun.elapsed());
    assert_eq!(trap.left(), 0);
    // The same for one that the caller waits for.
    trap.set(1);
    let gone = node("pi-9");
    let error = deadline::of_caller(muted.store.quarantine(&gone, "", start())).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
    assert_eq!(muted.store.quarantine(&gone, "", start()).await.unwrap(), None);
}

/// The settings of each session: the name, the value as a role gets it, and the value as the server shows it.
const SESSION: [(&str, &str, &str); 7] = [
    ("idle_in_transaction_session_timeout", "3s", "3s"),
    ("lock_timeout", "2s", "2s"),
    ("statement_timeout", "8s", "8s"),
    ("tcp_user_timeout", "10s", "10000"),
    ("tcp_keepalives_idle", "5", "5"),
    ("tcp_keepalives_interval", "2", "2"),
    ("tcp_keepalives_count", "3", "3"),
];

/// Lets each new token note the settings of the session that stores it.
async fn note_settings(f: &Fixture) {
    let notes: String = SESSION
        .iter()
        .map(|(name, ..)| format!("INSERT INTO noted VALUES ('{name}', current_setting('{name}'));"))
        .collect();
    let all = format!(
        "CREATE TABLE noted (name text, value text); \
         CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {notes} RETURN NEW; END $$; \
         CREATE TRIGGER note AFTER INSERT ON tokens FOR EACH ROW EXECUTE FUNCTION note()"
    );
    f.by_hand(&[&all]).await.remove(0).unwrap();
}

/// The settings that were noted, which must all be the ones that hold up nobody.
fn check_settings(server: &Postgres, url: &str) {
    let rows = server.rows(url, "SELECT DISTINCT name, value FROM noted").unwrap();
    let found: BTreeMap<_, _> =
        rows.iter().map(|row| (row["name"].as_str().unwrap(), row["value"].as_str().unwrap())).collect();
    assert_eq!((rows.len(), found), (SESSION.len(), BTreeMap::from(SESSION.map(|(name, _, shown)| (name, shown)))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_session_has_the_settings_by_which_the_server_ends_it() {
    let f = postgres().await;
    note_settings(&f).await;
    // On several connections.
    let new: Vec<_> = (0..12).map(|number| token(&format!("t-{number}"))).collect();
    for made in join_all(new.iter().map(|new| f.store.create_token(new, start()))).await {
        made.unwrap();
    }
    tokio::task::spawn_blocking(move || check_settings(Postgres::start().unwrap(), &f.url)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_froze_within_a_transaction_holds_nobody_up() {
    let f = postgres().await;
    let trap = Trap::lay(&f.url, "FOR UPDATE SKIP LOCKED", Snap::Freeze).await;
    let frozen = Store::open(&trap.url(&f.url)).await.unwrap();
    let nodes = f.enrolled(&["pi-1", "pi-2"]).await;
    let mut sessions = Vec::new();
    for id in &nodes {
        sessions.push((id.clone(), f.session(id, "boot-1", start()).await));
    }
    f.create(reboot(), &nodes[..1]).await;
    trap.set(1);
    let claiming = {
        let (store, sessions) = (frozen.clone(), sessions.clone());
        tokio::spawn(async move { store.claim("c1", &sessions, start()).await })
    };
    wait_until(seconds(10), "it froze", async || Ok((trap.left() == 0).then_some(()))).await.unwrap();
    // The frozen transaction now holds the first node's row.
    tokio::time::timeout(seconds(10), async { while locked(&f).await == 0 {} }).await.unwrap();
    let second = f.create(reboot(), &nodes[1..]).await;
    let begun = Instant::now();
    let claimed = f.store.claim("c1", &sessions, start()).await.unwrap();
    assert!(begun.elapsed() < seconds(3), "a round stood still for {:?}", begun.elapsed());
    assert!(claimed.iter().any(|one| one.execution.operation == second), "the other node has work at once");
    // Postgres ends the frozen transaction by its timeout, and the first node gets its work soon after.
    wait_until(seconds(8), "the first node has work", async || {
        let now = f.store.claim("c1", &sessions, start()).await?;
        let had = claimed.iter().chain(&now).any(|one| one.execution.node == nodes[0]);
        Ok(had.then_some(()))
    })
    .await
    .unwrap();
    let lost = claiming.await.unwrap();
    assert!(matches!(lost, Err(StoreError::Unavailable(_))), "{lost:?}");
}

/// Number of database sessions inside a transaction.
async fn locked(f: &Fixture) -> usize {
    let url = f.url.clone();
    let query = "SELECT pid FROM pg_stat_activity WHERE state = 'idle in transaction' AND datname = current_database()";
    tokio::task::spawn_blocking(move || Postgres::start().unwrap().rows(&url, query).unwrap().len()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_are_answered_though_no_statement_is() {
    let f = postgres().await;
    let target = f.url.split('@').nth(1).unwrap().split('/').next().unwrap().parse().unwrap();
    let proxy = Proxy::start(target).await.unwrap();
    let url = f.url.replace(&target.to_string(), &proxy.address().to_string());
    let store = Store::open(&url).await.unwrap();
    // Connections that are already open, with statements under way.
    let all = BTreeMap::new();
    join_all((0..8).map(|_| store.approved_nodes(&all))).await;
    proxy.hold(Direction::Down);
    let begun = Instant::now();
    let reads =
        (0..20).map(|_| deadline::of_caller(async { store.approved_nodes(&BTreeMap::new()).await.map(|_| ()) }));
    let new: Vec<_> = (0..20).map(|number| token(&format!("held-{number}"))).collect();
    let writes =
        new.iter().map(|new| deadline::of_caller(async { store.create_token(new, start()).await.map(|_| ()) }));
    let (reads, writes) = tokio::join!(join_all(reads), join_all(writes));
    for answer in reads.into_iter().chain(writes) {
        assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
    }
    // Each caller's budget is 1.7 s. Forty callers at once keep this machine busy longer.
    assert!(begun.elapsed() < Duration::from_secs(4), "callers waited {:?}", begun.elapsed());
    assert!(store.ailment().is_some());
    // Some answers were only late. Connections with such answers must not be used again.
    proxy.release(Direction::Down);
    wait_until(seconds(10), "it answers again", async || {
        Ok(store.create_token(&token("again"), start()).await.is_ok().then_some(()))
    })
    .await
    .unwrap();
    join_all((0..20).map(|_| async { store.approved_nodes(&BTreeMap::new()).await.unwrap() })).await;
    assert!(store.ailment().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn caller_is_answered_whose_statement_never_is() {
    let f = postgres().await;
    let target = f.url.split('@').nth(1).unwrap().split('/').next().unwrap().parse().unwrap();
    let proxy = Proxy::start(target).await.unwrap();
    let store = Store::open(&f.url.replace(&target.to_string(), &proxy.address().to_string())).await.unwrap();
    let lock = ["DO $$ BEGIN LOCK TABLE nodes; PERFORM pg_sleep(5); END $$"];
    let asked = async {
        waiting(&f, "granted").await;
        let begun = Instant::now();
        let call = tokio::spawn(deadline::of_caller(async move { store.approved_nodes(&BTreeMap::new()).await }));
        // The connection passed its check, and its statement has reached the server, before the way back is cut.
        waiting(&f, "NOT granted").await;
        proxy.hold(Direction::Down);
        let answer = call.await.unwrap();
        assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
        // The caller's budget is 1.7 s.
        assert!(begun.elapsed() < seconds(4), "the caller waited {:?}", begun.elapsed());
    };
    tokio::join!(f.by_hand(&lock), asked);
}

/// Waits until the table lock on `nodes` is held, or until another session waits for it.
async fn waiting(f: &Fixture, how: &str) {
    let query = format!("SELECT pid FROM pg_locks WHERE relation = 'nodes'::regclass AND {how}");
    wait_until(seconds(10), how, async || {
        let (url, query) = (f.url.clone(), query.clone());
        let rows = tokio::task::spawn_blocking(move || Postgres::start()?.rows(&url, &query)).await??;
        Ok((!rows.is_empty()).then_some(()))
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_in_transaction_mode_works_when_asked_for_and_is_refused_by_name() {
    let mut versions = Vec::new();
    for program in pgbouncers() {
        versions.push(pooler_works(&program).await);
    }
    // From 1.21 on it keeps prepared statements of its own, so one of each kind is wanted.
    let both = [true, false].map(|newer| versions.iter().any(|version| (*version >= (1, 21)) == newer));
    if both != [true; 2] {
        assert!(std::env::var_os("CI").is_none(), "PgBouncer of both kinds: run `make deps`");
        not_tested(&format!("every kind of PgBouncer: there is only {versions:?} (`make deps`)"));
    }
}

/// Tries one PgBouncer, and returns its version.
async fn pooler_works(program: &Path) -> (u32, u32) {
    let server = tokio::task::spawn_blocking(|| Postgres::start_own().unwrap()).await.unwrap();
    let direct = server.database().unwrap();
    let mut pooler = server.pooler_of(program).unwrap();
    let url = pooler.url(&direct);
    let asked = format!("{url}?pgbouncer=true");
    let refused = Store::open(&url).await.unwrap_err();
    assert!(matches!(&refused, StoreError::Pooler { why, .. } if why.contains("PgBouncer")), "{refused:?}");
    let unset = Store::open(&asked).await.unwrap_err().to_string();
    // The refusal prints the statements that an administrator has to run. They must work as they are.
    let statements: Vec<&str> = unset.lines().filter(|line| line.contains("ALTER ROLE")).collect();
    for (name, value, _) in SESSION {
        let line = format!("SET {name} = '{value}';");
        assert!(statements.iter().any(|statement| statement.ends_with(&line)), "{line} is missing: {unset}");
    }
    server.by_hand(&direct, &statements.concat()).unwrap().unwrap();
    // Settings of a role act on new server connections only.
    pooler.restart().unwrap();

    let stores = join_all((0..2).map(|_| Store::open(&asked))).await;
    let stores: Vec<Store> = stores.into_iter().map(Result::unwrap).collect();
    let f = Fixture { store: stores[0].clone(), url: direct.clone(), folder: None };
    let nodes = f.enrolled(&["pi-1", "pi-2", "pi-3", "pi-4"]).await;
    let tasks = (0..40).map(|number| {
        let (store, nodes) = (stores[number % 2].clone(), nodes.clone());
        async move {
            store.create_operation(&new_operation(reboot(), &nodes), start()).await.unwrap();
            store.approved_nodes(&BTreeMap::new()).await.unwrap();
            store.begin_due(start()).await.unwrap();
        }
    });
    join_all(tasks).await;
    // From 1.21 on PgBouncer gives statements names of its own, and prepares them again wherever a client needs one.
    let query = "SELECT name FROM pg_prepared_statements WHERE name NOT LIKE 'PGBOUNCER\\_%'";
    for _ in 0..5 {
        // A named statement would stay on a server connection that the pooler hands to another client.
        assert!(server.rows(&url, query).unwrap().is_empty(), "names stay on servers that others get next");
    }
    // The sessions behind the pooler are ended by the same rules.
    note_settings(&f).await;
    f.store.create_token(&token("noted"), start()).await.unwrap();
    check_settings(&server, &direct);
    // A client without the pooler sees the same data.
    let other = Store::open(&direct).await.unwrap();
    assert_eq!(other.approved_nodes(&BTreeMap::new()).await.unwrap().len(), 4);
    pooler.version().unwrap()
}

#[tokio::test]
async fn a_database_that_others_could_read_is_private_from_the_next_start() {
    let f = sqlite().await;
    f.token("t", 1).await;
    let folder = f.folder.unwrap();
    drop(f.store);
    let path = |name: &str| folder.path().join(name);
    for name in ["marco.db", "marco.db.lock"] {
        std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(0o664)).unwrap();
    }
    let store = Store::open(&f.url).await.unwrap();
    store.create_token(&token("u"), start()).await.unwrap();
    for name in ["marco.db", "marco.db.lock", "marco.db-wal", "marco.db-shm"] {
        let mode = std::fs::metadata(path(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name}");
    }
}
