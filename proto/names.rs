//! Resource names, ports and names in TLS: what controller, agent and command line must agree on.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Port of the API and of the agents' streams.
pub const API_PORT: u16 = 1346;
/// Port of the enrolment listener.
pub const ENROLL_PORT: u16 = 1347;
/// Port of the file mirror.
pub const MIRROR_PORT: u16 = 1345;
/// Port of the metrics, on the loopback interface.
pub const METRICS_PORT: u16 = 9346;
/// The DNS name in every controller's certificate. Agents verify it, independent of the address that they dial.
pub const CONTROLLER_TLS_NAME: &str = "controller.marco.internal";
/// Longest id, in bytes.
pub const ID_MAX: usize = 128;
/// Longest id of a node, in bytes: it becomes a host name, which is a label of DNS (RFC 1035, section 2.3.4).
pub const NODE_ID_MAX: usize = 63;
/// Bytes of an artifact's chunk, the unit in which downloads are checked.
pub const CHUNK_SIZE: u32 = 4 * 1024 * 1024;
/// Bytes of one message of an upload or download: large enough to be cheap, small enough not to hold up the stream.
pub const MESSAGE_SIZE: usize = 256 * 1024;
/// Most bytes of a node's log that go with a report: a few hundred lines, and little beside the largest message (1
/// MiB).
pub const LOG_MAX: usize = 32 * 1024;
/// `google.rpc.ErrorInfo.domain` of every error.
pub const ERROR_DOMAIN: &str = "marco.bootstrap";
/// Newest version of the session protocol, and its first with a verdict that is a message of its own.
pub const PROTOCOL_VERSION: u32 = 2;
/// Oldest version of the session protocol that is served: in it the acknowledgement of VERIFYING is the verdict. Hello
/// names it in `protocol_version`, the only field that a controller of that version reads.
pub const FIRST_PROTOCOL: u32 = 1;
/// Versions of the session protocol that controller and agent speak, oldest first (`Hello.protocol_versions`).
pub const SERVED_PROTOCOLS: [u32; 2] = [FIRST_PROTOCOL, PROTOCOL_VERSION];
/// Time for which a new system waits for the controller's verdict before it gives way to the installer, and the controller
/// waits for what it then says. Longer than a controller's or a switch's restart, since the installer writes the card again.
pub const VERDICT_DEADLINE: Duration = Duration::from_secs(10 * 60);

/// The text is no id or name of this kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidName {
    text: String,
    wanted: &'static str,
}

impl fmt::Display for InvalidName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The text may be anything that a caller sent.
        let shown: String = self.text.chars().take(80).collect();
        write!(f, "{shown:?} is not {}", self.wanted)
    }
}

impl std::error::Error for InvalidName {}

fn is_id(text: &str, longest: usize) -> bool {
    // Ids become parts of paths, host names and commands, so they contain nothing that needs quoting.
    text.len() <= longest
        && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $collection:literal, $wanted:literal) => {
        id!($(#[$doc])* $name, $collection, ID_MAX, $wanted);
    };
    ($(#[$doc:meta])* $name:ident, $collection:literal, $longest:expr, $wanted:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Reads an id or a full resource name.
            pub fn parse(text: &str) -> Result<Self, InvalidName> {
                // Both forms, because people type ids and programs pass names on.
                let id = text.strip_prefix(concat!($collection, "/")).unwrap_or(text);
                if is_id(id, $longest) {
                    Ok(Self(id.to_owned()))
                } else {
                    Err(InvalidName { text: text.to_owned(), wanted: $wanted })
                }
            }

            /// The bare id.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The full resource name.
            pub fn name(&self) -> String {
                format!(concat!($collection, "/{}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                Self::parse(text)
            }
        }
    };
}

id!(
    /// Id of a node; its name is `nodes/{id}`.
    NodeId, "nodes", NODE_ID_MAX,
    "a node name: nodes/ID, where ID is 1 to 63 letters, digits, dots, underscores or hyphens and begins with a letter or digit"
);
id!(
    /// Id of an operation, a UUID of version 7; its name is `operations/{id}`.
    OperationId, "operations",
    "an operation name: operations/UUID"
);
id!(
    /// Id of an artifact; its name is `artifacts/{id}`.
    ArtifactId, "artifacts",
    "an artifact name: artifacts/ID, where ID is 1 to 128 letters, digits, dots, underscores or hyphens and begins with a letter or digit"
);
id!(
    /// Id of a schedule; its name is `schedules/{id}`.
    ScheduleId, "schedules",
    "a schedule name: schedules/ID, where ID is 1 to 128 letters, digits, dots, underscores or hyphens and begins with a letter or digit"
);
id!(
    /// Id of a join token; its name is `joinTokens/{id}`.
    JoinTokenId, "joinTokens",
    "a join token name: joinTokens/ID"
);

id!(
    /// Id of a user; its name is `users/{id}`.
    UserId, "users",
    "a user name: users/ID, where ID is 1 to 128 letters, digits, dots, underscores or hyphens and begins with a letter or digit"
);
id!(
    /// Id of an API token; its name is `apiTokens/{id}`.
    ApiTokenId, "apiTokens",
    "an API token name: apiTokens/ID, where ID is 1 to 128 letters, digits, dots, underscores or hyphens and begins with a letter or digit"
);
id!(
    /// Serial number of a certificate, hexadecimal; its name is `certificates/{serial}`.
    CertificateId, "certificates",
    "a certificate name: certificates/SERIAL"
);

/// An execution: an operation on a node. Its name is `operations/{id}/executions/{node id}`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExecutionId {
    /// The operation.
    pub operation: OperationId,
    /// The node.
    pub node: NodeId,
}

impl ExecutionId {
    /// Reads a full resource name.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let invalid =
            || InvalidName { text: text.to_owned(), wanted: "an execution name: operations/UUID/executions/NODE" };
        let rest = text.strip_prefix("operations/").ok_or_else(invalid)?;
        let (operation, node) = rest.split_once("/executions/").ok_or_else(invalid)?;
        Ok(Self {
            operation: OperationId::parse(operation).map_err(|_| invalid())?,
            node: NodeId::parse(node).map_err(|_| invalid())?,
        })
    }

    /// The full resource name.
    pub fn name(&self) -> String {
        format!("operations/{}/executions/{}", self.operation, self.node)
    }
}

impl fmt::Display for ExecutionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "operations/{}/executions/{}", self.operation, self.node)
    }
}

impl FromStr for ExecutionId {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::parse(text)
    }
}

#[cfg(test)]
mod tests {
    use super::{ArtifactId, ExecutionId, NodeId};

    #[test]
    fn an_id_and_its_full_name_are_the_same() {
        assert_eq!(NodeId::parse("pi-01").unwrap(), NodeId::parse("nodes/pi-01").unwrap());
        assert_eq!(NodeId::parse("pi-01").unwrap().name(), "nodes/pi-01");
    }

    #[test]
    fn what_could_leave_a_path_or_a_line_is_no_id() {
        for bad in ["", "nodes/", ".", "..", "-x", "a/b", "nodes/nodes/a", "a b", "a\n", "a\0", "é", &"x".repeat(64)] {
            assert!(NodeId::parse(bad).is_err(), "{bad:?} was taken");
        }
        assert!(NodeId::parse(&"x".repeat(63)).is_ok(), "a label of DNS");
        assert!(ArtifactId::parse(&"x".repeat(128)).is_ok() && ArtifactId::parse(&"x".repeat(129)).is_err());
    }

    #[test]
    fn an_execution_is_read_back_from_its_name() {
        let name = "operations/0198a6e0-0000-7000-8000-000000000001/executions/pi-01";
        assert_eq!(ExecutionId::parse(name).unwrap().name(), name);
        assert!(ExecutionId::parse("operations/x/executions/").is_err());
        assert!(ExecutionId::parse("pi-01").is_err());
    }
}
