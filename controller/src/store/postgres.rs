//! Connecting to Postgres, directly or through a pooler.
//!
//! A controller that froze, or whose host is gone, must not hold up the others. The session settings for that are set
//! by `SET` after connecting, because PgBouncer refuses start-up parameters. Behind a pooler in transaction mode no
//! session belongs to a client, so the role must bring the settings, and they are checked.

use std::sync::Arc;

use sea_orm::sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sea_orm::sqlx::{self, Connection as _, Executor as _, PgConnection, Row as _};

use super::connection::Pool;
use super::open::CONNECT_TIMEOUT;
use super::sql::sql;
use super::{StoreError, probe};

/// Connections of one controller. Postgres' default limit for all clients is 100.
const CONNECTIONS: u32 = 16;
/// Parameter of the URL for a pooler in transaction mode, spelled as in other programs.
const POOLER: &str = "pgbouncer=true";

/// A session setting: its name, the value in its own unit, the largest value that a role may have, and the value as
/// operators write it.
struct Setting {
    name: &'static str,
    value: u32,
    most: u32,
    shown: &'static str,
    /// True if it matters only on connections over the network.
    network: bool,
}

/// - A transaction that stands still, because its controller froze or is gone, ends after 3 s and frees its rows.
/// - A lock is waited for well below a beat (5 s), but long enough for a fleet that comes back at once.
/// - A statement ends before the client gives up waiting for its answer.
/// - The server finds out within 10 s that a client's host is gone.
const SETTINGS: [Setting; 7] = [
    Setting { name: "idle_in_transaction_session_timeout", value: 3000, most: 5000, shown: "3s", network: false },
    Setting { name: "lock_timeout", value: 2000, most: 3000, shown: "2s", network: false },
    Setting { name: "statement_timeout", value: 8000, most: 10_000, shown: "8s", network: false },
    Setting { name: "tcp_user_timeout", value: 10_000, most: 30_000, shown: "10s", network: true },
    Setting { name: "tcp_keepalives_idle", value: 5, most: 30, shown: "5", network: true },
    Setting { name: "tcp_keepalives_interval", value: 2, most: 10, shown: "2", network: true },
    Setting { name: "tcp_keepalives_count", value: 3, most: 5, shown: "3", network: true },
];

/// Opens the pool for `url`, after checking how it is reached.
pub(super) async fn open(url: &str) -> Result<Pool, StoreError> {
    let (url, pooler) = without_pooler(url);
    let place: Arc<str> = Arc::from(place(&url));
    let failed = |error: sqlx::Error| StoreError::of_driver(&error, &place);
    let options: PgConnectOptions = url.parse().map_err(failed)?;
    // Without a value, `extra_float_digits` is no start-up parameter, which PgBouncer would refuse.
    let mut options = options.application_name("marco-controller").extra_float_digits(None);
    probe::once(&options).await?;
    if pooler {
        // A cached statement may not exist on the server of its next use.
        options = options.statement_cache_capacity(0);
    } else {
        let found = tokio::time::timeout(CONNECT_TIMEOUT * 2, is_behind_pooler(&options)).await;
        if found.map_err(|_| StoreError::silent(&place, CONNECT_TIMEOUT * 2))?.map_err(failed)? {
            return Err(StoreError::Pooler { place: place.to_string(), why: ASK_FOR_IT.to_owned() });
        }
    }
    let mut pool = PgPoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(CONNECT_TIMEOUT);
    if !pooler {
        let settings: String =
            SETTINGS.iter().map(|setting| format!("SET {} = {};", setting.name, setting.value)).collect();
        let settings: Arc<str> = Arc::from(settings);
        pool = pool.after_connect(move |connection, _| {
            let settings = Arc::clone(&settings);
            Box::pin(async move { connection.execute(sqlx::AssertSqlSafe(settings.to_string())).await.map(|_| ()) })
        });
    }
    let pool = pool.connect_with(options).await.map_err(failed)?;
    let pool = Pool::postgres(pool, pooler, Arc::clone(&place));
    if pooler {
        check_role(&pool).await?;
    }
    Ok(pool)
}

const ASK_FOR_IT: &str = "it is reached through a pooler in transaction mode (PgBouncer's pool_mode = transaction). \
    Add ?pgbouncer=true to the database URL, or connect to Postgres itself or in session mode";

/// The URL without the parameter for a pooler, and true if it asked for one.
fn without_pooler(url: &str) -> (String, bool) {
    let Some((base, query)) = url.split_once('?') else { return (url.to_owned(), false) };
    let rest: Vec<&str> = query.split('&').filter(|pair| *pair != POOLER && *pair != "pgbouncer=false").collect();
    let asked = query.split('&').any(|pair| pair == POOLER);
    (if rest.is_empty() { base.to_owned() } else { format!("{base}?{}", rest.join("&")) }, asked)
}

/// Host, port and database, without user and password.
fn place(url: &str) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    // The last `@`, because a password may contain one.
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    format!("postgres://{}", rest.split('?').next().unwrap_or_default())
}

/// True if two transactions of one connection run on different servers, or two connections on the same one. Uses only
/// the simple protocol, which leaves nothing behind on servers that are not ours.
async fn is_behind_pooler(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let mut first = PgConnection::connect_with(options).await?;
    let before = server(&mut first).await?;
    let mut second = PgConnection::connect_with(options).await?;
    // Its open transaction keeps a server, so a pooler has to give the first connection another one.
    second.execute("BEGIN").await?;
    let other = server(&mut second).await?;
    let after = server(&mut first).await?;
    second.execute("ROLLBACK").await?;
    // Nothing is lost if the connections are not closed properly.
    let _ = tokio::join!(first.close(), second.close());
    Ok(before == other || before != after)
}

async fn server(connection: &mut PgConnection) -> Result<i32, sqlx::Error> {
    connection.fetch_one(sqlx::raw_sql("SELECT pg_backend_pid()")).await?.try_get(0)
}

/// Checks that the role's settings are at least as strict as ours.
async fn check_role(pool: &Pool) -> Result<(), StoreError> {
    let rows = sql("SELECT name, CAST(setting AS BIGINT) AS setting, current_user AS role, \
                        inet_server_addr() IS NOT NULL AS network \
                    FROM pg_settings WHERE name IN {each}")
    .each(SETTINGS.iter().map(|setting| setting.name))
    .all(pool)
    .await?;
    let (mut missing, mut role) = (Vec::new(), String::new());
    for row in &rows {
        let name = row.text("name")?;
        role = row.text("role")?;
        let Some(setting) = SETTINGS.iter().find(|setting| setting.name == name) else { continue };
        let value = row.int("setting")?;
        // 0 means no limit. Over a Unix socket, settings of the network are ignored and always read as 0.
        if (value < 1 || value > i64::from(setting.most)) && (!setting.network || row.flag("network")?) {
            missing.push(setting);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    // An operator copies these statements, so a quote in the name of the role must not break them.
    let role = role.replace('"', "\"\"");
    let statements: String = missing
        .iter()
        .map(|setting| format!("\n  ALTER ROLE \"{role}\" SET {} = '{}';", setting.name, setting.shown))
        .collect();
    let why = format!(
        "behind a pooler the role must bring these settings, without which a controller that dies within a transaction \
         holds up the others. Run them, then let the pooler connect again (PgBouncer: RECONNECT):{statements}"
    );
    Err(StoreError::Pooler { place: pool.place.to_string(), why })
}

#[cfg(test)]
mod tests {
    use super::{place, without_pooler};

    #[test]
    fn the_pooler_is_asked_for_in_the_url_and_not_passed_on() {
        for (url, base, asked) in [
            ("postgres://h/d", "postgres://h/d", false),
            ("postgres://h/d?pgbouncer=true", "postgres://h/d", true),
            ("postgres://h/d?sslmode=require&pgbouncer=true", "postgres://h/d?sslmode=require", true),
            ("postgres://h/d?pgbouncer=false&sslmode=require", "postgres://h/d?sslmode=require", false),
        ] {
            assert_eq!(without_pooler(url), (base.to_owned(), asked), "{url}");
        }
    }

    #[test]
    fn a_place_shows_no_password() {
        assert_eq!(place("postgres://me:p@ss@db:5432/marco?sslmode=require"), "postgres://db:5432/marco");
    }
}
