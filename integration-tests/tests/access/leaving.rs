//! Callers that go away before they are answered.

use std::future::Future;
use std::time::Duration;

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

/// A database whose audit nobody can write to while it is held: what a call changes waits for its record before it is
/// committed.
struct Ledger {
    server: &'static Postgres,
    url: String,
}

/// Who holds the audit.
const HOLDERS: &str = "SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database \
     WHERE d.datname = current_database() AND relation = 'audit'::regclass AND mode = 'ExclusiveLock' AND granted";
/// Who waits for it.
const WAITERS: &str = "SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database \
     WHERE d.datname = current_database() AND relation = 'audit'::regclass AND NOT granted";

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

    async fn release_after(&self, event: impl Future<Output = Result<()>>) -> Result<()> {
        event.await?;
        self.release()
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

    /// Lets a call go on until it waits for its record, does away with it, and with whatever it holds, and lets go of the
    /// audit once `noticed`.
    async fn leave<T>(
        &self,
        what: &str,
        call: impl Future<Output = T> + Send + 'static,
        noticed: impl Future<Output = Result<()>>,
    ) -> Result<()>
    where
        T: Send + 'static,
    {
        let before = self.made()?.len();
        self.hold().await?;
        let calling = tokio::spawn(call);
        wait_until(seconds(20), &format!("{what} waits for its record"), async || {
            ensure!(!calling.is_finished(), "{what}: it was answered before it was recorded");
            Ok((!self.server.rows(&self.url, WAITERS)?.is_empty()).then_some(()))
        })
        .await?;
        calling.abort();
        ensure!(calling.await.is_err_and(|error| error.is_cancelled()), "{what}: it was answered");
        ensure!(self.made()?.len() == before, "{what}: it is there, and its record is not");
        noticed.await?;
        self.release()?;
        wait_until(seconds(20), &format!("{what} is made and recorded"), async || {
            Ok((self.made()?.len() > before && self.made()? == self.recorded()?).then_some(()))
        })
        .await
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
    let before = ledger.made()?.len();
    // By then the controller has read that they left.
    let noticed = async || {
        for _ in 0..3 {
            NodeServiceClient::new(stays.clone()).list_nodes(ListNodesRequest::default()).await?;
        }
        Ok(())
    };

    // Its stream is reset.
    ledger.leave("a join token", create_join_token(stays.clone()), noticed()).await?;
    let mut operations = OperationServiceClient::new(stays.clone());
    let create = CreateOperationRequest { operation: Some(later(&["pi-1"])), request_id: String::new() };
    ledger.leave("an operation", async move { operations.create_operation(create).await }, noticed()).await?;
    // Its connection is closed.
    ledger.leave("a join token on a connection of its own", create_join_token(leaves), noticed()).await?;
    // And one without a certificate.
    let key = NodeKey::generate()?;
    let enroll = wish(&token, &key, "pi-2", "")?;
    ledger.leave("a node", async move { enrollment.enroll(enroll).await }, noticed()).await?;
    // Its time is up.
    ledger.hold().await?;
    let api_token = ApiToken { role: Role::Viewer.into(), ..ApiToken::default() };
    let create = CreateApiTokenRequest { api_token: Some(api_token), api_token_id: "late".to_owned(), ttl: None };
    let mut create = Request::new(create);
    create.set_timeout(Duration::from_millis(700));
    let late = AccessServiceClient::new(stays.clone()).create_api_token(create).await;
    late.err().context("it was answered in time")?;
    noticed().await?;
    ledger.release()?;
    let made = wait_until(seconds(20), "all of it is made and recorded", async || {
        let made = ledger.made()?;
        Ok((made.len() == before + 5 && made == ledger.recorded()?).then_some(made))
    });
    made.await.with_context(|| format!("made {:?}, recorded {:?}", ledger.made(), ledger.recorded()))?;
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_stops_ends_what_callers_left_behind() -> Result<()> {
    let ledger = Ledger::new().await?;
    let mut fleet = Fleet::builder().pis(0).database(Database::Url(ledger.url.clone())).start().await?;
    let leaves = connected(fleet.admin(), &fleet).await?;
    let api = fleet.addresses().api;
    let ends = async {
        let status = fleet.terminate_controller(seconds(30)).await?;
        ensure!(status.success(), "{status}");
        Ok(())
    };
    // Nobody is served any more, and still it waits.
    let stops = async {
        let listens_no_longer = wait_until(seconds(20), "the controller listens no longer", async || {
            let connected = tokio::net::TcpStream::connect(api).await;
            Ok(connected.is_err().then_some(()))
        });
        tokio::try_join!(ends, ledger.release_after(listens_no_longer))?;
        Ok(())
    };
    ledger.leave("a join token", create_join_token(leaves), stops).await?;
    assert_eq!((ledger.made()?.len(), ledger.recorded()?), (1, ledger.made()?));
    fleet.went_well();
    Ok(())
}
