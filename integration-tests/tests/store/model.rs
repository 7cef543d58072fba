//! Random histories of operators, controllers, nodes and the time against the real store and dispatcher, checked after
//! every step. A history that fails is made smaller, and printed with the seed.
//!
//! `HISTORIES` says how many (default 200), `MODEL_SEED` repeats a run.

mod checks;
mod pi;
mod world;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use world::World;

/// Most steps of a history.
const STEPS: usize = 80;
/// Nodes and controllers of a history.
const PIS: usize = 4;
const CONTROLLERS: usize = 2;

/// Something that happens. Numbers choose among what there is, so that a step means something in every history, also
/// when the steps before it were taken out.
#[derive(Debug, Clone)]
enum Step {
    /// An operator creates an operation on some of the nodes.
    Create {
        nodes: u8,
        off: bool,
        in_flight: Option<u8>,
        failures: Option<u8>,
    },
    /// An operator steers one.
    Cancel(u8),
    Pause(u8),
    Resume(u8),
    Abandon(u8, u8),
    /// A node says hello to a controller.
    Connect(u8, u8),
    /// Its stream breaks, and its controller notices.
    Break(u8),
    /// It reads what it was sent.
    Read(u8),
    /// It does the next thing that its journal says.
    Work(u8),
    /// It cannot do what it was asked to.
    Fail(u8),
    /// It reports the state of its journal; `true`: the controller's answer is lost on the way.
    Say(u8, bool),
    /// One that was broken into reports a delivery that there never was.
    Lie(u8, u32),
    /// Its power comes back.
    Boot(u8),
    /// A controller does what is due, so many seconds later.
    Round(u8, u16),
    /// A controller dies, or another takes its place.
    Kill(u8),
    Start(u8),
    /// The clock jumps, by so many seconds.
    Jump(i16),
}

fn step() -> impl Strategy<Value = Step> {
    let n = any::<u8>;
    prop_oneof![
        3 => (1_u8..16, any::<bool>(), proptest::option::of(1_u8..3), proptest::option::of(0_u8..3))
            .prop_map(|(nodes, off, in_flight, failures)| Step::Create { nodes, off, in_flight, failures }),
        1 => n().prop_map(Step::Cancel),
        1 => n().prop_map(Step::Pause),
        2 => n().prop_map(Step::Resume),
        1 => (n(), n()).prop_map(|(operation, node)| Step::Abandon(operation, node)),
        6 => (n(), n()).prop_map(|(node, controller)| Step::Connect(node, controller)),
        2 => n().prop_map(Step::Break),
        6 => n().prop_map(Step::Read),
        8 => n().prop_map(Step::Work),
        1 => n().prop_map(Step::Fail),
        7 => (n(), prop::bool::weighted(0.2)).prop_map(|(node, lost)| Step::Say(node, lost)),
        1 => (n(), prop_oneof![Just(u32::MAX), Just(u32::MAX - 1), 2_u32..2000]).prop_map(|(node, by)| Step::Lie(node, by)),
        3 => n().prop_map(Step::Boot),
        8 => (n(), prop_oneof![4 => 0_u16..5, 2 => 60_u16..200, 1 => 1000_u16..5000])
            .prop_map(|(controller, seconds)| Step::Round(controller, seconds)),
        1 => n().prop_map(Step::Kill),
        1 => n().prop_map(Step::Start),
        1 => any::<i16>().prop_map(|by| Step::Jump(by % 120)),
    ]
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[allow(clippy::print_stdout, reason = "what a run did is worth reading, also when it passed")]
#[test]
fn random_histories_lose_nothing_and_prove_every_success() {
    let histories = setting("HISTORIES").unwrap_or(200);
    let seed = setting("MODEL_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("model: {histories} histories, MODEL_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases: u32::try_from(histories).unwrap(),
        failure_persistence: None,
        max_shrink_iters: 3000,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let template = runtime.block_on(world::template());
    let done = std::cell::Cell::new(world::Counts::default());
    let outcome = runner.run(&proptest::collection::vec(step(), 1..STEPS), |steps| {
        let counts = runtime.block_on(async {
            let mut world = World::new(&template).await;
            for step in &steps {
                world.step(step).await.map_err(|wrong| format!("at {step:?}: {wrong}"))?;
                world.check().await.map_err(|wrong| format!("after {step:?}: {wrong}"))?;
            }
            world.comes_to_rest().await.map_err(|wrong| format!("at rest: {wrong}"))
        });
        let counts = counts.map_err(TestCaseError::fail)?;
        done.set(done.get() + counts);
        Ok(())
    });
    let counts = done.get();
    println!("model: {counts:?}");
    if let Err(failure) = outcome {
        panic!("MODEL_SEED={seed}: {failure}");
    }
    assert!(counts.succeeded > 0 && counts.failed > 0 && counts.deliveries > 0, "nothing happened: {counts:?}");
}
