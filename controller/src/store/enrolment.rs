//! Enrolment of nodes. The use of a token, the node and its certificate are one transaction.

use std::net::IpAddr;

use chrono::{DateTime, Utc};
use ipnet::IpNet;
use marco_proto::names::{JoinTokenId, NODE_ID_MAX, NodeId};

use super::connection::{Connection, Transaction};
use super::keys::{self, CAME_BACK, KeyState, NEW_KEY, Shown};
use super::names::{self, Claim};
use super::nodes::{self, normal_serial};
use super::sql::{Row, sql};
use super::{Board, CertificateRow, Store, StoreError, approval, certificates, renewals, tokens};
use crate::operation::NodeState;

/// Request to enrol.
#[derive(Debug, Clone)]
pub struct Enrolment {
    /// SHA-256 of the token's secret, lower-case hexadecimal.
    pub token_sha256: String,
    /// SHA-256 of the SubjectPublicKeyInfo of the node's key, lower-case hexadecimal.
    pub key_sha256: String,
    /// Id that the node asks for. `None`: derived from its serial number or its key.
    pub wanted_id: Option<NodeId>,
    /// Board facts, with the serial number.
    pub board: Board,
    /// Address that the request came from.
    pub address: IpAddr,
}

/// Result of an enrolment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnrolOutcome {
    /// The node exists and its certificate is stored.
    Admitted {
        /// Id of the node.
        node: NodeId,
        /// True if the node or its key waits for approval by an admin.
        held: bool,
        /// Generation of the node's keys.
        generation: i64,
        /// Certificate (PEM) with which the same request was answered before.
        again: Option<String>,
    },
    /// Refused. The caller is not told the reason.
    Refused(EnrolRefusal),
    /// `issue` returned no certificate. Nothing is stored.
    NotIssued,
}

/// Reason of a refusal, for the audit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnrolRefusal {
    /// The token, if one has this secret.
    pub token: Option<JoinTokenId>,
    /// The reason, for operators.
    pub why: String,
}

impl Store {
    /// Uses a token for a node. `issue` makes the certificate, given the id and the generation of keys; its row is
    /// stored in the same transaction. The same key with the same token is the same node, and no second use.
    pub async fn enrol(
        &self,
        wish: &Enrolment,
        now: DateTime<Utc>,
        issue: impl Fn(&NodeId, i64) -> Option<CertificateRow> + Send + Sync,
    ) -> Result<EnrolOutcome, StoreError> {
        self.again(|| self.enrol_once(wish, now, &issue)).await
    }

    async fn enrol_once(
        &self,
        wish: &Enrolment,
        now: DateTime<Utc>,
        issue: &(impl Fn(&NodeId, i64) -> Option<CertificateRow> + Send + Sync),
    ) -> Result<EnrolOutcome, StoreError> {
        let tx = self.begin().await?;
        // A write that changes nothing, to lock the row: two uses at the same time come one after the other.
        let token = sql("UPDATE tokens SET uses = uses WHERE secret_sha256 = ? \
                         RETURNING id, uses, max_uses, expire_time, revoked, require_approval, labels, cidrs, serials, nodes")
            .bind(wish.token_sha256.as_str())
            .one(&*tx)
            .await?;
        let refused = |token: Option<&JoinTokenId>, why: &str| {
            Ok(EnrolOutcome::Refused(EnrolRefusal { token: token.cloned(), why: why.to_owned() }))
        };
        let Some(token) = token else { return refused(None, "no join token has this secret") };
        let token_id = token.word("id", |id| JoinTokenId::parse(id).ok())?;
        let limits = Limits::read(&token)?;
        let wrong = if token.flag("revoked")? {
            Some("the join token was revoked")
        } else if token.time("expire_time")? <= now {
            Some("the join token has expired")
        } else {
            limits.wrong(wish)
        };
        if let Some(why) = wrong {
            return refused(Some(&token_id), why);
        }
        let before = sql("SELECT node AS id FROM enrolments WHERE token = ? AND key_sha256 = ?")
            .bind(token_id.as_str())
            .bind(wish.key_sha256.as_str())
            .one(&*tx)
            .await?;
        // An agent whose answer was lost asks again with the same key, which must not cost another use.
        if before.is_none() {
            let used = sql("UPDATE tokens SET uses = uses + 1 WHERE id = ? AND uses < max_uses")
                .bind(token_id.as_str())
                .run(&*tx)
                .await?;
            if used == 0 {
                return refused(Some(&token_id), "the join token is used up");
            }
        }
        // The order of locks: a transaction that needs both holds the token before the nodes.
        let admitted = match admit(&tx, wish, &token, &limits, now).await? {
            Ok(admitted) => admitted,
            // Dropping the transaction takes back the use of the token as well.
            Err(why) => return refused(Some(&token_id), &why),
        };
        if before.is_none() {
            sql("INSERT INTO enrolments (token, key_sha256, node) VALUES (?, ?, ?)")
                .bind(token_id.as_str())
                .bind(wish.key_sha256.as_str())
                .bind(admitted.node.as_str())
                .run(&*tx)
                .await?;
        }
        let Admitted { node, held, generation } = admitted;
        // The answer to an earlier request was lost on the way, so it is given again.
        let given_for = token_id.name();
        let again = renewals::answer(&*tx, &node, &given_for, &wish.key_sha256, now).await?;
        if again.is_none() {
            // `issue` runs again if the transaction is retried.
            let Some(certificate) = issue(&node, generation) else { return Ok(EnrolOutcome::NotIssued) };
            let certificate = CertificateRow {
                node: Some(node.clone()),
                generation,
                key_sha256: wish.key_sha256.clone(),
                given_for,
                ..certificate
            };
            certificates::insert(&*tx, &certificate).await?;
            renewals::keep_newest(&*tx, &node).await?;
            self.commit(tx).await?;
        }
        Ok(EnrolOutcome::Admitted { node, held, generation, again })
    }
}

/// Restrictions of a token.
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

    /// Reason that the token is not for this board or network, if it is not.
    fn wrong(&self, wish: &Enrolment) -> Option<&'static str> {
        // An IPv4 address of a dual-stack socket is mapped into IPv6, and no IPv4 network contains that.
        let (address, serial) = (wish.address.to_canonical(), normal_serial(&wish.board.serial));
        if !self.cidrs.is_empty() && !self.cidrs.iter().any(|cidr| cidr.contains(&address)) {
            return Some("the join token is not for this network");
        }
        if !self.serials.is_empty() && !self.serials.contains(&serial) {
            return Some("the join token is not for a board with this serial number");
        }
        None
    }

    /// True if a node may have this id.
    fn allow_id(&self, id: &str) -> bool {
        self.nodes.is_empty() || self.nodes.iter().any(|node| node.as_str() == id)
    }

    /// True if the token names this board or node, so that a new key is expected.
    fn name(&self, serial: &str, id: &NodeId) -> bool {
        self.serials.iter().any(|named| named == serial) || self.nodes.contains(id)
    }
}

/// The node that the caller was admitted as.
struct Admitted {
    node: NodeId,
    held: bool,
    generation: i64,
}

async fn known(tx: &Transaction, id: &NodeId) -> Result<Admitted, StoreError> {
    let row = nodes::find(tx, id).await?.ok_or_else(|| StoreError::Unknown { what: "node", value: id.to_string() })?;
    Ok(Admitted { node: row.id, held: row.state != NodeState::Approved, generation: row.generation })
}

/// Reason for a refusal.
type Why = String;

const ANOTHER_NODE: &str = "the join token is for other nodes";

/// Finds the node by its key, its board or its name, or creates it.
async fn admit(
    tx: &Transaction,
    wish: &Enrolment,
    token: &Row,
    limits: &Limits,
    now: DateTime<Utc>,
) -> Result<Result<Admitted, Why>, StoreError> {
    let serial = normal_serial(&wish.board.serial);
    let requires_approval = token.flag("require_approval")?;
    if let Some((id, state)) = keys::owner(tx, &wish.key_sha256).await? {
        if !limits.allow_id(id.as_str()) {
            return Ok(Err(ANOTHER_NODE.to_owned()));
        }
        hold_node(tx, &id).await?;
        return match state {
            KeyState::InService | KeyState::Next => {
                if limits.name(&serial, &id) && !requires_approval {
                    sql("UPDATE nodes SET state = 'APPROVED', state_reason = '' WHERE id = ? \
                         AND state = 'AWAITING_APPROVAL'")
                    .bind(id.as_str())
                    .run(tx)
                    .await?;
                }
                known(tx, &id).await.map(Ok)
            }
            KeyState::Revoked => Ok(Err(format!("its key was shut out of {}", id.name()))),
            KeyState::Pending | KeyState::Previous => {
                let expected = limits.name(&serial, &id) && !requires_approval;
                another_key(tx, wish, &id, expected, CAME_BACK, now).await
            }
        };
    }
    if let Some(id) = same_node(tx, wish, &serial, limits).await? {
        if !limits.allow_id(id.as_str()) {
            return Ok(Err(ANOTHER_NODE.to_owned()));
        }
        hold_node(tx, &id).await?;
        let expected = limits.name(&serial, &id) && !requires_approval;
        return another_key(tx, wish, &id, expected, NEW_KEY, now).await;
    }
    let id = match free_id(tx, wish, &serial).await? {
        Ok(id) => id,
        Err(why) => return Ok(Err(why)),
    };
    // `free_id` adds a suffix if another board has the id, but a token that names ids allows exactly those.
    if !limits.allow_id(id.as_str()) {
        return Ok(Err(ANOTHER_NODE.to_owned()));
    }
    let (state, reason) = if requires_approval {
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
    Ok(Ok(Admitted { node: id, held: requires_approval, generation: 1 }))
}

async fn hold_node(tx: &Transaction, id: &NodeId) -> Result<(), StoreError> {
    sql("SELECT id FROM nodes WHERE id = ? {lock}").bind(id.as_str()).one(tx).await?;
    Ok(())
}

/// Finds the node that this board is already, though its key is not known: by its serial number. If a serial number is
/// missing on either side, by an id that the token names.
async fn same_node(
    tx: &Transaction,
    wish: &Enrolment,
    serial: &str,
    limits: &Limits,
) -> Result<Option<NodeId>, StoreError> {
    if !serial.is_empty() {
        let by_serial = sql("SELECT id FROM nodes WHERE serial = ? ORDER BY id LIMIT 1").bind(serial).one(tx).await?;
        if let Some(row) = by_serial {
            return nodes::read_id(&row).map(Some);
        }
    }
    let Some(wanted) = wish.wanted_id.as_ref().filter(|wanted| limits.nodes.contains(wanted)) else { return Ok(None) };
    let by_name = sql("SELECT id FROM nodes WHERE id = ? AND (serial = '' OR ? = '')");
    let by_name = by_name.bind(wanted.as_str()).bind(serial).one(tx).await?;
    by_name.as_ref().map(nodes::read_id).transpose()
}

/// A known node shows another key. Serial numbers are public, so naming one proves nothing. An admin has to make the
/// token for this board, or approve the key later. Until then the key in service stays, and nothing of the node
/// changes.
async fn another_key(
    tx: &Transaction,
    wish: &Enrolment,
    id: &NodeId,
    expected: bool,
    reason: &str,
    now: DateTime<Utc>,
) -> Result<Result<Admitted, Why>, StoreError> {
    if expected {
        approval::replace_key(tx, id, &wish.key_sha256, &normal_serial(&wish.board.serial), now).await?;
        return known(tx, id).await.map(Ok);
    }
    let waits = keys::state(tx, id, &wish.key_sha256).await? == Some(KeyState::Pending);
    let (serial, origin) = (normal_serial(&wish.board.serial), wish.address.to_canonical().to_string());
    let shown = Shown { serial: &serial, origin: &origin, reason };
    if !waits && !keys::hold(tx, id, &wish.key_sha256, shown, now).await? {
        return Ok(Err(format!("too many keys wait for approval at {} already", id.name())));
    }
    let Admitted { generation, .. } = known(tx, id).await?;
    Ok(Ok(Admitted { node: id.clone(), held: true, generation }))
}

/// The id before a suffix: the one asked for, or one made of the serial number, or of the key.
fn wanted_id(wish: &Enrolment, serial: &str) -> String {
    if let Some(id) = &wish.wanted_id {
        return id.as_str().to_owned();
    }
    let facts = if serial.bytes().any(|byte| byte.is_ascii_alphanumeric()) { serial } else { &wish.key_sha256 };
    let facts: Vec<char> = facts.chars().filter(char::is_ascii_alphanumeric).collect();
    let last = facts.iter().skip(facts.len().saturating_sub(8));
    format!("pi-{}", last.collect::<String>())
}

/// Takes an id: the wanted one, or one with a suffix if another node has it. Refuses an id that was asked for but is
/// not allowed for any node.
async fn free_id(tx: &impl Connection, wish: &Enrolment, serial: &str) -> Result<Result<NodeId, Why>, StoreError> {
    let wanted = wanted_id(wish, serial);
    let invalid = |_| StoreError::Unknown { what: "node id", value: wanted.clone() };
    for number in 1_u32.. {
        let id = if number == 1 {
            NodeId::parse(&wanted)
        } else {
            let suffix = format!("-{number}");
            // The id becomes a host name, so it stays within its length with the suffix.
            let kept: String = wanted.chars().take(NODE_ID_MAX.saturating_sub(suffix.len())).collect();
            NodeId::parse(&format!("{kept}{suffix}"))
        }
        .map_err(invalid)?;
        match names::take(tx, names::Kind::Node, id.as_str()).await? {
            // A controller of an earlier release on the same database does not store names, so the nodes are checked
            // too.
            Claim::Granted if sql("SELECT id FROM nodes WHERE id = ?").bind(id.as_str()).one(tx).await?.is_none() => {
                return Ok(Ok(id));
            }
            Claim::Refused(why) if number == 1 && wish.wanted_id.is_some() => return Ok(Err(why)),
            Claim::Granted | Claim::Taken | Claim::Refused(_) => {}
        }
    }
    Err(StoreError::Unknown { what: "node id", value: wanted })
}
