//! Users of the machine announce shutdowns, and take ours back.

use super::{Bench, LONG, ONE, SHORT, error, phase, reaches, reboot, update};
use crate::executor::CALLED_OFF_ON_NODE;
use crate::job::State;
use crate::system::{Refusal, Standing, System as _};

const THEIRS: &str = "USEC=4102444800000000\nMODE=poweroff\nWALL_MESSAGE=cleaning\n";

#[tokio::test]
async fn shutdown_of_somebody_else_stays_and_is_named() {
    let bench = Bench::new();
    let journal = bench.journal();
    // logind's file of the one shutdown that it keeps.
    std::fs::write(bench.machine.schedule().file, THEIRS).unwrap();
    journal.accept(ONE, 1, reboot(LONG)).await.unwrap();
    let bench = bench
        .run(&journal, async |journal, _| {
            let beside = "waiting for the notice to pass, beside a power-off at 2100-01-01T00:00:00Z (\"cleaning\") that \
                          somebody else announced";
            phase(journal, beside).await;
            journal.request_cancel(ONE).await.unwrap();
            reaches(journal, ONE, State::Cancelled).await;
        })
        .await;
    assert_eq!(std::fs::read_to_string(bench.machine.schedule().file).unwrap(), THEIRS);
}

#[tokio::test]
async fn refused_update_leaves_the_shutdown_of_somebody_else() {
    let mut bench = Bench::new();
    bench.machine.refusal = Some(Refusal { reason: "UNDER_VOLTAGE", message: "the supply is too weak".into() });
    std::fs::write(bench.machine.schedule().file, THEIRS).unwrap();
    let journal = bench.journal();
    journal.accept(ONE, 1, update(SHORT)).await.unwrap();
    let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Failed).await).await;
    assert!(matches!(bench.machine.standing(), Standing::Theirs(_)));
}

#[tokio::test]
async fn notice_that_a_user_takes_back_ends_the_job() {
    for (left, words) in [(None, "shutdown -c"), (Some(THEIRS), "a power-off at 2100-01-01T00:00:00Z")] {
        let bench = Bench::new();
        let journal = bench.journal();
        journal.accept(ONE, 1, reboot(LONG)).await.unwrap();
        let bench = bench
            .run(&journal, async |journal, machine| {
                phase(journal, "waiting for the notice to pass").await;
                // The phase is set before the announcement, and a user can only take back what is announced.
                while machine.standing() != Standing::Ours {
                    tokio::task::yield_now().await;
                }
                match left {
                    None => std::fs::remove_file(machine.schedule().file).unwrap(),
                    Some(theirs) => std::fs::write(machine.schedule().file, theirs).unwrap(),
                }
                reaches(journal, ONE, State::Failed).await;
            })
            .await;
        let failure = error(&journal, ONE);
        assert_eq!(failure.reason, CALLED_OFF_ON_NODE);
        assert!(failure.message.contains(words), "{}", failure.message);
        assert_eq!(bench.machine.told(), ["announce Reboot 3600s maintenance"]);
        assert_eq!(bench.machine.schedule().file.exists(), left.is_some());
    }
}
