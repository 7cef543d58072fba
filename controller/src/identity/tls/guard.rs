//! Connections of a listener, and the guard that limits them and looks certificates up.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::PeerInfo;
use super::places::{Place, Places};
use crate::identity::roles::Role;

/// Deadline for looking a certificate up at the end of the handshake. Without an answer the first call decides.
const LOOK: Duration = Duration::from_secs(1);

/// A connection, with or without a known peer.
#[derive(Debug)]
pub struct Connection {
    accepted: Instant,
    had_a_session: AtomicBool,
    pub(super) place: Place,
}

impl Default for Connection {
    /// A connection that was accepted now and that no listener counts.
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

    /// Notes a session on the connection; true: it had one before.
    pub(super) fn begin_session(&self) -> bool {
        self.had_a_session.swap(true, Ordering::Relaxed)
    }

    /// Notes that a credential was accepted: the connection leaves the strangers and counts for this caller.
    pub fn accept(&self, role: Role, name: &str) {
        self.place.accept(role, name);
    }

    /// True if a credential was accepted.
    pub fn is_accepted(&self) -> bool {
        self.place.is_accepted()
    }

    /// Closes the connection after its credential was refused, as soon as the answer has had time to leave.
    pub fn refuse(&self) {
        self.place.refuse();
    }
}

/// Looks a peer's certificate up, and accepts it on its connection if it is valid and in service.
pub type Look = Arc<dyn Fn(PeerInfo) -> BoxFuture<'static, ()> + Send + Sync>;

/// Guards the connections of a listener.
#[derive(Clone)]
pub(super) struct Guard {
    pub(super) places: Arc<Places>,
    /// Looks certificates up; `None`: peers show a credential only in calls.
    pub(super) look: Option<Look>,
}

impl Guard {
    pub(super) async fn look_at(&self, peer: &PeerInfo) {
        if let (Some(look), true) = (&self.look, peer.certificate.is_some()) {
            // If it takes too long, the connection stays a stranger's, and its first call decides.
            let _ = tokio::time::timeout(LOOK, look(peer.clone())).await;
        }
    }
}
