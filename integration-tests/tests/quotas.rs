//! Checks the bounds in `docs/security.md`: each kind of peer takes all it can get from each listener. The controller's
//! costs stay under the documented bounds, and an admin is answered meanwhile.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::certs::NodeKey;
use integration_tests::client::Credentials;
use integration_tests::greedy::{Call, Crowd, Greedy, Whole};
use integration_tests::image::{Compression, lay_out_root, noise, pack};
use integration_tests::process::{raise_open_files, workspace};
use integration_tests::upload::push;
use integration_tests::{Fleet, seconds};
use marco_proto::names::PROTOCOL_VERSION;
use marco_proto::v1::access_service_client::AccessServiceClient;
use marco_proto::v1::artifact::{Kind, Purpose};
use marco_proto::v1::connect_request::Message;
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::{
    Board, CertificateFilter, ConnectRequest, DeleteNodeRequest, DownloadArtifactRequest, EnrollRequest, Hello,
    ListCertificatesRequest, ListNodesRequest, NodeMode, QuarantineNodeRequest, RenewCertificateRequest, Report,
    SetDefaultArtifactRequest, WatchNodesRequest, execution,
};
use prost::Message as _;
use tokio::time::{Instant, sleep};

/// The controller's limit of open files in this test.
const FILES: usize = 2048;
/// Simultaneous connections of a user, and of any other peer. With [`FILES`] open files neither gets that many. More
/// would only keep this machine busy with handshakes.
const OF_A_PERSON: usize = 150;
const OF_ANOTHER: usize = 100;
/// Connections on which a peer makes whole calls without end.
const REPEATING: usize = 8;
/// Certificates of a node after all its attacks: that of its enrolment, and one renewal in an hour.
const CERTIFICATES: usize = 2;
/// Calls that the peer tries to open on each connection.
const STREAMS: usize = 160;
/// Bytes of memory that one kind of peer may make the controller hold: `docs/security.md`, "All together".
const MEMORY: u64 = 384 << 20;
/// Bytes of log, and of the data folder, that one kind of peer may fill during its attack.
const LOG: u64 = 2 << 20;
const DISK: u64 = 16 << 20;
/// Deadline for an admin's call on a new connection.
const ANSWER: Duration = seconds(1);
/// Time within which one call may be later: the peer opens all its connections then, and the tests' controller is built
/// without optimization.
const BEGIN: Duration = seconds(1);

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

/// Calls to make again and again: whatever a peer can have stored or signed.
fn whole_calls(who: &Credentials) -> Result<(Vec<Whole>, Vec<Whole>)> {
    let boot_id = "7f2c0e56-0f0c-4c8b-9a3e-0d1f5a7b9c11".to_owned();
    let hello = Hello {
        protocol_version: PROTOCOL_VERSION,
        boot_id: boot_id.clone(),
        mode: NodeMode::Running.into(),
        agent_version: "0".to_owned(),
        // One start of one agent: otherwise its sessions would look like those of clones.
        instance: "greedy".to_owned(),
        ..Hello::default()
    };
    let report = |sequence: u64| Report {
        execution: format!("operations/01a21325-85a1-72ed-97de-94f7f1cf4a{:02x}/executions/greedy", sequence % 256),
        attempt: 1,
        sequence,
        state: execution::State::Running.into(),
        boot_id: boot_id.clone(),
        ..Report::default()
    };
    let said = (0..100).map(|sequence| Message::Report(report(sequence)));
    let said = std::iter::once(Message::Hello(hello)).chain(said);
    let session: Vec<_> = said.map(|message| ConnectRequest { message: Some(message) }.encode_to_vec()).collect();
    let one = |path, message: Vec<u8>| Whole { path, messages: vec![message] };
    let api = vec![
        Whole { path: "/marco.bootstrap.v1.AgentService/Connect", messages: session },
        one("/marco.bootstrap.v1.NodeService/ListNodes", ListNodesRequest::default().encode_to_vec()),
        // No row of the table of rights admits any of these peers to it.
        one("/marco.bootstrap.v1.AccessService/CreateUser", Vec::new()),
    ];
    let wrong = EnrollRequest {
        token: format!("mj1.0123456789.{0}.{0}", "A".repeat(43)),
        certificate_request: NodeKey::generate()?.request(&NodeKey::generate()?)?.pem,
        node_id: "wanted".to_owned(),
        board: Some(Board::default()),
    };
    let mut enrolment = vec![one("/marco.bootstrap.v1.EnrollmentService/Enroll", wrong.encode_to_vec())];
    if let Some((certificate, key)) = &who.identity {
        let key = NodeKey::parse(key)?;
        // Several, so that both a repeated and another request come.
        for _ in 0..20 {
            let signed = NodeKey::generate()?.request(&key)?;
            let renewal = RenewCertificateRequest {
                certificate: certificate.clone(),
                certificate_request: signed.pem,
                signature: signed.signature.into(),
            };
            enrolment.push(one("/marco.bootstrap.v1.EnrollmentService/RenewCertificate", renewal.encode_to_vec()));
        }
    }
    Ok((api, enrolment))
}

/// Certificates that the controller has of a user or node.
async fn certificates(fleet: &Fleet, subject: &str) -> Result<usize> {
    let filter = CertificateFilter { subject: subject.to_owned(), ..CertificateFilter::default() };
    let request =
        ListCertificatesRequest { filter: Some(filter), page_size: 1000, ..ListCertificatesRequest::default() };
    let mut access = AccessServiceClient::new(fleet.admin_channel());
    Ok(access.list_certificates(request).await?.into_inner().certificates.len())
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
    /// Answers that came too late, and of them those that were asked for after [`BEGIN`].
    late: (usize, usize),
}

/// Measures the controller until `until`, and calls it as admin, each time on a new connection.
async fn watch(fleet: &Fleet, before: u64, until: Instant) -> Result<Paid> {
    let mut paid = Paid::default();
    let start = Instant::now();
    while Instant::now() < until {
        let begun = Instant::now();
        // A new connection for each call, because admission of connections is what an attack exhausts first.
        let mut nodes = NodeServiceClient::new(fleet.admin().channel(fleet.addresses().api)?);
        let answer = tokio::time::timeout(seconds(10), nodes.list_nodes(ListNodesRequest::default())).await;
        answer.context("the admin was shut out")?.context("the admin was refused")?;
        let took = begun.elapsed();
        paid.answers.push(took);
        if took > ANSWER {
            paid.late.0 += 1;
            paid.late.1 += usize::from(begun - start > BEGIN);
        }
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
            let half_sent = Instant::now() + greedy_for();
            // Afterwards, because half-sent calls and their connections take all that the peer may have.
            let until = half_sent + if listener == "mirror" { Duration::ZERO } else { greedy_for() / 2 };
            let connections = if *peer == "viewer" { OF_A_PERSON } else { OF_ANOTHER };
            let greedy = Greedy { address, who: who.clone(), connections };
            let again = Greedy { address, who: who.clone(), connections: REPEATING };
            let (to_api, to_enrolment) = whole_calls(who)?;
            // Refusals are answers too. TLS lets nobody expired in at the API.
            let answered = listener != "mirror" && (listener, *peer) != ("API", "expired");
            let enrols = listener == "enrolment";
            let (half, whole) = if enrols { (ENROLMENT.to_vec(), to_enrolment) } else { (calls(), to_api) };
            let path = if *peer == "node" { "/tar/os.tar.gz".to_owned() } else { long.clone() };
            let attack = crowd.run(async move {
                if listener == "mirror" {
                    greedy.fetch(&path, until).await;
                    return 0;
                }
                greedy.call(&half, STREAMS, half_sent).await;
                match again.repeat(&whole, until).await {
                    // The peers' threads get little of a busy machine.
                    0 if answered => again.repeat(&whole, until + seconds(10)).await,
                    made => made,
                }
            });
            let (attack, paid) = tokio::join!(attack, watch(&fleet, before, until));
            let whole = attack?;
            let paid = paid.with_context(|| format!("{listener}, {peer}"))?;
            let log = u64::try_from(fleet.controller_log(0)?.len() - log)?;
            let disk = size(&fleet.data()).saturating_sub(disk);
            let (late, late_after) = paid.late;
            let worst = paid.answers.iter().max().copied().unwrap_or_default();
            let row = format!(
                "{listener}, {peer}: {} MiB, {} files, {} kB of log, {} kB of disk, {whole} whole calls, {} admin's \
                 calls, {late} late, the slowest {worst:?}\n",
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
            assert!(whole > 0 || !answered, "no whole call was answered\n{account}");
            assert!(late <= 1 && late_after == 0, "{account}");
        }
    }
    assert!(
        !account.is_empty(),
        "QUOTA_PEER={only:?} is none of {:?}",
        peers.iter().map(|(peer, _)| peer).collect::<Vec<_>>()
    );
    for node in ["held", "quarantined", "greedy"] {
        let count = certificates(&fleet, node).await?;
        assert!(count <= CERTIFICATES, "{count} certificates of {node}\n{account}");
    }
    let longest = fleet.controller_log(0)?.lines().map(str::len).max().unwrap_or_default();
    assert!(longest < 2000, "a line of {longest} bytes");
    fleet.went_well();
    Ok(())
}

/// The bounds that operators read are those that the attack is held to.
#[test]
fn written_bounds_are_those_that_are_measured() -> Result<()> {
    let written = std::fs::read_to_string(workspace().join("docs/security.md"))?;
    let (_, all_together) = written.split_once("All together:").context("no sum")?;
    // One line, however the text is wrapped.
    let all_together = all_together.split_whitespace().collect::<Vec<_>>().join(" ");
    for bound in [
        format!("less than {} MiB of memory", MEMORY >> 20),
        format!("less than {} MiB of log", LOG >> 20),
        format!("less than {} MiB of disk", DISK >> 20),
        format!("at most {CERTIFICATES} certificates of a node"),
        format!("within {} s", ANSWER.as_secs()),
    ] {
        assert!(all_together.contains(&bound), "docs/security.md does not say \"{bound}\": {all_together}");
    }
    Ok(())
}
