//! Calls each method of the descriptor set, as each caller, on targets inside the scope, outside it, and both.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use integration_tests::client::reason;
use integration_tests::raw::call;
use marco_proto::v1::Role;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::scene::{Scene, api_token, user};
use crate::table::{Limit, Row, TABLE, TARGETS, Target};

/// A caller: its credentials, its role's letter, and whether it is limited to `room=in`.
struct Caller {
    name: &'static str,
    role: char,
    limited: bool,
    channel: Channel,
    bearer: Option<String>,
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
            callers.push(Caller { name, role: letter, limited: true, channel, bearer });
        }
    }
    for (letter, name, role) in
        roles.into_iter().chain([('p', "publisher", Role::Publisher), ('a', "admin", Role::Admin)])
    {
        let token = api_token(fleet, name, role, None).await?;
        for (channel, bearer) in [(fleet.user(name)?.channel(api)?, None), (anonymous.clone(), Some(token))] {
            callers.push(Caller { name, role: letter, limited: false, channel, bearer });
        }
    }
    let node = scene.node.channel(api)?;
    callers.push(Caller { name: "node", role: 'n', limited: false, channel: node, bearer: None });
    let wrong = format!("ma1.{}", "A".repeat(43));
    // A wrong token is an error, and does not fall back to the certificate.
    let admin = fleet.admin_channel();
    callers.push(Caller { name: "nobody", role: '-', limited: false, channel: anonymous, bearer: None });
    callers.push(Caller { name: "a wrong token", role: '-', limited: false, channel: admin, bearer: Some(wrong) });
    Ok(callers)
}

/// The expected outcome of a call.
fn expected(row: &Row, caller: &Caller, target: Target) -> &'static str {
    let (_, roles, limit, _) = row;
    if caller.role == '-' {
        return "UNAUTHENTICATED";
    }
    if !roles.contains(caller.role) {
        return "ROLE_NOT_ALLOWED";
    }
    let outside = match limit {
        Limit::Free | Limit::Filtered => false,
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
                let message = make(target, &scene.operations);
                let answer = call(&caller.channel, &path, message, caller.bearer.as_deref()).await;
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
            let answer = call(&caller.channel, &path, Vec::new(), caller.bearer.as_deref()).await;
            let expected = match caller.role {
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
