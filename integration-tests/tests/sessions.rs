//! Two streams of one node: the later one wins, on any controller.

use anyhow::{Context as _, Result};
use integration_tests::client::Credentials;
use integration_tests::fleet::Database;
use integration_tests::postgres::Postgres;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::names::PROTOCOL_VERSION;
use marco_proto::v1::agent_service_client::AgentServiceClient;
use marco_proto::v1::connect_response::Message;
use marco_proto::v1::{ConnectRequest, ConnectResponse, Hello, NodeMode, connect_request};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// Boot ids of two different boots.
const ONE: &str = "11111111-1111-4111-8111-111111111111";
const OTHER: &str = "22222222-2222-4222-8222-222222222222";

/// A stream after Hello and Welcome. Dropping the sender ends it.
struct Session {
    _says: mpsc::Sender<ConnectRequest>,
    hears: Streaming<ConnectResponse>,
}

impl Session {
    async fn open(fleet: &Fleet, node: &Credentials, boot_id: &str) -> Result<Self> {
        let hello = Hello {
            agent_version: "test".to_owned(),
            protocol_version: PROTOCOL_VERSION,
            boot_id: boot_id.to_owned(),
            mode: NodeMode::Running.into(),
            ..Hello::default()
        };
        let (says, said) = mpsc::channel(4);
        says.send(ConnectRequest { message: Some(connect_request::Message::Hello(hello)) }).await?;
        let mut client = AgentServiceClient::new(node.channel(fleet.addresses().api)?);
        let mut hears = client.connect(ReceiverStream::new(said)).await?.into_inner();
        let first = hears.message().await?.and_then(|first| first.message).context("no answer")?;
        anyhow::ensure!(matches!(first, Message::Welcome(_)), "{first:?}");
        Ok(Self { _says: says, hears })
    }

    /// Waits for its end, and returns the goodbye's reason and the status.
    async fn end(mut self) -> Result<(String, Status)> {
        let mut reason = String::new();
        loop {
            match tokio::time::timeout(seconds(20), self.hears.message()).await.context("it did not end")? {
                Ok(Some(ConnectResponse { message: Some(Message::Goodbye(goodbye)) })) => reason = goodbye.reason,
                Ok(Some(_)) => {}
                Ok(None) => anyhow::bail!("it ended without a status: {reason}"),
                Err(status) => return Ok((reason, status)),
            }
        }
    }
}

/// Checks that the earlier stream ends with ABORTED, and that the later one stays.
async fn the_later_one_wins(fleet: &mut Fleet, first_on: usize, second_on: usize) -> Result<()> {
    let id = fleet.ids().await?.remove(0);
    // The real agent would reconnect, and be a third machine with this identity.
    fleet.kill_agents().await?;
    let fleet: &mut Fleet = fleet;
    wait_until(seconds(30), "the agent's own session is over", async || {
        Ok((!fleet.node(&id).await?.connected).then_some(()))
    })
    .await?;
    // The node's own key, as on a copied card.
    let folder = fleet.pi(&id).path("agent");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).with_context(|| name.to_owned());
    let node = Credentials { ca: read("ca.crt")?, identity: Some((read("node.crt")?, read("node.key")?)) };
    fleet.talk_to(first_on)?;
    let first = Session::open(fleet, &node, ONE).await?;
    fleet.talk_to(second_on)?;
    let second = Session::open(fleet, &node, OTHER).await?;
    let (reason, status) = first.end().await?;
    assert_eq!(status.code(), Code::Aborted, "{reason}: {status}");
    // The same controller knows the reason; another one only sees that the session is lost.
    assert!(["superseded", "lost"].contains(&reason.as_str()), "{reason}");
    assert!(fleet.node(&id).await?.connected);
    // The first boot id returns, so there are two machines with one identity, and both are shut out.
    let third = Session::open(fleet, &node, ONE).await.err().context("a boot id came back")?;
    let status = third.downcast_ref::<Status>().context("no status")?;
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    assert_eq!(second.end().await?.1.code(), Code::PermissionDenied);
    Ok(())
}

#[tokio::test]
async fn a_second_session_on_the_same_controller_ends_the_first_with_aborted() -> Result<()> {
    let mut fleet = Fleet::builder().start().await?;
    the_later_one_wins(&mut fleet, 0, 0).await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_second_session_on_another_controller_ends_the_first_with_aborted() -> Result<()> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    let mut fleet = Fleet::builder().database(Database::Url(url)).controllers(2).start().await?;
    the_later_one_wins(&mut fleet, 0, 1).await?;
    fleet.went_well();
    Ok(())
}
