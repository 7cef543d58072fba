//! Identity and permissions of callers.

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

/// A caller, by its certificate or its API token.
#[derive(Debug, Clone)]
pub struct Caller {
    /// Name of a user, or resource name of a node or an API token.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// The node, when the role is [`Role::Node`].
    pub node: Option<NodeId>,
    /// Address of the client.
    pub from: SocketAddr,
    /// The certificate's serial number, lower-case hexadecimal; empty with an API token.
    pub serial: String,
    /// The API token; `None`: a certificate was shown instead.
    pub api_token: Option<ApiTokenId>,
    /// State of the open call.
    pub pass: Arc<Pass>,
}

/// The parts of an open call's state that may change, and notes for the audit.
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
    /// State for a caller that is limited to these nodes.
    pub(crate) fn new(scope: Scope) -> Self {
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

    /// Ends the call; false: it had been ended before.
    fn cut(&self, why: Denied) -> bool {
        let first = self.why.set(why).is_ok();
        self.cut.cancel();
        first
    }

    fn token(&self) -> CancellationToken {
        self.cut.clone()
    }

    fn why(&self) -> Denied {
        // A call is cut only after the reason is set, so the default is never seen.
        self.why.get().cloned().unwrap_or(Denied::Revoked)
    }

    fn is_recorded(&self) -> bool {
        self.recorded.load(Ordering::Relaxed) || self.record.get().is_some_and(|record| record.is_stored())
    }

    fn target(&self) -> String {
        self.target.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The reason why a call is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No certificate that the CA issued, or one that names no role.
    #[error("this call needs a client certificate that the controller's CA issued, or an API token")]
    Unauthenticated,
    /// An API token that is wrong, expired or revoked. The answer does not tell which.
    #[error("the API token is not valid: it is wrong, expired or revoked")]
    BadToken,
    /// A certificate that was revoked or has expired, or whose user or node is gone.
    #[error("this certificate was revoked or has expired")]
    Revoked,
    /// A quarantined node.
    #[error("the node is quarantined; an admin can approve it")]
    Quarantined,
    /// A node's key that is not in service, with its fingerprint.
    #[error("this key of the node waits for an admin's approval; its fingerprint is {0}")]
    KeyHeld(String),
    /// The role may not make this call.
    #[error("the role {role} may not call this method; those that may: {}", roles::names(allowed))]
    Forbidden {
        /// The caller's role.
        role: Role,
        /// Roles that may call the method.
        allowed: &'static [Role],
    },
    /// The store does not answer.
    #[error("the controller's database does not answer; try again")]
    Unavailable,
}

impl Caller {
    /// The caller behind a connection; `None`: no certificate, or one without a known role.
    pub fn from_peer(peer: &PeerInfo) -> Option<Self> {
        let certificate = peer.certificate.as_deref()?;
        let role: Role = certificate.role.parse().ok()?;
        let node = match role {
            Role::Node => Some(NodeId::parse(&certificate.common_name).ok()?),
            Role::Viewer | Role::Operator | Role::Publisher | Role::Admin | Role::Controller => None,
        };
        Some(Self {
            // In the audit's form, which no user can have as a name.
            name: node.as_ref().map_or_else(|| certificate.common_name.clone(), NodeId::name),
            role,
            node,
            from: peer.addr,
            serial: certificate.serial.clone(),
            api_token: None,
            pass: Arc::new(Pass::new(Scope::everything())),
        })
    }

    /// The nodes that the caller is limited to; an admin may change them during the call.
    pub fn scope(&self) -> Scope {
        self.pass.scope.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Resource name of the certificate or API token that was shown.
    pub fn credential(&self) -> String {
        self.api_token.as_ref().map_or_else(|| format!("certificates/{}", self.serial), ApiTokenId::name)
    }

    /// Notes the target of the call for the audit.
    pub fn note_target(&self, target: &str) {
        target.clone_into(&mut self.pass.target.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(record) = self.pass.record.get() {
            record.edit(|row| record::set_target(row, target));
        }
    }

    /// Sets the record that is stored together with the call's change.
    pub fn record_with_change(&self, record: Arc<Record>) {
        // One call has one record; the first one counts.
        let _ = self.pass.record.set(record);
    }

    /// The call's audit row; `None`: it was not stored with the call's change.
    pub fn recorded_with_change(&self) -> Option<AuditRow> {
        self.pass.record.get().filter(|record| record.is_stored()).map(|record| record.row())
    }

    /// Leaves the recording of the call to its handler.
    pub fn leave_recording(&self) {
        self.pass.recorded.store(true, Ordering::Relaxed);
    }
}

/// An address as people write it: a v4 address on a v6 socket is a v4 address.
pub fn shown(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// Checks if a caller may call a method, by its path (`/package.Service/Method`), and returns the caller. Methods not
/// listed are denied.
///
/// # Errors
/// Returns the reason.
pub fn authorize<'a>(method_path: &str, caller: Option<&'a Caller>) -> Result<&'a Caller, Denied> {
    let caller = caller.ok_or(Denied::Unauthenticated)?;
    let allowed = roles::allowed(method_path);
    if allowed.contains(&caller.role) { Ok(caller) } else { Err(Denied::Forbidden { role: caller.role, allowed }) }
}
