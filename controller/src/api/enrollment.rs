//! `EnrollmentService`, on a listener of its own, for callers without a certificate.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use marco_proto::names::NodeId;
use marco_proto::v1;
use marco_proto::v1::enrollment_service_server::EnrollmentService;
use tonic::{Request, Response, Status};

use super::Context;
use super::agent::key_held;
use super::convert;
use super::status::ApiError;
use crate::identity::ca::{Ca, Issued, PkiError, RequestError};
use crate::identity::gate::code_word;
use crate::identity::peer_log::of_peer;
use crate::identity::rate::{Rate, source};
use crate::identity::record::{self, OK};
use crate::identity::shown;
use crate::identity::tls::PeerInfo;
use crate::identity::tokens::JoinToken;
use crate::store::{AuditRow, CertificateRow, EnrolOutcome, Enrolment, Record, RenewOutcome, Renewal, recorded};

/// Longest signing request or certificate, in bytes: one with a P-256 key has well under 1 KiB.
const PEM_MAX: usize = 16 * 1024;

/// Refused calls from one address. A room full of Pis with a wrong token may all try at once, and then one each second.
const REFUSED_BURST: u32 = 100;
const REFUSED_EVERY: Duration = Duration::from_secs(1);

/// The service.
pub(super) struct Enrollments {
    context: Context,
    refused: Rate<IpAddr>,
}

impl Enrollments {
    pub(super) fn new(context: Context) -> Self {
        Self { context, refused: Rate::new(REFUSED_BURST, REFUSED_EVERY) }
    }

    /// Refuses an address with too many refused calls, before anything expensive happens.
    fn admit(&self, address: IpAddr) -> Result<(), ApiError> {
        // Looks without taking: a call that succeeds costs nothing.
        if self.refused.has(&source(address), self.context.clock.now()) {
            return Ok(());
        }
        Err(ApiError::Exhausted {
            reason: "TOO_MANY_TRIES",
            message: "too many calls from this address were refused; try again later".to_owned(),
        })
    }

    /// The present time; an error if nothing may be signed at it.
    fn now(&self) -> Result<DateTime<Utc>, ApiError> {
        let now = self.context.clock.now();
        self.context.ca.check_clock(now).map_err(|wrong| ApiError::wrong_clock(&wrong))?;
        Ok(now)
    }

    /// Counts a refused call against its address.
    fn count<T>(&self, address: IpAddr, result: &Result<T, ApiError>) {
        // Failures of the controller are not the caller's fault.
        let ours = |error: &ApiError| {
            matches!(error, ApiError::Unavailable { .. } | ApiError::Store(_) | ApiError::Internal(_))
        };
        // Only refused calls count: a room of Pis behind one address must be able to join at once.
        if result.as_ref().is_err_and(|error| !ours(error)) {
            self.refused.take(source(address), self.context.clock.now());
        }
    }

    async fn enroll(
        &self,
        request: v1::EnrollRequest,
        address: IpAddr,
        record: &Record,
        asked: &mut Asked,
    ) -> Result<v1::EnrollResponse, ApiError> {
        pem("certificate_request", &request.certificate_request)?;
        let wanted_id = match request.node_id.as_str() {
            "" => None,
            id => Some(NodeId::parse(id).map_err(|error| ApiError::invalid("node_id", error.to_string()))?),
        };
        asked.target = wanted_id.as_ref().map(NodeId::name).unwrap_or_default();
        let board = convert::board(request.board.unwrap_or_default())?;
        // For the audit, which names the board of a refused call.
        asked.serial.clone_from(&board.serial);
        // The id is made of the serial number otherwise.
        if wanted_id.is_none() && board.serial.is_empty() {
            return Err(ApiError::invalid("node_id", "is needed, as the board has no serial number to make one from"));
        }
        let token = JoinToken::parse(&request.token).map_err(|_| {
            asked.why = "this is not a join token".to_owned();
            // The answer is the same as for any other refused token; only the audit tells them apart.
            refused()
        })?;
        asked.token = token.id.name();
        // From here on the audit knows the token, even if the call is refused.
        record.edit(|row| row.credential.clone_from(&asked.token));
        // Before the token is used: a bad request must not cost one of its uses.
        let key_sha256 = Ca::key_of_request(&request.certificate_request).map_err(request_error)?;
        let now = self.now()?;
        let enrolment = Enrolment { token_sha256: token.secret_sha256(), key_sha256, wanted_id, board, address };
        let ca = &self.context.ca;
        let issued = Mutex::new(None);
        // The certificate is issued inside the transaction that uses the token, for the id that the node gets there.
        let outcome = self
            .context
            .store
            .enrol(&enrolment, now, |node, generation| {
                by(record, node);
                let certificate = ca.issue_node(&request.certificate_request, node, now).ok()?;
                *lock(&issued) = Some(certificate.pem.clone());
                Some(row(certificate, node, generation))
            })
            .await?;
        let (node, held, certificate) = match outcome {
            // The node lost the answer and asks again with the same key: it gets the same certificate. Nothing is
            // written, so the call is limited like a refused one.
            EnrolOutcome::Admitted { node, held, again: Some(pem), .. } => {
                self.refused.take(source(address), now);
                asked.silent = true;
                (node, held, Some(pem))
            }
            EnrolOutcome::Admitted { node, held, .. } => (node, held, lock(&issued).take()),
            EnrolOutcome::NotIssued => return Err(ApiError::Internal("no certificate was issued".to_owned())),
            EnrolOutcome::Refused(refusal) => {
                asked.why = refusal.why;
                return Err(refused());
            }
        };
        let certificate = certificate.ok_or_else(|| ApiError::Internal("no certificate was issued".to_owned()))?;
        Ok(v1::EnrollResponse { node: node.name(), certificate, ca_certificate: ca.certificate_pem().to_owned(), held })
    }

    async fn renew(
        &self,
        request: v1::RenewCertificateRequest,
        record: &Record,
        from: SocketAddr,
        asked: &mut Asked,
    ) -> Result<v1::RenewCertificateResponse, ApiError> {
        // The size is checked before anything parses the text.
        pem("certificate", &request.certificate)?;
        pem("certificate_request", &request.certificate_request)?;
        let now = self.now()?;
        let ca = &self.context.ca;
        let proof = ca
            .verify_renewal(&request.certificate, &request.certificate_request, &request.signature, now)
            .map_err(request_error)?;
        asked.target = proof.node.name();
        let wish = Renewal {
            node: proof.node.clone(),
            serial: proof.serial,
            key_sha256: proof.key_sha256,
            new_key_sha256: Ca::key_of_request(&request.certificate_request).map_err(request_error)?,
            origin: from.ip().to_string(),
        };
        by(record, &wish.node);
        let issued = Mutex::new(None);
        let renewed = self.context.store.renew_certificate(&wish, now, |generation| {
            let certificate = ca.issue_node(&request.certificate_request, &wish.node, now).ok()?;
            *lock(&issued) = Some(certificate.pem.clone());
            Some(row(certificate, &wish.node, generation))
        });
        let certificate = match renewed.await? {
            RenewOutcome::Renewed => lock(&issued).take(),
            RenewOutcome::Again(pem) => {
                // Nothing is written for it, so it is limited like a refused call and not recorded.
                self.refused.take(source(from.ip()), now);
                asked.silent = true;
                Some(pem)
            }
            RenewOutcome::NotIssued => None,
            RenewOutcome::Revoked => return Err(revoked()),
            RenewOutcome::Quarantined => {
                return Err(ApiError::Forbidden {
                    reason: "NODE_QUARANTINED",
                    message: format!("{} is quarantined; an admin can approve it", wish.node.name()),
                });
            }
            RenewOutcome::Held { .. } => {
                return Err(key_held(&wish.node, &wish.key_sha256));
            }
            RenewOutcome::TooSoon { again } => {
                return Err(ApiError::Exhausted {
                    reason: "RENEWED_RECENTLY",
                    message: format!(
                        "{} was renewed less than an hour ago; it may be again at {}",
                        wish.node.name(),
                        again.to_rfc3339_opts(SecondsFormat::Secs, true)
                    ),
                });
            }
        };
        let certificate = certificate.ok_or_else(|| ApiError::Internal("no certificate was issued".to_owned()))?;
        Ok(v1::RenewCertificateResponse { certificate, ca_certificate: ca.certificate_pem().to_owned() })
    }

    /// The audit row of a call that succeeds. The caller is filled in as soon as it is known.
    fn row(&self, method: &str, from: SocketAddr) -> Arc<Record> {
        Record::new(AuditRow {
            time: self.context.clock.now(),
            actor: String::new(),
            credential: String::new(),
            from: from.to_string(),
            method: method.to_owned(),
            target: String::new(),
            result: OK.to_owned(),
            message: String::new(),
        })
    }

    /// Records a call that changed nothing. A change is recorded in its own transaction.
    async fn record<T>(
        &self,
        record: &Record,
        actor: &str,
        from: SocketAddr,
        asked: Asked,
        result: &Result<T, ApiError>,
    ) {
        let mut row = record.row();
        if record.is_stored() {
            return record::log(&row, Some(from.ip()));
        }
        if asked.silent {
            return;
        }
        actor.clone_into(&mut row.actor);
        row.target = if actor.is_empty() { asked.target.clone() } else { actor.to_owned() };
        row.credential.clone_from(&asked.token);
        if let Err(error) = result {
            code_word(error.code()).clone_into(&mut row.result);
            row.message = asked.message(error.to_string());
        }
        self.context.access.recorder().record(row, Some(from.ip())).await;
    }
}

fn lock<T>(issued: &Mutex<T>) -> MutexGuard<'_, T> {
    issued.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes the calling node in the record, as actor and as target.
fn by(record: &Record, node: &NodeId) {
    record.edit(|row| {
        row.actor = node.name();
        row.target = node.name();
    });
}

/// Details of a call for the audit. The admin is told more than the caller.
#[derive(Debug, Default)]
struct Asked {
    /// `joinTokens/ID`, from the token's text.
    token: String,
    /// `nodes/ID`: the requested id, or the node of the certificate.
    target: String,
    /// The board's serial number.
    serial: String,
    /// The true reason of a refusal; empty: the answer has it.
    why: String,
    /// True if there is nothing to record.
    silent: bool,
}

impl Asked {
    fn message(&self, said: String) -> String {
        let why = if self.why.is_empty() { &said } else { &self.why };
        if why.is_empty() || self.serial.is_empty() {
            return why.to_owned();
        }
        format!("{why} (serial number {})", self.serial)
    }
}

/// A node's certificate for the store.
fn row(issued: Issued, node: &NodeId, generation: i64) -> CertificateRow {
    CertificateRow {
        serial: issued.serial,
        node: Some(node.clone()),
        subject: node.as_str().to_owned(),
        role: "node".to_owned(),
        key_sha256: issued.key_sha256,
        not_before: issued.not_before,
        not_after: issued.not_after,
        generation,
        pem: issued.pem,
        given_for: String::new(),
    }
}

/// One error for a token that is wrong, expired, used up or revoked, or not for this board, id or network. A caller
/// cannot find out which.
fn refused() -> ApiError {
    ApiError::Forbidden {
        reason: "TOKEN_REFUSED",
        message:
            "the join token is not valid: it is wrong, expired, used up, revoked, or not for this node or network; \
                  make one with `marcoctl tokens create` (the audit says which of these it was)"
                .to_owned(),
    }
}

fn revoked() -> ApiError {
    ApiError::Unauthenticated {
        reason: "CERTIFICATE_REVOKED",
        message: "this certificate was revoked or its node deleted; the node must enrol again with a token".to_owned(),
    }
}

fn request_error(error: RequestError) -> ApiError {
    let message = error.to_string();
    match error {
        RequestError::Request(_) => ApiError::invalid("certificate_request", message),
        RequestError::Certificate(_) | RequestError::Signature => {
            ApiError::Unauthenticated { reason: "CERTIFICATE_REFUSED", message }
        }
        RequestError::Pki(PkiError::Clock(wrong)) => ApiError::wrong_clock(&wrong),
        RequestError::Pki(_) => {
            // One budget for all callers: the cause is the CA's, and each of them can bring it about.
            of_peer!(error, "the CA", error = &*crate::chain(&error), "a certificate could not be issued");
            ApiError::Internal("the certificate could not be issued".to_owned())
        }
    }
}

fn pem(field: &str, text: &str) -> Result<(), ApiError> {
    if text.is_empty() || text.len() > PEM_MAX {
        return Err(ApiError::invalid(field, format!("must be PEM of at most {PEM_MAX} bytes")));
    }
    Ok(())
}

fn from<T>(request: &Request<T>) -> Result<SocketAddr, ApiError> {
    let peer = request.extensions().get::<PeerInfo>();
    peer.map(|peer| shown(peer.addr)).ok_or_else(|| ApiError::Internal("the caller has no address".to_owned()))
}

#[tonic::async_trait]
impl EnrollmentService for Enrollments {
    async fn enroll(&self, request: Request<v1::EnrollRequest>) -> Result<Response<v1::EnrollResponse>, Status> {
        let from = from(&request)?;
        let (record, mut asked) = (self.row("Enroll", from), Asked::default());
        let result = match self.admit(from.ip()) {
            Ok(()) => {
                let work = self.enroll(request.into_inner(), from.ip(), &record, &mut asked);
                recorded(Arc::clone(&record), work).await
            }
            Err(error) => Err(error),
        };
        self.count(from.ip(), &result);
        let actor = result.as_ref().map(|response| response.node.clone()).unwrap_or_default();
        self.record(&record, &actor, from, asked, &result).await;
        Ok(Response::new(result?))
    }

    async fn renew_certificate(
        &self,
        request: Request<v1::RenewCertificateRequest>,
    ) -> Result<Response<v1::RenewCertificateResponse>, Status> {
        let from = from(&request)?;
        let (record, mut asked) = (self.row("RenewCertificate", from), Asked::default());
        let result = match self.admit(from.ip()) {
            Ok(()) => {
                let work = self.renew(request.into_inner(), &record, from, &mut asked);
                recorded(Arc::clone(&record), work).await
            }
            Err(error) => Err(error),
        };
        self.count(from.ip(), &result);
        // A refused caller has proved no identity, so the audit does not name the node as the actor.
        let actor = if result.is_ok() { asked.target.clone() } else { String::new() };
        self.record(&record, &actor, from, asked, &result).await;
        Ok(Response::new(result?))
    }
}
