//! Credentials that expire soon. Each is reported once.

use chrono::{DateTime, TimeDelta, Utc};

use super::sql::sql;
use super::{Store, StoreError};
use crate::calendar::later;

/// Time before its expiry at which a credential is reported.
const WARNED_BEFORE: TimeDelta = TimeDelta::days(14);

/// A credential with a shorter life ends as intended, so it is not reported. A certificate is backdated by a day.
const LONG_LIVED: TimeDelta = TimeDelta::days(16);

/// Something that expires within 14 days.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expiring {
    /// Owner of the credential: `nodes/ID`, `users/ID` or `apiTokens/ID`.
    pub owner: String,
    /// The credential: `certificates/SERIAL` or `apiTokens/ID`.
    pub credential: String,
    /// End of validity.
    pub expire_time: DateTime<Utc>,
}

impl Store {
    /// Credentials that expire within 14 days, were not reported before, and were not replaced by a later one of the
    /// same owner. From now on they count as reported, for every controller.
    pub async fn newly_expiring(&self, now: DateTime<Utc>) -> Result<Vec<Expiring>, StoreError> {
        self.again(|| self.newly_expiring_once(now)).await
    }

    async fn newly_expiring_once(&self, now: DateTime<Utc>) -> Result<Vec<Expiring>, StoreError> {
        let soon = later(now, WARNED_BEFORE);
        let tx = self.begin().await?;
        let mut found = Vec::new();
        // A node's key that is not in service harms nobody by expiring. A user has as many certificates as devices, so
        // each of them counts.
        let certificates =
            sql("UPDATE certificates SET warn_time = ? WHERE warn_time IS NULL AND revoke_time IS NULL \
             AND not_after > ? AND not_after <= ? AND ( \
                 (node IS NOT NULL AND EXISTS (SELECT 1 FROM nodes n WHERE n.id = certificates.node \
                     AND n.key_sha256 = certificates.key_sha256) AND NOT EXISTS (SELECT 1 FROM certificates o \
                     WHERE o.node = certificates.node AND o.revoke_time IS NULL AND o.not_after > ?)) \
                 OR (node IS NULL AND role <> 'controller' AND not_after - not_before > ?)) \
             RETURNING serial, node, subject, not_after")
            .time(now)
            .time(now)
            .time(soon)
            .time(soon)
            .bind(LONG_LIVED.num_microseconds().unwrap_or(i64::MAX))
            .all(&*tx)
            .await?;
        for row in &certificates {
            let kind = if row.maybe_text("node")?.is_some() { "nodes" } else { "users" };
            found.push(Expiring {
                owner: format!("{kind}/{}", row.text("subject")?),
                credential: format!("certificates/{}", row.text("serial")?),
                expire_time: row.time("not_after")?,
            });
        }
        let tokens = sql("UPDATE api_tokens SET warn_time = ? WHERE warn_time IS NULL AND revoke_time IS NULL \
             AND expire_time > ? AND expire_time <= ? AND expire_time - create_time > ? \
             RETURNING id, expire_time")
        .time(now)
        .time(now)
        .time(soon)
        .bind(LONG_LIVED.num_microseconds().unwrap_or(i64::MAX))
        .all(&*tx)
        .await?;
        for row in &tokens {
            let name = format!("apiTokens/{}", row.text("id")?);
            found.push(Expiring { owner: name.clone(), credential: name, expire_time: row.time("expire_time")? });
        }
        self.commit(tx).await?;
        Ok(found)
    }
}
