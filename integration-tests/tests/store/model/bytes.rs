//! Artifacts: names in the store, bytes in a folder, and the invariants between the two.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use integration_tests::image::sha256;
use marco_controller::artifacts::{ArtifactError, Artifacts, Content as Meant, Digest, Upload};
use marco_controller::operation::FrozenArtifact;
use marco_controller::store::{ArtifactRow, DeleteArtifactOutcome, Kind, Purpose, Store, StoreError};
use marco_proto::names::ArtifactId;

use super::database::{copy, folder};
use super::pick;
use super::world::{Outcome, World};
use crate::support::artifact;

/// Names and contents from which a history chooses.
const NAMES: [&str; 2] = ["os", "other"];
const CONTENTS: usize = 3;
/// Longer than the grace period of files without a row.
const LONG: Duration = Duration::from_secs(3600);

/// Content of a push.
pub(super) struct Content {
    bytes: Bytes,
    sha256: String,
    digest: Digest,
}

/// Small images that pass the check of pushed systems. They differ in one file.
pub(super) fn contents() -> Vec<Content> {
    let image = |number: usize| {
        let mut tarball = tar::Builder::new(Vec::new());
        for (name, text) in [
            ("sbin/init", "#!"),
            ("boot/firmware/config.txt", "#\n"),
            ("boot/firmware/cmdline.txt", "root=x"),
            ("boot/firmware/kernel8.img", "kernel"),
            ("boot/firmware/bcm2711-rpi-4-b.dtb", "tree"),
            ("etc/marker", ["one", "two", "three"][number % CONTENTS]),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(text.len().try_into().unwrap());
            tarball.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
        let bytes = tarball.into_inner().unwrap();
        let sha256 = sha256(&bytes);
        Content { digest: Digest::parse(&sha256).unwrap(), sha256, bytes: Bytes::from(bytes) }
    };
    (0..CONTENTS).map(image).collect()
}

/// A failure of the store or of the folder.
enum Failed {
    Store(StoreError),
    Bytes(ArtifactError),
}

impl From<ArtifactError> for Failed {
    fn from(error: ArtifactError) -> Self {
        Self::Bytes(error)
    }
}

/// A push with stored bytes. Its name does not point at them yet.
struct Pushed {
    row: ArtifactRow,
    /// Protects the bytes from removal until it is dropped.
    _upload: Upload,
}

/// The bytes, and the expected contents of the names.
pub(super) struct Shelf {
    artifacts: Artifacts,
    folder: tempfile::TempDir,
    /// Possible contents of each name; `None`: no such name. More than one after a call without an answer.
    names: [BTreeSet<Option<usize>>; NAMES.len()],
    pushed: Option<(usize, usize, Pushed)>,
}

/// A backup of the bytes and of the expected names.
pub(super) struct SavedShelf {
    folder: tempfile::TempDir,
    names: [BTreeSet<Option<usize>>; NAMES.len()],
}

impl Shelf {
    pub(super) fn new() -> Self {
        let folder = folder();
        let names = std::array::from_fn(|_| BTreeSet::from([None]));
        Self { artifacts: Artifacts::open(folder.path()).unwrap(), folder, names, pushed: None }
    }

    pub(super) fn save(&self) -> SavedShelf {
        let saved = folder();
        copy(self.folder.path(), saved.path());
        SavedShelf { folder: saved, names: self.names.clone() }
    }

    pub(super) fn restore(&mut self, saved: &SavedShelf) {
        let fresh = folder();
        copy(saved.folder.path(), fresh.path());
        let artifacts = Artifacts::open(fresh.path()).unwrap();
        *self = Self { artifacts, folder: fresh, names: saved.names.clone(), pushed: None };
    }

    /// A controller dies. The bytes of its push stay without a name.
    pub(super) fn forget_push(&mut self) {
        self.pushed = None;
    }

    /// Removes bytes as the API does: checked under their lock, so that no push can begin to need them meanwhile.
    async fn remove(&self, store: &Store, digest: Digest) -> Result<bool, Failed> {
        let unneeded = async { Ok(!store.needs_bytes(&digest.to_string()).await.map_err(Failed::Store)?) };
        self.artifacts.remove_if(digest, unneeded).await
    }

    async fn upload(&self, content: &Content) -> Result<(Upload, ArtifactRow), ArtifactError> {
        let size = u64::try_from(content.bytes.len()).unwrap();
        let mut upload = self.artifacts.begin(content.digest, size).await?;
        // Bytes that an earlier upload of the same content stored are not sent again.
        let rest = content.bytes.slice(usize::try_from(upload.offset()).unwrap()..);
        upload.append(upload.offset(), rest).await?;
        let blob = upload.finish(Meant::Image, |_| ()).await?;
        let row = ArtifactRow {
            sha256: content.sha256.clone(),
            size,
            chunk_size: blob.chunk_size,
            chunk_sha256: blob.chunk_sha256,
            ..artifact(NAMES[0], Kind::Image, Purpose::None)
        };
        Ok((upload, row))
    }
}

impl World {
    fn bytes_failed(&mut self, what: &str, error: Failed) -> Outcome {
        match error {
            Failed::Bytes(error) => Err(format!("{what}: {error:?}")),
            Failed::Store(error) => self.heard::<()>(what, Err(error)).map(|_| ()),
        }
    }

    /// Pushes a content. `whole`: the name points at it at once; otherwise a later step may set it.
    pub(super) async fn push(&mut self, name: u8, content: u8, whole: bool) -> Outcome {
        let (name, content) = (pick(name, NAMES.len()), pick(content, CONTENTS));
        // One push at a time: an earlier one is finished first.
        self.name(true).await?;
        match self.shelf.upload(&self.contents[content]).await {
            Ok((upload, row)) => {
                let row = ArtifactRow { id: ArtifactId::parse(NAMES[name]).unwrap(), ..row };
                self.shelf.pushed = Some((name, content, Pushed { row, _upload: upload }));
            }
            // Never excused: the bytes do not lie on the disk that steps fill.
            Err(error) => return Err(format!("a push: {error:?}")),
        }
        if whole { self.name(true).await } else { Ok(()) }
    }

    /// Finishes the push under way: its name points at its bytes. Not `lives`: the controller dies before.
    pub(super) async fn name(&mut self, lives: bool) -> Outcome {
        let Some((name, content, pushed)) = self.shelf.pushed.take() else { return Ok(()) };
        if !lives {
            return Ok(());
        }
        let store = self.store();
        let put = store.put_artifact(&pushed.row).await;
        match self.heard("a push", put)? {
            Some(unused) => {
                self.counts.add("pushed");
                self.shelf.names[name] = BTreeSet::from([Some(content)]);
                if let Some(digest) = unused.map(|unused| Digest::parse(&unused).unwrap())
                    && let Err(error) = self.shelf.remove(&store, digest).await
                {
                    // The name has moved already. The sweep removes the old bytes.
                    self.bytes_failed("removing bytes", error)?;
                }
            }
            None => {
                // Without an answer the name may point at the old content or the new one.
                self.shelf.names[name].insert(Some(content));
            }
        }
        Ok(())
    }

    /// Deletes a name. `dies`: the controller dies before it removes the bytes.
    pub(super) async fn delete(&mut self, name: u8, dies: bool) -> Outcome {
        let name = pick(name, NAMES.len());
        let store = self.store();
        let deleted = store.delete_artifact(&ArtifactId::parse(NAMES[name]).unwrap()).await;
        match self.heard("a deletion", deleted)? {
            Some(DeleteArtifactOutcome::Deleted { bytes_unused }) => {
                if self.shelf.names[name] == BTreeSet::from([None]) {
                    return Err(format!("{} was deleted before", NAMES[name]));
                }
                self.counts.add("deleted");
                self.shelf.names[name] = BTreeSet::from([None]);
                if let Some(digest) = bytes_unused.filter(|_| !dies).map(|unused| Digest::parse(&unused).unwrap())
                    && let Err(error) = self.shelf.remove(&store, digest).await
                {
                    self.bytes_failed("removing bytes", error)?;
                }
            }
            // Right only if an earlier deletion may have been stored without an answer.
            Some(DeleteArtifactOutcome::NotFound) if !self.shelf.names[name].contains(&None) => {
                return Err(format!("{} was acknowledged and is gone", NAMES[name]));
            }
            Some(_) => {}
            None => {
                self.shelf.names[name].insert(None);
            }
        }
        Ok(())
    }

    /// Housekeeping: removes rows that nothing needs, then files without a row.
    pub(super) async fn sweep(&mut self) -> Outcome {
        let store = self.store();
        let swept = store.sweep_blobs().await;
        let mut digests = self.heard("a sweep", swept)?.unwrap_or_default();
        // Files before rows, as in the controller: the file of a push in between has its row by the time of the second
        // list.
        let files = self.shelf.artifacts.stored().await.map_err(|error| format!("a sweep: {error:?}"))?;
        let needed = store.digests().await;
        let Some(needed) = self.heard("a sweep", needed)? else { return Ok(()) };
        let old = SystemTime::now() + LONG;
        let orphans = files.iter().filter(|(digest, changed)| **changed < old && !needed.contains(&digest.to_string()));
        digests.extend(orphans.map(|(digest, _)| digest.to_string()));
        for digest in digests {
            match self.shelf.remove(&store, Digest::parse(&digest).unwrap()).await {
                Ok(true) => self.counts.add("bytes swept"),
                Ok(false) => {}
                Err(error) => self.bytes_failed("removing bytes", error)?,
            }
        }
        Ok(())
    }

    /// The image that an operation freezes: the present content of the first name.
    pub(super) async fn frozen(&mut self) -> Outcome<Option<FrozenArtifact>> {
        let found = self.store().artifact(&ArtifactId::parse(NAMES[0]).unwrap()).await;
        let row = self.heard("an artifact", found)?.flatten();
        Ok(row.map(|row| FrozenArtifact { id: NAMES[0].to_owned(), sha256: row.sha256 }))
    }

    /// Checks that each name points at its acknowledged content, and that the bytes of all names and operations can be
    /// read.
    pub(super) async fn check_bytes(&mut self, needed: BTreeSet<String>) -> Outcome {
        let store = self.store();
        let mut digests = needed;
        for (number, name) in NAMES.iter().enumerate() {
            let found = store.artifact(&ArtifactId::parse(name).unwrap()).await;
            let Some(row) = self.heard("an artifact", found)? else { continue };
            let content =
                row.as_ref().and_then(|row| self.contents.iter().position(|content| content.sha256 == row.sha256));
            if !self.shelf.names[number].contains(&content) {
                return Err(format!("{name} is {content:?}, and may be {:?}", self.shelf.names[number]));
            }
            // The read settles the doubt: from now on any other content is an error.
            self.shelf.names[number] = BTreeSet::from([content]);
            digests.extend(row.map(|row| row.sha256));
        }
        for sha256 in digests {
            let content = self.contents.iter().find(|content| content.sha256 == sha256).unwrap();
            let read = self.shelf.artifacts.reader(content.digest).await;
            let reader = read.map_err(|error| format!("{sha256} cannot be read: {error:?}"))?;
            let read = reader.read_chunk(0, content.bytes.len()).await;
            if read.map_err(|error| format!("{sha256} cannot be read: {error:?}"))? != content.bytes {
                return Err(format!("{sha256} is not what was pushed"));
            }
        }
        Ok(())
    }

    /// Checks that after housekeeping each file has its row, and each row its file.
    pub(super) async fn check_shelf(&mut self) -> Outcome {
        self.name(true).await?;
        self.sweep().await?;
        let files = self.shelf.artifacts.stored().await.map_err(|error| format!("{error:?}"))?;
        let files: BTreeSet<String> = files.keys().map(ToString::to_string).collect();
        let rows = self.store().digests().await.map_err(|error| format!("{error:?}"))?;
        if files == rows { Ok(()) } else { Err(format!("files {files:?}, rows {rows:?}")) }
    }

    /// Folder of a backup of the database.
    pub(super) fn saved_folder(number: u32, folder: &tempfile::TempDir) -> PathBuf {
        folder.path().join(format!("saved-{number}"))
    }
}
