//! A fleet of a test's own: a controller, virtual Pis in one agent process, and between them a network that can be bad.

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

/// How long starting a process may take on a machine that has much else to do.
const START: Duration = seconds(60);
/// How long a virtual Pi may take to appear; many start at once.
const APPEAR: Duration = seconds(120);

/// Which database a fleet's controller runs on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Database {
    /// A file in the controller's data folder: what happens without any option.
    #[default]
    Sqlite,
    /// The database with this URL.
    Url(String),
}

/// What a fleet is to be like.
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
    /// Controllers that reach the database by a URL of their own.
    own_urls: BTreeMap<usize, String>,
    log: String,
    database_proxies: bool,
}

/// A running fleet; dropping it ends all its processes and removes all its files.
#[derive(Debug)]
pub struct Fleet {
    addresses: Addresses,
    controllers: Vec<Member>,
    /// The number of the controller that this test talks to.
    spoken_to: usize,
    agents: Option<Process>,
    proxy: Proxy,
    /// Between each controller and the database, where that was asked for.
    database_proxies: Vec<Proxy>,
    builder: Builder,
    admin: Credentials,
    channel: Channel,
    silent: bool,
    /// Removed last, when nobody writes into it any more.
    dir: TempDir,
}

/// Where the controller listens.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// API and agents' streams.
    pub api: SocketAddr,
    /// Enrolment.
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
    /// The database; SQLite unless said otherwise.
    pub fn database(mut self, database: Database) -> Self {
        self.database = database;
        self
    }

    /// What controllers and agents write into their logs: a level, for example.
    pub fn logs(mut self, filter: &str) -> Self {
        filter.clone_into(&mut self.log);
        self
    }

    /// How many virtual Pis; one unless said otherwise, none starts no agent.
    pub fn pis(mut self, count: usize) -> Self {
        self.pis = count;
        self
    }

    /// How long a Pi takes to boot: long to hit it while it boots.
    pub fn boot_time(mut self, time: Duration) -> Self {
        self.boot_time = time;
        self
    }

    /// How long a Pi takes to go down: long to hit it after the point of no return.
    pub fn shutdown_time(mut self, time: Duration) -> Self {
        self.shutdown_time = time;
        self
    }

    /// What the ids of the Pis begin with: `pi-` unless said otherwise.
    pub fn prefix(mut self, prefix: &str) -> Self {
        prefix.clone_into(&mut self.prefix);
        self
    }

    /// Starts everything and waits until every Pi is connected.
    pub async fn start(mut self) -> Result<Fleet> {
        let database_proxies = self.start_database_proxies().await?;
        let dir = tempfile::Builder::new().prefix("marco-fleet-").tempdir().context("a folder for the fleet")?;
        let mut first = self.start_controller(dir.path(), 0)?;
        let certs = dir.path().join("certs");
        let admin = wait_until(START, "the controller writes its certificates", || {
            let (alive, certs) = (first.process.check_alive(), certs.clone());
            async move {
                alive?;
                // A file that is not there yet, or not whole yet, is looked at again.
                let credentials = Credentials::read(&certs, "admin").ok();
                Ok(credentials.filter(Credentials::are_whole))
            }
        })
        .await?;
        let addresses = first.addresses;
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
    /// What a fleet is to be like, starting from one Pi on SQLite.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The fleet's own folder; it goes away with the fleet.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The folder with `ca.crt` and the admin's certificate and key.
    pub fn certs(&self) -> PathBuf {
        self.dir.path().join("certs")
    }

    /// The controller's data folder.
    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Where the controller listens.
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

    /// Credentials of a user in another role.
    pub fn user(&self, role: &str) -> Result<Credentials> {
        crate::certs::issue(
            &self.certs().join("ca.crt"),
            &self.data().join("pki/ca.key"),
            &format!("test-{role}"),
            role,
        )
    }

    /// The operations, as admin.
    pub fn operations(&self) -> OperationServiceClient<Channel> {
        OperationServiceClient::new(self.channel.clone())
    }

    /// A channel with the admin's certificate.
    pub fn admin_channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The nodes, as admin.
    pub fn nodes(&self) -> NodeServiceClient<Channel> {
        NodeServiceClient::new(self.channel.clone())
    }

    /// The artifacts, as admin.
    pub fn artifacts(&self) -> Artifacts {
        Artifacts::new(self.channel.clone())
    }

    /// One of the virtual Pis, by its node's id.
    pub fn pi(&self, id: &str) -> Pi {
        Pi::new(self.dir.path().join("pis").join(id))
    }

    /// The ids of all nodes that the controller knows, in order.
    pub async fn ids(&self) -> Result<Vec<String>> {
        let nodes = self.list_nodes().await?;
        Ok(nodes.into_iter().map(|node| node.name.trim_start_matches("nodes/").to_owned()).collect())
    }

    /// All nodes.
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

    /// The node of one Pi.
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
            let (alive, mut health) = (controller.check_alive(), health.clone());
            async move {
                alive?;
                let answer = health.check(tonic_health::pb::HealthCheckRequest::default()).await;
                Ok(answer.is_ok_and(|answer| answer.get_ref().status() == ServingStatus::Serving).then_some(()))
            }
        })
        .await
    }

    /// Waits until as many nodes as there are Pis have an open stream.
    pub async fn all_connected(&mut self) -> Result<()> {
        let wanted = self.builder.pis;
        wait_until(APPEAR, &format!("{wanted} nodes are connected"), async || {
            let nodes = self.list_nodes().await?;
            Ok((nodes.iter().filter(|node| node.connected).count() >= wanted).then_some(()))
        })
        .await
    }

    /// A join token for so many nodes.
    pub async fn token(&self, max_uses: u32) -> Result<String> {
        let request = CreateJoinTokenRequest { max_uses, ..CreateJoinTokenRequest::default() };
        Ok(self.nodes().create_join_token(request).await?.into_inner().token)
    }

    async fn start_agents_with_token(&mut self) -> Result<()> {
        let uses = u32::try_from(self.builder.pis)?;
        let file = self.dir.path().join("join-token");
        let token = self.token(uses).await?;
        let mut options = std::fs::File::options();
        let mut private = options.create(true).truncate(true).write(true).mode(0o600).open(&file)?;
        std::io::Write::write_all(&mut private, token.as_bytes())?;
        self.start_new_agents(&["--token-file".to_owned(), file.display().to_string()])
    }

    /// Starts the agents' process for the first time, with these options for the way into the fleet.
    pub fn start_new_agents(&mut self, joining: &[String]) -> Result<()> {
        let builder = &self.builder;
        let mut arguments: Vec<String> = ["simulate", "--count"].map(str::to_owned).into();
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

    /// Kills the controller (`-9`).
    pub async fn kill_controller(&mut self) -> Result<()> {
        self.kill(self.spoken_to).await
    }

    /// Starts the controller again and waits until it is healthy.
    pub async fn start_controller(&mut self) -> Result<()> {
        self.controllers.get_mut(self.spoken_to).context("the controller")?.process.start()?;
        self.controller_is_healthy().await
    }

    /// Asks the controller to end and waits for that.
    pub async fn terminate_controller(&mut self, limit: Duration) -> Result<std::process::ExitStatus> {
        self.controllers.get_mut(self.spoken_to).context("the controller")?.process.terminate(limit).await
    }

    /// Kills the agents' process (`-9`): all Pis' agents at once.
    pub async fn kill_agents(&mut self) -> Result<()> {
        self.agents.as_mut().context("there are no agents")?.kill().await
    }

    /// The process id of the agents' process, while it runs.
    pub fn agents_id(&self) -> Option<u32> {
        self.agents.as_ref().and_then(Process::id)
    }

    /// Starts the agents' process again.
    pub fn start_agents(&mut self) -> Result<()> {
        self.agents.as_mut().context("there are no agents")?.start()
    }
}

impl Fleet {
    /// Says that all went well, so that nobody needs the last words of the processes.
    pub fn went_well(&mut self) {
        self.silent = true;
    }
}

impl Drop for Fleet {
    /// The test framework shows what is printed here only when the test fails.
    fn drop(&mut self) {
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
