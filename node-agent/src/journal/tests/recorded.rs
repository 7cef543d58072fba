//! Recorded journals: as each version wrote them, and as a newer agent may write them.

use super::{ONE, TWO, state};
use crate::job::{Action, Failure, State};
use crate::journal::{FILE_NAME, Journal, file};

const TODAY: &str = include_str!("../../../testdata/card/journal-1.json");
const NEXT: &str = include_str!("../../../testdata/card/journal-next.json");

fn open(text: &str) -> (tempfile::TempDir, Journal) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join(FILE_NAME), text).unwrap();
    let journal = Journal::open(dir.path(), "a").unwrap();
    (dir, journal)
}

#[tokio::test]
async fn recorded_journal_is_read_and_written_as_it_was() {
    let (dir, journal) = open(TODAY);
    let entries = journal.entries();
    let entry = entries.unfinished().unwrap();
    assert_eq!((entry.execution.as_str(), entry.state, entry.sequence, entry.trials), (ONE, State::Installing, 3, 1));
    assert_eq!(entry.error, Some(Failure::new("DISK_IO", "cannot write")));
    assert_eq!(entry.tries.failed(), 0);
    let written = file::encode(dir.path(), &entries, None).unwrap();
    assert_eq!(String::from_utf8(written).unwrap(), TODAY);
}

#[tokio::test]
async fn journal_of_a_newer_agent_loses_no_job() {
    let (dir, journal) = open(NEXT);
    assert!(!dir.path().join("journal.json.bad-1").exists());
    let (entries, today) = (journal.entries(), open(TODAY).1.entries());
    assert_eq!(entries.unfinished(), today.unfinished(), "unknown fields change nothing");
    // An unknown action keeps its place; an entry in an unknown state is left out.
    assert_eq!((state(&journal, TWO), &entries.get(TWO).unwrap().action), (State::Cancelled, &Action::Unknown));
    assert_eq!(entries.iter().count(), 3);
    // The unfinished job still goes on.
    journal.install(ONE).await.unwrap();
    assert_eq!(state(&Journal::open(dir.path(), "b").unwrap(), ONE), State::Installing);
}
