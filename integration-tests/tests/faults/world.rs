//! A controller, a virtual Pi and the network between them, in one process and under one virtual time.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use chrono::{DateTime, TimeDelta, Utc};
use futures_util::future::BoxFuture;
use integration_tests::client::Credentials;
use integration_tests::process::{run, tool};
use integration_tests::proxy::{Direction, Proxy};
use integration_tests::seconds;
use marco_controller::Controller;
use marco_controller::clock::ManualClock;
use marco_controller::config::Config;
use marco_controller::discovery::Ways;
use node_agent::identity::JoinToken;
use node_agent::run::Connection;
use node_agent::system::System;
use node_agent::system::virtual_pi::{Options, VirtualPi};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::hook::{Death, Recorder};
use crate::time::VirtualTime;

/// The node of every world.
pub(crate) const NODE: &str = "pi-1";
/// Virtual time for a controller to end.
const END: Duration = seconds(60);

/// Folder of a world, in memory where that is possible: the steps of an update sync often.
pub(crate) fn folder() -> Result<TempDir> {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("marco-faults-").tempdir_in(parent).context("a folder for a world")
}

/// Copies a folder with all modes.
pub(crate) async fn copy(from: &Path, to: &Path) -> Result<()> {
    let (from, to) = (format!("{}/.", from.display()), to.display().to_string());
    fs::create_dir_all(&to)?;
    run(&tool("cp")?, &["-a", &from, &to], seconds(60)).await?.success()?;
    Ok(())
}

/// The start of every world's time. A test's own client judges certificates by the machine's clock.
pub(crate) fn begin() -> DateTime<Utc> {
    std::time::SystemTime::now().into()
}

struct Serving {
    stop: CancellationToken,
    done: JoinHandle<Result<bool>>,
    api: Channel,
}

/// A world.
pub(crate) struct World {
    pub(crate) time: VirtualTime,
    dir: PathBuf,
    /// Controllers that have ended.
    controllers: u32,
    proxy: Proxy,
    enrolment: Proxy,
    serving: Option<Serving>,
    pi: Option<(CancellationToken, JoinHandle<()>)>,
    /// Address of the controller that serves now.
    address: std::net::SocketAddr,
}

impl World {
    /// A world in this folder, with a controller and without power for the Pi.
    pub(crate) async fn open(dir: &Path, time: VirtualTime) -> Result<Self> {
        let nowhere = "127.0.0.1:9".parse()?;
        let (proxy, enrolment) = (Proxy::start(nowhere).await?, Proxy::start(nowhere).await?);
        let mut world = Self {
            time,
            dir: dir.to_owned(),
            controllers: 0,
            proxy,
            enrolment,
            serving: None,
            pi: None,
            address: nowhere,
        };
        world.start_controller().await?;
        Ok(world)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn pi_dir(&self) -> PathBuf {
        self.dir.join("pis").join(NODE)
    }

    /// Folder of the present controller's data.
    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join(format!("data-{}", self.controllers))
    }

    /// Gives the next controller a copy of the data. Tasks of the one before may hold its files until the process ends.
    async fn hand_over(&mut self) -> Result<()> {
        self.time.still().await;
        let before = self.data();
        self.controllers += 1;
        copy(&before, &self.data()).await
    }

    /// Address of the controller itself.
    pub(crate) fn address(&self) -> std::net::SocketAddr {
        self.address
    }

    pub(crate) fn admin(&self) -> Result<Credentials> {
        Credentials::read(&self.dir.join("certs"), "admin")
    }

    /// A channel to the controller that no network fault concerns.
    pub(crate) fn api(&self) -> Result<Channel> {
        Ok(self.serving.as_ref().context("no controller serves")?.api.clone())
    }

    pub(crate) async fn start_controller(&mut self) -> Result<()> {
        let any = "127.0.0.1:0".parse()?;
        let data_dir = self.data();
        let config = Config {
            database_url: format!("sqlite://{}", data_dir.join("marco.db").display()),
            data_dir,
            certs: self.dir.join("certs"),
            listen: any,
            enroll_listen: any,
            mirror_listen: any,
            mirror_asked_for: true,
            discovery: Ways::OFF,
            missed_after: TimeDelta::minutes(5),
            names: Vec::new(),
            notifications: false,
            keep_events: TimeDelta::days(90),
        };
        let clock: Arc<ManualClock> = Arc::clone(&self.time.clock);
        let controller = self.time.drive(Controller::bind(config, clock)).await?;
        let (api, enroll) = controller.addresses()?;
        let stop = CancellationToken::new();
        let done = tokio::spawn(controller.run(stop.clone()));
        self.address = api;
        self.proxy.retarget(api);
        self.enrolment.retarget(enroll);
        let channel = self.admin()?.channel(api)?;
        self.serving = Some(Serving { stop, done, api: channel });
        Ok(())
    }

    pub(crate) async fn stop_controller(&mut self) -> Result<()> {
        let Some(serving) = self.serving.take() else { return Ok(()) };
        serving.stop.cancel();
        drop(serving.api);
        let ended = tokio::time::timeout(END, serving.done);
        self.time.drive(ended).await.context("the controller does not end")???;
        self.hand_over().await
    }

    /// Replaces the controller's database by one that was saved.
    pub(crate) async fn restore(&mut self, database: &str) -> Result<()> {
        self.stop_controller().await?;
        let data = self.data();
        for rest in ["marco.db-wal", "marco.db-shm"] {
            drop(fs::remove_file(data.join(rest)));
        }
        fs::remove_file(data.join("marco.db"))?;
        fs::copy(self.dir.join(database), data.join("marco.db"))?;
        let log = self.dir.join(format!("{database}-wal"));
        if log.exists() {
            fs::copy(log, data.join("marco.db-wal"))?;
        }
        self.start_controller().await
    }

    /// Sends the agents' connections to another server, which speaks for the controller; `None`: to the controller.
    pub(crate) fn agents_talk_to(&self, address: Option<std::net::SocketAddr>) {
        self.proxy.retarget(address.unwrap_or(self.address));
        self.proxy.drop_connections();
    }

    pub(crate) fn cut_network(&self) {
        for proxy in [&self.proxy, &self.enrolment] {
            proxy.hold(Direction::Up);
            proxy.hold(Direction::Down);
        }
    }

    pub(crate) fn mend_network(&self) {
        for proxy in [&self.proxy, &self.enrolment] {
            // What an hour of retransmissions has given up.
            proxy.drop_connections();
            proxy.release(Direction::Up);
            proxy.release(Direction::Down);
        }
    }

    /// Gives the Pi power.
    pub(crate) fn power(&mut self, recorder: Arc<Recorder>, token: Option<JoinToken>) -> Result<()> {
        let dir = self.pi_dir();
        let options =
            Options { boot_time: seconds(1), shutdown_time: Duration::from_millis(300), blank: false, stock: false };
        let pi = VirtualPi::open(&dir, NODE, options)?;
        let connection = Connection {
            controllers: vec![self.proxy.address().to_string().parse()?],
            enroll: vec![self.enrolment.address().to_string().parse()?],
            token,
            name: NODE.to_owned(),
            search: None,
        };
        let stop = CancellationToken::new();
        let until = stop.clone();
        let agent = move |system: Arc<dyn System>, stop: CancellationToken| -> BoxFuture<'static, ()> {
            let (connection, recorder) = (connection.clone(), Arc::clone(&recorder));
            Box::pin(async move {
                recorder.revive();
                let death = tokio::select! {
                    biased;
                    death = recorder.death() => death,
                    ended = node_agent::run::run(system, connection, Arc::new(|_, _| {}), stop) => {
                        if let Err(error) = ended {
                            tracing::warn!(error = %error, "agent ended");
                        }
                        return;
                    }
                };
                if death == Death::PowerCut {
                    std::future::pending::<()>().await;
                }
            })
        };
        let running = tokio::spawn(async move {
            if let Err(error) = pi.power(agent, until).await {
                tracing::error!(error = %error, "virtual Pi ended");
            }
        });
        self.pi = Some((stop, running));
        Ok(())
    }

    /// Unplugs the Pi in order, at the end.
    pub(crate) async fn unplug(&mut self) -> Result<()> {
        let Some((stop, running)) = self.pi.take() else { return Ok(()) };
        stop.cancel();
        self.time.drive(running).await.context("the virtual Pi panicked")
    }
}
