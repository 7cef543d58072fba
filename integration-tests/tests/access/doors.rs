//! Certificates and labels: changes that only an admin may make, and changes that act without a restart.

use anyhow::{Context as _, Result};
use integration_tests::client::reason;
use integration_tests::fleet::{execution_name, reboot};
use integration_tests::process::{Recipe, binary, run, tool};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::{CreateOperationRequest, ListNodesRequest, Node, Role, UpdateNodeRequest, execution, operation};
use prost_types::FieldMask;
use tonic::transport::Channel;

use crate::scene::{later, node, room, user};

fn relabel(id: &str, value: &str, more: &[(&str, &str)]) -> UpdateNodeRequest {
    let mut labels = room(value);
    labels.extend(more.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    UpdateNodeRequest {
        node: Some(Node { name: format!("nodes/{id}"), labels, ..Node::default() }),
        update_mask: Some(FieldMask { paths: vec!["labels".to_owned()] }),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_an_admin_changes_a_label_that_limits_somebody() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    node(&fleet, "in-1", "in").await?;
    let mut pat = NodeServiceClient::new(fleet.user("operator")?.channel(fleet.addresses().api)?);
    pat.update_node(relabel("in-1", "in", &[("colour", "red")])).await?;
    // Moving a node out of someone's scope, or into it, is a change of their rights.
    pat.update_node(relabel("in-1", "elsewhere", &[])).await.context("nobody is limited by it yet")?;
    fleet.nodes().update_node(relabel("in-1", "in", &[])).await?;
    let kim = user(&fleet, "kim", Role::Operator, Some("in")).await?;
    let mut kim = NodeServiceClient::new(kim.channel(fleet.addresses().api)?);
    for client in [&mut pat, &mut kim] {
        let status = client.update_node(relabel("in-1", "elsewhere", &[])).await.unwrap_err();
        assert_eq!(reason(&status), "LABEL_RESERVED");
        client.update_node(relabel("in-1", "in", &[("colour", "blue")])).await?;
    }
    fleet.nodes().update_node(relabel("in-1", "elsewhere", &[])).await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_leaves_the_scope_before_it_is_due_is_not_touched() -> Result<()> {
    let mut fleet = Fleet::builder().pis(2).start().await?;
    let ids = fleet.ids().await?;
    for id in &ids {
        fleet.nodes().update_node(relabel(id, "in", &[])).await?;
    }
    let kim = user(&fleet, "kim", Role::Operator, Some("in")).await?;
    let mut kim: OperationServiceClient<Channel> = OperationServiceClient::new(kim.channel(fleet.addresses().api)?);
    let due = std::time::SystemTime::now() + seconds(4);
    let operation = operation::Target::All(marco_proto::v1::AllNodes {});
    let operation = marco_proto::v1::Operation {
        schedule_time: Some(due.into()),
        target: Some(operation),
        ..reboot(&[&ids[0]], seconds(0))
    };
    let request = CreateOperationRequest { operation: Some(operation), request_id: String::new() };
    let created = kim.create_operation(request).await?.into_inner();
    fleet.nodes().update_node(relabel(&ids[1], "out", &[])).await?;
    let done = fleet.ends(&created.name, seconds(60), operation::State::Failed).await?;
    let outside = fleet.execution(&done.name, &ids[1]).await?;
    assert_eq!(outside.state(), execution::State::Cancelled);
    assert_eq!(outside.error.context("no reason")?.reason, "OUTSIDE_SCOPE");
    assert_eq!(fleet.execution(&done.name, &ids[0]).await?.state(), execution::State::Succeeded);
    assert_eq!(fleet.pi(&ids[0]).reboots(&execution_name(&done, &ids[0]))?, 1);
    assert_eq!(fleet.pi(&ids[1]).reboots(&execution_name(&done, &ids[1]))?, 0);
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpcurl_and_marcoctl_need_a_token_and_no_certificate() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    node(&fleet, "in-1", "in").await?;
    fleet.create(later(&["in-1"])).await?;
    let address = format!("localhost:{}", fleet.addresses().api.port());
    let certs = fleet.certs().display().to_string();
    let marcoctl = async |arguments: &[&str]| {
        let mut all = vec!["--controller", &address, "--certs", &certs];
        all.extend_from_slice(arguments);
        run(&binary("marcoctl")?, &all, seconds(60)).await
    };
    let token = marcoctl(&["api-tokens", "create", "script", "--role", "viewer"]).await?.success()?.trim().to_owned();
    assert!(token.starts_with("ma1."), "{token}");
    let header = format!("authorization: Bearer {token}");
    let ca = fleet.certs().join("ca.crt").display().to_string();
    let listed = ["-cacert", &ca, "-H", &header, &address, "marco.bootstrap.v1.NodeService/ListNodes"];
    let listed = run(&tool("grpcurl")?, &listed, seconds(60)).await?.success()?;
    assert!(listed.contains("nodes/in-1"), "{listed}");

    let file = fleet.dir().join("api-token");
    std::fs::write(&file, &token)?;
    let file = file.display().to_string();
    let by_token = ["--api-token-file", &file, "--identity", "nobody", "nodes", "list"];
    assert!(marcoctl(&by_token).await?.success()?.contains("in-1"));
    let refused = marcoctl(&["--api-token-file", &file, "nodes", "approve", "in-1"]).await?;
    assert!(refused.status.code() == Some(1) && refused.stderr.contains("ROLE_NOT_ALLOWED"), "{refused:?}");

    // A user whose key is made on this machine, readable to its owner only; revoked afterwards.
    let out = fleet.dir().join("kim").display().to_string();
    marcoctl(&["users", "create", "kim", "--role", "operator", "--selector", "room=in", "--out", &out])
        .await?
        .success()?;
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(fleet.dir().join("kim/kim.key"))?.permissions());
    assert_eq!(mode & 0o777, 0o600);
    let as_kim = ["--controller", &address, "--certs", &out, "--identity", "kim", "nodes", "list"];
    assert!(run(&binary("marcoctl")?, &as_kim, seconds(60)).await?.success()?.contains("in-1"));
    let users = marcoctl(&["users", "list"]).await?.success()?;
    assert!(users.contains("kim") && users.contains("room=in") && users.contains("admin"), "{users}");
    assert!(marcoctl(&["certs", "list", "--subject", "kim"]).await?.success()?.contains("OPERATOR"));
    marcoctl(&["users", "revoke", "kim"]).await?.success()?;
    assert!(run(&binary("marcoctl")?, &as_kim, seconds(60)).await?.stderr.contains("CERTIFICATE_REVOKED"));
    let audit = marcoctl(&["audit", "list", "--refused", "--limit", "5", "-o", "json"]).await?.success()?;
    let audit: serde_json::Value = serde_json::from_str(&audit)?;
    assert!(audit["auditEvents"].as_array().is_some_and(|events| !events.is_empty() && events.len() <= 5), "{audit}");
    let yourself = marcoctl(&["users", "revoke", "admin"]).await?;
    assert!(yourself.stderr.contains("YOURSELF"), "{yourself:?}");
    fleet.went_well();
    Ok(())
}

/// Runs another controller with the fleet's CA for a moment, and returns its certificates folder.
async fn pair_of_another_controller(fleet: &Fleet) -> Result<std::path::PathBuf> {
    let (data, certs) = (fleet.dir().join("further-data"), fleet.dir().join("further-certs"));
    std::fs::create_dir_all(data.join("pki"))?;
    std::fs::create_dir_all(&certs)?;
    std::fs::copy(fleet.data().join("pki/ca.key"), data.join("pki/ca.key"))?;
    std::fs::copy(fleet.certs().join("ca.crt"), certs.join("ca.crt"))?;
    let mut arguments: Vec<String> = vec!["serve".to_owned()];
    // Any free ports: it only has to issue its certificate.
    let nowhere = || "127.0.0.1:0".to_owned();
    for (flag, value) in [
        ("--data-dir", data.display().to_string()),
        ("--certs", certs.display().to_string()),
        ("--listen", nowhere()),
        ("--enroll-listen", nowhere()),
    ] {
        arguments.extend([flag.to_owned(), value]);
    }
    let log = fleet.dir().join("further.log");
    let _process = Recipe::new(binary("marco-controller")?, arguments, log.clone()).start()?;
    wait_until(seconds(60), "the further controller runs", async || {
        Ok(std::fs::read_to_string(&log).unwrap_or_default().contains("Try:").then_some(()))
    })
    .await?;
    Ok(certs)
}

/// The certificate that a listener presents, PEM.
async fn presented(address: std::net::SocketAddr) -> Result<String> {
    let script = "import socket, ssl, sys; c = ssl._create_unverified_context(); c.set_alpn_protocols(['h2']); \
                  s = c.wrap_socket(socket.create_connection((sys.argv[1], int(sys.argv[2])))); \
                  print(ssl.DER_cert_to_PEM_cert(s.getpeercert(True)))";
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    run(&tool("python3")?, &["-c", script, &host, &port], seconds(30)).await?.success()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_server_certificate_is_presented_without_a_restart() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let file = fleet.certs().join("controller.crt");
    let before = std::fs::read_to_string(&file)?;
    // Another certificate and key of the same CA, as an operator would install them. Another controller made this pair
    // for itself.
    let other = pair_of_another_controller(&fleet).await?;
    let fresh = std::fs::read_to_string(other.join("controller.crt"))?;
    assert_ne!(before, fresh);
    // Between the two copies the files do not match. The controller then keeps its present pair, and looks again.
    std::fs::copy(other.join("controller.key"), fleet.certs().join("controller.key"))?;
    std::fs::copy(other.join("controller.crt"), &file)?;
    wait_until(seconds(30), "the new certificate is presented", async || {
        let log = fleet.controller_log(0)?;
        Ok(log.contains("the new one is presented").then_some(()))
    })
    .await?;
    assert_eq!(presented(fleet.addresses().api).await?.trim(), fresh.replace("\r\n", "\n").trim());
    // A broken file is not used, and the previous certificate stays.
    std::fs::write(&file, "nonsense")?;
    wait_until(seconds(30), "it is said that it is not used", async || {
        Ok(fleet.controller_log(0)?.contains("is not used").then_some(()))
    })
    .await?;
    assert_eq!(presented(fleet.addresses().enroll).await?.trim(), fresh.replace("\r\n", "\n").trim());
    fleet.nodes().list_nodes(ListNodesRequest::default()).await?;
    fleet.went_well();
    Ok(())
}
