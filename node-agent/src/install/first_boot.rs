//! Files that an operator put on the recovery partition for the first boot of every system that is installed: for all
//! nodes, or for those with a label. They stay there for the next installation. Their contents may be secret, so they
//! are never logged.

use std::collections::BTreeMap;
use std::io::Result;
use std::path::{Path, PathBuf};
use std::time::Duration;

use marco_archive::first_boot::{FOLDER, NAMES, label};

use super::cloud_init::{self, USER_DATA};
use super::{InstallError, Work, blocking, boot_files, open};
use crate::job::Labels;
use crate::system::Target;
use crate::system::rooted::{Kind, Rooted};

/// On the recovery partition: files of any name for the system's boot partition.
const ANY_NAME: &str = "marco/boot";
/// Files from which cloud-init reads its data.
const CLOUD_INIT: [&str; 3] = ["meta-data", "network-config", "user-data"];

/// Longest wait for the labels: a node that can download has, or gets, a session as well.
const LABELS: Duration = Duration::from_secs(120);

/// Files for a system's boot partition.
#[derive(Default)]
pub(super) struct Given(BTreeMap<String, File>);

struct File {
    /// Path on the recovery partition.
    from: PathBuf,
    bytes: Vec<u8>,
}

/// Paths only: the contents are passwords and keys.
impl std::fmt::Debug for Given {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.values().map(|file| &file.from)).finish()
    }
}

impl Work<'_> {
    /// Waits until a controller has said the node's labels, but only if the card has files that depend on them.
    pub(super) async fn labels_are_known(&self) -> std::result::Result<(), InstallError> {
        let recovery = self.card.recovery.clone();
        let looked = move || depends_on_labels(&recovery).map_err(InstallError::disk("read the files given"));
        if !blocking(looked).await? {
            return Ok(());
        }
        let mut labels = self.context.labels.clone();
        match tokio::time::timeout(LABELS, labels.wait_for(Option::is_some)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(InstallError {
                reason: "LABELS_UNKNOWN",
                message:
                    "the card has files for nodes with certain labels, and no controller has said which this node has"
                        .into(),
                // A controller that is away comes back.
                retryable: true,
            }),
        }
    }

    /// Reads the card's files for the first boot of this node.
    pub(super) async fn given(&self) -> std::result::Result<Given, InstallError> {
        let (recovery, labels) = (self.card.recovery.clone(), self.context.labels.borrow().clone().unwrap_or_default());
        blocking(move || Given::find(&recovery, &labels).map_err(InstallError::disk("read the files given"))).await
    }

    /// Gives the boot partition, which is still empty, the label by which cloud-init of the new root looks for its
    /// data, if there will be any. `bring` says whether the boot files bring some; `None`: they are still in the root,
    /// which is searched.
    pub(super) async fn label_boot(
        &self,
        target: &Target,
        given: &Given,
        bring: Option<bool>,
    ) -> std::result::Result<(), InstallError> {
        let (at, board, has) = (target.clone(), self.board.clone(), given.has(USER_DATA));
        let label = blocking(move || {
            let root = open(&at)?.0;
            let brought = match bring {
                Some(brought) => brought,
                None => root.is_there(Path::new(boot_files::find(&root, &board)?.folder()).join(USER_DATA)),
            };
            if !has && !brought {
                return Ok(None);
            }
            cloud_init::label(&root).map_err(InstallError::disk("read the configuration of cloud-init"))
        });
        // A label is given by making the file system again, so this comes before any file.
        let Some(label) = label.await? else { return Ok(()) };
        tracing::info!(label, "label of the boot partition, for cloud-init");
        Ok(self.system.label_boot(target, &label).await?)
    }
}

/// Copies the files for the first boot to the boot partition.
pub(super) fn give_on(
    given: &Given,
    root: &Rooted,
    boot: &Rooted,
    node: &str,
) -> std::result::Result<(), InstallError> {
    given.give_on(boot).map_err(InstallError::disk("copy the files given"))?;
    if cloud_init::is_there(root) {
        cloud_init::complete(boot, node).map_err(InstallError::disk("write meta-data"))?;
    }
    Ok(())
}

/// Returns true if there are files for nodes with certain labels, so that those of this node must be known.
fn depends_on_labels(recovery: &Path) -> Result<bool> {
    let entries = Rooted::open(recovery)?.list(FOLDER)?;
    Ok(entries.iter().any(|(name, kind)| *kind == Kind::Folder && name.to_str().and_then(label).is_some()))
}

impl Given {
    /// Collects the files for a node with these labels. Of two files with one name the more special one counts: one of
    /// the root gives way to one of `marco/boot`, that to one of `marco/first-boot`, and that to one of a label's
    /// folder there.
    fn find(recovery: &Path, labels: &Labels) -> Result<Self> {
        let recovery = Rooted::open(recovery)?;
        let mut given = Self::default();
        // From the least special place to the most special one: a later file replaces one of its name.
        for name in NAMES.into_iter().filter(|name| recovery.is_there(name)) {
            given.take(&recovery, Path::new(""), name)?;
        }
        for (name, kind) in recovery.list(ANY_NAME)? {
            if let (Some(name), Kind::File) = (name.to_str(), kind) {
                given.take(&recovery, Path::new(ANY_NAME), name)?;
            }
        }
        given.take_known(&recovery, Path::new(FOLDER))?;
        // `list` is sorted, so of two folders the same one counts each time.
        let mut of_labels: BTreeMap<String, PathBuf> = BTreeMap::new();
        for (folder, _) in recovery.list(FOLDER)?.into_iter().filter(|(_, kind)| *kind == Kind::Folder) {
            let Some((key, value)) = folder.to_str().and_then(label) else {
                tracing::warn!(folder = %folder.display(), "in {FOLDER}, and means no label: passed over");
                continue;
            };
            if labels.get(key).is_none_or(|has| has != value) {
                continue;
            }
            let folder = Path::new(FOLDER).join(&folder);
            for name in given.take_known(&recovery, &folder)? {
                if let Some(before) = of_labels.insert(name.clone(), folder.clone()) {
                    let (before, after) = (before.display(), folder.display());
                    tracing::warn!(file = name, %before, %after, "two labels of this node have a file: the latter counts");
                }
            }
        }
        Ok(given)
    }

    /// Keeps only the files that cloud-init reads: a system that is not new has no use for the rest.
    pub(super) fn of_cloud_init(mut self) -> Self {
        self.0.retain(|name, _| CLOUD_INIT.contains(&name.as_str()));
        self
    }

    /// Returns true if there is a file of this name.
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Writes the files to the boot partition, for its owner alone to read.
    fn give_on(&self, boot: &Rooted) -> Result<()> {
        for (name, file) in &self.0 {
            boot.write(Path::new(name), &file.bytes, 0o700)?;
        }
        tracing::info!(given = ?self, "files for the first boot");
        Ok(())
    }

    /// Takes the files of a folder that have names of the first boot. Returns these names.
    fn take_known(&mut self, recovery: &Rooted, folder: &Path) -> Result<Vec<String>> {
        let mut taken = Vec::new();
        for (name, kind) in recovery.list(folder)? {
            match name.to_str() {
                Some(known) if kind == Kind::File && NAMES.contains(&known) => {
                    self.take(recovery, folder, known)?;
                    taken.push(known.to_owned());
                }
                _ if kind == Kind::File => {
                    tracing::warn!(file = %folder.join(&name).display(), "no file of a first boot: passed over");
                }
                _ => {}
            }
        }
        Ok(taken)
    }

    fn take(&mut self, recovery: &Rooted, folder: &Path, name: &str) -> Result<()> {
        let from = folder.join(name);
        let bytes = recovery.read(&from)?.unwrap_or_default();
        self.0.insert(name.to_owned(), File { from, bytes });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::{Given, depends_on_labels};
    use crate::job::Labels;
    use crate::system::rooted::Rooted;

    fn card(files: &[(&str, &str)]) -> tempfile::TempDir {
        let card = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = card.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        card
    }

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    /// Names and contents of the files that a node with these labels gets.
    fn given(card: &Path, labels: &Labels) -> Vec<(String, String)> {
        let boot = tempfile::tempdir().unwrap();
        Given::find(card, labels).unwrap().give_on(&Rooted::open(boot.path()).unwrap()).unwrap();
        let mut all: Vec<_> = fs::read_dir(boot.path()).unwrap().map(|entry| entry.unwrap()).collect();
        all.sort_by_key(fs::DirEntry::file_name);
        let text = |entry: &fs::DirEntry| fs::read_to_string(entry.path()).unwrap();
        all.iter().map(|entry| (entry.file_name().into_string().unwrap(), text(entry))).collect()
    }

    fn pairs(wanted: &[(&str, &str)]) -> Vec<(String, String)> {
        wanted.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn what_is_for_the_first_boot_is_given_on_and_stays() {
        let card = card(&[
            ("userconf.txt", "pi:hash"),
            ("ssh", ""),
            ("config.txt", "ours"),
            ("marco/boot/anything.dtbo", "a"),
            ("marco/boot/ssh", "s"),
            ("marco/boot/folder/x", "no"),
        ]);
        let found = given(card.path(), &Labels::new());
        assert_eq!(found, pairs(&[("anything.dtbo", "a"), ("ssh", "s"), ("userconf.txt", "pi:hash")]));
        assert!(card.path().join("userconf.txt").exists() && card.path().join("marco/boot/ssh").exists());
        assert!(!depends_on_labels(card.path()).unwrap());
    }

    #[test]
    fn the_more_special_file_counts_and_other_labels_files_are_not_given() {
        let card = card(&[
            ("user-data", "root"),
            ("meta-data", "root"),
            ("ssh", "root"),
            ("custom.toml", "root"),
            ("marco/boot/meta-data", "any name"),
            ("marco/boot/ssh", "any name"),
            ("marco/first-boot/ssh", "everybody"),
            ("marco/first-boot/user-data", "everybody"),
            ("marco/first-boot/kernel8.img", "no file of a first boot"),
            ("marco/first-boot/room=a1/user-data", "room a1"),
            ("marco/first-boot/room=a1/config.txt", "no file of a first boot"),
            ("marco/first-boot/room=a2/user-data", "room a2"),
            ("marco/first-boot/role=kiosk/user-data", "kiosk"),
            ("marco/first-boot/role=kiosk/network-config", "kiosk"),
            ("marco/first-boot/no label/user-data", "never"),
        ]);
        assert!(depends_on_labels(card.path()).unwrap());
        let rest = [("custom.toml", "root"), ("meta-data", "any name")];
        let with = |more: &[(&str, &str)]| pairs(&[&rest[..], more].concat());
        for (of_node, user_data) in [
            (labels(&[]), "everybody"),
            (labels(&[("room", "a1"), ("role", "printer")]), "room a1"),
            (labels(&[("room", "a2")]), "room a2"),
            (labels(&[("room", "a10")]), "everybody"),
        ] {
            let found = given(card.path(), &of_node);
            assert_eq!(found, with(&[("ssh", "everybody"), ("user-data", user_data)]), "{of_node:?}");
        }
        // `role=kiosk` comes before `room=a2`.
        let both = given(card.path(), &labels(&[("room", "a2"), ("role", "kiosk")]));
        assert_eq!(both, with(&[("network-config", "kiosk"), ("ssh", "everybody"), ("user-data", "room a2")]));
    }

    #[test]
    fn nothing_that_is_said_of_the_files_says_what_is_in_them() {
        let card = card(&[("marco/first-boot/room=a1/user-data", "password: s3cret")]);
        let found = Given::find(card.path(), &labels(&[("room", "a1")])).unwrap();
        assert_eq!(format!("{found:?}"), "[\"marco/first-boot/room=a1/user-data\"]");
    }
}
