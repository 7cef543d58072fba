//! Clients by other people: grpcurl, and Python with generated stubs. And `marcoctl` in the hands of a new user.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::fleet::reboot;
use integration_tests::process::{Output, binary, run, tool, workspace};
use integration_tests::{Fleet, seconds};
use marco_proto::v1::Operation;
use marco_proto::v1::operation::State;

const TIME_OUT: Duration = seconds(120);

/// Calls grpcurl as an operator does: `options` go before the address, `arguments` after it.
async fn grpcurl(fleet: &Fleet, options: &[&str], arguments: &[&str]) -> Result<Output> {
    let certs = fleet.certs();
    let file = |name: &str| certs.join(name).display().to_string();
    let (ca, certificate, key) = (file("ca.crt"), file("admin.crt"), file("admin.key"));
    // The certificate names the host that the operator dials, so neither -authority nor -insecure is needed.
    let address = format!("localhost:{}", fleet.addresses().api.port());
    let mut all = vec!["-cacert", &ca, "-cert", &certificate, "-key", &key, "-max-time", "100"];
    all.extend_from_slice(options);
    all.push(&address);
    all.extend_from_slice(arguments);
    run(&tool("grpcurl")?, &all, TIME_OUT).await
}

/// Runs `marcoctl` against one of the fleet's ports, with the clock of Tokyo.
async fn marcoctl_at(fleet: &Fleet, port: u16, arguments: &[&str]) -> Result<Output> {
    let (program, certs) = (binary("marcoctl")?.display().to_string(), fleet.certs().display().to_string());
    let address = format!("localhost:{port}");
    let all = [&["TZ=Asia/Tokyo", &program, "--controller", &address, "--certs", &certs], arguments].concat();
    run(&tool("env")?, &all, TIME_OUT).await
}

#[tokio::test]
async fn marcoctl_explains_wrong_ports_and_empty_lists() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let (api, enroll, mirror) =
        (fleet.addresses().api.port(), fleet.addresses().enroll.port(), fleet.addresses().mirror.port());
    let asked = marcoctl_at(&fleet, mirror, &["nodes", "list"]).await?;
    assert!(asked.status.code() == Some(3) && asked.stderr.contains("file mirror"), "{asked:?}");
    assert!(asked.stderr.contains("1346") && !asked.stderr.contains("expired"), "{asked:?}");
    let asked = marcoctl_at(&fleet, enroll, &["nodes", "list"]).await?;
    assert!(asked.status.code() == Some(1) && asked.stderr.contains("enrolment (1347)"), "{asked:?}");
    for (list, said) in [
        ("nodes list", "no nodes\n"),
        ("tokens list", "no join tokens\n"),
        ("artifacts list", "no artifacts\n"),
        ("operations list", "no operations\n"),
        ("schedules list", "no schedules\n"),
        ("api-tokens list", "no API tokens\n"),
        ("certs list --subject nobody", "no certificates\n"),
        ("audit list --caller users/nobody", "no events\n"),
    ] {
        let shown = marcoctl_at(&fleet, api, &list.split(' ').collect::<Vec<_>>()).await?.success()?;
        assert_eq!(shown, said, "{list}");
    }
    Ok(())
}

#[tokio::test]
async fn marcoctl_shows_one_zone_in_lists_and_sentences() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    fleet.enrol_by_hand("pi-1", false).await?;
    let later = prost_types::Timestamp { seconds: 2_000_000_000, nanos: 0 };
    let asked = Operation { schedule_time: Some(later), ..reboot(&["pi-1"], Duration::ZERO) };
    let operation = fleet.create(asked).await?;
    let api = fleet.addresses().api.port();
    for command in ["get", "explain"] {
        let shown = marcoctl_at(&fleet, api, &["operations", command, &operation.name]).await?.success()?;
        assert!(shown.contains("2033-05-18 12:33:20 +09:00"), "{command}: {shown}");
        assert!(!shown.contains("T03:33:20"), "{command}: {shown}");
    }
    Ok(())
}

#[tokio::test]
async fn grpcurl_lists_the_services_by_reflection() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let listed = grpcurl(&fleet, &[], &["list"]).await?.success()?;
    for service in ["AgentService", "ArtifactService", "NodeService", "OperationService"] {
        let name = format!("marco.bootstrap.v1.{service}");
        assert!(listed.lines().any(|line| line == name), "{name} is not listed:\n{listed}");
    }
    assert!(listed.lines().any(|line| line == "grpc.health.v1.Health"), "{listed}");
    let described = grpcurl(&fleet, &[], &["describe", "marco.bootstrap.v1.OperationService"]).await?.success()?;
    assert!(described.contains("rpc CreateOperation"), "{described}");
    let health = grpcurl(&fleet, &[], &["grpc.health.v1.Health/Check"]).await?.success()?;
    assert!(health.contains("SERVING"), "{health}");

    // Reflection needs credentials too.
    let ca = fleet.certs().join("ca.crt").display().to_string();
    let address = format!("localhost:{}", fleet.addresses().api.port());
    let anonymous = run(&tool("grpcurl")?, &["-cacert", &ca, "-max-time", "20", &address, "list"], TIME_OUT).await?;
    assert!(!anonymous.status.success(), "{anonymous:?}");
    assert!(anonymous.stderr.contains("Unauthenticated"), "{anonymous:?}");
    Ok(())
}

#[tokio::test]
async fn grpcurl_creates_an_operation_with_the_short_body_and_watches_it() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let body = format!(r#"{{"operation":{{"reboot":{{}},"nodes":{{"nodes":["nodes/{id}"]}}}}}}"#);
    let create = ["marco.bootstrap.v1.OperationService/CreateOperation"];
    let created = grpcurl(&fleet, &["-d", &body], &create).await?.success()?;
    let created: serde_json::Value = serde_json::from_str(&created)?;
    let name = created["name"].as_str().context("no name")?;
    assert!(name.starts_with("operations/"), "{created}");
    assert_eq!(created["reboot"]["notice"], "120s", "the default is not shown: {created}");
    // Two minutes of notice are too long for a test, and enough to cancel.
    let cancel = ["marco.bootstrap.v1.OperationService/CancelOperation"];
    grpcurl(&fleet, &["-d", &format!(r#"{{"name":"{name}"}}"#)], &cancel).await?.success()?;
    fleet.ends(name, seconds(30), State::Cancelled).await?;

    let now = body.replace(r#""reboot":{}"#, r#""reboot":{"notice":"0s"}"#);
    let created: serde_json::Value = serde_json::from_str(&grpcurl(&fleet, &["-d", &now], &create).await?.success()?)?;
    let name = created["name"].as_str().context("no name")?;
    let watch = ["marco.bootstrap.v1.OperationService/WatchOperation"];
    let watched = grpcurl(&fleet, &["-d", &format!(r#"{{"name":"{name}"}}"#)], &watch).await?.success()?;
    let messages: Vec<serde_json::Value> =
        serde_json::Deserializer::from_str(&watched).into_iter().collect::<Result<_, _>>()?;
    let first = messages.first().context("nothing was watched")?;
    assert_eq!(first["operation"]["name"], name);
    assert_eq!(first["executions"].as_array().map(Vec::len), Some(1), "the first message is not everything: {first}");
    let last = messages.last().context("nothing was watched")?;
    assert_eq!(last["operation"]["state"], "STATE_SUCCEEDED", "{watched}");
    assert_eq!(fleet.pi(&id).reboots(&format!("{name}/executions/{id}"))?, 1);
    Ok(())
}

#[tokio::test]
async fn grpcurl_shows_the_reason_of_a_refusal_and_refuses_unknown_fields() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let create = ["marco.bootstrap.v1.OperationService/CreateOperation"];
    let body = r#"{"operation":{"reboot":{},"nodes":{"nodes":["nodes/nobody"]}}}"#;
    let refused = grpcurl(&fleet, &["-d", body], &create).await?;
    assert!(!refused.status.success() && refused.stderr.contains("nobody"), "{refused:?}");
    let misspelt = r#"{"operation":{"rebot":{},"all":{}}}"#;
    let refused = grpcurl(&fleet, &["-d", misspelt], &create).await?;
    assert!(!refused.status.success() && refused.stderr.contains("rebot"), "{refused:?}");
    Ok(())
}

/// Generates the stubs as grpcio-tools documents it.
async fn generate_stubs(to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    let proto = workspace().join("proto");
    let out = to.display().to_string();
    let include = format!("-I{}", proto.display());
    let (python, stubs) = (format!("--python_out={out}"), format!("--grpc_python_out={out}"));
    let files: Vec<String> = ["agent", "artifact", "node", "operation"]
        .map(|name| proto.join(format!("marco/bootstrap/v1/{name}.proto")).display().to_string())
        .into();
    let mut arguments = vec!["-m", "grpc_tools.protoc", &include, &python, &stubs];
    arguments.extend(files.iter().map(String::as_str));
    run(&tool("python")?, &arguments, TIME_OUT).await?.success()?;
    Ok(())
}

#[tokio::test]
async fn a_python_client_with_generated_stubs_creates_watches_and_cancels() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let stubs = fleet.dir().join("stubs");
    generate_stubs(&stubs).await?;
    let python = tool("python")?;
    let script = workspace().join("integration-tests/clients/client.py").display().to_string();
    let address = format!("localhost:{}", fleet.addresses().api.port());
    let (stubs, certs) = (stubs.display().to_string(), fleet.certs().display().to_string());
    let client = async |arguments: &[&str]| -> Result<String> {
        let mut all = vec![script.as_str(), &stubs, &address, &certs];
        all.extend_from_slice(arguments);
        Ok(run(&python, &all, TIME_OUT).await?.success()?.trim().to_owned())
    };

    let name = client(&["create", &id]).await?;
    let watched = client(&["watch", &name]).await?;
    let last = watched.lines().last().context("nothing was watched")?;
    assert!(last.starts_with("STATE_SUCCEEDED"), "{watched}");
    assert!(watched.contains(&format!("nodes/{id}=STATE_SUCCEEDED")), "{watched}");
    assert_eq!(fleet.pi(&id).reboots(&format!("{name}/executions/{id}"))?, 1);

    let later = client(&["create-later", &id]).await?;
    let cancelled = client(&["cancel", &later]).await?;
    assert!(["STATE_CANCELLED", "STATE_CANCELLING"].contains(&cancelled.as_str()), "{cancelled}");
    fleet.ends(&later, seconds(30), State::Cancelled).await?;
    Ok(())
}

/// Runs marcoctl against the fleet.
async fn marcoctl(fleet: &Fleet, arguments: &[&str]) -> Result<Output> {
    let (address, certs) = (format!("localhost:{}", fleet.addresses().api.port()), fleet.certs().display().to_string());
    let mut all = vec!["--controller", &address, "--certs", &certs];
    all.extend_from_slice(arguments);
    run(&binary("marcoctl")?, &all, TIME_OUT).await
}

#[tokio::test]
async fn marcoctl_does_the_daily_work() -> Result<()> {
    let fleet = Fleet::builder().pis(2).start().await?;
    let ids = fleet.ids().await?;
    // One node a page, so that a client that ignores page tokens fails.
    let nodes: serde_json::Value = serde_json::from_str(
        &marcoctl(&fleet, &["nodes", "list", "--page-size", "1", "--output", "json"]).await?.success()?,
    )?;
    let names: Vec<&str> =
        nodes["nodes"].as_array().context("no array")?.iter().filter_map(|n| n["name"].as_str()).collect();
    let wanted: Vec<String> = ids.iter().map(|id| format!("nodes/{id}")).collect();
    assert_eq!(names, wanted, "not all pages were fetched");

    let arguments =
        ["--output", "json", "operations", "reboot", &ids[0], "--notice", "0s", "--wait", "--timeout", "60s"];
    let done: serde_json::Value = serde_json::from_str(&marcoctl(&fleet, &arguments).await?.success()?)?;
    assert_eq!(done["state"], "STATE_SUCCEEDED");
    let name = done["name"].as_str().context("no name")?;
    assert_eq!(fleet.pi(&ids[0]).reboots(&format!("{name}/executions/{}", ids[0]))?, 1);

    let refused = marcoctl(&fleet, &["operations", "reboot", "nobody"]).await?;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(refused.stderr.contains("nobody") && refused.stdout.is_empty(), "{refused:?}");
    assert_eq!(marcoctl(&fleet, &["operations", "reboot"]).await?.status.code(), Some(2));
    let late =
        marcoctl(&fleet, &["operations", "reboot", &ids[1], "--notice", "1h", "--wait", "--timeout", "1s"]).await?;
    assert_eq!(late.status.code(), Some(4), "{late:?}");
    // Nothing listens on port 1.
    let nobody = run(
        &binary("marcoctl")?,
        &["--controller", "localhost:1", "--certs", &fleet.certs().display().to_string(), "nodes", "list"],
        TIME_OUT,
    )
    .await?;
    assert_eq!(nobody.status.code(), Some(3), "{nobody:?}");

    let empty: serde_json::Value =
        serde_json::from_str(&marcoctl(&fleet, &["artifacts", "list", "--output", "json"]).await?.success()?)?;
    assert_eq!(empty, serde_json::json!({ "artifacts": [] }));
    let token = marcoctl(&fleet, &["--output", "json", "tokens", "create", "--max-uses", "3", "--ttl", "10m"]).await?;
    let token: serde_json::Value = serde_json::from_str(&token.success()?)?;
    assert!(token["token"].as_str().is_some_and(|secret| secret.len() > 60), "{token}");
    assert_eq!(token["maxUses"], 3);
    Ok(())
}

#[tokio::test]
async fn what_the_controller_prints_at_its_start_works_as_it_is() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let printed = std::fs::read_to_string(fleet.dir().join("controller.log"))?;
    let line = printed.lines().find_map(|line| line.find("grpcurl ").map(|at| line.split_at(at).1));
    let line = line.context("no grpcurl line")?;
    // Runs the printed line unchanged in a shell; only PATH is extended.
    let path = format!("{}:{}", tool("grpcurl")?.parent().context("a folder")?.display(), std::env::var("PATH")?);
    let arguments = ["-c", &format!("PATH='{path}'; {line}")];
    let answer = run(Path::new("/bin/sh"), &arguments, TIME_OUT).await?;
    answer.success().with_context(|| line.to_owned())?;
    for address in [fleet.addresses().api, fleet.addresses().enroll] {
        assert!(printed.contains(&address.port().to_string()), "{address} is not printed:\n{printed}");
    }
    Ok(())
}
