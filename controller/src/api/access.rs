//! `AccessService`.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::names::{ApiTokenId, CertificateId, UserId};
use marco_proto::v1;
use marco_proto::v1::access_service_server::AccessService;
use tonic::{Request, Response, Status};

use super::status::ApiError;
use super::{Context, caller, convert, page};
use crate::identity::Caller;
use crate::identity::api_tokens::ApiSecret;
use crate::identity::ca::{PkiError, RequestError};
use crate::identity::roles::Role;
use crate::store::{
    ApiTokenRow, AuditQuery, CertificateQuery, CertificateRow, CreateUserOutcome, Scope, StoredCertificate,
    UpdateUserOutcome, UserRow,
};

/// Default validity of a user's certificate.
const CERTIFICATE_TTL: TimeDelta = TimeDelta::days(365);
/// Longest validity of a user's certificate.
const CERTIFICATE_TTL_MAX: TimeDelta = TimeDelta::days(730);
/// Default validity of an API token, shorter because it is a secret that is copied around.
const TOKEN_TTL: TimeDelta = TimeDelta::days(90);
/// Longest validity of an API token.
const TOKEN_TTL_MAX: TimeDelta = TimeDelta::days(365);
/// Longest signing request, in bytes: one with a P-256 key has well under 1 KiB.
const PEM_MAX: usize = 16 * 1024;

/// The service.
pub(super) struct Doors {
    context: Context,
}

impl Doors {
    pub(super) fn new(context: Context) -> Self {
        Self { context }
    }

    async fn list_certificates(
        &self,
        request: v1::ListCertificatesRequest,
    ) -> Result<v1::ListCertificatesResponse, ApiError> {
        const LIST: &str = "certificates";
        let size = page::size(request.page_size)?;
        let filter = request.filter.unwrap_or_default();
        let query = CertificateQuery {
            after: page::after(LIST, &request.page_token)?,
            limit: size + 1,
            // A node may be given as `nodes/ID`; certificates hold the bare id.
            subject: convert::text("filter.subject", &filter.subject)?
                .rsplit('/')
                .next()
                .unwrap_or_default()
                .to_owned(),
            valid_at: filter.valid.then(|| self.context.clock.now()),
        };
        let rows = self.context.store.certificates(&query).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |row| row.certificate.serial.clone());
        Ok(v1::ListCertificatesResponse {
            certificates: rows.iter().map(convert::certificate).collect(),
            next_page_token,
        })
    }

    async fn revoke_certificate(&self, caller: &Caller, name: &str) -> Result<StoredCertificate, ApiError> {
        let id = CertificateId::parse(name).map_err(|error| ApiError::invalid("name", error.to_string()))?;
        // Serial numbers are stored in lower case.
        let serial = id.as_str().to_ascii_lowercase();
        if serial == caller.serial {
            return Err(yourself("revoke the certificate"));
        }
        let row = self.context.store.revoke_certificate(&serial, self.context.clock.now()).await?;
        row.ok_or_else(|| ApiError::NotFound {
            reason: "CERTIFICATE_NOT_FOUND",
            message: format!("there is no {}; `marcoctl certs list` shows those that exist", id.name()),
        })
    }

    async fn create_user(&self, caller: &Caller, request: v1::CreateUserRequest) -> Result<v1::User, ApiError> {
        let now = self.context.clock.now();
        let asked = request.user.unwrap_or_default();
        let id = UserId::parse(&request.user_id).map_err(|error| ApiError::invalid("user_id", error.to_string()))?;
        // The audit and the events could not tell such a user from the controller itself.
        if id.as_str().eq_ignore_ascii_case("controller") {
            return Err(ApiError::invalid("user_id", "is what the controller's own events are signed with"));
        }
        if id.as_str().eq_ignore_ascii_case("ca") {
            return Err(ApiError::invalid("user_id", "would have its certificate in the file of the CA's, ca.crt"));
        }
        let role = convert::person_role("user.role", asked.role)?;
        let scope = scope("user.selector", asked.selector, role)?;
        let ttl = convert::ttl("ttl", request.ttl, CERTIFICATE_TTL, CERTIFICATE_TTL_MAX)?;
        if request.certificate_request.is_empty() || request.certificate_request.len() > PEM_MAX {
            return Err(ApiError::invalid("certificate_request", format!("must be PEM of at most {PEM_MAX} bytes")));
        }
        let ca = &self.context.ca;
        let issued = ca.certify_user(&request.certificate_request, id.as_str(), role, ttl, now).map_err(|error| {
            let message = error.to_string();
            match error {
                RequestError::Pki(PkiError::Clock(wrong)) => ApiError::wrong_clock(&wrong),
                RequestError::Pki(_) => ApiError::Internal("the certificate could not be issued".to_owned()),
                _ => ApiError::invalid("certificate_request", message),
            }
        })?;
        let user = UserRow {
            id: id.clone(),
            role: role.as_str().to_owned(),
            scope,
            create_time: now,
            creator: caller.name.clone(),
            revoke_time: None,
        };
        let row = CertificateRow {
            serial: issued.serial,
            node: None,
            subject: id.as_str().to_owned(),
            role: role.as_str().to_owned(),
            key_sha256: issued.key_sha256,
            not_before: issued.not_before,
            not_after: issued.not_after,
            generation: 0,
            pem: String::new(),
            given_for: String::new(),
        };
        match self.context.store.create_user(&user, &row).await? {
            CreateUserOutcome::Created(user) => Ok(v1::User {
                certificate: issued.pem,
                ca_certificate: ca.certificate_pem().to_owned(),
                ..convert::user(&user)
            }),
            CreateUserOutcome::NameTaken(why) => Err(ApiError::AlreadyExists { reason: "NAME_TAKEN", message: why }),
            CreateUserOutcome::Differs(user) => Err(ApiError::AlreadyExists {
                reason: "USER_EXISTS",
                message: format!(
                    "{} is a {} of {} already; change that with `marcoctl users update {id}`",
                    id.name(),
                    user.role,
                    user.scope
                ),
            }),
        }
    }

    async fn list_users(&self, request: v1::ListUsersRequest) -> Result<v1::ListUsersResponse, ApiError> {
        const LIST: &str = "users";
        let size = page::size(request.page_size)?;
        let after = match page::after(LIST, &request.page_token)? {
            Some(id) => Some(user_id("page_token", &id)?),
            None => None,
        };
        let rows = self.context.store.users(after.as_ref(), size + 1).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |row| row.id.as_str().to_owned());
        Ok(v1::ListUsersResponse { users: rows.iter().map(convert::user).collect(), next_page_token })
    }

    async fn update_user(&self, caller: &Caller, request: v1::UpdateUserRequest) -> Result<v1::User, ApiError> {
        let asked = request.user.ok_or_else(|| ApiError::invalid("user", "is missing"))?;
        let id = user_id("user.name", &asked.name)?;
        if caller.api_token.is_none() && id.as_str() == caller.name {
            return Err(yourself("change"));
        }
        let paths = request.update_mask.map(|mask| mask.paths).unwrap_or_default();
        let (mut role, mut selector) = (None, None);
        for path in &paths {
            match path.as_str() {
                "role" => role = Some(convert::person_role("user.role", asked.role)?),
                "selector" => selector = Some(asked.selector.clone()),
                _ => return Err(ApiError::invalid("update_mask", "may name role and selector, nothing else")),
            }
        }
        if paths.is_empty() {
            return Err(ApiError::invalid("update_mask", "must name at least one of role and selector"));
        }
        // Fields that the mask does not name keep their values.
        let before = self.context.store.user(&id).await?.ok_or_else(|| no_user(&id))?;
        let role_then: Role = match role {
            Some(role) => role,
            None => before.role.parse().map_err(|_| ApiError::Internal("the user has an unknown role".to_owned()))?,
        };
        let selector = selector.unwrap_or_else(|| before.scope.labels().clone().into_iter().collect());
        // Checked with the role as it will be: an admin cannot be limited.
        let scope = scope("user.selector", selector, role_then)?;
        // Conditional on the row that was read, so that two admins do not undo each other's change.
        match self.context.store.update_user(&before, role_then.as_str(), &scope).await? {
            UpdateUserOutcome::Updated(row) => Ok(convert::user(&row)),
            UpdateUserOutcome::ChangedMeanwhile => Err(ApiError::Aborted {
                reason: "CHANGED_MEANWHILE",
                message: format!("{} was changed by somebody else just now; look at it and try again", id.name()),
            }),
            UpdateUserOutcome::Revoked => Err(ApiError::Precondition {
                reason: "USER_REVOKED",
                message: format!("{} is shut out; `marcoctl users create {id}` lets it in again", id.name()),
            }),
        }
    }

    async fn revoke_user(&self, caller: &Caller, name: &str) -> Result<v1::User, ApiError> {
        let id = user_id("name", name)?;
        if caller.api_token.is_none() && id.as_str() == caller.name {
            return Err(yourself("shut out"));
        }
        let row = self.context.store.revoke_user(&id, self.context.clock.now()).await?;
        row.map(|row| convert::user(&row)).ok_or_else(|| no_user(&id))
    }

    async fn create_api_token(
        &self,
        caller: &Caller,
        request: v1::CreateApiTokenRequest,
    ) -> Result<v1::ApiToken, ApiError> {
        let now = self.context.clock.now();
        let asked = request.api_token.unwrap_or_default();
        let id = api_token_id("api_token_id", &request.api_token_id)?;
        let role = convert::person_role("api_token.role", asked.role)?;
        let scope = scope("api_token.selector", asked.selector, role)?;
        let ttl = convert::ttl("ttl", request.ttl, TOKEN_TTL, TOKEN_TTL_MAX)?;
        // The store keeps only the hash, so this answer is the only place where the secret is shown.
        let secret = ApiSecret::mint()
            .map_err(|error| ApiError::Internal(format!("the system gives no random numbers: {error}")))?;
        let row = ApiTokenRow {
            id,
            role: role.as_str().to_owned(),
            scope,
            expire_time: crate::calendar::later(now, ttl),
            create_time: now,
            creator: caller.name.clone(),
            revoke_time: None,
        };
        // An id is never used again, because the audit names callers by it.
        if !self.context.store.create_api_token(&row, &secret.sha256()).await? {
            return Err(ApiError::AlreadyExists {
                reason: "API_TOKEN_EXISTS",
                message: format!("there is or was {} already; choose another name", row.id.name()),
            });
        }
        Ok(v1::ApiToken { token: secret.reveal(), ..convert::api_token(&row) })
    }

    async fn list_api_tokens(&self, request: v1::ListApiTokensRequest) -> Result<v1::ListApiTokensResponse, ApiError> {
        const LIST: &str = "apiTokens";
        let size = page::size(request.page_size)?;
        let after = match page::after(LIST, &request.page_token)? {
            Some(id) => Some(api_token_id("page_token", &id)?),
            None => None,
        };
        let rows = self.context.store.api_tokens(after.as_ref(), size + 1).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |row| row.id.as_str().to_owned());
        Ok(v1::ListApiTokensResponse { api_tokens: rows.iter().map(convert::api_token).collect(), next_page_token })
    }

    async fn revoke_api_token(&self, caller: &Caller, name: &str) -> Result<v1::ApiToken, ApiError> {
        let id = api_token_id("name", name)?;
        if caller.api_token.as_ref() == Some(&id) {
            return Err(yourself("revoke"));
        }
        let row = self.context.store.revoke_api_token(&id, self.context.clock.now()).await?;
        row.map(|row| convert::api_token(&row)).ok_or_else(|| ApiError::NotFound {
            reason: "API_TOKEN_NOT_FOUND",
            message: format!("there is no {}; `marcoctl api-tokens list` shows those that exist", id.name()),
        })
    }

    async fn list_audit(&self, request: v1::ListAuditEventsRequest) -> Result<v1::ListAuditEventsResponse, ApiError> {
        const LIST: &str = "auditEvents";
        let size = page::size(request.page_size)?;
        let filter = request.filter.unwrap_or_default();
        let damaged = || ApiError::invalid("page_token", "is damaged");
        let before = match page::after(LIST, &request.page_token)? {
            Some(number) => Some(number.parse().map_err(|_| damaged())?),
            None => None,
        };
        let query = AuditQuery {
            before,
            limit: size + 1,
            actor: convert::text("filter.caller", &filter.caller)?.to_owned(),
            // The audit has short names; the full path of a method is accepted too.
            method: convert::text("filter.method", &filter.method)?.rsplit('/').next().unwrap_or_default().to_owned(),
            target: convert::text("filter.resource", &filter.resource)?.to_owned(),
            since: since(filter.since)?,
            refused: filter.refused,
        };
        let rows = self.context.store.audit(&query).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |(number, _)| number.to_string());
        let audit_events = rows.iter().map(|(number, row)| convert::audit_event(*number, row)).collect();
        Ok(v1::ListAuditEventsResponse { audit_events, next_page_token })
    }
}

fn since(since: Option<prost_types::Timestamp>) -> Result<Option<DateTime<Utc>>, ApiError> {
    let mut wrong = None;
    let read = convert::time(since, "filter.since", &mut |_, why| wrong = Some(why));
    wrong.map_or(Ok(read), |why| Err(ApiError::invalid("filter.since", why)))
}

/// The nodes that a viewer or an operator is limited to; empty selector: all.
fn scope(field: &str, selector: std::collections::HashMap<String, String>, role: Role) -> Result<Scope, ApiError> {
    let labels: BTreeMap<String, String> = convert::labels(field, selector)?;
    if !labels.is_empty() && !matches!(role, Role::Viewer | Role::Operator) {
        return Err(ApiError::invalid(field, format!("limits viewers and operators; a {role} cannot be limited")));
    }
    Ok(Scope::new(labels))
}

/// The error for an admin who would shut out themselves: another admin must be left who can undo it.
fn yourself(what: &str) -> ApiError {
    ApiError::Precondition {
        reason: "YOURSELF",
        message: format!("you cannot {what} that you show yourself; another admin can"),
    }
}

fn user_id(field: &str, name: &str) -> Result<UserId, ApiError> {
    UserId::parse(name).map_err(|error| ApiError::invalid(field, error.to_string()))
}

fn api_token_id(field: &str, name: &str) -> Result<ApiTokenId, ApiError> {
    ApiTokenId::parse(name).map_err(|error| ApiError::invalid(field, error.to_string()))
}

fn no_user(id: &UserId) -> ApiError {
    ApiError::NotFound {
        reason: "USER_NOT_FOUND",
        message: format!("there is no {}; `marcoctl users list` shows those that exist", id.name()),
    }
}

#[tonic::async_trait]
impl AccessService for Doors {
    async fn list_certificates(
        &self,
        request: Request<v1::ListCertificatesRequest>,
    ) -> Result<Response<v1::ListCertificatesResponse>, Status> {
        Ok(Response::new(self.list_certificates(request.into_inner()).await?))
    }

    async fn revoke_certificate(
        &self,
        request: Request<v1::RevokeCertificateRequest>,
    ) -> Result<Response<v1::Certificate>, Status> {
        let caller = caller(&request)?;
        let name = request.into_inner().name;
        caller.note_target(&name);
        let result = self.revoke_certificate(&caller, &name).await;
        self.context.audit(&caller, "RevokeCertificate", &name, &result).await;
        Ok(Response::new(convert::certificate(&result?)))
    }

    async fn create_user(&self, request: Request<v1::CreateUserRequest>) -> Result<Response<v1::User>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let target = format!("users/{}", request.user_id);
        caller.note_target(&target);
        let result = self.create_user(&caller, request).await;
        self.context.audit(&caller, "CreateUser", &target, &result).await;
        Ok(Response::new(result?))
    }

    async fn list_users(
        &self,
        request: Request<v1::ListUsersRequest>,
    ) -> Result<Response<v1::ListUsersResponse>, Status> {
        Ok(Response::new(self.list_users(request.into_inner()).await?))
    }

    async fn update_user(&self, request: Request<v1::UpdateUserRequest>) -> Result<Response<v1::User>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let target = request.user.as_ref().map(|user| user.name.clone()).unwrap_or_default();
        caller.note_target(&target);
        let result = self.update_user(&caller, request).await;
        self.context.audit(&caller, "UpdateUser", &target, &result).await;
        Ok(Response::new(result?))
    }

    async fn revoke_user(&self, request: Request<v1::RevokeUserRequest>) -> Result<Response<v1::User>, Status> {
        let caller = caller(&request)?;
        let name = request.into_inner().name;
        caller.note_target(&name);
        let result = self.revoke_user(&caller, &name).await;
        self.context.audit(&caller, "RevokeUser", &name, &result).await;
        Ok(Response::new(result?))
    }

    async fn create_api_token(
        &self,
        request: Request<v1::CreateApiTokenRequest>,
    ) -> Result<Response<v1::ApiToken>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let target = format!("apiTokens/{}", request.api_token_id);
        caller.note_target(&target);
        let result = self.create_api_token(&caller, request).await;
        self.context.audit(&caller, "CreateApiToken", &target, &result).await;
        Ok(Response::new(result?))
    }

    async fn list_api_tokens(
        &self,
        request: Request<v1::ListApiTokensRequest>,
    ) -> Result<Response<v1::ListApiTokensResponse>, Status> {
        Ok(Response::new(self.list_api_tokens(request.into_inner()).await?))
    }

    async fn revoke_api_token(
        &self,
        request: Request<v1::RevokeApiTokenRequest>,
    ) -> Result<Response<v1::ApiToken>, Status> {
        let caller = caller(&request)?;
        let name = request.into_inner().name;
        caller.note_target(&name);
        let result = self.revoke_api_token(&caller, &name).await;
        self.context.audit(&caller, "RevokeApiToken", &name, &result).await;
        Ok(Response::new(result?))
    }

    async fn list_audit_events(
        &self,
        request: Request<v1::ListAuditEventsRequest>,
    ) -> Result<Response<v1::ListAuditEventsResponse>, Status> {
        Ok(Response::new(self.list_audit(request.into_inner()).await?))
    }
}
