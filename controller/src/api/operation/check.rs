//! What would become of an operation, by what its nodes last said of themselves.

use marco_proto::v1;
use marco_proto::v1::operation_check::Verdict;

use super::{Operations, read};
use crate::api::explain::waiting;
use crate::api::status::ApiError;
use crate::identity::Caller;
use crate::operation::{Action, NodeMode, OperationState, WaitContext, WaitReason, wait_reason};
use crate::store::NodeRow;

impl Operations {
    /// Everything that a creation does, but storing it.
    pub(super) async fn check(
        &self,
        caller: &Caller,
        request: v1::CheckOperationRequest,
    ) -> Result<v1::CheckOperationResponse, ApiError> {
        let request = v1::CreateOperationRequest { operation: request.operation, request_id: String::new() };
        let asked = read(request, self.context.clock.now())?;
        let nodes = self.resolve(&asked.target, &caller.scope()).await?;
        let mut action = asked.action;
        if let Action::Update(update) = &mut action {
            self.freeze(update, &nodes.families).await?;
        }
        let mut rows = self.context.store.nodes_by_id(&nodes.ids).await?;
        rows.sort_by(|one, other| one.id.as_str().cmp(other.id.as_str()));
        Ok(v1::CheckOperationResponse { checks: rows.iter().map(|row| check_of(row, &action)).collect() })
    }
}

/// What stands in the way of one node: that it would refuse, else what its execution would wait for when it is due.
fn check_of(row: &NodeRow, action: &Action) -> v1::OperationCheck {
    let refusal = row.system.update_refusal.as_ref().filter(|_| matches!(action, Action::Update(_)));
    let (verdict, reason, message) = match (refusal, lacks(row, action)) {
        (Some(refusal), _) => (Verdict::Refused, refusal.reason.clone(), refusal.message.clone()),
        (None, WaitReason::Due) => (Verdict::Ready, String::new(), String::new()),
        (None, reason) => (Verdict::Waits, reason.as_str().to_owned(), sentence(row, reason)),
    };
    v1::OperationCheck { node: row.id.name(), verdict: verdict.into(), reason, message }
}

/// What an execution on this node would wait for. The time and the window are the operation's own, and whoever asks has
/// them at hand; they would hide what the nodes lack.
fn lacks(row: &NodeRow, action: &Action) -> WaitReason {
    wait_reason(&WaitContext {
        operation: OperationState::Running,
        installs_image: action.image().is_some(),
        early: false,
        node: row.state,
        connected: row.connected,
        mode: row.mode.unwrap_or(NodeMode::Running),
        busy: row.active_execution.is_some(),
        conflict: row.conflicts.iter().any(|conflict| conflict.holds),
        window_closed: false,
    })
}

fn sentence(row: &NodeRow, reason: WaitReason) -> String {
    let (text, _) = waiting(Some(reason), &row.id.name(), "");
    match (reason, row.last_seen, &row.active_execution) {
        (WaitReason::NodeOffline, Some(time), _) => format!("{text} It was last heard of at {}.", time.to_rfc3339()),
        (WaitReason::NodeOffline, None, _) => format!("{text} It was never heard of."),
        (WaitReason::NodeBusy, _, Some(execution)) => format!("{text} It is at work on {}.", execution.name()),
        _ => text,
    }
}
