//! Limits of each listener for each kind of caller, one by one; `quotas` tests them all at once.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::future::join_all;
use integration_tests::certs::NodeKey;
use integration_tests::client::{Credentials, reason};
use integration_tests::frames::{Raw, tls};
use integration_tests::image::{Compression, lay_out_root, noise, pack};
use integration_tests::raw;
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::v1::access_service_client::AccessServiceClient;
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::artifact_service_client::ArtifactServiceClient;
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::{
    ApiToken, CreateApiTokenRequest, CreateUserRequest, DownloadArtifactRequest, DownloadArtifactResponse,
    ListNodesRequest, OpenArtifactRequest, QuarantineNodeRequest, Role, SetDefaultArtifactRequest, User,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{Code, Status, Streaming};

const ENROLL: &str = "/marco.bootstrap.v1.EnrollmentService/Enroll";
const LIST_NODES: &str = "/marco.bootstrap.v1.NodeService/ListNodes";
/// `REFUSED_STREAM` (RFC 9113, section 7).
const REFUSED_STREAM: u32 = 7;
/// Ten seconds on a busy machine.
const TEN_SECONDS: std::ops::Range<Duration> = seconds(9)..seconds(14);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_beyond_four_are_refused_and_the_rest_ends_after_ten_seconds() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let nobody = fleet.admin().anonymous();
    let (api, enroll) = (fleet.addresses().api, fleet.addresses().enroll);
    let viewer = fleet.user("viewer")?;
    let held = async |address, who: &Credentials, path, calls| {
        Raw::connect(address, who).await?.open_calls(path, calls, seconds(15)).await
    };
    let (enrolling, calling, admitted) = tokio::join!(
        held(enroll, &nobody, ENROLL, 10),
        held(api, &nobody, LIST_NODES, 0),
        // An admitted caller's messages never come either, which is allowed.
        held(api, &viewer, LIST_NODES, 20),
    );
    let (resets, ended) = enrolling?;
    assert_eq!(resets.iter().filter(|code| **code == REFUSED_STREAM).count(), 6, "{resets:?}");
    assert!(ended.is_some_and(|after| TEN_SECONDS.contains(&after)), "{ended:?}");
    let (_, ended) = calling?;
    assert!(ended.is_some_and(|after| TEN_SECONDS.contains(&after)), "{ended:?}");
    assert_eq!(admitted?, (Vec::new(), None));
    // The limit is 64 KiB for each call.
    let large = vec![0x0a; 100_000];
    let status = raw::call(&nobody.channel(enroll)?, ENROLL, large, None).await.err().context("it was read")?;
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    fleet.went_well();
    Ok(())
}

/// Connections that a crowd holds at each listener, and the pause before a displaced one is opened again. A connection
/// then lives for a second and a half, and an enrolment takes a fraction of that.
const CROWD: usize = 300;
const AGAIN: Duration = seconds(2);

/// Holds connections without credentials, and opens each one again after its end.
async fn crowd(address: SocketAddr, who: &Credentials, count: usize) {
    join_all((0..count).map(|_| async {
        loop {
            if let Ok(mut stream) = tls(address, who, b"h2").await {
                // Just enough to be HTTP/2, and then silence.
                let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
                while stream.read(&mut [0; 1024]).await.is_ok_and(|read| read > 0) {}
            }
            tokio::time::sleep(AGAIN).await;
        }
    }))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn crowd_of_strangers_keeps_out_no_admin_service_or_node() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).open_files(4096).start().await?;
    integration_tests::process::raise_open_files();
    let request = CreateApiTokenRequest {
        api_token: Some(ApiToken { role: Role::Viewer.into(), ..ApiToken::default() }),
        api_token_id: "service".to_owned(),
        ttl: None,
    };
    let token = AccessServiceClient::new(fleet.admin_channel()).create_api_token(request).await?.into_inner().token;
    let nobody = fleet.admin().anonymous();
    let (api, enroll) = (fleet.addresses().api, fleet.addresses().enroll);
    let honest = async {
        wait_until(seconds(20), "there is a crowd", async || Ok((fleet.files(0)? > 250).then_some(()))).await?;
        for number in 0..10 {
            let mut nodes = NodeServiceClient::new(fleet.admin().channel(api)?);
            nodes.list_nodes(ListNodesRequest::default()).await.context("the admin was kept out")?;
            // A caller with a token is unauthenticated until its first call has been checked.
            raw::call(&nobody.channel(api)?, LIST_NODES, Vec::new(), Some(&token)).await.context("the service")?;
            fleet.enrol_by_hand(&format!("pi-{number}"), false).await.context("a node was kept out")?;
            // At each of two listeners 128 connections of one address, and on a busy machine 256 handshakes, plus the
            // controller's own files.
            let files = fleet.files(0)?;
            assert!(files < 2 * (128 + 256) + 64, "{files} files are open");
        }
        anyhow::Ok(())
    };
    tokio::select! {
        done = tokio::time::timeout(seconds(60), honest) => done.context("they are answered too late")??,
        _ = async { tokio::join!(crowd(api, &nobody, CROWD), crowd(enroll, &nobody, CROWD)) } => {}
    }
    fleet.went_well();
    Ok(())
}

/// The mirror's answer, followed by ` closed` if it closed the connection.
async fn ask_mirror(fleet: &Fleet, who: &Credentials, path: &str) -> Result<String> {
    let mut stream = tls(fleet.addresses().mirror, who, b"http/1.1").await?;
    stream.write_all(format!("HEAD {path} HTTP/1.1\r\nHost: mirror\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    loop {
        // The mirror closes a refused connection at once. An accepted one stays open for more requests.
        match tokio::time::timeout(seconds(5), stream.read(&mut part)).await {
            Ok(Ok(0) | Err(_)) => return Ok(format!("{} closed", String::from_utf8_lossy(&answer))),
            Ok(Ok(read)) => answer.extend(part.get(..read).unwrap_or_default()),
            Err(_) => return Ok(String::from_utf8_lossy(&answer).into_owned()),
        }
    }
}

async fn download(fleet: &Fleet, who: &Credentials, name: &str) -> Result<Streaming<DownloadArtifactResponse>, Status> {
    let channel = who.channel(fleet.addresses().api).map_err(|error| Status::internal(error.to_string()))?;
    let request = DownloadArtifactRequest { name: name.to_owned(), offset: 0 };
    Ok(ArtifactServiceClient::new(channel).download_artifact(request).await?.into_inner())
}

async fn image(fleet: &Fleet, name: &str) -> Result<()> {
    let root = fleet.dir().join(name);
    lay_out_root(&root, name)?;
    std::fs::write(root.join("usr/lib/marker/more-noise"), noise(name, 8 << 20))?;
    let file = pack(&root, &fleet.dir().join(format!("{name}.tar.gz")), Compression::Gzip)?;
    push(&mut fleet.artifacts(), name, Kind::Image, Purpose::Unspecified, &file).await?;
    Ok(())
}

async fn refusal(fleet: &Fleet, who: &Credentials, name: &str) -> String {
    download(fleet, who, name).await.err().map_or_else(|| "served".to_owned(), |status| reason(&status))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_gets_the_bytes_that_are_meant_for_it() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    image(&fleet, "usual").await?;
    image(&fleet, "secret").await?;
    image(&fleet, "open").await?;
    let usual = SetDefaultArtifactRequest { name: "usual".to_owned(), board: String::new() };
    fleet.artifacts().set_default_artifact(usual).await?;
    let open = OpenArtifactRequest { name: "open".to_owned(), open_to_mirror: true };
    fleet.artifacts().open_artifact(open.clone()).await?;
    let (node, held) = (fleet.enrol_by_hand("node", false).await?, fleet.enrol_by_hand("held", true).await?);
    let quarantined = fleet.enrol_by_hand("barred", false).await?;
    let request = QuarantineNodeRequest { name: "nodes/barred".to_owned(), reason: "a test".to_owned() };
    fleet.nodes().quarantine_node(request).await?;

    for (name, by_call, by_mirror) in
        [("usual", "served", "200"), ("secret", "ARTIFACT_NOT_ASKED", "403"), ("open", "ARTIFACT_NOT_ASKED", "200")]
    {
        let path = format!("/tar/{name}.tar.gz");
        assert_eq!(refusal(&fleet, &node, name).await, by_call, "{name}");
        let answer = ask_mirror(&fleet, &node, &path).await?;
        assert!(answer.starts_with(&format!("HTTP/1.1 {by_mirror}")), "{name}: {answer}");
        assert_eq!(answer.ends_with(" closed"), by_mirror == "403", "{name}: {answer}");
        for (who, why) in [(&held, "NODE_NOT_APPROVED"), (&quarantined, "NODE_QUARANTINED")] {
            assert_eq!(refusal(&fleet, who, name).await, why, "{name}");
            let answer = ask_mirror(&fleet, who, &path).await?;
            assert!(answer.starts_with("HTTP/1.1 403") && answer.ends_with(" closed"), "{name}: {answer}");
        }
    }
    // Also refused by digest, and after the name was closed again.
    let digest = integration_tests::image::sha256(&std::fs::read(fleet.dir().join("secret.tar.gz"))?);
    assert_eq!(refusal(&fleet, &node, &format!("artifacts/sha256:{digest}")).await, "ARTIFACT_NOT_ASKED");
    fleet.artifacts().open_artifact(OpenArtifactRequest { open_to_mirror: false, ..open }).await?;
    assert!(ask_mirror(&fleet, &node, "/tar/open.tar.gz").await?.starts_with("HTTP/1.1 403"));
    // The mirror applies the API's table of roles. Viewers and operators may not download, also within a scope.
    let scoped = async |id: &str, role: Role| {
        let key = NodeKey::generate()?;
        let selector = [("room".to_owned(), "in".to_owned())].into();
        let request = CreateUserRequest {
            user: Some(User { role: role.into(), selector, ..User::default() }),
            user_id: id.to_owned(),
            certificate_request: key.request(&key)?.pem,
            ttl: None,
        };
        let user = AccessServiceClient::new(fleet.admin_channel()).create_user(request).await?.into_inner();
        anyhow::Ok(Credentials { ca: user.ca_certificate, identity: Some((user.certificate, key.pem())) })
    };
    for (name, who, may) in [
        ("viewer", fleet.user("viewer")?, false),
        ("operator", fleet.user("operator")?, false),
        ("scoped viewer", scoped("scoped-viewer", Role::Viewer).await?, false),
        ("scoped operator", scoped("scoped-operator", Role::Operator).await?, false),
        ("publisher", fleet.user("publisher")?, true),
    ] {
        let (by_call, by_mirror) = if may { ("served", "200") } else { ("ROLE_NOT_ALLOWED", "403") };
        assert_eq!(refusal(&fleet, &who, "usual").await, by_call, "{name}");
        let answer = ask_mirror(&fleet, &who, "/tar/usual.tar.gz").await?;
        assert!(answer.starts_with(&format!("HTTP/1.1 {by_mirror}")), "{name}: {answer}");
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_has_four_downloads_and_takes_none_of_another() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    image(&fleet, "usual").await?;
    let usual = SetDefaultArtifactRequest { name: "usual".to_owned(), board: String::new() };
    fleet.artifacts().set_default_artifact(usual).await?;
    let (greedy, other) = (fleet.enrol_by_hand("greedy", false).await?, fleet.enrol_by_hand("other", false).await?);
    let mut unread = Vec::new();
    for _ in 0..4 {
        unread.push(download(&fleet, &greedy, "usual").await?);
    }
    let status = download(&fleet, &greedy, "usual").await.err().context("a fifth download began")?;
    // Agents retry after this reason.
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "TOO_MANY_DOWNLOADS"));
    let mut whole = download(&fleet, &other, "usual").await?;
    while whole.message().await?.is_some() {}
    unread.pop();
    wait_until(seconds(20), "its place is free again", async || Ok(download(&fleet, &greedy, "usual").await.ok()))
        .await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_peer_writes_short_lines_and_few() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let stranger = integration_tests::certs::issue(
        &fleet.certs().join("ca.crt"),
        &fleet.data().join("pki/ca.key"),
        "made-up",
        "node",
    )?;
    let before = fleet.controller_log(0)?.len();
    let path = format!("/tar/{}", "x".repeat(60_000));
    let begun = Instant::now();
    let mut asked = 0;
    while asked < 300 && begun.elapsed() < seconds(20) {
        let answer = ask_mirror(&fleet, &stranger, &path).await?;
        assert!(answer.starts_with("HTTP/1.1 403") && answer.ends_with(" closed"), "{answer}");
        asked += 1;
    }
    let log = fleet.controller_log(0)?;
    let written = log.get(before..).unwrap_or_default();
    let lines = written.lines().filter(|line| line.contains("path=/tar/xxx")).count();
    // A burst of fifty, then one line every two seconds.
    let most = 51 + usize::try_from(begun.elapsed().as_secs() / 2)?;
    assert!((1..=asked.min(most)).contains(&lines), "{lines} lines of {asked} requests in {:?}", begun.elapsed());
    assert!(
        written.lines().all(|line| line.len() < 1000),
        "{}",
        written.lines().map(str::len).max().unwrap_or_default()
    );
    fleet.went_well();
    Ok(())
}
