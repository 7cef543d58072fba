//! Removal of unneeded bytes, and both sides of a sweep: files without rows, and rows without files.

use std::time::SystemTime;

use super::artifact_error;
use crate::api::status::ApiError;
use crate::api::{Context, peers};
use crate::artifacts::{ArtifactError, Digest};

/// Removes bytes that no name points at. A failure is left to the sweep: the name is gone already, and the caller can
/// do nothing more.
pub(super) async fn remove(context: &Context, digest: &str) {
    if let Err(error) = try_remove(context, digest).await {
        tracing::warn!(artifact = digest, error = &*crate::chain(&error), "bytes not removed; the sweep tries again");
    }
}

async fn try_remove(context: &Context, digest: &str) -> Result<bool, ApiError> {
    let digest = Digest::parse(digest).map_err(artifact_error)?;
    // Asked while the bytes are locked: a push may have named them since.
    let unneeded = async { Ok::<_, ApiError>(!context.store.needs_bytes(&digest.to_string()).await?) };
    context.artifacts.remove_if(digest, unneeded).await
}

impl From<ArtifactError> for ApiError {
    fn from(error: ArtifactError) -> Self {
        artifact_error(error)
    }
}

/// Removes bytes that only ended operations needed.
///
/// # Errors
/// Returns the store's error; the next run removes the rest.
pub(crate) async fn remove_unneeded(context: &Context) -> Result<(), ApiError> {
    for digest in context.store.sweep_blobs().await? {
        remove(context, &digest).await;
    }
    Ok(())
}

/// Findings of a sweep.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    /// Files without an artifact that were removed.
    pub(crate) removed: u64,
    /// Digests of artifacts whose bytes no live controller has.
    pub(crate) missing: Vec<String>,
}

/// Removes files without a row that are older than `older_than`. A crash between a file's rename and its row leaves one,
/// and so does a file that could not be removed. Reports rows whose bytes are missing.
///
/// # Errors
/// Returns errors of the store, and of the disk if the stored files cannot be listed.
pub(crate) async fn sweep(context: &Context, older_than: SystemTime) -> Result<Swept, ApiError> {
    // Files first: a file that is stored meanwhile has its row by the time the rows are read, or is young.
    let files = context.artifacts.stored().await?;
    let needed = context.store.digests().await?;
    let mut swept = Swept::default();
    for (digest, changed) in &files {
        let name = digest.to_string();
        // The age protects an upload between its rename and its row.
        if *changed >= older_than || needed.contains(&name) {
            continue;
        }
        match try_remove(context, &name).await {
            Ok(true) => {
                tracing::info!(artifact = name, "a file without an artifact was removed");
                swept.removed += 1;
            }
            Ok(false) => {}
            Err(error @ ApiError::Store(_)) => return Err(error),
            // One file that the disk does not let go must not keep the others.
            Err(error) => {
                let error = &*crate::chain(&error);
                tracing::warn!(
                    artifact = name,
                    error,
                    "a file without an artifact was not removed; the next sweep tries again"
                );
            }
        }
    }
    // Checked again at the disk and in the store, because both may have changed since they were listed.
    let mut lacking = Vec::new();
    for name in needed {
        let digest = Digest::parse(&name)?;
        if !files.contains_key(&digest)
            && matches!(context.artifacts.reader(digest).await, Err(ArtifactError::NotFound(_)))
            && let Some(row) = context.store.artifact_by_sha256(&name).await?
        {
            lacking.push(row);
        }
    }
    // Bytes that this controller lacks may be at another one.
    for row in peers::nowhere(context, lacking).await? {
        tracing::warn!(artifact = row.sha256, "no live controller has the bytes of an artifact; push the file again");
        swept.missing.push(row.sha256);
    }
    Ok(swept)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::sync::Arc;
    use std::time::{Duration, SystemTime};

    use sea_orm::{ConnectOptions, ConnectionTrait as _, Database};
    use tokio_util::sync::CancellationToken;

    use super::super::{Received, keep};
    use super::{Swept, remove, sweep, try_remove};
    use crate::artifacts::Digest;
    use crate::clock::{ClockWatch, SystemClock};
    use crate::config::Config;
    use crate::store::{ArtifactRow, Kind, Purpose};
    use crate::{Controller, ORPHAN_GRACE, housekeeping};

    fn row(sha256: &str) -> ArtifactRow {
        ArtifactRow {
            id: marco_proto::names::ArtifactId::parse("os").unwrap(),
            kind: Kind::Image,
            purpose: Purpose::None,
            sha256: sha256.to_owned(),
            size: 3,
            chunk_size: 4 << 20,
            chunk_sha256: vec![0; 32],
            unpacked_bytes: 3,
            entries: 1,
            compression: "none".to_owned(),
            push_time: chrono::DateTime::UNIX_EPOCH,
            creator: "users/test".to_owned(),
            default_for: Vec::new(),
            open_to_mirror: false,
        }
    }

    fn digest(bytes: &[u8]) -> Digest {
        Digest::parse(&hex::encode(<sha2::Sha256 as sha2::Digest>::digest(bytes))).unwrap()
    }

    /// The place of stored bytes below a controller's folder.
    fn place(folder: &Path, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        let shard = folder.join("data/artifacts/sha256").join(name.get(..2).unwrap());
        std::fs::create_dir_all(&shard).unwrap();
        shard.join(name)
    }

    async fn bound(folder: &Path) -> Controller {
        Controller::bind(Config::in_test(folder), Arc::new(SystemClock)).await.unwrap()
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn files_without_rows_are_swept_and_those_that_are_needed_stay() {
        let dir = tempfile::tempdir().unwrap();
        let controller = bound(dir.path()).await;
        let context = &controller.context;

        let [named, orphan] = [&b"one"[..], b"two"].map(|bytes| {
            std::fs::write(place(dir.path(), digest(bytes)), bytes).unwrap();
            digest(bytes)
        });
        context.store.put_artifact(&row(&named.to_string())).await.unwrap();

        let young = sweep(context, SystemTime::now() - HOUR).await.unwrap();
        assert_eq!(young, Swept::default(), "a push may be about to name it");
        let swept = sweep(context, SystemTime::now() + HOUR).await.unwrap();
        assert_eq!(swept, Swept { removed: 1, missing: Vec::new() });
        assert!(context.artifacts.reader(orphan).await.is_err());
        context.artifacts.reader(named).await.unwrap();
        // The bytes were found unneeded, and a push named them since.
        remove(context, &named.to_string()).await;
        context.artifacts.reader(named).await.unwrap();
        context.store.delete_artifact(&row("").id).await.unwrap();
        assert!(try_remove(context, &named.to_string()).await.unwrap());
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_removed_keeps_no_other_and_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let controller = bound(dir.path()).await;
        let context = &controller.context;
        let mut all = [&b"one"[..], b"two", b"three"].map(|bytes| (digest(bytes), bytes));
        all.sort();
        let [(stuck, bytes), (first, one), (second, two)] = all;
        for (digest, bytes) in [(first, one), (second, two)] {
            std::fs::write(place(dir.path(), digest), bytes).unwrap();
        }
        // A folder in place of the file cannot be unlinked, also not by root.
        std::fs::create_dir(place(dir.path(), stuck)).unwrap();
        context.store.put_artifact(&row(&stuck.to_string())).await.unwrap();
        context.store.delete_artifact(&row("").id).await.unwrap();
        assert!(try_remove(context, &stuck.to_string()).await.is_err());
        // The caller of a deletion learns nothing of it: the name is gone.
        remove(context, &stuck.to_string()).await;

        let swept = sweep(context, SystemTime::now() + HOUR).await.unwrap();
        assert_eq!(swept.removed, 2, "those after it are removed");
        std::fs::remove_dir(place(dir.path(), stuck)).unwrap();
        std::fs::write(place(dir.path(), stuck), bytes).unwrap();
        let swept = sweep(context, SystemTime::now() + HOUR).await.unwrap();
        assert_eq!(swept.removed, 1);
        assert!(!place(dir.path(), stuck).exists());
    }

    #[tokio::test]
    async fn a_push_holds_its_bytes_until_their_row_is_stored() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::in_test(dir.path());
        let database = config.database_url.clone();
        let controller = Controller::bind(config, Arc::new(SystemClock)).await.unwrap();
        let context = &controller.context;
        let pushed = digest(b"one");
        std::fs::write(place(dir.path(), pushed), b"one").unwrap();
        let row = row(&pushed.to_string());
        let upload = context.artifacts.begin(pushed, row.size).await.unwrap();

        // Another process, such as a backup, holds the database while the row is to be written.
        let mut options = ConnectOptions::new(database);
        options.max_connections(1);
        let other = Database::connect(options).await.unwrap();
        other.execute_unprepared("BEGIN IMMEDIATE").await.unwrap();
        let keeping = keep(context, Received { row, facts: None, _upload: upload });
        let sweeping = async {
            let removed = try_remove(context, &pushed.to_string()).await.unwrap();
            let named = context.store.needs_bytes(&pushed.to_string()).await.unwrap();
            other.execute_unprepared("ROLLBACK").await.unwrap();
            (removed, named)
        };
        // The push comes first: it is polled until it waits for the database.
        let (kept, swept) = tokio::join!(biased; keeping, sweeping);
        assert_eq!(swept, (false, false), "removed, named");
        kept.unwrap();
        context.artifacts.reader(pushed).await.unwrap();
    }

    #[tokio::test]
    async fn housekeeping_sweeps_stored_files_after_their_grace() {
        let dir = tempfile::tempdir().unwrap();
        let controller = bound(dir.path()).await;
        let orphan = place(dir.path(), digest(b"left by a crash"));
        std::fs::write(&orphan, "left by a crash").unwrap();
        for (grace, stays) in [(ORPHAN_GRACE, true), (Duration::ZERO, false)] {
            let watch = Arc::new(ClockWatch::new(Arc::new(SystemClock), None));
            housekeeping(&controller.context, chrono::TimeDelta::days(90), watch, grace)().await;
            assert_eq!(orphan.exists(), stays, "{grace:?}");
        }
    }

    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }

    #[tokio::test]
    async fn rows_without_files_are_reported_unless_another_controller_may_have_them() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [here, there] = [dirs[0].path(), dirs[1].path()];
        let controller = bound(here).await;
        let context = &controller.context;
        let [elsewhere, gone] = [digest(b"one"), digest(b"two")].map(|digest| digest.to_string());
        for (id, sha256) in [("elsewhere", &elsewhere), ("gone", &gone)] {
            let id = marco_proto::names::ArtifactId::parse(id).unwrap();
            context.store.put_artifact(&ArtifactRow { id, ..row(sha256) }).await.unwrap();
        }
        let missing = async || {
            let mut missing = sweep(context, SystemTime::now() - HOUR).await.unwrap().missing;
            missing.sort();
            missing
        };
        let mut both = vec![elsewhere.clone(), gone.clone()];
        both.sort();
        assert_eq!(missing().await, both, "this controller is the only one");

        // Another controller of the same CA, which has the bytes of one of them. Its rows are its own here; in service
        // both read the same ones.
        for folder in ["data/pki", "certs"] {
            copy(&here.join(folder), &there.join(folder));
        }
        let other = bound(there).await;
        std::fs::write(place(there, digest(b"one")), b"one").unwrap();
        for (id, sha256) in [("elsewhere", &elsewhere), ("gone", &gone)] {
            let id = marco_proto::names::ArtifactId::parse(id).unwrap();
            other.context.store.put_artifact(&ArtifactRow { id, ..row(sha256) }).await.unwrap();
        }
        let (id, address) = (other.context.controller.clone(), other.addresses().unwrap().0.to_string());
        let beat = async |address: &str| context.store.beat(&id, address, context.clock.now()).await.unwrap();
        let stop = CancellationToken::new();
        let running = tokio::spawn(other.run(stop.clone()));
        beat(&address).await;
        assert_eq!(missing().await, std::slice::from_ref(&gone), "the other controller was asked");

        // A controller that does not answer may have them.
        beat("127.0.0.1:1").await;
        assert!(missing().await.is_empty());
        stop.cancel();
        running.await.unwrap().unwrap();
    }
}
