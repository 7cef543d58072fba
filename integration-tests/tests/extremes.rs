//! Each request and each message of a node, with each field in turn at its extremes, sent by each role and by a node
//! that has work. The controller survives, answers in time, blames the caller, and meanwhile serves another node.

#![allow(clippy::print_stdout, reason = "how many messages were sent is worth reading, also when all went well")]

#[path = "extremes/speaker.rs"]
mod speaker;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::StreamExt as _;
use integration_tests::certs::NodeKey;
use integration_tests::client::Credentials;
use integration_tests::dynamic::{methods, pool};
use integration_tests::extremes::{Extreme, extremes};
use integration_tests::fleet::reboot;
use integration_tests::image::{Compression, make_image};
use integration_tests::postgres::Postgres;
use integration_tests::upload::push;
use integration_tests::{Database, Fleet, raw, seconds};
use marco_controller::identity::roles::{Role, allowed};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::{Board, EnrollRequest, ListNodesRequest, QuarantineNodeRequest, operation};
use prost::Message as _;
use prost_reflect::{DescriptorPool, DynamicMessage, MethodDescriptor};
use serde_json::{Value, json};
use speaker::messages;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// Deadline for each answer; see "Limits" in docs/operating.md.
const ANSWER: Duration = seconds(2);
/// Concurrent calls.
const AT_ONCE: usize = 4;
/// Timeout of another node's reboot meanwhile. Virtual Pis boot within a second, but this machine is busy.
const OTHER_NODE: Duration = seconds(20);
/// Callers try one in so many extremes of the methods that they may not call: those calls are refused before the body
/// is read. Each of the seven callers begins at another one, so that together they try all.
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

/// The fault of an answer; `None` if there is none. `may`: the caller may call the method.
async fn complaint(channel: &Channel, method: &MethodDescriptor, extreme: &Extreme, may: bool) -> Option<String> {
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
            Ok(Err(status)) if extreme.what.ends_with("bad UTF-8") && is_taken_for_good(&status, may) => {
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

/// True for each status that does not reject the request or, unless it may call the method, the caller.
fn is_taken_for_good(status: &Status, may: bool) -> bool {
    if may {
        return status.code() != Code::InvalidArgument;
    }
    let refusals = [Code::InvalidArgument, Code::PermissionDenied, Code::Unauthenticated, Code::ResourceExhausted];
    !refusals.contains(&status.code())
}

/// A caller of all methods.
struct Caller {
    who: &'static str,
    /// Its role. `None`: it may call nothing.
    role: Option<Role>,
    channel: Channel,
}

impl Caller {
    async fn all(fleet: &Fleet, scene: &Scene) -> Result<Vec<Self>> {
        let api = fleet.addresses().api;
        let held = fleet.enrol_by_hand("held", true).await?;
        let quarantined = fleet.enrol_by_hand("quarantined", false).await?;
        let request =
            QuarantineNodeRequest { name: "nodes/quarantined".to_owned(), ..QuarantineNodeRequest::default() };
        fleet.nodes().quarantine_node(request).await?;
        let mut callers = vec![
            Self { who: "node", role: Some(Role::Node), channel: scene.node.channel(api)? },
            Self { who: "held node", role: None, channel: held.channel(api)? },
            Self { who: "quarantined node", role: None, channel: quarantined.channel(api)? },
            Self { who: "nobody", role: None, channel: fleet.admin().anonymous().channel(api)? },
        ];
        for role in [Role::Viewer, Role::Operator, Role::Publisher] {
            callers.push(Self {
                who: role.as_str(),
                role: Some(role),
                channel: fleet.user(role.as_str())?.channel(api)?,
            });
        }
        // Last, because it may delete what the others call about.
        callers.push(Self { who: "admin", role: Some(Role::Admin), channel: fleet.admin_channel() });
        Ok(callers)
    }

    fn may(&self, method: &MethodDescriptor) -> bool {
        let path = format!("/{}/{}", method.parent_service().full_name(), method.name());
        self.role.is_some_and(|role| allowed(&path).contains(&role))
    }
}

/// Sends each request at its extremes, as one caller: all of the methods that it may call, and every `STRIDE`-th of the
/// others, from `first` on.
async fn requests(
    scene: &Scene,
    pool: &DescriptorPool,
    (caller, enrolment): (&Caller, &Channel),
    first: usize,
) -> Result<(usize, Vec<String>)> {
    let (mut cases, mut at) = (Vec::new(), 0);
    for method in methods(pool) {
        // A session is a dialogue; `messages` tests it.
        if method.name() == "Connect" {
            continue;
        }
        let enrols = method.parent_service().name() == "EnrollmentService";
        let channel = if enrols { enrolment } else { &caller.channel };
        let may = caller.may(&method);
        // Nobody's role counts at the enrolment. One caller sends its requests in full.
        let whole = may || (enrols && caller.role == Some(Role::Admin));
        for extreme in extremes(&scene.base(&method)?) {
            // Counted over all methods together, so that a method with few fields is not left out.
            at += 1;
            if whole || at % STRIDE == first % STRIDE {
                cases.push((method.clone(), channel, extreme, may));
            }
        }
    }
    let count = cases.len();
    let wrong = futures_util::stream::iter(cases)
        .map(|(method, channel, extreme, may)| async move {
            let told = complaint(channel, &method, &extreme, may).await?;
            Some(format!("{}: {} {}: {told}", caller.who, method.name(), extreme.what))
        })
        .buffer_unordered(AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await;
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
    let enrolment = fleet.admin().anonymous().channel(fleet.addresses().enroll)?;
    let callers = Caller::all(&fleet, &scene).await?;

    let stop = AtomicBool::new(false);
    let sent = AtomicUsize::new(0);
    let begun = Instant::now();
    let at_work = async {
        let mut wrong = Vec::new();
        let (count, found) = messages(&fleet, &scene, &pool).await?;
        ensure!(count > 200, "only {count} messages of a node");
        println!("extremes: {count} messages of a node in {:?}\n{}", begun.elapsed(), found.join("\n"));
        sent.fetch_add(count, Ordering::Relaxed);
        wrong.extend(found);
        for (first, caller) in callers.iter().enumerate() {
            let (count, found) = requests(&scene, &pool, (caller, &enrolment), first).await?;
            let who = caller.who;
            println!(
                "extremes: {count} requests as {who}, {:?} after the begin\n{}",
                begun.elapsed(),
                found.join("\n")
            );
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
