//! Images that the controller has not judged, as an earlier release or a compromised controller would serve them.

use std::fs;

use anyhow::{Context as _, Result};
use marco_controller::store::{ArtifactRow, Store};
use marco_proto::names::ArtifactId;
use marco_proto::v1::Artifact;
use sha2::{Digest as _, Sha256};

use crate::{Database, Fleet};

/// Facts without any objection to an image, so that all checks before the installation pass.
pub const NOTHING_KNOWN: Option<&str> = Some("{}");

/// Replaces the bytes of pushed artifacts, with correct digests, and starts the controller again. `facts`: the stored
/// result of the controller's checks; `None`: never checked, as by an earlier release.
///
/// # Errors
/// Returns errors of the store, of the data folder and of the controller's start.
pub async fn smuggle(
    fleet: &mut Fleet,
    database: &Database,
    images: &[(&Artifact, &[u8])],
    facts: Option<&str>,
) -> Result<()> {
    // The lock on an SQLite file allows one process, so the controller must be stopped.
    fleet.kill_controller().await?;
    let url = match database {
        Database::Sqlite => format!("sqlite://{}", fleet.data().join("marco.db").display()),
        Database::Url(url) => url.clone(),
    };
    let store = Store::open(&url).await?;
    for (pushed, bytes) in images {
        let sha256 = hex::encode(Sha256::digest(bytes));
        let shard = fleet.data().join("artifacts/sha256").join(sha256.get(..2).context("a digest")?);
        fs::create_dir_all(&shard)?;
        fs::write(shard.join(&sha256), bytes)?;
        let row = store.artifact(&ArtifactId::parse(&pushed.name)?).await?.context("the artifact")?;
        let chunks = bytes.chunks(usize::try_from(row.chunk_size)?);
        let chunk_sha256 = chunks.flat_map(|chunk| Sha256::digest(chunk).to_vec()).collect();
        let size = u64::try_from(bytes.len())?;
        store.put_artifact(&ArtifactRow { sha256: sha256.clone(), size, chunk_sha256, ..row }).await?;
        if let Some(facts) = facts {
            store.put_facts(&sha256, facts).await?;
        }
    }
    // Releases the lock on the database file.
    drop(store);
    fleet.start_controller().await
}
