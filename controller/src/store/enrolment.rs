//! How a node comes to be: a token's use, the node and its certificate are one transaction.

use std::net::IpAddr;

use chrono::{DateTime, Utc};
use ipnet::IpNet;
use marco_proto::names::{ID_MAX, NodeId};

use super::connection::{Connection, Transaction};
use super::nodes::{self, normal_serial};
use super::sql::{Row, sql};
use super::{Board, CertificateRow, Store, StoreError, certificates, tokens};
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
    /// From where it is asked.
    pub address: IpAddr,
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
    /// The token is wrong, used up, expired, revoked, or not for this board, id or network; which one is not told.
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
                          RETURNING id, uses, max_uses, require_approval, labels, cidrs, serials, nodes")
        .bind(wish.token_sha256.as_str())
        .time(now)
        .one(&*tx)
        .await?;
        let Some(token) = usable else { return Ok(EnrolOutcome::Refused) };
        let token_id = token.text("id")?;
        let limits = Limits::read(&token)?;
        if !limits.allow(wish) {
            return Ok(EnrolOutcome::Refused);
        }
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
                let Some(admitted) = admit(&tx, wish, &token, &limits, now).await? else {
                    return Ok(EnrolOutcome::Refused);
                };
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

/// For whom a token is.
struct Limits {
    cidrs: Vec<IpNet>,
    serials: Vec<String>,
    nodes: Vec<NodeId>,
}

impl Limits {
    fn read(token: &Row) -> Result<Self, StoreError> {
        let cidrs: Vec<String> = token.json("cidrs")?;
        let unknown = |cidr: &String| StoreError::Unknown { what: "network", value: cidr.clone() };
        Ok(Self {
            cidrs: cidrs.iter().map(|cidr| cidr.parse().map_err(|_| unknown(cidr))).collect::<Result<_, _>>()?,
            serials: token.json("serials")?,
            nodes: tokens::ids(token)?,
        })
    }

    fn allow(&self, wish: &Enrolment) -> bool {
        let (address, serial) = (wish.address.to_canonical(), normal_serial(&wish.board.serial));
        (self.cidrs.is_empty() || self.cidrs.iter().any(|cidr| cidr.contains(&address)))
            && (self.serials.is_empty() || self.serials.contains(&serial))
    }

    /// Whether a node may have this id.
    fn allow_id(&self, id: &str) -> bool {
        self.nodes.is_empty() || self.nodes.iter().any(|node| node.as_str() == id)
    }

    /// Whether it was made for this very board or node, so that a new key is no surprise.
    fn name(&self, serial: &str, id: &NodeId) -> bool {
        self.serials.iter().any(|named| named == serial) || self.nodes.contains(id)
    }
}

struct Admitted {
    node: NodeId,
    held: bool,
    generation: i64,
}

async fn known(tx: &Transaction, id: &NodeId) -> Result<Admitted, StoreError> {
    let row = nodes::find(tx, id).await?;
    let row = row.ok_or_else(|| StoreError::Unknown { what: "node", value: id.to_string() })?;
    Ok(Admitted { node: row.id, held: row.state != NodeState::Approved, generation: row.generation })
}

/// Finds the node by its key or its board, or makes one; `None`: the token is not for it.
async fn admit(
    tx: &Transaction,
    wish: &Enrolment,
    token: &Row,
    limits: &Limits,
    now: DateTime<Utc>,
) -> Result<Option<Admitted>, StoreError> {
    let serial = normal_serial(&wish.board.serial);
    let by_key = sql("SELECT id FROM nodes WHERE key_sha256 = ?").bind(wish.key_sha256.as_str()).one(tx).await?;
    if let Some(row) = by_key {
        let id = nodes::read_id(&row)?;
        return if limits.allow_id(id.as_str()) { known(tx, &id).await.map(Some) } else { Ok(None) };
    }
    if !serial.is_empty() {
        let by_serial = sql("SELECT id FROM nodes WHERE serial = ? ORDER BY id LIMIT 1").bind(serial.as_str()).one(tx);
        if let Some(row) = by_serial.await? {
            let id = nodes::read_id(&row)?;
            if !limits.allow_id(id.as_str()) {
                return Ok(None);
            }
            renew_key(tx, wish, &id, limits.name(&serial, &id) && !token.flag("require_approval")?, now).await?;
            return known(tx, &id).await.map(Some);
        }
    }
    let wanted = wanted_id(wish, &serial);
    let id = free_id(tx, &wanted).await?;
    // Another board has the id, and the token is for no other.
    if !limits.allow_id(id.as_str()) {
        return Ok(None);
    }
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
    Ok(Some(Admitted { node: id, held, generation: 1 }))
}

/// Gives a known board a new key. Serial numbers are public: whoever names one is believed only by an admin, who has
/// made the token for this board, or approves the node later.
async fn renew_key(
    tx: &Transaction,
    wish: &Enrolment,
    id: &NodeId,
    expected: bool,
    now: DateTime<Utc>,
) -> Result<(), StoreError> {
    sql("UPDATE nodes SET key_sha256 = ?, generation = generation + 1 WHERE id = ?")
        .bind(wish.key_sha256.as_str())
        .bind(id.as_str())
        .run(tx)
        .await?;
    if expected {
        // Whoever has an earlier key is not the node any more.
        sql("UPDATE certificates SET revoke_time = ? WHERE node = ? AND revoke_time IS NULL")
            .time(now)
            .bind(id.as_str())
            .run(tx)
            .await?;
    } else {
        sql("UPDATE nodes SET state = 'AWAITING_APPROVAL', state_reason = ? WHERE id = ? AND state <> 'QUARANTINED'")
            .bind("its board enrolled again with another key")
            .bind(id.as_str())
            .run(tx)
            .await?;
    }
    Ok(())
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

async fn free_id(tx: &impl Connection, wanted: &str) -> Result<NodeId, StoreError> {
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
