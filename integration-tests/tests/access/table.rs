//! The table of rights: each method, its roles, and its treatment of targets outside the caller's scope.

use marco_proto::v1::*;
use prost::Message;
use prost_types::FieldMask;

use crate::scene::later;

/// Target of a call, relative to a caller that is limited to `room=in`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Inside,
    Outside,
    Both,
}

pub(crate) const TARGETS: [Target; 3] = [Target::Inside, Target::Outside, Target::Both];

impl Target {
    fn node(self) -> String {
        if self == Self::Outside { "nodes/out-1" } else { "nodes/in-1" }.to_owned()
    }

    fn nodes(self) -> &'static [&'static str] {
        match self {
            Self::Inside => &["in-1"],
            Self::Outside => &["out-1"],
            Self::Both => &["in-1", "out-1"],
        }
    }

    fn schedule(self) -> String {
        match self {
            Self::Inside => "schedules/s-in",
            Self::Outside => "schedules/s-out",
            Self::Both => "schedules/s-both",
        }
        .to_owned()
    }

    fn operation(self, operations: &[String; 3]) -> String {
        match self {
            Self::Inside => operations[0].clone(),
            Self::Outside => operations[1].clone(),
            Self::Both => operations[2].clone(),
        }
    }
}

/// Treatment of a caller that is limited to some nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// The same as for others of its role, because no node is involved.
    Free,
    /// Only the part inside the scope is shown.
    Filtered,
    /// Refused if the whole target is outside. Otherwise only the part inside is shown.
    Any,
    /// Refused if any part of the target is outside.
    All,
}

type Make = fn(Target, &[String; 3]) -> Vec<u8>;

/// A row: method, letters of the roles that may call it (viewer, operator, publisher, admin, node), limit, and request.
pub(crate) type Row = (&'static str, &'static str, Limit, Make);

fn empty(_: Target, _: &[String; 3]) -> Vec<u8> {
    Vec::new()
}

/// A request whose first field is a name.
fn named(name: String) -> Vec<u8> {
    GetNodeRequest { name }.encode_to_vec()
}

fn node(target: Target, _: &[String; 3]) -> Vec<u8> {
    named(target.node())
}

/// Another node than the one that calls, because that one has to call again.
fn quarantine(target: Target, _: &[String; 3]) -> Vec<u8> {
    named(target.node().replace("in-1", "in-2"))
}

fn resolve_node(target: Target, _: &[String; 3]) -> Vec<u8> {
    let decision = resolve_node_request::Decision::Accept.into();
    ResolveNodeRequest { name: target.node(), decision }.encode_to_vec()
}

fn operation(target: Target, operations: &[String; 3]) -> Vec<u8> {
    named(target.operation(operations))
}

/// The execution of the operation on a node. In the operation with both nodes, it is the one inside.
fn execution(target: Target, operations: &[String; 3]) -> Vec<u8> {
    let node = if target == Target::Outside { "out-1" } else { "in-1" };
    named(format!("{}/executions/{node}", target.operation(operations)))
}

fn schedule(target: Target, _: &[String; 3]) -> Vec<u8> {
    named(target.schedule())
}

fn nobody(_: Target, _: &[String; 3]) -> Vec<u8> {
    named("nobody".to_owned())
}

fn create_operation(target: Target, _: &[String; 3]) -> Vec<u8> {
    CreateOperationRequest { operation: Some(later(target.nodes())), request_id: String::new() }.encode_to_vec()
}

fn create_schedule(target: Target, _: &[String; 3]) -> Vec<u8> {
    let operation = Operation { schedule_time: None, ..later(target.nodes()) };
    let schedule = Schedule {
        cron: "0 0 1 1 *".to_owned(),
        time_zone: "UTC".to_owned(),
        operation: Some(operation),
        ..Schedule::default()
    };
    CreateScheduleRequest { schedule: Some(schedule), schedule_id: String::new(), validate_only: false }.encode_to_vec()
}

fn update_schedule(target: Target, _: &[String; 3]) -> Vec<u8> {
    let schedule = Schedule { name: target.schedule(), cron: "0 0 2 1 *".to_owned(), ..Schedule::default() };
    let update_mask = Some(FieldMask { paths: vec!["cron".to_owned()] });
    UpdateScheduleRequest { schedule: Some(schedule), update_mask, validate_only: false }.encode_to_vec()
}

fn preview_schedule(target: Target, _: &[String; 3]) -> Vec<u8> {
    PreviewScheduleRequest { name: target.schedule(), ..PreviewScheduleRequest::default() }.encode_to_vec()
}

fn update_node(target: Target, _: &[String; 3]) -> Vec<u8> {
    let node = Node { name: target.node(), display_name: "x".to_owned(), ..Node::default() };
    let update_mask = Some(FieldMask { paths: vec!["display_name".to_owned()] });
    UpdateNodeRequest { node: Some(node), update_mask }.encode_to_vec()
}

use Limit::{All, Any, Filtered, Free};

pub(crate) const TABLE: &[Row] = &[
    ("AccessService/CreateApiToken", "a", Free, empty),
    ("AccessService/CreateUser", "a", Free, empty),
    ("AccessService/ListApiTokens", "a", Free, empty),
    ("AccessService/ListAuditEvents", "a", Free, empty),
    ("AccessService/ListCertificates", "a", Free, empty),
    ("AccessService/ListUsers", "a", Free, empty),
    ("AccessService/RevokeApiToken", "a", Free, nobody),
    ("AccessService/RevokeCertificate", "a", Free, nobody),
    ("AccessService/RevokeUser", "a", Free, nobody),
    ("AccessService/UpdateUser", "a", Free, empty),
    ("AgentService/Connect", "n", Free, empty),
    ("ArtifactService/DeleteArtifact", "pa", Free, nobody),
    // Images hold secrets such as Wi-Fi keys, so viewers and operators get none.
    ("ArtifactService/DownloadArtifact", "pan", Free, nobody),
    ("ArtifactService/GetArtifact", "vopan", Free, nobody),
    ("ArtifactService/ListArtifacts", "vopa", Free, empty),
    ("ArtifactService/OpenArtifact", "pa", Free, nobody),
    ("ArtifactService/SetDefaultArtifact", "pa", Free, nobody),
    ("ArtifactService/UploadArtifact", "pa", Free, empty),
    // Enrolment has a listener of its own. On this listener no caller may use it.
    ("EnrollmentService/Enroll", "", Free, empty),
    ("EnrollmentService/RenewCertificate", "", Free, empty),
    ("NodeService/ApproveNode", "a", Free, nobody),
    ("NodeService/CreateJoinToken", "a", Free, empty),
    ("NodeService/DeleteNode", "a", Free, nobody),
    ("NodeService/GetNode", "vopan", All, node),
    ("NodeService/ListJoinTokens", "a", Free, empty),
    // A list has no target that could be refused, so it is filtered.
    ("NodeService/ListNodes", "vopa", Filtered, empty),
    ("NodeService/QuarantineNode", "oa", All, quarantine),
    ("NodeService/ResolveNode", "oa", All, resolve_node),
    ("NodeService/RevokeJoinToken", "a", Free, nobody),
    ("NodeService/UpdateNode", "oa", All, update_node),
    ("NodeService/WatchNodes", "vopa", Filtered, empty),
    ("OperationService/AbandonExecution", "oa", All, execution),
    // Steering acts on all nodes of an operation, so all of them must be inside.
    ("OperationService/CancelOperation", "oa", All, operation),
    // Its request begins with the same field as that of `CreateOperation`.
    ("OperationService/CheckOperation", "oa", All, create_operation),
    ("OperationService/CreateOperation", "oa", All, create_operation),
    ("OperationService/ExplainExecution", "vopa", Any, execution),
    ("OperationService/GetExecutionLog", "vopa", Any, execution),
    ("OperationService/GetOperation", "vopa", Any, operation),
    ("OperationService/ListEvents", "vopa", Any, operation),
    ("OperationService/ListExecutions", "vopa", Any, operation),
    ("OperationService/ListOperations", "vopa", Filtered, empty),
    ("OperationService/PauseOperation", "oa", All, operation),
    ("OperationService/ResumeOperation", "oa", All, operation),
    ("OperationService/RetryOperation", "oa", All, operation),
    ("OperationService/WatchOperation", "vopa", Any, operation),
    ("ScheduleService/CreateSchedule", "oa", All, create_schedule),
    ("ScheduleService/DeleteSchedule", "oa", All, schedule),
    ("ScheduleService/GetSchedule", "vopa", Any, schedule),
    ("ScheduleService/ListFires", "vopa", Any, schedule),
    ("ScheduleService/ListSchedules", "vopa", Filtered, empty),
    ("ScheduleService/PauseSchedule", "oa", All, schedule),
    ("ScheduleService/PreviewSchedule", "vopa", Any, preview_schedule),
    ("ScheduleService/ResumeSchedule", "oa", All, schedule),
    ("ScheduleService/RunSchedule", "oa", All, schedule),
    ("ScheduleService/UpdateSchedule", "oa", All, update_schedule),
];
