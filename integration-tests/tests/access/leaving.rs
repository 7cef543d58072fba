//! Callers that go away before they are answered.

use std::future::Future;

use anyhow::{Context as _, Result, ensure};
use integration_tests::certs::NodeKey;
use integration_tests::client::Credentials;
use integration_tests::postgres::Postgres;
use integration_tests::{Database, Fleet, seconds, wait_until};
use marco_proto::v1::access_service_client::AccessServiceClient;
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::{
    ApiToken, CreateApiTokenRequest, CreateJoinTokenRequest, CreateOperationRequest, ListNodesRequest, Role,
};
use tonic::Request;
use tonic::transport::Channel;

use crate::scene::{later, node, wish};

/// A database whose audit nobody can write to while it is held: what a call changed is committed, its record waits.
struct Ledger {
    server: &'static Postgres,
    url: String,
}

/// Who holds the audit.
const HOLDERS: &str = "SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database \
     WHERE d.datname = current_database() AND relation = 'audit'::regclass AND mode = 'ExclusiveLock' AND granted";

impl Ledger {
    async fn new() -> Result<Self> {
        let server = tokio::task::spawn_blocking(Postgres::start).await??;
        Ok(Self { server, url: server.database()? })
    }

    async fn hold(&self) -> Result<()> {
        let (server, url) = (self.server, self.url.clone());
        let hold = "BEGIN; LOCK TABLE audit IN EXCLUSIVE MODE; SELECT pg_sleep(60)";
        tokio::task::spawn_blocking(move || server.by_hand(&url, hold));
        wait_until(seconds(20), "the audit is held", async || {
            Ok((!self.server.rows(&self.url, HOLDERS)?.is_empty()).then_some(()))
        })
        .await
    }

    fn release(&self) -> Result<()> {
        let release = format!("SELECT pg_terminate_backend(pid) FROM ({HOLDERS}) held");
        self.server.by_hand(&self.url, &release)?.map_err(anyhow::Error::msg)
    }

    /// The texts of a query's column `found`, sorted.
    fn texts(&self, query: &str) -> Result<Vec<String>> {
        let rows = self.server.rows(&self.url, query)?;
        let mut texts: Vec<String> =
            rows.iter().filter_map(|row| row.get("found")?.as_str().map(str::to_owned)).collect();
        ensure!(texts.len() == rows.len(), "{rows:?}");
        texts.sort();
        Ok(texts)
    }

    /// What the calls of this test have made, by method and name.
    fn made(&self) -> Result<Vec<String>> {
        self.texts(
            "SELECT 'CreateJoinToken joinTokens/' || id AS found FROM tokens \
             UNION ALL SELECT 'CreateApiToken apiTokens/' || id FROM api_tokens \
             UNION ALL SELECT 'CreateOperation operations/' || id FROM operations \
             UNION ALL SELECT 'Enroll nodes/' || id FROM nodes",
        )
    }

    /// What the audit says that calls have made.
    fn recorded(&self) -> Result<Vec<String>> {
        self.texts("SELECT method || ' ' || target AS found FROM audit WHERE result = 'OK'")
    }

    /// Lets a call go on until what it makes is there, and then does away with it, and with whatever it holds.
    async fn leave<T>(&self, what: &str, call: impl Future<Output = T> + Send + 'static) -> Result<()>
    where
        T: Send + 'static,
    {
        let before = self.made()?.len();
        let calling = tokio::spawn(call);
        wait_until(seconds(20), &format!("{what} is made"), async || {
            ensure!(!calling.is_finished(), "{what}: it was answered before it was recorded");
            Ok((self.made()?.len() > before).then_some(()))
        })
        .await?;
        calling.abort();
        ensure!(calling.await.is_err_and(|error| error.is_cancelled()), "{what}: it was answered");
        Ok(())
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        // When the test failed, nobody else lets go of it; when it went well, nobody holds it.
        let _ = self.release();
    }
}

/// A channel that is connected.
async fn connected(who: &Credentials, fleet: &Fleet) -> Result<Channel> {
    let channel = who.channel(fleet.addresses().api)?;
    NodeServiceClient::new(channel.clone()).list_nodes(ListNodesRequest::default()).await?;
    Ok(channel)
}

async fn create_join_token(channel: Channel) -> Result<(), tonic::Status> {
    NodeServiceClient::new(channel).create_join_token(CreateJoinTokenRequest::default()).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_caller_changed_before_it_left_is_in_the_audit() -> Result<()> {
    let ledger = Ledger::new().await?;
    let mut fleet = Fleet::builder().pis(0).database(Database::Url(ledger.url.clone())).start().await?;
    node(&fleet, "pi-1", "in").await?;
    let token = fleet.token(1).await?;
    let stays = connected(fleet.admin(), &fleet).await?;
    let leaves = connected(fleet.admin(), &fleet).await?;
    let mut enrollment = EnrollmentServiceClient::new(fleet.admin().anonymous().channel(fleet.addresses().enroll)?);
    assert_eq!(ledger.made()?, ledger.recorded()?);

    ledger.hold().await?;
    // Its stream is reset.
    ledger.leave("a join token", create_join_token(stays.clone())).await?;
    let mut operations = OperationServiceClient::new(stays.clone());
    let create = CreateOperationRequest { operation: Some(later(&["pi-1"])), request_id: String::new() };
    ledger.leave("an operation", async move { operations.create_operation(create).await }).await?;
    // Its connection is closed.
    ledger.leave("a join token on a connection of its own", create_join_token(leaves)).await?;
    // Its time is up.
    let api_token = ApiToken { role: Role::Viewer.into(), ..ApiToken::default() };
    let create = CreateApiTokenRequest { api_token: Some(api_token), api_token_id: "late".to_owned(), ttl: None };
    let mut create = Request::new(create);
    create.set_timeout(seconds(2));
    let late = AccessServiceClient::new(stays.clone()).create_api_token(create).await;
    late.err().context("it was answered in time")?;
    // And one without a certificate.
    let key = NodeKey::generate()?;
    let enroll = wish(&token, &key, "pi-2", "")?;
    ledger.leave("a node", async move { enrollment.enroll(enroll).await }).await?;

    let made = ledger.made()?;
    assert_eq!(made.len(), ledger.recorded()?.len() + 5, "{made:?}");
    // The controller has read that they left.
    for _ in 0..3 {
        NodeServiceClient::new(stays.clone()).list_nodes(ListNodesRequest::default()).await?;
    }
    ledger.release()?;
    let recorded = wait_until(seconds(20), "all of it is recorded", async || {
        let recorded = ledger.recorded()?;
        Ok((recorded.len() >= made.len()).then_some(recorded))
    });
    let recorded = recorded.await.with_context(|| format!("made {made:?}, recorded {:?}", ledger.recorded()))?;
    assert_eq!(recorded, made);
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_stops_ends_what_callers_left_behind() -> Result<()> {
    let ledger = Ledger::new().await?;
    let mut fleet = Fleet::builder().pis(0).database(Database::Url(ledger.url.clone())).start().await?;
    let leaves = connected(fleet.admin(), &fleet).await?;
    ledger.hold().await?;
    ledger.leave("a join token", create_join_token(leaves)).await?;
    let api = fleet.addresses().api;
    let ends = async {
        let status = fleet.terminate_controller(seconds(30)).await?;
        ensure!(status.success(), "{status}");
        Ok(())
    };
    let lets_go = async {
        // Nobody is served any more, and still it waits.
        wait_until(seconds(20), "the controller listens no longer", async || {
            let connected = tokio::net::TcpStream::connect(api).await;
            Ok(connected.is_err().then_some(()))
        })
        .await?;
        ledger.release()
    };
    tokio::try_join!(ends, lets_go)?;
    assert_eq!((ledger.made()?.len(), ledger.recorded()?), (1, ledger.made()?));
    fleet.went_well();
    Ok(())
}
