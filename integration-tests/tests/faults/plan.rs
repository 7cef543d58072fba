//! Faults, and the plans of all single ones and of random pairs.

use std::time::Duration;

use crate::hook::Point;

const ENOSPC: i32 = 28;
const EROFS: i32 = 30;
const EIO: i32 = 5;
const ERRORS: [i32; 3] = [ENOSPC, EROFS, EIO];
/// Steps of one name that get faults of their own; of more, the last one does, too.
const OF_ONE_NAME: u32 = 3;

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
    /// This step fails whenever it is tried.
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
    /// The controller's clock is this many days off, for an hour.
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

/// The points at which faults are tried: of a step that is done often only some.
pub(crate) fn chosen(points: &[(Point, bool)]) -> Vec<(Point, bool)> {
    let last = |name: &str| points.iter().filter(|(point, _)| point.name == name).map(|(point, _)| point.number).max();
    points
        .iter()
        .filter(|(point, _)| point.number <= OF_ONE_NAME || Some(point.number) == last(&point.name))
        .cloned()
        .collect()
}

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

/// Every fault at every chosen step.
pub(crate) fn singles(points: &[(Point, bool)]) -> Vec<Plan> {
    chosen(points)
        .iter()
        .enumerate()
        .flat_map(|(at, (point, writes))| {
            faults(at, *writes).into_iter().map(move |fault| vec![(point.clone(), fault)])
        })
        .collect()
}

/// Two random faults at random steps.
pub(crate) fn pair(points: &[(Point, bool)], seed: u64) -> Plan {
    let mut state = seed;
    let mut next = |below: usize| {
        // splitmix64: each seed gives another sequence.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let mixed = mixed ^ (mixed >> 31);
        usize::try_from(mixed % u64::try_from(below.max(1)).unwrap_or(1)).unwrap_or_default()
    };
    let mut plan = Vec::new();
    for _ in 0..2 {
        let Some((point, writes)) = points.get(next(points.len())) else { continue };
        let faults = faults(next(3), *writes);
        plan.extend(faults.get(next(faults.len())).map(|fault| (point.clone(), *fault)));
    }
    plan
}
