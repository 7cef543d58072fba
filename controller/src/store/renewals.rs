//! Renewals of nodes' certificates, and removal of old ones.

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::names::NodeId;

use super::connection::Connection;
use super::keys::{self, CAME_BACK, KeyState, Shown};
use super::sql::sql;
use super::{CertificateRow, Store, StoreError, audit, certificates};
use crate::calendar::{earlier, later};
use crate::operation::NodeState;

/// Shortest time between two renewals of a node. A node asks every 15 days; one that asked all the time would fill the
/// disk.
const RENEWED_EVERY: TimeDelta = TimeDelta::hours(1);
/// How far in the future a renewal may lie and still count: the clocks of controllers differ, and a request is dated before it
/// waits for the node's row, so of two at once the later one may be stored first.
const AHEAD: TimeDelta = TimeDelta::minutes(1);
/// Least remaining validity of a certificate that is sent again as the answer to the same request.
const WORTH_REPEATING: TimeDelta = TimeDelta::days(16);
/// Number of a node's certificates that are kept, newest first: those of two and a half years.
const KEPT: i64 = 64;
/// Time from its expiry after which a certificate is deleted. After 400 days it cannot be renewed any more.
const FORGOTTEN_AFTER: TimeDelta = TimeDelta::days(401);

/// Request for a certificate in place of one whose key the node has proved to hold.
#[derive(Debug, Clone)]
pub struct Renewal {
    /// The node that asks.
    pub node: NodeId,
    /// Serial number of the certificate that it shows.
    pub serial: String,
    /// SHA-256 of the SubjectPublicKeyInfo of that certificate's key, lower-case hexadecimal.
    pub key_sha256: String,
    /// SHA-256 of the SubjectPublicKeyInfo of the key to certify: another one, or the same.
    pub new_key_sha256: String,
    /// Address that it asks from.
    pub origin: String,
}

/// Result of a renewal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RenewOutcome {
    /// A new certificate is stored.
    Renewed,
    /// The same request was answered before, with this certificate (PEM).
    Again(String),
    /// The certificate or its key was revoked, or the node was deleted.
    Revoked,
    /// The node is quarantined.
    Quarantined,
    /// The key waits for approval.
    Held {
        /// True if it waits only since this request.
        just_now: bool,
    },
    /// The node was renewed less than an hour ago.
    TooSoon {
        /// Earliest time of the next renewal.
        again: DateTime<Utc>,
    },
    /// `issue` returned no certificate. Nothing is stored.
    NotIssued,
}

impl Store {
    /// Renews a node's certificate. `issue` makes it, given the node's generation of keys.
    pub async fn renew_certificate(
        &self,
        wish: &Renewal,
        now: DateTime<Utc>,
        issue: impl Fn(i64) -> Option<CertificateRow> + Send + Sync,
    ) -> Result<RenewOutcome, StoreError> {
        self.again(|| self.renew_certificate_once(wish, now, &issue)).await
    }

    async fn renew_certificate_once(
        &self,
        wish: &Renewal,
        now: DateTime<Utc>,
        issue: &(impl Fn(i64) -> Option<CertificateRow> + Send + Sync),
    ) -> Result<RenewOutcome, StoreError> {
        let tx = self.begin().await?;
        // The node is locked first, as in every transaction. An approval or a deletion holds it and then revokes.
        let row = sql("SELECT state, generation, renew_time FROM nodes WHERE id = ? {lock}")
            .bind(wish.node.as_str())
            .one(&*tx)
            .await?;
        let Some(row) = row else { return Ok(RenewOutcome::Revoked) };
        let known = certificates::find(&*tx, &wish.serial).await?;
        if !known.is_some_and(|known| !known.revoked() && known.certificate.node.as_ref() == Some(&wish.node)) {
            return Ok(RenewOutcome::Revoked);
        }
        if row.word("state", NodeState::parse)? == NodeState::Quarantined {
            return Ok(RenewOutcome::Quarantined);
        }
        let standing = keys::state(&*tx, &wish.node, &wish.key_sha256).await?.unwrap_or(KeyState::Revoked);
        match standing {
            KeyState::InService | KeyState::Next => {}
            KeyState::Pending => return Ok(RenewOutcome::Held { just_now: false }),
            KeyState::Revoked => return Ok(RenewOutcome::Revoked),
            KeyState::Previous => {
                let shown = Shown { serial: "", origin: &wish.origin, reason: CAME_BACK };
                let held = keys::hold(&*tx, &wish.node, &wish.key_sha256, shown, now).await?;
                // The refusal is stored: from now on the key waits for an operator.
                if held {
                    audit::note("HOLD_KEY", &format!("an earlier key of it turned up: {}", wish.key_sha256));
                    self.commit(tx).await?;
                }
                return Ok(RenewOutcome::Held { just_now: held });
            }
        }
        // Checked before the rate limit: an agent whose answer was lost asks for the same again at once.
        let given_for = format!("certificates/{}", wish.serial);
        if let Some(pem) = answer(&*tx, &wish.node, &given_for, &wish.new_key_sha256, now).await? {
            return Ok(RenewOutcome::Again(pem));
        }
        // A renewal far in the future was made by a wrong clock. Its certificate is not valid yet, so it must not delay
        // this one.
        let last = row.maybe_time("renew_time")?.filter(|last| *last <= later(now, AHEAD));
        if let Some(again) = last.map(|last| later(last, RENEWED_EVERY)).filter(|again| *again > now) {
            return Ok(RenewOutcome::TooSoon { again });
        }
        let new_key = wish.new_key_sha256.as_str();
        // A renewal must not take the key of another node, nor bring back a revoked one.
        if new_key != wish.key_sha256 {
            match keys::owner(&*tx, new_key).await? {
                Some((owner, _)) if owner != wish.node => return Ok(RenewOutcome::Revoked),
                Some((_, KeyState::Revoked)) => return Ok(RenewOutcome::Revoked),
                _ => {}
            }
        }
        // `issue` runs again if the transaction is retried.
        let Some(certificate) = issue(row.int("generation")?) else { return Ok(RenewOutcome::NotIssued) };
        certificates::insert(&*tx, &CertificateRow { given_for, ..certificate }).await?;
        if standing == KeyState::Next {
            // The node has just proved that it holds this key.
            keys::put_in_service(&*tx, &wish.node, &wish.key_sha256, now).await?;
        }
        if keys::state(&*tx, &wish.node, new_key).await? != Some(KeyState::InService) {
            keys::retire_next(&*tx, &wish.node).await?;
            let shown = Shown { serial: "", origin: &wish.origin, reason: "" };
            keys::note(&*tx, &wish.node, new_key, KeyState::Next, shown, now).await?;
        }
        sql("UPDATE nodes SET renew_time = ? WHERE id = ?").time(now).bind(wish.node.as_str()).run(&*tx).await?;
        keep_newest(&*tx, &wish.node).await?;
        self.commit(tx).await?;
        Ok(RenewOutcome::Renewed)
    }

    /// Deletes certificates that expired too long ago to be renewed. Returns how many.
    pub async fn prune_certificates(&self, now: DateTime<Utc>) -> Result<u64, StoreError> {
        self.again(|| self.prune_certificates_once(now)).await
    }

    async fn prune_certificates_once(&self, now: DateTime<Utc>) -> Result<u64, StoreError> {
        let tx = self.begin().await?;
        let gone =
            sql("DELETE FROM certificates WHERE not_after < ?").time(earlier(now, FORGOTTEN_AFTER)).run(&*tx).await?;
        self.commit(tx).await?;
        Ok(gone)
    }
}

/// The certificate (PEM) with which the same request was answered before, if it stays valid for long enough.
pub(super) async fn answer(
    tx: &impl Connection,
    node: &NodeId,
    given_for: &str,
    key: &str,
    now: DateTime<Utc>,
) -> Result<Option<String>, StoreError> {
    let row = sql("SELECT pem FROM certificates WHERE node = ? AND given_for = ? AND key_sha256 = ? AND pem <> '' \
             AND revoke_time IS NULL AND not_before <= ? AND not_after > ? ORDER BY not_after DESC LIMIT 1")
    .bind(node.as_str())
    .bind(given_for)
    .bind(key)
    .time(now)
    .time(later(now, WORTH_REPEATING))
    .one(tx)
    .await?;
    row.map(|row| row.text("pem")).transpose()
}

/// Deletes the oldest certificates of a node. A deleted one is refused if it is shown again.
pub(super) async fn keep_newest(tx: &impl Connection, node: &NodeId) -> Result<(), StoreError> {
    sql("DELETE FROM certificates WHERE node = ? AND serial NOT IN \
         (SELECT serial FROM certificates WHERE node = ? ORDER BY not_after DESC, serial LIMIT ?)")
    .bind(node.as_str())
    .bind(node.as_str())
    .bind(KEPT)
    .run(tx)
    .await?;
    Ok(())
}
