//! Calls each method of the descriptor set, as each caller, on targets inside the scope, outside it, and both.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};
use integration_tests::Fleet;
use integration_tests::certs::NodeKey;
use integration_tests::client::{Credentials, reason};
use integration_tests::raw::call;
use marco_proto::names::PROTOCOL_VERSION;
use marco_proto::v1::{ConnectRequest, Hello, NodeMode, QuarantineNodeRequest, Role, connect_request};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::scene::{Scene, api_token, enrollment, user, wish};
use crate::table::{Limit, Row, TABLE, TARGETS, Target};

/// Name of the caller that is a node and waits for approval.
const HELD: &str = "a held node";
/// The board of a node with two keys.
const SERIAL: &str = "10000000abcdef42";

/// A caller: its credentials, its role's letter, and whether it is limited to `room=in`.
struct Caller {
    name: &'static str,
    role: char,
    limited: bool,
    channel: Channel,
    bearer: Option<String>,
    /// The reason with which each of its calls is refused. Its connection is closed then, so each call has its own.
    shut_out: Option<(&'static str, Credentials)>,
}

impl Caller {
    fn channel(&self, scene: &Scene) -> Result<Channel> {
        match &self.shut_out {
            Some((_, who)) => who.channel(scene.fleet.addresses().api),
            None => Ok(self.channel.clone()),
        }
    }
}

fn methods() -> BTreeSet<String> {
    let set = FileDescriptorSet::decode(marco_proto::DESCRIPTOR_SET).unwrap();
    let ours = set.file.iter().filter(|file| file.package() == "marco.bootstrap.v1");
    ours.flat_map(|file| &file.service)
        .flat_map(|service| {
            service.method.iter().map(|method| format!("{}/{}", service.name(), method.name())).collect::<Vec<_>>()
        })
        .collect()
}

async fn callers(scene: &Scene) -> Result<Vec<Caller>> {
    let fleet = &scene.fleet;
    let api = fleet.addresses().api;
    let anonymous = fleet.admin().anonymous().channel(api)?;
    let mut callers = Vec::new();
    // The limited callers come first: calls of the others might delete their targets.
    let roles = [('v', "viewer", Role::Viewer), ('o', "operator", Role::Operator)];
    for (letter, name, role) in roles {
        let limited = user(fleet, &format!("limited-{name}"), role, Some("in")).await?;
        let token = api_token(fleet, &format!("limited-{name}"), role, Some("in")).await?;
        for (channel, bearer) in [(limited.channel(api)?, None), (anonymous.clone(), Some(token))] {
            callers.push(Caller { name, role: letter, limited: true, channel, bearer, shut_out: None });
        }
    }
    for (letter, name, role) in
        roles.into_iter().chain([('p', "publisher", Role::Publisher), ('a', "admin", Role::Admin)])
    {
        let token = api_token(fleet, name, role, None).await?;
        for (channel, bearer) in [(fleet.user(name)?.channel(api)?, None), (anonymous.clone(), Some(token))] {
            callers.push(Caller { name, role: letter, limited: false, channel, bearer, shut_out: None });
        }
    }
    let node = scene.node.channel(api)?;
    let of = |name, role, channel, bearer| Caller { name, role, limited: false, channel, bearer, shut_out: None };
    callers.push(of("node", 'n', node, None));
    // Not the node of any target.
    callers.push(of(HELD, 'n', fleet.enrol_by_hand("held", true).await?.channel(api)?, None));
    let shut_out =
        [("KEY_AWAITS_APPROVAL", pending_key(scene).await?), ("NODE_QUARANTINED", quarantined(fleet).await?)];
    for (reason, who) in shut_out {
        let channel = who.channel(api)?;
        callers.push(Caller { shut_out: Some((reason, who)), ..of("a node that is shut out", 'n', channel, None) });
    }
    let wrong = format!("ma1.{}", "A".repeat(43));
    // A wrong token is an error, and does not fall back to the certificate.
    let admin = fleet.admin_channel();
    callers.push(of("nobody", '-', anonymous, None));
    callers.push(of("a wrong token", '-', admin, Some(wrong)));
    Ok(callers)
}

/// A key that waits for approval, of a node that is approved with another one.
async fn pending_key(scene: &Scene) -> Result<Credentials> {
    let fleet = &scene.fleet;
    let (first, second) = (NodeKey::generate()?, NodeKey::generate()?);
    let mut client = enrollment(fleet, fleet.addresses().enroll)?;
    client.enroll(wish(&fleet.token(1).await?, &first, "two-keys", SERIAL)?).await?;
    let enrolled = client.enroll(wish(&fleet.token(1).await?, &second, "", SERIAL)?).await?.into_inner();
    ensure!(enrolled.held && enrolled.node == "nodes/two-keys", "{enrolled:?}");
    Ok(Credentials { ca: enrolled.ca_certificate, identity: Some((enrolled.certificate, second.pem())) })
}

async fn quarantined(fleet: &Fleet) -> Result<Credentials> {
    let who = fleet.enrol_by_hand("quarantined", false).await?;
    let request = QuarantineNodeRequest { name: "quarantined".to_owned(), reason: "a test".to_owned() };
    fleet.nodes().quarantine_node(request).await?;
    Ok(who)
}

fn hello() -> Vec<u8> {
    let hello = Hello {
        protocol_version: PROTOCOL_VERSION,
        boot_id: "7f2c0e56-0f0c-4c8b-9a3e-0d1f5a7b9c11".to_owned(),
        mode: NodeMode::Running.into(),
        agent_version: "0".to_owned(),
        ..Hello::default()
    };
    ConnectRequest { message: Some(connect_request::Message::Hello(hello)) }.encode_to_vec()
}

/// The expected outcome of a call.
fn expected(row: &Row, caller: &Caller, target: Target) -> &'static str {
    let (_, roles, limit, _) = row;
    if let Some((reason, _)) = &caller.shut_out {
        return reason;
    }
    if caller.role == '-' {
        return "UNAUTHENTICATED";
    }
    if !roles.contains(caller.role) {
        return "ROLE_NOT_ALLOWED";
    }
    let outside = match limit {
        Limit::Free | Limit::Filtered => false,
        // A node may read only itself.
        Limit::Any | Limit::All if caller.name == HELD => true,
        Limit::Any => target == Target::Outside,
        // A single node is either inside or outside.
        Limit::All => target == Target::Outside || (target == Target::Both && !row.0.starts_with("NodeService/")),
    };
    match (caller.role, outside) {
        ('n', true) => "NOT_YOURS",
        (_, true) if caller.limited => "OUTSIDE_SCOPE",
        _ => "let in",
    }
}

fn got(answer: &Result<bytes::Bytes, Status>) -> String {
    match answer {
        Err(status) if status.code() == Code::Unauthenticated => "UNAUTHENTICATED".to_owned(),
        Err(status) if status.code() == Code::PermissionDenied => reason(status),
        Err(status)
            if matches!(
                status.code(),
                Code::Unavailable | Code::Internal | Code::Unknown | Code::DeadlineExceeded | Code::Unimplemented
            ) =>
        {
            format!("{status:?}")
        }
        // Any other error, such as NOT_FOUND, comes from behind the gate: the caller was let in.
        Ok(_) | Err(_) => "let in".to_owned(),
    }
}

fn holds(answer: &bytes::Bytes, id: &str) -> bool {
    answer.windows(id.len()).any(|bytes| bytes == id.as_bytes())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_method_is_for_whom_the_table_says_on_targets_inside_outside_and_both() -> Result<()> {
    let listed: BTreeSet<String> = TABLE.iter().map(|row| row.0.to_owned()).collect();
    // A new method fails here until someone has decided about its callers.
    assert_eq!(listed, methods(), "a method has no row, or a row no method");
    let mut scene = Scene::set().await?;
    let callers = callers(&scene).await?;
    let (mut calls, mut wrong) = (0, Vec::new());
    for row in TABLE {
        let (method, _, limit, make) = row;
        let path = format!("/marco.bootstrap.v1.{method}");
        for caller in &callers {
            for target in TARGETS {
                // An admin's call may have deleted them.
                if method.starts_with("ScheduleService/") {
                    scene.schedules().await?;
                }
                // A session is refused at its Hello, where the refusal is recorded.
                let message = match caller.shut_out {
                    Some(_) if *method == "AgentService/Connect" => hello(),
                    _ => make(target, &scene.operations),
                };
                let answer = call(&caller.channel(&scene)?, &path, message, caller.bearer.as_deref()).await;
                calls += 1;
                let (got, expected) = (got(&answer), expected(row, caller, target));
                let shown = if caller.bearer.is_some() { "a token" } else { "a certificate" };
                let what = format!("{method} by {} ({shown}, limited: {}) on {target:?}", caller.name, caller.limited);
                if got != expected {
                    wrong.push(format!("{what}: {got}, not {expected}"));
                }
                if let Err(status) = &answer
                    && got == "OUTSIDE_SCOPE"
                    // A refusal that names the node would tell that it exists.
                    && status.message().contains("out-1")
                {
                    wrong.push(format!("{what}: names what lies outside: {}", status.message()));
                }
                if let Ok(bytes) = &answer
                    && caller.limited
                    && *limit != Limit::Free
                {
                    if holds(bytes, "out-1") {
                        wrong.push(format!("{what}: shows what lies outside"));
                    }
                    if *limit == Limit::Filtered && !holds(bytes, "in-") {
                        wrong.push(format!("{what}: does not show what lies inside"));
                    }
                }
            }
        }
    }
    if !wrong.is_empty() {
        bail!("{} of {calls} calls:\n{}", wrong.len(), wrong.join("\n"));
    }
    assert_eq!(calls, TABLE.len() * callers.len() * TARGETS.len());
    scene.fleet.went_well();
    Ok(())
}

/// Health and reflection need credentials too, and unknown methods are refused like forbidden ones.
#[tokio::test]
async fn health_reflection_and_what_is_not_there_are_behind_the_gate_too() -> Result<()> {
    let mut scene = Scene::set().await?;
    let callers = callers(&scene).await?;
    let reflection = |version: &str| format!("/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
    for (path, may) in [
        ("/grpc.health.v1.Health/Check".to_owned(), true),
        ("/grpc.health.v1.Health/Watch".to_owned(), true),
        (reflection("v1"), true),
        (reflection("v1alpha"), true),
        ("/marco.bootstrap.v1.NodeService/Explode".to_owned(), false),
        ("/".to_owned(), false),
    ] {
        for caller in &callers {
            let answer = call(&caller.channel(&scene)?, &path, Vec::new(), caller.bearer.as_deref()).await;
            let expected = match caller.role {
                _ if caller.shut_out.is_some() => caller.shut_out.as_ref().map_or("", |(reason, _)| *reason),
                '-' => "UNAUTHENTICATED",
                _ if may => "let in",
                _ => "ROLE_NOT_ALLOWED",
            };
            assert_eq!(got(&answer), expected, "{path} by {}", caller.name);
        }
    }
    scene.fleet.went_well();
    Ok(())
}
