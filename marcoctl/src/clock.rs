//! The only place that reads the time of day.

use chrono::{DateTime, Utc};

/// Returns this machine's time of day. It serves to show ages and to date files on cards, and is never sent to the
/// controller.
#[expect(clippy::disallowed_methods, reason = "this is where `now` comes from")]
pub(crate) fn now() -> DateTime<Utc> {
    Utc::now()
}
