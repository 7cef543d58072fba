//! Every state against every step, and against every way in which an agent can find it.

use std::time::Duration;

use super::{
    Action, DID_NOT_POWER_OFF, Found, JOURNAL_LOST, Kind, Mode, Notice, RELEASE_MISMATCH, Resume, State,
    UNKNOWN_ACTION, Update, WRONG_MODE, WrongState, resume,
};

const KINDS: [Kind; 4] = [Kind::Reboot, Kind::PowerOff, Kind::Update, Kind::Unknown];

/// The transitions that exist: step, action, from, to. Every other combination must be refused.
fn expected(step: &str, kind: Kind, from: State) -> Option<State> {
    use State::{Accepted, Armed, Cancelled, Failed, Installing, RolledBack, Succeeded, Trial, Verifying};
    match (step, kind, from) {
        ("arm", Kind::Reboot | Kind::PowerOff | Kind::Update, Accepted) => Some(Armed),
        ("install", Kind::Update, Accepted | Armed | Installing | Trial) => Some(Installing),
        ("try_boot", Kind::Update, Installing) => Some(Trial),
        ("verify", Kind::Update, Trial) => Some(Verifying),
        ("succeed", Kind::Reboot | Kind::PowerOff, Armed) | ("succeed", Kind::Update, Verifying) => Some(Succeeded),
        ("fail", _, Accepted | Armed | Installing | Trial | Verifying) => Some(Failed),
        ("roll_back", Kind::Update, Armed) => Some(RolledBack),
        ("cancel", _, Accepted) => Some(Cancelled),
        _ => None,
    }
}

type Step = fn(State, Kind) -> Result<State, WrongState>;

#[test]
fn each_step_follows_only_from_the_states_named_for_it() {
    let steps: [(&str, Step); 8] = [
        ("arm", State::arm),
        ("install", State::install),
        ("try_boot", State::try_boot),
        ("verify", State::verify),
        ("succeed", State::succeed),
        ("fail", State::fail),
        ("roll_back", State::roll_back),
        ("cancel", State::cancel),
    ];
    for (name, step) in steps {
        for kind in KINDS {
            for from in State::ALL {
                assert_eq!(step(from, kind).ok(), expected(name, kind, from), "{name} of {kind:?} from {from:?}");
            }
        }
    }
}

fn found(kind: Kind, state: State, mode: Mode, same_boot: bool, release_is_ours: bool) -> Resume {
    resume(Found { kind, state, mode, same_boot, release_is_ours, torn: false })
}

#[test]
fn a_job_that_is_over_is_left_alone_however_it_is_found() {
    for kind in KINDS {
        for state in State::ALL.into_iter().filter(|state| state.is_final()) {
            for mode in [Mode::Running, Mode::Installer] {
                for (same_boot, ours) in [(false, false), (false, true), (true, false), (true, true)] {
                    assert_eq!(found(kind, state, mode, same_boot, ours), Resume::Nothing);
                }
            }
        }
    }
}

#[test]
fn what_an_agent_does_with_a_job_it_finds_is_this_table() {
    use Kind::{PowerOff, Reboot, Unknown, Update};
    use Mode::{Installer, Running};
    use State::{Accepted, Armed, Installing, Trial, Verifying};
    let table = [
        // action, state, mode, same boot, release names it
        (Reboot, Accepted, Running, true, false, Resume::Begin),
        (Reboot, Accepted, Running, false, false, Resume::Begin),
        (Reboot, Armed, Running, true, false, Resume::GoDown),
        (Reboot, Armed, Running, false, false, Resume::Succeed),
        (Reboot, Armed, Installer, true, false, Resume::GoDown),
        (Reboot, Armed, Installer, false, false, Resume::Succeed),
        (Reboot, Installing, Running, true, false, Resume::Fail(WRONG_MODE)),
        (Reboot, Trial, Installer, false, false, Resume::Fail(WRONG_MODE)),
        (Reboot, Verifying, Running, false, false, Resume::Fail(WRONG_MODE)),
        (PowerOff, Accepted, Running, true, false, Resume::Begin),
        (PowerOff, Armed, Running, true, false, Resume::Fail(DID_NOT_POWER_OFF)),
        (PowerOff, Armed, Running, false, false, Resume::Succeed),
        (PowerOff, Installing, Running, false, false, Resume::Fail(WRONG_MODE)),
        (Update, Accepted, Running, true, false, Resume::Begin),
        (Update, Accepted, Running, false, false, Resume::Begin),
        (Update, Accepted, Installer, true, false, Resume::Begin),
        (Update, Armed, Running, true, false, Resume::GoDown),
        (Update, Armed, Running, false, false, Resume::RollBack),
        (Update, Armed, Installer, true, false, Resume::Install),
        (Update, Armed, Installer, false, false, Resume::Install),
        (Update, Installing, Installer, true, false, Resume::Install),
        (Update, Installing, Installer, false, false, Resume::Install),
        (Update, Installing, Running, false, false, Resume::Fail(WRONG_MODE)),
        (Update, Trial, Installer, true, false, Resume::TryBoot),
        (Update, Trial, Installer, false, false, Resume::TrialFailed),
        (Update, Trial, Running, false, true, Resume::Verify),
        (Update, Trial, Running, true, true, Resume::Verify),
        (Update, Trial, Running, false, false, Resume::Fail(RELEASE_MISMATCH)),
        (Update, Verifying, Running, true, true, Resume::AwaitVerdict),
        (Update, Verifying, Running, false, true, Resume::AwaitVerdict),
        (Update, Verifying, Installer, false, false, Resume::TrialFailed),
        (Unknown, Accepted, Running, true, false, Resume::Fail(UNKNOWN_ACTION)),
    ];
    for (kind, state, mode, same_boot, ours, expected) in table {
        assert_eq!(
            found(kind, state, mode, same_boot, ours),
            expected,
            "{kind:?} {state:?} {mode:?} same boot {same_boot} ours {ours}"
        );
    }
}

#[test]
fn nothing_goes_down_again_after_the_boot_id_changed() {
    for kind in KINDS {
        for state in State::ALL {
            for mode in [Mode::Running, Mode::Installer] {
                let decision = found(kind, state, mode, false, true);
                // A machine that restarts for the same job at every boot could never be used again.
                assert_ne!(decision, Resume::GoDown, "{kind:?} {state:?} {mode:?}");
                assert_ne!(decision, Resume::TryBoot, "{kind:?} {state:?} {mode:?}");
            }
        }
    }
}

#[test]
fn only_a_raw_update_writes_the_whole_card() {
    let notice = Notice { delay: Duration::ZERO, message: String::new() };
    let update =
        |raw| Action::Update(Update { image: None, bootcode: None, notice: notice.clone(), discard_home: false, raw });
    assert!(update(true).is_raw() && !update(false).is_raw());
    assert!(!Action::Reboot(notice.clone()).is_raw() && !Action::Unknown.is_raw());
}

#[test]
fn torn_job_that_may_have_been_done_is_not_begun_again() {
    for (kind, mode, same_boot, next) in [
        (Kind::Reboot, Mode::Running, false, Resume::Fail(JOURNAL_LOST)),
        (Kind::PowerOff, Mode::Running, false, Resume::Fail(JOURNAL_LOST)),
        (Kind::Update, Mode::Running, false, Resume::Fail(JOURNAL_LOST)),
        // Only the agent restarted, so the command to go down has had no effect.
        (Kind::Reboot, Mode::Running, true, Resume::Begin),
        (Kind::Update, Mode::Installer, false, Resume::Begin),
    ] {
        let found = Found { kind, state: State::Accepted, mode, same_boot, release_is_ours: false, torn: true };
        assert_eq!(resume(found), next, "{kind:?} {mode:?} {same_boot}");
    }
}
