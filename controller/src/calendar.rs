//! Dates that cannot overflow. Pure.
//!
//! chrono's operators panic at the end of its calendar, in the year 262142, and a date behind the year 9999 is nothing
//! that the API can carry (`google.protobuf.Timestamp`). A single stored date of that kind once ended every controller
//! on the database. So dates are moved by these functions and by chrono's `checked_` ones, never by `+` and `-`.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

/// The last date that is stored or sent: the last microsecond of the year 9999.
pub const END_OF_TIME: DateTime<Utc> = match DateTime::from_timestamp(253_402_300_799, 999_999_000) {
    Some(time) => time,
    None => DateTime::<Utc>::MAX_UTC,
};

/// The first date that is stored or sent: the beginning of the year 1.
pub const START_OF_TIME: DateTime<Utc> = match DateTime::from_timestamp(-62_135_596_800, 0) {
    Some(time) => time,
    None => DateTime::<Utc>::MIN_UTC,
};

/// The date, or the nearest one that can be stored.
pub fn bounded(time: DateTime<Utc>) -> DateTime<Utc> {
    // chrono's calendar goes further than the API's, so its checks alone are not enough.
    time.clamp(START_OF_TIME, END_OF_TIME)
}

/// The date moved forward by `by`, at most [`END_OF_TIME`].
pub fn later(time: DateTime<Utc>, by: TimeDelta) -> DateTime<Utc> {
    let end = if by < TimeDelta::zero() { START_OF_TIME } else { END_OF_TIME };
    time.checked_add_signed(by).map_or(end, bounded)
}

/// The date moved back by `by`, at least [`START_OF_TIME`].
pub fn earlier(time: DateTime<Utc>, by: TimeDelta) -> DateTime<Utc> {
    let end = if by < TimeDelta::zero() { END_OF_TIME } else { START_OF_TIME };
    time.checked_sub_signed(by).map_or(end, bounded)
}

/// The same length in chrono's type, limited to its largest value.
pub fn delta(length: Duration) -> TimeDelta {
    TimeDelta::from_std(length).unwrap_or(TimeDelta::MAX)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    #[test]
    fn nothing_moves_past_the_ends_of_time() {
        for by in [TimeDelta::MAX, TimeDelta::days(4_000_000), TimeDelta::seconds(1)] {
            assert_eq!(later(END_OF_TIME, by), END_OF_TIME);
            assert_eq!(later(DateTime::<Utc>::MAX_UTC, by), END_OF_TIME);
            assert_eq!(earlier(START_OF_TIME, by), START_OF_TIME);
            assert_eq!(earlier(DateTime::<Utc>::MIN_UTC, by), START_OF_TIME);
        }
        assert_eq!(later(START_OF_TIME, TimeDelta::MIN), START_OF_TIME);
        assert_eq!(earlier(END_OF_TIME, TimeDelta::MIN), END_OF_TIME);
        assert_eq!(END_OF_TIME.to_rfc3339(), "9999-12-31T23:59:59.999999+00:00");
        assert_eq!(START_OF_TIME.to_rfc3339(), "0001-01-01T00:00:00+00:00");
        let noon = DateTime::from_timestamp(1_800_000_000, 0).unwrap();
        assert_eq!(later(noon, delta(Duration::from_secs(60))), noon + TimeDelta::minutes(1));
        assert_eq!(earlier(noon, TimeDelta::minutes(1)), noon - TimeDelta::minutes(1));
        assert_eq!(delta(Duration::MAX), TimeDelta::MAX);
    }

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }

    /// Finds a line that moves a date with an operator. It knows the names of dates and lengths in this crate; clippy's
    /// `arithmetic_side_effects`, which date-heavy modules turn on, finds the others there.
    fn moves_a_date(line: &str) -> bool {
        // A line of a long string, mostly SQL, ends with a backslash.
        let code = if line.ends_with('\\') { "" } else { line.split("//").next().unwrap_or_default() };
        let words: Vec<&str> = code.split(' ').collect();
        words.windows(3).any(|three| {
            let [left, operator, right] = three else { return false };
            let left = left.trim_matches(|c: char| !c.is_alphanumeric() && c != '_');
            let left = left.rsplit(['.', '(', '|']).next().unwrap_or_default();
            let right = right.trim_start_matches(['&', '(']);
            let date = ["now", "time", "instant", "begins", "opens", "until", "last"].contains(&left)
                || ["_time", "_at", "_fire"].iter().any(|ending| left.ends_with(ending));
            let length = right.starts_with("TimeDelta") || right.starts_with("chrono::TimeDelta");
            let difference = right.starts_with('*') || right.starts_with("opened");
            ["+", "-", "+=", "-="].contains(operator) && (date || length) && !difference
        })
    }

    #[test]
    fn no_date_is_moved_by_an_operator() {
        assert!(moves_a_date("let limit = now - PATIENCE;"));
        assert!(moves_a_date("    expire_time: opens + schedule.expire_after,"));
        assert!(moves_a_date("x = earliest + TimeDelta::seconds(1);"));
        assert!(moves_a_date("    .time(now + WORTH_REPEATING)") && moves_a_date("last.map(|last| last + EVERY)"));
        assert!(!moves_a_date("let count = left - 1; // now - 1"));
        let mut files = Vec::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
        assert!(files.len() > 50, "{files:?}");
        let mut found = Vec::new();
        for file in files.iter().filter(|file| !file.to_string_lossy().contains("tests")) {
            let text = std::fs::read_to_string(file).unwrap();
            // The rest of a file is tests, and tests may panic.
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            for (number, line) in code.lines().enumerate().filter(|(_, line)| moves_a_date(line)) {
                found.push(format!("{}:{}: {}", file.display(), number + 1, line.trim()));
            }
        }
        assert!(found.is_empty(), "use calendar::later and earlier:\n{}", found.join("\n"));
    }
}
