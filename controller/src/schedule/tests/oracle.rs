//! Fires found by walking: every minute of UTC, the local fields by chrono-tz, and a matcher of its own.

use std::collections::BTreeSet;

use chrono::{DateTime, Datelike as _, NaiveDateTime, TimeDelta, Timelike as _, Utc};
use chrono_tz::Tz;

/// Fixed times, lists, steps and ranges, in and around the hours that are left out or come twice.
pub(super) const CRONS: [&str; 22] = [
    "30 2 * * *",
    "0 2 * * *",
    "0,30 2 * * *",
    "*/15 2 * * *",
    "*/20 1 * * *",
    "0,15,30,45 1-3 * * *",
    "5-59/9 1,2,3 * * *",
    "0 3 * * 0",
    "10 2 * 3,4,10,11 0",
    "0 0-23/2 * * *",
    "59 0-23 * * *",
    "* 2 * * 0",
    "0 0 * * *",
    "0 12 1 * 1",
    "30 1 25-31 * *",
    "0 * * * *",
    "30 * * * *",
    "0,30 */2 * * *",
    "*/15 * * * 0",
    "45 */3 1-7 * *",
    "7 */1 * 3,10,11 *",
    "0 0 29 2 *",
];

struct Fields {
    minutes: BTreeSet<u32>,
    hours: BTreeSet<u32>,
    days: BTreeSet<u32>,
    months: BTreeSet<u32>,
    weekdays: BTreeSet<u32>,
    any_day: bool,
    any_weekday: bool,
    elapsed: bool,
}

fn field(text: &str, low: u32, high: u32) -> BTreeSet<u32> {
    let mut set = BTreeSet::new();
    for part in text.split(',') {
        let (range, step) = part.split_once('/').unwrap_or((part, "1"));
        let (from, to) = match range.split_once('-') {
            Some((from, to)) => (from.parse().unwrap(), to.parse().unwrap()),
            None if range == "*" => (low, high),
            None => (range.parse().unwrap(), range.parse().unwrap()),
        };
        set.extend((from..=to).step_by(step.parse().unwrap()));
    }
    set
}

impl Fields {
    fn read(cron: &str) -> Self {
        let parts: Vec<&str> = cron.split(' ').collect();
        Self {
            minutes: field(parts[0], 0, 59),
            hours: field(parts[1], 0, 23),
            days: field(parts[2], 1, 31),
            months: field(parts[3], 1, 12),
            weekdays: field(parts[4], 0, 6),
            any_day: parts[2] == "*",
            any_weekday: parts[4] == "*",
            elapsed: parts[1].starts_with('*'),
        }
    }

    fn matches(&self, local: NaiveDateTime) -> bool {
        if !(self.minutes.contains(&local.minute()) && self.hours.contains(&local.hour())) {
            return false;
        }
        let day = self.days.contains(&local.day());
        let weekday = self.weekdays.contains(&local.weekday().num_days_from_sunday());
        let date = if self.any_day || self.any_weekday { day && weekday } else { day || weekday };
        self.months.contains(&local.month()) && date
    }
}

/// The fires of each expression in (`from`, `from + span`].
pub(super) fn fires(zone: Tz, from: DateTime<Utc>, span: TimeDelta, crons: &[&str]) -> Vec<Vec<DateTime<Utc>>> {
    let all: Vec<Fields> = crons.iter().map(|cron| Fields::read(cron)).collect();
    let mut found = vec![Vec::new(); all.len()];
    let minute = TimeDelta::minutes(1);
    let mut latest = from.with_timezone(&zone).naive_local();
    let mut at = from;
    while at < from + span {
        at += minute;
        let local = at.with_timezone(&zone).naive_local();
        let mut left_out = Vec::new();
        while latest + minute < local {
            latest += minute;
            left_out.push(latest);
        }
        let first_time = local > latest;
        latest = latest.max(local);
        for (fields, found) in all.iter().zip(&mut found) {
            let fires = if fields.elapsed {
                fields.matches(local)
            } else {
                (first_time && fields.matches(local)) || left_out.iter().any(|missing| fields.matches(*missing))
            };
            if fires {
                found.push(at);
            }
        }
    }
    found
}
