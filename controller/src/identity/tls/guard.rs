//! Connections, and who watches over those of a listener.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::PeerInfo;
use super::places::{Place, Places};
use crate::identity::roles::Role;

/// Deadline for looking a certificate up while the handshake ends. Without an answer the first call decides.
const LOOK: Duration = Duration::from_secs(1);

/// A connection, whoever is at its other end.
#[derive(Debug)]
pub struct Connection {
    accepted: Instant,
    had_a_session: AtomicBool,
    pub(super) place: Place,
}

impl Default for Connection {
    /// One that is accepted now, and that no listener counts.
    fn default() -> Self {
        Self::new(Instant::now(), Place::detached())
    }
}

impl Connection {
    pub(super) fn new(accepted: Instant, place: Place) -> Self {
        Self { accepted, had_a_session: AtomicBool::new(false), place }
    }

    pub(super) fn accepted(&self) -> Instant {
        self.accepted
    }

    /// Notes a session on it; true: it had one before.
    pub(super) fn begin_session(&self) -> bool {
        self.had_a_session.swap(true, Ordering::Relaxed)
    }

    /// Notes that a credential was accepted on it: it is no stranger's any more, and counts for this caller.
    pub fn accept(&self, role: Role, name: &str) {
        self.place.accept(role, name);
    }

    /// Whether a credential was accepted on it.
    pub fn is_accepted(&self) -> bool {
        self.place.is_accepted()
    }

    /// Closes it as soon as the answer has had time to leave: its credential was refused.
    pub fn refuse(&self) {
        self.place.refuse();
    }
}

/// Looks the certificate of a peer up, and accepts it on its connection if nothing is against it.
pub type Look = Arc<dyn Fn(PeerInfo) -> BoxFuture<'static, ()> + Send + Sync>;

/// Watches over the connections of a listener.
#[derive(Clone)]
pub(super) struct Guard {
    pub(super) places: Arc<Places>,
    /// `None`: only calls show a credential.
    pub(super) look: Option<Look>,
}

impl Guard {
    pub(super) async fn look_at(&self, peer: &PeerInfo) {
        if let (Some(look), true) = (&self.look, peer.certificate.is_some()) {
            // Dropped late, the connection stays a stranger's, and its first call is looked at.
            let _ = tokio::time::timeout(LOOK, look(peer.clone())).await;
        }
    }
}
