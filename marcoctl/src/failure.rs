//! Failures of a command: message, hint and exit code.

use std::error::Error;
use std::fmt::Write as _;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::output::clean;

/// A failed command.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The arguments are wrong: a missing file, an invalid address.
    Usage {
        /// Description of the failure.
        message: String,
        /// Next step for the user. Empty: none.
        hint: String,
    },
    /// The controller could not be reached, or the connection was lost for too long.
    Unreachable {
        /// Description of the failure.
        message: String,
        /// Next step for the user.
        hint: String,
    },
    /// The controller rejected the connection because of our certificate.
    ShutOut {
        /// Description of the failure.
        message: String,
        /// Next step for the user.
        hint: String,
    },
    /// The controller refused the call.
    Refused(Box<Status>),
    /// The command ran, but its result is not a success.
    Unsuccessful {
        /// Description of the failure.
        message: String,
        /// Next step for the user. Empty: none.
        hint: String,
    },
    /// `--timeout` passed before the end.
    TimedOut {
        /// Description of the unfinished wait.
        message: String,
        /// Next step for the user.
        hint: String,
    },
    /// An error on this machine.
    Local(anyhow::Error),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Refused(Box::new(status))
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Local(error)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Local(error.into())
    }
}

impl Failure {
    /// Returns the exit code. Scripts rely on these values.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            // A lost connection arrives as a status, too. A controller that cannot work now counts as unreachable: in
            // both cases a script may try again.
            Self::Refused(status) if is_cut(status) => 3,
            // A rejected certificate is a refusal, not an outage: waiting does not help.
            Self::ShutOut { .. } | Self::Refused(_) | Self::Unsuccessful { .. } | Self::Local(_) => 1,
            Self::Usage { .. } => 2,
            Self::Unreachable { .. } => 3,
            Self::TimedOut { .. } => 4,
        }
    }

    /// Returns the message without the hint. Each bad field of a refusal is on a line of its own.
    pub(crate) fn message(&self) -> String {
        match self {
            Self::Refused(status) => describe(status),
            Self::Local(error) => format!("{error:#}"),
            Self::Usage { message, .. }
            | Self::Unreachable { message, .. }
            | Self::ShutOut { message, .. }
            | Self::Unsuccessful { message, .. }
            | Self::TimedOut { message, .. } => message.clone(),
        }
    }

    fn hint(&self) -> &str {
        match self {
            Self::Refused(status) => hint_for(status),
            Self::Local(_) => "",
            Self::Usage { hint, .. }
            | Self::Unreachable { hint, .. }
            | Self::ShutOut { hint, .. }
            | Self::Unsuccessful { hint, .. }
            | Self::TimedOut { hint, .. } => hint,
        }
    }

    /// Returns the text for stderr, ending with a line feed.
    pub(crate) fn report(&self) -> String {
        let (message, hint) = (self.message(), self.hint());
        let mut text = format!("error: {message}\n");
        if !hint.is_empty() {
            text.push_str("hint: ");
            text.push_str(hint);
            text.push('\n');
        }
        text
    }
}

/// Returns true if the status means a lost connection or controller, not a refusal. A status that tonic made locally
/// has the cause as its source; a received one has none.
pub(crate) fn is_cut(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded) || status.source().is_some()
}

/// Joins an error and its causes on one line. A cause that is already part of the text is skipped: many libraries
/// repeat their source in their own text.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// Formats a status: message, reason, and bad fields on lines of their own.
fn describe(status: &Status) -> String {
    // The status was made on this machine. It has causes, but neither a reason nor fields.
    if status.source().is_some() {
        return format!("the connection to the controller broke: {}", clean(&chain(status)));
    }
    // The texts may contain names chosen by other users or nodes, hence `clean`.
    let mut text = if status.message().is_empty() {
        format!("the controller answered {:?} and gave no reason", status.code())
    } else {
        clean(status.message())
    };
    if let Some(info) = status.get_details_error_info() {
        let _ = write!(text, " ({})", clean(&info.reason));
    }
    if let Some(bad) = status.get_details_bad_request() {
        // With a single bad field, the message usually contains its description already.
        let is_said = |description: &str| !description.is_empty() && status.message().contains(description);
        let violations = bad.field_violations;
        let nothing_new = matches!(violations.as_slice(), [one] if is_said(&one.description));
        for violation in violations.iter().filter(|_| !nothing_new) {
            let _ = write!(text, "\n  {}: {}", clean(&violation.field), clean(&violation.description));
        }
    }
    text
}

fn hint_for(status: &Status) -> &'static str {
    if status.source().is_some() {
        // The request may have arrived before the connection broke. A blind repetition could do it twice.
        return "is marco-controller still running? What was asked may have been done; look before you ask again";
    }
    // The controller's own advice is more specific.
    if status.message().contains("marcoctl ") {
        return "";
    }
    match status.code() {
        Code::Unavailable => "the controller is up but cannot work now; try again in a moment",
        Code::Unauthenticated => {
            "choose the folder with your certificate with --certs (or MARCO_CERTS) and the certificate with --identity, or \
             show an API token with --api-token-file"
        }
        Code::PermissionDenied => "another identity may have the role for this: choose it with --identity NAME",
        Code::NotFound => "the `list` commands show what there is, for example `marcoctl nodes list`",
        Code::Unimplemented => {
            "this is not the API's port (1346, unless the controller's --listen differs) but perhaps that of enrolment (1347); \
             or the controller is older than this marcoctl"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use tonic::{Code, Status};
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::Failure;

    #[test]
    fn every_bad_field_is_on_its_own_line() {
        let mut details = ErrorDetails::new();
        details.set_error_info("INVALID_FIELDS", "marco.bootstrap", []);
        details.add_bad_request_violation("operation.nodes", "is empty");
        details.add_bad_request_violation("operation.schedule_time", "is in the past");
        let status = Status::with_error_details(Code::InvalidArgument, "operation.nodes is empty", details);
        let failure = Failure::from(status);
        assert_eq!(
            failure.report(),
            "error: operation.nodes is empty (INVALID_FIELDS)\n  operation.nodes: is empty\n  \
             operation.schedule_time: is in the past\n"
        );
        assert_eq!(failure.exit_code(), 1);
    }

    #[test]
    fn the_only_bad_field_is_not_said_twice() {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("operation.nodes", "is empty");
        let status = Status::with_error_details(Code::InvalidArgument, "operation.nodes: is empty", details);
        assert_eq!(Failure::from(status).report(), "error: operation.nodes: is empty\n");
    }

    #[test]
    fn the_controllers_own_advice_is_enough() {
        let report = Failure::from(Status::not_found("no node x; `marcoctl nodes list` shows all")).report();
        assert!(!report.contains("hint:"), "{report}");
    }

    #[test]
    fn a_controller_that_cannot_work_now_counts_as_not_reachable() {
        let failure = Failure::from(Status::unavailable("the store does not answer"));
        assert_eq!(failure.exit_code(), 3);
    }

    #[test]
    fn what_the_controller_says_cannot_steer_the_terminal() {
        let report = Failure::from(Status::not_found("no \u{1b}[31mnode")).report();
        assert!(!report.contains('\u{1b}'), "{report:?}");
    }
}
