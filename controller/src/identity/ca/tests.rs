use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::names::NodeId;
use rcgen::{
    CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SigningKey as _,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tempfile::TempDir;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Ca, Issued, Pki, PkiError, RequestError};
use crate::identity::roles::Role;
use crate::identity::tls::PeerCertificate;

fn now() -> DateTime<Utc> {
    "2026-05-01T12:00:00.75Z".parse().unwrap()
}

fn node() -> NodeId {
    NodeId::parse("pi-01").unwrap()
}

fn request(key: &KeyPair) -> String {
    let mut params = CertificateParams::new(["evil.example".to_owned()]).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, "admin");
    params.distinguished_name.push(rcgen::DnType::OrganizationalUnitName, "admin");
    params.serialize_request(key).unwrap().pem().unwrap()
}

fn key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap()
}

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

fn csr_der(pem: &str) -> Vec<u8> {
    super::request_der(pem).unwrap().as_ref().to_vec()
}

fn open(dir: &TempDir, names: &[&str], now: DateTime<Utc>) -> Result<Pki, PkiError> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    Pki::open(&dir.path().join("data"), &dir.path().join("certs"), &names, now, DateTime::UNIX_EPOCH)
}

fn minted() -> Ca {
    Ca::mint(now(), DateTime::UNIX_EPOCH).unwrap().0
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn the_first_start_writes_what_operators_need_and_later_ones_load_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(&dir, &[], now()).unwrap();
    assert!(first.minted);
    for (file, wanted) in [
        ("data/pki/ca.key", 0o600),
        ("certs/controller.key", 0o600),
        ("certs/admin.key", 0o600),
        ("certs/ca.crt", 0o644),
        ("certs/controller.crt", 0o644),
        ("certs/admin.crt", 0o644),
    ] {
        assert_eq!(mode(&dir.path().join(file)), wanted, "{file}");
    }
    assert_eq!(mode(&dir.path().join("data/pki")), 0o700);
    let admin = PeerCertificate::read(&der(&fs::read_to_string(dir.path().join("certs/admin.crt")).unwrap())).unwrap();
    assert_eq!((admin.common_name.as_str(), admin.role.as_str()), ("admin", "admin"));
    let before = fs::read(dir.path().join("certs/controller.crt")).unwrap();
    let second = open(&dir, &[], now()).unwrap();
    assert!(!second.minted);
    assert_eq!(second.ca.spki_sha256(), first.ca.spki_sha256());
    assert_eq!(fs::read(dir.path().join("certs/controller.crt")).unwrap(), before);
}

#[test]
fn half_a_ca_is_refused_with_both_paths() {
    for missing in ["data/pki/ca.key", "certs/ca.crt"] {
        let dir = tempfile::tempdir().unwrap();
        open(&dir, &[], now()).unwrap();
        fs::remove_file(dir.path().join(missing)).unwrap();
        let error = open(&dir, &[], now()).err().unwrap().to_string();
        assert!(error.contains("data/pki") && error.contains("certs/ca.crt"), "{error}");
        assert!(!dir.path().join(missing).exists(), "nothing is minted over the other half");
    }
}

#[test]
fn a_key_of_another_ca_is_refused() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    open(&one, &[], now()).unwrap();
    open(&two, &[], now()).unwrap();
    fs::copy(two.path().join("data/pki/ca.key"), one.path().join("data/pki/ca.key")).unwrap();
    let error = open(&one, &[], now()).err().unwrap().to_string();
    assert!(error.contains("not the CA's key"), "{error}");
}

#[test]
fn the_controllers_certificate_follows_names_and_time() {
    let dir = tempfile::tempdir().unwrap();
    let read = || fs::read_to_string(dir.path().join("certs/controller.crt")).unwrap();
    open(&dir, &[], now()).unwrap();
    let first = read();
    open(&dir, &["pi-lab.example", "10.0.0.1"], now()).unwrap();
    let named = read();
    assert_ne!(named, first);
    open(&dir, &["PI-LAB.example"], now() + TimeDelta::days(334)).unwrap();
    assert_eq!(read(), named, "names it has and 31 days left: kept");
    let mut pki = open(&dir, &["pi-lab.example"], now() + TimeDelta::days(335)).unwrap();
    assert_ne!(read(), named, "30 days left: issued again");
    let renewed = read();
    assert!(!pki.refresh(now() + TimeDelta::days(400)).unwrap());
    assert!(pki.refresh(now() + TimeDelta::days(671)).unwrap());
    assert_ne!(read(), renewed);
    let certificate = der(&named);
    let (_, parsed) = X509Certificate::from_der(&certificate).unwrap();
    let names = format!("{:?}", parsed.subject_alternative_name().unwrap().unwrap().value.general_names);
    for name in ["controller.marco.internal", "localhost", "pi-lab.example", "[10, 0, 0, 1]", "[127, 0, 0, 1]"] {
        assert!(names.contains(name), "{name} in {names}");
    }
    fs::write(dir.path().join("certs/controller.key"), key().serialize_pem()).unwrap();
    open(&dir, &[], now()).expect("a key that does not fit, as a crash between two writes leaves it, is replaced");
}

#[test]
fn leaf_that_is_not_valid_yet_is_issued_again() {
    let dir = tempfile::tempdir().unwrap();
    let read = || fs::read_to_string(dir.path().join("certs/controller.crt")).unwrap();
    let mut pki = open(&dir, &[], now()).unwrap();
    assert!(pki.refresh(now() + TimeDelta::days(365)).unwrap(), "a year ahead it is expired");
    let ahead = read();
    let ahead_key = fs::read(dir.path().join("certs/controller.key")).unwrap();
    // While the process runs, and at its next start.
    assert!(pki.refresh(now()).unwrap());
    let back = read();
    assert_ne!(back, ahead);
    fs::write(dir.path().join("certs/controller.crt"), &ahead).unwrap();
    fs::write(dir.path().join("certs/controller.key"), ahead_key).unwrap();
    assert!(pki.reload(now()).is_err(), "nor is it taken from its file");
    open(&dir, &[], now()).unwrap();
    assert_ne!(read(), ahead);
    // An hour behind does no harm: certificates are backdated.
    let kept = read();
    let mut pki = open(&dir, &[], now() - TimeDelta::hours(1)).unwrap();
    assert!(!pki.refresh(now() - TimeDelta::hours(1)).unwrap());
    assert_eq!(read(), kept);
}

#[test]
fn clock_that_cannot_be_right_signs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let built = now() - TimeDelta::days(10);
    let open = |now: DateTime<Utc>| {
        Pki::open(&dir.path().join("data"), &dir.path().join("certs"), &[], now, built).map(|pki| pki.ca)
    };
    let wrong = |at: DateTime<Utc>| match open(at) {
        Err(PkiError::Clock(wrong)) => wrong.to_string(),
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("{at} was taken for a time that can be right"),
    };
    // No CA is minted in 1970: it would be expired at once.
    let text = wrong(DateTime::UNIX_EPOCH + TimeDelta::seconds(30));
    assert!(text.contains("1970-01-01T00:00:30Z") && text.contains("built") && text.contains("timedatectl"), "{text}");
    assert!(!dir.path().join("data/pki").exists() && !dir.path().join("certs").exists());
    // A day before the build is as far as certificates are backdated.
    wrong(built - TimeDelta::hours(25));
    let ca = open(now()).unwrap();
    let text = wrong(now() - TimeDelta::hours(25));
    assert!(text.contains("ca.crt"), "{text}");
    wrong(now() + TimeDelta::days(3651));
    // The clock may also become wrong while the controller runs.
    let key = key();
    for (at, signs) in [
        (now() - TimeDelta::hours(23), true),
        (now() - TimeDelta::hours(25), false),
        (DateTime::UNIX_EPOCH, false),
        (now() + TimeDelta::days(3649), true),
        (now() + TimeDelta::days(3651), false),
    ] {
        assert_eq!(ca.check_clock(at).is_ok(), signs, "{at}");
        let issued = ca.issue_node(&request(&key), &node(), at);
        assert_eq!(matches!(issued, Err(RequestError::Pki(PkiError::Clock(_)))), !signs, "{at}: {issued:?}");
    }
}

#[test]
fn of_a_nodes_request_only_the_key_counts() {
    let ca = minted();
    let key = key();
    let issued = ca.issue_node(&request(&key), &node(), now()).unwrap();
    let certificate = der(&issued.pem);
    let read = PeerCertificate::read(&certificate).unwrap();
    assert_eq!((read.common_name.as_str(), read.role.as_str()), ("pi-01", "node"));
    assert_eq!((&read.serial, &read.key_sha256), (&issued.serial, &issued.key_sha256));
    assert_eq!(issued.key_sha256, Ca::key_of_request(&request(&key)).unwrap());
    assert_eq!(issued.serial.len(), 32);
    let (_, parsed) = X509Certificate::from_der(&certificate).unwrap();
    assert_eq!(parsed.validity().not_before.timestamp(), (now() - TimeDelta::hours(24)).timestamp());
    assert_eq!(parsed.validity().not_after.timestamp(), (now() + TimeDelta::days(30)).timestamp());
    assert_eq!(issued.not_after.timestamp_subsec_micros(), 0);
    assert!(!parsed.is_ca() && parsed.subject_alternative_name().unwrap().is_none());
    let usage = parsed.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && !usage.server_auth);
    assert_ne!(ca.issue_node(&request(&key), &node(), now()).unwrap().serial, issued.serial);
}

#[test]
fn unusable_requests_are_refused() {
    let ca = minted();
    let refused = |pem: &str| {
        assert!(matches!(ca.issue_node(pem, &node(), now()), Err(RequestError::Request(_))), "{pem}");
    };
    refused("");
    refused(ca.certificate_pem());
    for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
        refused(&request(&KeyPair::generate_for(algorithm).unwrap()));
    }
    // Signed by another key than its own.
    let pem = request(&key());
    let mut bytes = csr_der(&pem);
    let last = bytes.len() - 5;
    bytes[last] ^= 1;
    let body = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, bytes);
    refused(&format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n"));
}

/// A node's certificate with its key, and a signed request to renew it.
fn renewal(ca: &Ca) -> (Issued, KeyPair, String, Vec<u8>) {
    let (old, new) = (key(), key());
    let issued = ca.issue_node(&request(&old), &node(), now()).unwrap();
    let csr = request(&new);
    let signature = old.sign(&csr_der(&csr)).unwrap();
    (issued, old, csr, signature)
}

#[test]
fn an_old_certificate_proves_who_renews_until_400_days_after_its_expiry() {
    let ca = minted();
    let (issued, _, csr, signature) = renewal(&ca);
    // A certificate of a controller with a clock ahead is not valid yet, and is replaced too.
    for days in [-2, 0, 15, 31, 430] {
        let proof = ca.verify_renewal(&issued.pem, &csr, &signature, now() + TimeDelta::days(days)).unwrap();
        assert_eq!(
            (proof.node, proof.serial, proof.key_sha256),
            (node(), issued.serial.clone(), issued.key_sha256.clone())
        );
    }
    let error = ca.verify_renewal(&issued.pem, &csr, &signature, now() + TimeDelta::days(431)).unwrap_err();
    assert!(matches!(error, RequestError::Certificate(_)), "{error}");
}

#[test]
fn a_renewal_needs_the_old_key_and_this_cas_node_certificate() {
    let ca = minted();
    let other = minted();
    let (issued, old, csr, signature) = renewal(&ca);
    let forged = key().sign(&csr_der(&csr)).unwrap();
    assert!(matches!(ca.verify_renewal(&issued.pem, &csr, &forged, now()), Err(RequestError::Signature)));
    assert!(matches!(ca.verify_renewal(&issued.pem, &csr, b"", now()), Err(RequestError::Signature)));
    assert!(matches!(
        ca.verify_renewal(&issued.pem, &request(&key()), &signature, now()),
        Err(RequestError::Signature)
    ));
    assert!(matches!(other.verify_renewal(&issued.pem, &csr, &signature, now()), Err(RequestError::Certificate(_))));
    let (user, _) = ca.issue_user("admin", Role::Admin, now()).unwrap();
    for pem in [user.pem.as_str(), ca.certificate_pem(), "", csr.as_str()] {
        let signature = old.sign(&csr_der(&csr)).unwrap();
        assert!(matches!(ca.verify_renewal(pem, &csr, &signature, now()), Err(RequestError::Certificate(_))));
    }
}
