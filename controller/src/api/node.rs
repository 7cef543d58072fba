//! `NodeService`.

use std::collections::BTreeMap;

use chrono::TimeDelta;
use marco_proto::names::{JoinTokenId, NodeId};
use marco_proto::v1;
use marco_proto::v1::node_service_server::NodeService;
use tonic::{Request, Response, Status};

use super::status::ApiError;
use super::{Context, caller, convert, page, remedy, watch};
use crate::identity::Caller;
use crate::identity::roles::Role;
use crate::identity::tokens::JoinToken;
use crate::operation::Decision;
use crate::sessions::End;
use crate::store::{
    ApproveOutcome, DeleteNodeOutcome, NewToken, NodeQuery, NodeRow, ResolveOutcome, Scope, UpdateNodeOutcome,
};

/// Default validity of a join token: long enough to prepare a card, short enough to be forgotten.
const DEFAULT_TTL: TimeDelta = TimeDelta::minutes(30);
/// Longest validity of a join token.
const MAX_TTL: TimeDelta = TimeDelta::days(90);
/// Largest number of nodes that one token may enrol.
const MAX_USES: u32 = 10_000;
/// Hexadecimal digits of a SHA-256.
const FINGERPRINT_LENGTH: usize = 64;

/// The service.
pub(super) struct Nodes {
    context: Context,
}

impl Nodes {
    pub(super) fn new(context: Context) -> Self {
        Self { context }
    }

    async fn find(&self, caller: &Caller, id: &NodeId) -> Result<NodeRow, ApiError> {
        self.context.node_for(caller, id).await?.ok_or_else(|| not_found(id))
    }

    async fn list(&self, caller: &Caller, request: v1::ListNodesRequest) -> Result<v1::ListNodesResponse, ApiError> {
        const LIST: &str = "nodes";
        let size = page::size(request.page_size)?;
        let after = match page::after(LIST, &request.page_token)? {
            Some(id) => Some(node_id("page_token", &id)?),
            None => None,
        };
        let query = NodeQuery { after, limit: size + 1, scope: caller.scope(), ..query(request.filter)? };
        let rows = self.context.store.nodes(&query).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |row| row.id.as_str().to_owned());
        Ok(v1::ListNodesResponse { nodes: rows.iter().map(convert::node).collect(), next_page_token })
    }

    async fn update(&self, caller: &Caller, request: v1::UpdateNodeRequest) -> Result<NodeRow, ApiError> {
        let node = request.node.ok_or_else(|| ApiError::invalid("node", "is missing"))?;
        let id = node_id("node.name", &node.name)?;
        let paths = request.update_mask.map(|mask| mask.paths).unwrap_or_default();
        if paths.is_empty() {
            return Err(ApiError::invalid("update_mask", "must name at least one of labels and display_name"));
        }
        let mut labels = None;
        let mut display_name = None;
        for path in &paths {
            match path.as_str() {
                "labels" => labels = Some(convert::labels("node.labels", node.labels.clone())?),
                "display_name" => {
                    display_name = Some(convert::text("node.display_name", &node.display_name)?.to_owned());
                }
                other => {
                    let other: String = other.chars().take(80).collect();
                    return Err(ApiError::invalid(
                        "update_mask",
                        format!("{other:?} cannot be changed; only labels and display_name can"),
                    ));
                }
            }
        }
        // The update is conditional on these labels: a change by another caller in between must not be lost.
        let before = self.find(caller, &id).await?.labels;
        if let Some(labels) = &labels
            && caller.role != Role::Admin
        {
            self.may_relabel(&before, labels).await?;
        }
        let updated = self
            .context
            .store
            .update_node(&id, labels.as_ref().map(|_| &before), labels.as_ref(), display_name.as_deref())
            .await?;
        match updated {
            UpdateNodeOutcome::Updated(row) => Ok(*row),
            UpdateNodeOutcome::ChangedMeanwhile => Err(ApiError::Aborted {
                reason: "CHANGED_MEANWHILE",
                message: format!("the labels of {} were changed by somebody else just now; try again", id.name()),
            }),
            UpdateNodeOutcome::NotFound => Err(not_found(&id)),
        }
    }

    /// Returns an error if a label changes by which callers are limited. Otherwise a limited caller could move a node
    /// into its reach, or out of another's.
    async fn may_relabel(
        &self,
        before: &BTreeMap<String, String>,
        after: &BTreeMap<String, String>,
    ) -> Result<(), ApiError> {
        let reserved = self.context.store.scope_keys().await?;
        match reserved.iter().find(|key| before.get(*key) != after.get(*key)) {
            None => Ok(()),
            Some(key) => Err(ApiError::Forbidden {
                reason: "LABEL_RESERVED",
                message: format!("the label {key} says who may operate a node; only an admin changes it"),
            }),
        }
    }

    async fn delete(
        &self,
        caller: &Caller,
        request: &v1::DeleteNodeRequest,
    ) -> Result<v1::DeleteNodeResponse, ApiError> {
        let id = node_id("name", &request.name)?;
        match self.context.store.delete_node(&id, request.force, &caller.name, self.context.clock.now()).await? {
            DeleteNodeOutcome::Deleted => {
                // This controller's session ends at once. Other controllers see the change in the store.
                self.context.sessions.end(&id, End::Barred);
                Ok(v1::DeleteNodeResponse {})
            }
            DeleteNodeOutcome::Busy(executions) => Err(ApiError::Precondition {
                reason: "NODE_BUSY",
                message: format!(
                    "{} has unfinished work ({}); wait for it, cancel it, or delete with force",
                    id.name(),
                    executions.iter().map(|id| id.name()).collect::<Vec<_>>().join(", ")
                ),
            }),
            DeleteNodeOutcome::NotFound => Err(not_found(&id)),
        }
    }

    async fn approve(&self, request: &v1::ApproveNodeRequest) -> Result<NodeRow, ApiError> {
        let id = node_id("name", &request.name)?;
        let fingerprint = match request.fingerprint.as_str() {
            "" => None,
            text => Some(fingerprint(text)?),
        };
        // Read before, to see if the approval moved the node to another key.
        let before = self.context.store.node(&id).await?;
        let precondition = |reason, message| Err(ApiError::Precondition { reason, message });
        match self.context.store.approve(&id, fingerprint.as_deref(), self.context.clock.now()).await? {
            ApproveOutcome::Approved(row) => {
                // The approval put another key in service, so the session of the old key ends.
                if before.is_some_and(|before| before.session_epoch != row.session_epoch) {
                    self.context.sessions.end(&id, End::Lost);
                }
                Ok(*row)
            }
            ApproveOutcome::Choose(waiting) if waiting.is_empty() => precondition(
                "NO_KEY_WAITS",
                format!(
                    "the key of {} was shut out, and none waits; the node must enrol again with a token",
                    id.name()
                ),
            ),
            ApproveOutcome::Choose(waiting) => precondition(
                "FINGERPRINT_NEEDED",
                format!(
                    "more than one key of {} may be meant; name the fingerprint of one that waits: {}",
                    id.name(),
                    waiting.join(", ")
                ),
            ),
            ApproveOutcome::NoSuchKey(waiting) if waiting.is_empty() => {
                precondition("NO_SUCH_KEY", format!("no key of {} waits for approval", id.name()))
            }
            ApproveOutcome::NoSuchKey(waiting) => precondition(
                "NO_SUCH_KEY",
                format!(
                    "no key of {} with this fingerprint waits for approval; these do: {}",
                    id.name(),
                    waiting.join(", ")
                ),
            ),
            ApproveOutcome::NotFound => Err(not_found(&id)),
        }
    }

    async fn quarantine(&self, caller: &Caller, request: &v1::QuarantineNodeRequest) -> Result<NodeRow, ApiError> {
        let id = node_id("name", &request.name)?;
        let reason = convert::text("reason", &request.reason)?;
        // First, so that a limited caller cannot probe for nodes outside its scope.
        self.find(caller, &id).await?;
        let row = self
            .context
            .store
            .quarantine(&id, reason, self.context.clock.now())
            .await?
            .ok_or_else(|| not_found(&id))?;
        self.context.sessions.end(&id, End::Barred);
        Ok(row)
    }

    async fn resolve(&self, caller: &Caller, request: &v1::ResolveNodeRequest) -> Result<NodeRow, ApiError> {
        use v1::resolve_node_request::Decision as Asked;
        let id = node_id("name", &request.name)?;
        let decision = match Asked::try_from(request.decision) {
            Ok(Asked::Accept) => Decision::Accept,
            Ok(Asked::Abandon) => Decision::Abandon,
            Ok(Asked::Unspecified) | Err(_) => {
                return Err(ApiError::invalid("decision", "must be DECISION_ACCEPT or DECISION_ABANDON"));
            }
        };
        self.find(caller, &id).await?;
        match self.context.store.resolve(&id, decision, &caller.name, self.context.clock.now()).await? {
            ResolveOutcome::Resolved(conflicts) => {
                for conflict in conflicts {
                    let said = conflict.sentence();
                    tracing::info!(execution = %conflict.execution, ?decision, said, "a conflict was decided");
                }
                self.find(caller, &id).await
            }
            ResolveOutcome::NoConflict => Err(ApiError::Precondition {
                reason: "NO_CONFLICT",
                message: format!("{} and the controller agree; there is nothing to resolve", id.name()),
            }),
            ResolveOutcome::NotFound => Err(not_found(&id)),
        }
    }

    async fn create_token(
        &self,
        caller: &Caller,
        request: v1::CreateJoinTokenRequest,
    ) -> Result<v1::JoinToken, ApiError> {
        let now = self.context.clock.now();
        // A client that does not set the field sends 0.
        let max_uses = if request.max_uses == 0 { 1 } else { request.max_uses };
        if max_uses > MAX_USES {
            return Err(ApiError::invalid("max_uses", format!("must be at most {MAX_USES}")));
        }
        let ttl = convert::ttl("ttl", request.ttl, DEFAULT_TTL, MAX_TTL)?;
        let limits = convert::token_limits(request.cidrs, request.serials, request.nodes)?;
        let labels = convert::labels("labels", request.labels)?;
        // With the CA's pin, by which a node knows the right controller before it trusts anything.
        let token = JoinToken::mint(self.context.ca.spki_sha256())
            .map_err(|error| ApiError::Internal(format!("the system gives no random numbers: {error}")))?;
        let new = NewToken {
            id: token.id.clone(),
            secret_sha256: token.secret_sha256(),
            max_uses,
            expire_time: crate::calendar::later(now, ttl),
            require_approval: request.require_approval,
            labels,
            creator: caller.name.clone(),
            cidrs: limits.cidrs,
            serials: limits.serials,
            nodes: limits.nodes,
        };
        caller.note_target(&new.id.name());
        let row = self.context.store.create_token(&new, now).await?;
        Ok(v1::JoinToken { token: token.reveal(), ..convert::join_token(&row) })
    }

    async fn list_tokens(&self, request: v1::ListJoinTokensRequest) -> Result<v1::ListJoinTokensResponse, ApiError> {
        const LIST: &str = "joinTokens";
        let size = page::size(request.page_size)?;
        let after = match page::after(LIST, &request.page_token)? {
            Some(id) => Some(token_id("page_token", &id)?),
            None => None,
        };
        let rows = self.context.store.tokens(after.as_ref(), size + 1).await?;
        let (rows, next_page_token) = page::cut(rows, size, LIST, |row| row.id.as_str().to_owned());
        Ok(v1::ListJoinTokensResponse { join_tokens: rows.iter().map(convert::join_token).collect(), next_page_token })
    }

    async fn revoke_token(&self, name: &str) -> Result<v1::JoinToken, ApiError> {
        let id = token_id("name", name)?;
        let revoked = self.context.store.revoke_token(&id).await?;
        // Revoked without asking first: a leaked token must be useless at once.
        let (row, stranded) = revoked.ok_or_else(|| ApiError::NotFound {
            reason: "TOKEN_NOT_FOUND",
            message: format!("there is no {}; `marcoctl tokens list` shows those that exist", id.name()),
        })?;
        let nodes = stranded.nodes.iter().map(NodeId::name);
        let stranded = nodes.chain(stranded.serials.iter().map(|serial| format!("serial {serial}"))).collect();
        Ok(v1::JoinToken { stranded, ..convert::join_token(&row) })
    }
}

fn query(filter: Option<v1::NodeFilter>) -> Result<NodeQuery, ApiError> {
    let filter = filter.unwrap_or_default();
    let states = filter
        .states
        .iter()
        .map(|state| {
            convert::node_state(*state).ok_or_else(|| ApiError::invalid("filter.states", "has an unknown state"))
        })
        .collect::<Result<Vec<_>, _>>()?;
    let labels: BTreeMap<String, String> = match filter.labels {
        Some(labels) => convert::labels("filter.labels", labels.match_labels)?,
        None => BTreeMap::new(),
    };
    Ok(NodeQuery {
        after: None,
        limit: u32::MAX,
        states,
        labels,
        connected: filter.connected,
        scope: Scope::everything(),
    })
}

fn node_id(field: &str, name: &str) -> Result<NodeId, ApiError> {
    NodeId::parse(name).map_err(|error| ApiError::invalid(field, error.to_string()))
}

/// A key's fingerprint in the store's form; blanks and colons are ignored.
fn fingerprint(text: &str) -> Result<String, ApiError> {
    let bare: String = text.chars().filter(|c| !c.is_whitespace() && *c != ':').collect();
    if bare.len() != FINGERPRINT_LENGTH || !bare.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(ApiError::invalid("fingerprint", "must be 64 hexadecimal digits: `marcoctl nodes get` shows it"));
    }
    Ok(bare.to_ascii_lowercase())
}

/// A node's full name for the audit, also for a bare id. A text that names no node is kept as it is.
fn target(name: &str) -> String {
    NodeId::parse(name).map_or_else(|_| name.to_owned(), |id| id.name())
}

fn token_id(field: &str, name: &str) -> Result<JoinTokenId, ApiError> {
    JoinTokenId::parse(name).map_err(|error| ApiError::invalid(field, error.to_string()))
}

fn not_found(id: &NodeId) -> ApiError {
    ApiError::NotFound {
        reason: "NODE_NOT_FOUND",
        message: format!("there is no {}; `marcoctl nodes list` shows those that exist", id.name()),
    }
}

#[tonic::async_trait]
impl NodeService for Nodes {
    async fn get_node(&self, request: Request<v1::GetNodeRequest>) -> Result<Response<v1::Node>, Status> {
        let caller = caller(&request)?;
        let id = node_id("name", &request.get_ref().name)?;
        // The role table admits every node to this method; it may read only itself.
        if caller.role == Role::Node && caller.node.as_ref() != Some(&id) {
            return Err(
                ApiError::Forbidden { reason: "NOT_YOURS", message: "a node reads only itself".to_owned() }.into()
            );
        }
        let row = self.find(&caller, &id).await?;
        let trouble = remedy::trouble(&self.context, &id).await?;
        let mut node = v1::Node { trouble, ..convert::node(&row) };
        // A node that is connected, or asks about itself, is on.
        if !node.connected && caller.role != Role::Node {
            let off = self.context.store.powered_off(std::slice::from_ref(&id)).await.map_err(ApiError::from)?;
            node.powered_off_by = off.get(&id).map(|off| off.operation.name()).unwrap_or_default();
        }
        Ok(Response::new(node))
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(self.list(&caller, request.into_inner()).await?))
    }

    async fn update_node(&self, request: Request<v1::UpdateNodeRequest>) -> Result<Response<v1::Node>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let target = request.node.as_ref().map(|node| target(&node.name)).unwrap_or_default();
        caller.note_target(&target);
        let result = self.update(&caller, request).await;
        self.context.audit(&caller, "UpdateNode", &target, &result).await;
        Ok(Response::new(convert::node(&result?)))
    }

    async fn delete_node(
        &self,
        request: Request<v1::DeleteNodeRequest>,
    ) -> Result<Response<v1::DeleteNodeResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        caller.note_target(&target(&request.name));
        let result = self.delete(&caller, &request).await;
        self.context.audit(&caller, "DeleteNode", &target(&request.name), &result).await;
        Ok(Response::new(result?))
    }

    type WatchNodesStream = watch::Stream<v1::WatchNodesResponse>;

    async fn watch_nodes(
        &self,
        request: Request<v1::WatchNodesRequest>,
    ) -> Result<Response<Self::WatchNodesStream>, Status> {
        let caller = caller(&request)?;
        let query = query(request.into_inner().filter)?;
        Ok(Response::new(watch::nodes(self.context.clone(), caller, query)))
    }

    async fn approve_node(&self, request: Request<v1::ApproveNodeRequest>) -> Result<Response<v1::Node>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        caller.note_target(&target(&request.name));
        let result = self.approve(&request).await;
        self.context.audit(&caller, "ApproveNode", &target(&request.name), &result).await;
        Ok(Response::new(convert::node(&result?)))
    }

    async fn quarantine_node(&self, request: Request<v1::QuarantineNodeRequest>) -> Result<Response<v1::Node>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        caller.note_target(&target(&request.name));
        let result = self.quarantine(&caller, &request).await;
        self.context.audit(&caller, "QuarantineNode", &target(&request.name), &result).await;
        Ok(Response::new(convert::node(&result?)))
    }

    async fn resolve_node(&self, request: Request<v1::ResolveNodeRequest>) -> Result<Response<v1::Node>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        caller.note_target(&request.name);
        let result = self.resolve(&caller, &request).await;
        self.context.audit(&caller, "ResolveNode", &request.name, &result).await;
        Ok(Response::new(convert::node(&result?)))
    }

    async fn create_join_token(
        &self,
        request: Request<v1::CreateJoinTokenRequest>,
    ) -> Result<Response<v1::JoinToken>, Status> {
        let caller = caller(&request)?;
        let result = self.create_token(&caller, request.into_inner()).await;
        let target = result.as_ref().map(|token| token.name.clone()).unwrap_or_default();
        self.context.audit(&caller, "CreateJoinToken", &target, &result).await;
        Ok(Response::new(result?))
    }

    async fn list_join_tokens(
        &self,
        request: Request<v1::ListJoinTokensRequest>,
    ) -> Result<Response<v1::ListJoinTokensResponse>, Status> {
        Ok(Response::new(self.list_tokens(request.into_inner()).await?))
    }

    async fn revoke_join_token(
        &self,
        request: Request<v1::RevokeJoinTokenRequest>,
    ) -> Result<Response<v1::JoinToken>, Status> {
        let caller = caller(&request)?;
        let name = request.into_inner().name;
        caller.note_target(&name);
        let result = self.revoke_token(&name).await;
        self.context
            .audit(&caller, "RevokeJoinToken", &JoinTokenId::parse(&name).map_or(name, |id| id.name()), &result)
            .await;
        Ok(Response::new(result?))
    }
}
