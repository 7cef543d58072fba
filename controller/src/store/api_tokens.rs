//! API tokens, which services show instead of certificates.

use chrono::{DateTime, Utc};
use marco_proto::names::ApiTokenId;

use super::connection::Connection;
use super::sql::{Row, sql};
use super::{Scope, Store, StoreError};

/// An API token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiTokenRow {
    /// Id of the token.
    pub id: ApiTokenId,
    /// `viewer`, `operator`, `publisher` or `admin`.
    pub role: String,
    /// Nodes that it is limited to.
    pub scope: Scope,
    /// Time after which it is refused.
    pub expire_time: DateTime<Utc>,
    /// Time of creation.
    pub create_time: DateTime<Utc>,
    /// Name of the user who created it.
    pub creator: String,
    /// Time of revocation, if it was revoked.
    pub revoke_time: Option<DateTime<Utc>>,
}

impl ApiTokenRow {
    /// True if it is neither revoked nor expired.
    pub fn works(&self, now: DateTime<Utc>) -> bool {
        self.revoke_time.is_none() && now < self.expire_time
    }
}

impl Store {
    /// Stores a token under the SHA-256 of its secret. Returns false if its id is taken.
    pub async fn create_api_token(&self, row: &ApiTokenRow, secret_sha256: &str) -> Result<bool, StoreError> {
        self.again(|| self.create_api_token_once(row, secret_sha256)).await
    }

    async fn create_api_token_once(&self, row: &ApiTokenRow, secret_sha256: &str) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        // Only the hash of the secret is stored, so a copy of the database opens nothing.
        let inserted =
            sql("INSERT INTO api_tokens (id, secret_sha256, role, selector, expire_time, create_time, creator) \
             VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING")
            .bind(row.id.as_str())
            .bind(secret_sha256)
            .bind(row.role.as_str())
            .json(&row.scope)
            .time(row.expire_time)
            .time(row.create_time)
            .bind(row.creator.as_str())
            .run(&*tx)
            .await?;
        self.commit_if(inserted == 1, tx).await?;
        Ok(inserted == 1)
    }

    /// Tokens in the order of their ids.
    pub async fn api_tokens(&self, after: Option<&ApiTokenId>, limit: u32) -> Result<Vec<ApiTokenRow>, StoreError> {
        sql("SELECT * FROM api_tokens WHERE id > ? ORDER BY id LIMIT ?")
            .bind(after.map_or("", ApiTokenId::as_str))
            .bind(i64::from(limit))
            .all(self.reader())
            .await?
            .iter()
            .map(read)
            .collect()
    }

    /// Finds a token by the SHA-256 of its secret.
    pub async fn api_token_of(&self, secret_sha256: &str) -> Result<Option<ApiTokenRow>, StoreError> {
        let row =
            sql("SELECT * FROM api_tokens WHERE secret_sha256 = ?").bind(secret_sha256).one(self.reader()).await?;
        row.as_ref().map(read).transpose()
    }

    /// Reads those of these tokens that exist.
    pub async fn api_tokens_by_id(&self, ids: &[ApiTokenId]) -> Result<Vec<ApiTokenRow>, StoreError> {
        sql("SELECT * FROM api_tokens WHERE id IN {each}")
            .each(ids.iter().map(ApiTokenId::as_str))
            .all(self.reader())
            .await?
            .iter()
            .map(read)
            .collect()
    }

    /// Revokes a token. Returns `None` if there is no such token.
    pub async fn revoke_api_token(
        &self,
        id: &ApiTokenId,
        now: DateTime<Utc>,
    ) -> Result<Option<ApiTokenRow>, StoreError> {
        self.again(|| self.revoke_api_token_once(id, now)).await
    }

    async fn revoke_api_token_once(
        &self,
        id: &ApiTokenId,
        now: DateTime<Utc>,
    ) -> Result<Option<ApiTokenRow>, StoreError> {
        let tx = self.begin().await?;
        // A second revocation keeps the time of the first.
        sql("UPDATE api_tokens SET revoke_time = COALESCE(revoke_time, ?) WHERE id = ?")
            .time(now)
            .bind(id.as_str())
            .run(&*tx)
            .await?;
        let row = find(&*tx, id).await?;
        self.commit_if(row.is_some(), tx).await?;
        Ok(row)
    }
}

async fn find(db: &impl Connection, id: &ApiTokenId) -> Result<Option<ApiTokenRow>, StoreError> {
    sql("SELECT * FROM api_tokens WHERE id = ?").bind(id.as_str()).one(db).await?.as_ref().map(read).transpose()
}

fn read(row: &Row) -> Result<ApiTokenRow, StoreError> {
    Ok(ApiTokenRow {
        id: row.word("id", |id| ApiTokenId::parse(id).ok())?,
        role: row.text("role")?,
        scope: row.json("selector")?,
        expire_time: row.time("expire_time")?,
        create_time: row.time("create_time")?,
        creator: row.text("creator")?,
        revoke_time: row.maybe_time("revoke_time")?,
    })
}
