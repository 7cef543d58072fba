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
    use std::collections::BTreeSet;
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

    /// The lines of a file without its tests: the others are empty, so that the numbers stay.
    fn without_tests(text: &str) -> Vec<&str> {
        let mut code = Vec::new();
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if line.trim() != "#[cfg(test)]" {
                code.push(line);
                continue;
            }
            code.push("");
            // The item ends with its own line, or with the bracket below its first letter.
            let indent = line.len() - line.trim_start().len();
            for line in lines.by_ref() {
                code.push("");
                let inside = line.len() - line.trim_start().len() > indent || line.is_empty();
                let goes_on = line.ends_with(['{', '(', ',']) || line.trim_start().starts_with("#[");
                if !inside && !goes_on {
                    break;
                }
            }
        }
        code
    }

    /// Modules in files of their own that exist for tests only.
    fn test_modules(text: &str) -> BTreeSet<String> {
        let declared = text.split("#[cfg(test)]\n").skip(1).filter_map(|rest| rest.lines().next());
        let modules = declared.filter_map(|line| line.trim().strip_suffix(';')?.rsplit_once("mod "));
        modules.map(|(_, name)| name.to_owned()).collect()
    }

    fn word(c: char) -> bool {
        c.is_alphanumeric() || c == '_'
    }

    /// Names that code declares as a date or a length: fields, parameters, constants.
    fn declared(code: &[&str]) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for line in code {
            let parts: Vec<&str> = line.split(": ").collect();
            for pair in parts.windows(2) {
                let [before, after] = pair else { continue };
                let kind = after.trim_start_matches('&').trim_start_matches("Option<").trim_start_matches("chrono::");
                let name = before.rsplit(|c| !word(c)).next().unwrap_or_default();
                if kind.starts_with("DateTime<") || kind.starts_with("TimeDelta") {
                    names.insert(name.to_owned());
                }
            }
        }
        names
    }

    /// Finds a line that moves a date with an operator, by the names that are declared as dates and lengths, and by those
    /// that dates usually have.
    fn moves_a_date(line: &str, declared: &BTreeSet<String>) -> bool {
        // A line of a long string, mostly SQL, ends with a backslash.
        let code = if line.ends_with('\\') { "" } else { line.split("//").next().unwrap_or_default() };
        let words: Vec<&str> = code.split(' ').collect();
        words.windows(3).any(|three| {
            let [left, operator, right] = three else { return false };
            let left = left.trim_matches(|c: char| !word(c));
            let left = left.rsplit(['.', '(', '|']).next().unwrap_or_default();
            let right = right.trim_start_matches(['&', '(']);
            let date = declared.contains(left)
                || ["now", "time", "instant", "begins", "opens", "until", "last", "deadline"].contains(&left)
                || ["_time", "_at", "_fire"].iter().any(|ending| left.ends_with(ending));
            let length = right.starts_with("TimeDelta")
                || right.starts_with("chrono::TimeDelta")
                // A method of it returns a number.
                || !right.contains('.') && declared.contains(right.trim_end_matches(|c| !word(c)));
            ["+", "-", "+=", "-="].contains(operator) && (date || length)
        })
    }

    #[test]
    fn tests_are_left_out_and_what_follows_them_is_not() {
        let text = "a\n#[cfg(test)]\nmod tests;\nb\n    #[cfg(test)]\n    fn one(\n        x: u8,\n    ) {\n        c\n    }\n\
                    d\n#[cfg(test)]\nmod more {\n    e\n\n}\nf\n";
        let left: Vec<&str> = without_tests(text).into_iter().filter(|line| !line.is_empty()).collect();
        assert_eq!(left, ["a", "b", "d", "f"]);
        assert_eq!(without_tests(text).len(), text.lines().count());
        assert_eq!(test_modules(text).into_iter().collect::<Vec<_>>(), ["tests"]);
    }

    #[test]
    fn no_date_is_moved_by_an_operator() {
        let none = BTreeSet::new();
        assert!(moves_a_date("let limit = now - PATIENCE;", &none));
        assert!(moves_a_date("    expire_time: opens + schedule.expire_after,", &none));
        assert!(moves_a_date("x = earliest + TimeDelta::seconds(1);", &none));
        assert!(moves_a_date("    .time(now + WORTH_REPEATING)", &none));
        assert!(moves_a_date("last.map(|last| last + EVERY)", &none));
        assert!(!moves_a_date("let count = left - 1; // now - 1", &none));
        let names = declared(&["const EVERY: TimeDelta = X;", "    failed: Option<DateTime<Utc>>,", "fn f(from: &u8)"]);
        assert_eq!(names.iter().map(String::as_str).collect::<Vec<_>>(), ["EVERY", "failed"]);
        assert!(moves_a_date("(failed..failed + 1)", &names) && moves_a_date("let x = begun + EVERY;", &names));
        assert!(!moves_a_date("let x = seconds + EVERY.num_seconds();", &names));

        let mut files = Vec::new();
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for package in ["controller", "node-agent", "marcoctl"] {
            sources(&workspace.join(package).join("src"), &mut files);
        }
        assert!(files.len() > 150, "{files:?}");
        files.retain(|file| !file.strip_prefix(&workspace).unwrap().to_string_lossy().contains("tests"));
        let mut texts: Vec<_> = files.into_iter().map(|file| (std::fs::read_to_string(&file).unwrap(), file)).collect();
        let for_tests: BTreeSet<String> = texts.iter().flat_map(|(text, _)| test_modules(text)).collect();
        texts.retain(|(_, file)| !for_tests.contains(&*file.file_stem().unwrap_or_default().to_string_lossy()));
        // Numbers and instants of the machine's own clock have such names too.
        let dated =
            texts.iter().filter(|(text, _)| ["chrono", "DateTime", "TimeDelta"].iter().any(|it| text.contains(it)));
        let dated: Vec<_> = dated.map(|(text, file)| (without_tests(text), file)).collect();
        // Constants are used in other files than their own.
        let constants: BTreeSet<String> = dated.iter().flat_map(|(code, _)| declared(code)).collect();
        let constants = constants.into_iter().filter(|name| !name.contains(char::is_lowercase));
        let constants: BTreeSet<String> = constants.collect();
        assert!(constants.contains("END_OF_TIME") && constants.len() > 20, "{constants:?}");
        let mut found = Vec::new();
        for (code, file) in &dated {
            let names: BTreeSet<String> = declared(code).union(&constants).cloned().collect();
            for (number, line) in code.iter().enumerate().filter(|(_, line)| moves_a_date(line, &names)) {
                found.push(format!("{}:{}: {}", file.display(), number + 1, line.trim()));
            }
        }
        assert!(found.is_empty(), "use calendar::later and earlier:\n{}", found.join("\n"));
    }
}
