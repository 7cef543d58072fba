//! Audit records of refused sessions. A refused node tries again and again, so they are limited for each node.

use std::time::Duration;

use marco_proto::names::NodeId;

use super::hello::Peer;
use crate::api::Context;
use crate::api::status::ApiError;
use crate::identity::gate::code_word;
use crate::identity::peer_log::{cut, of_peer};
use crate::identity::rate::Rate;
use crate::identity::shown;
use crate::store::AuditRow;

/// Refusals of a node that are recorded at once. After that, one in each `EVERY`.
const BURST: u32 = 3;
const EVERY: Duration = Duration::from_secs(10 * 60);

/// Records refused sessions, up to the limit.
pub(super) struct Refused {
    rate: Rate<NodeId>,
}

impl Refused {
    pub(super) fn new() -> Self {
        Self { rate: Rate::new(BURST, EVERY) }
    }

    pub(super) async fn note(&self, context: &Context, node: &NodeId, peer: &Peer, error: &ApiError) {
        let now = context.clock.now();
        // An error of the database refuses nobody and is logged elsewhere. The record would most likely fail too.
        if matches!(error, ApiError::Store(_)) || !self.rate.take(node.clone(), now) {
            tracing::debug!(%error, "session refused");
            return;
        }
        let text = error.to_string();
        of_peer!(warn, node, %node, error = %cut(&text), from = %shown(peer.from), "session refused");
        let row = AuditRow {
            time: now,
            actor: node.name(),
            credential: format!("certificates/{}", peer.certificate),
            from: shown(peer.from).to_string(),
            method: "Connect".to_owned(),
            target: node.name(),
            result: code_word(error.code()).to_owned(),
            message: text,
        };
        context.access.recorder().record(row, Some(peer.from.ip())).await;
    }
}
