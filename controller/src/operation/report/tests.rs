use std::time::Duration;

use super::super::Notice;
use super::*;
use ExecutionState as E;

const NAME: &str = "operations/o/executions/n";

fn reboot() -> Action {
    Action::Reboot(Notice { delay: Duration::ZERO, message: String::new() })
}

fn stored(state: E) -> Stored {
    Stored {
        state,
        attempt: 2,
        sequence: 3,
        error_reason: None,
        assign_boot_id: "old".to_owned(),
        cancel_requested: false,
    }
}

fn reported(state: E, attempt: u32, sequence: u64) -> Reported {
    Reported {
        attempt,
        sequence,
        state,
        error: None,
        boot_id: "new".to_owned(),
        accept_boot_id: String::new(),
        journal_lost: false,
        release_execution: String::new(),
        release_image: String::new(),
        release_boot: String::new(),
    }
}

fn verdict(stored: &Stored, reported: &Reported) -> ReportVerdict {
    on_report(stored, reported, &Expected { execution: NAME, action: &reboot(), family: "pi4" })
}

#[test]
fn every_report_in_every_state_leads_to_a_legal_change_or_to_none() {
    for from in E::ALL.iter().copied() {
        for to in E::ALL.iter().copied() {
            for (attempt, sequence) in [(1, 4), (2, 2), (2, 3), (2, 4), (3, 1)] {
                let verdict = verdict(&stored(from), &reported(to, attempt, sequence));
                let ends_or_asks = to.is_final() || to == E::Verifying;
                let fresh = attempt == 2 && (sequence == 4 || ends_or_asks);
                match &verdict {
                    ReportVerdict::Change(end, _) => {
                        assert!(fresh && from.is_active(), "{from} to {to}");
                        assert!(*end == from || from.change_to(*end).is_ok(), "{from} to {end}");
                    }
                    ReportVerdict::Adopt(end, _) => {
                        assert!(attempt == 3 && !from.is_final() && from.adopt(*end).is_ok(), "{from} to {to}");
                    }
                    ReportVerdict::Conflict(Conflict::Ended) => {
                        assert!(from.is_final() && from != to, "{from} to {to}");
                        // A step that was stored before, or is older, is no news.
                        assert!(to.is_final() || (attempt, sequence) > (2, 3), "{from} to {to}: {attempt} {sequence}");
                    }
                    ReportVerdict::Conflict(conflict) => panic!("{from} to {to}: {conflict}"),
                    ReportVerdict::Stale => assert!(!from.is_final() && (attempt == 1 || from == E::Pending)),
                    ReportVerdict::Progress => assert!(from == to && (attempt, sequence) == (2, 3)),
                    ReportVerdict::Duplicate => assert!(from.is_final() || sequence <= 3),
                    ReportVerdict::Refuse(_) => {}
                    ReportVerdict::Reject(_) => panic!("{from} to {to}: the boot id is a new one"),
                }
                let from_a_node = !matches!(to, E::Pending | E::Assigned | E::Expired);
                assert!(from_a_node || matches!(verdict, ReportVerdict::Refuse(_)), "{to}");
            }
        }
    }
}

#[test]
fn an_acknowledgement_of_verifying_is_never_given_without_proof() {
    for from in E::ALL.iter().copied() {
        for (given_up, sequence) in [(false, 1), (false, 3), (false, 9), (true, 1), (true, 9)] {
            let mut stored = stored(from);
            stored.error_reason = given_up.then(|| reason::NEVER_RETURNED.to_owned());
            let lie = Reported { boot_id: "old".to_owned(), ..reported(E::Verifying, 2, sequence) };
            let verdict = verdict(&stored, &lie);
            let acknowledged = match verdict {
                ReportVerdict::Conflict(conflict) => conflict.is_acknowledged(E::Verifying),
                _ => matches!(verdict, ReportVerdict::Change(..) | ReportVerdict::Duplicate),
            };
            assert!(!acknowledged, "{from} {sequence}: {verdict:?}");
        }
    }
}

#[test]
fn verifying_below_the_stored_sequence_is_stored_first() {
    for from in [E::Assigned, E::Running, E::Rebooting, E::Verifying] {
        for sequence in [1, 2] {
            let verdict = verdict(&stored(from), &reported(E::Verifying, 2, sequence));
            assert_eq!(verdict, ReportVerdict::Change(E::Verifying, None), "{from} {sequence}");
        }
    }
    // The same sequence in another state is no repetition: a torn journal counts some numbers twice.
    let same = verdict(&stored(E::Rebooting), &reported(E::Verifying, 2, 3));
    assert_eq!(same, ReportVerdict::Change(E::Verifying, None));
}

#[test]
fn end_below_the_stored_sequence_ends_the_execution() {
    for from in [E::Running, E::Rebooting, E::Verifying] {
        for to in [E::Succeeded, E::Failed, E::RolledBack, E::Cancelled] {
            for sequence in [1, 3] {
                let verdict = verdict(&stored(from), &reported(to, 2, sequence));
                assert_eq!(verdict, ReportVerdict::Change(to, None), "{from} to {to} {sequence}");
            }
        }
        for to in [E::Running, E::Rebooting] {
            assert_eq!(verdict(&stored(from), &reported(to, 2, 1)), ReportVerdict::Duplicate, "{from} to {to}");
        }
    }
}

#[test]
fn verifying_told_again_is_acknowledged_with_proof_and_refused_without() {
    let stored = stored(E::Verifying);
    assert_eq!(verdict(&stored, &reported(E::Verifying, 2, 3)), ReportVerdict::Duplicate);
    let lie = Reported { boot_id: "old".to_owned(), ..reported(E::Verifying, 2, 3) };
    assert!(matches!(verdict(&stored, &lie), ReportVerdict::Refuse(_)), "{:?}", verdict(&stored, &lie));
}

#[test]
fn a_node_that_was_given_up_may_still_tell_its_end() {
    let given_up = Stored { error_reason: Some(reason::NEVER_RETURNED.to_owned()), ..stored(E::Failed) };
    let done = reported(E::Succeeded, 1, 9);
    assert_eq!(verdict(&given_up, &done), ReportVerdict::Change(E::Succeeded, None));
    assert_eq!(verdict(&given_up, &reported(E::Verifying, 2, 9)), ReportVerdict::Duplicate);
    assert_eq!(verdict(&given_up, &reported(E::Running, 2, 9)), ReportVerdict::Duplicate);
    let failed = Stored { error_reason: Some("DIGEST_MISMATCH".to_owned()), ..given_up };
    assert_eq!(verdict(&failed, &done), ReportVerdict::Conflict(Conflict::Ended));
}

#[test]
fn what_a_node_says_is_taken_a_thousand_deliveries_ahead_and_no_further() {
    for from in [E::Pending, E::Assigned, E::Running] {
        for (attempt, taken) in [(3, true), (1_002, true), (1_003, false), (MAX_ATTEMPT, false), (u32::MAX, false)] {
            let expected = match taken {
                true => ReportVerdict::Adopt(E::Running, None),
                false => ReportVerdict::Conflict(Conflict::Ahead),
            };
            assert_eq!(verdict(&stored(from), &reported(E::Running, attempt, 1)), expected, "{from} {attempt}");
        }
    }
    let used_up = Stored { attempt: MAX_ATTEMPT, ..stored(E::Assigned) };
    let beyond = verdict(&used_up, &reported(E::Running, MAX_ATTEMPT + 1, 1));
    assert_eq!(beyond, ReportVerdict::Conflict(Conflict::Ahead));
}

#[test]
fn a_lost_delivery_succeeds_with_the_nodes_own_proof_and_never_fails_for_the_lack_of_one() {
    // The store assigned it again after it was done: both boot ids are the same.
    let again = Stored { assign_boot_id: "new".to_owned(), ..stored(E::Assigned) };
    let done = |attempt, accepted: &str| Reported {
        accept_boot_id: accepted.to_owned(),
        ..reported(E::Succeeded, attempt, 3)
    };
    assert_eq!(verdict(&again, &Reported { sequence: 4, ..done(2, "old") }), ReportVerdict::Change(E::Succeeded, None));
    assert_eq!(verdict(&again, &done(3, "old")), ReportVerdict::Adopt(E::Succeeded, None));
    assert_eq!(verdict(&again, &done(3, "new")), ReportVerdict::Conflict(Conflict::Unproved));
    assert_eq!(verdict(&again, &done(3, "")), ReportVerdict::Conflict(Conflict::Unproved));
    // The store lost the assignment itself.
    let never = Stored { attempt: 0, sequence: 0, assign_boot_id: String::new(), ..stored(E::Pending) };
    assert_eq!(verdict(&never, &done(1, "old")), ReportVerdict::Adopt(E::Succeeded, None));
    assert_eq!(verdict(&never, &done(1, "")), ReportVerdict::Conflict(Conflict::Unproved));
    // The same delivery without a reboot is a lie: it fails.
    let lie =
        verdict(&stored(E::Rebooting), &Reported { accept_boot_id: "new".to_owned(), ..reported(E::Succeeded, 2, 4) });
    assert!(matches!(lie, ReportVerdict::Change(E::Failed, Some(_))), "{lie:?}");
}

#[test]
fn work_on_what_has_ended_is_a_conflict_unless_it_was_said_before() {
    let ended = ReportVerdict::Conflict(Conflict::Ended);
    for from in [E::Succeeded, E::Failed, E::RolledBack, E::Cancelled, E::Expired] {
        for to in [E::Running, E::Rebooting] {
            for (attempt, sequence) in [(2, 4), (3, 1)] {
                assert_eq!(verdict(&stored(from), &reported(to, attempt, sequence)), ended, "{from} to {to}");
            }
            // Stored before, or of an earlier delivery.
            for (attempt, sequence) in [(2, 3), (2, 1), (1, 9)] {
                let verdict = verdict(&stored(from), &reported(to, attempt, sequence));
                assert_eq!(verdict, ReportVerdict::Duplicate, "{from} to {to}");
            }
        }
        let unproved = |sequence| Reported { boot_id: "old".to_owned(), ..reported(E::Verifying, 2, sequence) };
        assert_eq!(verdict(&stored(from), &unproved(4)), ended, "{from}");
        assert!(matches!(verdict(&stored(from), &unproved(3)), ReportVerdict::Refuse(_)), "{from}");
    }
}

#[test]
fn another_end_is_a_conflict_whatever_its_sequence() {
    let ended = ReportVerdict::Conflict(Conflict::Ended);
    for sequence in [1, 3, 9] {
        for (from, to) in [(E::Succeeded, E::Failed), (E::Failed, E::Succeeded), (E::Succeeded, E::Cancelled)] {
            assert_eq!(verdict(&stored(from), &reported(to, 2, sequence)), ended, "{from} to {to} {sequence}");
        }
    }
    // The success that was not proved, and was stored as a failure.
    let refuted = Stored { error_reason: Some(reason::NOT_VERIFIED.to_owned()), ..stored(E::Failed) };
    assert_eq!(verdict(&refuted, &reported(E::Succeeded, 2, 3)), ReportVerdict::Duplicate);
    assert_eq!(verdict(&refuted, &reported(E::RolledBack, 2, 3)), ended);
    // The cancel of an execution that the node never had.
    assert_eq!(verdict(&stored(E::Succeeded), &reported(E::Cancelled, 0, 0)), ReportVerdict::Duplicate);
}

#[test]
fn a_node_that_speaks_under_the_boot_that_was_to_end_contradicts_its_power_off() {
    let off = Action::PowerOff(Notice { delay: Duration::ZERO, message: String::new() });
    let expected = Expected { execution: NAME, action: &off, family: "pi4" };
    let (still, over) = (Reported { boot_id: "old".to_owned(), ..reported(E::Rebooting, 2, 3) }, stored(E::Succeeded));
    assert_eq!(on_report(&over, &still, &expected), ReportVerdict::Conflict(Conflict::Ended));
    assert_eq!(on_report(&over, &reported(E::Rebooting, 2, 3), &expected), ReportVerdict::Duplicate);
    assert_eq!(verdict(&over, &still), ReportVerdict::Duplicate, "after a reboot it is an old report");
}

#[test]
fn a_hello_is_concluded_from_as_the_table_says() {
    use NodeMode::{Installer, Running};
    let notice = Notice { delay: Duration::ZERO, message: String::new() };
    let update = Action::Update(crate::operation::Update {
        image: None,
        bootcode: None,
        bootcodes: std::collections::BTreeMap::new(),
        notice: notice.clone(),
        discard_home: false,
        raw: false,
    });
    let off = Action::PowerOff(notice);
    let lost = Some(reason::JOURNAL_LOST);
    let cases = [
        // Assigned again only if a later Hello does not list it.
        (E::Assigned, reboot(), true, Running, "old", None),
        (E::Assigned, reboot(), false, Running, "old", Some((E::Pending, None))),
        (E::Assigned, reboot(), false, Running, "new", Some((E::Pending, None))),
        // Accepted, and not listed.
        (E::Running, reboot(), false, Running, "old", Some((E::Failed, lost))),
        (E::Rebooting, reboot(), false, Running, "new", Some((E::Failed, lost))),
        (E::Verifying, update.clone(), false, Running, "new", Some((E::Failed, lost))),
        (E::Running, reboot(), true, Running, "new", None),
        // Back from a reboot.
        (E::Rebooting, reboot(), true, Running, "old", None),
        (E::Rebooting, reboot(), true, Running, "new", Some((E::Verifying, None))),
        (E::Rebooting, update.clone(), true, Running, "new", Some((E::Verifying, None))),
        (E::Rebooting, update, true, Installer, "new", Some((E::Running, None))),
        // The stream broke during the shutdown, and the node connected again.
        (E::Rebooting, off.clone(), true, Running, "old", None),
        // Back from a power-off. The journal does not matter.
        (E::Rebooting, off.clone(), false, Running, "old", Some((E::Failed, Some(reason::STILL_ON)))),
        (E::Rebooting, off.clone(), true, Running, "new", Some((E::Succeeded, None))),
        (E::Rebooting, off, false, Running, "new", Some((E::Succeeded, None))),
    ];
    for (from, action, listed, mode, boot_id, expected) in cases {
        let expected = expected.map(|(to, why)| (to, why.map(str::to_owned)));
        for answers_queries in [false, true] {
            let greeting = Greeting { mode, boot_id, answers_queries, journal_lost: false };
            let found = match on_hello(&stored(from), &action, listed, greeting) {
                HelloVerdict::Change(to, error) => Some((to, error.map(|error| error.reason))),
                HelloVerdict::Keep => None,
                // A node that can be asked is asked, and fails by its own answer only.
                HelloVerdict::Ask => {
                    assert!(answers_queries);
                    on_not_held(&stored(from)).map(|(to, error)| (to, error.map(|error| error.reason)))
                }
            };
            assert_eq!(found, expected, "{from}, {}, listed {listed}, boot id {boot_id}", action.kind());
        }
    }
    let asked = Stored { cancel_requested: true, ..stored(E::Assigned) };
    let dropped = on_hello(
        &asked,
        &reboot(),
        false,
        Greeting { mode: Running, boot_id: "old", answers_queries: true, journal_lost: false },
    );
    assert!(matches!(dropped, HelloVerdict::Change(E::Cancelled, None)));
}

#[test]
fn every_hello_in_every_active_state_leads_to_a_legal_change_or_to_none() {
    let power_off = Action::PowerOff(Notice { delay: Duration::ZERO, message: String::new() });
    for action in [reboot(), power_off] {
        for from in E::ALL.iter().copied().filter(|state| state.is_active()) {
            for listed in [false, true] {
                for mode in NodeMode::ALL.iter().copied() {
                    for boot_id in ["old", "new"] {
                        let greeting =
                            Greeting { mode, boot_id, answers_queries: boot_id == "new", journal_lost: false };
                        match on_hello(&stored(from), &action, listed, greeting) {
                            HelloVerdict::Change(to, _) => assert!(from.change_to(to).is_ok(), "{from} to {to}"),
                            HelloVerdict::Ask => assert!(!listed, "{from}: what is listed is not asked for"),
                            HelloVerdict::Keep => assert!(listed, "{from}: what is not listed is not kept"),
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn lost_journal_counts_by_its_states_alone() {
    let lost = |state, sequence| Reported { journal_lost: true, ..reported(state, 2, sequence) };
    for sequence in [1, 3, 9] {
        // Stored is REBOOTING under sequence 3.
        assert_eq!(
            verdict(&stored(E::Rebooting), &lost(E::Running, sequence)),
            ReportVerdict::Change(E::Running, None)
        );
        assert_eq!(verdict(&stored(E::Rebooting), &lost(E::Rebooting, sequence)), ReportVerdict::Progress);
        assert_eq!(verdict(&stored(E::Succeeded), &lost(E::Rebooting, sequence)), ReportVerdict::Duplicate);
        assert_eq!(verdict(&stored(E::Succeeded), &lost(E::Failed, sequence)), ReportVerdict::Duplicate);
    }
    let without = reported(E::Running, 2, 1);
    assert_eq!(verdict(&stored(E::Rebooting), &without), ReportVerdict::Duplicate);
    let greeting = Greeting { mode: NodeMode::Running, boot_id: "new", answers_queries: true, journal_lost: true };
    for cancel_requested in [false, true] {
        let assigned = Stored { cancel_requested, ..stored(E::Assigned) };
        let HelloVerdict::Change(to, error) = on_hello(&assigned, &reboot(), false, greeting) else { panic!() };
        assert_eq!((to, error.unwrap().reason.as_str()), (E::Failed, reason::JOURNAL_LOST));
        assert_eq!(on_hello(&assigned, &reboot(), true, greeting), HelloVerdict::Keep, "a listed one is not lost");
    }
}
