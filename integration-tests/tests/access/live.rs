//! An admin's changes act on open streams within 5 s, also on the other controller, without notifications.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use integration_tests::client::{Credentials, reason};
use integration_tests::postgres::Postgres;
use integration_tests::{Database, Fleet, seconds, wait_until};
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::operation_service_client::OperationServiceClient;
use marco_proto::v1::{
    ListCertificatesRequest, QuarantineNodeRequest, RevokeApiTokenRequest, RevokeCertificateRequest, RevokeUserRequest,
    Role, UpdateUserRequest, User, WatchNodesRequest, WatchNodesResponse, WatchOperationRequest,
};
use prost_types::FieldMask;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::scene::{access, api_token, later, node, room, user};

/// The documented deadline.
const PROMISED: Duration = seconds(5);

/// Two controllers without notifications.
async fn fleet(pis: usize) -> Result<Fleet> {
    let url = tokio::task::spawn_blocking(|| Postgres::start()?.database()).await??;
    Fleet::builder().pis(pis).controllers(2).notifications(false).database(Database::Url(url)).start().await
}

/// Waits for the end of a stream, and returns its status and the time that took.
async fn end<T>(mut stream: Streaming<T>) -> Result<(Status, Duration)> {
    let begun = Instant::now();
    let ended = tokio::time::timeout(seconds(20), async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                // A clean end would tell a client that there is nothing more to hear, and it would not ask again.
                Ok(None) => bail!("it ended as if all were well"),
                Err(status) => return Ok(status),
            }
        }
    });
    let status = ended.await.context("it goes on")??;
    Ok((status, begun.elapsed()))
}

async fn watch_nodes(channel: Channel) -> Result<Streaming<WatchNodesResponse>> {
    let mut stream = NodeServiceClient::new(channel).watch_nodes(WatchNodesRequest::default()).await?.into_inner();
    // After the first message the stream is surely open at the controller.
    stream.message().await?.context("it ended")?;
    Ok(stream)
}

fn channels(fleet: &mut Fleet, who: &Credentials) -> Result<[Channel; 2]> {
    fleet.talk_to(1)?;
    let other = who.channel(fleet.addresses().api)?;
    fleet.talk_to(0)?;
    Ok([who.channel(fleet.addresses().api)?, other])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_a_user_and_a_token_that_are_revoked_are_out_of_open_streams_within_5_s() -> Result<()> {
    let mut fleet = fleet(0).await?;
    node(&fleet, "pi-1", "in").await?;
    let operation = fleet.create(later(&["pi-1"])).await?.name;
    let kim = user(&fleet, "kim", Role::Operator, None).await?;
    let lee = user(&fleet, "lee", Role::Viewer, None).await?;
    let secret = api_token(&fleet, "script", Role::Viewer, None).await?;
    let anonymous = fleet.admin().anonymous();
    let mut streams = Vec::new();
    for channel in channels(&mut fleet, &kim)?.into_iter().chain(channels(&mut fleet, &lee)?) {
        streams.push(watch_nodes(channel).await?);
    }
    let mut by_token = Vec::new();
    let shown: tonic::metadata::MetadataValue<_> = format!("Bearer {secret}").parse()?;
    // A token travels in each call and not in the handshake, so its streams are ended in another way.
    for channel in channels(&mut fleet, &anonymous)? {
        let mut request = Request::new(WatchOperationRequest { name: operation.clone() });
        request.metadata_mut().insert("authorization", shown.clone());
        by_token.push(OperationServiceClient::new(channel).watch_operation(request).await?.into_inner());
    }

    // All changes are made on controller 0.
    let list = access(&fleet).list_certificates(ListCertificatesRequest::default()).await?.into_inner();
    let of_kim = list.certificates.iter().find(|found| found.subject == "kim").context("no certificate of kim")?;
    let name = of_kim.name.clone();
    access(&fleet).revoke_certificate(RevokeCertificateRequest { name }).await?;
    access(&fleet).revoke_user(RevokeUserRequest { name: "users/lee".to_owned() }).await?;
    access(&fleet).revoke_api_token(RevokeApiTokenRequest { name: "script".to_owned() }).await?;
    let begun = Instant::now();
    let (mut ends, mut tokens) = (Vec::new(), Vec::new());
    for stream in streams {
        ends.push(end(stream).await?);
    }
    for stream in by_token {
        tokens.push(end(stream).await?);
    }
    let took = begun.elapsed();
    assert!(took < PROMISED, "{took:?}");
    for (status, _) in &ends {
        assert_eq!((status.code(), reason(status).as_str()), (Code::Unauthenticated, "CERTIFICATE_REVOKED"));
    }
    for (status, _) in &tokens {
        assert_eq!((status.code(), reason(status).as_str()), (Code::Unauthenticated, "API_TOKEN_REFUSED"));
    }
    // New calls are refused too, on each controller.
    for channel in channels(&mut fleet, &kim)?.into_iter().chain(channels(&mut fleet, &lee)?) {
        let status = NodeServiceClient::new(channel).watch_nodes(WatchNodesRequest::default()).await.unwrap_err();
        assert_eq!(reason(&status), "CERTIFICATE_REVOKED");
    }
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_scope_takes_nodes_out_of_open_watches_and_a_changed_role_acts_on_the_next_call() -> Result<()> {
    let mut fleet = fleet(0).await?;
    node(&fleet, "in-1", "in").await?;
    node(&fleet, "out-1", "out").await?;
    let kim = user(&fleet, "kim", Role::Operator, None).await?;
    let [_, other] = channels(&mut fleet, &kim)?;
    let mut nodes = NodeServiceClient::new(other.clone());
    let mut watch = nodes.watch_nodes(WatchNodesRequest::default()).await?.into_inner();
    assert_eq!(watch.message().await?.context("it ended")?.nodes.len(), 2);
    // A watched operation outside the new scope: this watch must end.
    let operation = fleet.create(later(&["out-1"])).await?.name;
    let request = WatchOperationRequest { name: operation };
    let outside = OperationServiceClient::new(other.clone()).watch_operation(request).await?.into_inner();

    let update = |role: Role, selector, path: &str| UpdateUserRequest {
        user: Some(User { name: "users/kim".to_owned(), role: role.into(), selector, ..User::default() }),
        update_mask: Some(FieldMask { paths: vec![path.to_owned()] }),
    };
    access(&fleet).update_user(update(Role::Unspecified, room("in"), "selector")).await?;
    let begun = Instant::now();
    let deleted = tokio::time::timeout(seconds(20), async {
        loop {
            let change = watch.message().await?.context("the watch ended")?;
            if !change.deleted.is_empty() {
                return anyhow::Ok(change.deleted);
            }
        }
    });
    assert_eq!(deleted.await??, ["nodes/out-1"]);
    assert!(begun.elapsed() < PROMISED, "{:?}", begun.elapsed());
    let (status, _) = end(outside).await?;
    assert_eq!((reason(&status).as_str(), begun.elapsed() < PROMISED), ("OUTSIDE_SCOPE", true));

    let create = |nodes: &[&str]| marco_proto::v1::CreateOperationRequest {
        operation: Some(later(nodes)),
        request_id: String::new(),
    };
    let mut operations = OperationServiceClient::new(other);
    operations.create_operation(create(&["in-1"])).await?;
    access(&fleet).update_user(update(Role::Viewer, room(""), "role")).await?;
    let refused = operations.create_operation(create(&["in-1"])).await.unwrap_err();
    assert_eq!(reason(&refused), "ROLE_NOT_ALLOWED");
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quarantined_node_is_out_within_5_s_whichever_controller_is_told() -> Result<()> {
    let mut fleet = fleet(1).await?;
    let id = fleet.ids().await?.remove(0);
    fleet.talk_to(1)?;
    let request = QuarantineNodeRequest { name: id.clone(), reason: "smoke".to_owned() };
    fleet.nodes().quarantine_node(request).await?;
    wait_until(PROMISED, "its agent is told to go", async || {
        let said = fleet.agents_log()?;
        Ok((said.contains("not admitted") || said.contains("quarantined")).then_some(()))
    })
    .await?;
    assert!(!fleet.node(&id).await?.connected);
    // The certificate gives no other access either.
    let pi = fleet.pi(&id);
    let identity = Some((pi.read("agent/node.crt")?, pi.read("agent/node.key")?));
    let certificate = Credentials { ca: fleet.admin().ca.clone(), identity };
    let mut itself = NodeServiceClient::new(certificate.channel(fleet.addresses().api)?);
    let request = marco_proto::v1::GetNodeRequest { name: id };
    assert_eq!(reason(&itself.get_node(request).await.unwrap_err()), "NODE_QUARANTINED");
    fleet.went_well();
    Ok(())
}
