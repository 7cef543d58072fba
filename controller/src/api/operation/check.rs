//! Predictions for an operation, by the last reports of its nodes.

use std::collections::BTreeSet;

use chrono::{DateTime, Months, Utc};
use marco_archive::Facts;
use marco_archive::firmware::device_tree;
use marco_proto::names::NodeId;
use marco_proto::v1;
use marco_proto::v1::operation_check::Verdict;

use super::create::Targets;
use super::{Operations, read};
use crate::api::explain::{powered_off, waiting};
use crate::api::status::ApiError;
use crate::identity::Caller;
use crate::operation::{Action, NodeMode, NodeState, OperationState, WaitContext, WaitReason, wait_reason};
use crate::rollout::Rollout;
use crate::store::{Ailment, NodeRow, PoweredOff};

/// An operation that begins later than this needs a confirmation.
const FAR_AHEAD: Months = Months::new(120);
/// Largest number of nodes that a sentence names; the others are counted.
const NODES_SHOWN: usize = 10;

impl Operations {
    /// Does everything that a creation does, except storing it.
    pub(super) async fn check(
        &self,
        caller: &Caller,
        request: v1::CheckOperationRequest,
    ) -> Result<v1::CheckOperationResponse, ApiError> {
        // Read by the same code as a creation, so that both return the same errors.
        let request = v1::CreateOperationRequest { operation: request.operation, request_id: String::new() };
        let now = self.context.clock.now();
        let asked = read(request, now)?;
        let nodes = self.resolve(&asked.target, &caller.scope()).await?;
        // Frozen too, because a missing artifact is an error here as well.
        let mut action = asked.action;
        let facts = match &mut action {
            Action::Update(update) => self.freeze(update, &nodes.families).await?,
            Action::Reboot(_) | Action::PowerOff(_) => None,
        };
        let mut rows = self.context.store.nodes_by_id(&nodes.ids).await?;
        rows.sort_by(|one, other| one.id.as_str().cmp(other.id.as_str()));
        // A node that was powered off needs other advice than one that lost its network.
        let away: Vec<NodeId> = rows.iter().filter(|row| !row.connected).map(|row| row.id.clone()).collect();
        let off = self.context.store.powered_off(&away).await?;
        let checks = rows.iter().map(|row| check_of(row, &action, facts.as_ref(), off.get(&row.id))).collect();
        let mut warnings = Vec::new();
        warnings.extend(far_ahead(asked.schedule_time, now));
        warnings.extend(quarantined(&rows));
        warnings.extend(asked.rollout.and_then(|rollout| without_group(&rollout, &rows)));
        warnings.extend(unwatched(&action, &rows));
        Ok(v1::CheckOperationResponse { checks, warnings })
    }
}

impl Targets {
    /// Returns an error if the image can start none of the boards. With a board that it can start, the operation is
    /// worth it, and each other node refuses the image by itself.
    pub(in crate::api) fn startable(&self, action: &Action, facts: Option<&Facts>) -> Result<(), ApiError> {
        let (Some(image), Some(facts)) = (action.image(), facts) else { return Ok(()) };
        let mut refusals = BTreeSet::new();
        for (family, model) in &self.boards {
            match facts.judge(family, device_tree(family, model)) {
                Ok(()) => return Ok(()),
                Err(refusal) => refusals.insert(refusal),
            };
        }
        let refusals = refusals.into_iter().collect::<Vec<_>>().join("; ");
        let message = format!("{} starts on none of the targets: {refusals}; push an image for them", image.id);
        Err(ApiError::Precondition { reason: "NOT_A_SYSTEM", message })
    }
}

/// Warns of a mistyped year.
fn far_ahead(schedule_time: DateTime<Utc>, now: DateTime<Utc>) -> Option<v1::OperationWarning> {
    let limit = now.checked_add_months(FAR_AHEAD)?;
    (schedule_time > limit).then(|| v1::OperationWarning {
        reason: "FAR_AHEAD".to_owned(),
        message: format!("it would begin more than ten years from now, at {}", schedule_time.to_rfc3339()),
        ask: true,
    })
}

fn quarantined(rows: &[NodeRow]) -> Option<v1::OperationWarning> {
    let nodes = named(rows.iter().filter(|row| row.state == NodeState::Quarantined))?;
    Some(v1::OperationWarning {
        reason: "NODE_QUARANTINED".to_owned(),
        message: format!("quarantined, and would wait until it is approved again or the operation expires: {nodes}"),
        ask: true,
    })
}

/// Warns of nodes without the label that forms the groups. They count as one group, which is safe but rarely intended.
fn without_group(rollout: &Rollout, rows: &[NodeRow]) -> Option<v1::OperationWarning> {
    let label = rollout.group_by.as_ref()?;
    // Without a limit for groups the label has no effect.
    let limit = rollout.max_in_flight_per_group?;
    let nodes = named(rows.iter().filter(|row| !row.labels.contains_key(label)))?;
    Some(v1::OperationWarning {
        reason: "NO_GROUP".to_owned(),
        message: format!("without the label {label}, and so one group of which {limit} go at once: {nodes}"),
        ask: false,
    })
}

/// Warns of nodes on which a new system that hangs may not give way by itself. The update is allowed: most systems come up.
fn unwatched(action: &Action, rows: &[NodeRow]) -> Option<v1::OperationWarning> {
    let Action::Update(_) = action else { return None };
    let lacking = |row: &&NodeRow| !row.system.trial_lacks.is_empty();
    let nodes = named(rows.iter().filter(lacking))?;
    let lacks = rows.iter().find(lacking).map_or("", |row| row.system.trial_lacks.as_str());
    Some(v1::OperationWarning {
        reason: "TRIAL_UNWATCHED".to_owned(),
        message: format!("{lacks}: {nodes}"),
        ask: false,
    })
}

/// The first of these nodes, and the number of the others; `None`: there are none.
fn named<'a>(rows: impl Iterator<Item = &'a NodeRow>) -> Option<String> {
    let ids: Vec<&str> = rows.map(|row| row.id.as_str()).collect();
    let shown = ids.iter().take(NODES_SHOWN).copied().collect::<Vec<_>>().join(", ");
    match ids.len().saturating_sub(NODES_SHOWN) {
        _ if ids.is_empty() => None,
        0 => Some(shown),
        more => Some(format!("{shown} and {more} more")),
    }
}

/// The prediction for one node: a refusal by it, otherwise the obstacle of its execution.
fn check_of(row: &NodeRow, action: &Action, facts: Option<&Facts>, off: Option<&PoweredOff>) -> v1::OperationCheck {
    let refusal = row.system.update_refusal.as_ref().filter(|_| matches!(action, Action::Update(_)));
    let refusal = refusal.map(|refusal| (refusal.reason.clone(), refusal.message.clone()));
    // A node that cannot write its journal refuses every action.
    let ill = row.system.conditions.iter().find(|condition| condition.ailment == Ailment::Journal);
    let refusal = refusal.or_else(|| ill.map(|ill| ("JOURNAL_NOT_WRITABLE".to_owned(), ill.message.clone())));
    let refusal = refusal.or_else(|| {
        // Without facts nothing is refused: a wrong refusal could not be overruled, and the installer reads the real
        // files.
        let tree = device_tree(&row.board.family, &row.board.model);
        let judged = facts?.judge(&row.board.family, tree);
        Some(("NOT_A_SYSTEM".to_owned(), judged.err()?))
    });
    let (verdict, reason, message) = match (refusal, lacks(row, action)) {
        (Some((reason, message)), _) => (Verdict::Refused, reason, message),
        (None, WaitReason::Due) => (Verdict::Ready, String::new(), String::new()),
        (None, reason) => (Verdict::Waits, reason.as_str().to_owned(), sentence(row, reason, off)),
    };
    v1::OperationCheck { node: row.id.name(), verdict: verdict.into(), reason, message }
}

/// The obstacle of an execution on this node. The operation's time and window are left out: the caller knows them, and
/// they would hide the obstacles of the nodes.
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

fn sentence(row: &NodeRow, reason: WaitReason, off: Option<&PoweredOff>) -> String {
    let (text, _) = waiting(Some(reason), &row.id.name(), "");
    if let (WaitReason::NodeOffline, Some(off)) = (reason, off) {
        return format!("{text}{}", powered_off(off));
    }
    match (reason, row.last_seen, &row.active_execution) {
        (WaitReason::NodeOffline, Some(time), _) => format!("{text} It was last heard of at {}.", time.to_rfc3339()),
        (WaitReason::NodeOffline, None, _) => format!("{text} It was never heard of."),
        (WaitReason::NodeBusy, _, Some(execution)) => format!("{text} It is at work on {}.", execution.name()),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::time::Duration;

    use marco_archive::Facts;

    use super::Targets;
    use crate::operation::{Action, FrozenArtifact, Notice, Update};

    #[test]
    fn image_for_none_of_the_boards_is_refused() {
        let action = Action::Update(Update {
            image: Some(FrozenArtifact { id: "kiosk".into(), sha256: String::new() }),
            bootcode: None,
            bootcodes: BTreeMap::new(),
            notice: Notice { delay: Duration::ZERO, message: String::new() },
            discard_home: false,
            raw: false,
        });
        let names = ["kernel8.img", "cmdline.txt", "config.txt", "bcm2710-rpi-3-b.dtb"];
        let facts = Facts {
            boot_files: names.map(str::to_owned).into(),
            texts: [("config.txt".to_owned(), "arm_64bit=1\n".to_owned())].into(),
            ..Facts::default()
        };
        let startable = |boards: &[(&str, &str)]| {
            let boards = boards.iter().map(|(family, model)| ((*family).to_owned(), (*model).to_owned())).collect();
            Targets { ids: Vec::new(), families: BTreeSet::new(), boards }.startable(&action, Some(&facts))
        };
        let (three, four) = (("pi3", "Raspberry Pi 3 Model B"), ("pi4", "Raspberry Pi 4 Model B"));
        startable(&[three, four]).unwrap();
        // A node that never said its board is judged by itself.
        startable(&[four, ("", "")]).unwrap();
        let refused = startable(&[four, ("pi5", "Raspberry Pi 5")]).unwrap_err().to_string();
        for word in ["kiosk", "bcm2711-rpi-4-b.dtb", "bcm2712-rpi-5-b.dtb"] {
            assert!(refused.contains(word), "{word}: {refused}");
        }
    }
}
