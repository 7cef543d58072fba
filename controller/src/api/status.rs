//! Errors of the API. Only this module turns them into gRPC statuses.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::identity::ca::WrongClock;
use crate::identity::peer_log::of_peer;
use crate::store::StoreError;

/// Domain of every `google.rpc.ErrorInfo` that the controller sends.
pub(crate) const DOMAIN: &str = marco_proto::names::ERROR_DOMAIN;

/// Longest message, in characters: it travels in a header.
const TEXT_MAX: usize = 500;
/// Subject of log lines about failed calls. They share one rate limit, because any caller can cause them.
const FAILED: &str = "failed calls";
/// Largest number of wrong fields in a status. They travel in a header too, of which clients accept 8 KiB.
const VIOLATIONS_MAX: usize = 20;

/// A wrong field with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Path of the field, for example `operation.nodes.nodes[1]`.
    pub field: String,
    /// The defect, and the right form.
    pub description: String,
}

/// The reason why a call fails.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The request is wrong in every state of the system.
    #[error("{}", summary(.0))]
    Invalid(Vec<Violation>),
    /// A named resource does not exist.
    #[error("{message}")]
    NotFound {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The state of the resource does not allow the call.
    #[error("{message}")]
    Precondition {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// It conflicts with a resource that exists.
    #[error("{message}")]
    AlreadyExists {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// Another call is at work on it; the client may retry.
    #[error("{message}")]
    Aborted {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The caller is unknown, or is no longer admitted.
    #[error("{message}")]
    Unauthenticated {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// The caller lacks the permission.
    #[error("{message}")]
    Forbidden {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// A limit is reached.
    #[error("{message}")]
    Exhausted {
        /// For programs.
        reason: &'static str,
        /// For people.
        message: String,
    },
    /// It is not possible now; the client may retry.
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
    /// A fault of the controller or of the machine.
    #[error("{0}")]
    Internal(String),
}

/// The text for an error of the database. A failure of the disk is named, because a retry does not heal it.
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
    /// The gRPC code of the status.
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

    /// An error for a wrong clock, at which nothing is signed.
    pub(super) fn wrong_clock(wrong: &WrongClock) -> Self {
        Self::Unavailable { reason: "CLOCK_WRONG", message: wrong.to_string() }
    }

    /// An error with one wrong field.
    pub(crate) fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { field: field.into(), description: description.into() }])
    }
}

/// Cuts a caller's text for a message, and removes control characters: a terminal or a database may act on them.
pub(super) fn short(text: &str) -> String {
    // By characters, because a cut inside one would be no UTF-8.
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
                // All at once, so that a client corrects a request in one round.
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
            // The causes go into the log. The caller learns at most that the disk failed.
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
