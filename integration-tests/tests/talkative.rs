//! A node that was broken into: what it may say in its session, and how much.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use integration_tests::certs::NodeKey;
use integration_tests::client::{Credentials, bad_fields};
use integration_tests::{Fleet, seconds};
use marco_proto::names::PROTOCOL_VERSION;
use marco_proto::v1::agent_service_client::AgentServiceClient;
use marco_proto::v1::connect_request::Message;
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::{
    Board, ConnectRequest, ConnectResponse, EnrollRequest, Hello, NodeMode, Report, connect_response, execution,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// What the documentation says of a session.
const AT_ONCE: u32 = 200;
const A_SECOND: u32 = 20;

/// A session of a node by hand.
struct Session {
    says: mpsc::Sender<ConnectRequest>,
    hears: Streaming<ConnectResponse>,
}

impl Session {
    async fn say(&self, message: Message) -> Result<()> {
        self.says.send(ConnectRequest { message: Some(message) }).await.context("the stream is gone")
    }

    /// The status with which it ends.
    async fn end(mut self) -> Result<Status> {
        let ended = tokio::time::timeout(seconds(30), async {
            loop {
                match self.hears.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return Status::ok("ended"),
                    Err(status) => return status,
                }
            }
        });
        ended.await.context("it goes on")
    }
}

struct Node {
    credentials: Credentials,
}

impl Node {
    async fn enrol(fleet: &Fleet) -> Result<Self> {
        let key = NodeKey::generate()?;
        let channel = fleet.admin().anonymous().channel(fleet.addresses().enroll)?;
        let request = EnrollRequest {
            token: fleet.token(1).await?,
            certificate_request: key.request(&key)?.pem,
            node_id: "talkative".to_owned(),
            board: Some(Board::default()),
        };
        let enrolled = EnrollmentServiceClient::new(channel).enroll(request).await?.into_inner();
        let identity = Some((enrolled.certificate, key.pem()));
        Ok(Self { credentials: Credentials { ca: enrolled.ca_certificate, identity } })
    }

    async fn session(&self, fleet: &Fleet) -> Result<Session> {
        let (says, said) = mpsc::channel(1000);
        let mut client = AgentServiceClient::new(self.credentials.channel(fleet.addresses().api)?);
        Ok(Session { says, hears: client.connect(ReceiverStream::new(said)).await?.into_inner() })
    }
}

fn hello() -> Hello {
    Hello {
        protocol_version: PROTOCOL_VERSION,
        boot_id: "7f2c0e56-0f0c-4c8b-9a3e-0d1f5a7b9c11".to_owned(),
        mode: NodeMode::Running.into(),
        agent_version: "0".to_owned(),
        ..Hello::default()
    }
}

/// About an execution that there is not: it is acknowledged, so that the node forgets it.
fn report(sequence: u64) -> Report {
    Report {
        execution: "operations/01a21325-85a1-72ed-97de-94f7f1cf4a51/executions/talkative".to_owned(),
        attempt: 1,
        sequence,
        state: execution::State::Running.into(),
        boot_id: hello().boot_id,
        ..Report::default()
    }
}

#[tokio::test]
async fn a_node_that_says_nothing_or_too_much_at_first_is_not_let_in() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let node = Node::enrol(&fleet).await?;
    let silent = node.session(&fleet).await?;
    let begun = Instant::now();
    for (wrong, field) in [
        (Hello { executions: (0..257).map(report).collect(), ..hello() }, "hello.executions"),
        (Hello { instance: "x".repeat(65), ..hello() }, "hello.instance"),
        (Hello { boot_id: "x".repeat(2000), ..hello() }, "boot_id"),
    ] {
        let session = node.session(&fleet).await?;
        session.say(Message::Hello(wrong)).await?;
        let status = session.end().await?;
        assert_eq!((status.code(), bad_fields(&status)), (Code::InvalidArgument, vec![field.to_owned()]));
    }
    let status = silent.end().await?;
    assert_eq!((status.code(), bad_fields(&status)), (Code::InvalidArgument, vec!["hello".to_owned()]));
    let waited = begun.elapsed();
    assert!(waited >= seconds(9), "it was sent away after {waited:?}");
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_node_that_talks_without_end_is_heard_so_often_a_second() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let node = Node::enrol(&fleet).await?;
    let mut session = node.session(&fleet).await?;
    session.say(Message::Hello(hello())).await?;
    let welcome = session.hears.message().await?.and_then(|answer| answer.message);
    assert!(matches!(welcome, Some(connect_response::Message::Welcome(_))), "{welcome:?}");
    // Three seconds' worth more than it may say at once.
    let reports = AT_ONCE + 3 * A_SECOND;
    let begun = Instant::now();
    for sequence in 1..=reports {
        session.say(Message::Report(report(sequence.into()))).await?;
    }
    for _ in 1..=reports {
        let answer =
            tokio::time::timeout(seconds(60), session.hears.message()).await.context("no acknowledgement")??;
        let answer = answer.context("the stream ended")?.message;
        assert!(matches!(answer, Some(connect_response::Message::Ack(_))), "{answer:?}");
    }
    // The last twenty are read in the third second at the earliest.
    assert!(begun.elapsed() > Duration::from_secs(2), "{reports} reports were read within {:?}", begun.elapsed());
    fleet.went_well();
    Ok(())
}
