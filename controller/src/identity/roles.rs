//! Roles, and the one table of who may call what.

use std::fmt;
use std::str::FromStr;

/// What a caller is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Reads everything but secrets.
    Viewer,
    /// Also operates nodes.
    Operator,
    /// Reads, and writes artifacts.
    Publisher,
    /// May everything that a person may.
    Admin,
    /// A Pi: its own session and what its work needs.
    Node,
}

impl Role {
    /// The word that stands in certificates.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Publisher => "publisher",
            Self::Admin => "admin",
            Self::Node => "node",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Not a role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no such role; the roles are viewer, operator, publisher, admin and node")]
pub struct UnknownRole;

impl FromStr for Role {
    type Err = UnknownRole;
    fn from_str(text: &str) -> Result<Self, UnknownRole> {
        [Self::Viewer, Self::Operator, Self::Publisher, Self::Admin, Self::Node]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or(UnknownRole)
    }
}

/// Roles as a list for people.
pub fn names(roles: &[Role]) -> String {
    roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(", ")
}

/// Who may call a method, by its path; empty: nobody.
pub fn allowed(method_path: &str) -> &'static [Role] {
    todo!("{method_path}")
}
