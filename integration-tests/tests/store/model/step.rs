//! Steps of a history, and their generators.

use proptest::prelude::*;

/// Action of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Reboot,
    PowerOff,
    Update,
}

/// Time in which an operation may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// Within a day.
    Always,
    /// In the first half of each hour.
    Window,
    /// Within this many seconds.
    Within(u16),
}

/// A step. Its numbers choose among the things that exist, modulo their count, so that a step still has a meaning after
/// the steps before it were shrunk away.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// An operator creates an operation on some of the nodes.
    Create {
        nodes: u8,
        what: What,
        when: When,
        in_flight: Option<u8>,
        failures: Option<u8>,
    },
    /// An operator repeats a request, answered or not.
    Repeat(u8),
    /// An operator steers an operation.
    Cancel(u8),
    Pause(u8),
    Resume(u8),
    Retry(u8),
    Abandon(u8, u8),
    /// An operator decides about the conflicts of a node: accepts or abandons.
    Resolve(u8, bool),
    /// A node says Hello to a controller. `true`: its previous controller has not noticed the end of that stream yet.
    Connect(u8, u8, bool),
    /// Its stream breaks, and its controller notices.
    Break(u8),
    /// It reads its commands, does the next step of its job and reports it.
    GoOn(u8),
    /// It reads its commands.
    Read(u8),
    /// It does the next step of the job in its journal.
    Work(u8),
    /// Its job fails.
    Fail(u8),
    /// It reports a state of its journal. `true`: the answer is lost with the stream.
    Say(u8, bool),
    /// It sends progress.
    Tell(u8, u8),
    /// A compromised node reports a delivery that never existed.
    Lie(u8, u32),
    /// Its power comes back. `true`: the trial boot of its job's system succeeds, if there is one.
    Boot(u8, bool),
    /// Its power fails.
    PowerCut(u8),
    /// Its agent is killed and starts again.
    Restart(u8),
    /// The last copies of its journal are lost; 0: all. Its agent starts again.
    Tear(u8, u8),
    /// A controller runs a round, this many seconds later.
    Round(u8, u16),
    /// All controllers run rounds for 91 s, after this many seconds without any.
    Listen(u16),
    /// A controller dies, or a new one takes its place.
    Kill(u8),
    Start(u8),
    /// The clock jumps by this many seconds.
    Jump(i16),
    /// The database stores the next commit, but its answer is lost (Postgres).
    LoseAnswer,
    /// The next commit does not reach the database (Postgres).
    CutBefore,
    /// The database's disk fills, or has room again (SQLite).
    Fill,
    Empty,
    /// The database and the bytes are backed up, or the backup is restored (SQLite).
    Save,
    Restore,
    /// An operator pushes bytes under a name. `false`: the bytes are stored, but the name does not point at them yet.
    Push(u8, u8, bool),
    /// The name of a push is set. `false`: the controller dies before.
    Name(bool),
    /// An operator deletes a name. `true`: the controller dies before it removes the bytes.
    Delete(u8, bool),
    /// Housekeeping removes unneeded bytes, after their grace period.
    Sweep,
}

fn what() -> impl Strategy<Value = What> {
    prop_oneof![3 => Just(What::Reboot), 2 => Just(What::PowerOff), 2 => Just(What::Update)]
}

fn when() -> impl Strategy<Value = When> {
    prop_oneof![6 => Just(When::Always), 1 => Just(When::Window), 1 => (1_u16..400).prop_map(When::Within)]
}

fn create() -> impl Strategy<Value = Step> {
    let limits = (proptest::option::weighted(0.7, 1_u8..3), proptest::option::weighted(0.7, 0_u8..2));
    (1_u8..16, what(), when(), limits).prop_map(|(nodes, what, when, (in_flight, failures))| Step::Create {
        nodes,
        what,
        when,
        in_flight,
        failures,
    })
}

fn operators() -> impl Strategy<Value = Step> {
    let n = any::<u8>;
    prop_oneof![
        8 => create(),
        3 => n().prop_map(Step::Repeat),
        2 => n().prop_map(Step::Cancel),
        2 => n().prop_map(Step::Pause),
        // Often, because rollouts also pause by themselves, and a paused operation does nothing.
        5 => n().prop_map(Step::Resume),
        3 => n().prop_map(Step::Retry),
        2 => (n(), n()).prop_map(|(operation, node)| Step::Abandon(operation, node)),
        1 => (n(), any::<bool>()).prop_map(|(node, accept)| Step::Resolve(node, accept)),
        2 => (n(), n(), any::<bool>()).prop_map(|(name, content, whole)| Step::Push(name, content, whole)),
        2 => any::<bool>().prop_map(Step::Name),
        2 => (n(), any::<bool>()).prop_map(|(name, dies)| Step::Delete(name, dies)),
        1 => Just(Step::Sweep),
    ]
}

fn nodes() -> impl Strategy<Value = Step> {
    let n = any::<u8>;
    // Attempt `u32::MAX` once stopped every dispatch round. The range has both attempts that a controller adopts (up to
    // a thousand ahead) and attempts that it must not adopt.
    let absurd = || prop_oneof![Just(u32::MAX), Just(u32::MAX - 1), 2_u32..2000];
    prop_oneof![
        12 => (n(), n(), any::<bool>()).prop_map(|(node, controller, silent)| Step::Connect(node, controller, silent)),
        4 => n().prop_map(Step::Break),
        20 => n().prop_map(Step::GoOn),
        8 => n().prop_map(Step::Read),
        14 => n().prop_map(Step::Work),
        5 => n().prop_map(Step::Fail),
        14 => (n(), prop::bool::weighted(0.15)).prop_map(|(node, lost)| Step::Say(node, lost)),
        4 => (n(), 1_u8..).prop_map(|(node, bytes)| Step::Tell(node, bytes)),
        3 => (n(), absurd()).prop_map(|(node, by)| Step::Lie(node, by)),
        10 => (n(), prop::bool::weighted(0.8)).prop_map(|(node, new)| Step::Boot(node, new)),
        1 => n().prop_map(Step::PowerCut),
        1 => n().prop_map(Step::Restart),
        3 => (n(), 0_u8..4).prop_map(|(node, lost)| Step::Tear(node, lost)),
    ]
}

fn controllers() -> impl Strategy<Value = Step> {
    let n = any::<u8>;
    prop_oneof![
        16 => (n(), prop_oneof![4 => 0_u16..5, 2 => 60_u16..200, 1 => 1000_u16..5000])
            .prop_map(|(controller, seconds)| Step::Round(controller, seconds)),
        2 => prop_oneof![3 => Just(0_u16), 2 => 600_u16..3000].prop_map(Step::Listen),
        1 => n().prop_map(Step::Kill),
        2 => n().prop_map(Step::Start),
        1 => any::<i16>().prop_map(|by| Step::Jump(by % 120)),
    ]
}

fn troubles() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::LoseAnswer),
        3 => Just(Step::CutBefore),
        1 => Just(Step::Fill),
        // More often than the disk fills: on a full disk no write succeeds.
        4 => Just(Step::Empty),
        // Likely, because a restore needs a backup before it, and neither has an effect on Postgres.
        6 => Just(Step::Save),
        8 => Just(Step::Restore),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![5 => operators(), 16 => nodes(), 6 => controllers(), 3 => troubles()]
}

/// Steps that belong together. Single random steps hardly ever get an execution to its end.
fn scene() -> impl Strategy<Value = Vec<Step>> {
    use Step::{Boot, Connect, Fail, GoOn, Listen, Read, Round, Say, Work};
    let both = || (any::<u8>(), any::<u8>());
    prop_oneof![
        40 => step().prop_map(|step| vec![step]),
        2 => both().prop_map(|(node, controller)| vec![
            Connect(node, controller, false), Round(controller, 0), GoOn(node),
        ]),
        // The node goes down and stays away until its execution is overdue.
        1 => any::<u8>().prop_map(|node| vec![GoOn(node), Work(node), Listen(2400)]),
        2 => both().prop_map(|(node, controller)| vec![
            Boot(node, true), Connect(node, controller, false), GoOn(node), GoOn(node),
        ]),
        1 => both().prop_map(|(node, controller)| vec![
            Connect(node, controller, false), Round(controller, 0), Read(node), Fail(node), Say(node, false),
            Round(controller, 0),
        ]),
    ]
}

/// Kinds of steps that a history may leave out. With all kinds of trouble in each history, none gets far.
const KINDS: usize = 10;

fn kind(step: &Step) -> Option<usize> {
    Some(match step {
        Step::Cancel(_) | Step::Pause(_) => 0,
        Step::Retry(_) | Step::Abandon(..) | Step::Resolve(..) => 1,
        Step::Lie(..) => 2,
        Step::Break(_) | Step::PowerCut(_) | Step::Restart(_) => 3,
        Step::Kill(_) | Step::Start(_) => 4,
        Step::Jump(_) => 5,
        Step::LoseAnswer | Step::CutBefore | Step::Fill | Step::Empty => 6,
        Step::Save | Step::Restore => 7,
        Step::Tear(..) => 9,
        Step::Push(..) | Step::Name(_) | Step::Delete(..) | Step::Sweep => 8,
        _ => return None,
    })
}

/// A history of fewer than this many scenes. It begins with an operation, because without one most steps have no effect.
pub(super) fn history(scenes: usize) -> impl Strategy<Value = Vec<Step>> {
    // Each kind is left out of half of the histories.
    let without = proptest::collection::vec(any::<bool>(), KINDS);
    (create(), without, proptest::collection::vec(scene(), 1..scenes)).prop_map(|(first, without, scenes)| {
        let is_in = |step: &Step| kind(step).is_none_or(|kind| !without[kind]);
        std::iter::once(first).chain(scenes.into_iter().flatten().filter(is_in)).collect()
    })
}
