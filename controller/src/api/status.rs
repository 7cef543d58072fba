//! Errors of the API, and how each becomes a gRPC status: the one place that does so.

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::store::StoreError;

/// Domain of every `google.rpc.ErrorInfo` that the controller sends.
pub(crate) const DOMAIN: &str = "marco.bootstrap";

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
    /// The database does not answer.
    #[error("the controller's database does not answer; try again")]
    Store(#[from] StoreError),
    /// A fault of ours, or of the machine.
    #[error("{0}")]
    Internal(String),
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
            Self::Store(_) => Code::Unavailable,
            Self::Internal(_) => Code::Internal,
        }
    }

    /// One wrong field.
    pub(crate) fn invalid(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { field: field.into(), description: description.into() }])
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let message = error.to_string();
        let code = error.code();
        let reason = match &error {
            ApiError::Invalid(violations) => {
                let mut details = ErrorDetails::new();
                details.set_error_info("INVALID_FIELD", DOMAIN, []);
                for violation in violations {
                    details.add_bad_request_violation(&violation.field, &violation.description);
                }
                return Self::with_error_details(code, message, details);
            }
            ApiError::NotFound { reason, .. }
            | ApiError::Precondition { reason, .. }
            | ApiError::AlreadyExists { reason, .. }
            | ApiError::Aborted { reason, .. }
            | ApiError::Unauthenticated { reason, .. }
            | ApiError::Forbidden { reason, .. }
            | ApiError::Exhausted { reason, .. } => *reason,
            ApiError::Store(cause) => {
                tracing::error!(error = &*crate::chain(cause), "a call failed in the store");
                "STORE_UNAVAILABLE"
            }
            ApiError::Internal(_) => {
                tracing::error!(error = message, "a call failed");
                "INTERNAL"
            }
        };
        Self::with_error_details(code, message, ErrorDetails::with_error_info(reason, DOMAIN, []))
    }
}
