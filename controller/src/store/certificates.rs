//! Certificates that were issued.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use sea_orm::ConnectionTrait;

use super::sql::sql;
use super::{Store, StoreError, nodes};

/// A certificate to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateRow {
    /// Its serial number, lower-case hexadecimal.
    pub serial: String,
    /// The node it names; `None`: a user or a controller.
    pub node: Option<NodeId>,
    /// Its common name.
    pub subject: String,
    /// `node`, `viewer`, `operator`, `publisher`, `admin` or `controller`.
    pub role: String,
    /// SHA-256 of its SubjectPublicKeyInfo, lower-case hexadecimal.
    pub key_sha256: String,
    /// From when it is valid.
    pub not_before: DateTime<Utc>,
    /// Until when it is valid.
    pub not_after: DateTime<Utc>,
    /// The node's generation of keys; 0 where there is no node.
    pub generation: i64,
}

/// A certificate as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredCertificate {
    /// It.
    pub certificate: CertificateRow,
    /// When it was revoked.
    pub revoke_time: Option<DateTime<Utc>>,
}

impl StoredCertificate {
    /// Whether it was revoked.
    pub fn revoked(&self) -> bool {
        self.revoke_time.is_some()
    }
}

impl Store {
    /// Stores a certificate (one that is not issued by `enrol`).
    pub async fn insert_certificate(&self, row: &CertificateRow) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        insert(&*tx, row).await?;
        if let Some(node) = &row.node {
            // A renewal may bring a new key; by that of a node that was enrolled anew, nothing changes.
            sql("UPDATE nodes SET key_sha256 = ? WHERE id = ? AND generation = ?")
                .bind(row.key_sha256.as_str())
                .bind(node.as_str())
                .bind(row.generation)
                .run(&*tx)
                .await?;
        }
        self.commit(tx).await
    }

    /// The certificate with this serial number.
    pub async fn certificate(&self, serial: &str) -> Result<Option<StoredCertificate>, StoreError> {
        let row = sql("SELECT * FROM certificates WHERE serial = ?").bind(serial).one(self.reader()).await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(StoredCertificate {
            certificate: CertificateRow {
                serial: row.text("serial")?,
                node: row.maybe_word("node", |id| NodeId::parse(id).ok())?,
                subject: row.text("subject")?,
                role: row.text("role")?,
                key_sha256: row.text("key_sha256")?,
                not_before: row.time("not_before")?,
                not_after: row.time("not_after")?,
                generation: row.int("generation")?,
            },
            revoke_time: row.maybe_time("revoke_time")?,
        }))
    }

    /// Of these serial numbers, those that are unknown or revoked, or whose node is quarantined or gone.
    pub async fn unacceptable(&self, serials: &[String]) -> Result<Vec<String>, StoreError> {
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

    /// Revokes every certificate of a node; returns how many.
    pub async fn revoke_certificates_of(&self, node: &NodeId, now: DateTime<Utc>) -> Result<u64, StoreError> {
        let tx = self.begin().await?;
        let revoked = sql("UPDATE certificates SET revoke_time = ? WHERE node = ? AND revoke_time IS NULL")
            .time(now)
            .bind(node.as_str())
            .run(&*tx)
            .await?;
        self.commit(tx).await?;
        Ok(revoked)
    }

    /// The node with this key.
    pub async fn node_of_key(&self, key_sha256: &str) -> Result<Option<NodeId>, StoreError> {
        let row = sql("SELECT id FROM nodes WHERE key_sha256 = ?").bind(key_sha256).one(self.reader()).await?;
        row.as_ref().map(nodes::read_id).transpose()
    }
}

/// Stores a certificate, in a transaction.
pub(super) async fn insert(tx: &impl ConnectionTrait, row: &CertificateRow) -> Result<(), StoreError> {
    sql("INSERT INTO certificates (serial, node, subject, role, key_sha256, not_before, not_after, generation) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?)")
    .bind(row.serial.as_str())
    .bind(row.node.as_ref().map(|node| node.as_str().to_owned()))
    .bind(row.subject.as_str())
    .bind(row.role.as_str())
    .bind(row.key_sha256.as_str())
    .time(row.not_before)
    .time(row.not_after)
    .bind(row.generation)
    .run(tx)
    .await?;
    Ok(())
}
