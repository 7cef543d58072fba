//! Jobs that were accepted before an outage, and wait for a controller's word after it.

use std::sync::Arc;

use super::{Bench, LONG, ONE, SHORT, armed_update, error, goes_down, notice, phase, reaches, reboot};
use crate::executor::{CALLED_OFF, NO_CONTROLLER};
use crate::job::{Action, State};
use crate::journal::Journal;
use crate::system::Mode;

/// A bench on which no controller has been heard yet.
fn unheard(bench: Bench) -> (Bench, Arc<Journal>) {
    let journal = bench.journal();
    (Bench { heard: false, ..bench }, journal)
}

/// Gives every task time to go on.
async fn settle() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn job_of_an_earlier_boot_waits_for_a_word() {
    for action in [reboot(SHORT), Action::PowerOff(notice(SHORT))] {
        let bench = Bench::new();
        bench.journal().accept(ONE, 1, action).await.unwrap();
        let (bench, journal) = unheard(bench.reboot("boot-b", Mode::Running));
        let bench = bench
            .run(&journal, async |journal, machine| {
                settle().await;
                // Not even a warning to users: the job may have been given up hours ago.
                assert_eq!((machine.told(), journal.entries().get(ONE).unwrap().state), (vec![], State::Accepted));
                journal.request_cancel(ONE).await.unwrap();
                reaches(journal, ONE, State::Cancelled).await;
            })
            .await;
        assert_eq!(bench.machine.told(), [""; 0]);
    }
}

#[tokio::test]
async fn job_of_an_earlier_boot_goes_on_when_it_stands() {
    let bench = Bench::new();
    bench.journal().accept(ONE, 1, reboot(LONG)).await.unwrap();
    let (bench, journal) = unheard(bench.reboot("boot-b", Mode::Running));
    bench
        .run(&journal, async |journal, _| {
            // The acknowledgement is a repetition and changes nothing in the journal, but it confirms the job.
            journal.ack(ONE, 1, 1, 1).await.unwrap();
            phase(journal, "waiting for the notice to pass").await;
        })
        .await;
}

#[tokio::test]
async fn command_of_a_killed_agent_is_not_repeated_when_called_off() {
    let bench = Bench::new();
    let before = bench.journal();
    before.accept(ONE, 1, reboot(SHORT)).await.unwrap();
    before.arm(ONE).await.unwrap();
    let (bench, journal) = unheard(bench);
    let bench = bench
        .run(&journal, async |journal, machine| {
            settle().await;
            assert_eq!(machine.told(), [""; 0]);
            journal.request_cancel(ONE).await.unwrap();
            reaches(journal, ONE, State::Failed).await;
        })
        .await;
    assert_eq!(error(&journal, ONE).reason, CALLED_OFF);
    assert!(!journal.entries().get(ONE).unwrap().cancel_refused);
    assert_eq!(bench.machine.told(), [""; 0]);
}

/// The old system's reason for an update that its installer gave back.
async fn given_back(bench: Bench) -> String {
    let bench = bench.reboot("boot-c", Mode::Running);
    let journal = bench.journal();
    bench.run(&journal, async |journal, _| reaches(journal, ONE, State::RolledBack).await).await;
    error(&journal, ONE).reason
}

#[tokio::test]
async fn installer_leaves_the_old_system_alone_when_called_off() {
    let (bench, journal) = unheard(armed_update().await.reboot("boot-b", Mode::Installer));
    let bench = bench
        .run(&journal, async |journal, machine| {
            settle().await;
            assert_eq!(journal.entries().get(ONE).unwrap().state, State::Armed);
            journal.request_cancel(ONE).await.unwrap();
            goes_down(machine).await;
        })
        .await;
    assert_eq!(bench.machine.told(), ["reboot Plain Armed"]);
    assert_eq!(given_back(bench).await, CALLED_OFF);
}

#[tokio::test]
async fn installer_that_hears_nobody_leaves_the_old_system_alone() {
    let (mut bench, journal) = unheard(armed_update().await.reboot("boot-b", Mode::Installer));
    bench.confirmation = SHORT;
    let bench = bench.run(&journal, async |_, machine| goes_down(machine).await).await;
    assert_eq!(bench.machine.told(), ["reboot Plain Armed"]);
    assert_eq!(given_back(bench).await, NO_CONTROLLER);
}
