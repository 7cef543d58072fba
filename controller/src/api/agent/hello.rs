//! Admission of a node that says Hello: one session for each node, its own key, and the board that it enrolled with.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use marco_proto::names::{NodeId, SERVED_PROTOCOLS};
use marco_proto::v1;
use tokio::time::Instant;

use crate::api::status::ApiError;
use crate::api::{Context, convert};
use crate::identity::peer_log::{cut, of_peer};
use crate::identity::record::OK;
use crate::identity::roles::Role;
use crate::identity::shown;
use crate::identity::tls::Connection;
use crate::operation::NodeState;
use crate::sessions::Handle;
use crate::store::{AuditRow, Record, SessionOutcome, SessionStart, recorded};

/// Longest `instance` of an agent in bytes. Our agent sends 32.
const INSTANCE_MAX: usize = 64;
/// Most versions of the protocol in a Hello.
const VERSIONS_MAX: usize = 16;
/// Most executions in a Hello. An honest node lists one at work, and a few that wait for an acknowledgement.
const EXECUTIONS_MAX: usize = 256;

/// Caller that opens a session.
pub(super) struct Peer {
    pub(super) from: SocketAddr,
    /// Serial number of its certificate, as in the store.
    pub(super) certificate: String,
    /// Its connection. `None`: the listener does not track connections.
    pub(super) connection: Option<Arc<Connection>>,
    /// Time at which its connection was accepted; for a later session on it, the time at which that was requested.
    pub(super) accepted: Instant,
}

fn quarantined(node: &NodeId) -> ApiError {
    ApiError::Forbidden {
        reason: "NODE_QUARANTINED",
        message: format!("{} is quarantined; an admin can approve it", node.name()),
    }
}

fn revoked() -> ApiError {
    ApiError::Unauthenticated {
        reason: "CERTIFICATE_REVOKED",
        message: "this certificate was revoked or its node deleted; the node must enrol again with a token".to_owned(),
    }
}

/// PERMISSION_DENIED: the caller's key waits for approval.
pub(in crate::api) fn key_held(node: &NodeId, fingerprint: &str) -> ApiError {
    ApiError::Forbidden {
        reason: "KEY_AWAITS_APPROVAL",
        message: format!(
            "this key waits for an admin's approval: `marcoctl nodes approve {node} --fingerprint {fingerprint}`"
        ),
    }
}

/// Checks the random value of an agent's start.
fn instance(text: &str) -> Result<String, ApiError> {
    if text.len() > INSTANCE_MAX {
        return Err(ApiError::invalid("hello.instance", format!("must be at most {INSTANCE_MAX} bytes")));
    }
    Ok(convert::text("hello.instance", text)?.to_owned())
}

/// Chooses the highest version of the protocol that both sides speak.
fn protocol(hello: &v1::Hello) -> Result<u32, ApiError> {
    let spoken = match hello.protocol_versions.as_slice() {
        [] => std::slice::from_ref(&hello.protocol_version),
        spoken => spoken,
    };
    if spoken.len() > VERSIONS_MAX {
        return Err(ApiError::invalid("hello.protocol_versions", format!("must be at most {VERSIONS_MAX}")));
    }
    SERVED_PROTOCOLS.iter().rev().find(|version| spoken.contains(version)).copied().ok_or_else(|| {
        ApiError::Precondition {
            reason: "PROTOCOL_VERSION",
            message: format!(
                "the agent speaks version {} of the protocol, this controller {}; update the older one",
                listed(spoken),
                listed(&SERVED_PROTOCOLS)
            ),
        }
    })
}

/// Formats versions for people: `1 or 2`.
fn listed(versions: &[u32]) -> String {
    versions.iter().map(u32::to_string).collect::<Vec<_>>().join(" or ")
}

/// Audit record of an action that the controller takes by itself. The store fills in the method and the reason.
fn record(context: &Context, node: &NodeId, from: SocketAddr) -> Arc<Record> {
    Record::new(AuditRow {
        time: context.clock.now(),
        actor: "controller".to_owned(),
        credential: String::new(),
        from: shown(from).to_string(),
        method: String::new(),
        target: node.name(),
        result: OK.to_owned(),
        message: String::new(),
    })
}

/// A session that has begun in the store and in the registry.
pub(super) struct Begun {
    /// Session epoch.
    pub(super) epoch: i64,
    /// True if the node is not approved. It stays connected and gets no work.
    pub(super) held: bool,
    /// The node's labels, for Welcome.
    pub(super) labels: BTreeMap<String, String>,
    /// The session's side of its entry in the registry.
    pub(super) handle: Handle,
    /// Version of the protocol in this session.
    pub(super) protocol: u32,
}

/// Begins a session in the store and in the registry.
pub(super) async fn begin(
    context: &Context,
    peer: &Peer,
    node: &NodeId,
    hello: &v1::Hello,
    accept_time: DateTime<Utc>,
) -> Result<Begun, ApiError> {
    // Checked before the store is asked: each listed execution costs a locked row and statements.
    if hello.executions.len() > EXECUTIONS_MAX {
        let message = format!("must be at most {EXECUTIONS_MAX}: those that were not acknowledged");
        return Err(ApiError::invalid("hello.executions", message));
    }
    let protocol = protocol(hello)?;
    // The gate checked the certificate when the call began, but up to 10 s may pass until the Hello.
    let known = context.store.certificate(&peer.certificate).await?;
    let known = known.filter(|known| !known.revoked() && known.certificate.node.as_ref() == Some(node));
    let Some(key_sha256) = known.map(|known| known.certificate.key_sha256) else { return Err(revoked()) };
    let start = SessionStart {
        controller_id: context.controller.clone(),
        accept_time,
        key_sha256,
        origin: shown(peer.from).ip().to_string(),
        boot_id: convert::boot_id(&hello.boot_id)?,
        instance: instance(&hello.instance)?,
        mode: convert::mode(hello.mode)?,
        agent_version: convert::text("hello.agent_version", &hello.agent_version)?.to_owned(),
        board: convert::board(hello.board.clone().unwrap_or_default())?,
        system: convert::system(hello.system.clone().unwrap_or_default(), hello.conditions.clone())?,
    };
    let record = record(context, node, peer.from);
    // Written only if the store shuts the node out or holds it: sessions begin all day.
    let begun = recorded(Arc::clone(&record), context.store.begin_session(node, &start, context.clock.now())).await?;
    if record.is_stored() {
        let row = record.row();
        let (what, why) = (row.method, row.message);
        of_peer!(warn, node, %node, from = %peer.from, what, why = %cut(&why), "a node was shut out or held");
    }
    match begun {
        SessionOutcome::Begun { epoch, node: row, .. } => {
            // If the store did not answer during the handshake, the connection still counts as a stranger's, which
            // gives way to newcomers.
            if let Some(connection) = &peer.connection {
                connection.accept(Role::Node, node.as_str());
            }
            // The store decided already, but a later session may have overtaken this one on its way here.
            let handle = context.sessions.open(node, epoch, &peer.certificate).ok_or_else(|| ApiError::Aborted {
                reason: "SESSION_SUPERSEDED",
                message: "the node opened another session, or the controller is stopping".to_owned(),
            })?;
            Ok(Begun { epoch, held: row.state != NodeState::Approved, labels: row.labels, handle, protocol })
        }
        SessionOutcome::KeyHeld { .. } => Err(key_held(node, &start.key_sha256)),
        SessionOutcome::KeyRevoked => Err(revoked()),
        SessionOutcome::Cloned | SessionOutcome::Quarantined => Err(quarantined(node)),
        SessionOutcome::Superseded => Err(ApiError::Aborted {
            reason: "SESSION_SUPERSEDED",
            message: "the node has a newer session from a later boot".to_owned(),
        }),
        SessionOutcome::UnknownNode => Err(ApiError::Unauthenticated {
            reason: "NODE_UNKNOWN",
            message: format!("there is no {} any more; it must enrol again with a token", node.name()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use marco_proto::v1;

    use super::protocol;
    use crate::api::status::ApiError;

    #[test]
    fn highest_version_that_both_speak_is_chosen() {
        let of = |protocol_version, versions: &[u32]| {
            protocol(&v1::Hello { protocol_version, protocol_versions: versions.to_vec(), ..v1::Hello::default() })
        };
        for (single, versions, chosen) in
            [(1, [].as_slice(), 1), (2, &[2], 2), (1, &[1, 2], 2), (3, &[2, 3], 2), (9, &[9, 1], 1), (2, &[], 2)]
        {
            assert_eq!(of(single, versions).unwrap(), chosen, "{single} {versions:?}");
        }
        for (single, versions) in [(0, [].as_slice()), (3, &[]), (1, &[3, 4])] {
            let Err(ApiError::Precondition { reason, message }) = of(single, versions) else { panic!("{versions:?}") };
            assert_eq!(reason, "PROTOCOL_VERSION");
            assert!(message.contains("this controller 1 or 2"), "{message}");
        }
        assert!(matches!(of(1, &[1; 17]), Err(ApiError::Invalid { .. })));
    }
}
