//! Issued certificates.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::connection::Connection;
use super::keys::{self, KeyState};
use super::sql::{Row, sql};
use super::{Scope, Store, StoreError, nodes};
use crate::operation::NodeState;

/// A certificate to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateRow {
    /// Serial number, lower-case hexadecimal.
    pub serial: String,
    /// The node that it names. `None` for a user or a controller.
    pub node: Option<NodeId>,
    /// Common name.
    pub subject: String,
    /// `node`, `viewer`, `operator`, `publisher`, `admin` or `controller`.
    pub role: String,
    /// SHA-256 of its SubjectPublicKeyInfo, lower-case hexadecimal.
    pub key_sha256: String,
    /// Begin of validity.
    pub not_before: DateTime<Utc>,
    /// End of validity.
    pub not_after: DateTime<Utc>,
    /// Generation of the node's keys; 0 without a node.
    pub generation: i64,
    /// The certificate as PEM if the same request may be answered again, else empty.
    pub pem: String,
    /// The request that it answered: `certificates/SERIAL` or `joinTokens/ID`; empty if not stored.
    pub given_for: String,
}

/// A stored certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCertificate {
    /// The certificate.
    pub certificate: CertificateRow,
    /// Time of revocation, if it was revoked.
    pub revoke_time: Option<DateTime<Utc>>,
}

impl StoredCertificate {
    /// True if it was revoked.
    pub fn revoked(&self) -> bool {
        self.revoke_time.is_some()
    }
}

/// Filter for a list of certificates. An empty field does not restrict.
#[derive(Debug, Clone, Default)]
pub struct CertificateQuery {
    /// Only certificates after this serial number in the list, for the next page.
    pub after: Option<String>,
    /// Largest number of rows.
    pub limit: u32,
    /// Only certificates of this user or node.
    pub subject: String,
    /// Only certificates that are neither revoked nor expired at this time.
    pub valid_at: Option<DateTime<Utc>>,
}

/// Present rights of a certificate's owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Serial number of the certificate.
    pub serial: String,
    /// End of validity.
    pub not_after: DateTime<Utc>,
    /// The certificate or its user was revoked, or its node was deleted.
    pub revoked: bool,
    /// Its node is quarantined.
    pub quarantined: bool,
    /// Its key is not in service at its node. An operator has to approve it first.
    pub held: bool,
    /// An operator approved another key in place of this one.
    pub replaced: bool,
    /// Present role of the user. `None` if it is not a user's.
    pub role: Option<String>,
    /// Nodes that the user is limited to.
    pub scope: Scope,
}

impl Store {
    /// Stores a certificate that was not issued by `enrol`.
    pub async fn insert_certificate(&self, row: &CertificateRow) -> Result<(), StoreError> {
        self.again(|| self.insert_certificate_once(row)).await
    }

    async fn insert_certificate_once(&self, row: &CertificateRow) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        insert(&*tx, row).await?;
        self.commit(tx).await
    }

    /// Reads the certificate with this serial number.
    pub async fn certificate(&self, serial: &str) -> Result<Option<StoredCertificate>, StoreError> {
        find(self.reader(), serial).await
    }

    /// Certificates, newest first.
    pub async fn certificates(&self, query: &CertificateQuery) -> Result<Vec<StoredCertificate>, StoreError> {
        let after = query.after.as_deref();
        // The place of `after` is looked up by its serial number, so a page token needs no more than that.
        sql("SELECT * FROM certificates WHERE (? OR (not_before, serial) < \
                 (SELECT not_before, serial FROM certificates WHERE serial = ?)) \
             AND (? OR subject = ?) AND (? OR (revoke_time IS NULL AND not_after > ?)) \
             ORDER BY not_before DESC, serial DESC LIMIT ?")
        .bind(after.is_none())
        .bind(after.unwrap_or_default())
        .bind(query.subject.is_empty())
        .bind(query.subject.as_str())
        .bind(query.valid_at.is_none())
        .bind(query.valid_at.map_or(0, super::micros))
        .bind(i64::from(query.limit))
        .all(self.reader())
        .await?
        .iter()
        .map(read)
        .collect()
    }

    /// Revokes a certificate, and for a node the key that it certifies. Returns `None` if there is no such certificate.
    pub async fn revoke_certificate(
        &self,
        serial: &str,
        now: DateTime<Utc>,
    ) -> Result<Option<StoredCertificate>, StoreError> {
        self.again(|| self.revoke_certificate_once(serial, now)).await
    }

    async fn revoke_certificate_once(
        &self,
        serial: &str,
        now: DateTime<Utc>,
    ) -> Result<Option<StoredCertificate>, StoreError> {
        let tx = self.begin().await?;
        let Some(found) = find(&*tx, serial).await? else { return Ok(None) };
        // The node is locked before the certificate, as by renewals, approvals and deletions.
        if let Some(node) = &found.certificate.node
            && sql("SELECT id FROM nodes WHERE id = ? {lock}").bind(node.as_str()).one(&*tx).await?.is_some()
        {
            // Otherwise another certificate of the same key could renew it.
            keys::shut_out(&*tx, node, &found.certificate.key_sha256, now).await?;
        }
        sql("UPDATE certificates SET revoke_time = COALESCE(revoke_time, ?) WHERE serial = ?")
            .time(now)
            .bind(serial)
            .run(&*tx)
            .await?;
        let row = find(&*tx, serial).await?;
        self.commit_if(row.is_some(), tx).await?;
        Ok(row)
    }

    /// Present rights of the owners of these certificates. Certificates that are not stored are left out.
    pub async fn standings(&self, serials: &[String]) -> Result<Vec<Standing>, StoreError> {
        // Role and scope come from the user's row, not from the certificate, so that a change takes effect at once.
        sql(
            "SELECT c.serial AS serial, c.not_after AS not_after, c.revoke_time AS revoke_time, n.state AS node_state, \
                 c.node AS node, n.id AS present, u.role AS role, u.selector AS selector, u.revoke_time AS shut_out, \
                 n.key_sha256 AS node_key, c.key_sha256 AS key_sha256, k.state AS key_state, \
                 n.generation AS node_generation, c.generation AS generation \
             FROM certificates c LEFT JOIN nodes n ON n.id = c.node \
             LEFT JOIN node_keys k ON k.node = c.node AND k.key_sha256 = c.key_sha256 \
             LEFT JOIN users u ON u.id = c.subject AND c.node IS NULL WHERE c.serial IN {each}",
        )
        .each(serials)
        .all(self.reader())
        .await?
        .iter()
        .map(|row| {
            // A key from a renewal serves before it is in service: its first session puts it there.
            let serves = row.maybe_text("node_key")?.as_deref() == Some(row.text("key_sha256")?.as_str())
                || row.maybe_text("key_state")?.as_deref() == Some(KeyState::Next.as_str());
            let is_nodes = row.maybe_text("node")?.is_some();
            Ok(Standing {
                held: is_nodes && !serves,
                replaced: row
                    .maybe_int("node_generation")?
                    .is_some_and(|now| row.int("generation").is_ok_and(|of| of < now)),
                serial: row.text("serial")?,
                not_after: row.time("not_after")?,
                revoked: row.maybe_time("revoke_time")?.is_some()
                    || row.maybe_time("shut_out")?.is_some()
                    || (row.maybe_text("node")?.is_some() && row.maybe_text("present")?.is_none()),
                quarantined: row.maybe_word("node_state", NodeState::parse)? == Some(NodeState::Quarantined),
                role: row.maybe_text("role")?,
                scope: row.maybe_json("selector")?.unwrap_or_default(),
            })
        })
        .collect()
    }

    /// Those of these serial numbers that are unknown or revoked, or whose node is quarantined or deleted.
    pub async fn unacceptable(&self, serials: &[String]) -> Result<Vec<String>, StoreError> {
        // The state of a deleted node is NULL, which fails the comparison, so its certificates are returned as well.
        sql("SELECT s.value AS serial FROM {each} s WHERE NOT EXISTS \
             (SELECT 1 FROM certificates c LEFT JOIN nodes n ON n.id = c.node WHERE c.serial = s.value \
              AND c.revoke_time IS NULL AND (c.node IS NULL OR n.state <> 'QUARANTINED'))")
        .each(serials)
        .all(self.reader())
        .await?
        .iter()
        .map(|row| row.text("serial"))
        .collect()
    }

    /// Revokes every certificate of a node. Returns how many.
    pub async fn revoke_certificates_of(&self, node: &NodeId, now: DateTime<Utc>) -> Result<u64, StoreError> {
        self.again(|| self.revoke_certificates_of_once(node, now)).await
    }

    async fn revoke_certificates_of_once(&self, node: &NodeId, now: DateTime<Utc>) -> Result<u64, StoreError> {
        let tx = self.begin().await?;
        let revoked = sql("UPDATE certificates SET revoke_time = ? WHERE node = ? AND revoke_time IS NULL")
            .time(now)
            .bind(node.as_str())
            .run(&*tx)
            .await?;
        self.commit(tx).await?;
        Ok(revoked)
    }

    /// The node that has this key in service.
    pub async fn node_of_key(&self, key_sha256: &str) -> Result<Option<NodeId>, StoreError> {
        let row = sql("SELECT id FROM nodes WHERE key_sha256 = ?").bind(key_sha256).one(self.reader()).await?;
        row.as_ref().map(nodes::read_id).transpose()
    }
}

/// Reads a certificate by its serial number, also inside a transaction.
pub(super) async fn find(db: &impl Connection, serial: &str) -> Result<Option<StoredCertificate>, StoreError> {
    sql("SELECT * FROM certificates WHERE serial = ?").bind(serial).one(db).await?.as_ref().map(read).transpose()
}

pub(super) fn read(row: &Row) -> Result<StoredCertificate, StoreError> {
    Ok(StoredCertificate {
        certificate: CertificateRow {
            serial: row.text("serial")?,
            node: row.maybe_word("node", |id| NodeId::parse(id).ok())?,
            subject: row.text("subject")?,
            role: row.text("role")?,
            key_sha256: row.text("key_sha256")?,
            not_before: row.time("not_before")?,
            not_after: row.time("not_after")?,
            generation: row.int("generation")?,
            pem: row.text("pem")?,
            given_for: row.text("given_for")?,
        },
        revoke_time: row.maybe_time("revoke_time")?,
    })
}

/// Stores a certificate, unless it is stored already. Runs inside a transaction.
pub(super) async fn insert_if_new(tx: &impl Connection, row: &CertificateRow) -> Result<(), StoreError> {
    put(tx, row, " ON CONFLICT (serial) DO NOTHING").await
}

/// Stores a certificate, inside a transaction.
pub(super) async fn insert(tx: &impl Connection, row: &CertificateRow) -> Result<(), StoreError> {
    put(tx, row, "").await
}

async fn put(tx: &impl Connection, row: &CertificateRow, conflict: &str) -> Result<(), StoreError> {
    sql("INSERT INTO certificates (serial, node, subject, role, key_sha256, not_before, not_after, generation, pem, \
             given_for) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")
    .and(conflict)
    .bind(row.serial.as_str())
    .bind(row.node.as_ref().map(|node| node.as_str().to_owned()))
    .bind(row.subject.as_str())
    .bind(row.role.as_str())
    .bind(row.key_sha256.as_str())
    .time(row.not_before)
    .time(row.not_after)
    .bind(row.generation)
    .bind(row.pem.as_str())
    .bind(row.given_for.as_str())
    .run(tx)
    .await?;
    Ok(())
}
