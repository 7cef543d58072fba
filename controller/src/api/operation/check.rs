//! What would become of an operation, by what its nodes last said of themselves.

use marco_proto::v1;
use marco_proto::v1::operation_check::Verdict;

use super::{Operations, read};
use crate::api::status::ApiError;
use crate::identity::Caller;
use crate::operation::{Action, NodeState};
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
        let is_update = matches!(action, Action::Update(_));
        Ok(v1::CheckOperationResponse { checks: rows.iter().map(|row| check_of(row, is_update)).collect() })
    }
}

/// The worst that stands in the way of one node.
fn check_of(row: &NodeRow, is_update: bool) -> v1::OperationCheck {
    let refusal = row.system.update_refusal.as_ref().filter(|_| is_update);
    let (verdict, reason, message) = if let Some(refusal) = refusal {
        (Verdict::Refused, refusal.reason.clone(), refusal.message.clone())
    } else if row.state == NodeState::AwaitingApproval {
        let message = "it is not admitted yet: `marcoctl nodes approve` admits it".to_owned();
        (Verdict::Waits, "AWAITING_APPROVAL".to_owned(), message)
    } else if row.state == NodeState::Quarantined {
        let message = "it is shut out until it is approved: `marcoctl nodes approve` admits it again".to_owned();
        (Verdict::Waits, "QUARANTINED".to_owned(), message)
    } else if !row.connected {
        let message = match row.last_seen {
            Some(time) => format!("it has no open stream; it was last heard of at {}", time.to_rfc3339()),
            None => "it was never heard of".to_owned(),
        };
        (Verdict::Waits, "NODE_OFFLINE".to_owned(), message)
    } else if let Some(execution) = &row.active_execution {
        (Verdict::Waits, "NODE_BUSY".to_owned(), format!("it is at work on {}", execution.name()))
    } else {
        (Verdict::Ready, String::new(), String::new())
    };
    v1::OperationCheck { node: row.id.name(), verdict: verdict.into(), reason, message }
}
