//! The one place where the time of day is asked for.

use chrono::{DateTime, Utc};

/// The time of day by this machine's clock: only to show how long ago things were, never sent to the controller.
#[expect(clippy::disallowed_methods, reason = "this is where `now` comes from")]
pub(crate) fn now() -> DateTime<Utc> {
    Utc::now()
}
