//! Hostile texts in each field of each RPC: a program may run, open or choke on them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::certs::NodeKey;
use integration_tests::client::{Credentials, reason};
use integration_tests::dynamic::{call, methods, pool, put, shown, texts};
use integration_tests::fleet::{Addresses, poweroff, reboot};
use integration_tests::image::{Compression, make_image};
use integration_tests::postgres::Postgres;
use integration_tests::process::{Recipe, binary, tool};
use integration_tests::upload::push;
use integration_tests::{Database, Fleet, seconds, wait_until};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::operation::Action;
use marco_proto::v1::{Board, EnrollRequest, ListNodesRequest, Operation, PowerOff, Reboot};
use prost_reflect::{DynamicMessage, MethodDescriptor};
use tonic::Code;

/// Texts for shells, paths, terminals, C strings and databases, and one of a megabyte.
fn payloads() -> [(&'static str, String); 5] {
    [
        (
            "shell",
            "; touch /tmp/marco-was-run & $(touch /tmp/marco-was-run) `touch /tmp/marco-was-run` | > < * ? ~ ' \" \\ -rf --help %s {} [ ] # !".to_owned(),
        ),
        ("path", "../../../../etc/passwd".to_owned()),
        ("nul", "a\0b".to_owned()),
        ("sql", "'; DROP TABLE nodes; -- \u{1b}[2J\u{202e}".to_owned()),
        ("megabyte", "x".repeat(1_000_000)),
    ]
}

/// Enrols a node by hand, and returns its credentials.
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

/// Names of existing resources for requests that fail only because of the text, so that code behind the first check is
/// tested.
struct Sensible {
    node: String,
    operation: String,
    artifact: String,
}

impl Sensible {
    async fn make(fleet: &Fleet) -> Result<Self> {
        let id = fleet.ids().await?.first().context("a node")?.clone();
        let image = make_image(fleet.dir(), "texts", Compression::Zstd)?;
        let artifact = push(&mut fleet.artifacts(), "texts", Kind::Image, Purpose::Unspecified, &image).await?;
        let operation = fleet.create(reboot(&[&id], seconds(600))).await?;
        Ok(Self { node: format!("nodes/{id}"), operation: operation.name, artifact: artifact.name })
    }

    /// Fills in existing names, by words in the names of methods and fields.
    fn request(&self, method: &MethodDescriptor) -> DynamicMessage {
        let mut request = DynamicMessage::new(method.input());
        for place in texts(&method.input()) {
            let path = shown(&place);
            let name = match (path.as_str(), method.name()) {
                ("name" | "parent", name) if name.contains("Execution") => {
                    format!("{}/executions/{}", self.operation, self.node.trim_start_matches("nodes/"))
                }
                ("name" | "parent", name) if name.contains("Operation") || name.contains("Event") => {
                    self.operation.clone()
                }
                ("name" | "parent" | "node.name", name) if name.contains("Node") => self.node.clone(),
                ("name" | "parent", name) if name.contains("Artifact") => self.artifact.clone(),
                (path, _) if path.ends_with("nodes.nodes") => self.node.clone(),
                _ => continue,
            };
            put(&mut request, &place, &name);
        }
        request
    }
}

/// Codes with which a text may be refused. A request that succeeds must have taken the text literally.
const REFUSALS: [Code; 9] = [
    Code::InvalidArgument,
    Code::NotFound,
    Code::FailedPrecondition,
    Code::AlreadyExists,
    Code::OutOfRange,
    Code::PermissionDenied,
    Code::Unauthenticated,
    Code::Aborted,
    Code::ResourceExhausted,
];

async fn every_text_of_every_rpc(database: Database) -> Result<()> {
    let mut fleet = Fleet::builder().database(database).pis(0).start().await?;
    node(&fleet, "somebody").await?;
    let speaker = node(&fleet, "speaker").await?.channel(fleet.addresses().api)?;
    let anonymous = fleet.admin().anonymous().channel(fleet.addresses().enroll)?;
    let sensible = Sensible::make(&fleet).await?;
    let pool = pool()?;
    let (mut calls, mut wrong) = (0, Vec::new());
    let mut taken: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for method in methods(&pool) {
        let channel = match method.parent_service().name() {
            "AgentService" => speaker.clone(),
            "EnrollmentService" => anonymous.clone(),
            _ => fleet.admin_channel(),
        };
        for place in texts(&method.input()) {
            for (kind, text) in payloads() {
                let mut request = sensible.request(&method);
                put(&mut request, &place, &text);
                let what = format!("{}/{} {} {kind}", method.parent_service().name(), method.name(), shown(&place));
                calls += 1;
                // A watch that was accepted may have no message to send.
                let answer = tokio::time::timeout(seconds(3), call(&channel, &method, &request)).await;
                match answer {
                    Err(_) if method.is_server_streaming() => {}
                    Err(_) => wrong.push(format!("{what}: no answer")),
                    // Only an answer that repeats the text has stored it: fields that the controller alone writes are
                    // ignored in requests.
                    Ok(Ok(answer)) if has(&answer, text.as_bytes()) => {
                        taken.entry(kind).or_default().insert(what);
                    }
                    Ok(Ok(_)) => {}
                    Ok(Err(status)) if !REFUSALS.contains(&status.code()) => wrong.push(format!("{what}: {status:?}")),
                    Ok(Err(status)) if status.message().len() > 2000 => {
                        wrong.push(format!("{what}: its answer has {} bytes", status.message().len()));
                    }
                    // Limits of the connection have no reason of ours.
                    Ok(Err(status)) if reason(&status).is_empty() && status.code() == Code::InvalidArgument => {
                        wrong.push(format!("{what}: no reason for programs: {status:?}"));
                    }
                    Ok(Err(_)) => {}
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {calls}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(calls > 500, "only {calls} calls were made");
    // No field keeps a NUL or a megabyte: a text longer than its field is refused.
    for kind in ["nul", "megabyte"] {
        assert!(!taken.contains_key(kind), "{:#?}", taken.get(kind));
    }
    // The control: if no field took any text, the test did not reach the store.
    assert!(taken.contains_key("shell"), "nothing was taken literally, so nothing was tried: {taken:?}");
    fleet.nodes().list_nodes(ListNodesRequest::default()).await?;
    let log = fleet.controller_log(0)?;
    assert!(!log.contains("panicked"), "something panicked");
    assert!(!std::path::Path::new("/tmp/marco-was-run").exists(), "a text was run");
    fleet.went_well();
    Ok(())
}

fn has(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

#[tokio::test]
async fn every_text_of_every_rpc_is_refused_or_taken_literally() -> Result<()> {
    every_text_of_every_rpc(Database::Sqlite).await
}

#[tokio::test]
async fn on_postgres_too() -> Result<()> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    every_text_of_every_rpc(Database::Url(url)).await
}

/// Runs the real agent on this machine under strace. The operation's command does nothing. Returns all programs that
/// were started.
async fn traced(fleet: &Fleet, id: &str, operation: Operation) -> Result<String> {
    let dir = fleet.dir().join(id);
    std::fs::create_dir(&dir)?;
    let (token, config, trace) = (dir.join("token"), dir.join("agent.toml"), dir.join("trace"));
    std::fs::write(&token, fleet.token(1).await?)?;
    let Addresses { api, enroll, .. } = fleet.addresses();
    std::fs::write(
        &config,
        format!(
            "controllers = [\"{api}\"]\nenroll = [\"{enroll}\"]\ntoken_file = {token:?}\nname = \"{id}\"\n\
             state_dir = {dir:?}\nidentity_dir = {dir:?}\nshutdown_command = [\"/bin/true\", \"first argument\"]\n"
        ),
    )?;
    let strace = ["-f", "-qq", "-s", "4096", "-e", "trace=execve", "-o"].map(str::to_owned).into_iter();
    // A killed strace detaches from its tracee, so the agent asks to be killed with it.
    let until = [tool("setpriv")?, "--pdeathsig".into(), "KILL".into()];
    let agent = [binary("marco-agent")?, "run".into(), "--config".into(), config];
    let arguments =
        strace.chain([trace.clone()].into_iter().chain(until).chain(agent).map(|path| path.display().to_string()));
    let mut agent = Recipe::new(tool("strace")?, arguments, dir.join("log")).start()?;
    wait_until(seconds(60), "the traced agent is connected", async || {
        Ok(fleet.node(id).await.is_ok_and(|node| node.connected).then_some(()))
    })
    .await?;
    fleet.create(operation).await?;
    wait_until(seconds(30), "the agent gives the command", async || {
        Ok(std::fs::read_to_string(&trace)?.contains("\"/bin/true\"").then_some(()))
    })
    .await?;
    agent.kill().await?;
    // The trace is complete only after the agent has ended.
    wait_until(seconds(30), "the agent has ended as well", async || {
        Ok((!fleet.node(id).await?.connected).then_some(()))
    })
    .await?;
    Ok(std::fs::read_to_string(&trace)?)
}

#[tokio::test]
async fn an_agent_runs_no_shell_whatever_the_message_says() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let message =
        "; touch /tmp/marco-was-run $(touch /tmp/marco-was-run) `touch /tmp/marco-was-run` ../../etc -P --help 'x' | &";
    let notice = Some(prost_types::Duration::default());
    let (mut restart, mut off) = (reboot(&["restarts"], Duration::ZERO), poweroff(&["goes-off"]));
    restart.action = Some(Action::Reboot(Reboot { notice, message: message.to_owned() }));
    off.action = Some(Action::PowerOff(PowerOff { notice, message: message.to_owned() }));
    let traces = tokio::try_join!(traced(&fleet, "restarts", restart), traced(&fleet, "goes-off", off))?;
    for trace in [traces.0, traces.1] {
        let started = trace.lines().filter_map(|line| line.split("execve(\"").nth(1)?.split('"').next());
        let programs: BTreeSet<&str> = started.collect();
        let ours = ["/marco-agent", "/setpriv"];
        let known = |program: &str| {
            ours.iter().any(|name| program.ends_with(name)) || ["/bin/true", "/usr/bin/wall"].contains(&program)
        };
        assert!(programs.iter().all(|program| known(program)), "the agent ran {programs:?}");
        assert!(trace.contains(message), "the message did not arrive as part of one argument:\n{trace}");
    }
    assert!(!std::path::Path::new("/tmp/marco-was-run").exists(), "the message was run");
    fleet.went_well();
    Ok(())
}
