//! Certificates, users, API tokens and the audit.

use chrono::TimeDelta;
use marco_proto::v1;

use super::timestamp;
use crate::api::status::ApiError;
use crate::identity::roles::Role;
use crate::store::{ApiTokenRow, AuditRow, StoredCertificate, UserRow};

fn role(word: &str) -> i32 {
    match word.parse() {
        Ok(Role::Viewer) => v1::Role::Viewer,
        Ok(Role::Operator) => v1::Role::Operator,
        Ok(Role::Publisher) => v1::Role::Publisher,
        Ok(Role::Admin) => v1::Role::Admin,
        Ok(Role::Node) => v1::Role::Node,
        Ok(Role::Controller) => v1::Role::Controller,
        Err(_) => v1::Role::Unspecified,
    }
    .into()
}

/// The role of a user or an API token.
pub(in crate::api) fn person_role(field: &str, role: i32) -> Result<Role, ApiError> {
    match v1::Role::try_from(role) {
        Ok(v1::Role::Viewer) => Ok(Role::Viewer),
        Ok(v1::Role::Operator) => Ok(Role::Operator),
        Ok(v1::Role::Publisher) => Ok(Role::Publisher),
        Ok(v1::Role::Admin) => Ok(Role::Admin),
        // Nodes and controllers get their certificates by enrolment and from the CA.
        Ok(v1::Role::Unspecified | v1::Role::Node | v1::Role::Controller) | Err(_) => {
            Err(ApiError::invalid(field, "must be one of viewer, operator, publisher and admin"))
        }
    }
}

/// A validity: above zero, and at most the limit.
pub(in crate::api) fn ttl(
    field: &str,
    asked: Option<prost_types::Duration>,
    default: TimeDelta,
    most: TimeDelta,
) -> Result<TimeDelta, ApiError> {
    let Some(asked) = asked else { return Ok(default) };
    // Each step is checked: the number is the caller's, and may be the largest there is.
    TimeDelta::try_seconds(asked.seconds)
        .and_then(|seconds| seconds.checked_add(&TimeDelta::nanoseconds(i64::from(asked.nanos))))
        .filter(|ttl| *ttl > TimeDelta::zero() && *ttl <= most)
        .ok_or_else(|| ApiError::invalid(field, format!("must be more than zero and at most {} days", most.num_days())))
}

pub(in crate::api) fn certificate(row: &StoredCertificate) -> v1::Certificate {
    let certificate = &row.certificate;
    v1::Certificate {
        name: format!("certificates/{}", certificate.serial),
        subject: certificate.subject.clone(),
        role: role(&certificate.role),
        start_time: Some(timestamp(certificate.not_before)),
        expire_time: Some(timestamp(certificate.not_after)),
        revoke_time: row.revoke_time.map(timestamp),
        key_sha256: certificate.key_sha256.clone(),
        generation: certificate.generation,
    }
}

pub(in crate::api) fn user(row: &UserRow) -> v1::User {
    v1::User {
        name: row.id.name(),
        role: role(&row.role),
        selector: row.scope.labels().clone().into_iter().collect(),
        create_time: Some(timestamp(row.create_time)),
        creator: row.creator.clone(),
        revoke_time: row.revoke_time.map(timestamp),
        certificate: String::new(),
        ca_certificate: String::new(),
    }
}

pub(in crate::api) fn api_token(row: &ApiTokenRow) -> v1::ApiToken {
    v1::ApiToken {
        name: row.id.name(),
        token: String::new(),
        role: role(&row.role),
        selector: row.scope.labels().clone().into_iter().collect(),
        expire_time: Some(timestamp(row.expire_time)),
        create_time: Some(timestamp(row.create_time)),
        creator: row.creator.clone(),
        revoke_time: row.revoke_time.map(timestamp),
    }
}

pub(in crate::api) fn audit_event(number: u64, row: &AuditRow) -> v1::AuditEvent {
    v1::AuditEvent {
        name: format!("auditEvents/{number}"),
        time: Some(timestamp(row.time)),
        caller: row.actor.clone(),
        credential: row.credential.clone(),
        address: row.from.clone(),
        method: row.method.clone(),
        resource: row.target.clone(),
        code: row.result.clone(),
        message: row.message.clone(),
    }
}
