//! A node with work of its own, which says each kind of message at its extremes.

use anyhow::{Context as _, Result, bail, ensure};
use integration_tests::extremes::extremes;
use integration_tests::fleet::{execution_name, is_final, reboot};
use integration_tests::{Fleet, raw, seconds};
use marco_proto::names::PROTOCOL_VERSION;
use marco_proto::v1::connect_request::Message;
use marco_proto::v1::{
    ConnectRequest, ConnectResponse, Hello, Leaving, NodeMode, NodeStatus, NotHeld, Operation, Report,
    connect_response, execution,
};
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::{ANSWER, Scene, is_cut};

/// An execution that the controller does not know. It acknowledges each report about it.
const UNKNOWN: &str = "operations/01a21325-85a1-72ed-97de-94f7f1cf4a51/executions/speaker";

/// Boot id of the reports. The node never proves a restart.
const BOOT: &str = "7f2c0e56-0f0c-4c8b-9a3e-0d1f5a7b9c11";

/// A node's first message. Each is of another boot and start: one that comes back after another is a clone's.
fn hello(reports: Vec<Report>) -> Hello {
    Hello {
        protocol_version: PROTOCOL_VERSION,
        boot_id: Uuid::now_v7().to_string(),
        mode: NodeMode::Running.into(),
        agent_version: "0".to_owned(),
        supported_actions: ["reboot", "power-off", "update"].map(str::to_owned).to_vec(),
        executions: reports,
        instance: Uuid::now_v7().to_string(),
        ..Hello::default()
    }
}

/// The node `speaker`, played by this test.
struct Speaker<'a> {
    fleet: &'a Fleet,
    channel: Channel,
    work: Option<Operation>,
}

impl Speaker<'_> {
    /// A report about the node's present work. Creates an operation if it has none.
    async fn report(&mut self) -> Result<Report> {
        // An extreme report may have ended the execution.
        let open = match &self.work {
            Some(work) => !is_final(self.fleet.execution(&work.name, "speaker").await?.state()),
            None => false,
        };
        if !open {
            self.work = Some(self.fleet.create(reboot(&["speaker"], seconds(3600))).await?);
        }
        let work = self.work.as_ref().context("there is work")?;
        let execution = self.fleet.execution(&work.name, "speaker").await?;
        Ok(Report { execution: execution_name(work, "speaker"), attempt: execution.attempt.max(1), ..report() })
    }

    /// Sends these messages in a new session, and then a report that is acknowledged. Its acknowledgement or the end of
    /// the session shows that the controller has dealt with them.
    async fn say(&self, messages: &[Vec<u8>]) -> Result<(), Status> {
        let (says, said) = tokio::sync::mpsc::channel(messages.len() + 1);
        let last = Report { execution: UNKNOWN.to_owned(), state: execution::State::Succeeded.into(), ..report() };
        for message in messages.iter().cloned().chain([encoded(Message::Report(last))]) {
            says.try_send(bytes::Bytes::from(message)).map_err(|error| Status::data_loss(error.to_string()))?;
        }
        let listen = async {
            let path = "/marco.bootstrap.v1.AgentService/Connect";
            let mut hears = raw::open(&self.channel, path, ReceiverStream::new(said)).await?;
            while let Some(answer) = hears.message().await? {
                let answer = ConnectResponse::decode(answer).map_err(|error| Status::data_loss(error.to_string()))?;
                if let Some(connect_response::Message::Ack(ack)) = answer.message
                    && ack.execution == UNKNOWN
                {
                    return Ok(());
                }
            }
            Err(Status::data_loss("the session ended without a status"))
        };
        let told = tokio::time::timeout(ANSWER, listen).await;
        drop(says);
        told.unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("no answer within {ANSWER:?}"))))
    }

    /// Sends these messages up to three times: the machine may be busy, and a session that was refused before may have
    /// closed the connection.
    async fn insist(&self, messages: &[Vec<u8>]) -> Result<(), Status> {
        let mut told = self.say(messages).await;
        for _ in 0..2 {
            if !told.as_ref().is_err_and(|status| is_cut(status) || status.code() == Code::DeadlineExceeded) {
                break;
            }
            told = self.say(messages).await;
        }
        told
    }
}

fn report() -> Report {
    Report {
        attempt: 1,
        sequence: 1,
        state: execution::State::Running.into(),
        boot_id: BOOT.to_owned(),
        ..Report::default()
    }
}

fn encoded(message: Message) -> Vec<u8> {
    ConnectRequest { message: Some(message) }.encode_to_vec()
}

/// A message of each kind, about the node's present work. A new kind fails here until it has one.
fn said(kind: &str, report: &Report) -> Result<Message> {
    Ok(match kind {
        "hello" => Message::Hello(hello(vec![report.clone()])),
        "report" => Message::Report(report.clone()),
        "status" => Message::Status(NodeStatus::default()),
        "leaving" => Message::Leaving(Leaving { execution: report.execution.clone() }),
        "not_held" => {
            Message::NotHeld(NotHeld { execution: report.execution.clone(), busy_with: Some(report.clone()) })
        }
        _ => bail!("a message of the kind {kind} has no base for its extremes"),
    })
}

/// The fault of an answer to a node's message; `None` if there is none.
fn fault(what: &str, told: &Result<(), Status>) -> Option<String> {
    let good = match told {
        // What cannot be decoded, or has no known content, is the node's fault.
        _ if what.ends_with("bad UTF-8") || what.starts_with('(') => {
            told.as_ref().is_err_and(|status| status.code() == Code::InvalidArgument)
        }
        Ok(()) => true,
        Err(status) => {
            let ours = [Code::Internal, Code::Unknown, Code::DataLoss, Code::DeadlineExceeded];
            !ours.contains(&status.code())
        }
    };
    (!good).then(|| format!("node: {what}: {told:?}"))
}

/// Sends each kind of node message at its extremes, each in a session of its own.
pub(crate) async fn messages(fleet: &Fleet, scene: &Scene, pool: &DescriptorPool) -> Result<(usize, Vec<String>)> {
    let connect = pool.get_message_by_name("marco.bootstrap.v1.ConnectRequest").context("ConnectRequest")?;
    let mut speaker = Speaker { fleet, channel: scene.node.channel(fleet.addresses().api)?, work: None };
    let (mut count, mut wrong) = (0, Vec::new());
    let greeting = || encoded(Message::Hello(hello(Vec::new())));
    let kinds: Vec<String> = connect
        .oneofs()
        .flat_map(|one| one.fields().collect::<Vec<_>>())
        .map(|field| field.name().to_owned())
        .collect();
    for kind in &kinds {
        let report = speaker.report().await?;
        let base = DynamicMessage::decode(connect.clone(), &*encoded(said(kind, &report)?))?;
        // Setting another field of the oneof would replace the message under test.
        let names: Vec<String> = extremes(&base)
            .into_iter()
            .map(|extreme| extreme.what)
            .filter(|what| what.split(['.', ' ']).next() == Some(kind.as_str()))
            .collect();
        ensure!(!names.is_empty(), "{kind} has no extremes");
        for what in names {
            // Built again for each extreme: the report must name an execution that is still open.
            let report = speaker.report().await?;
            let base = DynamicMessage::decode(connect.clone(), &*encoded(said(kind, &report)?))?;
            let Some(extreme) = extremes(&base).into_iter().find(|extreme| extreme.what == what) else { continue };
            let first = (kind != "hello").then(greeting);
            count += 1;
            let messages: Vec<Vec<u8>> = first.into_iter().chain([extreme.bytes]).collect();
            wrong.extend(fault(&what, &speaker.insist(&messages).await));
        }
        if kind != "hello" {
            let early = encoded(said(kind, &report)?);
            count += 1;
            wrong.extend(fault(&format!("({kind} as the first message)"), &speaker.insist(&[early]).await));
        }
    }
    // A message without content, and one of a kind that does not exist yet: field 1000 with two bytes.
    for (what, bytes) in [("(no content)", vec![]), ("(an unknown kind)", vec![0xc2, 0x3e, 0x02, 0x08, 0x01])] {
        count += 1;
        wrong.extend(fault(what, &speaker.insist(&[greeting(), bytes]).await));
    }
    // Otherwise the last of the extremes shut the node out, and those after it tried nothing.
    speaker
        .insist(&[greeting()])
        .await
        .map_err(|status| anyhow::anyhow!("the node is not let in any more: {status:?}"))?;
    Ok((count, wrong))
}
