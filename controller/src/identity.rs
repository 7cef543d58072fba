//! Who calls, and what they may do.

pub mod ca;
pub mod gate;
pub mod roles;
pub mod tls;
pub mod tokens;

use std::net::SocketAddr;

use marco_proto::names::NodeId;

use roles::Role;
use tls::PeerInfo;

use crate::store::{Store, StoreError};

/// Who makes a call, as its certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The certificate's common name: a user, or a node's id.
    pub name: String,
    /// The certificate's organizational unit.
    pub role: Role,
    /// The node, when the role is [`Role::Node`].
    pub node: Option<NodeId>,
    /// Where the call comes from.
    pub from: SocketAddr,
    /// The certificate's serial number, lower-case hexadecimal.
    pub serial: String,
}

/// Why a call may not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No certificate that the CA issued, or one that names no role.
    #[error("this call needs a client certificate that the controller's CA issued")]
    Unauthenticated,
    /// The role may not make this call.
    #[error("the role {role} may not call this method; those that may: {}", roles::names(allowed))]
    Forbidden {
        /// The caller's.
        role: Role,
        /// Those that may.
        allowed: &'static [Role],
    },
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
        let name = certificate.common_name.clone();
        Some(Self { name, role, node, from: peer.addr, serial: certificate.serial.clone() })
    }
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

/// Whether a caller may read from the file mirror, by its role. Answers the caller.
///
/// # Errors
/// Why not.
pub fn authorize_mirror(caller: Option<&Caller>) -> Result<&Caller, Denied> {
    let caller = caller.ok_or(Denied::Unauthenticated)?;
    let allowed = roles::MIRROR;
    if allowed.contains(&caller.role) { Ok(caller) } else { Err(Denied::Forbidden { role: caller.role, allowed }) }
}

/// What the store says of a caller's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Nothing against it.
    Open,
    /// It was revoked, or its node is quarantined or gone.
    Barred,
}

/// Looks a caller's certificate up. Those of nodes are all recorded; those of people only when they were revoked.
///
/// # Errors
/// The store's.
pub async fn inspect(store: &Store, caller: &Caller) -> Result<Admission, StoreError> {
    let barred = match &caller.node {
        Some(_) => !store.unacceptable(std::slice::from_ref(&caller.serial)).await?.is_empty(),
        None => store.certificate(&caller.serial).await?.is_some_and(|known| known.revoked()),
    };
    Ok(if barred { Admission::Barred } else { Admission::Open })
}
