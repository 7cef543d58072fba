//! Join tokens.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{JoinTokenId, NodeId};

use super::connection::Connection;
use super::sql::{Row, sql};
use super::{Store, StoreError, nodes};
use crate::operation::NodeState;

/// A token to be stored.
#[derive(Debug, Clone)]
pub struct NewToken {
    /// Id of the token.
    pub id: JoinTokenId,
    /// SHA-256 of its secret, lower-case hexadecimal.
    pub secret_sha256: String,
    /// Number of nodes that it may enrol.
    pub max_uses: u32,
    /// Time after which it is refused.
    pub expire_time: DateTime<Utc>,
    /// True: its nodes wait for approval by an admin.
    pub require_approval: bool,
    /// Labels that its nodes get.
    pub labels: BTreeMap<String, String>,
    /// Name of the user who created it.
    pub creator: String,
    /// Networks from which it may be used. Empty: any.
    pub cidrs: Vec<String>,
    /// Serial numbers of boards that it may enrol, lower case. Empty: any.
    pub serials: Vec<String>,
    /// Ids that its nodes may take. Empty: any.
    pub nodes: Vec<NodeId>,
}

/// A stored token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRow {
    /// Id of the token.
    pub id: JoinTokenId,
    /// Number of nodes that it may enrol.
    pub max_uses: u32,
    /// Number of nodes that it has enrolled.
    pub uses: u32,
    /// Time after which it is refused.
    pub expire_time: DateTime<Utc>,
    /// Time of creation.
    pub create_time: DateTime<Utc>,
    /// Name of the user who created it.
    pub creator: String,
    /// True: its nodes wait for approval by an admin.
    pub require_approval: bool,
    /// Labels that its nodes get.
    pub labels: BTreeMap<String, String>,
    /// True if it was revoked.
    pub revoked: bool,
    /// Networks from which it may be used. Empty: any.
    pub cidrs: Vec<String>,
    /// Serial numbers of boards that it may enrol, lower case. Empty: any.
    pub serials: Vec<String>,
    /// Ids that its nodes may take. Empty: any.
    pub nodes: Vec<NodeId>,
}

impl Store {
    /// Stores a token.
    pub async fn create_token(&self, new: &NewToken, now: DateTime<Utc>) -> Result<TokenRow, StoreError> {
        self.again(|| self.create_token_once(new, now)).await
    }

    async fn create_token_once(&self, new: &NewToken, now: DateTime<Utc>) -> Result<TokenRow, StoreError> {
        let tx = self.begin().await?;
        // Only the hash of the secret is stored, so a copy of the database enrols nothing.
        sql("INSERT INTO tokens (id, secret_sha256, max_uses, expire_time, create_time, creator, require_approval, \
             labels, cidrs, serials, nodes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")
        .bind(new.id.as_str())
        .bind(new.secret_sha256.as_str())
        .bind(i64::from(new.max_uses))
        .time(new.expire_time)
        .time(now)
        .bind(new.creator.as_str())
        .bind(new.require_approval)
        .json(&new.labels)
        .json(&new.cidrs)
        .json(&new.serials)
        .json(&new.nodes.iter().map(NodeId::as_str).collect::<Vec<_>>())
        .run(&*tx)
        .await?;
        let row = find(&*tx, &new.id).await?;
        self.commit(tx).await?;
        row.ok_or(StoreError::Unknown { what: "token", value: new.id.to_string() })
    }

    /// Tokens, newest first. `after`: only those older than this one.
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

    /// Revokes a token. Returns it with the nodes that are left without a way in, or `None` if there is no such token.
    pub async fn revoke_token(&self, id: &JoinTokenId) -> Result<Option<(TokenRow, Stranded)>, StoreError> {
        self.again(|| self.revoke_token_once(id)).await
    }

    async fn revoke_token_once(&self, id: &JoinTokenId) -> Result<Option<(TokenRow, Stranded)>, StoreError> {
        let tx = self.begin().await?;
        // Never asks first: a token that leaked must be useless at once. The stranded nodes are reported instead.
        sql("UPDATE tokens SET revoked = TRUE WHERE id = ?").bind(id.as_str()).run(&*tx).await?;
        let Some(row) = find(&*tx, id).await? else { return Ok(None) };
        let enrolled = sql("SELECT n.id AS id, n.serial AS serial, n.state AS state, n.session_time AS session_time \
                            FROM enrolments e JOIN nodes n ON n.id = e.node WHERE e.token = ? ORDER BY n.id")
        .bind(id.as_str())
        .all(&*tx)
        .await?;
        self.commit(tx).await?;
        let mut stranded = Stranded { serials: row.serials.clone(), nodes: row.nodes.clone() };
        for node in &enrolled {
            let (id, serial) = (nodes::read_id(node)?, node.text("serial")?);
            stranded.serials.retain(|named| *named != serial);
            // A node that never connected may not have received its certificate, so it would need the token again.
            let settled = node.maybe_time("session_time")?.is_some()
                && node.word("state", NodeState::parse)? == NodeState::Approved;
            stranded.nodes.retain(|named| *named != id);
            if !settled {
                stranded.nodes.push(id);
            }
        }
        stranded.nodes.sort_unstable();
        Ok(Some((row, stranded)))
    }
}

/// Boards and nodes that a revoked token leaves without a way in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stranded {
    /// Serial numbers that it names and that have not enrolled with it.
    pub serials: Vec<String>,
    /// Nodes that it names and that have not enrolled with it. Also nodes that enrolled but never connected, or are not
    /// approved.
    pub nodes: Vec<NodeId>,
}

/// Ids that a token's nodes may take.
pub(super) fn ids(row: &Row) -> Result<Vec<NodeId>, StoreError> {
    let ids: Vec<String> = row.json("nodes")?;
    let unknown = |id: &String| StoreError::Unknown { what: "node id", value: id.clone() };
    ids.iter().map(|id| NodeId::parse(id).map_err(|_| unknown(id))).collect()
}

async fn find(db: &impl Connection, id: &JoinTokenId) -> Result<Option<TokenRow>, StoreError> {
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
        cidrs: row.json("cidrs")?,
        serials: row.json("serials")?,
        nodes: ids(row)?,
    })
}
