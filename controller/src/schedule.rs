//! The times of a schedule, and the handling of times that come late or too soon. Pure: no clock, no store, no wire.
//!
//! A [`Recurrence`] is a cron expression read in an IANA time zone. The expression is matched against the zone's wall
//! clock, which a change to or from daylight saving time moves:
//!
//! - An expression whose hour field starts with `*` follows elapsed time: it fires at every instant whose local time
//!   matches, so twice in an hour that comes twice, and not at all in one that is left out.
//! - Any other fires once for each local time: at the first of two, and once at the end of a gap for everything that
//!   the gap left out.

#![cfg_attr(not(test), warn(clippy::arithmetic_side_effects))]

use std::fmt;

use chrono::{DateTime, FixedOffset, NaiveDateTime, SubsecRound as _, TimeDelta, Utc};
use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};

use crate::calendar;
use syntax::Expression;

mod due;
mod policy;
mod syntax;
mod window;
mod words;
mod zone;

pub use due::Due;
pub use policy::{FireOutcome, MissedFire, Overlap, jitter, operation_uuid};
pub use window::MaintenanceWindow;
pub use zone::{Tzdata, Zone};

/// Largest offset of a zone. No change of an offset moves the clock further.
const LARGEST_OFFSET: TimeDelta = TimeDelta::hours(16);
/// Shortest time between two changes of a zone's offset.
const OFFSETS_HOLD: TimeDelta = TimeDelta::days(1);

/// Longest part of a caller's text that an error shows, in characters.
const SHOWN: usize = 80;

/// The reason why a recurrence is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecurrenceError {
    /// The text is no cron expression.
    #[error("{cron:?} is not a cron expression: {why}")]
    Cron {
        /// The text as it was given, shortened.
        cron: String,
        /// The defect.
        why: String,
    },
    /// The name is no time zone.
    #[error("{name:?} is not a time zone of the IANA database; {advice}", name = .0, advice = zone::advice(.0))]
    Zone(String),
    /// The expression is valid, but no date matches it.
    #[error("{0:?} never fires: no date matches it")]
    Never(String),
}

/// A cron expression in a time zone.
#[derive(Debug, Clone)]
pub struct Recurrence {
    cron: Cron,
    expression: Expression,
    text: String,
    zone: Zone,
    follows_elapsed_time: bool,
}

impl fmt::Display for Recurrence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.text, self.zone.name())
    }
}

impl Recurrence {
    /// Reads an expression of 5 fields (minute, hour, day of month, month, day of week) or 6 (seconds first), and a
    /// zone; an empty zone is UTC.
    ///
    /// # Errors
    /// Returns an error if one of them is invalid.
    pub fn parse(cron: &str, zone_name: &str) -> Result<Self, RecurrenceError> {
        let zone = Zone::parse(zone_name)?;
        // Shortened, because the text is a caller's and goes into messages and logs.
        let refused = |why: String| RecurrenceError::Cron { cron: shortened(cron), why };
        let expression = Expression::parse(cron).map_err(refused)?;
        let fields: Vec<&str> = cron.split_whitespace().collect();
        // From the right, because the seconds in front are optional.
        let hour = fields.iter().rev().nth(3).copied().unwrap_or_default();
        let text = fields.join(" ");
        let parser = CronParser::builder()
            .seconds(Seconds::Required)
            .year(Year::Disallowed)
            // croner's own rule for the two day fields is another one.
            .dom_and_dow(expression.both_days)
            .build();
        let cron = parser.parse(&expression.spelled_out()).map_err(|error| refused(error.to_string()))?;
        Ok(Self { cron, expression, follows_elapsed_time: hour.starts_with('*'), text, zone })
    }

    /// The first fire later than `after`.
    ///
    /// # Errors
    /// Returns an error if there is none.
    pub fn must_fire(&self, after: DateTime<Utc>) -> Result<DateTime<Utc>, RecurrenceError> {
        self.next_after(after).ok_or_else(|| RecurrenceError::Never(self.text.clone()))
    }

    /// The expression in words: `at 03:00, on Monday`.
    pub fn words(&self) -> String {
        self.expression.to_string()
    }

    /// The expression, with one space between its fields.
    pub fn cron(&self) -> &str {
        &self.text
    }

    /// The zone.
    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    /// An instant as the zone's wall clock shows it.
    pub fn local(&self, instant: DateTime<Utc>) -> DateTime<FixedOffset> {
        self.zone.local(instant)
    }

    /// The first fire later than `after`; `None`: there is none up to the end of the calendar. Fires are at whole
    /// seconds.
    pub fn next_after(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let whole = calendar::bounded(after).trunc_subsecs(0);
        let found = if self.follows_elapsed_time { self.next_instant(whole) } else { self.next_local_time(whole) };
        // Walks over fires end only because each is later than the one before.
        found.filter(|fire| *fire > after && *fire <= calendar::END_OF_TIME)
    }

    /// The fires later than `after`, earliest first.
    pub fn fires_after(&self, after: DateTime<Utc>) -> impl Iterator<Item = DateTime<Utc>> + '_ {
        std::iter::successors(self.next_after(after), |fire| self.next_after(*fire))
    }

    /// The first local time that matches, as an instant. Later local times are never earlier instants, so past ones
    /// (the second pass through an overlap) are skipped.
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

    /// The first instant whose local time matches. It searches under one offset, and again from each change of the
    /// offset.
    fn next_instant(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let mut from = after;
        let mut inclusive = false;
        loop {
            let offset = self.offset(from);
            // croner walks a wall clock that never moves: its own time zones fire lists and steps in a gap several
            // times or never.
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

    /// The instant at which the wall clock shows this time: the first one, or the end of the gap that skips it.
    fn instant_of(&self, local: NaiveDateTime) -> Option<DateTime<Utc>> {
        let before = local.and_utc().checked_sub_signed(LARGEST_OFFSET)?;
        let after = local.and_utc().checked_add_signed(LARGEST_OFFSET)?;
        // The offsets before and after are those of any change nearby, because changes are at least a day apart.
        let shown_with = |offset: TimeDelta| {
            let instant = local.and_utc().checked_sub_signed(offset)?;
            (self.offset(instant) == offset).then_some(instant)
        };
        let candidates = [self.offset(before), self.offset(local.and_utc()), self.offset(after)];
        // A local time that comes twice has two candidates; the earlier instant counts.
        if let Some(first) = candidates.into_iter().filter_map(shown_with).min() {
            return Some(first);
        }
        // In a gap: no offset shows this time.
        first_in(before, after, |instant| self.wall_clock(instant).is_some_and(|shown| shown > local))
    }

    /// The first instant in (`from`, `to`] at which the zone has another offset than at `from`.
    #[allow(clippy::option_option, reason = "no change, and no such time")]
    fn next_change(&self, from: DateTime<Utc>, to: DateTime<Utc>) -> Option<Option<DateTime<Utc>>> {
        let offset = self.offset(from);
        // Changes are at least a day apart, so one sample a day misses none. Bisection finds the second.
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
        self.zone.offset(instant)
    }
}

/// The beginning of a caller's text, for errors.
fn shortened(text: &str) -> String {
    let mut characters = text.chars();
    let mut start: String = characters.by_ref().take(SHOWN).collect();
    if characters.next().is_some() {
        start.push_str("...");
    }
    start
}

/// The first second after `before`, and not after `after`, at which `holds` is true. It must be true at `after`, and
/// stay true once it is.
fn first_in(
    mut before: DateTime<Utc>,
    mut after: DateTime<Utc>,
    holds: impl Fn(DateTime<Utc>) -> bool,
) -> Option<DateTime<Utc>> {
    loop {
        let apart = after.signed_duration_since(before);
        if apart <= TimeDelta::seconds(1) {
            return Some(after);
        }
        let middle = before.checked_add_signed(TimeDelta::seconds(apart.num_seconds().checked_div(2)?))?;
        if holds(middle) { after = middle } else { before = middle }
    }
}

#[cfg(test)]
mod tests;
