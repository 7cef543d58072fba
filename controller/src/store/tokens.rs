//! Join tokens.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::JoinTokenId;

use sea_orm::ConnectionTrait;

use super::sql::{Row, sql};
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
        let tx = self.begin().await?;
        sql("INSERT INTO tokens (id, secret_sha256, max_uses, expire_time, create_time, creator, require_approval, \
             labels) VALUES (?, ?, ?, ?, ?, ?, ?, ?)")
        .bind(new.id.as_str())
        .bind(new.secret_sha256.as_str())
        .bind(i64::from(new.max_uses))
        .time(new.expire_time)
        .time(now)
        .bind(new.creator.as_str())
        .bind(new.require_approval)
        .json(&new.labels)
        .run(&*tx)
        .await?;
        let row = find(&*tx, &new.id).await?;
        self.commit(tx).await?;
        row.ok_or(StoreError::Unknown { what: "token", value: new.id.to_string() })
    }

    /// Tokens, newest first; `after`: only those older than it.
    pub async fn tokens(&self, after: Option<&JoinTokenId>, limit: u32) -> Result<Vec<TokenRow>, StoreError> {
        sql("SELECT * FROM tokens WHERE (? OR (create_time, id) < (SELECT create_time, id FROM tokens WHERE id = ?)) \
             ORDER BY create_time DESC, id DESC LIMIT ?")
        .bind(after.is_none())
        .bind(after.map_or("", JoinTokenId::as_str))
        .bind(i64::from(limit))
        .all(self.reader())
        .await?
        .iter()
        .map(read)
        .collect()
    }

    /// Makes a token useless; `None`: no such token.
    pub async fn revoke_token(&self, id: &JoinTokenId) -> Result<Option<TokenRow>, StoreError> {
        let tx = self.begin().await?;
        sql("UPDATE tokens SET revoked = TRUE WHERE id = ?").bind(id.as_str()).run(&*tx).await?;
        let row = find(&*tx, id).await?;
        self.commit(tx).await?;
        Ok(row)
    }
}

async fn find(db: &impl ConnectionTrait, id: &JoinTokenId) -> Result<Option<TokenRow>, StoreError> {
    sql("SELECT * FROM tokens WHERE id = ?").bind(id.as_str()).one(db).await?.as_ref().map(read).transpose()
}

fn read(row: &Row) -> Result<TokenRow, StoreError> {
    Ok(TokenRow {
        id: row.word("id", |id| JoinTokenId::parse(id).ok())?,
        max_uses: row.number("max_uses")?,
        uses: row.number("uses")?,
        expire_time: row.time("expire_time")?,
        create_time: row.time("create_time")?,
        creator: row.text("creator")?,
        require_approval: row.flag("require_approval")?,
        labels: row.json("labels")?,
        revoked: row.flag("revoked")?,
    })
}
