//! Warnings about credentials that expire within 14 days, in the log and in the audit. Each credential is warned of
//! once, by the controller that finds it first.

use std::sync::Mutex;
use std::sync::PoisonError;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};

use super::ca::Ca;
use super::record::{OK, Recorder};
use crate::store::{AuditRow, Store, StoreError};

/// Time before the end of the CA's certificate from which it is warned of.
const WARNED_BEFORE: TimeDelta = TimeDelta::days(14);
/// Interval of that warning. It is repeated, because every node and user depends on the CA.
const CA_EVERY: TimeDelta = TimeDelta::days(1);
/// Method of these rows in the audit.
pub const EXPIRES: &str = "EXPIRES";

/// Warns of credentials that expire soon.
#[derive(Debug, Default)]
pub struct Warnings {
    of_ca: Mutex<Option<DateTime<Utc>>>,
}

impl Warnings {
    /// Checks, and warns of new ones.
    ///
    /// # Errors
    /// Returns the store's error.
    pub async fn look(
        &self,
        store: &Store,
        recorder: &Recorder,
        ca: &Ca,
        now: DateTime<Utc>,
    ) -> Result<(), StoreError> {
        if let Some(end) =
            ca.expire_time().filter(|end| end.signed_duration_since(now) <= WARNED_BEFORE && self.ca_is_due(now))
        {
            let why = format!("the CA's certificate expires at {}", text(end));
            tracing::warn!(expires = text(end), "the CA's certificate expires; every certificate ends with it");
            recorder.record(row(now, String::new(), "ca".to_owned(), why), None).await;
        }
        // The store marks each one, so that a single controller warns of it.
        for found in store.newly_expiring(now).await? {
            let expires = text(found.expire_time);
            tracing::warn!(owner = found.owner, credential = found.credential, expires, "a credential expires");
            // Nodes renew by themselves half-way, so this one has a problem; people must act.
            let what = if found.owner.starts_with("nodes/") {
                "the node has not renewed its certificate: it is off, or cannot reach the enrolment port"
            } else {
                "make another one in time"
            };
            let why = format!("expires at {expires}; {what}");
            recorder.record(row(now, found.credential, found.owner, why), None).await;
        }
        Ok(())
    }

    fn ca_is_due(&self, now: DateTime<Utc>) -> bool {
        // Kept in memory only: a restart may repeat the warning, and each controller gives its own.
        let mut last = self.of_ca.lock().unwrap_or_else(PoisonError::into_inner);
        // `now < last`: the clock was ahead at the last warning.
        let due = last.is_none_or(|last| now.signed_duration_since(last) >= CA_EVERY || now < last);
        if due {
            *last = Some(now);
        }
        due
    }
}

fn text(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

fn row(time: DateTime<Utc>, credential: String, target: String, message: String) -> AuditRow {
    AuditRow {
        time,
        actor: "controller".to_owned(),
        credential,
        from: String::new(),
        method: EXPIRES.to_owned(),
        target,
        result: OK.to_owned(),
        message,
    }
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};

    use super::{EXPIRES, Warnings};
    use crate::identity::ca::Pki;
    use crate::identity::record::Recorder;
    use crate::store::{AuditQuery, CertificateRow, Store};

    #[tokio::test]
    async fn expiry_is_recorded_once_and_that_of_the_ca_each_day() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&format!("sqlite://{}/marco.db", dir.path().display())).await.unwrap();
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        let pki =
            Pki::open(&dir.path().join("data"), &dir.path().join("certs"), &[], now, DateTime::UNIX_EPOCH).unwrap();
        let certificate = CertificateRow {
            serial: "0a".to_owned(),
            node: None,
            subject: "kim".to_owned(),
            role: "viewer".to_owned(),
            key_sha256: "ab".to_owned(),
            not_before: now,
            not_after: now + TimeDelta::days(30),
            generation: 0,
            pem: String::new(),
            given_for: String::new(),
        };
        store.insert_certificate(&certificate).await.unwrap();
        let (warnings, recorder) = (Warnings::default(), Recorder::new(store.clone()));
        let told = async |days: i64| {
            warnings.look(&store, &recorder, &pki.ca, now + TimeDelta::days(days)).await.unwrap();
            let query = AuditQuery { limit: 10, method: EXPIRES.to_owned(), ..AuditQuery::default() };
            store.audit(&query).await.unwrap().into_iter().map(|(_, row)| row.target).collect::<Vec<_>>()
        };
        assert!(told(15).await.is_empty());
        assert_eq!(told(17).await, ["users/kim"]);
        assert_eq!(told(18).await, ["users/kim"], "once");
        let end = pki.ca.expire_time().unwrap().signed_duration_since(now).num_days();
        assert_eq!(told(end - 5).await, ["ca", "users/kim"]);
        assert_eq!(told(end - 4).await, ["ca", "ca", "users/kim"], "every node hangs on it");
    }
}
