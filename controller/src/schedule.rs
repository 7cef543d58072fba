//! When a schedule fires, and what becomes of a fire that comes late or too soon. Pure: no clock, no store, no wire.
//!
//! A [`Recurrence`] is a cron expression read in an IANA time zone. The expression is matched against the zone's wall
//! clock, which a change to or from daylight saving time moves:
//!
//! - An expression whose hour field starts with `*` follows elapsed time: it fires at every instant whose local time
//!   matches, so twice in an hour that comes twice, and not at all in one that is left out.
//! - Any other fires once for each local time: at the first of two, and once at the end of a gap for everything that
//!   the gap left out.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, NaiveDateTime, Offset as _, SubsecRound as _, TimeDelta, TimeZone as _, Utc};
use chrono_tz::Tz;
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};

mod due;
mod policy;
mod window;

pub use due::Due;
pub use policy::{FireOutcome, MissedFire, Overlap, jitter};
pub use window::MaintenanceWindow;

/// No change of a zone's offset moves the clock further than this, and no offset is larger.
const LARGEST_OFFSET: TimeDelta = TimeDelta::hours(16);
/// Two changes of a zone's offset are never closer than this.
const OFFSETS_HOLD: TimeDelta = TimeDelta::days(1);

/// Why a recurrence is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecurrenceError {
    /// The expression.
    #[error("{cron:?} is not a cron expression: {why}")]
    Cron {
        /// As it was given.
        cron: String,
        /// What is wrong with it.
        why: String,
    },
    /// The zone.
    #[error("{0:?} is not a time zone of the IANA database; an example is Europe/Madrid")]
    Zone(String),
}

/// A cron expression in a time zone.
#[derive(Debug, Clone)]
pub struct Recurrence {
    cron: Cron,
    text: String,
    zone: Tz,
    follows_elapsed_time: bool,
}

impl fmt::Display for Recurrence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.text, self.zone.name())
    }
}

/// The IANA time zone of this name; the empty name is UTC.
///
/// # Errors
/// When there is none.
pub fn zone(name: &str) -> Result<Tz, RecurrenceError> {
    if name.is_empty() {
        return Ok(Tz::UTC);
    }
    Tz::from_str(name).map_err(|_| RecurrenceError::Zone(name.to_owned()))
}

impl Recurrence {
    /// Reads an expression of 5 fields (minute, hour, day of month, month, day of week) or 6 (seconds first), and a
    /// zone; the empty zone is UTC.
    ///
    /// # Errors
    /// When one of them is none.
    pub fn parse(cron: &str, zone_name: &str) -> Result<Self, RecurrenceError> {
        let zone = zone(zone_name)?;
        let refused = |why: String| RecurrenceError::Cron { cron: cron.to_owned(), why };
        let fields: Vec<&str> = cron.split_whitespace().collect();
        let hour = match fields.as_slice() {
            [_, hour, _, _, _] | [_, _, hour, _, _, _] => *hour,
            other => {
                return Err(refused(format!(
                    "it has {} field{}; it needs 5 (minute, hour, day of month, month, day of week), or 6 with the \
                     seconds first",
                    other.len(),
                    if other.len() == 1 { "" } else { "s" },
                )));
            }
        };
        let text = fields.join(" ");
        let parser = CronParser::builder().seconds(Seconds::Optional).year(Year::Disallowed).build();
        let cron = parser.parse(&text).map_err(|error| refused(error.to_string()))?;
        Ok(Self { cron, follows_elapsed_time: hour.starts_with('*'), text, zone })
    }

    /// The expression, its fields apart by one space.
    pub fn cron(&self) -> &str {
        &self.text
    }

    /// The zone.
    pub fn zone(&self) -> Tz {
        self.zone
    }

    /// An instant as the zone's wall clock shows it.
    pub fn local(&self, instant: DateTime<Utc>) -> DateTime<Tz> {
        instant.with_timezone(&self.zone)
    }

    /// The first fire later than `after`; `None` when there is none.
    pub fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let after = after.trunc_subsecs(0);
        if self.follows_elapsed_time { self.next_instant(after) } else { self.next_local_time(after) }
    }

    /// The fires later than `after`, earliest first.
    pub fn fires_after(&self, after: DateTime<Utc>) -> impl Iterator<Item = DateTime<Utc>> + '_ {
        std::iter::successors(self.next_after(after), |fire| self.next_after(*fire))
    }

    /// The first local time that matches, as an instant. Later local times are never earlier instants, so those that
    /// are over (the second pass through an overlap) are skipped.
    fn next_local_time(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let mut local = self.wall_clock(after)?;
        loop {
            local = self.next_match(local, false)?;
            let instant = self.instant_of(local)?;
            if instant > after {
                return Some(instant);
            }
        }
    }

    /// The first instant whose local time matches: a search under one offset, and on from where the offset changes.
    fn next_instant(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let mut from = after;
        let mut inclusive = false;
        loop {
            let offset = self.offset(from);
            let local = self.next_match(from.naive_utc().checked_add_signed(offset)?, inclusive)?;
            let instant = local.checked_sub_signed(offset)?.and_utc();
            match self.next_change(from, instant)? {
                None => return Some(instant),
                Some(change) => (from, inclusive) = (change, true),
            }
        }
    }

    /// The next matching time of a wall clock that is never moved.
    fn next_match(&self, local: NaiveDateTime, inclusive: bool) -> Option<NaiveDateTime> {
        self.cron.find_next_occurrence(&local.and_utc(), inclusive).ok().map(|found| found.naive_utc())
    }

    /// When the wall clock shows this: the first time, or the end of the gap that leaves it out.
    fn instant_of(&self, local: NaiveDateTime) -> Option<DateTime<Utc>> {
        if let Some(first) = self.zone.from_local_datetime(&local).earliest() {
            return Some(first.with_timezone(&Utc));
        }
        let before = local.and_utc().checked_sub_signed(LARGEST_OFFSET)?;
        let after = local.and_utc().checked_add_signed(LARGEST_OFFSET)?;
        first_in(before, after, |instant| self.wall_clock(instant).is_some_and(|shown| shown > local))
    }

    /// The first instant in (`from`, `to`] at which the zone has another offset than at `from`.
    #[allow(clippy::option_option, reason = "no change, and no such time")]
    fn next_change(&self, from: DateTime<Utc>, to: DateTime<Utc>) -> Option<Option<DateTime<Utc>>> {
        let offset = self.offset(from);
        let mut held = from;
        while held < to {
            let next = held.checked_add_signed(OFFSETS_HOLD)?.min(to);
            if self.offset(next) != offset {
                return first_in(held, next, |instant| self.offset(instant) != offset).map(Some);
            }
            held = next;
        }
        Some(None)
    }

    fn wall_clock(&self, instant: DateTime<Utc>) -> Option<NaiveDateTime> {
        instant.naive_utc().checked_add_signed(self.offset(instant))
    }

    fn offset(&self, instant: DateTime<Utc>) -> TimeDelta {
        let offset = self.zone.offset_from_utc_datetime(&instant.naive_utc());
        TimeDelta::seconds(i64::from(offset.fix().local_minus_utc()))
    }
}

/// The first second after `before`, and not after `after`, of which `holds`: it does of `after`, and of everything
/// between the two from there on.
fn first_in(
    mut before: DateTime<Utc>,
    mut after: DateTime<Utc>,
    holds: impl Fn(DateTime<Utc>) -> bool,
) -> Option<DateTime<Utc>> {
    while after - before > TimeDelta::seconds(1) {
        let middle = before.checked_add_signed(TimeDelta::seconds((after - before).num_seconds() / 2))?;
        if holds(middle) { after = middle } else { before = middle }
    }
    Some(after)
}

#[cfg(test)]
mod tests;
