//! Remedies after an update that a retry cannot heal.

use marco_proto::names::NodeId;
use marco_proto::reasons::{Healing, healing};
use marco_proto::v1;

use super::Context;
use super::status::ApiError;
use crate::operation::{Action, ExecutionError, ExecutionState};
use crate::store::ExecutionRow;

/// True if a retry with the same image ends the same way.
pub(super) fn is_hopeless(state: ExecutionState, error: Option<&ExecutionError>, action: &Action) -> bool {
    let failed = matches!(state, ExecutionState::Failed | ExecutionState::RolledBack);
    // The set of reasons speaks of images; a reboot that fails may succeed the next time.
    let image = action.image().is_some();
    failed && image && error.is_some_and(|error| healing(&error.reason) == Healing::AnotherImage)
}

/// A command that puts another image on a node, instead of the failed one.
///
/// # Errors
/// The store's.
pub(super) async fn put_back(context: &Context, node: &NodeId, action: &Action) -> Result<String, ApiError> {
    let failed = action.image().map(|image| image.sha256.as_str()).unwrap_or_default();
    let before = match context.store.image_before(node, failed).await? {
        // Under the name that points at these bytes today.
        Some(image) => context.store.artifact_by_sha256(&image.sha256).await?,
        None => None,
    };
    Ok(match before {
        Some(row) => format!(
            "Put back {}, which it ran before: marcoctl operations update {node} --image {}",
            row.id.as_str(),
            row.id.as_str()
        ),
        None => format!("Put another image on it: marcoctl operations update {node} --image ID"),
    })
}

/// The failure of a node's last update, with a remedy; empty: there is nothing to say.
///
/// # Errors
/// The store's.
pub(super) async fn trouble(context: &Context, node: &NodeId) -> Result<String, ApiError> {
    let Some(last) = context.store.last_update(node).await? else { return Ok(String::new()) };
    if !is_hopeless(last.state, last.error.as_ref(), &last.action) {
        return Ok(String::new());
    }
    let image = last.action.image().map(|image| image.id.clone()).unwrap_or_default();
    let why = last.error.map(|error| format!("{}: {}", error.reason, error.message)).unwrap_or_default();
    // Rolled back: the node runs a system, so nothing has to be put back.
    let then = if last.state == ExecutionState::RolledBack {
        "It runs the system that it ran before.".to_owned()
    } else {
        format!("{}.", put_back(context, node, &last.action).await?)
    };
    Ok(format!("The update to {image} failed with {why}. Another try with the same image ends the same way. {then}"))
}

/// The error for a retry that cannot help. `count` is the number of nodes on which the update failed.
///
/// # Errors
/// The store's.
pub(super) async fn no_retry(
    context: &Context,
    first: &ExecutionRow,
    count: usize,
    action: &Action,
) -> Result<ApiError, ApiError> {
    let why = first.error.as_ref().map(|error| format!("{}: {}", error.reason, error.message)).unwrap_or_default();
    let others = if count > 1 { format!(" (and {} more nodes)", count - 1) } else { String::new() };
    let remedy = put_back(context, &first.id.node, action).await?;
    Ok(ApiError::Precondition {
        reason: "RETRY_CANNOT_HELP",
        message: format!(
            "{}{others} failed with {why}; another try with the same image ends the same way. {remedy}",
            first.id.node.name()
        ),
    })
}

/// Replaces the suggestion of a retry by a remedy, if a retry cannot help.
///
/// # Errors
/// The store's.
pub(super) async fn amend(
    context: &Context,
    row: &ExecutionRow,
    action: &Action,
    explained: &mut v1::ExplainExecutionResponse,
) -> Result<(), ApiError> {
    if !is_hopeless(row.state, row.error.as_ref(), action) {
        return Ok(());
    }
    explained.explanation.push_str(" Another try with the same image ends the same way.");
    explained.suggestions = match row.state {
        ExecutionState::RolledBack => vec!["It runs the system that it ran before; nothing to put back.".to_owned()],
        _ => vec![put_back(context, &row.id.node, action).await?],
    };
    Ok(())
}
