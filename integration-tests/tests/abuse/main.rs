//! Attackers who can reach the ports, with or without a certificate: they are cut off and cost little, and honest nodes
//! enrol meanwhile.

mod doors;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::future::{join_all, try_join_all};
use integration_tests::certs::NodeKey;
use integration_tests::client::Credentials;
use integration_tests::fleet::Addresses;
use integration_tests::frames::{END_HEADERS, END_STREAM, Ended, Raw, call, field, frame, kind};
use integration_tests::{Fleet, seconds};
use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::{Board, EnrollRequest, ListNodesRequest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Code;

/// Time within which a flooding client is cut off.
const CUT: Duration = seconds(2);
/// Streams of one attack.
const STREAMS: u32 = 5000;
/// Connections that never complete their handshake.
const HALF_OPEN: usize = 1000;
/// Time within which an honest node enrols, on a busy machine.
const HONEST: Duration = seconds(10);
/// Most bytes that all attacks may cost the controller at once: buffers of connections, and memory that the allocator
/// keeps.
const MEMORY: u64 = 48 << 20;

/// Makes the generator of one attack's blocks, for a method.
type Attack = fn(&str) -> Box<dyn FnMut() -> Vec<u8> + Send>;

fn open(stream: u32, path: &str) -> Vec<u8> {
    frame(kind::HEADERS, END_HEADERS, stream, &call(path))
}

/// One block for each hundred streams, then an empty one.
fn streams(path: &str, each: fn(u32, &str) -> Vec<u8>) -> Box<dyn FnMut() -> Vec<u8> + Send> {
    let (path, mut next) = (path.to_owned(), 0);
    Box::new(move || {
        let from = next;
        next = (next + 100).min(STREAMS);
        (from..next).flat_map(|number| each(2 * number + 1, &path)).collect()
    })
}

/// A beginning, then the same block without end.
fn endless(beginning: Vec<u8>, block: &[u8]) -> Box<dyn FnMut() -> Vec<u8> + Send> {
    let (mut beginning, block) = (Some(beginning), block.repeat(100));
    Box::new(move || beginning.take().unwrap_or_else(|| block.clone()))
}

const ATTACKS: [(&str, Attack); 9] = [
    ("5,000 streams that never end", |path| streams(path, open)),
    ("rapid reset", |path| {
        streams(path, |stream, path| {
            [open(stream, path), frame(kind::RST_STREAM, 0, stream, &8_u32.to_be_bytes())].concat()
        })
    }),
    ("malformed requests", |path| {
        streams(path, |stream, path| {
            let headers = [call(path), field("connection", "x")].concat();
            frame(kind::HEADERS, END_HEADERS | END_STREAM, stream, &headers)
        })
    }),
    ("CONTINUATION without end", |path| {
        let more = frame(kind::CONTINUATION, 0, 1, &field("x-more", &"x".repeat(1000)));
        endless(frame(kind::HEADERS, 0, 1, &call(path)), &more)
    }),
    ("empty CONTINUATION", |path| {
        endless(frame(kind::HEADERS, 0, 1, &call(path)), &frame(kind::CONTINUATION, 0, 1, &[]))
    }),
    ("empty DATA", |path| endless(open(1, path), &frame(kind::DATA, 0, 1, &[]))),
    ("SETTINGS", |_| endless(frame(kind::PING, 0, 0, &[0; 8]), &frame(kind::SETTINGS, 0, 0, &[]))),
    ("PING", |_| endless(frame(kind::SETTINGS, 0, 0, &[]), &frame(kind::PING, 0, 0, &[0; 8]))),
    ("PRIORITY", |_| endless(frame(kind::SETTINGS, 0, 0, &[]), &frame(kind::PRIORITY, 0, 1, &[0, 0, 0, 3, 1]))),
];

/// A listener with a caller's credentials.
struct Door {
    what: &'static str,
    address: SocketAddr,
    who: Credentials,
    /// A method that exists at this listener.
    path: &'static str,
}

fn doors(fleet: &Fleet) -> Result<Vec<Door>> {
    let nobody = fleet.admin().anonymous();
    let (api, enroll) = (fleet.addresses().api, fleet.addresses().enroll);
    Ok(vec![
        Door { what: "API, nobody", address: api, who: nobody.clone(), path: "/grpc.health.v1.Health/Check" },
        Door {
            what: "API, a viewer",
            address: api,
            who: fleet.user("viewer")?,
            path: "/marco.bootstrap.v1.NodeService/ListNodes",
        },
        Door { what: "enrolment", address: enroll, who: nobody, path: "/marco.bootstrap.v1.EnrollmentService/Enroll" },
    ])
}

/// Enrols a node by hand, and returns the time that took.
async fn enrol(fleet: &Fleet, token: &str, id: &str) -> Result<Duration> {
    let begun = Instant::now();
    let key = NodeKey::generate()?;
    let mut client = EnrollmentServiceClient::new(fleet.admin().anonymous().channel(fleet.addresses().enroll)?);
    let request = EnrollRequest {
        token: token.to_owned(),
        certificate_request: key.request(&key)?.pem,
        node_id: id.to_owned(),
        board: Some(Board::default()),
    };
    let answer = tokio::time::timeout(HONEST, client.enroll(request)).await.context("an honest node was kept out")?;
    assert_eq!(answer?.into_inner().node, format!("nodes/{id}"));
    Ok(begun.elapsed())
}

async fn attack(door: &Door, name: &str, attack: Attack) -> Result<Ended> {
    let raw = Raw::connect(door.address, &door.who).await?;
    raw.flood(seconds(20), attack(door.path)).await.with_context(|| format!("{}: {name}", door.what))
}

#[tokio::test]
async fn whoever_floods_is_cut_off_within_two_seconds_and_honest_nodes_get_in_meanwhile() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let rounds = 3;
    let token = fleet.token(rounds).await?;
    // The first connection of each kind allocates memory once, which is no growth.
    enrol(&fleet, &fleet.token(1).await?, "first").await?;
    let before = fleet.memory(0, "VmRSS")?;
    let doors = doors(&fleet)?;
    for round in 0..rounds {
        let attacks = doors.iter().flat_map(|door| {
            ATTACKS.map(|(name, make)| async move {
                let ended = attack(door, name, make).await?;
                anyhow::ensure!(ended.after < CUT, "{}: {name}: {ended:?}", door.what);
                anyhow::Ok(())
            })
        });
        let id = format!("honest-{round}");
        let (attacked, honest) = tokio::join!(try_join_all(attacks), enrol(&fleet, &token, &id));
        attacked?;
        honest?;
    }
    let (after, worst) = (fleet.memory(0, "VmRSS")?, fleet.memory(0, "VmHWM")?);
    assert!(worst < before + MEMORY, "{before} bytes before, {worst} at the worst, {after} after");
    fleet.went_well();
    Ok(())
}

/// Opens a connection and sends nothing, or half a record, until the peer closes it. Returns the connection's lifetime.
async fn half_open(address: SocketAddr, words: &[u8]) -> Result<Duration> {
    let begun = Instant::now();
    let mut tcp = TcpStream::connect(address).await?;
    tcp.write_all(words).await?;
    // The peer may answer with a TLS alert.
    while tcp.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {}
    Ok(begun.elapsed())
}

#[tokio::test]
async fn a_thousand_half_open_handshakes_are_ended_and_keep_nobody_out() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    integration_tests::process::raise_open_files();
    let token = fleet.token(3).await?;
    enrol(&fleet, &fleet.token(1).await?, "first").await?;
    let before = fleet.memory(0, "VmRSS")?;
    let Addresses { api, enroll, mirror, .. } = fleet.addresses();
    let addresses = [api, enroll, mirror];
    for (number, address) in addresses.into_iter().enumerate() {
        // The second kind announces a record of 512 bytes, and sends five of them.
        let words: [&[u8]; 2] = [b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03"];
        let crowd = words.into_iter().cycle().take(HALF_OPEN).map(|words| half_open(address, words));
        let id = format!("honest-{number}");
        let mut nodes = fleet.nodes();
        let (crowd, honest, listed) =
            tokio::join!(join_all(crowd), enrol(&fleet, &token, &id), nodes.list_nodes(ListNodesRequest::default()));
        honest?;
        listed?;
        for ended in crowd {
            // One second more, because a thousand connects take time too.
            assert!(ended? < CUT + seconds(1), "a half-open handshake was kept");
        }
    }
    let worst = fleet.memory(0, "VmHWM")?;
    assert!(worst < before + MEMORY, "{before} bytes before, {worst} at the worst");
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn what_is_too_large_is_refused_and_the_connection_of_a_client_that_asks_on_stays() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    // Exactly the limit of a message, so that the whole request is larger.
    let token = "x".repeat(1 << 20);
    let mut enrollment = EnrollmentServiceClient::new(fleet.admin().anonymous().channel(fleet.addresses().enroll)?);
    let large = EnrollRequest { token, ..EnrollRequest::default() };
    let status = enrollment.enroll(large).await.err().context("a message of more than 1 MiB was read")?;
    assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status:?}");
    let mut request = tonic::Request::new(ListNodesRequest::default());
    request.metadata_mut().insert("x-large", "x".repeat(20_000).parse()?);
    let status = fleet.nodes().list_nodes(request).await.err().context("20 kB of headers were read")?;
    assert!(!matches!(status.code(), Code::Ok | Code::Internal), "{status:?}");
    fleet.nodes().list_nodes(ListNodesRequest::default()).await?;

    for door in doors(&fleet)? {
        // Larger than the announced maximum of a frame: FRAME_SIZE_ERROR.
        let large = endless(open(1, door.path), &frame(kind::DATA, 0, 1, &vec![0; 300_000])[..]);
        let ended = Raw::connect(door.address, &door.who).await?.flood(seconds(20), large).await?;
        assert_eq!(ended.goaway, Some(6), "{}: {ended:?}", door.what);
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test]
async fn a_client_that_calls_a_lot_is_no_flood() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let channel = fleet.user("viewer")?.channel(fleet.addresses().api)?;
    // As many calls as a busy service makes: the count of streams must not take it for a rapid reset.
    for _ in 0..10 {
        let calls = (0..200).map(|_| {
            let mut nodes = marco_proto::v1::node_service_client::NodeServiceClient::new(channel.clone());
            async move { nodes.list_nodes(ListNodesRequest::default()).await }
        });
        try_join_all(calls).await?;
    }
    assert!(!fleet.controller_log(0)?.contains("a connection was closed: too many"));
    fleet.went_well();
    Ok(())
}
