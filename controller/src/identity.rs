//! Who calls, and what they may do.

pub mod access;
pub mod api_tokens;
pub mod ca;
pub mod callers;
pub mod calls;
pub mod expiry;
pub mod gate;
pub mod peer_log;
pub mod rate;
pub mod record;
pub mod roles;
pub mod tls;
pub mod tokens;
pub mod upkeep;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use marco_proto::names::{ApiTokenId, NodeId};
use tokio_util::sync::CancellationToken;

use crate::store::{AuditRow, Record, Scope};
use roles::Role;
use tls::PeerInfo;

/// Who makes a call, as its certificate or its API token says.
#[derive(Debug, Clone)]
pub struct Caller {
    /// A user, or the name of a node or of an API token.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// The node, when the role is [`Role::Node`].
    pub node: Option<NodeId>,
    /// Where the call comes from.
    pub from: SocketAddr,
    /// The certificate's serial number, lower-case hexadecimal; empty with an API token.
    pub serial: String,
    /// The API token that was shown instead of a certificate.
    pub api_token: Option<ApiTokenId>,
    /// What becomes of it while the call is open.
    pub pass: Arc<Pass>,
}

/// What may change while a call is open, and what is noted about it.
#[derive(Debug)]
pub struct Pass {
    scope: Mutex<Scope>,
    cut: CancellationToken,
    why: OnceLock<Denied>,
    recorded: AtomicBool,
    record: OnceLock<Arc<Record>>,
    target: Mutex<String>,
}

impl Pass {
    /// For a caller that is limited to these nodes.
    fn new(scope: Scope) -> Self {
        Self {
            scope: Mutex::new(scope),
            cut: CancellationToken::new(),
            why: OnceLock::new(),
            recorded: AtomicBool::new(false),
            record: OnceLock::new(),
            target: Mutex::new(String::new()),
        }
    }

    fn limit(&self, scope: Scope) {
        *self.scope.lock().unwrap_or_else(PoisonError::into_inner) = scope;
    }

    /// Ends the call; false when it was ended before.
    fn cut(&self, why: Denied) -> bool {
        let first = self.why.set(why).is_ok();
        self.cut.cancel();
        first
    }

    fn token(&self) -> CancellationToken {
        self.cut.clone()
    }

    fn why(&self) -> Denied {
        self.why.get().cloned().unwrap_or(Denied::Revoked)
    }

    fn is_recorded(&self) -> bool {
        self.recorded.load(Ordering::Relaxed) || self.record.get().is_some_and(|record| record.is_stored())
    }

    fn target(&self) -> String {
        self.target.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Why a call may not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No certificate that the CA issued, or one that names no role.
    #[error("this call needs a client certificate that the controller's CA issued, or an API token")]
    Unauthenticated,
    /// An API token that is wrong, expired or revoked; which one is not told.
    #[error("the API token is not valid: it is wrong, expired or revoked")]
    BadToken,
    /// A certificate that was revoked, or whose user or node is gone.
    #[error("this certificate was revoked or has expired")]
    Revoked,
    /// A node that is shut out.
    #[error("the node is quarantined; an admin can approve it")]
    Quarantined,
    /// A node's key that is not in service: its fingerprint.
    #[error("this key of the node waits for an admin's approval; its fingerprint is {0}")]
    KeyHeld(String),
    /// The role may not make this call.
    #[error("the role {role} may not call this method; those that may: {}", roles::names(allowed))]
    Forbidden {
        /// The caller's.
        role: Role,
        /// Those that may.
        allowed: &'static [Role],
    },
    /// Nobody can be looked up.
    #[error("the controller's database does not answer; try again")]
    Unavailable,
}

impl Caller {
    /// The caller behind a connection; `None` without a certificate or when the certificate names no role.
    pub fn from_peer(peer: &PeerInfo) -> Option<Self> {
        let certificate = peer.certificate.as_deref()?;
        let role: Role = certificate.role.parse().ok()?;
        let node = match role {
            Role::Node => Some(NodeId::parse(&certificate.common_name).ok()?),
            Role::Viewer | Role::Operator | Role::Publisher | Role::Admin | Role::Controller => None,
        };
        Some(Self {
            // As the audit has it: nobody else is called so.
            name: node.as_ref().map_or_else(|| certificate.common_name.clone(), NodeId::name),
            role,
            node,
            from: peer.addr,
            serial: certificate.serial.clone(),
            api_token: None,
            pass: Arc::new(Pass::new(Scope::everything())),
        })
    }

    /// The nodes that it is limited to, now.
    pub fn scope(&self) -> Scope {
        self.pass.scope.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What it showed, by name.
    pub fn credential(&self) -> String {
        self.api_token.as_ref().map_or_else(|| format!("certificates/{}", self.serial), ApiTokenId::name)
    }

    /// Notes on what the call is made, for the audit.
    pub fn note_target(&self, target: &str) {
        target.clone_into(&mut self.pass.target.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(record) = self.pass.record.get() {
            record.edit(|row| record::set_target(row, target));
        }
    }

    /// Says with which record the call's change is stored.
    pub fn record_with_change(&self, record: Arc<Record>) {
        // One call has one record; the first counts.
        let _ = self.pass.record.set(record);
    }

    /// The call's row in the audit, if it was stored with what the call changed.
    pub fn recorded_with_change(&self) -> Option<AuditRow> {
        self.pass.record.get().filter(|record| record.is_stored()).map(|record| record.row())
    }

    /// Says that whoever handles the call records it.
    pub fn leave_recording(&self) {
        self.pass.recorded.store(true, Ordering::Relaxed);
    }
}

/// An address as people write it: a v4 address on a v6 socket is a v4 address.
pub fn shown(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Whether a caller may call a method, by its path (`/package.Service/Method`). Deny by default. Answers the caller.
///
/// # Errors
/// Why not.
pub fn authorize<'a>(method_path: &str, caller: Option<&'a Caller>) -> Result<&'a Caller, Denied> {
    let caller = caller.ok_or(Denied::Unauthenticated)?;
    let allowed = roles::allowed(method_path);
    if allowed.contains(&caller.role) { Ok(caller) } else { Err(Denied::Forbidden { role: caller.role, allowed }) }
}
