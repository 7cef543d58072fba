//! How a node comes to be: a token's use, the node and its certificate are one transaction.

use chrono::{DateTime, Utc};
use marco_proto::names::{ID_MAX, NodeId};

use sea_orm::{ConnectionTrait, DatabaseTransaction};

use super::nodes::{self, normal_serial};
use super::sql::{Row, sql};
use super::{Board, CertificateRow, Store, StoreError, certificates};
use crate::operation::NodeState;

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
        let tx = self.begin().await?;
        let usable = sql("UPDATE tokens SET uses = uses WHERE secret_sha256 = ? AND NOT revoked AND expire_time > ? \
                          RETURNING id, uses, max_uses, require_approval, labels")
        .bind(wish.token_sha256.as_str())
        .time(now)
        .one(&*tx)
        .await?;
        let Some(token) = usable else { return Ok(EnrolOutcome::Refused) };
        let token_id = token.text("id")?;
        let before =
            sql("SELECT e.node AS id, n.key_sha256 AS present FROM enrolments e JOIN nodes n ON n.id = e.node \
                          WHERE e.token = ? AND e.key_sha256 = ?")
            .bind(token_id.as_str())
            .bind(wish.key_sha256.as_str())
            .one(&*tx)
            .await?;
        let admitted = match before {
            // The node has another key by now.
            Some(row) if row.text("present")? != wish.key_sha256 => return Ok(EnrolOutcome::Refused),
            // The answer to the first request was lost on the way.
            Some(row) => known(&tx, &nodes::read_id(&row)?).await?,
            None => {
                let used = sql("UPDATE tokens SET uses = uses + 1 WHERE id = ? AND uses < max_uses")
                    .bind(token_id.as_str())
                    .run(&*tx)
                    .await?;
                if used == 0 {
                    return Ok(EnrolOutcome::Refused);
                }
                let admitted = admit(&tx, wish, &token, now).await?;
                sql("INSERT INTO enrolments (token, key_sha256, node) VALUES (?, ?, ?)")
                    .bind(token_id.as_str())
                    .bind(wish.key_sha256.as_str())
                    .bind(admitted.node.as_str())
                    .run(&*tx)
                    .await?;
                admitted
            }
        };
        let Some(certificate) = issue(&admitted.node, admitted.generation) else { return Ok(EnrolOutcome::NotIssued) };
        let certificate = CertificateRow {
            node: Some(admitted.node.clone()),
            generation: admitted.generation,
            key_sha256: wish.key_sha256.clone(),
            ..certificate
        };
        certificates::insert(&*tx, &certificate).await?;
        self.commit(tx).await?;
        let Admitted { node, held, generation } = admitted;
        Ok(EnrolOutcome::Admitted { node, held, generation })
    }
}

struct Admitted {
    node: NodeId,
    held: bool,
    generation: i64,
}

async fn known(tx: &DatabaseTransaction, id: &NodeId) -> Result<Admitted, StoreError> {
    let row = nodes::find(tx, id).await?;
    let row = row.ok_or_else(|| StoreError::Unknown { what: "node", value: id.to_string() })?;
    Ok(Admitted { node: row.id, held: row.state != NodeState::Approved, generation: row.generation })
}

/// Finds the node by its key or its board, or makes one.
async fn admit(
    tx: &DatabaseTransaction,
    wish: &Enrolment,
    token: &Row,
    now: DateTime<Utc>,
) -> Result<Admitted, StoreError> {
    let serial = normal_serial(&wish.board.serial);
    let by_key = sql("SELECT id FROM nodes WHERE key_sha256 = ?").bind(wish.key_sha256.as_str()).one(tx).await?;
    if let Some(row) = by_key {
        return known(tx, &nodes::read_id(&row)?).await;
    }
    if !serial.is_empty() {
        let by_serial = sql("SELECT id FROM nodes WHERE serial = ? ORDER BY id LIMIT 1").bind(serial.as_str()).one(tx);
        if let Some(row) = by_serial.await? {
            let id = nodes::read_id(&row)?;
            // Serial numbers are public: whoever names one is believed only by an admin.
            sql("UPDATE nodes SET key_sha256 = ?, generation = generation + 1, \
                     state_reason = CASE WHEN state = 'QUARANTINED' THEN state_reason ELSE ? END, \
                     state = CASE WHEN state = 'QUARANTINED' THEN state ELSE 'AWAITING_APPROVAL' END WHERE id = ?")
            .bind(wish.key_sha256.as_str())
            .bind("its board enrolled again with another key")
            .bind(id.as_str())
            .run(tx)
            .await?;
            return known(tx, &id).await;
        }
    }
    let id = free_id(tx, &wanted_id(wish, &serial)).await?;
    let held = token.flag("require_approval")?;
    let (state, reason) = if held {
        (NodeState::AwaitingApproval, "its join token asks for an admin's approval")
    } else {
        (NodeState::Approved, "")
    };
    sql("INSERT INTO nodes (id, labels, state, state_reason, serial, key_sha256, board, family, create_time) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)")
    .bind(id.as_str())
    .bind(token.text("labels")?)
    .bind(state.as_str())
    .bind(reason)
    .bind(serial)
    .bind(wish.key_sha256.as_str())
    .json(&wish.board)
    .bind(wish.board.family.as_str())
    .time(now)
    .run(tx)
    .await?;
    Ok(Admitted { node: id, held, generation: 1 })
}

/// The id before a suffix: the one asked for, else by the serial number, else by the key.
fn wanted_id(wish: &Enrolment, serial: &str) -> String {
    if let Some(id) = &wish.wanted_id {
        return id.as_str().to_owned();
    }
    let facts = if serial.bytes().any(|byte| byte.is_ascii_alphanumeric()) { serial } else { &wish.key_sha256 };
    let facts: Vec<char> = facts.chars().filter(char::is_ascii_alphanumeric).collect();
    let last = facts.iter().skip(facts.len().saturating_sub(8));
    format!("pi-{}", last.collect::<String>())
}

async fn free_id(tx: &impl ConnectionTrait, wanted: &str) -> Result<NodeId, StoreError> {
    let invalid = |_| StoreError::Unknown { what: "node id", value: wanted.to_owned() };
    for number in 1_u32.. {
        let id = if number == 1 {
            NodeId::parse(wanted)
        } else {
            let suffix = format!("-{number}");
            let kept: String = wanted.chars().take(ID_MAX.saturating_sub(suffix.len())).collect();
            NodeId::parse(&format!("{kept}{suffix}"))
        }
        .map_err(invalid)?;
        if sql("SELECT id FROM nodes WHERE id = ?").bind(id.as_str()).one(tx).await?.is_none() {
            return Ok(id);
        }
    }
    Err(StoreError::Unknown { what: "node id", value: wanted.to_owned() })
}
