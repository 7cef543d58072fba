//! Who asked what: append-only.

use chrono::{DateTime, Utc};

use super::{Store, StoreError};

/// A call of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRow {
    /// When.
    pub time: DateTime<Utc>,
    /// Who.
    pub actor: String,
    /// From which address.
    pub from: String,
    /// Which RPC.
    pub method: String,
    /// On what.
    pub target: String,
    /// With which result.
    pub result: String,
}

impl Store {
    /// Appends a call.
    pub async fn record_audit(&self, row: &AuditRow) -> Result<(), StoreError> {
        let _ = row;
        todo!()
    }
}
