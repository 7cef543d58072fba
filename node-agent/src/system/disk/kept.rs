//! Probes a card to decide what an installation formats, and records that decision on the card.

use std::path::Path;

use super::erasure::{self, Begun, Decided};
use super::probe::{Contents, probe};
use super::{Disk, SystemError};
use crate::durable;
use crate::settings::Settings;
use crate::system::Erase;

/// File on the recovery partition that lists the file systems being made, one name a line.
const MARK: &str = "marco/erasing";

/// The decisions of an interrupted installation. Empty: none was interrupted.
pub(crate) fn begun(recovery: &Path) -> Result<Begun, SystemError> {
    let path = recovery.join(MARK);
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Begun::default()),
        read => read.map_err(SystemError::io("read", path))?,
    };
    let has = |name| text.lines().any(|line| line == name);
    Ok(Begun { root: has("root"), home: has("home") })
}

/// Records what is being made. Called right before each file system is made, and not earlier: until then its partition
/// is unchanged, and another operation may decide otherwise.
pub(crate) fn begin(recovery: &Path, begun: Begun) -> Result<(), SystemError> {
    let named = [("root\n", begun.root), ("home\n", begun.home)];
    let text: String = named.iter().filter(|(_, begun)| *begun).map(|(name, _)| *name).collect();
    let path = recovery.join(MARK);
    durable::replace(&path, text.as_bytes(), 0o600).map_err(SystemError::io("write", path))
}

/// Removes the record: everything was made.
pub(crate) fn end(recovery: &Path) -> Result<(), SystemError> {
    let path = recovery.join(MARK);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(SystemError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Decides what an installation formats on this card. Nothing is written.
///
/// # Errors
/// Returns an error if something is to be kept that is not understood or cannot be read.
pub(crate) async fn decide(
    disk: &Disk,
    settings: &Settings,
    erase: Erase,
    begun: Begun,
) -> Result<Decided, SystemError> {
    let (card, wanted) = (disk.clone(), settings.clone());
    let planned = tokio::task::spawn_blocking(move || Ok::<_, SystemError>((card.plan(&wanted)?, card.parts()?)));
    let ended = |error| SystemError::Invalid(format!("looking at the card did not end: {error}"));
    let (plan, parts) = planned.await.map_err(ended)??;
    // `decide` is pure and `probe` is async, so the contents are collected first.
    let mut seen = Vec::new();
    for place in erasure::undecided(&plan, erase, begun) {
        seen.push((place, probe(&disk.partition(place.number())).await));
    }
    let look = |place| {
        let found = seen.iter().find(|(looked_at, _)| *looked_at == place);
        found.map_or_else(|| Contents::Unreadable("it was not looked at".into()), |(_, contents)| contents.clone())
    };
    Ok(erasure::decide(&plan, &parts, erase, begun, look)?)
}

#[cfg(test)]
mod tests {
    use super::{Begun, begin, begun, end};

    #[test]
    fn recorded_mark_is_read() {
        let recovery = tempfile::tempdir().unwrap();
        std::fs::create_dir(recovery.path().join("marco")).unwrap();
        for text in
            [include_str!("../../../testdata/card/erasing-1"), include_str!("../../../testdata/card/erasing-next")]
        {
            std::fs::write(recovery.path().join(super::MARK), text).unwrap();
            assert_eq!(begun(recovery.path()).unwrap(), Begun { root: true, home: true });
        }
    }

    #[test]
    fn what_was_begun_is_known_until_it_is_done() {
        let recovery = tempfile::tempdir().unwrap();
        let recovery = recovery.path();
        assert_eq!(begun(recovery).unwrap(), Begun::default());
        for now in
            [Begun { root: true, home: false }, Begun { root: true, home: true }, Begun { root: false, home: true }]
        {
            begin(recovery, now).unwrap();
            assert_eq!(begun(recovery).unwrap(), now);
        }
        end(recovery).unwrap();
        end(recovery).unwrap();
        assert_eq!(begun(recovery).unwrap(), Begun::default());
        // An unreadable record is an error, not "nothing was begun".
        std::fs::create_dir(recovery.join(super::MARK)).unwrap();
        assert!(begun(recovery).is_err());
    }
}
