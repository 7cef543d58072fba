//! What a report or a Hello of a node changes: decisions only, the store applies them.

use super::{Action, ExecutionError, ExecutionState, NodeMode, reason};

/// What the controller has stored of an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its state.
    pub state: ExecutionState,
    /// Its delivery.
    pub attempt: u32,
    /// The last sequence that was committed.
    pub sequence: u64,
    /// The reason of its error, if it has one.
    pub error_reason: Option<String>,
    /// The node's boot id when it was assigned.
    pub assign_boot_id: String,
    /// Whether a cancel was asked for.
    pub cancel_requested: bool,
}

/// What makes a success true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected<'a> {
    /// The execution's name.
    pub execution: &'a str,
    /// What was asked.
    pub action: &'a Action,
    /// The node's board family, by which its bootcode was chosen.
    pub family: &'a str,
}

/// What the node says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reported {
    /// Under which delivery.
    pub attempt: u32,
    /// The number of the state change.
    pub sequence: u64,
    /// The state.
    pub state: ExecutionState,
    /// Why it did not succeed.
    pub error: Option<ExecutionError>,
    /// The boot id under which it is said.
    pub boot_id: String,
    /// The execution that the running system says it was installed by; empty: none.
    pub release_execution: String,
    /// The digest of the image that it says it was installed from.
    pub release_image: String,
    /// The digest of the boot files that were booted.
    pub release_boot: String,
}

/// What to do about a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportVerdict {
    /// Store this state and acknowledge.
    Change(ExecutionState, Option<ExecutionError>),
    /// Store this end; the report is not acknowledged, since the node would take that for its acceptance.
    Reject(ExecutionError),
    /// Nothing new; acknowledge again.
    Duplicate,
    /// Only progress.
    Progress,
    /// The report is of another delivery: answer with an Assign, under a new attempt.
    Stale,
    /// Neither stored nor acknowledged.
    Refuse(&'static str),
}

/// What to do about an active execution after a Hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HelloVerdict {
    /// Nothing.
    Keep,
    /// Store this state.
    Change(ExecutionState, Option<ExecutionError>),
}

/// What a report changes.
pub fn on_report(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> ReportVerdict {
    if matches!(reported.state, ExecutionState::Pending | ExecutionState::Assigned | ExecutionState::Expired) {
        return ReportVerdict::Refuse("a node does not report this state");
    }
    if stored.state.is_final() {
        return on_late_report(stored, reported, expected);
    }
    if stored.state == ExecutionState::Pending || reported.attempt != stored.attempt {
        return ReportVerdict::Stale;
    }
    if reported.sequence == stored.sequence && reported.state == stored.state {
        return ReportVerdict::Progress;
    }
    if reported.sequence <= stored.sequence {
        return ReportVerdict::Duplicate;
    }
    judge(stored, reported, expected)
}

/// A report on what has ended. Only a node that was given up may still change its end, and only to another end.
fn on_late_report(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> ReportVerdict {
    let given_up = stored.error_reason.as_deref() == Some(reason::NEVER_RETURNED);
    match reported.state {
        state if given_up && state.is_final() => judge(stored, reported, expected),
        // The acknowledgement of this report is the acceptance of the new system.
        ExecutionState::Verifying if given_up => match prove(stored, reported, expected) {
            Ok(()) => ReportVerdict::Duplicate,
            Err(_) => ReportVerdict::Refuse("what the node runs is not what was asked"),
        },
        ExecutionState::Verifying if stored.state != ExecutionState::Succeeded => {
            ReportVerdict::Refuse("the execution has ended without success")
        }
        _ => ReportVerdict::Duplicate,
    }
}

fn judge(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> ReportVerdict {
    match reported.state {
        ExecutionState::Succeeded => match prove(stored, reported, expected) {
            Ok(()) => ReportVerdict::Change(ExecutionState::Succeeded, None),
            Err(error) => ReportVerdict::Change(ExecutionState::Failed, Some(error)),
        },
        ExecutionState::Verifying => match prove(stored, reported, expected) {
            Ok(()) => ReportVerdict::Change(ExecutionState::Verifying, None),
            Err(error) => ReportVerdict::Reject(error),
        },
        state => ReportVerdict::Change(state, reported.error.clone()),
    }
}

/// Success is not believed but proved: a new boot id, and for an update what the running system says it is.
fn prove(stored: &Stored, reported: &Reported, expected: &Expected<'_>) -> Result<(), ExecutionError> {
    let refuse = |message: String| Err(ExecutionError::new(reason::NOT_VERIFIED, message));
    if reported.boot_id.is_empty() {
        return refuse("the report carries no boot id".to_owned());
    }
    if reported.boot_id == stored.assign_boot_id {
        return refuse(format!("the node still runs under boot id {}", stored.assign_boot_id));
    }
    let Action::Update(update) = expected.action else { return Ok(()) };
    if reported.release_execution != expected.execution {
        return refuse(format!("the running system was installed by {:?}", reported.release_execution));
    }
    let (what, wanted, found) = match (&update.image, update.bootcode_for(expected.family)) {
        (Some(image), _) => ("image", &image.sha256, &reported.release_image),
        (None, Some(boot)) => ("boot files", &boot.sha256, &reported.release_boot),
        (None, None) => return Ok(()),
    };
    if found == wanted {
        Ok(())
    } else {
        refuse(format!("the node runs the {what} {found:?}, asked for was {wanted:?}"))
    }
}

/// What a Hello changes of an active execution, after the Hello's own report of it (if `listed`) was applied.
pub fn on_hello(stored: &Stored, action: &Action, listed: bool, mode: NodeMode, boot_id: &str) -> HelloVerdict {
    let new_boot = boot_id != stored.assign_boot_id;
    match (stored.state, action, mode) {
        (ExecutionState::Assigned, ..) if listed => HelloVerdict::Keep,
        // It was never accepted, so it can be given again, or dropped.
        (ExecutionState::Assigned, ..) if stored.cancel_requested => {
            HelloVerdict::Change(ExecutionState::Cancelled, None)
        }
        (ExecutionState::Assigned, ..) => HelloVerdict::Change(ExecutionState::Pending, None),
        // Off and on again is what was asked, whatever became of the journal.
        (ExecutionState::Rebooting, Action::PowerOff(_), _) if new_boot => {
            HelloVerdict::Change(ExecutionState::Succeeded, None)
        }
        (ExecutionState::Rebooting, Action::PowerOff(_), _) => HelloVerdict::Change(
            ExecutionState::Failed,
            Some(ExecutionError::new(
                reason::STILL_ON,
                format!("the node was to power off and is still on under boot id {boot_id}"),
            )),
        ),
        (state, ..) if state.is_active() && !listed => HelloVerdict::Change(
            ExecutionState::Failed,
            Some(ExecutionError::new(
                reason::JOURNAL_LOST,
                "the node accepted the execution and no longer knows of it",
            )),
        ),
        (ExecutionState::Rebooting, Action::Update(_), NodeMode::Installer) => {
            HelloVerdict::Change(ExecutionState::Running, None)
        }
        (ExecutionState::Rebooting, _, NodeMode::Running) if new_boot => {
            HelloVerdict::Change(ExecutionState::Verifying, None)
        }
        _ => HelloVerdict::Keep,
    }
}

#[cfg(test)]
mod tests {
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
                    let fresh = attempt == 2 && sequence == 4;
                    match &verdict {
                        ReportVerdict::Change(end, _) => {
                            assert!(fresh && from.is_active(), "{from} to {to}");
                            assert!(*end == from || from.change_to(*end).is_ok(), "{from} to {end}");
                        }
                        ReportVerdict::Stale => assert!(!from.is_final() && (attempt != 2 || from == E::Pending)),
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
        for from in E::ALL.iter().copied().filter(|state| *state != E::Succeeded) {
            for given_up in [false, true] {
                let mut stored = stored(from);
                stored.error_reason = given_up.then(|| reason::NEVER_RETURNED.to_owned());
                let lie = Reported { boot_id: "old".to_owned(), ..reported(E::Verifying, 2, 9) };
                let verdict = verdict(&stored, &lie);
                let acknowledged = matches!(verdict, ReportVerdict::Change(..) | ReportVerdict::Duplicate);
                assert!(!acknowledged, "{from}: {verdict:?}");
            }
        }
    }

    #[test]
    fn a_node_that_was_given_up_may_still_tell_its_end() {
        let given_up = Stored { error_reason: Some(reason::NEVER_RETURNED.to_owned()), ..stored(E::Failed) };
        let done = reported(E::Succeeded, 1, 9);
        assert_eq!(verdict(&given_up, &done), ReportVerdict::Change(E::Succeeded, None));
        assert_eq!(verdict(&given_up, &reported(E::Verifying, 2, 9)), ReportVerdict::Duplicate);
        assert_eq!(verdict(&given_up, &reported(E::Running, 2, 9)), ReportVerdict::Duplicate);
        let failed = Stored { error_reason: Some("DIGEST_MISMATCH".to_owned()), ..given_up };
        assert_eq!(verdict(&failed, &done), ReportVerdict::Duplicate);
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
            // Given again only when a later Hello does not list it.
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
            // Back from a power-off, whatever is in its journal.
            (E::Rebooting, off.clone(), true, Running, "old", Some((E::Failed, Some(reason::STILL_ON)))),
            (E::Rebooting, off.clone(), false, Running, "old", Some((E::Failed, Some(reason::STILL_ON)))),
            (E::Rebooting, off.clone(), true, Running, "new", Some((E::Succeeded, None))),
            (E::Rebooting, off, false, Running, "new", Some((E::Succeeded, None))),
        ];
        for (from, action, listed, mode, boot_id, expected) in cases {
            let found = match on_hello(&stored(from), &action, listed, mode, boot_id) {
                HelloVerdict::Change(to, error) => Some((to, error.map(|error| error.reason))),
                HelloVerdict::Keep => None,
            };
            let expected = expected.map(|(to, why)| (to, why.map(str::to_owned)));
            assert_eq!(found, expected, "{from}, {}, listed {listed}, boot id {boot_id}", action.kind());
        }
        let asked = Stored { cancel_requested: true, ..stored(E::Assigned) };
        let dropped = on_hello(&asked, &reboot(), false, Running, "old");
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
                            match on_hello(&stored(from), &action, listed, mode, boot_id) {
                                HelloVerdict::Change(to, _) => assert!(from.change_to(to).is_ok(), "{from} to {to}"),
                                HelloVerdict::Keep => assert!(listed, "{from}: what is not listed is not kept"),
                            }
                        }
                    }
                }
            }
        }
    }
}
