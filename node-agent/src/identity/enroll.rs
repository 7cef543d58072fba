//! Certificates of a node: the first one for a join token, each later one for the one before.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use marco_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use marco_proto::v1::{EnrollRequest, RenewCertificateRequest};
use rcgen::{CertificateParams, CertificateSigningRequest, KeyPair, SigningKey as _};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tonic::{Code, Status};

use super::keys::{self, Pair};
use super::time::TlsTime;
use super::tls::{self, Purpose, Trust, Validity};
use super::token::JoinToken;
use super::{Board, CA_FILE, CERTIFICATE_FILE, IdentityError, PUBLIC_MODE, credentials};
use crate::durable;

/// Time limit of a call. The controller needs a few writes to answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Input of an enrolment.
#[derive(Debug, Clone)]
pub struct Enrollment {
    /// Enrolment listeners, host:port, in the order in which to try them.
    pub listeners: Vec<String>,
    /// The join token.
    pub token: JoinToken,
    /// The id to ask for. Empty: the controller derives it from the serial number.
    pub name: String,
    /// Description of the board, sent with the request.
    pub board: Board,
}

/// Makes a key in `directory` unless an earlier try left one, exchanges the token for a certificate, and stores
/// certificate and CA. Returns true if the node is held until an admin approves it.
pub async fn enroll(directory: &Path, enrollment: &Enrollment, time: &Arc<TlsTime>) -> Result<bool, IdentityError> {
    let key = keys::first_key(directory)?;
    let request = signing_request(&key)?;
    let pem = request.pem().map_err(|error| IdentityError::invalid("the signing request", error))?;
    let config = tls::anonymous_config(Trust::Pin(enrollment.token.pin()), Validity::Needed, time)?;
    let mut last: Option<IdentityError> = None;
    for address in &enrollment.listeners {
        let channel = match tls::connect(address, config.clone(), Purpose::Session, None).await {
            Ok(channel) => channel,
            Err(error) => {
                // An unreachable listener may be the right one, so its error counts more than that of another CA.
                if last.as_ref().is_none_or(IdentityError::is_permanent) || !error.is_permanent() {
                    last = Some(error);
                }
                continue;
            }
        };
        let mut message = tonic::Request::new(EnrollRequest {
            token: enrollment.token.reveal().to_owned(),
            certificate_request: pem.clone(),
            node_id: enrollment.name.clone(),
            board: Some(enrollment.board.to_wire()),
        });
        message.set_timeout(CALL_TIMEOUT);
        let answer = match EnrollmentServiceClient::new(channel).enroll(message).await {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                let error = refused(&status);
                if error.is_retryable() {
                    last = Some(error);
                    continue;
                }
                return Err(error);
            }
        };
        // The pin is all that the node trusts: the CA in the answer must be the one of the handshake.
        check_ca(&answer.ca_certificate, enrollment.token.pin())?;
        let write = |file: &str, text: &str| {
            let path = directory.join(file);
            durable::replace(&path, text.as_bytes(), PUBLIC_MODE).map_err(IdentityError::io("write", &path))
        };
        // The certificate is written last: it marks the node as enrolled.
        write(CA_FILE, &answer.ca_certificate)?;
        let pair = Pair { key: key.serialize_pem(), certificate: answer.certificate.clone(), is_next: false };
        credentials(directory, pair, time)?;
        write(CERTIFICATE_FILE, &answer.certificate)?;
        return Ok(answer.held);
    }
    Err(last.unwrap_or_else(no_address))
}

fn no_address() -> IdentityError {
    IdentityError::Connect { address: String::new(), why: "no address is known".to_owned(), foreign: false }
}

/// Exchanges a certificate for a new one, of the same or another key, at the first listener that answers.
pub(super) async fn renew(
    listeners: &[String],
    pair: &Pair,
    new_key_pem: &str,
    ca_pem: &str,
    time: &Arc<TlsTime>,
) -> Result<String, IdentityError> {
    let read = |pem: &str| KeyPair::from_pem(pem).map_err(|error| IdentityError::invalid("the node's key", error));
    let (key, new_key) = (read(&pair.key)?, read(new_key_pem)?);
    let request = signing_request(&new_key)?;
    let invalid = |error: rcgen::Error| IdentityError::invalid("the signing request", error);
    // The old key's signature proves the node. A client certificate would also need a right clock.
    let signature = key.sign(request.der()).map_err(invalid)?;
    let pem = request.pem().map_err(invalid)?;
    let ca = CertificateDer::from_pem_slice(ca_pem.as_bytes())
        .map_err(|error| IdentityError::invalid("the CA's certificate", error))?;
    let config = tls::anonymous_config(Trust::Ca(ca), Validity::AtAnyTime, time)?;
    let mut last = no_address();
    for address in listeners {
        let channel = match tls::connect(address, config.clone(), Purpose::Session, None).await {
            Ok(channel) => channel,
            Err(error) => {
                last = error;
                continue;
            }
        };
        let mut message = tonic::Request::new(RenewCertificateRequest {
            certificate: pair.certificate.clone(),
            certificate_request: pem.clone(),
            signature: signature.clone().into(),
        });
        message.set_timeout(CALL_TIMEOUT);
        match EnrollmentServiceClient::new(channel).renew_certificate(message).await {
            Ok(answer) => return Ok(answer.into_inner().certificate),
            Err(status) => last = refused(&status),
        }
    }
    Err(last)
}

fn refused(status: &Status) -> IdentityError {
    let retryable = matches!(
        status.code(),
        Code::Unavailable
            | Code::DeadlineExceeded
            | Code::Cancelled
            | Code::Aborted
            | Code::ResourceExhausted
            | Code::Unknown
            | Code::Internal
    );
    let permanent = matches!(status.code(), Code::InvalidArgument | Code::AlreadyExists);
    let mut message = status.message().to_owned();
    if status.code() == Code::Unimplemented {
        message =
            "this is not its enrolment listener, which has a port of its own (1347 unless --enroll-listen differs)"
                .to_owned();
    }
    IdentityError::Refused { message, retryable, permanent }
}

fn signing_request(key: &KeyPair) -> Result<CertificateSigningRequest, IdentityError> {
    // The controller takes only the public key from it, so it carries no name.
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.serialize_request(key).map_err(|error| IdentityError::invalid("the signing request", error))
}

fn check_ca(pem: &str, pin: [u8; 32]) -> Result<(), IdentityError> {
    let ca = CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| IdentityError::invalid("the CA's certificate", error))?;
    if tls::spki_sha256(&ca)? == pin {
        Ok(())
    } else {
        Err(IdentityError::invalid("the CA's certificate", "its key is not the one that the join token names"))
    }
}
