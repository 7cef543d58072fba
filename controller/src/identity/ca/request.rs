//! Checks of nodes' requests for certificates.

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::names::NodeId;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, alg_id};
use sha2::{Digest as _, Sha256};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use x509_parser::x509::SubjectPublicKeyInfo;

use super::super::roles::Role;
use super::super::tls::{common_name, role_word, serial_hex};
use super::{RenewalProof, RequestError};

/// Time after the expiry for which a certificate still proves its node's identity: a Pi out of a drawer.
const RENEWABLE_AFTER_EXPIRY: TimeDelta = TimeDelta::days(400);
/// `ecdsa-with-SHA256`, RFC 5758.
const ECDSA_WITH_SHA256: &str = "1.2.840.10045.4.3.2";
/// `id-ecPublicKey` and `secp256r1`, RFC 5480.
const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
const P256: &str = "1.2.840.10045.3.1.7";

/// The SubjectPublicKeyInfo of a request, DER, after checking that the request is signed with it.
pub(super) fn public_key(csr: &CertificateSigningRequestDer<'_>) -> Result<Vec<u8>, RequestError> {
    let wrong = |what: &str| RequestError::Request(what.to_owned());
    let (rest, request) =
        X509CertificationRequest::from_der(csr).map_err(|err| wrong(&format!("it is malformed ({err})")))?;
    if !rest.is_empty() {
        return Err(wrong("something follows it"));
    }
    let key = &request.certification_request_info.subject_pki;
    // One algorithm: others would need checks of their own, and agents use no other.
    if !is_p256(key) {
        return Err(wrong("its key is not an ECDSA key on the curve P-256"));
    }
    if request.signature_algorithm.algorithm.to_id_string() != ECDSA_WITH_SHA256 {
        return Err(wrong("it is not signed with ECDSA and SHA-256"));
    }
    request.verify_signature().map_err(|_| wrong("its signature is not by its own key"))?;
    Ok(key.raw.to_vec())
}

/// See [`super::Ca::verify_renewal`].
pub(super) fn verify_renewal(
    ca: &CertificateDer<'_>,
    old: &CertificateDer<'_>,
    csr: &CertificateSigningRequestDer<'_>,
    signature: &[u8],
    now: DateTime<Utc>,
) -> Result<RenewalProof, RequestError> {
    let wrong = RequestError::Certificate;
    let (_, ca) = X509Certificate::from_der(ca).map_err(|_| wrong("the CA's certificate is malformed"))?;
    let (_, old) = X509Certificate::from_der(old).map_err(|_| wrong("it is malformed"))?;
    if old.issuer() != ca.subject() || old.verify_signature(Some(ca.public_key())).is_err() {
        return Err(wrong("this CA did not issue it"));
    }
    // A user's certificate must not become a node's.
    if old.is_ca() || role_word(&old) != Some(Role::Node.as_str()) {
        return Err(wrong("it is not a node's"));
    }
    let node = common_name(&old).and_then(|name| NodeId::parse(name).ok()).ok_or(wrong("it names no node"))?;
    // A certificate that is not valid yet was issued while a controller's clock was ahead. It must be replaced, not
    // refused.
    if now.timestamp() > old.validity().not_after.timestamp() + RENEWABLE_AFTER_EXPIRY.num_seconds() {
        return Err(wrong("it expired more than 400 days ago; enrol the node again with a join token"));
    }
    let key = old.public_key();
    // rustls's provider, so that one implementation of cryptography is in use.
    let provider = default_provider();
    let algorithm = provider.signature_verification_algorithms.all.iter().find(|algorithm| {
        algorithm.public_key_alg_id() == alg_id::ECDSA_P256 && algorithm.signature_alg_id() == alg_id::ECDSA_SHA256
    });
    let algorithm = algorithm.filter(|_| is_p256(key)).ok_or(wrong("its key is not on the curve P-256"))?;
    algorithm
        .verify_signature(&key.subject_public_key.data, csr.as_ref(), signature)
        .map_err(|_| RequestError::Signature)?;
    Ok(RenewalProof { node, serial: serial_hex(&old), key_sha256: hex::encode(Sha256::digest(key.raw)) })
}

fn is_p256(key: &SubjectPublicKeyInfo<'_>) -> bool {
    let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
    key.algorithm.algorithm.to_id_string() == EC_PUBLIC_KEY && curve.is_some_and(|curve| curve.to_id_string() == P256)
}
