//! Removal of unneeded bytes, and both sides of a sweep: files without rows, and rows without files.

use std::time::SystemTime;

use super::artifact_error;
use crate::api::Context;
use crate::api::status::ApiError;
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

/// Removes files without a row that are older than `older_than`, and returns their number. A crash between a file's
/// rename and its row leaves one, and so does a file that could not be removed. Reports rows whose bytes are missing.
///
/// # Errors
/// Returns errors of the store and the disk.
pub(crate) async fn sweep(context: &Context, older_than: SystemTime) -> Result<u64, ApiError> {
    // Files first: a file that is stored meanwhile has its row by the time the rows are read, or is young.
    let files = context.artifacts.stored().await?;
    let needed = context.store.digests().await?;
    let mut removed = 0;
    for (digest, changed) in &files {
        let name = digest.to_string();
        // The age protects an upload between its rename and its row.
        if *changed < older_than && !needed.contains(&name) && try_remove(context, &name).await? {
            tracing::info!(artifact = name, "a file without an artifact was removed");
            removed += 1;
        }
    }
    // Missing bytes may be at another controller.
    let live = context.store.live_controllers(context.clock.now()).await?;
    if live.iter().any(|other| other.id != context.controller) {
        return Ok(removed);
    }
    // Checked again at the disk and in the store, because both may have changed since they were listed.
    for name in needed {
        let digest = Digest::parse(&name)?;
        let missing = !files.contains_key(&digest)
            && matches!(context.artifacts.reader(digest).await, Err(ArtifactError::NotFound(_)))
            && context.store.needs_bytes(&name).await?;
        if missing {
            tracing::warn!(artifact = name, "the bytes of an artifact are gone from the disk; push the file again");
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, SystemTime};

    use super::{remove, sweep, try_remove};
    use crate::artifacts::Digest;
    use crate::clock::SystemClock;
    use crate::config::Config;
    use crate::store::{ArtifactRow, Kind, Purpose};

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

    #[tokio::test]
    async fn files_without_rows_are_swept_and_those_that_are_needed_stay() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config::in_test(dir.path());
        let controller = crate::Controller::bind(config, Arc::new(SystemClock)).await.unwrap();
        let context = &controller.context;

        let [named, orphan] = [&b"one"[..], b"two"].map(|bytes| {
            let digest = Digest::parse(&hex::encode(<sha2::Sha256 as sha2::Digest>::digest(bytes))).unwrap();
            let name = digest.to_string();
            let shard = dir.path().join("data/artifacts/sha256").join(name.get(..2).unwrap());
            std::fs::create_dir_all(&shard).unwrap();
            std::fs::write(shard.join(&name), bytes).unwrap();
            digest
        });
        context.store.put_artifact(&row(&named.to_string())).await.unwrap();

        let hour = Duration::from_secs(3600);
        assert_eq!(sweep(context, SystemTime::now() - hour).await.unwrap(), 0, "a push may be about to name it");
        assert_eq!(sweep(context, SystemTime::now() + hour).await.unwrap(), 1);
        assert!(context.artifacts.reader(orphan).await.is_err());
        context.artifacts.reader(named).await.unwrap();
        // The bytes were found unneeded, and a push named them since.
        remove(context, &named.to_string()).await;
        context.artifacts.reader(named).await.unwrap();
        context.store.delete_artifact(&row("").id).await.unwrap();
        assert!(try_remove(context, &named.to_string()).await.unwrap());
    }
}
