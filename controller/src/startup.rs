//! Waits at startup for things that a booting machine may not have yet: the database, and the right time.

use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::clock::{self, Clock, Sample};
use crate::config::Config;
use crate::identity::ca::{Pki, PkiError};
use crate::store::{Store, StoreError};
use crate::{ask_time, chain};

/// Pause between two tries, for the clock and for the database.
const AGAIN: Duration = Duration::from_secs(1);
/// Time between two log messages about the wait for the clock.
const REMIND: Duration = Duration::from_secs(60);
/// Longest wait for a database that answered once and then went away. Longer than its restart or fail-over.
const DATABASE: Duration = Duration::from_secs(60);

/// Opens the database and asks for its time, which is `None` on SQLite. Retries for [`DATABASE`] if the database
/// answered and then went away before everything was opened (a restart, a cut connection).
///
/// # Errors
/// Fails at once if the database does not answer the first connection, or with an error that time does not
/// heal. The first is a wrong address more often than an outage, and the service manager starts the controller again.
/// After [`DATABASE`] fails with the last error.
pub(crate) async fn open_store(url: &str) -> anyhow::Result<(Store, Option<Sample>)> {
    let mut answered: Option<Instant> = None;
    loop {
        let error = match try_store(url).await {
            Ok(opened) => {
                if answered.is_some() {
                    tracing::info!("the database is available, starting");
                }
                return Ok(opened);
            }
            Err(error) => error,
        };
        // A refused first connection is a wrong address or password more often than an outage, unless one succeeded
        // before.
        let may_heal = match error.downcast_ref() {
            Some(StoreError::Unavailable(_)) => true,
            Some(StoreError::Postgres { .. }) => answered.is_some(),
            _ => false,
        };
        if !may_heal || answered.is_some_and(|answered| answered.elapsed() >= DATABASE) {
            return Err(error);
        }
        if answered.is_none() {
            answered = Some(Instant::now());
            let seconds = DATABASE.as_secs();
            tracing::error!(error = chain(&*error), seconds, "waiting for the database: nobody is served before");
        }
        // Dropping this future loses nothing: nothing is open yet.
        tokio::time::sleep(AGAIN).await;
    }
}

async fn try_store(url: &str) -> anyhow::Result<(Store, Option<Sample>)> {
    let store = Store::open(url).await.context("cannot open the database")?;
    let time = ask_time(&store).await?;
    Ok((store, time))
}

/// Opens the certificates, once the clock can be right. A machine without a real-time clock starts its services before
/// it has the time from a time server. Until then the controller signs nothing and serves nobody, and the log says
/// why. Ending instead would be a loop of restarts.
pub(crate) async fn open_pki(config: &Config, clock: &dyn Clock) -> anyhow::Result<Pki> {
    let mut said: Option<Instant> = None;
    loop {
        let wrong = match Pki::open(&config.data_dir, &config.certs, &config.names, clock.now(), clock::built()) {
            Err(PkiError::Clock(wrong)) => wrong,
            Err(error) => return Err(error.into()),
            Ok(pki) => {
                if said.is_some() {
                    tracing::info!("the clock can be right now, starting");
                }
                return Ok(pki);
            }
        };
        if said.is_none_or(|said| said.elapsed() >= REMIND) {
            said = Some(Instant::now());
            tracing::error!(error = %wrong, "waiting for the clock: nobody is served before");
        }
        // Dropping the wait loses nothing.
        tokio::time::sleep(AGAIN).await;
    }
}
