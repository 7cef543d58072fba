//! Connected peers that do nothing, observed frame by frame. Timeouts are shorter here than the constants.

use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;
use tokio_rustls::client::TlsStream;

use super::super::places::STRANGER_AGE;
use super::super::{API, CALL_TIMEOUT, ENROLMENT, ENROLMENT_AGE, ENROLMENT_CALL, ENROLMENT_GRACE, Patience, builder};
use super::{DEADLINE, PREFACE, TEN_SECONDS, connect, frame, house, served, served_by};
use crate::identity::roles::Role;

const PING: u8 = 6;
const SHORT: Duration = Duration::from_millis(300);

/// A HEADERS frame that opens a health call; its message never comes.
fn health_call() -> Vec<u8> {
    let path = b"/grpc.health.v1.Health/Check";
    let mut block = vec![0x83, 0x86, 0x04, u8::try_from(path.len()).unwrap()];
    block.extend(path);
    block.extend([0x0f, 0x10, 16]);
    block.extend(b"application/grpc");
    let mut headers = u32::try_from(block.len()).unwrap().to_be_bytes()[1..].to_vec();
    headers.extend([1, 4, 0, 0, 0, 1]);
    headers.extend(block);
    headers
}

/// The frames that arrive until the other side closes.
async fn frames(stream: &mut TlsStream<tokio::net::TcpStream>) -> Vec<u8> {
    let mut kinds = Vec::new();
    let until_closed = async {
        while let Ok((kind, _)) = frame(stream).await {
            kinds.push(kind);
        }
    };
    tokio::time::timeout(DEADLINE, until_closed).await.expect("it is not closed");
    kinds
}

#[tokio::test]
async fn a_peer_that_does_not_say_that_it_lives_is_let_go() {
    let house = house();
    let (addr, server) = served_by(&house, builder(Patience { ask: SHORT, answer: SHORT, ..API })).await;
    let mut stream = connect(addr, house.client(None)).await.unwrap();
    let begun = Instant::now();
    stream.write_all(PREFACE).await.unwrap();
    let kinds = frames(&mut stream).await;
    assert!(kinds.contains(&PING), "{kinds:?}");
    assert!(begun.elapsed() >= 2 * SHORT, "{:?}", begun.elapsed());
    server.abort();
}

#[tokio::test]
async fn a_connection_for_enrolment_ends_and_one_of_the_api_does_not() {
    let house = house();
    let ages = Patience { age: Some((SHORT, SHORT)), ..ENROLMENT };
    let (addr, server) = served_by(&house, builder(ages)).await;
    let mut stream = connect(addr, house.client(None)).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    let begun = Instant::now();
    frames(&mut stream).await;
    // Long before the first keepalive ping.
    assert!((SHORT / 2..API.ask / 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    server.abort();
    assert_eq!((ENROLMENT.age.map(|(age, _)| age), API.age), (Some(ENROLMENT_AGE), None));
}

#[tokio::test]
async fn a_request_that_never_comes_whole_is_answered_in_the_end() {
    let house = house();
    let (addr, server) = served_by(&house, builder(Patience { call: SHORT, ..API })).await;
    let mut stream = connect(addr, house.client(house.user(Role::Viewer))).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    let headers = health_call();
    let begun = Instant::now();
    stream.write_all(&headers).await.unwrap();
    let answered = async { while frame(&mut stream).await.unwrap().0 != 1 {} };
    tokio::time::timeout(DEADLINE, answered).await.expect("it is not answered");
    assert!(begun.elapsed() >= SHORT, "{:?}", begun.elapsed());
    server.abort();
    assert_eq!((API.call, ENROLMENT.call), (CALL_TIMEOUT, ENROLMENT_CALL));
}

#[tokio::test]
async fn strangers_connection_ends_and_an_accepted_one_stays() {
    let house = house();
    let (addr, server) = served(&house).await;
    let begun = Instant::now();
    let mut stranger = connect(addr, house.client(None)).await.unwrap();
    let mut viewer = connect(addr, house.client(house.user(Role::Viewer))).await.unwrap();
    stranger.write_all(PREFACE).await.unwrap();
    viewer.write_all(&[PREFACE, &health_call()].concat()).await.unwrap();
    frames(&mut stranger).await;
    assert!(TEN_SECONDS.contains(&begun.elapsed()), "{:?}", begun.elapsed());
    let more = tokio::time::timeout(Duration::from_secs(2), frames(&mut viewer)).await;
    assert!(more.is_err(), "the viewer's was closed");
    server.abort();
    assert_eq!(ENROLMENT_AGE + ENROLMENT_GRACE, STRANGER_AGE);
}

#[tokio::test]
async fn connection_whose_certificate_was_refused_is_closed() {
    let house = house();
    let (addr, server) = served(&house).await;
    // The store knows no such node.
    let mut stream = connect(addr, house.client(house.user(Role::Node))).await.unwrap();
    let begun = Instant::now();
    stream.write_all(&[PREFACE, &health_call()].concat()).await.unwrap();
    let kinds = frames(&mut stream).await;
    assert!(kinds.contains(&1), "there is no answer: {kinds:?}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    server.abort();
}
