//! Random expressions, zones, clocks and outages, with properties that hold for all of them.

use std::collections::BTreeSet;

use chrono::{DateTime, TimeDelta, Utc};

use super::super::{Due, Recurrence};

/// SplitMix64 (Steele et al. 2014): a few lines, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, most: u64) -> u64 {
        self.next() % most
    }

    fn one_of<'a>(&mut self, all: &[&'a str]) -> &'a str {
        all[usize::try_from(self.below(u64::try_from(all.len()).unwrap())).unwrap()]
    }
}

const SECONDS: [&str; 6] = ["*", "*/5", "*/7", "0", "0,30", "59"];
const MINUTES: [&str; 6] = ["*", "*/5", "0", "0,30", "59", "5-10"];
const HOURS: [&str; 7] = ["*", "*/2", "2", "1-3", "0,12", "0-23", "23"];
const DAYS: [&str; 7] = ["*", "*", "*/2", "1", "15W", "L", "29-31"];
const WEEKDAYS: [&str; 7] = ["*", "*", "1", "7L", "MON-FRI", "0,6", "2#1"];
const ZONES: [&str; 6] =
    ["UTC", "Europe/Madrid", "America/New_York", "Australia/Lord_Howe", "America/Vancouver", "Pacific/Apia"];

fn recurrence(random: &mut Random) -> Recurrence {
    let mut fields = vec![random.one_of(&MINUTES), random.one_of(&HOURS)];
    if random.below(2) == 0 {
        fields.insert(0, random.one_of(&SECONDS));
    }
    fields.extend([random.one_of(&DAYS), "*", random.one_of(&WEEKDAYS)]);
    Recurrence::parse(&fields.join(" "), random.one_of(&ZONES)).unwrap()
}

/// Some time in 2026 or 2027, to the microsecond; near a change of the clocks more often than not.
fn instant(random: &mut Random) -> DateTime<Utc> {
    let base = ["2026-03-29T00:30:00Z", "2026-10-25T00:30:00Z", "2026-11-01T05:30:00Z", "2026-01-01T00:00:00Z"];
    let base: DateTime<Utc> = random.one_of(&base).parse().unwrap();
    let span = if random.below(3) == 0 { 400 * 86_400 } else { 7200 };
    let seconds = i64::try_from(random.below(span)).unwrap();
    let micros = if random.below(4) == 0 { 0 } else { i64::try_from(random.below(1_000_000)).unwrap() };
    base + TimeDelta::seconds(seconds) + TimeDelta::microseconds(micros)
}

#[test]
fn each_fire_is_the_first_after_the_one_before() {
    let mut random = Random(17);
    for round in 0..400 {
        let recurrence = recurrence(&mut random);
        let from = instant(&mut random);
        let mut at = from;
        for fire in recurrence.fires_after(from).take(20) {
            assert!(fire > at, "round {round}: {recurrence} after {at}: {fire}");
            assert_eq!(fire.timestamp_subsec_nanos(), 0, "round {round}: {recurrence}");
            // A caller that looks from between two fires finds the same.
            let between = at + (fire - at) / 2;
            assert_eq!(recurrence.next_after(between), Some(fire), "round {round}: {recurrence} after {between}");
            at = fire;
        }
    }
}

/// The same by walking over every fire.
fn walked(recurrence: &Recurrence, first: DateTime<Utc>, now: DateTime<Utc>) -> (Vec<DateTime<Utc>>, DateTime<Utc>) {
    let mut all = vec![first];
    all.extend(recurrence.fires_after(first).take_while(|fire| *fire <= now));
    let next = recurrence.next_after(*all.last().unwrap()).unwrap();
    (all, next)
}

#[test]
fn every_instant_is_late_or_in_time_or_counted_once() {
    let mut random = Random(2026);
    for round in 0..300 {
        let recurrence = recurrence(&mut random);
        let first = recurrence.next_after(instant(&mut random)).unwrap();
        let away = TimeDelta::microseconds(i64::try_from(random.below(6 * 3_600_000_000)).unwrap());
        let now = first + away;
        let patience = TimeDelta::milliseconds(i64::try_from(random.below(600_000)).unwrap());
        let listed = 1 + usize::try_from(random.below(50)).unwrap();
        let Due { late, unlisted, uncounted, timely, next } = recurrence.due(first, now, patience, listed);
        let (all, after) = walked(&recurrence, first, now);
        let what = format!("round {round}: {recurrence} from {first} until {now}, {patience} and {listed}");

        let (expected_late, in_time): (Vec<_>, Vec<_>) = all.into_iter().partition(|at| *at < now - patience);
        assert_eq!(timely, in_time.iter().take(1000).copied().collect::<Vec<_>>(), "{what}");
        assert_eq!(next, Some(in_time.get(1000).copied().unwrap_or(after)), "{what}");
        assert_eq!(late.len() + usize::try_from(unlisted).unwrap(), expected_late.len(), "{what}");
        assert!(!uncounted && late.len() <= listed, "{what}");
        assert_eq!(late.last(), expected_late.last(), "{what}");
        let listed: BTreeSet<_> = late.iter().collect();
        assert!(listed.len() == late.len() && listed.iter().all(|at| expected_late.contains(at)), "{what}");
    }
}

#[test]
fn a_thousand_instants_in_time_are_taken_at_once() {
    let recurrence = Recurrence::parse("* * * * * *", "UTC").unwrap();
    let first: DateTime<Utc> = "2026-11-29T00:00:00Z".parse().unwrap();
    let second = |number| first + TimeDelta::seconds(number);
    let due = recurrence.due(first, second(3000), TimeDelta::hours(1), 10);
    assert_eq!((due.late.len(), due.timely.len()), (0, 1000));
    assert_eq!((due.timely.last().copied(), due.next), (Some(second(999)), Some(second(1000))));
}

#[test]
fn the_longest_outage_ends_wherever_the_clock_stands_within_a_second() {
    for (cron, days) in [("* * * * * *", 2), ("*/5 * * * * *", 8), ("*/7 * * * * *", 12)] {
        let recurrence = Recurrence::parse(cron, "UTC").unwrap();
        let first = recurrence.next_after("2026-11-29T00:00:00Z".parse().unwrap()).unwrap();
        for milliseconds in [0, 1, 500, 999] {
            let now = first + TimeDelta::days(days) + TimeDelta::milliseconds(milliseconds);
            let due = recurrence.due(first, now, TimeDelta::minutes(5), 10);
            assert!(due.uncounted && due.late.len() == 10, "{cron} {milliseconds}");
            let limit = now - TimeDelta::minutes(5);
            let (last, in_time) = (*due.late.last().unwrap(), due.timely[0]);
            assert!(last < limit && in_time >= limit, "{cron} {milliseconds}");
            assert_eq!(recurrence.next_after(last), Some(in_time), "{cron} {milliseconds}: one was passed over");
            assert!(due.next.unwrap() > now, "{cron} {milliseconds}");
        }
    }
}
