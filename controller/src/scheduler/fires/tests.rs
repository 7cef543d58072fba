//! Outcomes of scheduled times, for every policy and every position of the clock.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use marco_proto::names::ScheduleId;

use super::{LISTED, steps};
use crate::operation::{Action, Notice, Target};
use crate::schedule::{FireOutcome, MissedFire, Overlap, Recurrence};
use crate::store::{ScheduleRow, Scope, Template};

fn schedule(cron: &str, missed_fire: MissedFire, paused: bool, first: DateTime<Utc>) -> ScheduleRow {
    let action = Action::Reboot(Notice { delay: Duration::ZERO, message: String::new() });
    ScheduleRow {
        id: ScheduleId::parse("nightly").unwrap(),
        cron: cron.to_owned(),
        time_zone: "Europe/Madrid".to_owned(),
        template: Template { action, target: Target::All, rollout: None, window: None },
        missed_fire,
        overlap: Overlap::Queue,
        jitter: Duration::ZERO,
        expire_after: Duration::from_secs(3600),
        paused,
        pause_reason: "exam week".to_owned(),
        creator: "pat".to_owned(),
        scope: Scope::everything(),
        create_time: first,
        update_time: first,
        revision: 1,
        next_fire: Some(first),
        last_fire: None,
        failures: 0,
        failure: String::new(),
    }
}

#[test]
fn every_instant_becomes_one_thing_whatever_the_policy() {
    let patience = TimeDelta::seconds(300);
    for cron in ["* * * * * *", "*/7 * * * * *", "0 * * * *", "*/5 * * * *", "0 3 * * *"] {
        let recurrence = Recurrence::parse(cron, "Europe/Madrid").unwrap();
        // Across the hour that is left out, and the one that comes twice.
        for from in ["2026-03-29T00:10:00Z", "2026-10-24T23:50:00Z"] {
            let first = recurrence.next_after(from.parse().unwrap()).unwrap();
            // 28 hours of seconds are more late instants than are walked, so that some of them are jumped over.
            let far = if cron == "* * * * * *" && from.starts_with("2026-03") { Some(101_400_250) } else { None };
            let aways = [0, 1, 500, 999, 1000, 299_999, 300_000, 300_001, 900_500, 5_400_250, 90_000_750];
            for away in aways.into_iter().chain(far) {
                let now = first + TimeDelta::milliseconds(away);
                for (missed_fire, paused) in [
                    (MissedFire::Skip, false),
                    (MissedFire::Once, false),
                    (MissedFire::Skip, true),
                    (MissedFire::Once, true),
                ] {
                    let row = schedule(cron, missed_fire, paused, first);
                    let steps = steps(&row, &recurrence, first, now, patience);
                    let what = format!("{cron} {from} {away} {missed_fire:?} {paused}");

                    let fired: Vec<_> = steps.iter().filter_map(|step| step.fire.as_ref()).collect();
                    let skipped: Vec<_> = steps.iter().flat_map(|step| &step.rows).collect();
                    let mut all: Vec<_> = fired.iter().map(|(at, _)| *at).collect();
                    all.extend(skipped.iter().map(|row| row.fire_time));
                    all.sort_unstable();
                    let count = all.len();
                    all.dedup();
                    assert_eq!(all.len(), count, "{what}: an instant twice");
                    assert_eq!(all.first(), Some(&first), "{what}");
                    if count < LISTED {
                        let walked: Vec<_> = recurrence.fires_after(first).take_while(|at| *at <= now).collect();
                        assert_eq!(all.get(1..), Some(walked.as_slice()), "{what}: an instant is left out");
                    }
                    // Each step continues from the one before, and the last ends in the future.
                    let nexts: Vec<_> = steps.iter().map(|step| step.next.unwrap()).collect();
                    assert!(nexts.windows(2).all(|pair| pair[0] < pair[1]), "{what}");
                    assert!(nexts.last().is_some_and(|next| *next > now), "{what}");

                    let in_time = fired.iter().filter(|(at, _)| *at >= now - patience).count();
                    let made_up = fired.len() - in_time;
                    let none_in_time = all.iter().all(|at| *at < now - patience);
                    match (missed_fire, paused) {
                        (_, true) => {
                            assert!(fired.is_empty(), "{what}");
                            assert!(skipped.iter().all(|row| row.outcome == FireOutcome::Skipped), "{what}");
                        }
                        (MissedFire::Once, false) if none_in_time => {
                            assert_eq!((in_time, made_up, fired[0].0), (0, 1, *all.last().unwrap()), "{what}");
                        }
                        (_, false) => assert_eq!(made_up, 0, "{what}"),
                    }
                    assert!(paused || skipped.iter().all(|row| row.outcome == FireOutcome::Missed), "{what}");
                }
            }
        }
    }
}
