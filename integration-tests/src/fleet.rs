//! A fleet for one test: a controller, virtual Pis in one agent process, and a proxy between them that plays a bad
//! network.

mod ask;
mod controllers;
mod copies;
mod pi;
mod ports;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::{CreateJoinTokenRequest, ListNodesRequest, Node};
use tempfile::TempDir;
use tonic::transport::Channel;

pub use ask::{execution_name, is_final, poweroff, reboot, update};
pub use controllers::libfaketime;
pub use copies::Copied;
pub use pi::{Pi, PiEvent};

use crate::client::Credentials;
use crate::process::{Process, Recipe, binary};
use crate::proxy::Proxy;
use crate::upload::Artifacts;
use crate::wait::{seconds, wait_until};
use controllers::Member;

/// Start timeout of one process on a busy machine.
const START: Duration = seconds(60);
/// Timeout until all virtual Pis are connected; many start at once.
const APPEAR: Duration = seconds(120);

/// The database that a fleet's controllers use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Database {
    /// A file in the controller's data folder: the controller's default.
    #[default]
    Sqlite,
    /// The database with this URL.
    Url(String),
}

/// Settings of a fleet, before it starts.
#[derive(Debug, Clone)]
pub struct Builder {
    database: Database,
    pis: usize,
    boot_time: Duration,
    shutdown_time: Duration,
    prefix: String,
    controllers: usize,
    notifications: bool,
    own_clocks: bool,
    shared_folders: bool,
    missed_after: Option<Duration>,
    open_files: Option<usize>,
    /// Database URLs of single controllers, by controller number; the others use `database`.
    own_urls: BTreeMap<usize, String>,
    log: String,
    database_proxies: bool,
}

/// A running fleet; dropping it ends all its processes and removes all its files.
#[derive(Debug)]
pub struct Fleet {
    addresses: Addresses,
    controllers: Vec<Member>,
    /// Index of the controller that this test talks to, from 0.
    spoken_to: usize,
    agents: Option<Process>,
    proxy: Proxy,
    /// One proxy for each controller, in front of the database; empty unless [`Builder::database_proxies`] was called.
    database_proxies: Vec<Proxy>,
    builder: Builder,
    admin: Credentials,
    channel: Channel,
    silent: bool,
    /// The last field, so that it is removed after every process that writes into it has ended.
    dir: TempDir,
}

/// Listen addresses of one controller.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// The API, and the agents' streams.
    pub api: SocketAddr,
    /// Enrolment, which needs no client certificate.
    pub enroll: SocketAddr,
    /// File mirror.
    pub mirror: SocketAddr,
    /// Metrics.
    pub metrics: SocketAddr,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            database: Database::Sqlite,
            pis: 1,
            boot_time: Duration::from_millis(100),
            shutdown_time: Duration::from_millis(100),
            prefix: "pi-".to_owned(),
            controllers: 1,
            notifications: true,
            own_clocks: false,
            shared_folders: false,
            missed_after: None,
            open_files: None,
            own_urls: BTreeMap::new(),
            log: String::new(),
            database_proxies: false,
        }
    }
}

impl Builder {
    /// Selects the database; default: SQLite.
    pub fn database(mut self, database: Database) -> Self {
        self.database = database;
        self
    }

    /// Log filter of controllers and agents (`RUST_LOG` and `MARCO_LOG`), for example a level; default: their own.
    pub fn logs(mut self, filter: &str) -> Self {
        filter.clone_into(&mut self.log);
        self
    }

    /// Number of virtual Pis; default: 1. With 0 no agent is started.
    pub fn pis(mut self, count: usize) -> Self {
        self.pis = count;
        self
    }

    /// Duration of a Pi's boot; default: 100 ms. A long one lets a test strike during the boot.
    pub fn boot_time(mut self, time: Duration) -> Self {
        self.boot_time = time;
        self
    }

    /// Duration of a Pi's shutdown; default: 100 ms. A long one lets a test strike after the point of no return.
    pub fn shutdown_time(mut self, time: Duration) -> Self {
        self.shutdown_time = time;
        self
    }

    /// Prefix of the Pis' ids; default: `pi-`.
    pub fn prefix(mut self, prefix: &str) -> Self {
        prefix.clone_into(&mut self.prefix);
        self
    }

    /// Starts everything and waits until every Pi is connected.
    pub async fn start(mut self) -> Result<Fleet> {
        // Before the controllers, which get the proxies' addresses on their command lines.
        let database_proxies = self.start_database_proxies().await?;
        let dir = tempfile::Builder::new().prefix("marco-fleet-").tempdir().context("a folder for the fleet")?;
        let mut first = self.start_controller(dir.path(), 0)?;
        let certs = dir.path().join("certs");
        let admin = wait_until(START, "the controller writes its certificates", || {
            let (alive, certs) = (first.process.check_alive(), certs.clone());
            async move {
                alive?;
                // The controller writes these files while this loop reads them: a missing or half-written file is read
                // again.
                let credentials = Credentials::read(&certs, "admin").ok();
                Ok(credentials.filter(Credentials::are_whole))
            }
        })
        .await?;
        let addresses = first.addresses;
        // Agents connect through this proxy, but the test itself does not: it must reach a controller whose network is
        // bad.
        let proxy = Proxy::start(addresses.api).await?;
        let channel = admin.channel(addresses.api)?;
        first.channel = Some(channel.clone());
        let mut fleet = Fleet {
            addresses,
            controllers: vec![first],
            spoken_to: 0,
            agents: None,
            proxy,
            database_proxies,
            builder: self,
            admin,
            channel,
            silent: false,
            dir,
        };
        fleet.controller_is_healthy().await?;
        // One after another: the further controllers need the CA that the first one has made.
        for number in 1..fleet.builder.controllers {
            let further = fleet.builder.start_further_controller(fleet.dir.path(), number, &fleet.admin)?;
            fleet.controllers.push(further);
            fleet.talk_to(number)?;
            fleet.controller_is_healthy().await?;
        }
        fleet.talk_to(0)?;
        if fleet.builder.pis > 0 {
            fleet.start_agents_with_token().await?;
            fleet.all_connected().await?;
        }
        Ok(fleet)
    }
}

impl Fleet {
    /// Starts from the defaults: one Pi, and one controller on SQLite.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The fleet's own folder, removed with the fleet.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The folder with `ca.crt`, `admin.crt` and `admin.key`.
    pub fn certs(&self) -> PathBuf {
        self.dir.path().join("certs")
    }

    /// The controller's data folder.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Listen addresses of the controller that this test talks to.
    pub fn addresses(&self) -> Addresses {
        self.addresses
    }

    /// The network between agents and controller (not the one between this test and the controller).
    pub fn proxy(&self) -> &Proxy {
        &self.proxy
    }

    /// The admin's credentials.
    pub fn admin(&self) -> &Credentials {
        &self.admin
    }

    /// Issues credentials in another role, signed with the controller's own CA key.
    pub fn user(&self, role: &str) -> Result<Credentials> {
        crate::certs::issue(
            &self.certs().join("ca.crt"),
            &self.data().join("pki/ca.key"),
            &format!("test-{role}"),
            role,
        )
    }

    /// A client of the operation service, with the admin's certificate.
    pub fn operations(&self) -> OperationServiceClient<Channel> {
        OperationServiceClient::new(self.channel.clone())
    }

    /// A channel with the admin's certificate.
    pub fn admin_channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A client of the node service, with the admin's certificate.
    pub fn nodes(&self) -> NodeServiceClient<Channel> {
        NodeServiceClient::new(self.channel.clone())
    }

    /// A client of the artifact service, with the admin's certificate.
    pub fn artifacts(&self) -> Artifacts {
        Artifacts::new(self.channel.clone())
    }

    /// The virtual Pi with this node id.
    pub fn pi(&self, id: &str) -> Pi {
        Pi::new(self.dir.path().join("pis").join(id))
    }

    /// The ids of all nodes that the controller knows, in the order of `ListNodes`.
    pub async fn ids(&self) -> Result<Vec<String>> {
        let nodes = self.list_nodes().await?;
        Ok(nodes.into_iter().map(|node| node.name.trim_start_matches("nodes/").to_owned()).collect())
    }

    /// All nodes, from every page of `ListNodes`.
    pub async fn list_nodes(&self) -> Result<Vec<Node>> {
        let mut request = ListNodesRequest { page_size: 1000, ..ListNodesRequest::default() };
        let mut nodes = Vec::new();
        loop {
            let page = self.nodes().list_nodes(request.clone()).await?.into_inner();
            nodes.extend(page.nodes);
            if page.next_page_token.is_empty() {
                return Ok(nodes);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// The node with this id, as `GetNode` returns it.
    pub async fn node(&self, id: &str) -> Result<Node> {
        let request = marco_proto::v1::GetNodeRequest { name: format!("nodes/{id}") };
        Ok(self.nodes().get_node(request).await?.into_inner())
    }

    /// Waits until the controller's health check says SERVING.
    pub async fn controller_is_healthy(&mut self) -> Result<()> {
        use tonic_health::pb::health_check_response::ServingStatus;
        use tonic_health::pb::health_client::HealthClient;
        let health = HealthClient::new(self.channel.clone());
        let controller = &mut self.controllers.get_mut(self.spoken_to).context("the controller")?.process;
        wait_until(START, "the controller is healthy", || {
            // A controller that has died would only show as a timeout.
            let (alive, mut health) = (controller.check_alive(), health.clone());
            async move {
                alive?;
                let answer = health.check(tonic_health::pb::HealthCheckRequest::default()).await;
                Ok(answer.is_ok_and(|answer| answer.get_ref().status() == ServingStatus::Serving).then_some(()))
            }
        })
        .await
    }

    /// Waits until at least as many nodes are connected as there are Pis.
    pub async fn all_connected(&mut self) -> Result<()> {
        let wanted = self.builder.pis;
        wait_until(APPEAR, &format!("{wanted} nodes are connected"), async || {
            let nodes = self.list_nodes().await?;
            // A database that the caller brought may hold connected nodes of other fleets.
            Ok((nodes.iter().filter(|node| node.connected).count() >= wanted).then_some(()))
        })
        .await
    }

    /// Creates a join token that is valid for `max_uses` nodes.
    pub async fn token(&self, max_uses: u32) -> Result<String> {
        let request = CreateJoinTokenRequest { max_uses, ..CreateJoinTokenRequest::default() };
        Ok(self.nodes().create_join_token(request).await?.into_inner().token)
    }

    async fn start_agents_with_token(&mut self) -> Result<()> {
        let uses = u32::try_from(self.builder.pis)?;
        let file = self.dir.path().join("join-token");
        let token = self.token(uses).await?;
        // A token enrols nodes: other users of a shared test machine must not read it.
        let mut options = std::fs::File::options();
        let mut private = options.create(true).truncate(true).write(true).mode(0o600).open(&file)?;
        std::io::Write::write_all(&mut private, token.as_bytes())?;
        // As a file, because other users can read the command line of a process.
        self.start_new_agents(&["--token-file".to_owned(), file.display().to_string()])
    }

    /// Starts the agent process for the first time. `joining`: its options for enrolment, for example `--token-file
    /// FILE`.
    pub fn start_new_agents(&mut self, joining: &[String]) -> Result<()> {
        let builder = &self.builder;
        let mut arguments: Vec<String> = ["simulate", "--count"].map(str::to_owned).into();
        // Fleets with `pis(0)` start their agents by hand, and want one.
        arguments.push(builder.pis.max(1).to_string());
        for (flag, value) in [
            ("--dir", self.dir.path().join("pis").display().to_string()),
            ("--prefix", builder.prefix.clone()),
            ("--controller", self.proxy.address().to_string()),
            ("--enroll", self.addresses.enroll.to_string()),
            ("--boot-time", format!("{}ms", builder.boot_time.as_millis())),
            ("--shutdown-time", format!("{}ms", builder.shutdown_time.as_millis())),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        arguments.extend_from_slice(joining);
        let recipe = Recipe::new(binary("marco-agent")?, arguments, self.dir.path().join("agents.log"));
        let recipe = builder.logging(recipe);
        self.agents = Some(recipe.start()?);
        Ok(())
    }

    /// Kills the controller that this test talks to (`-9`).
    pub async fn kill_controller(&mut self) -> Result<()> {
        self.kill(self.spoken_to).await
    }

    /// Starts that controller again and waits until it is healthy.
    pub async fn start_controller(&mut self) -> Result<()> {
        self.controllers.get_mut(self.spoken_to).context("the controller")?.process.start()?;
        self.controller_is_healthy().await
    }

    /// Sends SIGTERM to the controller that this test talks to, and waits for its end.
    pub async fn terminate_controller(&mut self, limit: Duration) -> Result<std::process::ExitStatus> {
        self.controllers.get_mut(self.spoken_to).context("the controller")?.process.terminate(limit).await
    }

    /// Kills the agents' process (`-9`): all Pis' agents at once.
    pub async fn kill_agents(&mut self) -> Result<()> {
        self.agents.as_mut().context("there are no agents")?.kill().await
    }

    /// The agent process's id; `None` while it does not run.
    pub fn agents_id(&self) -> Option<u32> {
        self.agents.as_ref().and_then(Process::id)
    }

    /// Starts the agents' process again, after [`kill_agents`](Self::kill_agents).
    pub fn start_agents(&mut self) -> Result<()> {
        self.agents.as_mut().context("there are no agents")?.start()
    }
}

impl Fleet {
    /// Marks the test as passed, so that dropping the fleet prints no logs.
    pub fn went_well(&mut self) {
        self.silent = true;
    }
}

impl Drop for Fleet {
    /// Prints the ends of the logs. The test framework shows them only if the test fails.
    fn drop(&mut self) {
        // A passed test prints nothing, although it may have killed its processes on purpose.
        if self.silent {
            return;
        }
        #[allow(clippy::print_stdout, reason = "for whoever reads a failed test")]
        {
            for controller in &self.controllers {
                println!("--- the controller's last words\n{}", controller.process.tail(60));
            }
            if let Some(agents) = &self.agents {
                println!("--- the agents' last words\n{}", agents.tail(60));
            }
        }
    }
}
