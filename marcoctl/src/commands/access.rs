//! `marcoctl api-tokens`, `certs` and `audit`.

use std::collections::HashMap;
use std::io::Write as _;

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::v1::{
    ApiToken, AuditEvent, AuditFilter, Certificate, CertificateFilter, CreateApiTokenRequest, ListApiTokensRequest,
    ListApiTokensResponse, ListAuditEventsRequest, ListAuditEventsResponse, ListCertificatesRequest,
    ListCertificatesResponse, RevokeApiTokenRequest, RevokeCertificateRequest, Role,
};
use prost_types::Timestamp;

use super::{all_pages, label_map, proto_duration};
use crate::args::{ApiTokensCommand, AuditCommand, CertsCommand, CreateApiToken, ListAudit};
use crate::connect::{Connection, call};
use crate::failure::Failure;
use crate::output::{Out, ago, enum_word, fields, id, labels, listing, local, timestamp, timestamp_of};

pub(super) async fn api_tokens(
    command: ApiTokensCommand,
    connection: &Connection,
    out: &mut Out,
) -> Result<(), Failure> {
    match command {
        ApiTokensCommand::Create(flags) => create_api_token(flags, connection, out).await,
        ApiTokensCommand::List(paging) => {
            let api_tokens = all_pages(async |page_token| {
                let request = ListApiTokensRequest { page_size: paging.page_size, page_token };
                let page = connection.access().list_api_tokens(call(request)).await?.into_inner();
                Ok((page.api_tokens, page.next_page_token))
            })
            .await?;
            out.document(&ListApiTokensResponse { api_tokens, ..Default::default() }, |list, now| {
                let rows = list.api_tokens.iter().map(|token| token_row(token, now));
                listing("no API tokens", &["API TOKEN", "ROLE", "NODES", "STATE", "EXPIRES", "CREATOR"], rows)
            })
        }
        ApiTokensCommand::Revoke { token } => {
            let request = RevokeApiTokenRequest { name: token };
            let token = connection.access().revoke_api_token(call(request)).await?.into_inner();
            out.document(&token, |token: &ApiToken, now| {
                fields(&[
                    ("API token", token.name.clone()),
                    ("state", state(token.revoke_time.as_ref(), token.expire_time.as_ref(), now)),
                    ("role", role(token.role())),
                    ("nodes", nodes(&token.selector)),
                ])
            })
        }
    }
}

fn token_row(token: &ApiToken, now: DateTime<Utc>) -> Vec<String> {
    vec![
        id(&token.name),
        role(token.role()),
        nodes(&token.selector),
        state(token.revoke_time.as_ref(), token.expire_time.as_ref(), now),
        expiry(token.expire_time.as_ref(), now),
        token.creator.clone(),
    ]
}

fn certificate_row(certificate: &Certificate, now: DateTime<Utc>) -> Vec<String> {
    vec![
        id(&certificate.name),
        certificate.subject.clone(),
        role(certificate.role()),
        state(certificate.revoke_time.as_ref(), certificate.expire_time.as_ref(), now),
        expiry(certificate.expire_time.as_ref(), now),
    ]
}

async fn create_api_token(flags: CreateApiToken, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let asked =
        ApiToken { role: Role::from(flags.role).into(), selector: label_map(&flags.selector), ..ApiToken::default() };
    let request = CreateApiTokenRequest {
        api_token: Some(asked),
        api_token_id: flags.name,
        ttl: Some(proto_duration(flags.ttl)?),
    };
    let token = connection.access().create_api_token(call(request)).await?.into_inner();
    // stdout gets only the token, for a file or a variable.
    out.document(&token, |token, _| token.token.clone())?;
    if !out.is_json() {
        let text = format!(
            "This token ({}) is {} on {} until {}. It is not shown again.\n",
            id(&token.name),
            role(token.role()).to_lowercase(),
            nodes(&token.selector),
            local(token.expire_time.as_ref())
        );
        // The token was printed. A closed stderr does not undo that.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
    Ok(())
}

pub(super) async fn certs(command: CertsCommand, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    match command {
        CertsCommand::List(flags) => {
            let filter = CertificateFilter { subject: flags.subject, valid: flags.valid };
            let certificates = all_pages(async |page_token| {
                let filter = Some(filter.clone());
                let request = ListCertificatesRequest { page_size: flags.paging.page_size, page_token, filter };
                let page = connection.access().list_certificates(call(request)).await?.into_inner();
                Ok((page.certificates, page.next_page_token))
            })
            .await?;
            out.document(&ListCertificatesResponse { certificates, ..Default::default() }, |list, now| {
                let rows = list.certificates.iter().map(|certificate| certificate_row(certificate, now));
                listing("no certificates", &["SERIAL", "SUBJECT", "ROLE", "STATE", "EXPIRES"], rows)
            })
        }
        CertsCommand::Revoke { certificate } => {
            let request = RevokeCertificateRequest { name: certificate };
            let certificate = connection.access().revoke_certificate(call(request)).await?.into_inner();
            out.document(&certificate, |certificate: &Certificate, now| {
                fields(&[
                    ("certificate", certificate.name.clone()),
                    ("subject", certificate.subject.clone()),
                    ("role", role(certificate.role())),
                    ("state", state(certificate.revoke_time.as_ref(), certificate.expire_time.as_ref(), now)),
                    ("expires", local(certificate.expire_time.as_ref())),
                ])
            })
        }
    }
}

pub(super) async fn audit(command: AuditCommand, connection: &Connection, out: &mut Out) -> Result<(), Failure> {
    let AuditCommand::List(flags) = command;
    // The audit only grows, so --limit also limits the pages that are fetched.
    let mut audit_events = match flags.limit {
        Some(most) => some_events(&flags, most, connection).await?,
        None => {
            all_pages(async |page_token| {
                let page = page(&flags, page_token, connection).await?;
                Ok((page.audit_events, page.next_page_token))
            })
            .await?
        }
    };
    // The last page may have more than was asked for.
    audit_events.truncate(flags.limit.unwrap_or(usize::MAX));
    out.document(&ListAuditEventsResponse { audit_events, ..Default::default() }, |list, _| {
        let rows = list.audit_events.iter().map(|event: &AuditEvent| {
            let result = if event.message.is_empty() {
                event.code.clone()
            } else {
                format!("{}: {}", event.code, event.message)
            };
            vec![
                local(event.time.as_ref()),
                event.caller.clone(),
                event.address.clone(),
                event.method.clone(),
                event.resource.clone(),
                result,
            ]
        });
        listing("no events", &["TIME", "CALLER", "ADDRESS", "METHOD", "RESOURCE", "RESULT"], rows)
    })
}

async fn page(
    flags: &ListAudit,
    page_token: String,
    connection: &Connection,
) -> Result<ListAuditEventsResponse, tonic::Status> {
    let filter = AuditFilter {
        caller: flags.caller.clone(),
        method: flags.method.clone(),
        resource: flags.resource.clone(),
        since: flags.since.map(timestamp_of),
        refused: flags.refused,
    };
    let request = ListAuditEventsRequest { page_size: flags.paging.page_size, page_token, filter: Some(filter) };
    Ok(connection.access().list_audit_events(call(request)).await?.into_inner())
}

/// Fetches pages until there are `most` events.
async fn some_events(flags: &ListAudit, most: usize, connection: &Connection) -> Result<Vec<AuditEvent>, Failure> {
    let (mut events, mut page_token) = (Vec::new(), String::new());
    loop {
        let page = page(flags, page_token, connection).await?;
        events.extend(page.audit_events);
        page_token = page.next_page_token;
        if events.len() >= most || page_token.is_empty() {
            return Ok(events);
        }
    }
}

pub(super) fn role(role: Role) -> String {
    enum_word(role.as_str_name(), "ROLE_")
}

/// Formats the nodes that a user or a token is limited to.
pub(super) fn nodes(selector: &HashMap<String, String>) -> String {
    if selector.is_empty() { "all nodes".to_owned() } else { labels(selector) }
}

/// Days before its expiry at which a list warns.
const SOON_DAYS: i64 = 14;

/// Returns true if it has expired, or will expire within two weeks.
pub(super) fn expires_soon(expires: Option<&Timestamp>, now: DateTime<Utc>) -> bool {
    timestamp(expires).is_some_and(|time| time.signed_duration_since(now) <= TimeDelta::days(SOON_DAYS))
}

/// Formats an expiry for a list.
fn expiry(expires: Option<&Timestamp>, now: DateTime<Utc>) -> String {
    let when = ago(expires, now);
    if expires_soon(expires, now) && !when.ends_with("ago") { format!("{when}, soon") } else { when }
}

pub(super) fn state(revoked: Option<&Timestamp>, expires: Option<&Timestamp>, now: DateTime<Utc>) -> String {
    let expired = timestamp(expires).is_some_and(|time| time <= now);
    if revoked.is_some() {
        "REVOKED"
    } else if expired {
        "EXPIRED"
    } else {
        "VALID"
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};
    use marco_proto::v1::{ApiToken, Certificate};
    use prost_types::Timestamp;

    use super::{certificate_row, expiry, token_row};

    #[test]
    fn lists_warn_two_weeks_before_something_expires() {
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let expires = |days| {
            let time = now + TimeDelta::days(days);
            expiry(Some(&Timestamp { seconds: time.timestamp(), nanos: 0 }), now)
        };
        assert_eq!(expires(15), "in 15 days");
        assert_eq!(expires(14), "in 14 days, soon");
        assert_eq!(expires(-3), "3 days ago");
        assert_eq!(expiry(None, now), "", "it never expires");
        let end = now + TimeDelta::days(5);
        let expire_time = Some(Timestamp { seconds: end.timestamp(), nanos: 0 });
        let token = ApiToken { expire_time, ..ApiToken::default() };
        let certificate = Certificate { expire_time, ..Certificate::default() };
        for row in [token_row(&token, now), certificate_row(&certificate, now)] {
            assert!(row.contains(&"in 5 days, soon".to_owned()), "{row:?}");
        }
    }
}
