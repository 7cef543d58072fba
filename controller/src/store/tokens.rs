//! Join tokens.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::JoinTokenId;

use super::{Store, StoreError};

/// A token to be stored.
#[derive(Debug, Clone)]
pub struct NewToken {
    /// Its id.
    pub id: JoinTokenId,
    /// SHA-256 of its secret, lower-case hexadecimal.
    pub secret_sha256: String,
    /// How many nodes it may enrol.
    pub max_uses: u32,
    /// When it stops working.
    pub expire_time: DateTime<Utc>,
    /// Its nodes wait for an admin.
    pub require_approval: bool,
    /// That its nodes get.
    pub labels: BTreeMap<String, String>,
    /// Who made it.
    pub creator: String,
}

/// A stored token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// Its id.
    pub id: JoinTokenId,
    /// How many nodes it may enrol.
    pub max_uses: u32,
    /// How many it has enrolled.
    pub uses: u32,
    /// When it stops working.
    pub expire_time: DateTime<Utc>,
    /// When it was made.
    pub create_time: DateTime<Utc>,
    /// Who made it.
    pub creator: String,
    /// Its nodes wait for an admin.
    pub require_approval: bool,
    /// That its nodes get.
    pub labels: BTreeMap<String, String>,
    /// It was revoked.
    pub revoked: bool,
}

impl Store {
    /// Stores a token.
    pub async fn create_token(&self, new: &NewToken, now: DateTime<Utc>) -> Result<TokenRow, StoreError> {
        let _ = (new, now);
        todo!()
    }

    /// Tokens, newest first; `after`: only those older than it.
    pub async fn tokens(&self, after: Option<&JoinTokenId>, limit: u32) -> Result<Vec<TokenRow>, StoreError> {
        let _ = (after, limit);
        todo!()
    }

    /// Makes a token useless; `None`: no such token.
    pub async fn revoke_token(&self, id: &JoinTokenId) -> Result<Option<TokenRow>, StoreError> {
        let _ = id;
        todo!()
    }
}
