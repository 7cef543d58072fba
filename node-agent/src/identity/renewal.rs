//! How a node keeps its certificate fresh, and which of its keys it shows.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{CA_FILE, Identity, IdentityError, Pair, credentials, enroll, keys, read_needed, tls};
use crate::backoff;

/// Long waits are cut up: a suspended machine's monotonic clock may have stood still.
const LOOK_AGAIN: Duration = Duration::from_secs(60 * 60);
/// The longest pause between two tries.
const MAX_PAUSE: Duration = Duration::from_secs(60 * 60);
/// A certificate that was renewed just now is not renewed again because somebody refuses it: that clock is wrong.
const REST: Duration = Duration::from_secs(60);

/// Whether a renewal changes the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyPolicy {
    /// Another key each time.
    Rotate,
    /// The same one: for the installer, whose identity is a copy. The system that comes back when an installation is given
    /// up would show a key that is not in service any more.
    Keep,
}

impl Identity {
    /// When the certificate should be renewed, from now: at half its life at the latest, spread over a tenth of it. Two weeks
    /// before its end a controller warns of it.
    fn renewal_in(&self) -> Duration {
        let (from, to) = {
            let held = self.held();
            (held.present.not_before, held.present.not_after)
        };
        let life = to.saturating_sub(from);
        let due = from.saturating_add(life / 5 * 2);
        let wait = u64::try_from(due.saturating_sub(self.time().now_micros())).unwrap_or(0);
        let spread = u64::try_from(life / 10).unwrap_or(0);
        Duration::from_micros(wait).saturating_add(if wait == 0 {
            Duration::ZERO
        } else {
            backoff::full_jitter(Duration::from_micros(spread))
        })
    }

    /// Keeps the certificate fresh until `stop`: at half its life, and at once when a controller takes it for one that is not
    /// valid now, whatever the time is here. `listeners` tells the enrolment listeners, host:port, in order.
    pub async fn keep_fresh(&self, listeners: impl Fn() -> Vec<String>, policy: KeyPolicy, stop: &CancellationToken) {
        let mut tries: u32 = 0;
        let mut due = self.renewal_in();
        let mut not_before = Instant::now();
        loop {
            let slice = due.min(LOOK_AGAIN);
            let began = Instant::now();
            // Dropping a wait loses nothing: that a certificate was refused is kept until it is asked for.
            let refused = tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(slice) => false,
                () = self.out_of_date.notified() => true,
            };
            due = due.saturating_sub(began.elapsed());
            if refused {
                tracing::info!(node = self.node(), "a certificate is refused as not valid now, renewing ours");
                due = due.min(not_before.saturating_duration_since(Instant::now()));
            }
            if !due.is_zero() {
                // The controller may have told a later time since.
                due = due.min(self.renewal_in());
                continue;
            }
            match self.renew(&listeners(), policy).await {
                Ok(()) => {
                    tries = 0;
                    tracing::info!(node = self.node(), "certificate renewed");
                    due = self.renewal_in().max(Duration::from_secs(1));
                    not_before = Instant::now() + REST;
                }
                Err(error) => {
                    tries = tries.saturating_add(1);
                    let ceiling = Duration::from_secs(5).saturating_mul(1_u32.checked_shl(tries.min(16)).unwrap_or(1));
                    due = backoff::full_jitter(ceiling.min(MAX_PAUSE)).max(Duration::from_secs(1));
                    not_before = Instant::now() + due;
                    tracing::warn!(node = self.node(), error = %error, "certificate not renewed");
                }
            }
        }
    }

    /// Renews the certificate at the first listener that answers.
    pub async fn renew(&self, listeners: &[String], policy: KeyPolicy) -> Result<(), IdentityError> {
        let pair = self.held().present.pair.clone();
        let ca = read_needed(&self.directory.join(CA_FILE))?;
        // There is one place for a key that has not been used yet.
        let rotates = policy == KeyPolicy::Rotate && !pair.is_next;
        let key = if rotates { keys::next_key(&self.directory)? } else { pair.key.clone() };
        let certificate = enroll::renew(listeners, &pair, &key, &ca, self.time()).await?;
        // It must be for this key, from the same CA and for the same node before it is kept.
        let fresh = Pair { key, certificate: certificate.clone(), is_next: rotates || pair.is_next };
        let fresh = credentials(&self.directory, fresh, self.time())?;
        let node = tls::common_name(&fresh.leaf)?;
        if node != self.node() {
            return Err(IdentityError::invalid("the new certificate", format!("it is for the node {node}")));
        }
        if rotates {
            keys::keep_next(&self.directory, &certificate)?;
        } else {
            keys::keep_renewed(&self.directory, &pair, &certificate)?;
        }
        // The CA signed it just now. A time outside of what it says is wrong, and would be refused at every controller.
        if !(fresh.not_before..=fresh.not_after).contains(&self.time().now_micros()) {
            self.time().set(fresh.not_before);
        }
        let mut held = self.held_mut();
        let before = std::mem::replace(&mut held.present, fresh);
        if rotates {
            held.other = Some(before);
        }
        Ok(())
    }

    /// A controller took the certificate: the key before is not needed any more.
    pub fn accepted(&self) {
        let mut held = self.held_mut();
        if !held.present.pair.is_next {
            return;
        }
        match keys::promote(&self.directory) {
            Ok(()) => {
                held.present.pair.is_next = false;
                held.other = None;
            }
            // It is tried again when the next session is opened.
            Err(error) => tracing::warn!(error = %error, "next key not put in place of the one before"),
        }
    }

    /// A controller does not know the certificate: one that lost its last commits knows the one before.
    pub fn not_known(&self) {
        let mut held = self.held_mut();
        if let Some(other) = held.other.take() {
            let before = std::mem::replace(&mut held.present, other);
            tracing::warn!(
                node = self.node(),
                shows_next = held.present.pair.is_next,
                "certificate not known, showing the other"
            );
            held.other = Some(before);
        }
    }
}
