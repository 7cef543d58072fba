//! `EnrollmentService`: on a listener of its own, for callers without a certificate.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use marco_proto::names::NodeId;
use marco_proto::v1;
use marco_proto::v1::enrollment_service_server::EnrollmentService;
use tonic::{Request, Response, Status};

use super::Context;
use super::convert;
use super::status::ApiError;
use crate::identity::ca::{Ca, RequestError};
use crate::identity::gate::code_word;
use crate::identity::rate::{Rate, source};
use crate::identity::record::{self, OK};
use crate::identity::shown;
use crate::identity::tls::PeerInfo;
use crate::identity::tokens::JoinToken;
use crate::store::{AuditRow, CertificateRow, EnrolOutcome, Enrolment, Record, recorded};

/// Longest signing request or certificate, in bytes: one with a P-256 key has well under 1 KiB.
const PEM_MAX: usize = 16 * 1024;

/// Calls from one address that let nobody in: a room of Pis with a wrong token may all try, and then once a second.
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

    /// Refuses an address that was refused too often, before anything costs more.
    fn admit(&self, address: IpAddr) -> Result<(), ApiError> {
        if self.refused.has(&source(address), self.context.clock.now()) {
            return Ok(());
        }
        Err(ApiError::Exhausted {
            reason: "TOO_MANY_TRIES",
            message: "too many calls from this address were refused; try again later".to_owned(),
        })
    }

    /// Notes a call that was refused.
    fn count<T>(&self, address: IpAddr, result: &Result<T, ApiError>) {
        if matches!(result, Err(error) if !matches!(error, ApiError::Store(_) | ApiError::Internal(_))) {
            self.refused.take(source(address), self.context.clock.now());
        }
    }

    async fn enroll(
        &self,
        request: v1::EnrollRequest,
        address: IpAddr,
        record: &Record,
    ) -> Result<v1::EnrollResponse, ApiError> {
        pem("certificate_request", &request.certificate_request)?;
        let wanted_id = match request.node_id.as_str() {
            "" => None,
            id => Some(NodeId::parse(id).map_err(|error| ApiError::invalid("node_id", error.to_string()))?),
        };
        let board = convert::board(request.board.unwrap_or_default())?;
        if wanted_id.is_none() && board.serial.is_empty() {
            return Err(ApiError::invalid("node_id", "is needed, as the board has no serial number to make one from"));
        }
        let token = JoinToken::parse(&request.token).map_err(|_| refused())?;
        let key_sha256 = Ca::key_of_request(&request.certificate_request).map_err(request_error)?;
        let now = self.context.clock.now();
        let enrolment = Enrolment { token_sha256: token.secret_sha256(), key_sha256, wanted_id, board, address };
        let ca = &self.context.ca;
        let mut issued = None;
        // The certificate is issued inside the transaction that takes the token, for the id that the node gets there.
        let outcome = self
            .context
            .store
            .enrol(&enrolment, now, |node, generation| {
                by(record, node);
                let certificate = ca.issue_node(&request.certificate_request, node, now).ok()?;
                let row = CertificateRow {
                    serial: certificate.serial.clone(),
                    node: Some(node.clone()),
                    subject: node.as_str().to_owned(),
                    role: "node".to_owned(),
                    key_sha256: certificate.key_sha256.clone(),
                    not_before: certificate.not_before,
                    not_after: certificate.not_after,
                    generation,
                };
                issued = Some(certificate);
                Some(row)
            })
            .await?;
        match (outcome, issued) {
            (EnrolOutcome::Admitted { node, held, .. }, Some(certificate)) => Ok(v1::EnrollResponse {
                node: node.name(),
                certificate: certificate.pem,
                ca_certificate: ca.certificate_pem().to_owned(),
                held,
            }),
            (EnrolOutcome::Admitted { .. } | EnrolOutcome::NotIssued, _) => {
                Err(ApiError::Internal("no certificate was issued".to_owned()))
            }
            (EnrolOutcome::Refused, _) => Err(refused()),
        }
    }

    async fn renew(
        &self,
        request: v1::RenewCertificateRequest,
        record: &Record,
    ) -> Result<(NodeId, v1::RenewCertificateResponse), ApiError> {
        pem("certificate", &request.certificate)?;
        pem("certificate_request", &request.certificate_request)?;
        let now = self.context.clock.now();
        let ca = &self.context.ca;
        let proof = ca
            .verify_renewal(&request.certificate, &request.certificate_request, &request.signature, now)
            .map_err(request_error)?;
        let known = self.context.store.certificate(&proof.serial).await?;
        let Some(old) = known.filter(|known| !known.revoked() && known.certificate.node.as_ref() == Some(&proof.node))
        else {
            return Err(revoked());
        };
        let issued = ca.issue_node(&request.certificate_request, &proof.node, now).map_err(request_error)?;
        let row = CertificateRow {
            serial: issued.serial,
            node: Some(proof.node.clone()),
            subject: proof.node.as_str().to_owned(),
            role: "node".to_owned(),
            key_sha256: issued.key_sha256,
            not_before: issued.not_before,
            not_after: issued.not_after,
            generation: old.certificate.generation,
        };
        by(record, &proof.node);
        if !self.context.store.renew_certificate(&proof.serial, &row).await? {
            return Err(revoked());
        }
        let response =
            v1::RenewCertificateResponse { certificate: issued.pem, ca_certificate: ca.certificate_pem().to_owned() };
        Ok((proof.node, response))
    }

    /// The row of a call as it is if the call succeeds; who made it is seen on the way.
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

    /// Records a call that changed nothing. One that did is recorded with its change.
    async fn record<T>(&self, record: &Record, actor: &str, from: SocketAddr, result: &Result<T, ApiError>) {
        let mut row = record.row();
        if record.is_stored() {
            return record::log(&row, Some(from.ip()));
        }
        actor.clone_into(&mut row.actor);
        actor.clone_into(&mut row.target);
        if let Err(error) = result {
            code_word(error.code()).clone_into(&mut row.result);
            row.message = error.to_string();
        }
        self.context.access.recorder().record(row, Some(from.ip())).await;
    }
}

/// Notes which node calls, and on whom it is therefore called.
fn by(record: &Record, node: &NodeId) {
    record.edit(|row| {
        row.actor = node.name();
        row.target = node.name();
    });
}

/// One answer for a wrong, an expired, a used and a revoked token, and one that is not for this board, id or network, so that nothing can be learnt from it.
fn refused() -> ApiError {
    ApiError::Forbidden {
        reason: "TOKEN_REFUSED",
        message:
            "the join token is not valid: it is wrong, expired, used up, revoked, or not for this node or network; \
                  make one with `marcoctl tokens create`"
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
        RequestError::Pki(_) => {
            tracing::error!(error = &*crate::chain(&error), "a certificate could not be issued");
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
        let record = self.row("Enroll", from);
        let result = match self.admit(from.ip()) {
            Ok(()) => recorded(Arc::clone(&record), self.enroll(request.into_inner(), from.ip(), &record)).await,
            Err(error) => Err(error),
        };
        self.count(from.ip(), &result);
        let actor = result.as_ref().map(|response| response.node.clone()).unwrap_or_default();
        self.record(&record, &actor, from, &result).await;
        Ok(Response::new(result?))
    }

    async fn renew_certificate(
        &self,
        request: Request<v1::RenewCertificateRequest>,
    ) -> Result<Response<v1::RenewCertificateResponse>, Status> {
        let from = from(&request)?;
        let record = self.row("RenewCertificate", from);
        let result = match self.admit(from.ip()) {
            Ok(()) => recorded(Arc::clone(&record), self.renew(request.into_inner(), &record)).await,
            Err(error) => Err(error),
        };
        self.count(from.ip(), &result);
        let actor = result.as_ref().map(|(node, _)| node.name()).unwrap_or_default();
        self.record(&record, &actor, from, &result).await;
        Ok(Response::new(result?.1))
    }
}
