//! A journal that cannot be written.

use std::path::PathBuf;

use super::{Bench, LONG, ONE, SHORT, error, phase, reaches, reboot, update};
use crate::executor::JOURNAL_NOT_WRITABLE;
use crate::health::Ailment;
use crate::job::{Action, State};
use crate::journal::{Journal, JournalError};
use crate::system::{Mode, System as _};

/// Makes the journal's next contents impossible to write, like a file system that became read-only: everything can
/// still be read.
fn block(bench_state: PathBuf) -> PathBuf {
    let successor = bench_state.join("journal.json.new");
    std::fs::create_dir_all(successor.join("in the way")).unwrap();
    successor
}

#[tokio::test]
async fn job_whose_journal_cannot_be_written_fails_at_once() {
    for action in [reboot(SHORT), Action::PowerOff(super::notice(SHORT)), update(SHORT)] {
        let bench = Bench::new();
        let journal = bench.journal();
        journal.accept(ONE, 1, action).await.unwrap();
        let blocked = block(bench.machine.state_dir());
        let bench = bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Failed).await).await;
        assert_eq!(error(&journal, ONE).reason, JOURNAL_NOT_WRITABLE);
        let told = bench.machine.told();
        assert_eq!(told.iter().filter(|told| told.starts_with("announce")).count(), 1, "{told:?}");
        assert!(!told.iter().any(|told| told.starts_with("reboot") || told.starts_with("power")), "{told:?}");
        assert!(journal.health().has(Ailment::Journal));
        // The disk heals: the end is on it, and the node is well.
        std::fs::remove_dir_all(blocked).unwrap();
        journal.probe().await.unwrap();
        assert!(!journal.health().has(Ailment::Journal));
        let written = Journal::open(&bench.machine.state_dir(), "reader").unwrap();
        assert_eq!(written.entries().get(ONE).unwrap().state, State::Failed);
    }
}

#[tokio::test]
async fn what_a_boot_decided_is_said_though_it_cannot_be_written() {
    let bench = Bench::new();
    let before = bench.journal();
    before.accept(ONE, 1, reboot(SHORT)).await.unwrap();
    before.arm(ONE).await.unwrap();
    block(bench.machine.state_dir());
    let bench = bench.reboot("boot-b", Mode::Running);
    let journal = bench.journal();
    bench.run(&journal, async |journal, _| reaches(journal, ONE, State::Succeeded).await).await;
}

#[tokio::test]
async fn cancel_is_obeyed_though_it_cannot_be_written() {
    let bench = Bench::new();
    let journal = bench.journal();
    journal.accept(ONE, 1, reboot(LONG)).await.unwrap();
    let blocked = bench.machine.state_dir();
    let _bench = bench
        .run(&journal, async |journal, _| {
            phase(journal, "waiting for the notice to pass").await;
            block(blocked);
            journal.request_cancel(ONE).await.unwrap();
            reaches(journal, ONE, State::Cancelled).await;
        })
        .await;
    let refused = journal.accept(super::TWO, 1, reboot(SHORT)).await;
    assert!(matches!(refused, Err(JournalError::Io { .. })), "{refused:?}");
    assert!(journal.entries().get(super::TWO).is_none(), "what is not on the disk is not begun");
}
