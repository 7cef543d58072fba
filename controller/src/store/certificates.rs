//! Certificates that were issued.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::connection::Connection;
use super::sql::{Row, sql};
use super::{Scope, Store, StoreError, nodes};
use crate::operation::NodeState;

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

/// Which certificates to list; what is empty does not restrict.
#[derive(Debug, Clone, Default)]
pub struct CertificateQuery {
    /// Only those after this serial number in the list.
    pub after: Option<String>,
    /// How many at most.
    pub limit: u32,
    /// Of this user or node.
    pub subject: String,
    /// Neither revoked nor expired then.
    pub valid_at: Option<DateTime<Utc>>,
}

/// What is known of a certificate's owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The certificate's serial number.
    pub serial: String,
    /// Until when it is valid.
    pub not_after: DateTime<Utc>,
    /// It was revoked, or its user shut out, or its node deleted.
    pub revoked: bool,
    /// It is a quarantined node's.
    pub quarantined: bool,
    /// The user's present role; `None`: it is no user's.
    pub role: Option<String>,
    /// The nodes that the user is limited to.
    pub scope: Scope,
}

impl Store {
    /// Stores a certificate (one that is not issued by `enrol`).
    pub async fn insert_certificate(&self, row: &CertificateRow) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        // The node first, as in every transaction.
        note_key(&*tx, row).await?;
        insert(&*tx, row).await?;
        self.commit(tx).await
    }

    /// The certificate with this serial number.
    pub async fn certificate(&self, serial: &str) -> Result<Option<StoredCertificate>, StoreError> {
        find(self.reader(), serial).await
    }

    /// Certificates, newest first.
    pub async fn certificates(&self, query: &CertificateQuery) -> Result<Vec<StoredCertificate>, StoreError> {
        let after = query.after.as_deref();
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

    /// Makes a certificate useless; `None`: no such certificate.
    pub async fn revoke_certificate(
        &self,
        serial: &str,
        now: DateTime<Utc>,
    ) -> Result<Option<StoredCertificate>, StoreError> {
        let tx = self.begin().await?;
        sql("UPDATE certificates SET revoke_time = COALESCE(revoke_time, ?) WHERE serial = ?")
            .time(now)
            .bind(serial)
            .run(&*tx)
            .await?;
        let row = find(&*tx, serial).await?;
        self.commit_if(row.is_some(), tx).await?;
        Ok(row)
    }

    /// Stores the certificate that takes the place of a node's old one, unless that one was revoked or the node is gone;
    /// false then.
    pub async fn renew_certificate(&self, old: &str, row: &CertificateRow) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        // The node first, as in every transaction: whoever approves or deletes it holds it, and then revokes.
        if let Some(node) = &row.node {
            let there = sql("SELECT id FROM nodes WHERE id = ? {lock}").bind(node.as_str()).one(&*tx).await?;
            if there.is_none() {
                return Ok(false);
            }
        }
        // Held, so that a revocation comes before or after, and then finds the new one.
        let good = sql("SELECT serial FROM certificates WHERE serial = ? AND revoke_time IS NULL {lock}");
        if good.bind(old).one(&*tx).await?.is_none() {
            return Ok(false);
        }
        insert(&*tx, row).await?;
        note_key(&*tx, row).await?;
        self.commit(tx).await?;
        Ok(true)
    }

    /// What is known of the owners of certificates; those that are not stored are left out.
    pub async fn standings(&self, serials: &[String]) -> Result<Vec<Standing>, StoreError> {
        sql(
            "SELECT c.serial AS serial, c.not_after AS not_after, c.revoke_time AS revoke_time, n.state AS node_state, \
                 c.node AS node, n.id AS present, u.role AS role, u.selector AS selector, u.revoke_time AS shut_out \
             FROM certificates c LEFT JOIN nodes n ON n.id = c.node \
             LEFT JOIN users u ON u.id = c.subject AND c.node IS NULL WHERE c.serial IN {each}",
        )
        .each(serials)
        .all(self.reader())
        .await?
        .iter()
        .map(|row| {
            Ok(Standing {
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

async fn find(db: &impl Connection, serial: &str) -> Result<Option<StoredCertificate>, StoreError> {
    sql("SELECT * FROM certificates WHERE serial = ?").bind(serial).one(db).await?.as_ref().map(read).transpose()
}

fn read(row: &Row) -> Result<StoredCertificate, StoreError> {
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
        },
        revoke_time: row.maybe_time("revoke_time")?,
    })
}

/// A renewal may bring a new key; by that of a node that was enrolled anew, nothing changes.
async fn note_key(tx: &impl Connection, row: &CertificateRow) -> Result<(), StoreError> {
    let Some(node) = &row.node else { return Ok(()) };
    sql("UPDATE nodes SET key_sha256 = ? WHERE id = ? AND generation = ?")
        .bind(row.key_sha256.as_str())
        .bind(node.as_str())
        .bind(row.generation)
        .run(tx)
        .await?;
    Ok(())
}

/// Stores a certificate unless it is stored, in a transaction.
pub(super) async fn insert_if_new(tx: &impl Connection, row: &CertificateRow) -> Result<(), StoreError> {
    put(tx, row, " ON CONFLICT (serial) DO NOTHING").await
}

/// Stores a certificate, in a transaction.
pub(super) async fn insert(tx: &impl Connection, row: &CertificateRow) -> Result<(), StoreError> {
    put(tx, row, "").await
}

async fn put(tx: &impl Connection, row: &CertificateRow, conflict: &str) -> Result<(), StoreError> {
    sql("INSERT INTO certificates (serial, node, subject, role, key_sha256, not_before, not_after, generation) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?)")
    .and(conflict)
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
