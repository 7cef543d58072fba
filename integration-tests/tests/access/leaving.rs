//! Callers that leave before they are answered.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
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

/// A database whose audit this test can lock. A change commits together with its audit row, so a call waits then.
struct Ledger {
    server: &'static Postgres,
    url: String,
}

/// Sessions that hold the lock on the audit.
const HOLDERS: &str = "SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database \
     WHERE d.datname = current_database() AND relation = 'audit'::regclass AND mode = 'ExclusiveLock' AND granted";
/// Sessions that wait for the lock on the audit.
const WAITERS: &str = "SELECT pid FROM pg_locks JOIN pg_database d ON d.oid = database \
     WHERE d.datname = current_database() AND relation = 'audit'::regclass AND NOT granted";

impl Ledger {
    async fn new() -> Result<Self> {
        let server = tokio::task::spawn_blocking(Postgres::start).await??;
        Ok(Self { server, url: server.database()? })
    }

    async fn hold(&self) -> Result<()> {
        let (server, url) = (self.server, self.url.clone());
        // EXCLUSIVE blocks writers and lets readers pass.
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

    /// The column `found` of a query, sorted.
    fn texts(&self, query: &str) -> Result<Vec<String>> {
        let rows = self.server.rows(&self.url, query)?;
        let mut texts: Vec<String> =
            rows.iter().filter_map(|row| row.get("found")?.as_str().map(str::to_owned)).collect();
        ensure!(texts.len() == rows.len(), "{rows:?}");
        texts.sort();
        Ok(texts)
    }

    /// All resources created by the calls of this test, as method and name.
    fn made(&self) -> Result<Vec<String>> {
        self.texts(
            "SELECT 'CreateJoinToken joinTokens/' || id AS found FROM tokens \
             UNION ALL SELECT 'CreateApiToken apiTokens/' || id FROM api_tokens \
             UNION ALL SELECT 'CreateOperation operations/' || id FROM operations \
             UNION ALL SELECT 'Enroll nodes/' || id FROM nodes",
        )
    }

    /// The audit's successful calls, as method and name.
    fn recorded(&self) -> Result<Vec<String>> {
        self.texts("SELECT method || ' ' || target AS found FROM audit WHERE result = 'OK'")
    }

    /// Lets a call wait for its audit row, cancels it together with everything it holds, and releases the lock after
    /// `noticed`. A call that waited longer than its deadline has changed nothing, and then another one is made.
    async fn leave(
        &self,
        what: &str,
        call: impl AsyncFn() -> Result<Call>,
        noticed: impl AsyncFn() -> Result<()>,
    ) -> Result<()> {
        let before = self.made()?.len();
        for _ in 0..TRIES {
            let calling = call().await?;
            self.hold().await?;
            let calling = tokio::spawn(calling);
            wait_until(seconds(20), &format!("{what} waits for its record"), async || {
                Ok((calling.is_finished() || !self.server.rows(&self.url, WAITERS)?.is_empty()).then_some(()))
            })
            .await?;
            calling.abort();
            let left = calling.await.is_err_and(|error| error.is_cancelled());
            // A change that is visible without its audit row would be lost from the audit in a crash.
            ensure!(self.made()?.len() == before, "{what}: it is there, and its record is not");
            noticed().await?;
            self.release()?;
            wait_until(seconds(20), &format!("{what} waits no longer"), async || {
                Ok(self.server.rows(&self.url, WAITERS)?.is_empty().then_some(()))
            })
            .await?;
            if self.settled(before + 1).await? {
                return if left { Ok(()) } else { bail!("{what}: it was answered") };
            }
        }
        bail!("{what} was never made")
    }

    /// True if so many resources are created and recorded. Waits a moment, and fails if the two ever differ.
    async fn settled(&self, number: usize) -> Result<bool> {
        let waited = wait_until(seconds(3), "it is made and recorded", async || {
            let made = self.made()?;
            Ok((made.len() == number && made == self.recorded()?).then_some(()))
        });
        let there = waited.await.is_ok();
        ensure!(self.made()? == self.recorded()?, "made {:?}, recorded {:?}", self.made()?, self.recorded()?);
        Ok(there)
    }
}

/// A call that starts when it is awaited.
type Call = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Attempts to cancel a call at the right moment.
const TRIES: usize = 5;

impl Drop for Ledger {
    fn drop(&mut self) {
        // A failed test leaves the lock held. After a successful one there is no holder, and an error is of no
        // interest.
        let _ = self.release();
    }
}

/// A channel that is connected already.
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
    assert_eq!(ledger.made()?, ledger.recorded()?);
    let before = ledger.made()?.len();
    // Three calls on the same connection: after them the controller has read that the earlier call was cancelled.
    let noticed = &async || {
        for _ in 0..3 {
            NodeServiceClient::new(stays.clone()).list_nodes(ListNodesRequest::default()).await?;
        }
        Ok(())
    };

    // The caller resets its stream.
    let token_on = |channel: Channel| -> Call {
        Box::pin(async move {
            let _ = create_join_token(channel).await;
        })
    };
    ledger.leave("a join token", async || Ok(token_on(stays.clone())), noticed).await?;
    let operation = async || -> Result<Call> {
        let mut operations = OperationServiceClient::new(stays.clone());
        let create = CreateOperationRequest { operation: Some(later(&["pi-1"])), request_id: String::new() };
        let call: Call = Box::pin(async move {
            let _ = operations.create_operation(create).await;
        });
        Ok(call)
    };
    ledger.leave("an operation", operation, noticed).await?;
    // The caller closes its connection.
    let leaves = async || Ok(token_on(connected(fleet.admin(), &fleet).await?));
    ledger.leave("a join token on a connection of its own", leaves, noticed).await?;
    // A caller without a certificate closes its connection.
    let key = NodeKey::generate()?;
    let enroll = wish(&token, &key, "pi-2", "")?;
    let node = async || -> Result<Call> {
        let mut client = EnrollmentServiceClient::new(fleet.admin().anonymous().channel(fleet.addresses().enroll)?);
        let enroll = enroll.clone();
        let call: Call = Box::pin(async move {
            let _ = client.enroll(enroll).await;
        });
        Ok(call)
    };
    ledger.leave("a node", node, noticed).await?;
    // The caller's own deadline passes.
    let late = async || -> Result<Call> {
        let api_token = ApiToken { role: Role::Viewer.into(), ..ApiToken::default() };
        let create = CreateApiTokenRequest { api_token: Some(api_token), api_token_id: "late".to_owned(), ttl: None };
        let mut create = Request::new(create);
        create.set_timeout(Duration::from_millis(700));
        let mut access = AccessServiceClient::new(stays.clone());
        let call: Call = Box::pin(async move {
            let _ = access.create_api_token(create).await;
        });
        Ok(call)
    };
    ledger.leave("an API token", late, noticed).await?;
    assert_eq!(ledger.made()?.len(), before + 5);
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_that_stops_ends_what_callers_left_behind() -> Result<()> {
    let ledger = Ledger::new().await?;
    let mut fleet = Fleet::builder().pis(0).database(Database::Url(ledger.url.clone())).start().await?;
    let leaves = connected(fleet.admin(), &fleet).await?;
    ledger.hold().await?;
    let calling = tokio::spawn(create_join_token(leaves));
    wait_until(seconds(20), "a join token waits for its record", async || {
        Ok((calling.is_finished() || !ledger.server.rows(&ledger.url, WAITERS)?.is_empty()).then_some(()))
    })
    .await?;
    calling.abort();
    let api = fleet.addresses().api;
    let ends = async {
        let status = fleet.terminate_controller(seconds(30)).await?;
        ensure!(status.success(), "{status}");
        Ok(())
    };
    let lets_go = async {
        // The controller accepts no new connections, but the abandoned call still waits.
        wait_until(seconds(20), "the controller listens no longer", async || {
            let connected = tokio::net::TcpStream::connect(api).await;
            Ok(connected.is_err().then_some(()))
        })
        .await?;
        ledger.release()
    };
    tokio::try_join!(ends, lets_go)?;
    // The call waited until its deadline. It was either done and recorded, or not done.
    assert!(ledger.made()?.len() <= 1 && ledger.made()? == ledger.recorded()?, "{:?}", ledger.made()?);
    fleet.went_well();
    Ok(())
}
