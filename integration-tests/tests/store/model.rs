//! Runs random histories against the real store and dispatcher and checks them after every step. Their steps come from
//! operators, controllers, nodes, databases and the clock. A failing history is shrunk and printed with its seed.
//!
//! `HISTORIES` sets the number of histories (default 200). `MODEL_SEED` repeats a run. One history in three uses
//! Postgres, the others SQLite.

mod bytes;
mod checks;
mod counts;
mod database;
mod operator;
mod pi;
mod rest;
mod session;
mod step;
mod torn;
mod world;

use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestRng, TestRunner};

use counts::Counts;
use database::Template;
use step::history;
use world::World;

/// Upper bound of the scenes of a history, exclusive.
const SCENES: usize = 100;
/// Number of nodes in a history.
const PIS: usize = 4;
/// Number of controllers in a history.
const CONTROLLERS: usize = 2;
/// Error text of a pool that got no connection in time.
const LATE: &str = "no connection to postgres";

fn pick(number: u8, of: usize) -> usize {
    usize::from(number) % of.max(1)
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
        // The printed seed repeats a failure, so proptest needs no file for it.
        failure_persistence: None,
        max_shrink_iters: 1000,
        ..Config::default()
    };
    let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let template = runtime.block_on(Template::make());
    let (done, ran) = (std::cell::RefCell::new(Counts::default()), std::cell::Cell::new(0));
    let late = std::cell::Cell::new(0);
    let histories_of = (0_u8..3, history(SCENES));
    let outcome = runner.run(&histories_of, |(place, steps)| {
        let counts = runtime.block_on(async {
            let mut world = World::new(&template, place == 2).await;
            world.begin().await?;
            for step in &steps {
                world.step(step).await.map_err(|wrong| format!("at {step:?}: {wrong}"))?;
                world.check().await.map_err(|wrong| format!("after {step:?}: {wrong}"))?;
            }
            world.comes_to_rest().await.map_err(|wrong| format!("at rest: {wrong}"))
        });
        match counts {
            Ok(counts) => {
                done.borrow_mut().merge(&counts);
                ran.set(ran.get() + 1);
                Ok(())
            }
            // On a busy machine even a healthy database may answer too late, so this is no failure of the history.
            Err(wrong) if place == 2 && wrong.contains(LATE) => {
                late.set(late.get() + 1);
                Ok(())
            }
            Err(wrong) => {
                // The first failure is the original history. Each later one is an attempt to shrink it.
                println!("model: after {} histories: {wrong}", ran.get());
                Err(TestCaseError::fail(wrong))
            }
        }
    });
    println!("model: {}, {} cut short by a late database", done.borrow(), late.get());
    // A bound, because otherwise a Postgres that never answers would pass.
    assert!(late.get() * 10 <= histories, "MODEL_SEED={seed}: the database was late in {} histories", late.get());
    if let Err(failure) = outcome {
        panic!("MODEL_SEED={seed}: {failure}");
    }
    // A shorter run may miss a kind of step by chance.
    if histories >= 200 {
        let missing = done.borrow().missing(template.has_small_disk());
        assert!(missing.is_empty(), "MODEL_SEED={seed}: none of {histories} histories reached: {missing:?}");
    }
}
