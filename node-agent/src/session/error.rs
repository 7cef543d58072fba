//! The end of a session by an error.

use marco_proto::names::PROTOCOL_VERSION;

use crate::identity::IdentityError;
use crate::journal::JournalError;

/// Error that ended a session.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("no controller can be reached")]
    Connect(#[source] IdentityError),
    #[error("no controller is known")]
    NoController,
    #[error("the controller ended the session")]
    Status(#[source] Box<tonic::Status>),
    #[error("this is not its API (port 1346, unless its --listen differs), but perhaps its enrolment listener")]
    WrongPort,
    #[error("the controller did not say welcome")]
    NoWelcome,
    #[error("no common version of the protocol")]
    NoCommonProtocol(#[source] Box<tonic::Status>),
    #[error(
        "the controller speaks version {0} of the protocol, this agent at most {PROTOCOL_VERSION}; update the agent"
    )]
    OtherProtocol(u32),
    #[error("the controller reads no more")]
    Stuck,
    #[error("the journal cannot be written")]
    Journal(#[from] JournalError),
}

impl From<tonic::Status> for SessionError {
    fn from(status: tonic::Status) -> Self {
        // The enrolment listener has no such service, and speaks the same TLS.
        if status.code() == tonic::Code::Unimplemented {
            return Self::WrongPort;
        }
        // Controllers refuse a session with it for this reason alone. It may heal: the controller is the older one.
        if status.code() == tonic::Code::FailedPrecondition {
            return Self::NoCommonProtocol(Box::new(status));
        }
        Self::Status(Box::new(status))
    }
}
