use chrono::{DateTime, TimeDelta, TimeZone as _, Utc};

use super::{Recurrence, RecurrenceError, jitter, operation_uuid};

mod oracle;
mod random;

fn utc(text: &str) -> DateTime<Utc> {
    DateTime::parse_from_rfc3339(text).unwrap().with_timezone(&Utc)
}

/// The fires after an instant, as the zone's clock shows them.
fn fires(cron: &str, zone: &str, after: &str, count: usize) -> Vec<String> {
    let recurrence = Recurrence::parse(cron, zone).unwrap();
    recurrence.fires_after(utc(after)).take(count).map(|fire| recurrence.local(fire).to_rfc3339()).collect()
}

#[test]
fn a_gap_fires_once_at_its_end_whatever_it_left_out() {
    for cron in ["30 2 * * *", "0,30 2 * * *", "*/15 2 * * *", "0,30 2-3 29 3 *"] {
        let after = "2026-03-28T23:30:00Z";
        assert_eq!(fires(cron, "Europe/Madrid", after, 1), ["2026-03-29T03:00:00+02:00"], "{cron}");
    }
    assert_eq!(
        fires("0,30 2 * * *", "Europe/Madrid", "2026-03-28T23:30:00Z", 3),
        ["2026-03-29T03:00:00+02:00", "2026-03-30T02:00:00+02:00", "2026-03-30T02:30:00+02:00"]
    );
    assert_eq!(
        fires("0,15,30 2 * * *", "Australia/Lord_Howe", "2026-10-03T00:00:00Z", 2),
        ["2026-10-04T02:30:00+11:00", "2026-10-05T02:00:00+11:00"],
        "what the gap left out and what follows it at its end are one fire"
    );
}

#[test]
fn an_overlap_fires_at_its_first_occurrence() {
    assert_eq!(
        fires("0,30 2 * * *", "Europe/Madrid", "2026-10-24T22:00:00Z", 3),
        ["2026-10-25T02:00:00+02:00", "2026-10-25T02:30:00+02:00", "2026-10-26T02:00:00+01:00"]
    );
    assert_eq!(
        fires("*/20 1 * * *", "America/New_York", "2026-11-01T04:30:00Z", 4),
        [
            "2026-11-01T01:00:00-04:00",
            "2026-11-01T01:20:00-04:00",
            "2026-11-01T01:40:00-04:00",
            "2026-11-02T01:00:00-05:00"
        ]
    );
}

#[test]
fn an_hour_field_with_a_star_follows_elapsed_time() {
    assert_eq!(
        fires("30 * * * *", "Europe/Madrid", "2026-10-24T23:31:00Z", 4),
        [
            "2026-10-25T02:30:00+02:00",
            "2026-10-25T02:30:00+01:00",
            "2026-10-25T03:30:00+01:00",
            "2026-10-25T04:30:00+01:00"
        ]
    );
    assert_eq!(
        fires("0 * * * *", "Europe/Madrid", "2026-03-29T00:00:00Z", 2),
        ["2026-03-29T03:00:00+02:00", "2026-03-29T04:00:00+02:00"]
    );
}

#[test]
fn an_expression_may_begin_with_seconds() {
    assert_eq!(
        fires("*/20 59 23 * * *", "UTC", "2026-01-01T23:59:20.5Z", 2),
        ["2026-01-01T23:59:40+00:00", "2026-01-02T23:59:00+00:00"]
    );
}

#[test]
fn rare_fires_are_found_and_those_that_never_come_are_not_waited_for() {
    assert_eq!(fires("0 0 29 2 *", "", "2026-01-01T00:00:00Z", 1), ["2028-02-29T00:00:00+00:00"]);
    assert_eq!(fires("0 * 29 2 *", "Europe/Madrid", "2096-03-01T00:00:00Z", 1), ["2104-02-29T00:00:00+01:00"]);
    for cron in ["0 0 30 2 *", "0 * 31 2,4 *"] {
        assert_eq!(Recurrence::parse(cron, "Europe/Madrid").unwrap().next_after(utc("2026-01-01T00:00:00Z")), None);
    }
}

#[test]
fn days_are_those_that_cron_documents() {
    // crontab(5) of vixie and cronie: a field that begins with a star does not restrict, so both must match.
    assert_eq!(
        fires("0 3 */2 * 1", "UTC", "2026-11-29T00:00:00Z", 3),
        ["2026-12-07T03:00:00+00:00", "2026-12-21T03:00:00+00:00", "2027-01-11T03:00:00+00:00"]
    );
    assert_eq!(
        fires("0 3 1,15 * 1", "UTC", "2026-11-29T00:00:00Z", 3),
        ["2026-11-30T03:00:00+00:00", "2026-12-01T03:00:00+00:00", "2026-12-07T03:00:00+00:00"]
    );
    assert_eq!(
        fires("0 2 * * 7L", "UTC", "2026-11-29T12:00:00Z", 2),
        ["2026-12-27T02:00:00+00:00", "2027-01-31T02:00:00+00:00"]
    );
    assert_eq!(
        fires("0 2 * * 1,7L", "UTC", "2026-12-20T12:00:00Z", 3),
        ["2026-12-21T02:00:00+00:00", "2026-12-27T02:00:00+00:00", "2026-12-28T02:00:00+00:00"]
    );
    assert_eq!(
        fires("0 2 * * SUN", "UTC", "2026-11-29T12:00:00Z", 1),
        fires("0 2 * * 7", "UTC", "2026-11-29T12:00:00Z", 1)
    );
}

#[test]
fn a_cron_that_never_fires_says_so_within_a_moment() {
    let began = std::time::Instant::now();
    // The last: the fifth Monday is never among the first two days; each day until the end of the calendar is tried.
    for cron in ["0 0 30 2 *", "0 22 30 2 *", "* * * 31 11 *", "0 0 */31 2 1#5"] {
        let recurrence = Recurrence::parse(cron, "Europe/Madrid").unwrap();
        assert_eq!(recurrence.must_fire(utc("2026-11-29T00:00:00Z")), Err(RecurrenceError::Never(cron.to_owned())));
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(20), "{:?}", began.elapsed());
    let daily = Recurrence::parse("0 0 * * *", "Europe/Madrid").unwrap();
    for end in [super::calendar::END_OF_TIME, DateTime::<Utc>::MAX_UTC] {
        assert_eq!(daily.next_after(end), None);
    }
    assert!(daily.next_after(DateTime::<Utc>::MIN_UTC).is_some());
}

#[test]
fn an_operations_id_follows_from_schedule_and_instant() {
    let (made, instant) = (utc("2026-11-29T12:00:00.123456Z"), utc("2026-12-01T03:00:00Z"));
    let id = operation_uuid("nightly", made, instant);
    assert_eq!(id, operation_uuid("nightly", made, instant));
    assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
    let (seconds, nanos) = id.get_timestamp().unwrap().to_unix();
    assert_eq!((i64::try_from(seconds).unwrap(), nanos), (instant.timestamp(), 0));
    assert!(marco_proto::names::OperationId::parse(&id.to_string()).is_ok());
    for other in [
        operation_uuid("weekly", made, instant),
        operation_uuid("nightly", made + TimeDelta::microseconds(1), instant),
        operation_uuid("nightly", made, instant + TimeDelta::microseconds(1)),
    ] {
        assert_ne!(id, other);
    }
    assert!(id < operation_uuid("nightly", made, instant + TimeDelta::seconds(1)), "ids of later instants are greater");
}

#[test]
fn a_day_that_a_zone_left_out_fires_at_its_end() {
    assert_eq!(
        fires("0 9 * * *", "Pacific/Apia", "2011-12-29T00:00:00Z", 3),
        ["2011-12-29T09:00:00-10:00", "2011-12-31T00:00:00+14:00", "2011-12-31T09:00:00+14:00"]
    );
}

#[test]
fn what_is_no_expression_or_no_zone_is_refused_with_the_reason() {
    for (cron, why) in [
        ("", "it has 0 fields"),
        ("* * * *", "it has 4 fields"),
        ("* * * * * * *", "it has 7 fields"),
        ("@daily", "it has 1 field;"),
        ("60 * * * *", ""),
        ("a * * * *", ""),
        ("5-1 * * * *", ""),
        ("*/0 * * * *", ""),
    ] {
        let error = Recurrence::parse(cron, "UTC").unwrap_err();
        assert!(error.to_string().contains(why), "{cron}: {error}");
        assert!(matches!(error, RecurrenceError::Cron { .. }), "{cron}");
    }
    let error = Recurrence::parse("0 0 * * *", "Mars/Olympus").unwrap_err();
    assert_eq!(error, RecurrenceError::Zone("Mars/Olympus".to_owned()));
}

#[test]
fn jitter_is_the_nodes_own_below_its_bound_and_spread() {
    let most = TimeDelta::minutes(10);
    let mut halves = [0, 0];
    for node in 0..200 {
        let node = format!("pi-{node:03}");
        let wait = jitter("nightly", &node, most);
        assert_eq!(wait, jitter("nightly", &node, most));
        assert!(wait >= TimeDelta::zero() && wait < most);
        halves[usize::from(wait * 2 >= most)] += 1;
    }
    assert!(halves.iter().all(|count| *count > 60), "{halves:?}");
    assert_ne!(jitter("nightly", "pi-001", most), jitter("weekly", "pi-001", most));
    assert_eq!(jitter("nightly", "pi-001", TimeDelta::zero()), TimeDelta::zero());
}

#[test]
fn the_oracle_agrees_over_three_years() {
    let from = Utc.with_ymd_and_hms(2026, 1, 1, 0, 0, 0).unwrap();
    for zone in
        [chrono_tz::Europe::Madrid, chrono_tz::America::New_York, chrono_tz::Australia::Lord_Howe, chrono_tz::UTC]
    {
        let expected = oracle::fires(zone, from, TimeDelta::days(3 * 365), &oracle::CRONS);
        for (cron, expected) in oracle::CRONS.iter().zip(expected) {
            let recurrence = Recurrence::parse(cron, zone.name()).unwrap();
            let mut at = from;
            for fire in &expected {
                let next = recurrence.next_after(at);
                assert_eq!(next, Some(*fire), "{cron} {zone} after {at}");
                at = *fire;
            }
            assert!(!expected.is_empty(), "{cron} {zone}");
            assert!(
                recurrence.next_after(at).is_none_or(|next| next > from + TimeDelta::days(3 * 365)),
                "{cron} {zone}"
            );
        }
    }
}
