//! Artifacts: names on digests, and what is known of the bytes.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use marco_proto::names::{ArtifactId, OperationId};

use super::{Store, StoreError};

/// What an artifact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// An operating system as a tarball.
    Image,
    /// Boot files as a zip.
    Bootcode,
}

/// What a bootcode starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// It is no bootcode.
    None,
    /// The installer.
    Installer,
    /// The installed system.
    System,
}

/// A stored artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactRow {
    /// Its id, a movable tag.
    pub id: ArtifactId,
    /// What it is.
    pub kind: Kind,
    /// What it starts.
    pub purpose: Purpose,
    /// SHA-256 of its bytes, lower-case hexadecimal.
    pub sha256: String,
    /// In bytes.
    pub size: u64,
    /// Bytes of a chunk.
    pub chunk_size: u32,
    /// The SHA-256 of each chunk, 32 bytes each, one after the other.
    pub chunk_sha256: Vec<u8>,
    /// Size of what is in it, in bytes.
    pub unpacked_bytes: u64,
    /// How many entries it has.
    pub entries: u64,
    /// `gzip`, `xz`, `zstd`, `zip` or `none`.
    pub compression: String,
    /// When the name was last pushed.
    pub push_time: DateTime<Utc>,
    /// Who pushed it.
    pub creator: String,
    /// Board families of which it is the default; `*`: any. Ignored by `put_artifact`.
    pub default_for: Vec<String>,
}

/// What became of removing a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeleteArtifactOutcome {
    /// The name is gone.
    Deleted {
        /// The digest whose bytes nobody needs any more, to be removed by the caller.
        bytes_unused: Option<String>,
    },
    /// Unfinished operations need it: these.
    InUse(Vec<OperationId>),
    /// No such name.
    NotFound,
}

impl Store {
    /// Stores an artifact, or moves its name to other bytes. Returns the digest that nobody needs any more, if the
    /// name left one behind; its bytes are to be removed by the caller.
    pub async fn put_artifact(&self, row: &ArtifactRow) -> Result<Option<String>, StoreError> {
        let _ = row;
        todo!()
    }

    /// The artifact of this name.
    pub async fn artifact(&self, id: &ArtifactId) -> Result<Option<ArtifactRow>, StoreError> {
        let _ = id;
        todo!()
    }

    /// An artifact with these bytes, also when its name has moved on but an operation was made with it.
    pub async fn artifact_by_sha256(&self, sha256: &str) -> Result<Option<ArtifactRow>, StoreError> {
        let _ = sha256;
        todo!()
    }

    /// Artifacts, by id.
    pub async fn artifacts(
        &self,
        after: Option<&ArtifactId>,
        limit: u32,
        kind: Option<Kind>,
    ) -> Result<Vec<ArtifactRow>, StoreError> {
        let _ = (after, limit, kind);
        todo!()
    }

    /// Removes a name, unless an unfinished operation needs it.
    pub async fn delete_artifact(&self, id: &ArtifactId) -> Result<DeleteArtifactOutcome, StoreError> {
        let _ = id;
        todo!()
    }

    /// Makes it the default of its kind and purpose for a board family; empty or `*`: for any board. `None`: no such
    /// artifact.
    pub async fn set_default(&self, id: &ArtifactId, board: &str) -> Result<Option<ArtifactRow>, StoreError> {
        let _ = (id, board);
        todo!()
    }

    /// The default for a board family, else the one for any board.
    pub async fn default_for(
        &self,
        board: &str,
        kind: Kind,
        purpose: Purpose,
    ) -> Result<Option<ArtifactRow>, StoreError> {
        let _ = (board, kind, purpose);
        todo!()
    }

    /// All defaults of a kind and purpose by board family (`*`: any).
    pub async fn defaults(&self, kind: Kind, purpose: Purpose) -> Result<BTreeMap<String, ArtifactRow>, StoreError> {
        let _ = (kind, purpose);
        todo!()
    }

    /// Forgets bytes that no name and no unfinished operation needs, and returns their digests; the caller removes the
    /// files.
    pub async fn sweep_blobs(&self) -> Result<Vec<String>, StoreError> {
        todo!()
    }
}
