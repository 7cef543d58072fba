//! The versions of the protocol, as a node hears them.

use anyhow::{Context as _, Result, bail};
use integration_tests::client::{Credentials, reason};
use integration_tests::fleet::reboot;
use integration_tests::{Fleet, seconds};
use marco_proto::v1::agent_service_client::AgentServiceClient;
use marco_proto::v1::connect_response::Message as Answer;
use marco_proto::v1::verdict::Decision;
use marco_proto::v1::{
    Ack, Assign, CheckOperationRequest, ConnectRequest, ConnectResponse, Hello, NodeCondition, NodeMode, Release,
    Report, System, Verdict, connect_request, execution, node_condition,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::recorder;

/// Boot ids before and after a restart.
const BEFORE: &str = "11111111-1111-4111-8111-111111111111";
const AFTER: &str = "22222222-2222-4222-8222-222222222222";

struct Node {
    says: mpsc::Sender<ConnectRequest>,
    hears: Streaming<ConnectResponse>,
}

fn hello(versions: &[u32]) -> Hello {
    Hello {
        agent_version: "test".to_owned(),
        protocol_version: versions.iter().copied().max().unwrap_or_default(),
        // As an agent of protocol 1 says it.
        protocol_versions: if versions == [1] { Vec::new() } else { versions.to_vec() },
        boot_id: BEFORE.to_owned(),
        mode: NodeMode::Running.into(),
        answers_queries: true,
        ..Hello::default()
    }
}

impl Node {
    async fn open(fleet: &Fleet, node: &Credentials, hello: Hello) -> Result<Self> {
        let (says, said) = mpsc::channel(16);
        says.send(ConnectRequest { message: Some(connect_request::Message::Hello(hello)) }).await?;
        let mut client = AgentServiceClient::new(node.channel(fleet.addresses().api)?);
        let hears = client.connect(ReceiverStream::new(said)).await?.into_inner();
        Ok(Self { says, hears })
    }

    async fn hear(&mut self) -> Result<Answer> {
        let next = tokio::time::timeout(seconds(30), self.hears.message()).await.context("no answer")?;
        next?.and_then(|answer| answer.message).context("the stream ended")
    }

    /// The version that the controller chose.
    async fn welcomed(&mut self) -> Result<u32> {
        match self.hear().await? {
            Answer::Welcome(welcome) => Ok(welcome.protocol_version),
            other => bail!("{other:?}"),
        }
    }

    async fn assigned(&mut self) -> Result<Assign> {
        loop {
            if let Answer::Assign(assign) = self.hear().await? {
                return Ok(assign);
            }
        }
    }

    async fn say(&self, report: &Report) -> Result<()> {
        Ok(self.says.send(ConnectRequest { message: Some(connect_request::Message::Report(report.clone())) }).await?)
    }
}

/// A report of a new system that was installed by this execution and runs this image.
fn verifying(assign: &Assign, image_sha256: &str) -> Report {
    let (execution, image_sha256) = (assign.execution.clone(), image_sha256.to_owned());
    Report {
        execution: execution.clone(),
        attempt: assign.attempt,
        sequence: 5,
        state: execution::State::Verifying.into(),
        boot_id: AFTER.to_owned(),
        accept_boot_id: BEFORE.to_owned(),
        release: Some(Release { execution, image_sha256, boot_sha256: String::new() }),
        ..Report::default()
    }
}

#[tokio::test]
async fn highest_common_version_is_chosen_and_none_is_refused() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let node = fleet.enrol_by_hand("pi-01", false).await?;
    for (versions, chosen) in [([1].as_slice(), 1), (&[2], 2), (&[1, 2], 2), (&[2, 3], 2)] {
        assert_eq!(Node::open(&fleet, &node, hello(versions)).await?.welcomed().await?, chosen, "{versions:?}");
    }
    let refused = Node::open(&fleet, &node, hello(&[3, 4])).await?.welcomed().await.err().context("it is let in")?;
    let status = refused.downcast_ref::<Status>().context("no status")?;
    assert_eq!((status.code(), reason(status).as_str()), (Code::FailedPrecondition, "PROTOCOL_VERSION"));
    assert_eq!(
        status.message(),
        "the agent speaks version 3 or 4 of the protocol, this controller 1 or 2; update the older one"
    );
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn node_says_what_a_trial_lacks_there() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let node = fleet.enrol_by_hand("pi-01", false).await?;
    let system = System { trial_lacks: "no watchdog".to_owned(), ..System::default() };
    let mut session = Node::open(&fleet, &node, Hello { system: Some(system), ..hello(&[2]) }).await?;
    session.welcomed().await?;
    assert_eq!(fleet.node("pi-01").await?.system.context("no system")?.trial_lacks, "no watchdog");
    let (update, _) = recorder::operation(&fleet, "update").await?;
    for (operation, warned) in [(update, true), (reboot(&["pi-01"], seconds(0)), false)] {
        let request = CheckOperationRequest { operation: Some(operation) };
        let warnings = fleet.operations().check_operation(request).await?.into_inner().warnings;
        let told: Vec<_> =
            warnings.iter().map(|warning| (warning.reason.as_str(), warning.ask, warning.message.as_str())).collect();
        let expected = [("TRIAL_UNWATCHED", false, "no watchdog: pi-01")];
        assert_eq!(told, if warned { expected.as_slice() } else { &[] });
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn acknowledgement_and_verdict_name_what_is_stored() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let node = fleet.enrol_by_hand("pi-01", false).await?;
    let mut session = Node::open(&fleet, &node, hello(&[2])).await?;
    session.welcomed().await?;
    let (asked, digest) = recorder::operation(&fleet, "update").await?;
    let created = fleet.create(asked).await?;
    let assign = session.assigned().await?;
    let said = verifying(&assign, &digest);
    session.say(&said).await?;
    let ack = Ack {
        execution: said.execution.clone(),
        sequence: 5,
        attempt: said.attempt,
        state: said.state,
        boot_id: AFTER.to_owned(),
        release: said.release.clone(),
    };
    assert_eq!(session.hear().await?, Answer::Ack(ack));
    let accepted = Verdict {
        execution: said.execution.clone(),
        attempt: said.attempt,
        boot_id: AFTER.to_owned(),
        release: said.release.clone(),
        decision: Decision::Accepted.into(),
        error: None,
    };
    assert_eq!(session.hear().await?, Answer::Verdict(accepted));
    assert_eq!(fleet.execution(&created.name, "pi-01").await?.state(), execution::State::Verifying);
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn another_system_is_refused_in_protocol_2_and_hears_nothing_in_protocol_1() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let node = fleet.enrol_by_hand("pi-01", false).await?;
    let (asked, _) = recorder::operation(&fleet, "update").await?;
    for version in [1, 2] {
        let mut session = Node::open(&fleet, &node, hello(&[version])).await?;
        session.welcomed().await?;
        let created = fleet.create(asked.clone()).await?;
        let said = verifying(&session.assigned().await?, &"0".repeat(64));
        session.say(&said).await?;
        // A report that is acknowledged at once shows that nothing else comes before.
        let marker = Report { execution: unknown(), state: execution::State::Failed.into(), ..said.clone() };
        session.say(&marker).await?;
        let mut answer = session.hear().await?;
        if version == 2 {
            let Answer::Verdict(verdict) = answer else { bail!("{answer:?}") };
            assert_eq!((verdict.decision(), &verdict.release), (Decision::Refused, &said.release));
            assert_eq!(verdict.error.map(|error| error.reason).as_deref(), Some("NOT_VERIFIED"));
            answer = session.hear().await?;
        }
        assert!(matches!(&answer, Answer::Ack(ack) if ack.execution == unknown()), "{version}: {answer:?}");
        assert_eq!(fleet.execution(&created.name, "pi-01").await?.state(), execution::State::Failed);
    }
    fleet.went_well();
    Ok(())
}

/// An execution that the controller does not know. Its reports are acknowledged.
fn unknown() -> String {
    "operations/01a21325-85a1-72ed-97de-94f7f1cf4a51/executions/pi-01".to_owned()
}

#[tokio::test]
async fn lost_journal_is_shown_and_its_assignment_fails() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let node = fleet.enrol_by_hand("pi-01", false).await?;
    let mut session = Node::open(&fleet, &node, hello(&[2])).await?;
    session.welcomed().await?;
    let created = fleet.create(reboot(&["pi-01"], seconds(0))).await?;
    session.assigned().await?;
    drop(session);
    let lost = NodeCondition { r#type: node_condition::Type::JournalLost.into(), message: "it is torn".to_owned() };
    let said = Hello { journal_lost: true, boot_id: AFTER.to_owned(), conditions: vec![lost.clone()], ..hello(&[2]) };
    let mut session = Node::open(&fleet, &node, said).await?;
    session.welcomed().await?;
    fleet.ends(&created.name, seconds(30), marco_proto::v1::operation::State::Failed).await?;
    let error = fleet.execution(&created.name, "pi-01").await?.error.context("no error")?;
    assert_eq!(error.reason, "JOURNAL_LOST");
    assert_eq!(fleet.node("pi-01").await?.conditions, [lost]);
    fleet.went_well();
    Ok(())
}
