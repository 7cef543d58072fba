//! Roles, and the one table of the methods that each may call.

use std::fmt;
use std::str::FromStr;

use Role::{Admin, Controller, Node, Operator, Publisher, Viewer};

/// A caller's role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Reads everything but secrets.
    Viewer,
    /// Also operates nodes.
    Operator,
    /// Reads, and writes artifacts.
    Publisher,
    /// May do everything that a person may.
    Admin,
    /// A Pi: its own session and what its work needs.
    Node,
    /// Another controller that shares the database: fetches bytes that it lacks.
    Controller,
}

impl Role {
    /// The role's word in certificates.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Publisher => "publisher",
            Self::Admin => "admin",
            Self::Node => "node",
            Self::Controller => "controller",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text is no role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no such role; the roles are viewer, operator, publisher, admin, node and controller")]
pub struct UnknownRole;

impl FromStr for Role {
    type Err = UnknownRole;
    fn from_str(text: &str) -> Result<Self, UnknownRole> {
        [Self::Viewer, Self::Operator, Self::Publisher, Self::Admin, Self::Node, Self::Controller]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or(UnknownRole)
    }
}

/// Roles as a list for people.
pub fn names(roles: &[Role]) -> String {
    if roles.is_empty() {
        return "none".to_owned();
    }
    roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ")
}

const ANY: &[Role] = &[Viewer, Operator, Publisher, Admin, Node];
/// Controllers also ask each other for their health.
const EVERY: &[Role] = &[Viewer, Operator, Publisher, Admin, Node, Controller];
const PEOPLE: &[Role] = &[Viewer, Operator, Publisher, Admin];
const OPERATORS: &[Role] = &[Operator, Admin];
const PUBLISHERS: &[Role] = &[Publisher, Admin];
const ADMINS: &[Role] = &[Admin];

/// Fetches bytes. The file mirror admits its requests by this method's row too.
pub const DOWNLOAD: &str = "/marco.bootstrap.v1.ArtifactService/DownloadArtifact";

/// Roles that may call each method. `EnrollmentService` has a listener of its own, which admits by tokens and
/// signatures. Methods not listed are denied.
const TABLE: &[(&str, &[Role])] = &[
    ("/grpc.health.v1.Health/Check", EVERY),
    ("/grpc.health.v1.Health/List", ANY),
    ("/grpc.health.v1.Health/Watch", ANY),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", ANY),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", ANY),
    ("/marco.bootstrap.v1.AccessService/CreateApiToken", ADMINS),
    ("/marco.bootstrap.v1.AccessService/CreateUser", ADMINS),
    ("/marco.bootstrap.v1.AccessService/ListApiTokens", ADMINS),
    ("/marco.bootstrap.v1.AccessService/ListAuditEvents", ADMINS),
    ("/marco.bootstrap.v1.AccessService/ListCertificates", ADMINS),
    ("/marco.bootstrap.v1.AccessService/ListUsers", ADMINS),
    ("/marco.bootstrap.v1.AccessService/RevokeApiToken", ADMINS),
    ("/marco.bootstrap.v1.AccessService/RevokeCertificate", ADMINS),
    ("/marco.bootstrap.v1.AccessService/RevokeUser", ADMINS),
    ("/marco.bootstrap.v1.AccessService/UpdateUser", ADMINS),
    ("/marco.bootstrap.v1.AgentService/Connect", &[Node]),
    ("/marco.bootstrap.v1.ArtifactService/DeleteArtifact", PUBLISHERS),
    (DOWNLOAD, &[Publisher, Admin, Node, Controller]),
    ("/marco.bootstrap.v1.ArtifactService/GetArtifact", ANY),
    ("/marco.bootstrap.v1.ArtifactService/ListArtifacts", PEOPLE),
    ("/marco.bootstrap.v1.ArtifactService/OpenArtifact", PUBLISHERS),
    ("/marco.bootstrap.v1.ArtifactService/SetDefaultArtifact", PUBLISHERS),
    ("/marco.bootstrap.v1.ArtifactService/UploadArtifact", PUBLISHERS),
    ("/marco.bootstrap.v1.NodeService/ApproveNode", ADMINS),
    ("/marco.bootstrap.v1.NodeService/CreateJoinToken", ADMINS),
    ("/marco.bootstrap.v1.NodeService/DeleteNode", ADMINS),
    // A node may read only itself; the handler checks that.
    ("/marco.bootstrap.v1.NodeService/GetNode", ANY),
    ("/marco.bootstrap.v1.NodeService/ListJoinTokens", ADMINS),
    ("/marco.bootstrap.v1.NodeService/ListNodes", PEOPLE),
    ("/marco.bootstrap.v1.NodeService/QuarantineNode", OPERATORS),
    ("/marco.bootstrap.v1.NodeService/ResolveNode", OPERATORS),
    ("/marco.bootstrap.v1.NodeService/RevokeJoinToken", ADMINS),
    ("/marco.bootstrap.v1.NodeService/UpdateNode", OPERATORS),
    ("/marco.bootstrap.v1.NodeService/WatchNodes", PEOPLE),
    ("/marco.bootstrap.v1.OperationService/AbandonExecution", OPERATORS),
    ("/marco.bootstrap.v1.OperationService/CancelOperation", OPERATORS),
    ("/marco.bootstrap.v1.OperationService/CheckOperation", OPERATORS),
    ("/marco.bootstrap.v1.OperationService/CreateOperation", OPERATORS),
    ("/marco.bootstrap.v1.OperationService/ExplainExecution", PEOPLE),
    ("/marco.bootstrap.v1.OperationService/GetExecutionLog", PEOPLE),
    ("/marco.bootstrap.v1.OperationService/GetOperation", PEOPLE),
    ("/marco.bootstrap.v1.OperationService/ListEvents", PEOPLE),
    ("/marco.bootstrap.v1.OperationService/ListExecutions", PEOPLE),
    ("/marco.bootstrap.v1.OperationService/ListOperations", PEOPLE),
    ("/marco.bootstrap.v1.OperationService/PauseOperation", OPERATORS),
    ("/marco.bootstrap.v1.OperationService/ResumeOperation", OPERATORS),
    ("/marco.bootstrap.v1.OperationService/RetryOperation", OPERATORS),
    ("/marco.bootstrap.v1.OperationService/WatchOperation", PEOPLE),
    ("/marco.bootstrap.v1.ScheduleService/CreateSchedule", OPERATORS),
    ("/marco.bootstrap.v1.ScheduleService/DeleteSchedule", OPERATORS),
    ("/marco.bootstrap.v1.ScheduleService/GetSchedule", PEOPLE),
    ("/marco.bootstrap.v1.ScheduleService/ListFires", PEOPLE),
    ("/marco.bootstrap.v1.ScheduleService/ListSchedules", PEOPLE),
    ("/marco.bootstrap.v1.ScheduleService/PauseSchedule", OPERATORS),
    ("/marco.bootstrap.v1.ScheduleService/PreviewSchedule", PEOPLE),
    ("/marco.bootstrap.v1.ScheduleService/ResumeSchedule", OPERATORS),
    ("/marco.bootstrap.v1.ScheduleService/RunSchedule", OPERATORS),
    ("/marco.bootstrap.v1.ScheduleService/UpdateSchedule", OPERATORS),
];

/// Prefixes of the names of methods that only read. Every other method counts as a change.
const READS: [&str; 7] = ["Get", "List", "Watch", "Explain", "Preview", "Check", "Download"];
/// Prefix of the API's own methods. The audit shows them without it.
const OURS: &str = "/marco.bootstrap.v1.";

/// True if a call of the method is recorded even when it is allowed.
pub fn changes_something(method_path: &str) -> bool {
    // By the name, so that a new method is recorded unless its name says that it only reads.
    let name = method_path.rsplit('/').next().unwrap_or_default();
    // Health and reflection change nothing.
    method_path.starts_with(OURS) && !is_session(method_path) && !READS.iter().any(|verb| name.starts_with(verb))
}

/// True if the call runs as a task of its own, which goes on when its caller leaves. An upload does not: it needs its
/// caller's bytes, changes nothing before they are complete, and its handler keeps and records the result.
pub fn runs_to_its_end(method_path: &str) -> bool {
    changes_something(method_path) && method_path != "/marco.bootstrap.v1.ArtifactService/UploadArtifact"
}

/// True if the client sends more than one message.
pub fn is_streamed(method_path: &str) -> bool {
    is_session(method_path)
        || method_path == "/marco.bootstrap.v1.ArtifactService/UploadArtifact"
        || method_path.starts_with("/grpc.reflection.")
}

/// True if it is a node's session, which a sweep of its own checks.
pub fn is_session(method_path: &str) -> bool {
    method_path == "/marco.bootstrap.v1.AgentService/Connect"
}

/// A method's name in the audit.
pub fn short(method_path: &str) -> &str {
    let name =
        if method_path.starts_with(OURS) { method_path.rsplit('/').next() } else { method_path.strip_prefix('/') };
    name.unwrap_or(method_path)
}

/// Roles that may call a method, by its path; empty: none.
pub fn allowed(method_path: &str) -> &'static [Role] {
    // Exact paths only: a prefix would also admit methods that are added later.
    TABLE.iter().find(|(path, _)| *path == method_path).map_or(&[], |(_, roles)| roles)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::{Role, TABLE, allowed};

    /// Paths of the API's methods, each with the comment that says who may call it.
    fn methods() -> Vec<(String, String)> {
        let set = FileDescriptorSet::decode(marco_proto::DESCRIPTOR_SET).unwrap();
        let files = set.file.iter().filter(|file| file.package() == "marco.bootstrap.v1");
        let mut methods = Vec::new();
        for file in files {
            for (s, service) in file.service.iter().enumerate() {
                for (m, method) in service.method.iter().enumerate() {
                    let path = [6, i32::try_from(s).unwrap(), 2, i32::try_from(m).unwrap()];
                    let info = file.source_code_info.as_ref();
                    let comment = info.and_then(|info| info.location.iter().find(|place| place.path == path));
                    let comment =
                        comment.map(|place| place.leading_comments().split_whitespace().collect::<Vec<_>>().join(" "));
                    let path = format!("/marco.bootstrap.v1.{}/{}", service.name(), method.name());
                    methods.push((path, comment.unwrap_or_default()));
                }
            }
        }
        methods
    }

    #[test]
    fn every_method_of_the_api_has_a_row_and_no_row_is_left_over() {
        let api: BTreeSet<String> =
            methods().into_iter().map(|(path, _)| path).filter(|path| !path.contains(".EnrollmentService/")).collect();
        let rows: BTreeSet<String> =
            TABLE.iter().map(|(path, _)| (*path).to_owned()).filter(|path| path.contains("marco.bootstrap")).collect();
        assert_eq!(rows, api);
        assert_eq!(TABLE.iter().map(|(path, _)| path).collect::<BTreeSet<_>>().len(), TABLE.len());
    }

    #[test]
    fn every_row_says_for_every_role_what_the_methods_comment_says() {
        let mut compared = 0;
        for (path, comment) in methods() {
            let Some((_, callers)) = comment.split_once("Callers: ") else { continue };
            if path.contains(".EnrollmentService/") {
                continue;
            }
            for role in [Role::Viewer, Role::Operator, Role::Publisher, Role::Admin, Role::Node, Role::Controller] {
                let named = callers.split(|c: char| !c.is_alphanumeric()).any(|word| word == role.as_str());
                assert_eq!(allowed(&path).contains(&role), named, "{path} for {role}: {callers}");
                compared += 1;
            }
        }
        assert_eq!(compared, 6 * TABLE.iter().filter(|(path, _)| path.contains("marco.bootstrap")).count());
    }

    #[test]
    fn what_changes_something_is_told_by_its_name() {
        for (name, changes) in
            [("GetNode", false), ("CheckOperation", false), ("ApproveNode", true), ("RunSchedule", true)]
        {
            assert_eq!(super::changes_something(&format!("/marco.bootstrap.v1.X/{name}")), changes, "{name}");
        }
        assert!(!super::changes_something("/grpc.health.v1.Health/Check"));
        assert_eq!(super::short("/marco.bootstrap.v1.NodeService/GetNode"), "GetNode");
        assert_eq!(super::short("/grpc.health.v1.Health/Check"), "grpc.health.v1.Health/Check");
    }

    #[test]
    fn what_is_not_in_the_table_nobody_may_call() {
        for path in ["", "/", "/marco.bootstrap.v1.NodeService/Explode", "/marco.bootstrap.v1.EnrollmentService/Enroll"]
        {
            assert!(allowed(path).is_empty());
        }
    }

    #[test]
    fn a_role_is_read_back_from_its_word() {
        for role in [Role::Viewer, Role::Operator, Role::Publisher, Role::Admin, Role::Node, Role::Controller] {
            assert_eq!(role.as_str().parse(), Ok(role));
        }
        assert!("root".parse::<Role>().is_err());
    }
}
