//! Opens what may not be there yet when the machine starts its services: the database and a clock that is right.

use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::clock::{self, Clock, Sample};
use crate::config::Config;
use crate::identity::ca::{Pki, PkiError};
use crate::store::{Store, StoreError};
use crate::{ask_time, chain};

/// Pause between two looks at a clock that is wrong, or at a database that does not answer.
const AGAIN: Duration = Duration::from_secs(1);
/// Time between two log messages about the same wait.
const REMIND: Duration = Duration::from_secs(60);
/// How long a database that answered and went away again is waited for: longer than its restart or fail-over.
const DATABASE: Duration = Duration::from_secs(60);

/// Opens the database and asks it for its time, which is `None` on SQLite. One that answered and went away before everything
/// was opened (a restart, a cut connection) is tried again for [`DATABASE`].
///
/// # Errors
/// A database that does not answer the first connection, and whatever waiting does not change, at once: that is a wrong
/// address more often than an outage, and the service manager tries again. Otherwise the last error.
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
        // Dropping the wait loses nothing.
        tokio::time::sleep(AGAIN).await;
    }
}

async fn try_store(url: &str) -> anyhow::Result<(Store, Option<Sample>)> {
    let store = Store::open(url).await.context("cannot open the database")?;
    let time = ask_time(&store).await?;
    Ok((store, time))
}

/// Opens the certificates. A machine without a real-time clock starts its services before a time server has told it the
/// time: until the clock can be right nothing is signed and nobody is let in, and the log says why. Ending instead would
/// be a loop of restarts.
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
