//! Errors of the API, and how each becomes a gRPC status: the one place that does so.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::identity::ca::WrongClock;
use crate::identity::peer_log::of_peer;
use crate::store::StoreError;

/// Domain of every `google.rpc.ErrorInfo` that the controller sends.
pub(crate) const DOMAIN: &str = marco_proto::names::ERROR_DOMAIN;

/// Longest message, in characters: it travels in a header.
const TEXT_MAX: usize = 500;
/// Whom lines about failed calls are about: whoever makes them fail, together they are rated.
const FAILED: &str = "failed calls";
/// Most wrong fields that are named: they travel in a header too, of which clients take 8 KiB.
const VIOLATIONS_MAX: usize = 20;

/// A field that is wrong, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field, for example `operation.nodes.nodes[1]`.
    pub field: String,
    /// What is wrong and what would be right.
    pub description: String,
}

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The request is wrong whatever the state of the system.
    #[error("{}", summary(.0))]
    Invalid(Vec<Violation>),
    /// What it names does not exist.
    #[error("{message}")]
    NotFound {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The state of what it names does not allow it.
    #[error("{message}")]
    Precondition {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// It collides with something that exists.
    #[error("{message}")]
    AlreadyExists {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// Another call is at it; to be tried again.
    #[error("{message}")]
    Aborted {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// Who calls is not known, or not any more.
    #[error("{message}")]
    Unauthenticated {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// Who calls may not.
    #[error("{message}")]
    Forbidden {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// There is no room.
    #[error("{message}")]
    Exhausted {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// It cannot be done now; to be tried again.
    #[error("{message}")]
    Unavailable {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The database does not answer.
    #[error("{}", not_stored(.0))]
    Store(#[from] StoreError),
    /// A fault of ours, or of the machine.
    #[error("{0}")]
    Internal(String),
}

/// What a caller is told of an error of the database: the failure of a disk by its name, because another try does not heal it.
fn not_stored(error: &StoreError) -> String {
    match error {
        StoreError::Unavailable(cause) if cause.fault().is_some() => {
            format!("the controller's database takes no writes: {cause}")
        }
        _ => "the controller's database does not answer; try again".to_owned(),
    }
}

fn summary(violations: &[Violation]) -> String {
    violations.first().map_or_else(String::new, |first| format!("{}: {}", first.field, first.description))
}

impl ApiError {
    /// The gRPC code that it becomes.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::NotFound { .. } => Code::NotFound,
            Self::Precondition { .. } => Code::FailedPrecondition,
            Self::AlreadyExists { .. } => Code::AlreadyExists,
            Self::Aborted { .. } => Code::Aborted,
            Self::Unauthenticated { .. } => Code::Unauthenticated,
            Self::Forbidden { .. } => Code::PermissionDenied,
            Self::Exhausted { .. } => Code::ResourceExhausted,
            Self::Unavailable { .. } | Self::Store(_) => Code::Unavailable,
            Self::Internal(_) => Code::Internal,
        }
    }

    /// Nothing is signed while the controller's clock is wrong.
    pub(super) fn wrong_clock(wrong: &WrongClock) -> Self {
        Self::Unavailable { reason: "CLOCK_WRONG", message: wrong.to_string() }
    }

    /// One wrong field.
    pub(crate) fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { field: field.into(), description: description.into() }])
    }
}

/// What a caller sent may be in what is said about it: short, and nothing that a terminal or a database takes for more than
/// text.
pub(super) fn short(text: &str) -> String {
    let mut kept: String =
        text.chars().take(TEXT_MAX).map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    if kept.len() < text.len() {
        kept.push('…');
    }
    kept
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let message = short(&error.to_string());
        let code = error.code();
        let reason = match &error {
            ApiError::Invalid(violations) => {
                let mut details = ErrorDetails::new();
                details.set_error_info("INVALID_FIELD", DOMAIN, []);
                for violation in violations.iter().take(VIOLATIONS_MAX) {
                    details.add_bad_request_violation(short(&violation.field), short(&violation.description));
                }
                return Self::with_error_details(code, message, details);
            }
            ApiError::NotFound { reason, .. }
            | ApiError::Precondition { reason, .. }
            | ApiError::AlreadyExists { reason, .. }
            | ApiError::Aborted { reason, .. }
            | ApiError::Unauthenticated { reason, .. }
            | ApiError::Forbidden { reason, .. }
            | ApiError::Exhausted { reason, .. }
            | ApiError::Unavailable { reason, .. } => *reason,
            ApiError::Store(cause) => {
                of_peer!(error, FAILED, error = &*crate::chain(cause), "a call failed in the store");
                "STORE_UNAVAILABLE"
            }
            ApiError::Internal(_) => {
                of_peer!(error, FAILED, error = message, "a call failed");
                "INTERNAL"
            }
        };
        Self::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, []))
    }
}

#[cfg(test)]
mod tests {
    use super::{ApiError, TEXT_MAX, VIOLATIONS_MAX, Violation};
    use tonic::Status;
    use tonic_types::StatusExt as _;

    #[test]
    fn what_a_caller_sent_is_cut_before_it_is_sent_back() {
        let violation = |_| Violation { field: "é".repeat(TEXT_MAX + 1), description: "a\u{1b}[2J\0b".to_owned() };
        let status = Status::from(ApiError::Invalid((0..1000).map(violation).collect()));
        assert!(status.message().chars().count() <= TEXT_MAX + 1, "{}", status.message());
        let named = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(named.len(), VIOLATIONS_MAX);
        assert_eq!(named[0].description, "a [2J b");
        assert!(named[0].field.ends_with('…'));
    }
}
