//! The server of Marco Bootstrap: stores what operators ask for, and pushes it to the nodes.
//!
//! [`Controller::bind`] opens the store, the certificates and the listeners; [`Controller::run`] serves until it is
//! told to stop, and then drains: streams are told good-bye, calls under way are answered, under a deadline.

#[cfg(test)]
mod account;
#[cfg(test)]
mod anchor;
pub mod api;
pub mod artifacts;
pub mod calendar;
pub mod clock;
pub mod config;
pub mod discovery;
pub mod dispatcher;
mod folders;
pub mod identity;
mod listen;
pub mod mirror;
pub mod operation;
pub mod rollout;
pub mod schedule;
pub mod scheduler;
pub mod sessions;
mod startup;
pub mod store;
pub mod watchdog;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use chrono::{DateTime, TimeDelta, Utc};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::artifacts::Artifacts;
use crate::clock::{AnchoredClock, Clock, ClockWatch, Sample};
use crate::config::Config;
use crate::discovery::Announced;
use crate::dispatcher::Dispatcher;
use crate::folders::{keep_private, make_private};
use crate::identity::access::Access;
use crate::identity::ca::Pki;
use crate::identity::calls::CallsLayer;
use crate::identity::expiry::Warnings;
use crate::identity::gate::GateLayer;
use crate::identity::tls::places::{Limits, STRANGER_MESSAGE, mirror_places};
use crate::identity::tls::streams::StreamsLayer;
use crate::identity::tls::{Acceptor, enrolment_builder, incoming, server_builder};
use crate::identity::upkeep::Upkeep;
use crate::listen::{listen, listen_if_free};
use crate::mirror::{Mirror, Patience};
use crate::scheduler::{Fires, Prepare, Recurring, Unprepared};
use crate::sessions::{End, Sessions};
use crate::store::{Store, StoreError};
use crate::watchdog::{Pulses, Watchdog};

/// Time for streams to end after they were told to, and for calls that change something. systemd's unit allows a little
/// more.
const DRAIN: Duration = Duration::from_secs(10);
/// Time for connections to close after their streams ended.
const CLOSE: Duration = Duration::from_secs(5);
/// Interval at which the clock is set by the database's. Clocks drift by milliseconds in this time.
const ANCHOR: Duration = Duration::from_secs(5);
/// Questions in a row for that; the fastest answer counts.
const SAMPLES: usize = 3;
/// Uploads without new bytes for this long are removed.
const STALE_UPLOAD: Duration = Duration::from_secs(3 * 24 * 3600);
/// A stored file that no artifact names is removed after this time. A push names it within moments.
const ORPHAN_GRACE: Duration = Duration::from_secs(3600);
/// Cron of housekeeping: every ten minutes.
const HOUSEKEEPING: &str = "0 */10 * * * *";

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        // Many libraries repeat their source in their own text.
        let said = cause.to_string();
        if !text.ends_with(&said) {
            let _ = write!(text, ": {said}");
        }
        source = cause.source();
    }
    text
}

/// A controller with open listeners.
pub struct Controller {
    context: api::Context,
    clock: Arc<dyn Clock>,
    config: Config,
    api: TcpListener,
    enrolment: TcpListener,
    mirror: Option<TcpListener>,
    api_acceptor: Acceptor,
    enrolment_acceptor: Acceptor,
    mirror_acceptor: Acceptor,
    pki: Pki,
    anchored: Option<Arc<AnchoredClock>>,
    serving: watch::Sender<bool>,
}

impl Controller {
    /// Opens everything that can fail: folders, certificates, store, ports.
    ///
    /// # Errors
    /// Returns an error if one of them cannot be opened.
    pub async fn bind(config: Config, clock: Arc<dyn Clock>) -> anyhow::Result<Self> {
        make_private(&config.data_dir)?;
        // Those of an earlier start may have wider modes.
        for folder in ["artifacts", "staging", "pki"] {
            keep_private(&config.data_dir.join(folder));
        }
        // Schedules depend on it, and it may differ between controllers.
        tracing::info!(tzdata = %schedule::Tzdata::of_process(), "time zones");
        let (store, time) = startup::open_store(&config.database_url).await?;
        // Several controllers on one database agree on its time, independent of their own clocks.
        let anchored = time.map(|sample| Arc::new(AnchoredClock::new(sample)));
        let clock = anchored.clone().map_or(clock, |anchored| -> Arc<dyn Clock> { anchored });
        let pki = startup::open_pki(&config, &*clock).await?;
        let stop = CancellationToken::new();
        let artifacts = Artifacts::open(&config.data_dir)?.stopping(stop.clone());
        let api = listen(config.listen, "the API")?;
        let enrolment = listen(config.enroll_listen, "enrolment")?;
        let mirror = listen_if_free(config.mirror_listen, config.mirror_asked_for, "the file mirror")?;
        let access = Access::new(store.clone(), Arc::clone(&clock));
        let limits = Limits::of_files(open_files());
        let api_acceptor = Acceptor::api(&pki, Arc::clone(&clock))?.guarded(limits, Some(access.look()));
        let enrolment_acceptor = Acceptor::enrolment(&pki, Arc::clone(&clock))?.guarded(limits, None);
        let mirror_acceptor =
            Acceptor::mirror(&pki, Arc::clone(&clock))?.guarded(Limits::of_mirror(open_files()), Some(access.look()));
        let (serving, seen) = watch::channel(true);
        let context = api::Context {
            serving: seen,
            access,
            store,
            sessions: Arc::new(Sessions::default()),
            artifacts: Arc::new(artifacts),
            downloads: api::Downloads::new(open_files()),
            clock: Arc::clone(&clock),
            controller: Uuid::now_v7().to_string(),
            addresses: advertised(&config, api.local_addr()?),
            tasks: TaskTracker::new(),
            stop,
            ca: Arc::clone(&pki.ca),
        };
        Ok(Self {
            context,
            clock,
            config,
            api,
            enrolment,
            mirror,
            api_acceptor,
            enrolment_acceptor,
            mirror_acceptor,
            pki,
            anchored,
            serving,
        })
    }

    /// The text that `serve` prints: the addresses, and one command line that works.
    pub fn greeting(&self) -> String {
        let port =
            |listener: &TcpListener| listener.local_addr().map(|address| address.to_string()).unwrap_or_default();
        let api_port = self.api.local_addr().map(|address| address.port()).unwrap_or_default();
        let certs = self.config.certs.display();
        let mut text = String::new();
        let _ = writeln!(text, "marco-controller {}", env!("CARGO_PKG_VERSION"));
        let _ = writeln!(text, "  API and agents   {}", port(&self.api));
        let _ = writeln!(text, "  enrolment        {}", port(&self.enrolment));
        let mirror = self.mirror.as_ref().map_or_else(|| "none: its port is taken".to_owned(), port);
        let _ = writeln!(text, "  file mirror      {mirror}");
        let _ = writeln!(text, "  data             {}", self.config.data_dir.display());
        let minted = if self.pki.minted { " (made just now, for development)" } else { "" };
        let _ = writeln!(text, "  certificates     {certs}{minted}");
        let _ = writeln!(text, "  time zones       {}", schedule::Tzdata::of_process());
        let _ = write!(
            text,
            "Try: grpcurl -cacert {certs}/ca.crt -cert {certs}/admin.crt -key {certs}/admin.key \
             localhost:{api_port} marco.bootstrap.v1.NodeService/ListNodes"
        );
        text
    }

    /// The addresses that the API and the enrolment listen on.
    ///
    /// # Errors
    /// Returns the system's error.
    pub fn addresses(&self) -> std::io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.api.local_addr()?, self.enrolment.local_addr()?))
    }

    /// Serves until `stop`, then drains; true when every stream had ended before the deadline.
    ///
    /// # Errors
    /// Returns an error if a part that should run forever ended by itself.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<bool> {
        let context = self.context;
        let servers_stop = CancellationToken::new();
        let mut servers = JoinSet::new();
        let address = context.addresses.join(",");
        // Read before this controller writes a row itself: the clock is compared with it.
        let last_row = context.store.last_row().await?;
        let watch = Arc::new(ClockWatch::new(Arc::clone(&context.clock), last_row));
        // A controller without a sign of life loses its sessions, so the first one comes before them.
        context.store.beat(&context.controller, &address, context.clock.now()).await?;
        let mut parts = JoinSet::new();
        let acceptors = [self.api_acceptor.clone(), self.enrolment_acceptor.clone(), self.mirror_acceptor.clone()];

        let announced = Announced {
            ways: self.config.discovery,
            listen: self.config.listen.ip(),
            api: self.api.local_addr()?.port(),
            enroll: self.enrolment.local_addr()?.port(),
            mirror: self.mirror.as_ref().and_then(|mirror| mirror.local_addr().ok()).map(|address| address.port()),
            ca: self.pki.ca.spki_sha256(),
            controller: context.controller.clone(),
        };
        // Calls that change something; they run to their end even if the client leaves.
        let calls = TaskTracker::new();
        let api = server_builder()
            .layer(StreamsLayer)
            .layer(GateLayer::new(Arc::clone(&context.access), calls.clone()))
            .add_routes(api::routes(&context).await?)
            .serve_with_incoming_shutdown(
                incoming(self.api, self.api_acceptor),
                servers_stop.clone().cancelled_owned(),
            );
        servers.spawn(async move { api.await.context("the API's server failed") });
        let enrolment = enrolment_builder()
            .layer(CallsLayer::new(calls.clone(), STRANGER_MESSAGE))
            .add_routes(api::enrollment_routes(&context))
            .serve_with_incoming_shutdown(
                incoming(self.enrolment, self.enrolment_acceptor),
                servers_stop.clone().cancelled_owned(),
            );
        servers.spawn(async move { enrolment.await.context("the enrolment server failed") });
        if let Some(listener) = self.mirror {
            let mirror = Mirror {
                store: context.store.clone(),
                access: Arc::clone(&context.access),
                artifacts: Arc::clone(&context.artifacts),
                fetch: api::fetcher(&context),
                patience: Patience { crowd: mirror_places(open_files()), ..Patience::default() },
            };
            let serving = mirror.serve(listener, self.mirror_acceptor, servers_stop.clone());
            servers.spawn(async move {
                serving.await;
                Ok(())
            });
        }

        parts.spawn(discovery::run(announced, context.stop.clone()));
        let dispatcher = Dispatcher::new(
            context.store.clone(),
            Arc::clone(&context.sessions),
            self.clock,
            context.controller.clone(),
            address,
        );
        let pulses = Pulses::default();
        parts.spawn(dispatcher.watched(pulses.clone()).run(context.stop.clone()));
        let watchdog = Watchdog {
            store: context.store.clone(),
            sessions: Arc::clone(&context.sessions),
            pulses: pulses.clone(),
            serving: self.serving,
            others: api::others_serve(&context),
            clock: {
                let (ca, clock) = (Arc::clone(&context.ca), Arc::clone(&context.clock));
                Arc::new(move || ca.check_clock(clock.now()).err().map(|wrong| wrong.to_string()))
            },
        };
        parts.spawn(watchdog.run(context.stop.clone()));
        parts.spawn(Arc::clone(&context.access).watch(context.stop.clone()));
        parts.spawn(Arc::clone(&watch).run(context.stop.clone()));
        if let Some(anchored) = self.anchored {
            let store = context.store.clone();
            let ask = move || {
                let store = store.clone();
                async move { ask_time(&store).await }
            };
            parts.spawn(keep_anchored(anchored, ask, ANCHOR, context.stop.clone()));
        }
        if self.config.notifications {
            parts.spawn(context.store.clone().share_changes(context.stop.clone()));
        }
        context.tasks.spawn(api::judge_stored(context.clone()));
        let keep_events = self.config.keep_events;
        let jobs =
            vec![Recurring { cron: HOUSEKEEPING, work: housekeeping(&context, keep_events, watch, ORPHAN_GRACE) }];
        let hangup = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
        let upkeep = Upkeep::new(self.pki, acceptors);
        parts.spawn(upkeep.run(Arc::clone(&context.clock), hangup, context.stop.clone()));
        let prepare = preparation(&context);
        let fires = Fires::new(context.store.clone(), Arc::clone(&context.clock), prepare, self.config.missed_after)
            .watched(pulses.scheduler);
        let scheduler_stop = context.stop.clone();
        parts.spawn(async move {
            if let Err(error) = scheduler::run(jobs, Some(fires), scheduler_stop).await {
                tracing::error!(error = chain(&error), "the scheduler failed");
            }
        });

        // The first of these ends the run; a part that ends by itself stops the rest.
        let failed = tokio::select! {
            () = stop.cancelled() => None,
            ended = servers.join_next() => Some(match ended {
                Some(Ok(Err(error))) => error,
                Some(Err(error)) => anyhow::Error::new(error).context("a server panicked"),
                Some(Ok(Ok(()))) | None => anyhow::anyhow!("a server ended by itself"),
            }),
            _ = parts.join_next() => Some(anyhow::anyhow!("the dispatcher or the scheduler ended by itself")),
        };

        // Streams and calls drain first. The dispatcher and the other parts run until then.
        context.sessions.end_all(End::Shutdown);
        servers_stop.cancel();
        calls.close();
        let (drained, finished) =
            tokio::join!(context.sessions.drained(DRAIN), tokio::time::timeout(DRAIN, calls.wait()));
        context.stop.cancel();
        context.tasks.close();
        let ended = tokio::time::timeout(CLOSE, async {
            // A call may still have come in on an open connection.
            calls.wait().await;
            context.tasks.wait().await;
            while parts.join_next().await.is_some() {}
            while servers.join_next().await.is_some() {}
        });
        let ended = ended.await.is_ok();
        if let Err(error) = context.store.retire(&context.controller, context.clock.now()).await {
            tracing::warn!(error = chain(&error), "the controller could not sign off in the database");
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(drained && finished.is_ok() && ended),
        }
    }
}

/// Sets the clock by the database's time, again and again. Without an answer in time, monotonic time goes on from the
/// last answer that came in time.
async fn keep_anchored<F>(clock: Arc<AnchoredClock>, ask: impl Fn() -> F, every: Duration, stop: CancellationToken)
where
    F: Future<Output = anyhow::Result<Option<Sample>>>,
{
    loop {
        // Dropping the wait or the question on a stop loses nothing.
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(every) => {}
        }
        match ask().await {
            Ok(Some(sample)) => clock.anchor(sample),
            Ok(None) => return,
            Err(error) => tracing::debug!(error = format!("{error:#}"), "the clock was not set"),
        }
    }
}

/// The database's time, by the fastest of several answers; `None`: the database has no clock of its own.
async fn ask_time(store: &Store) -> anyhow::Result<Option<Sample>> {
    fastest_answer(|| store.database_time()).await
}

async fn fastest_answer<F>(question: impl Fn() -> F) -> anyhow::Result<Option<Sample>>
where
    F: Future<Output = Result<Option<DateTime<Utc>>, StoreError>>,
{
    let mut samples = Vec::new();
    let mut failed = None;
    for _ in 0..SAMPLES {
        let asked = Instant::now();
        match question().await {
            Ok(Some(time)) => samples.push(Sample { time, asked, answered: Instant::now() }),
            Ok(None) => return Ok(None),
            Err(error) => failed = Some(error),
        }
    }
    match (Sample::best(samples), failed) {
        (Some(best), _) => Ok(Some(best)),
        (None, Some(error)) => Err(error).context("cannot ask the database for its time"),
        (None, None) => anyhow::bail!(
            "the database takes more than {} ms to say what time it is, {SAMPLES} times in a row",
            clock::MAX_ROUND_TRIP.as_millis()
        ),
    }
}

/// Builds the operations of schedules.
fn preparation(context: &api::Context) -> Prepare {
    let context = context.clone();
    Arc::new(move |schedule, fire_time, begins| {
        let operation = api::prepare_fire(context.clone(), schedule, fire_time, begins);
        Box::pin(async move {
            operation.await.map_err(|error| match error {
                api::ApiError::Store(error) => Unprepared::Store(error),
                refused => Unprepared::Refused(refused.to_string()),
            })
        })
    })
}

/// Removes abandoned uploads, unneeded bytes, stored files without an artifact that are older than `orphans`, old events
/// and old certificates, and warns of expiries.
fn housekeeping(
    context: &api::Context,
    keep_events: TimeDelta,
    watch: Arc<ClockWatch>,
    orphans: Duration,
) -> scheduler::Work {
    let context = context.clone();
    let warnings = Arc::new(Warnings::default());
    Arc::new(move || {
        let (context, warnings, watch) = (context.clone(), Arc::clone(&warnings), Arc::clone(&watch));
        Box::pin(async move {
            if let Err(error) = api::remove_unneeded(&context).await {
                tracing::warn!(error = chain(&error), "bytes that nothing needs any more could not be removed");
            }
            // The rest goes by the time. A clock that is two years ahead for a minute would remove every node's
            // certificate, and use up the warnings of expiries.
            if !watch.is_settled() {
                return tracing::info!("the clock was set lately: nothing old is removed, and nothing warned of");
            }
            let (now, recorder) = (context.clock.now(), context.access.recorder());
            if let Err(error) = warnings.look(&context.store, recorder, &context.ca, now).await {
                tracing::warn!(error = chain(&error), "what expires soon is not known");
            }
            match context.store.prune_certificates(now).await {
                Ok(0) => {}
                Ok(certificates) => tracing::info!(certificates, "certificates that expired long ago were removed"),
                Err(error) => tracing::warn!(error = chain(&error), "old certificates could not be removed"),
            }
            match context.store.prune_events(calendar::earlier(context.clock.now(), keep_events)).await {
                Ok(0) => {}
                Ok(operations) => {
                    tracing::info!(operations, "the events of operations that ended long ago were removed")
                }
                Err(error) => tracing::warn!(error = chain(&error), "old events could not be removed"),
            }
            match context.artifacts.sweep(SystemTime::now() - STALE_UPLOAD).await {
                Ok(0) => {}
                Ok(removed) => tracing::info!(removed, "stale uploads were removed"),
                Err(error) => tracing::warn!(error = chain(&error), "stale uploads could not be removed"),
            }
            if let Err(error) = api::sweep(&context, SystemTime::now() - orphans).await {
                tracing::warn!(error = chain(&error), "stored files could not be compared with the artifacts");
            }
        })
    })
}

/// Addresses at which agents reach this controller: each `--name` with the API's port; without names, the listening
/// address if other machines can use it. Empty: agents keep the addresses that they have.
fn advertised(config: &Config, api: SocketAddr) -> Vec<String> {
    if config.names.is_empty() && !api.ip().is_unspecified() && !api.ip().is_loopback() {
        return vec![api.to_string()];
    }
    let host = |name: &String| if name.contains(':') { format!("[{name}]") } else { name.clone() };
    config.names.iter().map(|name| format!("{}:{}", host(name), api.port())).collect()
}

/// Number of files that the system lets this process have open.
fn open_files() -> usize {
    use rustix::process::{Resource, getrlimit};
    // `None`: no limit.
    getrlimit(Resource::Nofile).current.and_then(|files| usize::try_from(files).ok()).unwrap_or(1 << 20)
}
