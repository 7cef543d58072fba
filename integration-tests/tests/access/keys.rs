//! Keys of nodes: a stranger's key changes nothing, and a node that was away for long comes back by itself.

use std::time::Duration;

use anyhow::{Context as _, Result};
use integration_tests::certs::NodeKey;
use integration_tests::client::Credentials;
use integration_tests::fleet::{execution_name, reboot};
use integration_tests::process::{binary, run};
use integration_tests::{Fleet, seconds, wait_until};
use marco_proto::names::PROTOCOL_VERSION;
use marco_proto::v1::agent_service_client::AgentServiceClient;
use marco_proto::v1::connect_request::Message as Said;
use marco_proto::v1::node_service_client::NodeServiceClient;
use marco_proto::v1::{
    ApproveNodeRequest, AuditEvent, AuditFilter, Board, CertificateFilter, ConnectRequest, CreateJoinTokenRequest,
    GetNodeRequest, Hello, ListAuditEventsRequest, ListCertificatesRequest, NodeMode, RenewCertificateRequest,
    RenewCertificateResponse, Report, execution, node, operation,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::scene::{access, enrollment, wish};

const DAY: i64 = 24 * 3600;

fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

async fn events(fleet: &Fleet, filter: AuditFilter) -> Result<Vec<AuditEvent>> {
    let request = ListAuditEventsRequest { filter: Some(filter), ..ListAuditEventsRequest::default() };
    Ok(access(fleet).list_audit_events(request).await?.into_inner().audit_events)
}

/// Opens a session with a false report of success, and returns the status with which it is refused.
async fn says_hello(fleet: &Fleet, node: &Credentials, execution: &str, board: Option<Board>) -> Result<Status> {
    let report = Report {
        execution: execution.to_owned(),
        attempt: 1,
        sequence: 9,
        state: execution::State::Succeeded.into(),
        ..Report::default()
    };
    let hello = Hello {
        agent_version: "test".to_owned(),
        protocol_version: PROTOCOL_VERSION,
        boot_id: "01234567-89ab-cdef-0123-456789abcdef".to_owned(),
        mode: NodeMode::Running.into(),
        board,
        executions: vec![report],
        ..Hello::default()
    };
    let (says, said) = tokio::sync::mpsc::channel(4);
    says.send(ConnectRequest { message: Some(Said::Hello(hello)) }).await?;
    let mut client = AgentServiceClient::new(node.channel(fleet.addresses().api)?);
    let mut hears = client.connect(ReceiverStream::new(said)).await?.into_inner();
    match hears.message().await {
        Err(status) => Ok(status),
        Ok(heard) => anyhow::bail!("it was let in: {heard:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_and_a_serial_number_get_nothing_of_a_node_until_its_key_is_approved() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let before = fleet.node(&id).await?;
    let board = before.board.clone().context("no board")?;
    let operation = fleet.create(reboot(&[&id], Duration::from_secs(600))).await?;
    let work = execution_name(&operation, &id);
    fleet.execution_is(&operation.name, &id, seconds(20), execution::State::Running).await?;

    let thief = NodeKey::generate()?;
    let asked = wish(&fleet.token(1).await?, &thief, "", &board.serial)?;
    let enrolled = enrollment(&fleet, fleet.addresses().enroll)?.enroll(asked).await?.into_inner();
    assert!(enrolled.held && enrolled.node == before.name, "{}", enrolled.node);
    let identity = Some((enrolled.certificate.clone(), thief.pem()));
    let stolen = Credentials { ca: enrolled.ca_certificate.clone(), identity };
    let mut itself = NodeServiceClient::new(stolen.channel(fleet.addresses().api)?);
    let read = itself.get_node(GetNodeRequest { name: id.clone() }).await.unwrap_err();
    assert_eq!((read.code(), reason(&read).as_str()), (Code::PermissionDenied, "KEY_AWAITS_APPROVAL"));
    let refused = says_hello(&fleet, &stolen, &work, before.board.clone()).await?;
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::PermissionDenied, "KEY_AWAITS_APPROVAL"));
    // A pending key must not get anything by a renewal either.
    let signed = NodeKey::generate()?.request(&thief)?;
    let renewal = RenewCertificateRequest {
        certificate: enrolled.certificate,
        certificate_request: signed.pem,
        signature: signed.signature.into(),
    };
    let refused = enrollment(&fleet, fleet.addresses().enroll)?.renew_certificate(renewal).await.unwrap_err();
    assert_eq!(reason(&refused), "KEY_AWAITS_APPROVAL");

    // The node is unchanged, and still works.
    let now = fleet.node(&id).await?;
    assert_eq!((now.state(), now.connected, &now.boot_id), (node::State::Approved, true, &before.boot_id));
    assert_eq!(now.key_sha256, before.key_sha256);
    assert_eq!(fleet.execution(&operation.name, &id).await?.state(), execution::State::Running);
    // Otherwise anyone with a token could disconnect a node by naming its serial number.
    assert_eq!(fleet.agents_log()?.matches("session open").count(), 1, "its session was ended");
    let [waits] = now.pending_keys.as_slice() else { anyhow::bail!("{:?}", now.pending_keys) };
    assert_eq!((waits.serial.as_str(), waits.from.as_str()), (board.serial.as_str(), "127.0.0.1"));
    let told = events(&fleet, AuditFilter { method: "Connect".to_owned(), ..AuditFilter::default() }).await?;
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((told[0].caller.as_str(), told[0].resource.as_str()), (now.name.as_str(), now.name.as_str()));

    // An admin approves one key. The previous key is then held, but not revoked.
    let approve = |fingerprint: &str| ApproveNodeRequest { name: id.clone(), fingerprint: fingerprint.to_owned() };
    let unclear = fleet.nodes().approve_node(approve("")).await.unwrap_err();
    assert_eq!((unclear.code(), reason(&unclear).as_str()), (Code::FailedPrecondition, "FINGERPRINT_NEEDED"));
    assert!(unclear.message().contains(&waits.key_sha256), "{}", unclear.message());
    let api = format!("localhost:{}", fleet.addresses().api.port());
    let certs = fleet.certs().display().to_string();
    let arguments = ["--controller", &api, "--certs", &certs, "nodes", "approve", &id, "--fingerprint"];
    let shown =
        run(&binary("marcoctl")?, &[&arguments[..], &[&waits.key_sha256]].concat(), seconds(30)).await?.success()?;
    assert!(shown.contains(&waits.key_sha256), "{shown}");
    assert_eq!(itself.get_node(GetNodeRequest { name: id.clone() }).await?.into_inner().key_sha256, waits.key_sha256);
    wait_until(seconds(60), "the one before waits", async || {
        let node = fleet.node(&id).await?;
        Ok(node.pending_keys.iter().any(|key| key.key_sha256 == before.key_sha256).then_some(()))
    })
    .await?;
    let held = events(&fleet, AuditFilter { method: "HOLD_KEY".to_owned(), ..AuditFilter::default() }).await?;
    assert_eq!((held.len(), held[0].resource.as_str()), (1, before.name.as_str()));
    // The previous key was the right one after all: one approval brings the node back to its work.
    fleet.nodes().approve_node(approve(&before.key_sha256.to_uppercase())).await?;
    wait_until(seconds(90), "the node is back", async || Ok(fleet.node(&id).await?.connected.then_some(()))).await?;
    fleet.cancel(&operation.name).await?;
    fleet.ends(&operation.name, seconds(30), operation::State::Cancelled).await?;
    fleet.went_well();
    Ok(())
}

/// The controller's clock, in seconds since 1970.
async fn controller_time(fleet: &Fleet) -> Result<i64> {
    let token = fleet.nodes().create_join_token(CreateJoinTokenRequest::default()).await?.into_inner();
    Ok(token.create_time.context("no time")?.seconds)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_off_for_months_comes_back_by_itself_whatever_its_clock_says() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).own_clocks().start().await?;
    let id = fleet.ids().await?.remove(0);
    let begun = controller_time(&fleet).await?;
    // The time that the node remembers: that of its last session, the year 2040, and one long ago.
    for (number, remembered) in [(1, None), (2, Some("2208988800000000")), (3, Some("1000000"))] {
        fleet.kill_agents().await?;
        if let Some(time) = remembered {
            std::fs::write(fleet.pi(&id).path("agent/time"), time)?;
        }
        let ahead = number * 100 * DAY;
        fleet.jump_clock(0, ahead)?;
        wait_until(seconds(30), "the controller is months ahead", async || {
            Ok((controller_time(&fleet).await? >= begun + ahead).then_some(()))
        })
        .await?;
        let expired = fleet.node(&id).await?.certificate_expire_time.context("no certificate")?.seconds;
        assert!(expired < begun + ahead, "its certificate is still valid");
        fleet.start_agents()?;
        let node = wait_until(seconds(60), "it is back", async || {
            let node = fleet.node(&id).await?;
            let renewed = node.certificate_expire_time.is_some_and(|end| end.seconds > begun + ahead);
            Ok((node.connected && renewed).then_some(node))
        })
        .await?;
        assert_eq!((node.state(), node.pending_keys.len()), (node::State::Approved, 0));
        // The node has a new key, and the previous one is deleted, once it has heard the Welcome of this session.
        let folder = fleet.pi(&id).path("agent");
        wait_until(seconds(30), "its new key is its only one", async || {
            let key = NodeKey::read(&folder.join("node.key"))?;
            let is_only = key.fingerprint() == node.key_sha256 && !folder.join("next.key").exists();
            Ok(is_only.then_some(()))
        })
        .await?;
    }
    let renewals = events(&fleet, AuditFilter { method: "RenewCertificate".to_owned(), ..AuditFilter::default() });
    let renewals = renewals.await?;
    let told: Vec<_> = renewals.iter().map(|event| (event.caller.as_str(), event.code.as_str())).collect();
    assert_eq!(told, [(format!("nodes/{id}").as_str(), "OK"); 3]);
    fleet.succeeds(reboot(&[&id], Duration::ZERO), seconds(60)).await?;
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_admin_reads_why_a_join_was_refused_and_the_caller_does_not() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    let limited = CreateJoinTokenRequest { serials: vec!["00000000000000aa".to_owned()], ..Default::default() };
    let limited = fleet.nodes().create_join_token(limited).await?.into_inner();
    let open = CreateJoinTokenRequest { max_uses: 9, ..Default::default() };
    let open = fleet.nodes().create_join_token(open).await?.into_inner();
    let mut answers = Vec::new();
    for (token, id, serial) in
        [(&limited, "lab-1", "00000000000000bb"), (&open, "admin", "00000000000000cc"), (&open, "Controller", "")]
    {
        let asked = wish(&token.token, &NodeKey::generate()?, id, serial)?;
        let refused = enrollment(&fleet, fleet.addresses().enroll)?.enroll(asked).await.unwrap_err();
        answers.push((refused.code(), refused.message().to_owned(), refused.details().to_vec()));
    }
    // An attacker who could tell the refusals apart would learn ids, serial numbers and names.
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "they tell one from the other: {answers:?}");
    let refused = AuditFilter { method: "Enroll".to_owned(), refused: true, ..AuditFilter::default() };
    let told = events(&fleet, refused).await?;
    let told: Vec<_> = told
        .iter()
        .rev()
        .map(|event| (event.credential.as_str(), event.resource.as_str(), event.message.as_str()))
        .collect();
    assert_eq!(
        told,
        [
            (
                limited.name.as_str(),
                "nodes/lab-1",
                "the join token is not for a board with this serial number (serial number 00000000000000bb)"
            ),
            (open.name.as_str(), "nodes/admin", "admin is the name of users/admin (serial number 00000000000000cc)"),
            (open.name.as_str(), "nodes/Controller", "Controller is a name of the controller itself"),
        ]
    );
    fleet.went_well();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_is_refused_again_and_again_is_recorded_a_few_times() -> Result<()> {
    let mut fleet = Fleet::builder().pis(1).start().await?;
    let id = fleet.ids().await?.remove(0);
    let serial = fleet.node(&id).await?.board.context("no board")?.serial;
    let key = NodeKey::generate()?;
    let asked = wish(&fleet.token(1).await?, &key, "", &serial)?;
    let enrolled = enrollment(&fleet, fleet.addresses().enroll)?.enroll(asked).await?.into_inner();
    let node = Credentials { ca: enrolled.ca_certificate, identity: Some((enrolled.certificate, key.pem())) };
    for _ in 0..20 {
        assert_eq!(says_hello(&fleet, &node, "", None).await?.code(), Code::PermissionDenied);
    }
    let told = events(&fleet, AuditFilter { method: "Connect".to_owned(), ..AuditFilter::default() }).await?;
    // Twenty refusals must not fill the audit with twenty rows.
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(told.iter().all(|event| event.credential.starts_with("certificates/")), "{told:?}");
    fleet.went_well();
    Ok(())
}

/// Asks for a renewal on a connection of its own, because a stranger's connection lives for ten seconds.
async fn renewed(fleet: &Fleet, request: &RenewCertificateRequest) -> Result<RenewCertificateResponse, Status> {
    let client = enrollment(fleet, fleet.addresses().enroll);
    let mut client = client.map_err(|error| Status::internal(error.to_string()))?;
    Ok(client.renew_certificate(request.clone()).await?.into_inner())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_renewals_leave_one_certificate_and_one_row() -> Result<()> {
    let mut fleet = Fleet::builder().pis(0).start().await?;
    // Held, because such a node has shown nothing but a token.
    let node = fleet.enrol_by_hand("again", true).await?;
    let (certificate, pem) = node.identity.context("no identity")?;
    let key = NodeKey::parse(&pem)?;
    let renewal = || -> Result<RenewCertificateRequest> {
        let signed = NodeKey::generate()?.request(&key)?;
        let signature = signed.signature.into();
        Ok(RenewCertificateRequest { certificate: certificate.clone(), certificate_request: signed.pem, signature })
    };
    let certificates = async || {
        let filter = CertificateFilter { subject: "again".to_owned(), ..CertificateFilter::default() };
        let request = ListCertificatesRequest { filter: Some(filter), ..ListCertificatesRequest::default() };
        anyhow::Ok(access(&fleet).list_certificates(request).await?.into_inner().certificates.len())
    };
    let rows = async || {
        let filter = AuditFilter { method: "RenewCertificate".to_owned(), ..AuditFilter::default() };
        events(&fleet, filter).await
    };
    let before = certificates().await?;
    let request = renewal()?;
    let first = renewed(&fleet, &request).await?;
    // The same request gets the same answer. Takes most of the address's hundred tries.
    for _ in 0..60 {
        assert_eq!(renewed(&fleet, &request).await?.certificate, first.certificate);
    }
    let recorded = rows().await?;
    assert_eq!(recorded.len(), 1, "{recorded:#?}");
    // Each other request is refused, unread after the hundredth.
    for number in 0..60 {
        let refused =
            renewed(&fleet, &renewal()?).await.err().with_context(|| format!("renewal {number} succeeded"))?;
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    }
    assert_eq!(certificates().await?, before + 1);
    let recorded = rows().await?;
    // The first one, and of those that were refused twenty at once and one in ten seconds.
    assert!(recorded.len() < 40, "{} rows", recorded.len());
    fleet.went_well();
    Ok(())
}
