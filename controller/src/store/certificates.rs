//! Certificates that were issued.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::{Store, StoreError};

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
        let _ = row;
        todo!()
    }

    /// The certificate with this serial number.
    pub async fn certificate(&self, serial: &str) -> Result<Option<StoredCertificate>, StoreError> {
        let _ = serial;
        todo!()
    }

    /// Of these serial numbers, those that are unknown or revoked, or whose node is quarantined or gone.
    pub async fn unacceptable(&self, serials: &[String]) -> Result<Vec<String>, StoreError> {
        let _ = serials;
        todo!()
    }

    /// Revokes every certificate of a node; returns how many.
    pub async fn revoke_certificates_of(&self, node: &NodeId, now: DateTime<Utc>) -> Result<u64, StoreError> {
        let _ = (node, now);
        todo!()
    }

    /// The node with this key.
    pub async fn node_of_key(&self, key_sha256: &str) -> Result<Option<NodeId>, StoreError> {
        let _ = key_sha256;
        todo!()
    }
}
