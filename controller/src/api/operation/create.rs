//! Creation of operations: the request is read and checked, targets are resolved, artifacts are frozen.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta, Utc};
use marco_archive::Facts;
use marco_proto::names::{ArtifactId, NodeId};
use marco_proto::v1;
use sha2::{Digest as _, Sha256};

use super::Operations;
use crate::api::artifact::facts_of;
use crate::api::convert;
use crate::api::scope::outside;
use crate::api::status::{ApiError, Violation};
use crate::calendar::{earlier, later};
use crate::operation::{Action, FrozenArtifact, NodeState, Target, Update};
use crate::rollout::Rollout;
use crate::schedule::MaintenanceWindow;
use crate::store::{ArtifactRow, Kind, NodeQuery, Purpose, RequestKey, Scope};

/// Default expiry. A Pi taken out of a drawer must not reboot weeks later.
const DEFAULT_LIFETIME: TimeDelta = TimeDelta::hours(24);
/// Age up to which a past schedule_time is blamed on the caller's clock and accepted.
const CLOCK_TOLERANCE: TimeDelta = TimeDelta::seconds(60);
/// Longest request id, in bytes.
const REQUEST_ID_MAX: usize = 128;

impl Operations {
    pub(in crate::api) async fn resolve(&self, target: &Target, scope: &Scope) -> Result<Targets, ApiError> {
        let store = &self.context.store;
        // Labels and `all` match approved nodes only. A node that is named may be held; its execution waits for the
        // approval.
        let approved = NodeQuery {
            states: vec![NodeState::Approved],
            limit: u32::MAX,
            scope: scope.clone(),
            ..NodeQuery::default()
        };
        let rows = match target {
            Target::Nodes(asked) => {
                let mut ids = BTreeSet::new();
                for id in asked {
                    ids.insert(
                        NodeId::parse(id)
                            .map_err(|error| ApiError::invalid("operation.nodes.nodes", error.to_string()))?,
                    );
                }
                let ids: Vec<NodeId> = ids.into_iter().collect();
                let rows = store.nodes_by_id(&ids).await?;
                let missing: Vec<String> =
                    ids.iter().filter(|id| !rows.iter().any(|row| row.id == **id)).map(NodeId::name).collect();
                // One error for missing nodes and for those outside, so that a limited caller cannot probe for names.
                // A list with one node outside is refused whole, so that no operation silently misses a node.
                let limited = !scope.is_everything();
                if limited && (!missing.is_empty() || !rows.iter().all(|row| scope.covers(&row.labels))) {
                    return Err(outside(scope));
                }
                if !missing.is_empty() {
                    return Err(ApiError::NotFound {
                        reason: "NODE_NOT_FOUND",
                        message: format!(
                            "no such node: {}; `marcoctl nodes list` shows those that exist",
                            missing.join(", ")
                        ),
                    });
                }
                rows
            }
            Target::Labels(labels) => {
                let query = NodeQuery { labels: labels.clone(), ..approved };
                store.nodes(&query).await?
            }
            Target::All => store.nodes(&approved).await?,
        };
        // Without executions it would end at once, and look like a success.
        if rows.is_empty() {
            return Err(ApiError::Precondition {
                reason: "NO_TARGETS",
                message: "the target matches no approved node; `marcoctl nodes list` shows nodes and labels".to_owned(),
            });
        }
        Ok(Targets {
            families: rows.iter().map(|row| row.board.family.clone()).collect(),
            boards: rows.iter().map(|row| (row.board.family.clone(), row.board.model.clone())).collect(),
            ids: rows.into_iter().map(|row| row.id).collect(),
        })
    }

    /// Replaces names by digests, so that a later push does not change the operation. Returns an error for an image
    /// that no board can start. The result holds the image's facts, to judge it for one board; `None`: no image, or its
    /// facts are unknown.
    pub(in crate::api) async fn freeze(
        &self,
        update: &mut Update,
        families: &BTreeSet<String>,
    ) -> Result<Option<Facts>, ApiError> {
        let mut facts = None;
        if let Some(image) = &mut update.image {
            let row = self.artifact("image", &image.id, Kind::Image, Purpose::None).await?;
            if update.raw && !row.is_disk() {
                let message = format!(
                    "{} is a tarball of a root; to be written raw it must be the image of a whole disk (.img, .img.xz, \
                     .img.zst)",
                    row.id.name()
                );
                return Err(ApiError::invalid("operation.update.raw", message));
            }
            facts = self.judged(&row).await?;
            *image = frozen(row);
        }
        // With an image the bootcode starts the installer. Without one it replaces the system's boot files.
        let purpose = if update.image.is_some() { Purpose::Installer } else { Purpose::System };
        if let Some(bootcode) = &mut update.bootcode {
            *bootcode = frozen(self.artifact("bootcode", &bootcode.id, Kind::Bootcode, purpose).await?);
            // A named bootcode goes to every board, so no defaults are frozen.
            return Ok(facts);
        }
        for family in families {
            let default = self.context.store.default_for(family, Kind::Bootcode, purpose).await?;
            match default {
                Some(row) => {
                    update.bootcodes.insert(family.clone(), frozen(row));
                }
                // With an image, the node uses the fallback that it keeps.
                None if update.image.is_some() => {}
                None => {
                    let board = if family.is_empty() { "an unknown board" } else { family };
                    return Err(ApiError::invalid(
                        "operation.update",
                        format!(
                            "names neither an image nor a bootcode, and there is no default bootcode of purpose SYSTEM \
                             for {board}; name one, or set a default with `marcoctl artifacts default`"
                        ),
                    ));
                }
            }
        }
        Ok(facts)
    }

    /// An image's facts; an error if no board can start it.
    async fn judged(&self, row: &ArtifactRow) -> Result<Option<Facts>, ApiError> {
        // The image is too large to be read again, so the facts of its push decide.
        let facts = facts_of(&self.context, row).await?;
        if let Some(refusal) = facts.as_ref().and_then(|facts| facts.refusal.as_ref()) {
            let message = format!("{} cannot be installed: {refusal}; push another image", row.id.name());
            return Err(ApiError::Precondition { reason: "NOT_A_SYSTEM", message });
        }
        Ok(facts)
    }

    async fn artifact(&self, field: &str, id: &str, kind: Kind, purpose: Purpose) -> Result<ArtifactRow, ApiError> {
        let field = format!("operation.update.{field}");
        let id = ArtifactId::parse(id).map_err(|error| ApiError::invalid(&field, error.to_string()))?;
        let row = self.context.store.artifact(&id).await?.ok_or_else(|| ApiError::NotFound {
            reason: "ARTIFACT_NOT_FOUND",
            message: format!("{field}: there is no {}; `marcoctl artifacts push` stores one", id.name()),
        })?;
        if row.kind != kind || row.purpose != purpose {
            let (is, needed) = (describe(row.kind, row.purpose), describe(kind, purpose));
            return Err(ApiError::invalid(field, format!("{} is {is}, but {needed} is needed here", id.name())));
        }
        Ok(row)
    }
}

fn frozen(row: ArtifactRow) -> FrozenArtifact {
    FrozenArtifact { id: row.id.as_str().to_owned(), sha256: row.sha256 }
}

fn describe(kind: Kind, purpose: Purpose) -> &'static str {
    match (kind, purpose) {
        (Kind::Image, _) => "an image",
        (Kind::Bootcode, Purpose::System) => "a bootcode of purpose SYSTEM",
        (Kind::Bootcode, _) => "a bootcode of purpose INSTALLER",
    }
}

pub(in crate::api) struct Targets {
    pub(in crate::api) ids: Vec<NodeId>,
    pub(in crate::api) families: BTreeSet<String>,
    /// Family and model of each board.
    pub(in crate::api) boards: BTreeSet<(String, String)>,
}

pub(in crate::api) struct Asked {
    pub(in crate::api) action: Action,
    pub(in crate::api) target: Target,
    pub(super) schedule_time: DateTime<Utc>,
    pub(super) expire_time: DateTime<Utc>,
    pub(super) request: Option<RequestKey>,
    pub(in crate::api) rollout: Option<Rollout>,
    pub(in crate::api) window: Option<MaintenanceWindow>,
}

/// A request as it was written. Its times are not compared with the present yet, so it reads the same at any time.
pub(super) struct Written {
    action: Option<Action>,
    target: Option<Target>,
    schedule_time: Option<DateTime<Utc>>,
    expire_time: Option<DateTime<Utc>>,
    rollout: Option<Rollout>,
    window: Option<MaintenanceWindow>,
    /// `None`: the caller chose no id, or the request is wrong.
    pub(super) request: Option<RequestKey>,
    wrong: Vec<Violation>,
}

/// Reads a request as far as possible without the store; lists every wrong field.
pub(in crate::api) fn read(request: v1::CreateOperationRequest, now: DateTime<Utc>) -> Result<Asked, ApiError> {
    written(request, now)?.at(now)
}

/// Reads the parts that do not depend on the time of the request. `now` is for windows that never open after it.
pub(super) fn written(request: v1::CreateOperationRequest, now: DateTime<Utc>) -> Result<Written, ApiError> {
    let operation = request
        .operation
        .ok_or_else(|| ApiError::invalid("operation", "is missing; it needs an action and a target"))?;
    let mut wrong = Vec::new();
    let mut bad = |field: &str, description: String| {
        wrong.push(Violation { field: field.to_owned(), description });
    };

    let action = match operation.action {
        Some(action) => convert::action(action, &mut bad),
        None => {
            bad("operation.action", "is missing; set one of reboot, power_off and update".to_owned());
            None
        }
    };
    let target = match operation.target {
        Some(target) => convert::target(target, &mut bad),
        None => {
            bad("operation.target", "is missing; set one of nodes, labels and all".to_owned());
            None
        }
    };
    let rollout = operation.rollout.map(|rollout| convert::rollout(rollout, &mut bad));
    let window = operation.window.and_then(|window| convert::window(window, now, &mut bad));
    let schedule_time = convert::time(operation.schedule_time, "operation.schedule_time", &mut bad);
    let expire_time = convert::time(operation.expire_time, "operation.expire_time", &mut bad);
    if !operation.name.is_empty() {
        bad("operation.name", "is chosen by the controller; leave it out".to_owned());
    }
    if request.request_id.len() > REQUEST_ID_MAX || request.request_id.contains(|c: char| c.is_control()) {
        bad("request_id", format!("must be at most {REQUEST_ID_MAX} bytes of printable text"));
    }
    let request = match (&action, &target) {
        // The key covers the request as it was written, without `now`: a repeated call must have the same key.
        (Some(action), Some(target)) if wrong.is_empty() => {
            let body = serde_json::to_vec(&(action, target, schedule_time, expire_time, &rollout, &window))
                .map_err(|error| ApiError::Internal(error.to_string()))?;
            request_key(&request.request_id, &[b"create", &body])?
        }
        _ => None,
    };
    Ok(Written { action, target, schedule_time, expire_time, rollout, window, request, wrong })
}

impl Written {
    /// The request, as it would be if it came now.
    pub(super) fn at(self, now: DateTime<Utc>) -> Result<Asked, ApiError> {
        let Self { action, target, rollout, window, request, mut wrong, .. } = self;
        let mut bad = |field: &str, description: String| {
            wrong.push(Violation { field: field.to_owned(), description });
        };
        let schedule_time = match self.schedule_time {
            Some(time) if time < earlier(now, CLOCK_TOLERANCE) => {
                bad(
                    "operation.schedule_time",
                    format!("{} is in the past; leave it out to begin at once", time.to_rfc3339()),
                );
                // The request is refused anyway; `now` only lets the other checks go on.
                now
            }
            Some(time) => time,
            None => now,
        };
        let expire_time = match self.expire_time {
            Some(time) if time <= schedule_time || time <= now => {
                bad("operation.expire_time", "must be later than now and than schedule_time".to_owned());
                time
            }
            Some(time) => time,
            None => default_expiry(window.as_ref(), schedule_time),
        };
        match (action, target, wrong.is_empty()) {
            (Some(action), Some(target), true) => {
                Ok(Asked { action, target, schedule_time, expire_time, request, rollout, window })
            }
            _ => Err(ApiError::Invalid(wrong)),
        }
    }
}

/// A day after the scheduled time; with a window, a day after its first opening.
pub(super) fn default_expiry(window: Option<&MaintenanceWindow>, schedule_time: DateTime<Utc>) -> DateTime<Utc> {
    let first = window.and_then(|window| window.closed_until(schedule_time)).unwrap_or(schedule_time);
    later(first, DEFAULT_LIFETIME)
}

/// Returns an error for a window that never opens. Earlier releases stored such windows.
pub(in crate::api) fn must_open(window: Option<&MaintenanceWindow>, now: DateTime<Utc>) -> Result<(), ApiError> {
    window.map_or(Ok(()), |window| window.check(now)).map_err(|error| ApiError::Precondition {
        reason: "WINDOW_NEVER_OPENS",
        message: format!("its maintenance window never opens: {error}"),
    })
}

pub(in crate::api) fn request_key(id: &str, body: &[&[u8]]) -> Result<Option<RequestKey>, ApiError> {
    if id.len() > REQUEST_ID_MAX {
        return Err(ApiError::invalid("request_id", format!("must be at most {REQUEST_ID_MAX} bytes")));
    }
    if id.chars().any(char::is_control) {
        return Err(ApiError::invalid("request_id", "must not contain control characters"));
    }
    let mut hash = Sha256::new();
    for part in body {
        // Each part with its length, so that no two lists of parts hash alike.
        hash.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        hash.update(part);
    }
    Ok((!id.is_empty()).then(|| RequestKey { request_id: id.to_owned(), body_sha256: hex::encode(hash.finalize()) }))
}

#[cfg(test)]
mod tests {
    use super::read;
    use chrono::{TimeZone as _, Utc};
    use marco_proto::v1;

    fn request(labels: &[(&str, &str)]) -> v1::CreateOperationRequest {
        v1::CreateOperationRequest {
            operation: Some(v1::Operation {
                action: Some(v1::operation::Action::Reboot(v1::Reboot::default())),
                target: Some(v1::operation::Target::Labels(v1::LabelSelector {
                    match_labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
                })),
                ..v1::Operation::default()
            }),
            request_id: "r".to_owned(),
        }
    }

    #[test]
    fn the_same_body_has_the_same_key_whatever_the_order_of_its_labels() {
        let now = Utc.timestamp_opt(1_800_000_000, 0).unwrap();
        let later = now + chrono::TimeDelta::hours(1);
        let one = read(request(&[("a", "1"), ("b", "2"), ("c", "3")]), now).ok().unwrap().request.unwrap();
        let two = read(request(&[("c", "3"), ("b", "2"), ("a", "1")]), later).ok().unwrap().request.unwrap();
        let other = read(request(&[("c", "3"), ("b", "2")]), now).ok().unwrap().request.unwrap();
        assert_eq!(one.body_sha256, two.body_sha256);
        assert_ne!(one.body_sha256, other.body_sha256);
    }

    #[test]
    fn every_wrong_field_is_listed() {
        let now = Utc.timestamp_opt(1_800_000_000, 0).unwrap();
        let operation = v1::Operation {
            schedule_time: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
            ..v1::Operation::default()
        };
        let Err(super::ApiError::Invalid(wrong)) =
            read(v1::CreateOperationRequest { operation: Some(operation), request_id: String::new() }, now)
        else {
            panic!("it was taken")
        };
        let fields: Vec<_> = wrong.iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!(fields, ["operation.action", "operation.target", "operation.schedule_time"]);
    }
}
