//! Formatting for people: tables, times and sizes, without terminal control sequences.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, Local, Utc};
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use indicatif::BinaryBytes;
use prost_types::Timestamp;

/// Formats a table without borders and without trailing blanks.
pub(crate) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    // Independent of the terminal: the same lines on a screen and in a pipe.
    table.load_style(NOTHING).force_no_tty();
    table.set_header(header.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| clean(cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table.trim_fmt()
}

/// Formats a table, or returns `nothing` if it is empty. A lone header would look like truncated output.
pub(crate) fn listing(nothing: &str, header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut rows = rows.into_iter().peekable();
    if rows.peek().is_none() { nothing.to_owned() } else { table(header, rows) }
}

/// Formats names and values, one per line. Empty values are left out.
pub(crate) fn fields(fields: &[(&str, String)]) -> String {
    let shown = || fields.iter().filter(|(_, value)| !value.is_empty());
    let width = shown().map(|(name, _)| name.len() + 1).max().unwrap_or(0);
    // The width is that of the shown names only. Long names of empty fields must not shift the values.
    shown().map(|(name, value)| format!("{:width$}  {}\n", format!("{name}:"), clean(value))).collect()
}

/// Escapes characters that could control a terminal. Names, labels and messages come from other machines.
pub(crate) fn clean(text: &str) -> String {
    // The ranges are bidirectional overrides: they reorder the text that follows.
    let steers = |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if !text.chars().any(steers) {
        return text.to_owned();
    }
    text.chars().map(|c| if steers(c) { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// Returns the id at the end of a resource name.
pub(crate) fn id(name: &str) -> String {
    name.rsplit_once('/').map_or(name, |(_, id)| id).to_owned()
}

/// Strips the prefix from an enum's name. Empty if the value is unspecified.
pub(crate) fn enum_word(name: &str, prefix: &str) -> String {
    match name.strip_prefix(prefix).unwrap_or(name) {
        "UNSPECIFIED" => String::new(),
        word => word.to_owned(),
    }
}

/// Formats labels, sorted, in the command line's syntax.
pub(crate) fn labels(labels: &HashMap<String, String>) -> String {
    let mut pairs: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    pairs.sort();
    pairs.join(",")
}

/// Formats a size with binary units.
pub(crate) fn bytes(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

/// Converts a timestamp. `None` if it is unset or out of range.
pub(crate) fn timestamp(timestamp: Option<&Timestamp>) -> Option<DateTime<Utc>> {
    let timestamp = timestamp?;
    DateTime::from_timestamp(timestamp.seconds, u32::try_from(timestamp.nanos).ok()?)
}

/// Converts an instant to a timestamp.
pub(crate) fn timestamp_of(time: DateTime<Utc>) -> Timestamp {
    Timestamp { seconds: time.timestamp(), nanos: i32::try_from(time.timestamp_subsec_nanos()).unwrap_or(0) }
}

/// Formats local time with its offset. Empty if unset.
pub(crate) fn local(time: Option<&Timestamp>) -> String {
    timestamp(time)
        .map(|time| time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S %:z").to_string())
        .unwrap_or_default()
}

/// Rewrites the RFC 3339 instants in a sentence of the controller like [`local`] does. One screen shows one zone.
pub(crate) fn in_local_time(text: &str) -> String {
    let word = |word: &str| {
        let bare = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        // The instant may be followed by punctuation or be in brackets.
        let bare = bare.trim_start_matches(|c: char| !c.is_ascii_digit());
        match DateTime::parse_from_rfc3339(bare) {
            Ok(time) => word.replace(bare, &local(Some(&timestamp_of(time.with_timezone(&Utc))))),
            Err(_) => word.to_owned(),
        }
    };
    text.split_inclusive(' ').map(word).collect()
}

/// Formats the local time of day, for lines that are read as they appear.
pub(crate) fn clock_time(now: DateTime<Utc>) -> String {
    now.with_timezone(&Local).format("%H:%M:%S").to_string()
}

/// Formats an age or a time ahead. Empty if unset.
pub(crate) fn ago(time: Option<&Timestamp>, now: DateTime<Utc>) -> String {
    let Some(time) = timestamp(time) else { return String::new() };
    let past = now.signed_duration_since(time);
    match (past.to_std(), (-past).to_std()) {
        (Ok(past), _) if past < Duration::from_secs(2) => "now".to_owned(),
        (Ok(past), _) => format!("{} ago", span(past)),
        (Err(_), Ok(ahead)) => format!("in {}", span(ahead)),
        (Err(_), Err(_)) => String::new(),
    }
}

/// Formats a duration in its largest unit.
pub(crate) fn span(length: Duration) -> String {
    let seconds = length.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use chrono::DateTime;

    use super::{ago, clean, fields, in_local_time, listing, local, span, table, timestamp_of};

    #[test]
    fn a_table_is_plain_lines_without_blanks_at_the_end() {
        let text = table(&["NODE", "STATE"], [vec!["pi-01".to_owned(), "SUCCEEDED".to_owned()]]);
        assert_eq!(text, "NODE    STATE\npi-01   SUCCEEDED");
    }

    #[test]
    fn empty_list_says_so() {
        assert_eq!(listing("no nodes", &["NODE"], []), "no nodes");
        assert_eq!(listing("no nodes", &["NODE"], [vec!["a".to_owned()]]), "NODE\na");
    }

    #[test]
    fn nothing_printed_steers_the_terminal() {
        assert_eq!(clean("a\u{1b}[2Jb\n\u{202e}"), "a\\u{1b}[2Jb\\n\\u{202e}");
        assert!(!table(&["A"], [vec!["\u{1b}]0;x\u{7}".to_owned()]]).contains('\u{1b}'));
    }

    #[test]
    fn ages_are_in_one_unit() {
        let now = DateTime::from_timestamp(1_900_000_000, 0).unwrap();
        let at = |seconds: i64| timestamp_of(now + chrono::TimeDelta::seconds(seconds));
        assert_eq!(ago(Some(&at(0)), now), "now");
        assert_eq!(ago(Some(&at(-200)), now), "3 min ago");
        assert_eq!(ago(Some(&at(7200)), now), "in 2 h");
        assert_eq!(ago(None, now), "");
        assert_eq!(span(Duration::from_secs(86_400 * 3)), "3 days");
    }

    #[test]
    fn instants_in_sentences_are_in_the_zone_of_the_lists() {
        let shown = local(Some(&timestamp_of(DateTime::from_timestamp(1_900_000_000, 0).unwrap())));
        for time in ["2030-03-17T17:46:40Z", "2030-03-17T17:46:40+00:00", "2030-03-17T18:46:40.000+01:00"] {
            assert_eq!(in_local_time(&format!("It opens at {time}.")), format!("It opens at {shown}."));
            assert_eq!(in_local_time(&format!("({time}) and {time}")), format!("({shown}) and {shown}"));
        }
        for plain in ["", "2030-03-17", "Wait 2m 8s, pi-01: 17:46", "a  b\nc"] {
            assert_eq!(in_local_time(plain), plain);
        }
    }

    #[test]
    fn what_is_empty_has_no_line() {
        let text = fields(&[("name", "nodes/a".to_owned()), ("why", String::new()), ("os", "x".to_owned())]);
        assert_eq!(text, "name:  nodes/a\nos:    x\n");
    }
}
