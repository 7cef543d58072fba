//! Nodes, their hardware and system, and join tokens.

use std::net::IpAddr;

use ipnet::IpNet;
use marco_proto::names::{ExecutionId, JoinTokenId, NodeId};
use marco_proto::v1;

use super::{text, timestamp};
use crate::api::status::ApiError;
use crate::operation::{NodeMode, NodeState};
use crate::store::{Ailment, Board, CardLayout, Condition, NodeRow, PendingKey, System, TokenRow, UpdateRefusal};

/// Most conditions of a node.
const CONDITIONS_MAX: usize = 16;
/// Largest kept length of a condition's message, in characters.
const CONDITION_MAX: usize = 300;
/// Largest number of networks, boards or ids of a join token: a big school.
const TOKEN_LIMITS_MAX: usize = 1000;

pub(in crate::api) fn node_state(state: i32) -> Option<NodeState> {
    Some(match v1::node::State::try_from(state).ok()? {
        v1::node::State::Unspecified => return None,
        v1::node::State::Approved => NodeState::Approved,
        v1::node::State::AwaitingApproval => NodeState::AwaitingApproval,
        v1::node::State::Quarantined => NodeState::Quarantined,
    })
}

pub(in crate::api) fn node(row: &NodeRow) -> v1::Node {
    v1::Node {
        name: row.id.name(),
        display_name: row.display_name.clone(),
        labels: row.labels.clone().into_iter().collect(),
        state: match row.state {
            NodeState::Approved => v1::node::State::Approved,
            NodeState::AwaitingApproval => v1::node::State::AwaitingApproval,
            NodeState::Quarantined => v1::node::State::Quarantined,
        }
        .into(),
        state_reason: row.state_reason.clone(),
        connected: row.connected,
        mode: match row.mode {
            None => v1::NodeMode::Unspecified,
            Some(NodeMode::Running) => v1::NodeMode::Running,
            Some(NodeMode::Installer) => v1::NodeMode::Installer,
        }
        .into(),
        board: Some(v1::Board {
            model: row.board.model.clone(),
            revision: row.board.revision.clone(),
            serial: row.board.serial.clone(),
            mac_addresses: row.board.mac_addresses.clone(),
            memory_bytes: row.board.memory_bytes,
            family: row.board.family.clone(),
        }),
        system: Some(v1::System {
            kernel_arch: row.system.kernel_arch.clone(),
            userspace_arch: row.system.userspace_arch.clone(),
            page_size: row.system.page_size,
            kernel_release: row.system.kernel_release.clone(),
            os: row.system.os.clone(),
            layout: match row.system.layout {
                CardLayout::Unknown => v1::CardLayout::Unspecified,
                CardLayout::Single => v1::CardLayout::Single,
                CardLayout::Resident => v1::CardLayout::Resident,
            }
            .into(),
            image_sha256: row.system.image_sha256.clone(),
            boot_sha256: row.system.boot_sha256.clone(),
            update_refusal: row
                .system
                .update_refusal
                .as_ref()
                .map(|refusal| v1::UpdateRefusal { reason: refusal.reason.clone(), message: refusal.message.clone() }),
            trial_lacks: row.system.trial_lacks.clone(),
        }),
        boot_id: row.boot_id.clone(),
        agent_version: row.agent_version.clone(),
        create_time: Some(timestamp(row.create_time)),
        last_seen_time: row.last_seen.map(timestamp),
        active_execution: row.active_execution.as_ref().map(ExecutionId::name).unwrap_or_default(),
        conflicts: row.conflicts.iter().map(super::operation::conflict).collect(),
        powered_off_by: String::new(),
        trouble: String::new(),
        key_sha256: row.key_sha256.clone(),
        pending_keys: row.pending_keys.iter().map(pending_key).collect(),
        certificate_expire_time: row.certificate_expire_time.map(timestamp),
        conditions: row.system.conditions.iter().map(condition).collect(),
    }
}

fn condition(condition: &Condition) -> v1::NodeCondition {
    use v1::node_condition::Type;
    v1::NodeCondition {
        r#type: match condition.ailment {
            Ailment::Unknown => Type::Unspecified,
            Ailment::Journal => Type::Journal,
            Ailment::Disk => Type::Disk,
            Ailment::Clock => Type::Clock,
            Ailment::UnderVoltage => Type::UnderVoltage,
            Ailment::JournalLost => Type::JournalLost,
        }
        .into(),
        message: condition.message.clone(),
    }
}

/// Conditions that a node reports.
fn conditions(said: Vec<v1::NodeCondition>) -> Result<Vec<Condition>, ApiError> {
    use v1::node_condition::Type;
    if said.len() > CONDITIONS_MAX {
        return Err(ApiError::invalid("conditions", format!("must be at most {CONDITIONS_MAX}")));
    }
    let condition = |said: v1::NodeCondition| {
        let ailment = match said.r#type() {
            Type::Unspecified => Ailment::Unknown,
            Type::Journal => Ailment::Journal,
            Type::Disk => Ailment::Disk,
            Type::Clock => Ailment::Clock,
            Type::UnderVoltage => Ailment::UnderVoltage,
            Type::JournalLost => Ailment::JournalLost,
        };
        // It may be an operating system's text about a disk, so it is cut and not refused.
        let clean = said.message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(CONDITION_MAX).collect();
        Condition { ailment, message: clean }
    };
    Ok(said.into_iter().map(condition).collect())
}

fn pending_key(key: &PendingKey) -> v1::PendingKey {
    v1::PendingKey {
        key_sha256: key.key_sha256.clone(),
        create_time: Some(timestamp(key.create_time)),
        serial: key.serial.clone(),
        from: key.origin.clone(),
        reason: key.reason.clone(),
    }
}

pub(in crate::api) fn board(board: v1::Board) -> Result<Board, ApiError> {
    for (field, value) in [
        ("board.model", &board.model),
        ("board.revision", &board.revision),
        ("board.serial", &board.serial),
        ("board.family", &board.family),
    ] {
        text(field, value)?;
    }
    if !board.serial.bytes().all(|b| b.is_ascii_alphanumeric()) || board.serial.len() > 64 {
        return Err(ApiError::invalid("board.serial", "must be at most 64 letters and digits"));
    }
    if board.mac_addresses.len() > 32 {
        return Err(ApiError::invalid("board.mac_addresses", "must be at most 32"));
    }
    for address in &board.mac_addresses {
        text("board.mac_addresses", address)?;
    }
    Ok(Board {
        model: board.model,
        revision: board.revision,
        serial: board.serial,
        mac_addresses: board.mac_addresses,
        memory_bytes: board.memory_bytes,
        family: board.family,
    })
}

/// Facts of a node's system, with its conditions.
pub(in crate::api) fn system(system: v1::System, ailing: Vec<v1::NodeCondition>) -> Result<System, ApiError> {
    for (field, value) in [
        ("system.kernel_arch", &system.kernel_arch),
        ("system.userspace_arch", &system.userspace_arch),
        ("system.kernel_release", &system.kernel_release),
        ("system.os", &system.os),
        ("system.image_sha256", &system.image_sha256),
        ("system.boot_sha256", &system.boot_sha256),
        ("system.trial_lacks", &system.trial_lacks),
    ] {
        text(field, value)?;
    }
    let refusal = system.update_refusal.clone().unwrap_or_default();
    text("system.update_refusal.reason", &refusal.reason)?;
    text("system.update_refusal.message", &refusal.message)?;
    Ok(System {
        layout: match system.layout() {
            v1::CardLayout::Unspecified => CardLayout::Unknown,
            v1::CardLayout::Single => CardLayout::Single,
            v1::CardLayout::Resident => CardLayout::Resident,
        },
        kernel_arch: system.kernel_arch,
        userspace_arch: system.userspace_arch,
        page_size: system.page_size,
        kernel_release: system.kernel_release,
        os: system.os,
        image_sha256: system.image_sha256,
        boot_sha256: system.boot_sha256,
        update_refusal: system
            .update_refusal
            .map(|refusal| UpdateRefusal { reason: refusal.reason, message: refusal.message }),
        trial_lacks: system.trial_lacks,
        conditions: conditions(ailing)?,
    })
}

pub(in crate::api) fn mode(mode: i32) -> Result<NodeMode, ApiError> {
    match v1::NodeMode::try_from(mode) {
        Ok(v1::NodeMode::Running) => Ok(NodeMode::Running),
        Ok(v1::NodeMode::Installer) => Ok(NodeMode::Installer),
        Ok(v1::NodeMode::Unspecified) | Err(_) => Err(ApiError::invalid("hello.mode", "must be RUNNING or INSTALLER")),
    }
}

pub(in crate::api) fn boot_id(boot_id: &str) -> Result<String, ApiError> {
    if boot_id.is_empty() || boot_id.len() > 64 || !boot_id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
        return Err(ApiError::invalid("boot_id", "must be what /proc/sys/kernel/random/boot_id says"));
    }
    Ok(boot_id.to_owned())
}

/// The nodes that a join token is for.
pub(in crate::api) struct TokenLimits {
    pub(in crate::api) cidrs: Vec<String>,
    pub(in crate::api) serials: Vec<String>,
    pub(in crate::api) nodes: Vec<NodeId>,
}

pub(in crate::api) fn token_limits(
    cidrs: Vec<String>,
    serials: Vec<String>,
    nodes: Vec<String>,
) -> Result<TokenLimits, ApiError> {
    for (field, many) in [("cidrs", cidrs.len()), ("serials", serials.len()), ("nodes", nodes.len())] {
        if many > TOKEN_LIMITS_MAX {
            return Err(ApiError::invalid(field, format!("must be at most {TOKEN_LIMITS_MAX}")));
        }
    }
    let cidr = |text: &String| {
        // A single address is a network of one.
        let single = text.parse::<IpAddr>().map(IpNet::from);
        let network = text.parse::<IpNet>().or(single).map(|network| network.trunc().to_string());
        network
            .map_err(|_| ApiError::invalid("cidrs", format!("{text:?} is no network; write for example 10.0.7.0/24")))
    };
    let serial = |text: String| {
        if text.is_empty() || text.len() > 64 || !text.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(ApiError::invalid("serials", "must be letters and digits, at most 64"));
        }
        Ok(text.to_ascii_lowercase())
    };
    let node = |text: &String| NodeId::parse(text).map_err(|error| ApiError::invalid("nodes", error.to_string()));
    Ok(TokenLimits {
        cidrs: cidrs.iter().map(cidr).collect::<Result<_, _>>()?,
        serials: serials.into_iter().map(serial).collect::<Result<_, _>>()?,
        nodes: nodes.iter().map(node).collect::<Result<_, _>>()?,
    })
}

pub(in crate::api) fn join_token(row: &TokenRow) -> v1::JoinToken {
    v1::JoinToken {
        name: JoinTokenId::name(&row.id),
        token: String::new(),
        max_uses: row.max_uses,
        uses: row.uses,
        expire_time: Some(timestamp(row.expire_time)),
        create_time: Some(timestamp(row.create_time)),
        creator: row.creator.clone(),
        require_approval: row.require_approval,
        labels: row.labels.clone().into_iter().collect(),
        revoked: row.revoked,
        cidrs: row.cidrs.clone(),
        serials: row.serials.clone(),
        nodes: row.nodes.iter().map(NodeId::name).collect(),
        stranded: Vec::new(),
    }
}
