//! Each request and each message of a node, with each field in turn at its extremes, sent by each role and by a node
//! that has work. The controller survives, answers in time, blames the caller, and meanwhile serves another node.

#![allow(clippy::print_stdout, reason = "how many messages were sent is worth reading, also when all went well")]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use integration_tests::certs::NodeKey;
use integration_tests::client::Credentials;
use integration_tests::dynamic::{methods, pool};
use integration_tests::extremes::{Extreme, extremes};
use integration_tests::fleet::{execution_name, is_final, reboot};
use integration_tests::image::{Compression, make_image};
use integration_tests::postgres::Postgres;
use integration_tests::upload::push;
use integration_tests::{Database, Fleet, raw, seconds};
use marco_proto::names::PROTOCOL_VERSION;
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::connect_request::Message;
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::{
    Board, ConnectRequest, EnrollRequest, Hello, ListNodesRequest, NodeMode, NodeStatus, Operation, Report, execution,
    operation,
};
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor};
use serde_json::{Value, json};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Deadline for each answer; see "Limits" in docs/operating.md.
const ANSWER: Duration = seconds(2);
/// Concurrent calls.
const AT_ONCE: usize = 4;
/// Timeout of another node's reboot meanwhile. Virtual Pis boot within a second, but this machine is busy.
const OTHER_NODE: Duration = seconds(60);
/// Roles other than admin try one in so many extremes: most of their calls are refused before the body is read.
const STRIDE: usize = 7;

/// Existing resources that the extremes refer to, so that they get past the first check. The other node does not need
/// them.
struct Scene {
    node: Credentials,
    operation: String,
    artifact: String,
    schedules: [&'static str; 3],
}

/// Enrols a node by hand.
async fn node(fleet: &Fleet, id: &str) -> Result<Credentials> {
    let key = NodeKey::generate()?;
    let mut client = EnrollmentServiceClient::new(fleet.admin().anonymous().channel(fleet.addresses().enroll)?);
    let request = EnrollRequest {
        token: fleet.token(1).await?,
        certificate_request: key.request(&key)?.pem,
        node_id: id.to_owned(),
        board: Some(Board::default()),
    };
    let enrolled = client.enroll(request).await?.into_inner();
    Ok(Credentials { ca: enrolled.ca_certificate, identity: Some((enrolled.certificate, key.pem())) })
}

/// An action on a node that has no agent.
fn template() -> Value {
    json!({"reboot": {"notice": "600s"}, "nodes": {"nodes": ["nodes/somebody"]}})
}

fn in_the_future() -> Value {
    json!({
        "reboot": {"notice": "600s"},
        "nodes": {"nodes": ["nodes/somebody"]},
        "scheduleTime": "2100-01-01T00:00:00Z",
        "expireTime": "2100-01-02T00:00:00Z",
    })
}

impl Scene {
    async fn set(fleet: &Fleet, pool: &DescriptorPool) -> Result<Self> {
        node(fleet, "somebody").await?;
        let speaker = node(fleet, "speaker").await?;
        let image = make_image(fleet.dir(), "extremes", Compression::Zstd)?;
        let artifact = push(&mut fleet.artifacts(), "extremes", Kind::Image, Purpose::Unspecified, &image).await?;
        let operation = fleet.create(reboot(&["somebody"], seconds(600))).await?.name;
        let scene = Self {
            node: speaker,
            operation,
            artifact: artifact.name,
            schedules: ["schedules/runs", "schedules/changes", "schedules/goes"],
        };
        for id in ["runs", "changes", "goes"] {
            let schedule = json!({"cron": "0 0 1 1 *", "operation": template()});
            let create = method(pool, "CreateSchedule")?;
            let request = message(&create, json!({"schedule": schedule, "scheduleId": id}))?;
            // `raw::call` sends encoded bytes, as the extremes need; the typed client could not.
            call(&fleet.admin_channel(), &create, request.encode_to_vec(), None)
                .await
                .map_err(|status| anyhow::anyhow!("{status:?}"))?;
        }
        Ok(scene)
    }

    /// A request that the controller would accept, or nearly.
    fn base(&self, method: &MethodDescriptor) -> Result<DynamicMessage> {
        let [runs, changes, goes] = self.schedules;
        let name = method.name();
        let schedule = json!({
            "name": changes, "cron": "0 0 2 1 *", "timeZone": "Europe/Madrid", "operation": template(), "jitter": "1s",
            "expireAfter": "3600s",
        });
        let execution = format!("{}/executions/somebody", self.operation);
        let request = match name {
            // Not due for decades, so that hundreds of created operations do not keep the node busy.
            "CreateOperation" | "CheckOperation" => json!({"operation": in_the_future()}),
            "CreateSchedule" => json!({"schedule": {"cron": "0 0 1 1 *", "operation": template()}}),
            "UpdateSchedule" => json!({
                "schedule": schedule, "updateMask": "cron,timeZone,operation,missedFire,overlap,jitter,expireAfter",
            }),
            "PreviewSchedule" => json!({"cron": "0 0 1 1 *", "timeZone": "Europe/Madrid"}),
            "UpdateNode" => {
                json!({"node": {"name": "nodes/somebody", "labels": {"a": "b"}}, "updateMask": "labels,displayName"})
            }
            "CreateApiToken" => json!({"apiToken": {"role": "ROLE_VIEWER"}}),
            "ListExecutions" | "ListEvents" => json!({"parent": self.operation}),
            "ExplainExecution" | "AbandonExecution" | "GetExecutionLog" => json!({"name": execution}),
            "RunSchedule" | "ListFires" => json!({named(method): runs}),
            _ if name.ends_with("Schedule") => json!({named(method): goes}),
            _ if name.ends_with("Operation") => json!({named(method): self.operation}),
            _ if name.ends_with("Node") => json!({named(method): "nodes/somebody"}),
            _ if name.ends_with("Artifact") && name != "UploadArtifact" => json!({named(method): self.artifact}),
            // Other requests have no field that must name something.
            _ => json!({}),
        };
        message(method, request)
    }
}

/// The field in which a request names its resource.
fn named(method: &MethodDescriptor) -> &'static str {
    if method.input().get_field_by_name("name").is_some() { "name" } else { "parent" }
}

fn message(method: &MethodDescriptor, value: Value) -> Result<DynamicMessage> {
    let name = method.name().to_owned();
    DynamicMessage::deserialize(method.input(), value).with_context(|| format!("a request for {name}"))
}

fn method(pool: &DescriptorPool, name: &str) -> Result<MethodDescriptor> {
    methods(pool).into_iter().find(|method| method.name() == name).with_context(|| format!("no method {name}"))
}

async fn call(
    channel: &Channel,
    method: &MethodDescriptor,
    bytes: Vec<u8>,
    bearer: Option<&str>,
) -> Result<bytes::Bytes, Status> {
    let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
    raw::call(channel, &path, bytes, bearer).await
}

/// The fault of an answer; `None` if there is none.
async fn complaint(channel: &Channel, method: &MethodDescriptor, extreme: &Extreme) -> Option<String> {
    let mut slow = None;
    // Three attempts. A busy machine is slow now and then. A refused caller loses its connection, and concurrent calls
    // on it fail too. A call that really hangs, or ends its connection, does so each time.
    for _ in 0..3 {
        let asked = Instant::now();
        let answer = tokio::time::timeout(2 * ANSWER, call(channel, method, extreme.bytes.clone(), None)).await;
        match answer {
            // A watch that was accepted may have no message to send.
            Err(_) if method.is_server_streaming() => return None,
            Err(_) => slow = Some(format!("no answer within {:?}", 2 * ANSWER)),
            Ok(Err(status)) if is_cut(&status) => slow = Some(format!("{status:?}")),
            // These codes blame the server, and an operator would look for a defect there.
            Ok(Err(status)) if matches!(status.code(), Code::Internal | Code::Unknown | Code::DataLoss) => {
                return Some(format!("{status:?}"));
            }
            Ok(Err(status)) if extreme.what.ends_with("bad UTF-8") && is_taken_for_good(&status) => {
                return Some(format!("bad UTF-8 is {status:?}"));
            }
            Ok(_) if asked.elapsed() > ANSWER => slow = Some(format!("answered after {:?}", asked.elapsed())),
            Ok(_) => return None,
        }
    }
    slow
}

/// True if the connection ended before the answer came: tonic then has a transport error as the source.
fn is_cut(status: &Status) -> bool {
    status.code() == Code::Unknown && std::error::Error::source(status).is_some()
}

/// True for each status that does not reject the request or its caller.
fn is_taken_for_good(status: &Status) -> bool {
    let refusals = [Code::InvalidArgument, Code::PermissionDenied, Code::Unauthenticated, Code::ResourceExhausted];
    !refusals.contains(&status.code())
}

/// Sends each request at its extremes, as one caller. `stride`: only every so many-th.
async fn requests(
    scene: &Scene,
    pool: &DescriptorPool,
    (who, api, enrolment): (&str, &Channel, &Channel),
    stride: usize,
) -> Result<(usize, Vec<String>)> {
    let mut cases = Vec::new();
    for method in methods(pool) {
        // A session is a dialogue; `messages` tests it.
        if method.name() == "Connect" {
            continue;
        }
        let channel = if method.parent_service().name() == "EnrollmentService" { enrolment } else { api };
        let found = extremes(&scene.base(&method)?);
        cases.extend(found.into_iter().map(|extreme| (method.clone(), channel, extreme)));
    }
    // Over all methods together, so that the stride goes on from one method into the next.
    let cases: Vec<_> = cases.into_iter().step_by(stride).collect();
    let count = cases.len();
    let wrong = futures_util::stream::iter(cases)
        .map(|(method, channel, extreme)| async move {
            let told = complaint(channel, &method, &extreme).await?;
            Some(format!("{who}: {} {}: {told}", method.name(), extreme.what))
        })
        .buffer_unordered(AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await;
    Ok((count, wrong))
}

/// A node's first message.
fn hello(reports: Vec<Report>) -> Hello {
    Hello {
        protocol_version: PROTOCOL_VERSION,
        boot_id: "7f2c0e56-0f0c-4c8b-9a3e-0d1f5a7b9c11".to_owned(),
        mode: NodeMode::Running.into(),
        agent_version: "0".to_owned(),
        supported_actions: ["reboot", "power-off", "update"].map(str::to_owned).to_vec(),
        executions: reports,
        instance: "speaker".to_owned(),
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
        Ok(Report {
            execution: execution_name(work, "speaker"),
            attempt: execution.attempt.max(1),
            sequence: 1,
            state: execution::State::Running.into(),
            boot_id: hello(Vec::new()).boot_id,
            ..Report::default()
        })
    }

    /// Sends these messages in a new session, and listens until the controller falls silent.
    async fn say(&self, messages: Vec<Vec<u8>>) -> Result<(), Status> {
        let (says, said) = tokio::sync::mpsc::channel(messages.len().max(1));
        for message in messages {
            says.try_send(bytes::Bytes::from(message)).map_err(|error| Status::aborted(error.to_string()))?;
        }
        let path = "/marco.bootstrap.v1.AgentService/Connect";
        let mut hears = raw::open(&self.channel, path, ReceiverStream::new(said)).await?;
        // The controller answers at once. Waiting longer would only slow down hundreds of sessions.
        let quiet = Duration::from_millis(150);
        let mut heard = 0_usize;
        while let Ok(next) = tokio::time::timeout(if heard == 0 { ANSWER } else { quiet }, hears.message()).await {
            if next?.is_none() {
                return Ok(());
            }
            heard += 1;
        }
        drop(says);
        if heard == 0 { Err(Status::unknown("no answer to hello")) } else { Ok(()) }
    }
}

fn encoded(message: Message) -> Vec<u8> {
    ConnectRequest { message: Some(message) }.encode_to_vec()
}

/// Sends each kind of node message at its extremes, each in a session of its own.
async fn messages(fleet: &Fleet, scene: &Scene, pool: &DescriptorPool) -> Result<(usize, Vec<String>)> {
    let connect = pool.get_message_by_name("marco.bootstrap.v1.ConnectRequest").context("ConnectRequest")?;
    let mut speaker = Speaker { fleet, channel: scene.node.channel(fleet.addresses().api)?, work: None };
    let (mut count, mut wrong) = (0, Vec::new());
    let kinds = ["hello", "report", "status"];
    let bases = |kind: &str, report: &Report| match kind {
        "hello" => Message::Hello(hello(vec![report.clone()])),
        "report" => Message::Report(report.clone()),
        _ => Message::Status(NodeStatus::default()),
    };
    for kind in kinds {
        let report = speaker.report().await?;
        let base = DynamicMessage::decode(connect.clone(), &*encoded(bases(kind, &report)))?;
        // Setting another field of the oneof would replace the message under test.
        let names: Vec<String> =
            extremes(&base).into_iter().map(|extreme| extreme.what).filter(|what| what.starts_with(kind)).collect();
        for what in names {
            // Built again for each extreme: the report must name an execution that is still open.
            let report = speaker.report().await?;
            let base = DynamicMessage::decode(connect.clone(), &*encoded(bases(kind, &report)))?;
            let Some(extreme) = extremes(&base).into_iter().find(|extreme| extreme.what == what) else { continue };
            let first = if kind == "hello" { None } else { Some(encoded(Message::Hello(hello(Vec::new())))) };
            count += 1;
            let said: Vec<Vec<u8>> = first.into_iter().chain([extreme.bytes]).collect();
            let mut told = speaker.say(said.clone()).await;
            // The controller refused the previous session and closed its connection.
            for _ in 0..2 {
                if told.as_ref().is_err_and(is_cut) {
                    told = speaker.say(said.clone()).await;
                }
            }
            if let Err(status) = told
                && matches!(status.code(), Code::Internal | Code::Unknown)
            {
                wrong.push(format!("node: {what}: {status:?}"));
            }
        }
    }
    Ok((count, wrong))
}

/// Reboots another node in a loop until `stop` is set; returns the number of reboots.
async fn others_go_on(fleet: &Fleet, id: &str, stop: &AtomicBool) -> Result<usize> {
    let mut done = 0;
    loop {
        let created = fleet.create(reboot(&[id], Duration::ZERO)).await?;
        fleet.ends(&created.name, OTHER_NODE, operation::State::Succeeded).await?;
        done += 1;
        if stop.load(Ordering::Relaxed) {
            return Ok(done);
        }
    }
}

async fn every_field_at_its_extremes(database: Database) -> Result<()> {
    let mut fleet = Fleet::builder().database(database).pis(1).start().await?;
    let pool = pool()?;
    let scene = Scene::set(&fleet, &pool).await?;
    let id = fleet.ids().await?.into_iter().find(|id| id.starts_with("pi-")).context("a Pi")?;
    let addresses = fleet.addresses();
    let enrolment = fleet.admin().anonymous().channel(addresses.enroll)?;
    let mut callers = vec![
        ("node", scene.node.channel(addresses.api)?, STRIDE),
        ("nobody", fleet.admin().anonymous().channel(addresses.api)?, STRIDE),
    ];
    for role in ["viewer", "operator", "publisher"] {
        callers.push((role, fleet.user(role)?.channel(addresses.api)?, STRIDE));
    }
    callers.push(("admin", fleet.admin_channel(), 1));

    let stop = AtomicBool::new(false);
    let sent = AtomicUsize::new(0);
    let begun = Instant::now();
    let at_work = async {
        let mut wrong = Vec::new();
        let (count, found) = messages(&fleet, &scene, &pool).await?;
        ensure!(count > 100, "only {count} messages of a node");
        sent.fetch_add(count, Ordering::Relaxed);
        wrong.extend(found);
        for (who, channel, stride) in &callers {
            let (count, found) = requests(&scene, &pool, (who, channel, &enrolment), *stride).await?;
            sent.fetch_add(count, Ordering::Relaxed);
            wrong.extend(found);
        }
        stop.store(true, Ordering::Relaxed);
        anyhow::Ok(wrong)
    };
    let (wrong, reboots) = tokio::try_join!(at_work, others_go_on(&fleet, &id, &stop))?;
    let sent = sent.load(Ordering::Relaxed);
    println!(
        "extremes: {sent} messages in {:?}, meanwhile another node was restarted {reboots} times",
        begun.elapsed()
    );
    ensure!(wrong.is_empty(), "{} of {sent}:\n{}", wrong.len(), wrong.join("\n"));
    ensure!(sent > 1500, "only {sent} messages were sent");
    fleet.nodes().list_nodes(ListNodesRequest::default()).await?;
    ensure!(!fleet.controller_log(0)?.contains("panicked"), "something panicked");
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn every_field_at_its_extremes_harms_nobody() -> Result<()> {
    every_field_at_its_extremes(Database::Sqlite).await
}

#[tokio::test]
async fn on_postgres_neither() -> Result<()> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    every_field_at_its_extremes(Database::Url(url)).await
}
