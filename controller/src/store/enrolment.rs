//! How a node comes to be: a token's use, the node and its certificate are one transaction.

use chrono::{DateTime, Utc};
use marco_proto::names::NodeId;

use super::{Board, CertificateRow, Store, StoreError};

/// A wish to enrol.
#[derive(Debug, Clone)]
pub struct Enrolment {
    /// SHA-256 of the token's secret, lower-case hexadecimal.
    pub token_sha256: String,
    /// SHA-256 of the SubjectPublicKeyInfo of the node's key, lower-case hexadecimal.
    pub key_sha256: String,
    /// The id asked for.
    pub wanted_id: Option<NodeId>,
    /// The board, with its serial number.
    pub board: Board,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnrolOutcome {
    /// The node exists and its certificate is stored.
    Admitted {
        /// Its id.
        node: NodeId,
        /// It waits for an admin.
        held: bool,
        /// Its generation of keys.
        generation: i64,
    },
    /// The token is wrong, used up, expired or revoked; which one is not told.
    Refused,
    /// `issue` made no certificate; nothing is stored.
    NotIssued,
}

impl Store {
    /// Uses a token for a node. `issue` makes the certificate once the id and the generation of keys are known; its row
    /// is stored in the same transaction. The same key with the same token is the same node and no second use.
    pub async fn enrol(
        &self,
        wish: &Enrolment,
        now: DateTime<Utc>,
        issue: impl FnOnce(&NodeId, i64) -> Option<CertificateRow> + Send,
    ) -> Result<EnrolOutcome, StoreError> {
        let _ = (wish, now, issue);
        todo!()
    }
}
