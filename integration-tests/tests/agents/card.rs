//! The files that a recorded agent left on its card, as the present agent reads them after an update of the agent alone.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use node_agent::bootpart::BootPart;
use node_agent::job::{Found, Mode, Resume, State, resume};
use node_agent::journal::{FILE_NAME, Journal};
use node_agent::system::{Board, Release};

use super::recording::folder;

/// Session, state and sequence of a report of the recorded update; the journal of which role; its state; the next step of an agent
/// that starts under another boot.
const STEPS: [(&str, Mode, State, Resume); 7] = [
    ("1-RUNNING-1/journal.json", Mode::Running, State::Accepted, Resume::Begin),
    ("1-REBOOTING-2/journal.json", Mode::Running, State::Armed, Resume::RollBack),
    ("1-REBOOTING-2/installer-journal.json", Mode::Installer, State::Armed, Resume::Install),
    ("2-RUNNING-3/installer-journal.json", Mode::Installer, State::Installing, Resume::Install),
    ("2-REBOOTING-4/journal.json", Mode::Running, State::Trial, Resume::Verify),
    ("3-VERIFYING-5/journal.json", Mode::Running, State::Verifying, Resume::AwaitVerdict),
    ("3-SUCCEEDED-6/journal.json", Mode::Running, State::Succeeded, Resume::Nothing),
];

/// The journal with these contents, as an agent opens it.
fn journal(contents: &[u8]) -> Result<(tempfile::TempDir, Journal)> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join(FILE_NAME), contents)?;
    let journal = Journal::open(dir.path(), "another-boot")?;
    Ok((dir, journal))
}

#[tokio::test]
async fn recorded_journals_are_read_and_gone_on_with() -> Result<()> {
    for (place, mode, state, next) in STEPS {
        let contents = fs::read(folder(1).join("card").join(place)).context(place)?;
        let (dir, journal) = journal(&contents)?;
        let entries = journal.entries();
        let entry = entries.iter().next().context(place)?;
        assert_eq!((entries.iter().count(), entry.state), (1, state), "{place}");
        let (kind, same_boot) = (entry.action.kind(), false);
        assert_eq!(resume(Found { kind, state, mode, same_boot, release_is_ours: true, torn: false }), next, "{place}");
        // Written as it was, so that the agent before can be put back.
        journal.probe().await?;
        assert_eq!(fs::read(dir.path().join(FILE_NAME))?, contents, "{place}");
    }
    Ok(())
}

#[test]
fn recorded_job_and_release_are_read() -> Result<()> {
    let card = tempfile::tempdir()?;
    let place = |path: &str| -> Result<std::path::PathBuf> {
        let path = card.path().join(path);
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
        Ok(path)
    };
    let recorded = folder(1).join("card");
    fs::copy(recorded.join("2-RUNNING-3/install.json"), place("marco/install.json")?)?;
    fs::copy(recorded.join("3-VERIFYING-5/marco-release"), place("etc/marco-release")?)?;
    let job = BootPart::new(card.path(), &Board::default()).read_job()?.context("no job")?;
    let release = Release::read(card.path(), None)?.context("no release")?;
    assert!(!job.execution.is_empty() && release.execution == job.execution);
    assert_eq!(release.image_sha256.len(), 64);
    Ok(())
}
