//! Join tokens: their limits to nodes, networks and boards, and the number of uses.

use anyhow::{Context as _, Result};
use futures_util::future::join_all;
use integration_tests::certs::NodeKey;
use integration_tests::client::Credentials;
use integration_tests::postgres::Postgres;
use integration_tests::{Database, Fleet, seconds, wait_until};
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::{
    ApiToken, AuditFilter, CertificateFilter, CreateApiTokenRequest, CreateJoinTokenRequest, GetNodeRequest, JoinToken,
    ListAuditEventsRequest, ListCertificatesRequest, RevokeJoinTokenRequest, Role,
};
use tonic::{Code, Status};

use crate::scene::{access, enrollment, wish};

type Words = (Code, String, Vec<u8>);

fn words(status: &Status) -> Words {
    (status.code(), status.message().to_owned(), status.details().to_vec())
}

/// 50 nodes use one single-use token at once, spread over the controllers.
async fn fifty_at_once(fleet: &mut Fleet, controllers: usize) -> Result<()> {
    let token = fleet.token(1).await?;
    let mut listeners = Vec::new();
    for number in 0..controllers {
        fleet.talk_to(number)?;
        listeners.push(fleet.addresses().enroll);
    }
    let mut tries = Vec::new();
    for number in 0..50 {
        let mut client = enrollment(fleet, listeners[number % listeners.len()])?;
        let key = NodeKey::generate()?;
        let asked = wish(&token, &key, &format!("one-of-fifty-{number}"), &format!("50{number:02}"))?;
        tries.push(async move { client.enroll(asked).await });
    }
    let answers = join_all(tries).await;
    let admitted = answers.iter().filter(|answer| answer.is_ok()).count();
    // The same words for each refusal: a guesser must not learn why a token does not work.
    let refused: Vec<Words> = answers.iter().filter_map(|answer| answer.as_ref().err()).map(words).collect();
    assert_eq!((admitted, refused.len()), (1, 49), "{refused:?}");
    assert!(refused.iter().all(|words| *words == refused[0]), "they are told different things: {refused:?}");
    assert_eq!(refused[0].0, Code::PermissionDenied);
    assert_eq!(fleet.list_nodes().await?.len(), 1);
    let certificates = access(fleet).list_certificates(ListCertificatesRequest::default()).await?.into_inner();
    // A certificate that was issued for a refused enrolment would be valid all the same.
    let of_nodes = certificates.certificates.iter().filter(|found| found.subject.starts_with("one-of-fifty"));
    assert_eq!(of_nodes.count(), 1, "{certificates:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_at_once_with_a_token_for_one_get_one_certificate() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    fifty_at_once(&mut fleet, 1).await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_at_once_at_two_controllers_get_one_certificate() -> Result<()> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    let mut fleet = Fleet::builder().pis(0).controllers(2).database(Database::Url(url)).start().await?;
    fifty_at_once(&mut fleet, 2).await?;
    fleet.went_well();
    Ok(())
}

async fn token(fleet: &Fleet, request: CreateJoinTokenRequest) -> Result<JoinToken> {
    Ok(fleet.nodes().create_join_token(request).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_for_the_networks_boards_and_ids_that_it_names_and_says_no_more() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let list = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
    let many = CreateJoinTokenRequest { max_uses: 9, ..CreateJoinTokenRequest::default() };
    let elsewhere = token(&fleet, CreateJoinTokenRequest { cidrs: list(&["10.9.0.0/16"]), ..many.clone() }).await?;
    let here = token(&fleet, CreateJoinTokenRequest { cidrs: list(&["127.0.0.1/8"]), ..many.clone() }).await?;
    let board = token(&fleet, CreateJoinTokenRequest { serials: list(&["00AB", "00CD"]), ..many.clone() }).await?;
    let named = token(&fleet, CreateJoinTokenRequest { nodes: list(&["pi-a", "pi-b"]), ..many.clone() }).await?;
    assert_eq!((here.cidrs.clone(), board.serials.clone()), (list(&["127.0.0.0/8"]), list(&["00ab", "00cd"])));
    let bad = fleet.nodes().create_join_token(CreateJoinTokenRequest { cidrs: list(&["10.0.0.0/33"]), ..many }).await;
    assert_eq!(bad.unwrap_err().code(), Code::InvalidArgument);

    let enroll = async |token: &JoinToken, key: &NodeKey, id: &str, serial: &str| {
        let asked = wish(&token.token, key, id, serial)?;
        anyhow::Ok(enrollment(&fleet, fleet.addresses().enroll)?.enroll(asked).await.map(tonic::Response::into_inner))
    };
    let key = NodeKey::generate()?;
    let mut refused = Vec::new();
    for (token, id, serial) in [(&elsewhere, "pi-x", "1"), (&board, "pi-x", "00ef"), (&named, "pi-x", "1")] {
        refused.push(words(&enroll(token, &key, id, serial).await?.expect_err("a token for others was taken")));
    }
    let used = fleet.token(1).await?;
    let used = JoinToken { token: used, ..JoinToken::default() };
    assert_eq!(enroll(&used, &NodeKey::generate()?, "pi-used", "9").await??.node, "nodes/pi-used");
    refused.push(words(&enroll(&used, &key, "pi-x", "1").await?.unwrap_err()));
    assert!(refused.iter().all(|words| *words == refused[0]), "{refused:?}");

    assert_eq!(enroll(&here, &NodeKey::generate()?, "pi-here", "2").await??.node, "nodes/pi-here");
    assert_eq!(enroll(&named, &NodeKey::generate()?, "pi-a", "3").await??.node, "nodes/pi-a");
    let other_board = enroll(&named, &NodeKey::generate()?, "pi-a", "4").await?;
    assert!(other_board.is_err(), "another board got an id that the token does not name, or one that is taken");
    let first_key = NodeKey::generate()?;
    let first = enroll(&board, &first_key, "pi-board", "00AB").await??;
    assert!(!first.held);
    // The same board with a new key. The token names the board, so no approval is needed, and the old key is held.
    let again = enroll(&board, &NodeKey::generate()?, "", "00ab").await??;
    assert_eq!((again.node.as_str(), again.held), ("nodes/pi-board", false));
    let filter = CertificateFilter { subject: "pi-board".to_owned(), valid: true };
    let request = ListCertificatesRequest { filter: Some(filter), ..ListCertificatesRequest::default() };
    let valid = access(&fleet).list_certificates(request).await?.into_inner().certificates;
    let mut generations: Vec<i64> = valid.iter().map(|certificate| certificate.generation).collect();
    generations.sort_unstable();
    assert_eq!(generations, [1, 2], "{valid:?}");
    let before = Credentials { ca: first.ca_certificate, identity: Some((first.certificate, first_key.pem())) };
    let mut before = NodeServiceClient::new(before.channel(fleet.addresses().api)?);
    let out = before.get_node(GetNodeRequest { name: "pi-board".to_owned() }).await.unwrap_err();
    assert!(out.message().contains("waits for an admin's approval"), "{out}");

    // Revoking a token lists the nodes and boards that can no longer enrol.
    let revoke = async |token: &JoinToken| {
        let request = RevokeJoinTokenRequest { name: token.name.clone() };
        anyhow::Ok(fleet.nodes().revoke_join_token(request).await?.into_inner())
    };
    assert_eq!(revoke(&named).await?.stranded, list(&["nodes/pi-a", "nodes/pi-b"]), "pi-a has never connected");
    let revoked = revoke(&board).await?;
    assert_eq!(revoked.stranded, list(&["nodes/pi-board", "serial 00cd"]));
    assert!(revoked.revoked);
    let node = fleet.node("pi-board").await.context("it is gone")?;
    assert!(node.labels.is_empty());
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_refused_too_often_waits_and_its_tries_do_not_fill_the_audit() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let token = fleet.token(1).await?;
    let parts: Vec<&str> = token.split('.').collect();
    // The right id with a wrong secret, as in an attempt to guess it.
    let wrong = [parts[0], parts[1], "A".repeat(43).as_str(), parts[3]].join(".");
    let key = NodeKey::generate()?;
    let mut client = enrollment(&fleet, fleet.addresses().enroll)?;
    let mut limited = 0;
    for _ in 0..150 {
        let status = client.enroll(wish(&wrong, &key, "pi-x", "1")?).await.unwrap_err();
        match status.code() {
            Code::PermissionDenied => {}
            Code::ResourceExhausted => limited += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(limited > 20, "{limited}");
    let request = ListAuditEventsRequest { page_size: 1000, ..Default::default() };
    let events = access(&fleet).list_audit_events(request).await?.into_inner().audit_events;
    let of_it = events.iter().filter(|event| event.method == "Enroll").count();
    // Twenty at once, then one each ten seconds, for an unknown address.
    assert!((10..=40).contains(&of_it), "{of_it} of 150 are recorded");
    fleet.went_well();
    Ok(())
}

/// The store, the housekeeping and the recorder together, under a clock of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn token_that_expires_soon_is_told_in_audit_and_log() -> Result<()> {
    const DAY: i64 = 24 * 3600;
    let mut fleet = Fleet::builder().pis(0).own_clocks().start().await?;
    let lifetime = prost_types::Duration { seconds: 30 * DAY, nanos: 0 };
    let request = CreateApiTokenRequest {
        api_token: Some(ApiToken { role: Role::Viewer.into(), ..ApiToken::default() }),
        api_token_id: "nightly".to_owned(),
        ttl: Some(lifetime),
    };
    access(&fleet).create_api_token(request).await?;
    // A clock that is set by weeks under a running controller is in doubt, and a start is not. The step of an hour makes
    // the housekeeping due at once.
    fleet.kill(0).await?;
    fleet.jump_clock(0, 17 * DAY)?;
    fleet.revive(0)?;
    fleet.controller_is_healthy().await?;
    fleet.jump_clock(0, 17 * DAY + 3600)?;
    let told = wait_until(seconds(60), "the audit tells of it", async || {
        let filter = Some(AuditFilter { method: "EXPIRES".to_owned(), ..AuditFilter::default() });
        let request = ListAuditEventsRequest { filter, ..ListAuditEventsRequest::default() };
        let events = access(&fleet).list_audit_events(request).await?.into_inner().audit_events;
        Ok(events.into_iter().find(|event| event.resource == "apiTokens/nightly"))
    })
    .await?;
    assert!(told.message.contains("make another one in time"), "{told:?}");
    let log = fleet.controller_log(0)?;
    let line = log.lines().find(|line| line.contains("a credential expires")).context("the log says nothing")?;
    assert!(line.contains("apiTokens/nightly"), "{line}");
    fleet.went_well();
    Ok(())
}
