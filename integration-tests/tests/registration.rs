//! Registration of nodes: with a token, from a file on the card, and by renewal of a certificate.

use anyhow::{Context as _, Result};
use integration_tests::certs::NodeKey;
use integration_tests::client::Credentials;
use integration_tests::process::{Output, binary, run};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::{
    Board, CardLayout, CreateJoinTokenRequest, EnrollRequest, EnrollResponse, NodeMode, RenewCertificateRequest,
    RevokeJoinTokenRequest, WatchNodesRequest, node,
};
use tonic::transport::Channel;
use tonic::{Code, Status};

fn enrollment(fleet: &Fleet) -> Result<EnrollmentServiceClient<Channel>> {
    Ok(EnrollmentServiceClient::new(fleet.admin().anonymous().channel(fleet.addresses().enroll)?))
}

/// Enrols a node by hand.
async fn enroll(fleet: &Fleet, key: &NodeKey, token: &str, id: &str) -> Result<Result<EnrollResponse, Status>> {
    let request = EnrollRequest {
        token: token.to_owned(),
        certificate_request: key.request(key)?.pem,
        node_id: id.to_owned(),
        board: Some(Board { serial: format!("10000000{:08x}", id.len()), ..Board::default() }),
    };
    Ok(enrollment(fleet)?.enroll(request).await.map(tonic::Response::into_inner))
}

#[tokio::test]
async fn a_token_is_all_that_a_pi_needs_to_appear_with_the_facts_of_its_board() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let nodes = fleet.list_nodes().await?;
    let [node] = nodes.as_slice() else { anyhow::bail!("not one node: {nodes:?}") };
    let id = node.name.strip_prefix("nodes/").context("a full name")?;
    let board = node.board.as_ref().context("no board")?;
    assert!(board.model.contains("Raspberry Pi 4"), "{board:?}");
    assert_eq!(board.family, "pi4");
    assert_eq!(board.serial.len(), 16, "{board:?}");
    assert!(board.memory_bytes > 0 && !board.revision.is_empty() && !board.mac_addresses.is_empty(), "{board:?}");
    let system = node.system.as_ref().context("no system")?;
    assert_eq!(system.layout(), CardLayout::Resident);
    assert!(!system.kernel_arch.is_empty() && !system.userspace_arch.is_empty(), "{system:?}");
    assert!(system.page_size >= 4096 && !system.os.is_empty() && !system.kernel_release.is_empty(), "{system:?}");
    assert_eq!((node.state(), node.mode()), (node::State::Approved, NodeMode::Running));
    assert!(node.connected && node.create_time.is_some() && !node.agent_version.is_empty());

    // The virtual Pi's own log is the reference: what the controller shows must match it.
    let log = fleet.pi(id).log()?;
    assert_eq!(log.iter().map(|line| line.event.as_str()).collect::<Vec<_>>(), ["boot"]);
    assert_eq!(log[0].boot_id, node.boot_id, "the node is not known under the boot id that it booted with");

    // The watch shows the same, and reports when the node disconnects.
    let mut watch = fleet.nodes().watch_nodes(WatchNodesRequest::default()).await?.into_inner();
    let first = tokio::time::timeout(seconds(10), watch.message()).await??.context("the watch ended")?;
    assert_eq!(first.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>(), [node.name.as_str()]);
    fleet.kill_agents().await?;
    tokio::time::timeout(seconds(30), async {
        loop {
            let change = watch.message().await?.context("the watch ended")?;
            if change.nodes.iter().any(|changed| changed.name == node.name && !changed.connected) {
                return anyhow::Ok(());
            }
        }
    })
    .await
    .context("the watch did not tell that the node is gone")??;
    Ok(())
}

#[tokio::test]
async fn a_join_file_on_the_card_is_enough_and_loses_its_token() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let token = fleet.token(1).await?;
    // Without a token the virtual Pi makes its card and boots, but the controller does not know it.
    fleet.start_new_agents(&[])?;
    let pi = fleet.pi(&wait_until(seconds(20), "the virtual Pi has been made", async || {
        let mut made = std::fs::read_dir(fleet.dir().join("pis")).into_iter().flatten().flatten();
        Ok(made
            .next()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|id| fleet.pi(id).log().is_ok_and(|log| !log.is_empty())))
    })
    .await?);
    assert_eq!(fleet.list_nodes().await?, []);
    std::fs::create_dir_all(pi.path("recovery/marco"))?;
    let file = format!(
        "controllers = [\"{}\"]\nenroll = [\"{}\"]\ntoken = \"{token}\"\nname = \"from-a-card\"\n",
        fleet.proxy().address(),
        fleet.addresses().enroll
    );
    std::fs::write(pi.path("recovery/marco/join.toml"), file)?;
    // Agents look for a join file when they start.
    pi.cut_power()?;
    wait_until(seconds(60), "the node named in the file is connected", async || {
        let nodes = fleet.list_nodes().await?;
        Ok(nodes.iter().any(|node| node.name == "nodes/from-a-card" && node.connected).then_some(()))
    })
    .await?;
    // A used token is worthless, but an unused one on a card would let anyone enrol who reads it.
    wait_until(seconds(10), "the token is gone from the file", async || {
        Ok((!pi.read("recovery/marco/join.toml").unwrap_or_default().contains(&token)).then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_used_an_expired_a_revoked_and_a_wrong_token_get_the_same_answer() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let key = NodeKey::generate()?;

    let used = fleet.token(1).await?;
    let enrolled = enroll(&fleet, &key, &used, "the-first").await??;
    assert_eq!(enrolled.node, "nodes/the-first");
    assert!(enrolled.certificate.contains("BEGIN CERTIFICATE") && !enrolled.held);
    assert_eq!(enrolled.ca_certificate.trim(), fleet.admin().ca.trim());

    let short = CreateJoinTokenRequest {
        max_uses: 1,
        ttl: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        ..CreateJoinTokenRequest::default()
    };
    let expired = fleet.nodes().create_join_token(short).await?.into_inner();
    let revoked = fleet.nodes().create_join_token(CreateJoinTokenRequest::default()).await?.into_inner();
    let revocation = RevokeJoinTokenRequest { name: revoked.name.clone() };
    assert!(fleet.nodes().revoke_join_token(revocation).await?.into_inner().revoked);
    let end = expired.expire_time.context("no expire_time")?;
    wait_until(seconds(10), "the short token expires", async || {
        let now = std::time::SystemTime::now();
        Ok((now > std::time::SystemTime::try_from(end)?).then_some(()))
    })
    .await?;
    // The right id and pin with a wrong secret.
    let wrong: Vec<&str> = revoked.token.split('.').collect();
    let other: Vec<&str> = used.split('.').collect();
    let wrong = [wrong[0], wrong[1], other[2], wrong[3]].join(".");

    let mut answers = Vec::new();
    for token in [&used, &expired.token, &revoked.token, &wrong] {
        let stranger = NodeKey::generate()?;
        let Err(status) = enroll(&fleet, &stranger, token, "another").await? else {
            anyhow::bail!("a node was let in with {token}");
        };
        answers.push((status.code(), status.message().to_owned(), status.details().to_vec()));
    }
    // Different answers would tell an attacker which tokens exist.
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "they tell one from the other: {answers:?}");
    assert!(matches!(answers[0].0, Code::Unauthenticated | Code::PermissionDenied), "{answers:?}");
    assert_eq!(fleet.ids().await?, ["the-first"], "a refused node was stored");
    Ok(())
}

#[tokio::test]
async fn enrolling_again_with_the_same_key_and_token_gives_the_same_node() -> Result<()> {
    let fleet = Fleet::builder().pis(0).start().await?;
    let (key, token) = (NodeKey::generate()?, fleet.token(1).await?);
    // Simulates a lost answer: the node asks again with the same key.
    let first = enroll(&fleet, &key, &token, "twice").await??;
    let second = enroll(&fleet, &key, &token, "twice").await??;
    assert_eq!(first.node, second.node);
    assert_eq!(fleet.ids().await?, ["twice"]);
    Ok(())
}

#[tokio::test]
async fn a_node_renews_its_certificate_with_its_old_key_and_nobody_else_can() -> Result<()> {
    let fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let pi = fleet.pi(&id);
    let (old, certificate) = (NodeKey::read(&pi.path("agent/node.key"))?, pi.read("agent/node.crt")?);

    // A certificate is public, so it must not be enough for a renewal.
    let thief = NodeKey::generate()?;
    let stolen = thief.request(&thief)?;
    let request = RenewCertificateRequest {
        certificate: certificate.clone(),
        certificate_request: stolen.pem,
        signature: stolen.signature.into(),
    };
    let refused = enrollment(&fleet)?.renew_certificate(request).await;
    assert!(refused.is_err(), "a certificate was renewed without its key");

    let fresh = NodeKey::generate()?;
    let signed = fresh.request(&old)?;
    let request =
        RenewCertificateRequest { certificate, certificate_request: signed.pem, signature: signed.signature.into() };
    let renewed = enrollment(&fleet)?.renew_certificate(request).await?.into_inner();
    // The new certificate has a node's rights: it reads its own node, and no others.
    let node = Credentials { ca: renewed.ca_certificate, identity: Some((renewed.certificate, fresh.pem())) };
    let mut nodes = marco_proto::v1::node_service_client::NodeServiceClient::new(node.channel(fleet.addresses().api)?);
    let name = format!("nodes/{id}");
    let itself = nodes.get_node(marco_proto::v1::GetNodeRequest { name: name.clone() }).await?.into_inner();
    assert_eq!(itself.name, name);
    let all = nodes.list_nodes(marco_proto::v1::ListNodesRequest::default()).await;
    assert_eq!(all.err().map(|status| status.code()), Some(Code::PermissionDenied));
    Ok(())
}

/// Runs an agent that cannot enrol, until it ends by itself.
async fn ends(fleet: &Fleet, arguments: &[&str]) -> Result<Output> {
    let config = fleet.dir().join("agent.toml");
    // `enroll` is for the machine itself: without these folders it would find or leave an identity there.
    let own = fleet.dir().join("own");
    std::fs::create_dir_all(&own)?;
    std::fs::write(&config, format!("identity_dir = {own:?}\nstate_dir = {own:?}\n"))?;
    let config = config.display().to_string();
    let ended = run(&binary("marco-agent")?, &[&["--config", &config], arguments].concat(), seconds(60)).await?;
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    Ok(ended)
}

#[tokio::test]
async fn agent_that_can_never_get_in_ends_and_says_why() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let mut other = Fleet::builder().pis(0).start().await?;
    fleet.kill_agents().await?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = fleet.dir().join(name);
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let (ours, foreign) = (file("ours", &fleet.token(9).await?)?, file("foreign", &other.token(9).await?)?);
    let (api, enroll) = (fleet.addresses().api.to_string(), fleet.addresses().enroll.to_string());
    let way = ["--controller", &api, "--enroll", &enroll];
    let simulate = async |name: &str, rest: &[&str]| {
        let dir = fleet.dir().join(name).display().to_string();
        ends(&fleet, &[&["simulate", "--count", "2", "--dir", &dir], &way[..], rest].concat()).await
    };
    // A token of another controller.
    let ended = simulate("p1", &["--token-file", &foreign]).await?;
    assert!(ended.stderr.contains("another controller than the one that made the join token"), "{ended:?}");
    // A card of another controller: this fleet's Pi with the address of the other fleet's controller.
    let dir = fleet.dir().join("pis").display().to_string();
    let there = other.addresses().api.to_string();
    let ended = ends(&fleet, &["simulate", "--count", "1", "--dir", &dir, "--controller", &there]).await?;
    assert!(ended.stderr.contains("another controller than the one where this node was enrolled"), "{ended:?}");
    // A malformed name, and one that leads out of its folder.
    let ended = simulate("p2", &["--token-file", &ours, "--prefix", "../out-"]).await?;
    assert!(ended.stderr.contains("--prefix \"../out-\""), "{ended:?}");
    assert!(!fleet.dir().join("out-01").exists(), "it left its folder");
    let ended = ends(&fleet, &[&["enroll", "--name", "bad name", "--token-file", &ours], &way[..]].concat()).await?;
    assert!(ended.stderr.contains("bad name"), "{ended:?}");
    // A file without a token in it.
    let certificate = fleet.certs().join("ca.crt").display().to_string();
    let ended = simulate("p3", &["--token-file", &certificate]).await?;
    assert!(ended.stderr.contains("ca.crt is not a join token: it holds a certificate"), "{ended:?}");
    // Each port in place of the other.
    let mirror = fleet.addresses().mirror.to_string();
    for (listener, said) in [(&api, "no enrolment listener"), (&mirror, "file mirror")] {
        let wrong = ["enroll", "--controller", &api, "--enroll", listener, "--token-file", &ours];
        let ended = ends(&fleet, &wrong).await?;
        assert!(ended.stderr.contains(said), "{ended:?}");
    }
    fleet.went_well();
    other.went_well();
    Ok(())
}
