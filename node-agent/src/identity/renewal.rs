//! Renewals of the node's certificate, and the choice of the key to show.

use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::pace::Pace;
use super::{CA_FILE, Credentials, Identity, IdentityError, Pair, credentials, enroll, keys, read_needed, tls};

/// Longest single wait. A suspended machine's monotonic clock may have stopped, and a controller may have told another
/// time meanwhile.
const LOOK_AGAIN: Duration = Duration::from_secs(60 * 60);

/// Treatment of the key in a renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyPolicy {
    /// A new key each time.
    Rotate,
    /// The same key: for the installer, whose identity is a copy. Otherwise the system that comes back after a failed
    /// installation would show a key that is out of service.
    Keep,
}

impl Credentials {
    /// Time of the renewal, microseconds since 1970: between 40 % and 50 % of the certificate's life. The controller
    /// warns two weeks before its end. The offset is derived from the certificate, so that it is the same on every call
    /// and spreads a fleet.
    fn due(&self) -> i64 {
        let life = self.not_after.saturating_sub(self.not_before).max(0);
        let [first, second, ..] = <[u8; 32]>::from(Sha256::digest(&self.leaf));
        let spread = life / 10 / 65_536 * i64::from(u16::from_be_bytes([first, second]));
        self.not_before.saturating_add(life / 5 * 2).saturating_add(spread)
    }
}

impl Identity {
    /// Time until the certificate is due for renewal. One that is not valid yet is due at once: it was issued by a
    /// wrong clock.
    pub(super) fn renewal_in(&self) -> Duration {
        let now = self.time().now_micros();
        let held = self.held();
        if now < held.present.not_before {
            return Duration::ZERO;
        }
        Duration::from_micros(u64::try_from(held.present.due().saturating_sub(now)).unwrap_or(0))
    }

    /// True if a controller refused the present certificate as not valid now.
    pub(super) fn is_refused(&self) -> bool {
        self.refusals.concern(&self.held().present.leaf)
    }

    /// Keeps the certificate fresh until `stop`: at half its life, and at once when a controller refuses it as not
    /// valid now, whatever the time is here. `listeners` returns the enrolment listeners, host:port, in order.
    pub async fn keep_fresh(&self, listeners: impl Fn() -> Vec<String>, policy: KeyPolicy, stop: &CancellationToken) {
        let mut pace = Pace::default();
        loop {
            // Decided again after each wait: time and certificate may have changed.
            let (refused, now) = (self.is_refused(), Instant::now());
            let wait = if refused { pace.refused(now) } else { self.renewal_in().max(pace.scheduled(now)) };
            if !wait.is_zero() {
                // Cancel-safe: a refusal is kept until it is answered.
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(wait.min(LOOK_AGAIN)) => {}
                    () = self.refusals.next() => {}
                }
                continue;
            }
            if refused {
                tracing::info!(node = self.node(), "a certificate is refused as not valid now, renewing ours");
            }
            match self.renew(&listeners(), policy).await {
                Ok(()) => {
                    pace.succeed(Instant::now());
                    tracing::info!(node = self.node(), "certificate renewed");
                }
                Err(error) => {
                    pace.fail(Instant::now());
                    tracing::warn!(node = self.node(), error = %error, "certificate not renewed");
                }
            }
        }
    }

    /// Renews the certificate at the first listener that answers.
    pub async fn renew(&self, listeners: &[String], policy: KeyPolicy) -> Result<(), IdentityError> {
        let pair = self.held().present.pair.clone();
        let ca = read_needed(&self.directory.join(CA_FILE))?;
        // There is room for one unused key only.
        let rotates = policy == KeyPolicy::Rotate && !pair.is_next;
        let key = if rotates { keys::next_key(&self.directory)? } else { pair.key.clone() };
        let certificate = enroll::renew(listeners, &pair, &key, &ca, self.time()).await?;
        // Before it is stored, it must be for this key, of the same CA and for the same node.
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
        // The CA signed it just now, so its life has only begun. A time before that, or after half of it, is wrong: by
        // that time the new certificate would be useless or due again. Its beginning is slightly early, until a session
        // tells the time.
        if !(fresh.not_before..fresh.due()).contains(&self.time().now_micros()) {
            self.believe(fresh.not_before);
        }
        let mut held = self.held_mut();
        let before = std::mem::replace(&mut held.present, fresh);
        if rotates {
            held.other = Some(before);
        }
        Ok(())
    }

    /// A controller accepted the certificate. The previous key is not needed, and an older refusal needs no answer.
    pub fn accepted(&self) {
        self.refusals.clear();
        let mut held = self.held_mut();
        if !held.present.pair.is_next {
            return;
        }
        match keys::promote(&self.directory) {
            Ok(()) => {
                held.present.pair.is_next = false;
                held.other = None;
            }
            // The next session tries it again.
            Err(error) => tracing::warn!(error = %error, "next key not put in place of the one before"),
        }
    }

    /// A controller does not know the certificate. If it lost its last commits, it knows the one before.
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
