//! Faults, and the plans of all single ones and of random pairs.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::Rng as _;
use proptest::test_runner::{RngAlgorithm, TestRng};

use crate::hook::{Point, SINCE};

const ENOSPC: i32 = 28;
const EROFS: i32 = 30;
const EIO: i32 = 5;
const ERRORS: [i32; 3] = [ENOSPC, EROFS, EIO];
/// The steps of one name count for pairs up to a multiple of this number.
const ROUND: usize = 4;
/// Steps after the first fault of a pair at which the second one may come: a whole installation.
const MOST_SINCE: usize = 80;

/// Between the parts of a plan's text.
const AND: &str = " and ";

/// A fault at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The agent is killed.
    Kill,
    /// The power is cut, and nothing of the step was done.
    CutLost,
    /// The power is cut in the middle of a write.
    CutTorn,
    /// The step fails with this error.
    FailsOnce(i32),
    /// This step fails whenever it is tried; a word to the controller, for ten minutes.
    FailsFromNow(i32),
    /// The next read of the card fails.
    NextReadFails,
    /// Something else happens, outside of the node.
    Outside(Event),
}

/// A fault outside of the node. The step is done meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The network is away for this long; `None`: forever.
    NoNetwork(Option<Duration>),
    /// A controller of the version before answers.
    VersionBefore,
    /// A controller of the version after answers.
    VersionAfter,
    /// The controller is restored from a backup in which the operation was not begun.
    RestoredBeforeBegin,
    /// The controller is restored from a backup that does not know the operation.
    RestoredBeforeCreation,
    /// The controller's clock is this many days off, for ten minutes.
    Clock(i64),
    /// The operation is cancelled.
    Cancelled,
    /// The execution is abandoned as soon as that is allowed.
    Abandoned,
    /// The execution is abandoned, and another image is ordered.
    Replaced,
    /// The node loses power and network, and the operation is cancelled before it is back.
    CancelledWhileAway,
    /// The node loses power and network, and the execution is abandoned before it is back.
    AbandonedWhileAway,
    /// Words to the controller fail for ten minutes. A part of [`Fault::FailsFromNow`].
    WordsFail,
}

impl Event {
    /// True if the machine loses its power at that step.
    pub(crate) fn takes_the_power(self) -> bool {
        matches!(self, Self::CancelledWhileAway | Self::AbandonedWhileAway)
    }

    /// True if an operator ends the execution.
    pub(crate) fn calls_off(self) -> bool {
        matches!(
            self,
            Self::Cancelled | Self::Abandoned | Self::Replaced | Self::CancelledWhileAway | Self::AbandonedWhileAway
        )
    }
}

const EVENTS: [Event; 14] = [
    Event::NoNetwork(Some(Duration::from_secs(1))),
    Event::NoNetwork(Some(Duration::from_secs(3600))),
    Event::NoNetwork(None),
    Event::VersionBefore,
    Event::VersionAfter,
    Event::RestoredBeforeBegin,
    Event::RestoredBeforeCreation,
    Event::Clock(400),
    Event::Clock(-400),
    Event::Cancelled,
    Event::Abandoned,
    Event::Replaced,
    Event::CancelledWhileAway,
    Event::AbandonedWhileAway,
];

/// A plan: faults at steps.
pub(crate) type Plan = Vec<(Point, Fault)>;

/// All faults that can happen at a step. `at` numbers the steps, so that each error comes up.
fn faults(at: usize, writes: bool) -> Vec<Fault> {
    let error = |shift: usize| ERRORS.get((at + shift) % ERRORS.len()).copied().unwrap_or(EIO);
    let mut faults = vec![Fault::Kill, Fault::CutLost];
    if writes {
        faults.push(Fault::CutTorn);
    }
    faults.extend([Fault::FailsOnce(error(0)), Fault::FailsFromNow(error(1)), Fault::NextReadFails]);
    faults.extend(EVENTS.map(Fault::Outside));
    faults
}

/// Every fault at every step.
pub(crate) fn singles(points: &[(Point, bool)]) -> Vec<Plan> {
    let faults_at = |(at, (point, writes)): (usize, &(Point, bool))| -> Vec<Plan> {
        faults(at, *writes).into_iter().map(|fault| vec![(point.clone(), fault)]).collect()
    };
    points.iter().enumerate().flat_map(faults_at).collect()
}

/// The text of a plan, by which it is played again.
pub(crate) fn described(plan: &Plan) -> String {
    plan.iter().map(|(point, fault)| format!("{fault:?} at {point}")).collect::<Vec<_>>().join(AND)
}

/// The plan of this text. `None`: there is no such fault.
pub(crate) fn read(text: &str) -> Option<Plan> {
    let errors = (0..ERRORS.len()).flat_map(|at| faults(at, true));
    let all: Vec<Fault> = errors.collect();
    let one = |part: &str| {
        let (fault, point) = part.split_once(" at ")?;
        let (name, number) = point.rsplit_once(" #")?;
        let fault = all.iter().find(|known| format!("{known:?}") == fault)?;
        Some((Point { name: name.to_owned(), number: number.parse().ok()? }, *fault))
    };
    text.split(AND).map(one).collect()
}

/// Two random faults: one at a step of the recording, and one at a step after it, which need not be in the recording.
pub(crate) fn pair(points: &[(Point, bool)], seed: u64) -> Plan {
    let mut bytes = [0; 32];
    let (low, _) = bytes.split_at_mut(8);
    low.copy_from_slice(&seed.to_le_bytes());
    let mut random = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut next = |below: usize| {
        let below = u64::try_from(below.max(1)).unwrap_or(1);
        usize::try_from(random.next_u64() % below).unwrap_or_default()
    };
    // By the name first: the number of writes of a journal differs by one from recording to recording, and a seed has to
    // give the same pair all the same, almost always.
    let names: BTreeSet<&str> = points.iter().map(|(point, _)| point.name.as_str()).collect();
    let name = names.iter().nth(next(names.len())).copied().unwrap_or_default();
    let of_name: Vec<&(Point, bool)> = points.iter().filter(|(point, _)| point.name == name).collect();
    let rounded = if of_name.len() > ROUND { of_name.len() / ROUND * ROUND } else { of_name.len() };
    let Some((point, writes)) = of_name.get(next(rounded)) else { return Vec::new() };
    let first = faults(next(ERRORS.len()), *writes);
    // Of the second ones half end the agent: what a fault leaves shows when the agent begins again.
    let mut second = faults(next(ERRORS.len()), true);
    if next(2) == 0 {
        second.truncate(3);
    }
    let since = Point { name: SINCE.to_owned(), number: u32::try_from(next(MOST_SINCE)).unwrap_or_default() + 1 };
    let (first_at, second_at) = (next(first.len()), next(second.len()));
    let first = first.get(first_at).map(|fault| (point.clone(), *fault));
    let second = second.get(second_at).map(|fault| (since, *fault));
    // Not mended: a node that renewed its certificate by a clock far ahead believes that time. A restored controller does
    // not know the new certificate, and the node takes the controller's for expired. It has to be enrolled again.
    let is_ahead = matches!(first, Some((_, Fault::Outside(Event::Clock(1..)))));
    let is_restored = |event| matches!(event, Event::RestoredBeforeBegin | Event::RestoredBeforeCreation);
    let second =
        second.filter(|(_, fault)| !(is_ahead && matches!(fault, Fault::Outside(event) if is_restored(*event))));
    first.into_iter().chain(second).collect()
}

#[test]
fn plan_is_read_from_its_text() {
    let point = |name: &str, number| (Point { name: name.to_owned(), number }, true);
    let points = [point("replace journal.json", 1), point("write in place autoboot.txt", 2)];
    for plan in singles(&points).into_iter().chain((0..50).map(|seed| pair(&points, seed))) {
        assert_eq!(read(&described(&plan)), Some(plan));
    }
    assert_eq!(read("Kill at nothing"), None);
}
