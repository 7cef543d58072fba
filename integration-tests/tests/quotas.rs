//! Checks the bounds in `docs/security.md`: each kind of peer takes all it can get from each listener. The controller's
//! costs stay under the documented bounds, and an admin is answered meanwhile.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::client::Credentials;
use integration_tests::greedy::{Call, Crowd, Greedy};
use integration_tests::image::{Compression, lay_out_root, noise, pack};
use integration_tests::process::raise_open_files;
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds};
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::{
    DeleteNodeRequest, DownloadArtifactRequest, ListNodesRequest, QuarantineNodeRequest, SetDefaultArtifactRequest,
    WatchNodesRequest,
};
use prost::Message as _;
use tokio::time::{Instant, sleep};

/// The controller's limit of open files in this test.
const FILES: usize = 2048;
/// Simultaneous connections of a user, and of any other peer. With [`FILES`] open files neither gets that many. More
/// would only keep this machine busy with handshakes.
const OF_A_PERSON: usize = 150;
const OF_ANOTHER: usize = 100;
/// Calls that the peer tries to open on each connection.
const STREAMS: usize = 160;
/// Bytes of memory that one kind of peer may make the controller hold: `docs/security.md`, "All together".
const MEMORY: u64 = 384 << 20;
/// Bytes of log, and of the data folder, that one kind of peer may fill during its attack.
const LOG: u64 = 2 << 20;
const DISK: u64 = 16 << 20;
/// Deadline for an admin's call on a new connection.
const ANSWER: Duration = seconds(1);
/// Percentage of calls that may be later: the tests' controller is built without optimization.
const LATE: usize = 10;

const ENROLMENT: [Call; 1] = [Call { path: "/marco.bootstrap.v1.EnrollmentService/Enroll", message: None }];

/// Duration of each peer's attack.
fn greedy_for() -> Duration {
    std::env::var("QUOTA_SECONDS").ok().and_then(|text| text.parse().ok()).map_or(seconds(3), Duration::from_secs)
}

/// Each kind of peer, by name.
async fn peers(fleet: &Fleet) -> Result<Vec<(&'static str, Credentials)>> {
    let (ca, key) = (fleet.certs().join("ca.crt"), fleet.data().join("pki/ca.key"));
    let deleted = fleet.enrol_by_hand("deleted", false).await?;
    let name = "nodes/deleted".to_owned();
    fleet.nodes().delete_node(DeleteNodeRequest { name, ..DeleteNodeRequest::default() }).await?;
    let quarantined = fleet.enrol_by_hand("quarantined", false).await?;
    let request = QuarantineNodeRequest { name: "nodes/quarantined".to_owned(), reason: "a test".to_owned() };
    fleet.nodes().quarantine_node(request).await?;
    Ok(vec![
        ("nobody", fleet.admin().anonymous()),
        ("expired", integration_tests::certs::expired(&ca, &key, "test-viewer", "viewer")?),
        ("revoked", deleted),
        ("held", fleet.enrol_by_hand("held", true).await?),
        ("quarantined", quarantined),
        ("node", fleet.enrol_by_hand("greedy", false).await?),
        ("viewer", fleet.user("viewer")?),
    ])
}

fn calls() -> Vec<Call> {
    let download = DownloadArtifactRequest { name: "artifacts/os".to_owned(), offset: 0 }.encode_to_vec();
    let call = |path, message| Call { path, message };
    vec![
        call("/marco.bootstrap.v1.ArtifactService/DownloadArtifact", Some(download)),
        call("/marco.bootstrap.v1.NodeService/GetNode", None),
        call("/marco.bootstrap.v1.NodeService/ListNodes", Some(ListNodesRequest::default().encode_to_vec())),
        call("/marco.bootstrap.v1.NodeService/WatchNodes", Some(WatchNodesRequest::default().encode_to_vec())),
        call("/marco.bootstrap.v1.AgentService/Connect", None),
        call("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", None),
    ]
}

/// Size of all files below a folder; a file that disappears meanwhile counts as 0.
fn size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(data) if data.is_dir() => size(&entry.path()),
            Ok(data) => data.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Highest costs of the controller during an attack.
#[derive(Debug, Default)]
struct Paid {
    memory: u64,
    files: usize,
    answers: Vec<Duration>,
}

/// Measures the controller until `until`, and calls it as admin, each time on a new connection.
async fn watch(fleet: &Fleet, before: u64, until: Instant) -> Result<Paid> {
    let mut paid = Paid::default();
    while Instant::now() < until {
        let begun = Instant::now();
        // A new connection for each call, because admission of connections is what an attack exhausts first.
        let mut nodes = NodeServiceClient::new(fleet.admin().channel(fleet.addresses().api)?);
        let answer = tokio::time::timeout(seconds(10), nodes.list_nodes(ListNodesRequest::default())).await;
        answer.context("the admin was shut out")?.context("the admin was refused")?;
        paid.answers.push(begun.elapsed());
        paid.memory = paid.memory.max(fleet.memory(0, "VmRSS")?.saturating_sub(before));
        paid.files = paid.files.max(fleet.files(0)?);
        sleep(Duration::from_millis(50)).await;
    }
    Ok(paid)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by make quotas: it wants the machine for itself"]
async fn each_kind_of_peer_costs_each_listener_a_bounded_sum() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).open_files(FILES).start().await?;
    raise_open_files();
    let root = fleet.dir().join("root");
    lay_out_root(&root, "os")?;
    std::fs::write(root.join("usr/lib/marker/more-noise"), noise("more", 16 << 20))?;
    let file = pack(&root, &fleet.dir().join("os.tar.gz"), Compression::Gzip)?;
    push(&mut fleet.artifacts(), "os", Kind::Image, Purpose::Unspecified, &file).await?;
    let usual = SetDefaultArtifactRequest { name: "artifacts/os".to_owned(), board: String::new() };
    fleet.artifacts().set_default_artifact(usual).await?;
    let peers = peers(&fleet).await?;
    // Each refused path goes to the log, so a long one shows if lines are cut.
    let long = format!("/tar/{}", "x".repeat(60_000));
    let before = fleet.memory(0, "VmRSS")?;
    let crowd = Crowd::new()?;
    let addresses = fleet.addresses();
    let mut account = String::new();
    // One kind alone, while its cost is looked into.
    let only = std::env::var("QUOTA_PEER").ok();
    let chosen = peers.iter().filter(|(peer, _)| only.as_deref().is_none_or(|only| only == *peer));
    for (peer, who) in chosen {
        for (listener, address) in
            [("API", addresses.api), ("enrolment", addresses.enroll), ("mirror", addresses.mirror)]
        {
            let (log, disk) = (fleet.controller_log(0)?.len(), size(&fleet.data()));
            let until = Instant::now() + greedy_for();
            let connections = if *peer == "viewer" { OF_A_PERSON } else { OF_ANOTHER };
            let greedy = Greedy { address, who: who.clone(), connections };
            let path = if *peer == "node" { "/tar/os.tar.gz".to_owned() } else { long.clone() };
            let attack = crowd.run(async move {
                match listener {
                    "API" => greedy.call(&calls(), STREAMS, until).await,
                    "enrolment" => greedy.call(&ENROLMENT, STREAMS, until).await,
                    _ => greedy.fetch(&path, until).await,
                }
            });
            let (attack, paid) = tokio::join!(attack, watch(&fleet, before, until));
            attack?;
            let paid = paid.with_context(|| format!("{listener}, {peer}"))?;
            let log = u64::try_from(fleet.controller_log(0)?.len() - log)?;
            let disk = size(&fleet.data()).saturating_sub(disk);
            let late = paid.answers.iter().filter(|answer| **answer > ANSWER).count();
            let worst = paid.answers.iter().max().copied().unwrap_or_default();
            let row = format!(
                "{listener}, {peer}: {} MiB, {} files, {} kB of log, {} kB of disk, {} admin's calls, {late} late, the \
                 slowest {worst:?}\n",
                paid.memory >> 20,
                paid.files,
                log >> 10,
                disk >> 10,
                paid.answers.len(),
            );
            // On standard error, so that it shows during a long run.
            let _ = write!(std::io::stderr(), "{row}");
            account.push_str(&row);
            assert!(paid.memory < MEMORY, "{account}");
            // Some files must be left for the database and for downloads.
            assert!(paid.files < FILES / 10 * 9, "{account}");
            assert!(log < LOG && disk < DISK, "{account}");
            // With few answers a single late one would exceed the percentage.
            assert!(late <= 1 || late * 100 <= paid.answers.len() * LATE, "{account}");
        }
    }
    assert!(
        !account.is_empty(),
        "QUOTA_PEER={only:?} is none of {:?}",
        peers.iter().map(|(peer, _)| peer).collect::<Vec<_>>()
    );
    let longest = fleet.controller_log(0)?.lines().map(str::len).max().unwrap_or_default();
    assert!(longest < 2000, "a line of {longest} bytes");
    fleet.went_well();
    Ok(())
}
