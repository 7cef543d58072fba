//! Parsers for values on the command line.

use std::time::Duration;

use chrono::{DateTime, Utc};

/// A key and a value: a label, or a term of a selector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Text before the first `=`.
    pub(crate) key: String,
    /// Text after the first `=`. May contain `=`, may be empty.
    pub(crate) value: String,
}

/// A change to a label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LabelEdit {
    /// `key=value`.
    Set(Pair),
    /// `key-`.
    Remove(String),
}

/// Parses `key=value`. The syntax of other selector languages (`!=`, `in`) is refused with an explanation.
pub(crate) fn pair(text: &str) -> Result<Pair, String> {
    const EXAMPLE: &str = "write KEY=VALUE, for example room=a1; a comma separates several, which must all be there";
    let Some((key, value)) = text.split_once('=') else {
        let words = text.split_whitespace().count();
        return Err(match text.trim() {
            "" => format!("it is empty; {EXAMPLE}"),
            "all" | "*" => "every node is --all".to_owned(),
            _ if words > 1 => format!("{text:?} has no \"=\", and only equality is known; {EXAMPLE}"),
            _ => format!("{text:?} has no \"=\"; {EXAMPLE}"),
        });
    };
    if key.is_empty() {
        return Err(format!("there is no label before the \"=\" of {text:?}; {EXAMPLE}"));
    }
    // Operators of other selector languages would otherwise become part of the key or the value.
    if key.ends_with(['!', '~', '<', '>', ':']) || value.starts_with(['=', '~']) {
        return Err(format!("only equality is known, written with one \"=\": {text:?} is something else; {EXAMPLE}"));
    }
    Ok(Pair { key: key.to_owned(), value: value.to_owned() })
}

/// Reads `key=value` or `key-`.
pub(crate) fn label_edit(text: &str) -> Result<LabelEdit, String> {
    match text.strip_suffix('-') {
        Some(key) if !key.is_empty() && !key.contains('=') => Ok(LabelEdit::Remove(key.to_owned())),
        _ => pair(text).map(LabelEdit::Set).map_err(|error| format!("{error}; KEY- removes a label")),
    }
}

/// Parses a duration such as `90s`, `2m` or `1h 30m`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| format!("{error}; write for example 0s, 90s, 2m or 1h30m"))
}

/// Number of nodes that may fail before a rollout pauses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FailureLimit {
    /// Absolute number of nodes.
    Nodes(i32),
    /// Percentage of all nodes of the operation.
    Percent(i32),
}

/// Reads `12` or `10%`.
pub(crate) fn failure_limit(text: &str) -> Result<FailureLimit, String> {
    let (number, percent) = match text.strip_suffix('%') {
        Some(number) => (number, true),
        None => (text, false),
    };
    match number.parse::<i32>() {
        Ok(number) if percent && (0..=100).contains(&number) => Ok(FailureLimit::Percent(number)),
        Ok(number) if !percent && number >= 0 => Ok(FailureLimit::Nodes(number)),
        _ => Err("expected a number of nodes, for example 5, or a percentage, for example 10%".to_owned()),
    }
}

/// Parses a size such as `4GiB`, `512M` or `1000000`. K, M, G and T are powers of 1024.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let wrong = || "expected a size, for example 4GiB or 512M".to_owned();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let shift = match unit.trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// Parses an instant in RFC 3339.
pub(crate) fn instant(text: &str) -> Result<DateTime<Utc>, String> {
    // Without an offset the time would depend on the zone of this machine.
    DateTime::parse_from_rfc3339(text).map(|time| time.with_timezone(&Utc)).map_err(|error| {
        format!("{error}; write RFC 3339 with an offset, for example 2030-01-31T22:00:00+01:00 or 2030-01-31T21:00:00Z")
    })
}

#[cfg(test)]
mod tests {
    use super::{FailureLimit, LabelEdit, Pair, duration, failure_limit, instant, label_edit, pair, size};

    #[test]
    fn failures_are_limited_by_number_or_percentage() {
        assert_eq!(failure_limit("0"), Ok(FailureLimit::Nodes(0)));
        assert_eq!(failure_limit("10%"), Ok(FailureLimit::Percent(10)));
        for wrong in ["", "%", "-1", "101%", "a"] {
            assert!(failure_limit(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(size("4GiB"), Ok(4 << 30));
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("77"), Ok(77));
        for wrong in ["", "G", "1x", "99999999999999999999", "99999999T"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_label_is_set_or_removed() {
        let set = Pair { key: "room".to_owned(), value: "a-".to_owned() };
        assert_eq!(label_edit("room=a-"), Ok(LabelEdit::Set(set)));
        assert_eq!(label_edit("room-"), Ok(LabelEdit::Remove("room".to_owned())));
        assert!(label_edit("room").is_err());
        assert!(label_edit("-").is_err());
        assert!(pair("=x").is_err());
        assert_eq!(pair("a=b=c").unwrap().value, "b=c");
    }

    #[test]
    fn selector_that_is_not_key_value_is_explained() {
        for (text, said) in [
            ("room", "\"room\" has no \"=\"; write KEY=VALUE"),
            ("", "it is empty"),
            ("all", "--all"),
            ("room in (a,b)", "only equality"),
            ("room==a1", "only equality"),
            ("room!=a1", "only equality"),
            ("room=~a.*", "only equality"),
            ("=a1", "no label before"),
        ] {
            let error = pair(text).unwrap_err();
            assert!(error.contains(said), "{text:?}: {error}");
        }
        // Only the first character of a value is restricted.
        assert_eq!(pair("url=http://a?b=c").unwrap().value, "http://a?b=c");
        assert_eq!(pair("empty=").unwrap().value, "");
    }

    #[test]
    fn no_notice_at_all_can_be_said() {
        assert_eq!(duration("0s"), Ok(std::time::Duration::ZERO));
        assert!(duration("soon").is_err());
    }

    #[test]
    fn an_instant_needs_its_offset() {
        assert_eq!(instant("2030-01-31T22:00:00+01:00"), instant("2030-01-31T21:00:00Z"));
        assert!(instant("2030-01-31T22:00:00").is_err());
    }
}
