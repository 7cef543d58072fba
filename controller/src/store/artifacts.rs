//! Artifacts: names for digests, and facts about the bytes.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use marco_proto::names::{ArtifactId, NodeId, OperationId};

use super::connection::{Connection, Transaction};
use super::operations;
use super::sql::{Row, signed, sql};
use super::{Store, StoreError};
use crate::operation::NodeState;

/// Kind of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// An operating system: a tarball or the image of a disk.
    Image,
    /// Boot files as a zip.
    Bootcode,
}

/// The system that a bootcode starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// For images, which start nothing themselves.
    None,
    /// The installer.
    Installer,
    /// The installed system.
    System,
}

/// A stored artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArtifactRow {
    /// Its name, a movable tag.
    pub id: ArtifactId,
    /// Image or bootcode.
    pub kind: Kind,
    /// `Purpose::None` unless it is a bootcode.
    pub purpose: Purpose,
    /// SHA-256 of its bytes, lower-case hexadecimal.
    pub sha256: String,
    /// Size of the stored file in bytes.
    pub size: u64,
    /// Size of a chunk in bytes. The last one may be shorter.
    pub chunk_size: u32,
    /// SHA-256 of each chunk, 32 bytes each, concatenated.
    pub chunk_sha256: Vec<u8>,
    /// Size of the unpacked content in bytes.
    pub unpacked_bytes: u64,
    /// Number of entries in the archive.
    pub entries: u64,
    /// `gzip`, `xz`, `zstd`, `zip` or `none`, followed by ` disk` for the image of a whole disk.
    pub compression: String,
    /// Time of the last push of this name.
    pub push_time: DateTime<Utc>,
    /// Name of the user who pushed it.
    pub creator: String,
    /// Board families of which it is the default; `*` is any. Ignored by `put_artifact`.
    pub default_for: Vec<String>,
    /// True if every approved node may fetch it by name from the file mirror. Ignored by `put_artifact`.
    pub open_to_mirror: bool,
}

impl ArtifactRow {
    /// True for the image of a whole disk, false for a tarball.
    pub fn is_disk(&self) -> bool {
        self.compression.ends_with(" disk")
    }
}

/// Answer to a node that asks for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    /// The node's work names the bytes, or they are the default of its board.
    Granted,
    /// None of the node's work names the bytes.
    NotAsked,
    /// The node is held, quarantined or unknown.
    NotApproved,
}

/// Result of deleting a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeleteArtifactOutcome {
    /// The name is gone.
    Deleted {
        /// Digest of bytes that nothing needs now; the caller removes the file. `None` if they are still needed.
        bytes_unused: Option<String>,
    },
    /// These unfinished operations need it.
    InUse(Vec<OperationId>),
    /// No such name.
    NotFound,
}

impl Kind {
    /// The stored word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Image => "IMAGE",
            Self::Bootcode => "BOOTCODE",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Image, Self::Bootcode].into_iter().find(|kind| kind.as_str() == text)
    }
}

impl Purpose {
    /// The stored word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Installer => "INSTALLER",
            Self::System => "SYSTEM",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::None, Self::Installer, Self::System].into_iter().find(|purpose| purpose.as_str() == text)
    }
}

/// Board of a default that holds for any board.
const ANY_BOARD: &str = "*";

impl Store {
    /// Stores an artifact, or moves its name to other bytes. Returns the digest that nothing needs after that, if any;
    /// the caller removes the file.
    pub async fn put_artifact(&self, row: &ArtifactRow) -> Result<Option<String>, StoreError> {
        self.again(|| self.put_artifact_once(row)).await
    }

    async fn put_artifact_once(&self, row: &ArtifactRow) -> Result<Option<String>, StoreError> {
        let tx = self.begin().await?;
        // The name is locked before the bytes, as in every transaction.
        let before = hold(&tx, &row.id).await?;
        sql("INSERT INTO blobs (sha256, kind, purpose, size, chunk_size, chunk_sha256, unpacked_bytes, entries, \
             compression, push_time, creator) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (sha256) DO UPDATE \
             SET kind = excluded.kind, purpose = excluded.purpose, push_time = excluded.push_time, \
                 creator = excluded.creator")
        .bind(row.sha256.as_str())
        .bind(row.kind.as_str())
        .bind(row.purpose.as_str())
        .bind(signed(row.size))
        .bind(i64::from(row.chunk_size))
        .bind(row.chunk_sha256.clone())
        .bind(signed(row.unpacked_bytes))
        .bind(signed(row.entries))
        .bind(row.compression.as_str())
        .time(row.push_time)
        .bind(row.creator.as_str())
        .run(&*tx)
        .await?;
        // The mirror's flag survives a new push of the name. It does not survive a change of its kind, which its
        // publisher never meant to open.
        sql("INSERT INTO artifacts (id, sha256, kind, purpose, push_time, creator) VALUES (?, ?, ?, ?, ?, ?) \
             ON CONFLICT (id) DO UPDATE SET sha256 = excluded.sha256, kind = excluded.kind, \
                 open_to_mirror = artifacts.open_to_mirror AND artifacts.kind = excluded.kind, \
                 purpose = excluded.purpose, push_time = excluded.push_time, creator = excluded.creator")
        .bind(row.id.as_str())
        .bind(row.sha256.as_str())
        .bind(row.kind.as_str())
        .bind(row.purpose.as_str())
        .time(row.push_time)
        .bind(row.creator.as_str())
        .run(&*tx)
        .await?;
        // A name that changed its kind or purpose is no longer a default of the old one.
        sql("DELETE FROM artifact_defaults WHERE artifact = ? AND (kind <> ? OR purpose <> ?)")
            .bind(row.id.as_str())
            .bind(row.kind.as_str())
            .bind(row.purpose.as_str())
            .run(&*tx)
            .await?;
        let left = match before {
            Some(sha256) if sha256 != row.sha256 && forget_unneeded(&tx, &sha256).await? => Some(sha256),
            _ => None,
        };
        self.commit(tx).await?;
        Ok(left)
    }

    /// Reads the artifact of this name.
    pub async fn artifact(&self, id: &ArtifactId) -> Result<Option<ArtifactRow>, StoreError> {
        find(self.reader(), id).await
    }

    /// Reads an artifact with these bytes, also if its name moved on but an unfinished operation still needs them.
    pub async fn artifact_by_sha256(&self, sha256: &str) -> Result<Option<ArtifactRow>, StoreError> {
        let named =
            sql(SELECT).and(" WHERE a.sha256 = ? ORDER BY a.id LIMIT 1").bind(sha256).one(self.reader()).await?;
        let row = match named {
            Some(row) => Some(row),
            // The name was pushed again, but the node of an unfinished operation still downloads the old bytes.
            None => {
                sql("SELECT b.*, x.artifact AS id, '' AS boards, FALSE AS open_to_mirror FROM needs x JOIN blobs b ON b.sha256 = x.sha256 \
                     WHERE x.sha256 = ? ORDER BY x.artifact LIMIT 1")
                .bind(sha256)
                .one(self.reader())
                .await?
            }
        };
        row.as_ref().map(read).transpose()
    }

    /// Artifacts in the order of their ids.
    pub async fn artifacts(
        &self,
        after: Option<&ArtifactId>,
        limit: u32,
        kind: Option<Kind>,
    ) -> Result<Vec<ArtifactRow>, StoreError> {
        sql(SELECT)
            .and(" WHERE a.id > ? AND (? OR a.kind = ?) ORDER BY a.id LIMIT ?")
            .bind(after.map_or("", ArtifactId::as_str))
            .bind(kind.is_none())
            .bind(kind.map_or("", Kind::as_str))
            .bind(i64::from(limit))
            .all(self.reader())
            .await?
            .iter()
            .map(read)
            .collect()
    }

    /// Deletes a name, unless an unfinished operation needs it.
    pub async fn delete_artifact(&self, id: &ArtifactId) -> Result<DeleteArtifactOutcome, StoreError> {
        self.again(|| self.delete_artifact_once(id)).await
    }

    async fn delete_artifact_once(&self, id: &ArtifactId) -> Result<DeleteArtifactOutcome, StoreError> {
        let tx = self.begin().await?;
        let Some(sha256) = hold(&tx, id).await? else { return Ok(DeleteArtifactOutcome::NotFound) };
        let users =
            sql("SELECT DISTINCT operation AS id FROM needs WHERE artifact = ? AND sha256 = ? ORDER BY operation")
                .bind(id.as_str())
                .bind(sha256.as_str())
                .all(&*tx)
                .await?;
        if !users.is_empty() {
            let users = users.iter().map(operations::read_id).collect::<Result<_, _>>()?;
            return Ok(DeleteArtifactOutcome::InUse(users));
        }
        sql("DELETE FROM artifacts WHERE id = ?").bind(id.as_str()).run(&*tx).await?;
        let bytes_unused = if forget_unneeded(&tx, &sha256).await? { Some(sha256) } else { None };
        self.commit(tx).await?;
        Ok(DeleteArtifactOutcome::Deleted { bytes_unused })
    }

    /// Makes it the default of its kind and purpose for a board family; empty or `*` is any board. Returns `None` if
    /// there is no such artifact.
    pub async fn set_default(&self, id: &ArtifactId, board: &str) -> Result<Option<ArtifactRow>, StoreError> {
        self.again(|| self.set_default_once(id, board)).await
    }

    async fn set_default_once(&self, id: &ArtifactId, board: &str) -> Result<Option<ArtifactRow>, StoreError> {
        let tx = self.begin().await?;
        // Without such an artifact the SELECT is empty, and nothing is inserted.
        sql("INSERT INTO artifact_defaults (board, kind, purpose, artifact) \
             SELECT ?, kind, purpose, id FROM artifacts WHERE id = ? \
             ON CONFLICT (board, kind, purpose) DO UPDATE SET artifact = excluded.artifact")
        .bind(if board.is_empty() { ANY_BOARD } else { board })
        .bind(id.as_str())
        .run(&*tx)
        .await?;
        let row = find(&*tx, id).await?;
        self.commit_if(row.is_some(), tx).await?;
        Ok(row)
    }

    /// Opens a name to the file mirror, or closes it. Returns `None` if there is no such artifact.
    pub async fn open_artifact(&self, id: &ArtifactId, open: bool) -> Result<Option<ArtifactRow>, StoreError> {
        self.again(|| self.open_artifact_once(id, open)).await
    }

    async fn open_artifact_once(&self, id: &ArtifactId, open: bool) -> Result<Option<ArtifactRow>, StoreError> {
        let tx = self.begin().await?;
        sql("UPDATE artifacts SET open_to_mirror = ? WHERE id = ?").bind(open).bind(id.as_str()).run(&*tx).await?;
        let row = find(&*tx, id).await?;
        self.commit_if(row.is_some(), tx).await?;
        Ok(row)
    }

    /// Decides if a node may read the bytes of a digest.
    pub async fn node_may_have(&self, node: &NodeId, sha256: &str) -> Result<Allowance, StoreError> {
        // Images hold Wi-Fi keys and password hashes, so a node reads only what its work names. A default for any board
        // counts only if the node's board has none of its own.
        let row = sql("SELECT n.state AS state, \
                 EXISTS (SELECT 1 FROM executions e JOIN needs x ON x.operation = e.operation WHERE e.node = n.id \
                     AND e.state IN ('ASSIGNED', 'RUNNING', 'REBOOTING', 'VERIFYING') AND x.sha256 = ?) AS work, \
                 EXISTS (SELECT 1 FROM artifact_defaults d JOIN artifacts a ON a.id = d.artifact WHERE a.sha256 = ? \
                     AND (d.board = n.family OR d.board = ? AND NOT EXISTS (SELECT 1 FROM artifact_defaults o \
                         WHERE o.board = n.family AND o.kind = d.kind AND o.purpose = d.purpose))) AS usual \
             FROM nodes n WHERE n.id = ?")
        .bind(sha256)
        .bind(sha256)
        .bind(ANY_BOARD)
        .bind(node.as_str())
        .one(self.reader())
        .await?;
        // The node was deleted.
        let Some(row) = row else { return Ok(Allowance::NotApproved) };
        if row.word("state", NodeState::parse)? != NodeState::Approved {
            return Ok(Allowance::NotApproved);
        }
        Ok(if row.flag("work")? || row.flag("usual")? { Allowance::Granted } else { Allowance::NotAsked })
    }

    /// The default of a board family, or else that of any board.
    pub async fn default_for(
        &self,
        board: &str,
        kind: Kind,
        purpose: Purpose,
    ) -> Result<Option<ArtifactRow>, StoreError> {
        let mut all = self.defaults(kind, purpose).await?;
        Ok(all.remove(board).or_else(|| all.remove(ANY_BOARD)))
    }

    /// All defaults of a kind and purpose, by board family (`*` is any).
    pub async fn defaults(&self, kind: Kind, purpose: Purpose) -> Result<BTreeMap<String, ArtifactRow>, StoreError> {
        sql(SELECT_DEFAULTS)
            .bind(kind.as_str())
            .bind(purpose.as_str())
            .all(self.reader())
            .await?
            .iter()
            .map(|row| Ok((row.text("board")?, read(row)?)))
            .collect()
    }

    /// True if a name or an unfinished operation needs these bytes. False for an upload that is not stored yet.
    pub async fn needs_bytes(&self, sha256: &str) -> Result<bool, StoreError> {
        Ok(sql("SELECT sha256 FROM blobs WHERE sha256 = ?").bind(sha256).one(self.reader()).await?.is_some())
    }

    /// Digests of all bytes that are needed.
    pub async fn digests(&self) -> Result<BTreeSet<String>, StoreError> {
        let rows = sql("SELECT sha256 FROM blobs").all(self.reader()).await?;
        rows.iter().map(|row| row.text("sha256")).collect()
    }

    /// Facts found in an image, as JSON. `None` if it was not examined yet.
    pub async fn facts(&self, sha256: &str) -> Result<Option<String>, StoreError> {
        let row = sql("SELECT facts FROM blobs WHERE sha256 = ?").bind(sha256).one(self.reader()).await?;
        Ok(row.map(|row| row.maybe_text("facts")).transpose()?.flatten())
    }

    /// Stores the facts found in an image. Returns false if its bytes are gone.
    pub async fn put_facts(&self, sha256: &str, facts: &str) -> Result<bool, StoreError> {
        self.again(|| self.put_facts_once(sha256, facts)).await
    }

    async fn put_facts_once(&self, sha256: &str, facts: &str) -> Result<bool, StoreError> {
        let tx = self.begin().await?;
        let changed = sql("UPDATE blobs SET facts = ? WHERE sha256 = ?").bind(facts).bind(sha256).run(&*tx).await? == 1;
        self.commit(tx).await?;
        Ok(changed)
    }

    /// Digests of images that were not examined yet, newest first.
    pub async fn unjudged_images(&self) -> Result<Vec<String>, StoreError> {
        // Images that an earlier release stored have no facts.
        let rows = sql("SELECT sha256 FROM blobs WHERE kind = ? AND facts IS NULL ORDER BY push_time DESC")
            .bind(Kind::Image.as_str())
            .all(self.reader())
            .await?;
        rows.iter().map(|row| row.text("sha256")).collect()
    }

    /// Deletes the rows of bytes that no name and no unfinished operation needs. Returns their digests; the caller
    /// removes the files.
    pub async fn sweep_blobs(&self) -> Result<Vec<String>, StoreError> {
        self.again(|| self.sweep_blobs_once()).await
    }

    async fn sweep_blobs_once(&self) -> Result<Vec<String>, StoreError> {
        let tx = self.begin().await?;
        let mut swept = Vec::new();
        for row in sql("SELECT sha256 FROM blobs WHERE NOT EXISTS (SELECT 1 FROM artifacts a WHERE a.sha256 = \
                        blobs.sha256) AND NOT EXISTS (SELECT 1 FROM needs x WHERE x.sha256 = blobs.sha256)")
        .all(&*tx)
        .await?
        {
            let sha256 = row.text("sha256")?;
            // Asked again under the lock of the row: an operation may have begun to need the bytes.
            if forget_unneeded(&tx, &sha256).await? {
                swept.push(sha256);
            }
        }
        if !swept.is_empty() {
            self.commit(tx).await?;
        }
        Ok(swept)
    }
}

/// Locks a name until the transaction ends, and returns its digest.
async fn hold(tx: &Transaction, id: &ArtifactId) -> Result<Option<String>, StoreError> {
    let row = sql("SELECT sha256 FROM artifacts WHERE id = ? {lock}").bind(id.as_str()).one(tx).await?;
    row.map(|row| row.text("sha256")).transpose()
}

/// Deletes the row of bytes if no name and no unfinished operation needs them. Returns true if it did.
async fn forget_unneeded(tx: &Transaction, sha256: &str) -> Result<bool, StoreError> {
    // On Postgres the row is locked first. An operation that is being stored with these bytes holds it, and after the
    // wait the second statement sees that operation.
    sql("SELECT sha256 FROM blobs WHERE sha256 = ? {lock}").bind(sha256).one(tx).await?;
    let forgotten =
        sql("DELETE FROM blobs WHERE sha256 = ? AND NOT EXISTS (SELECT 1 FROM artifacts a WHERE a.sha256 = \
                         blobs.sha256) AND NOT EXISTS (SELECT 1 FROM needs x WHERE x.sha256 = blobs.sha256)")
        .bind(sha256)
        .run(tx)
        .await?;
    Ok(forgotten == 1)
}

const SELECT: &str = "SELECT b.size, b.chunk_size, b.chunk_sha256, b.unpacked_bytes, b.entries, b.compression, a.*, \
    COALESCE((SELECT string_agg(d.board, ',') FROM artifact_defaults d WHERE d.artifact = a.id), '') AS boards \
    FROM artifacts a JOIN blobs b ON b.sha256 = a.sha256";

const SELECT_DEFAULTS: &str = "SELECT f.board AS board, b.size, b.chunk_size, b.chunk_sha256, b.unpacked_bytes, \
    b.entries, b.compression, a.*, \
    COALESCE((SELECT string_agg(d.board, ',') FROM artifact_defaults d WHERE d.artifact = a.id), '') AS boards \
    FROM artifact_defaults f JOIN artifacts a ON a.id = f.artifact JOIN blobs b ON b.sha256 = a.sha256 \
    WHERE f.kind = ? AND f.purpose = ?";

async fn find(db: &impl Connection, id: &ArtifactId) -> Result<Option<ArtifactRow>, StoreError> {
    sql(SELECT).and(" WHERE a.id = ?").bind(id.as_str()).one(db).await?.as_ref().map(read).transpose()
}

fn read(row: &Row) -> Result<ArtifactRow, StoreError> {
    let mut default_for: Vec<String> =
        row.text("boards")?.split(',').filter(|board| !board.is_empty()).map(str::to_owned).collect();
    // `string_agg` promises no order.
    default_for.sort();
    Ok(ArtifactRow {
        id: row.word("id", |id| ArtifactId::parse(id).ok())?,
        kind: row.word("kind", Kind::parse)?,
        purpose: row.word("purpose", Purpose::parse)?,
        sha256: row.text("sha256")?,
        size: row.number("size")?,
        chunk_size: row.number("chunk_size")?,
        chunk_sha256: row.bytes("chunk_sha256")?,
        unpacked_bytes: row.number("unpacked_bytes")?,
        entries: row.number("entries")?,
        compression: row.text("compression")?,
        push_time: row.time("push_time")?,
        creator: row.text("creator")?,
        default_for,
        open_to_mirror: row.flag("open_to_mirror")?,
    })
}
