//! Enrolment and renewal against a controller with real TLS.

mod clocks;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use marco_proto::v1::ConnectRequest;
use marco_proto::v1::agent_service_client::AgentServiceClient;
use rcgen::{CertificateSigningRequestParams, KeyPair, PublicKeyData as _};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateSigningRequestDer, alg_id};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Board, Enrollment, Identity, IdentityError, JoinFile, JoinToken, KeyPolicy, Purpose, TlsTime, enroll};
use crate::testing::{Controller, Pki, digest};

const FROM: &str = "2026-01-01T00:00:00Z";
const TO: &str = "2026-01-31T00:00:00Z";

fn time() -> Arc<TlsTime> {
    Arc::new(TlsTime::starting_at(0))
}

fn enrollment(controller: &Controller, token: &str) -> Enrollment {
    Enrollment {
        listeners: vec![controller.address.clone()],
        token: JoinToken::parse(token).unwrap(),
        name: "pi-01".into(),
        board: Board { serial: "10000000abcdef01".into(), ..Board::default() },
    }
}

async fn enrolled(directory: &Path, controller: &Controller) -> Identity {
    let token = controller.pki.token();
    assert!(!enroll(directory, &enrollment(controller, &token), &time()).await.unwrap());
    Identity::load(directory, time()).unwrap().unwrap()
}

#[tokio::test]
async fn a_token_is_exchanged_for_an_identity_whatever_the_clock_says() {
    let dir = tempfile::tempdir().unwrap();
    // The node's time starts in 1970, so certificates of 2026 are not valid yet by it.
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    let identity = enrolled(dir.path(), &controller).await;
    assert_eq!(identity.node(), "pi-01");
    let mode = std::fs::metadata(dir.path().join("node.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let asked = controller.enrolled();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].board.as_ref().unwrap().serial, "10000000abcdef01");
    identity.connect(&controller.address, Purpose::Session).await.unwrap();
    identity.connect(&controller.address, Purpose::Download).await.unwrap();
}

#[tokio::test]
async fn a_controller_of_another_ca_never_sees_the_token() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    let (secret, pin) = (URL_SAFE_NO_PAD.encode([7; 32]), URL_SAFE_NO_PAD.encode(digest("another key")));
    let token = format!("mj1.one.{secret}.{pin}");
    let refused = enroll(dir.path(), &enrollment(&controller, &token), &time()).await;
    assert!(matches!(refused, Err(IdentityError::Connect { .. })), "{refused:?}");
    // The pin is checked in the handshake, before the token is sent.
    assert_eq!(controller.enrolled(), []);
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused_under_the_right_ca() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Arc::new(Pki::new(FROM, TO));
    // Nodes have certificates of the same CA, so the CA alone does not make a controller.
    let controller = Controller::start_as(pki, "localhost").await;
    let token = controller.pki.token();
    let refused = enroll(dir.path(), &enrollment(&controller, &token), &time()).await;
    assert!(matches!(refused, Err(IdentityError::Connect { .. })), "{refused:?}");
}

#[tokio::test]
async fn a_certificate_that_has_expired_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    let later = chrono::DateTime::parse_from_rfc3339("2026-02-01T00:00:00Z").unwrap().timestamp_micros();
    let token = controller.pki.token();
    let time = Arc::new(TlsTime::starting_at(later));
    assert!(enroll(dir.path(), &enrollment(&controller, &token), &time).await.is_err());
}

#[tokio::test]
async fn a_try_after_a_cut_asks_with_the_same_key() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    // The controller got the request, and its answer was lost.
    let mut first = true;
    controller.judge(move |_| if std::mem::take(&mut first) { Err(Status::unavailable("cut")) } else { Ok(()) });
    let token = controller.pki.token();
    let cut = enroll(dir.path(), &enrollment(&controller, &token), &time()).await.unwrap_err();
    assert!(cut.is_retryable(), "{cut:?}");
    assert!(Identity::load(dir.path(), time()).unwrap().is_none());
    enrolled(dir.path(), &controller).await;
    let keys: Vec<Vec<u8>> = controller
        .enrolled()
        .iter()
        .map(|request| CertificateSigningRequestParams::from_pem(&request.certificate_request).unwrap())
        .map(|request| request.public_key.der_bytes().to_vec())
        .collect();
    assert_eq!(keys.len(), 2);
    // With another key the second try would be another node to the controller.
    assert_eq!(keys[0], keys[1]);
}

#[tokio::test]
async fn a_refused_token_is_not_tried_again_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    controller.judge(|_| Err(Status::unauthenticated("the token is not valid")));
    let token = controller.pki.token();
    let refused = enroll(dir.path(), &enrollment(&controller, &token), &time()).await.unwrap_err();
    assert!(!refused.is_retryable());
    assert_eq!(refused.to_string(), "the controller refuses: the token is not valid");
}

#[tokio::test]
async fn a_renewal_is_signed_by_the_old_key_and_takes_the_place_of_the_old_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    let identity = enrolled(dir.path(), &controller).await;
    let old = std::fs::read_to_string(dir.path().join("node.crt")).unwrap();
    identity.renew(std::slice::from_ref(&controller.address), KeyPolicy::Keep).await.unwrap();
    let renewed = controller.renewed();
    assert_eq!(renewed[0].certificate, old);
    let request = CertificateSigningRequestDer::from_pem_slice(renewed[0].certificate_request.as_bytes()).unwrap();
    let key = KeyPair::from_pem(&std::fs::read_to_string(dir.path().join("node.key")).unwrap()).unwrap();
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    // Checked as the controller does: the signature is over the request, by the key in service.
    let verified = algorithms.all.iter().any(|algorithm| {
        algorithm.signature_alg_id() == alg_id::ECDSA_SHA256
            && algorithm.verify_signature(key.der_bytes(), &request, &renewed[0].signature).is_ok()
    });
    assert!(verified, "the signature does not fit");
    assert_ne!(std::fs::read_to_string(dir.path().join("node.crt")).unwrap(), old);
    identity.connect(&controller.address, Purpose::Session).await.unwrap();
}

#[tokio::test]
async fn a_node_whose_time_is_wrong_renews_all_the_same_and_learns_the_time() {
    for wrong in ["2040-01-01T00:00:00Z", "1970-01-02T00:00:00Z", "2025-06-01T00:00:00Z"] {
        let dir = tempfile::tempdir().unwrap();
        let controller = Controller::start(Pki::new(FROM, TO)).await;
        let identity = enrolled(dir.path(), &controller).await;
        identity.time().set(micros(wrong));
        // A time in the past is corrected by the controller's certificate alone.
        if wrong.starts_with("2040") {
            let refused = identity.connect(&controller.address, Purpose::Session).await;
            assert!(matches!(refused, Err(IdentityError::Connect { .. })), "{refused:?}");
        }
        identity.renew(std::slice::from_ref(&controller.address), KeyPolicy::Rotate).await.unwrap();
        identity.connect(&controller.address, Purpose::Session).await.unwrap();
        let time = identity.time().now_micros();
        assert!((micros(FROM)..micros(TO)).contains(&time), "{wrong}: {time}");
    }
}

#[tokio::test]
async fn a_certificate_that_is_refused_as_expired_is_renewed_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    enrolled(dir.path(), &controller).await;
    // The same CA 200 days later: it takes the node's certificate for expired.
    let later = Controller::start(controller.pki.at("2026-07-20T00:00:00Z", "2026-08-20T00:00:00Z")).await;
    let identity = Arc::new(Identity::load(dir.path(), time()).unwrap().unwrap());
    assert!(identity.time().now_micros() < micros("2026-01-02T00:00:00Z"), "it thinks that its certificate is new");
    let (stop, kept) = (CancellationToken::new(), Arc::clone(&identity));
    let (stopped, address) = (stop.clone(), later.address.clone());
    let keeping = tokio::spawn(async move {
        kept.keep_fresh(|| vec![address.clone()], KeyPolicy::Rotate, &stopped).await;
    });
    let hello = async || {
        let channel = identity.connect(&later.address, Purpose::Session).await.unwrap();
        let (_requests, stream) = tokio::sync::mpsc::channel::<ConnectRequest>(1);
        AgentServiceClient::new(channel).connect(ReceiverStream::new(stream)).await.map(|_| ())
    };
    let refused = hello().await.unwrap_err();
    tokio::time::timeout(Duration::from_secs(20), async {
        while hello().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("it did not come back: {refused}"));
    // One renewal is enough: the time came with the certificate.
    assert_eq!(later.renewed().len(), 1);
    stop.cancel();
    keeping.await.unwrap();
}

#[tokio::test]
async fn a_renewal_has_a_new_key_and_the_one_before_is_kept_until_it_was_used() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    let identity = enrolled(dir.path(), &controller).await;
    let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).ok();
    let first = (read("node.key").unwrap(), read("node.crt").unwrap());
    identity.renew(std::slice::from_ref(&controller.address), KeyPolicy::Rotate).await.unwrap();
    assert_eq!((read("node.key"), read("node.crt")), (Some(first.0.clone()), Some(first.1.clone())));
    let next = read("next.key").unwrap();
    assert_ne!(next, first.0);
    assert_eq!(std::fs::metadata(dir.path().join("next.key")).unwrap().permissions().mode() & 0o777, 0o600);
    // The next certificate is shown from now on, and the first one to a controller that does not know the next.
    let shown = |identity: &Identity| identity.held().present.pair.key.clone();
    assert_eq!(shown(&identity), next);
    identity.not_known();
    assert_eq!(shown(&identity), first.0, "it is kept in memory as well");
    // An agent that starts now does the same.
    let identity = Identity::load(dir.path(), time()).unwrap().unwrap();
    assert_eq!(shown(&identity), next);
    identity.not_known();
    assert_eq!(shown(&identity), first.0);
    identity.accepted();
    assert_eq!(read("node.key").unwrap(), first.0, "it was the first that was accepted");
    identity.not_known();
    identity.accepted();
    assert_eq!((read("node.key").unwrap(), read("next.key"), read("next.crt")), (next.clone(), None, None));
    identity.not_known();
    assert_eq!(shown(&identity), next);
    // The next renewal has a new key again.
    identity.renew(std::slice::from_ref(&controller.address), KeyPolicy::Rotate).await.unwrap();
    assert_ne!(read("next.key").unwrap(), next);
}

#[tokio::test]
async fn an_identity_for_another_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    enrolled(dir.path(), &controller).await;
    // A copy that mixed two nodes' files must not connect as either.
    std::fs::write(dir.path().join("node.key"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
    assert!(matches!(Identity::load(dir.path(), time()), Err(IdentityError::Invalid { .. })));
}

#[tokio::test]
async fn the_time_that_a_controller_told_is_known_after_the_next_boot() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    let identity = enrolled(dir.path(), &controller).await;
    let told = micros("2026-01-20T00:00:00Z");
    identity.learn_time(told);
    let after = Identity::load(dir.path(), time()).unwrap().unwrap();
    assert!(after.time().now_micros() >= told);
}

fn micros(time: &str) -> i64 {
    chrono::DateTime::parse_from_rfc3339(time).unwrap().timestamp_micros()
}

#[tokio::test]
async fn a_time_that_the_certificate_does_not_bear_out_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let controller = Controller::start(Pki::new(FROM, TO)).await;
    let identity = enrolled(dir.path(), &controller).await;
    identity.learn_time(micros("2040-01-01T00:00:00Z"));
    let time = identity.time().now_micros();
    assert!((micros(TO)..micros("2026-02-01T00:00:00Z")).contains(&time), "{time}");
    // A later time corrects it, also backwards.
    identity.learn_time(micros("2026-01-05T00:00:00Z"));
    let time = identity.time().now_micros();
    assert!((micros("2026-01-05T00:00:00Z")..micros("2026-01-06T00:00:00Z")).contains(&time), "{time}");
}

#[test]
fn what_is_known_to_have_passed_moves_time_forwards_only() {
    let time = TlsTime::starting_at(1000);
    time.advance(5_000_000);
    time.advance(10);
    assert!(time.now_micros() >= 5_000_000);
    assert!(time.now_micros() < 5_000_000 + i64::try_from(Duration::from_secs(60).as_micros()).unwrap());
}

#[test]
fn what_is_no_token_is_refused_and_a_token_is_not_shown() {
    let bits = URL_SAFE_NO_PAD.encode([7; 32]);
    let good = format!("mj1.one.{bits}.{bits}");
    let token = JoinToken::parse(&format!(" {good}\n")).unwrap();
    assert_eq!(token.reveal(), good);
    // Debug output may be logged.
    assert!(!format!("{token:?}").contains(&bits));
    let short = URL_SAFE_NO_PAD.encode([7; 31]);
    for bad in [
        String::new(),
        "mj1".into(),
        format!("mj2.one.{bits}.{bits}"),
        format!("mj1.one.{bits}"),
        format!("mj1.one.{bits}.{bits}.x"),
        format!("mj1.one.{short}.{bits}"),
        format!("mj1.o/e.{bits}.{bits}"),
        format!("mj1.one.{bits}=.{bits}"),
    ] {
        assert!(JoinToken::parse(&bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_join_file_loses_its_token_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("marco/join.toml");
    std::fs::create_dir_all(dir.path().join("marco")).unwrap();
    let text = "# mine\ncontrollers = [\"a:1\"]\nenroll = [\"b:2\"]\n token= \"mj1.x\"\nname = \"pi-01\"\n";
    std::fs::write(&path, text).unwrap();
    let partitions = [dir.path().join("none"), dir.path().to_owned()];
    let (found, file) = JoinFile::find(&partitions).unwrap().unwrap();
    assert_eq!((found.as_path(), file.token.as_str()), (path.as_path(), "mj1.x"));
    assert!(!format!("{file:?}").contains("mj1"));
    JoinFile::forget_token(&path).unwrap();
    let left = std::fs::read_to_string(&path).unwrap();
    assert_eq!(left, "# mine\ncontrollers = [\"a:1\"]\nenroll = [\"b:2\"]\nname = \"pi-01\"\n");
    assert_eq!(JoinFile::find(&partitions).unwrap().unwrap().1.enroll, ["b:2"]);
}

#[test]
fn a_join_file_with_one_listener_or_a_wrong_key_is_read_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("marco")).unwrap();
    let path = dir.path().join("marco/join.toml");
    let partitions = [dir.path().to_owned()];
    std::fs::write(&path, "enroll = \"b:2\"\n").unwrap();
    assert_eq!(JoinFile::find(&partitions).unwrap().unwrap().1.enroll, ["b:2"]);
    std::fs::write(&path, "controllers = []\ntokn = \"mj1.secret\"\n").unwrap();
    let error = JoinFile::find(&partitions).unwrap_err().to_string();
    assert!(error.contains("line 2") && !error.contains("secret"), "{error}");
    // Removing only the line of the key would leave the secret behind.
    std::fs::write(&path, "token = '''\nmj1.secret\n'''\n").unwrap();
    JoinFile::forget_token(&path).unwrap();
    assert!(!std::fs::read_to_string(&path).unwrap().contains("secret"));
}
