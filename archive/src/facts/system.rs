//! Judges a tarball: decides if its contents are a system that a Pi can start. Pure functions, no I/O.

use std::collections::{BTreeMap, BTreeSet};

use super::{Facts, INITS, best, listed};
use crate::firmware::{BootFiles, BootMount, Selection, lookup};
use crate::tar::guard::{Guard, Known};

/// Reference to the documentation, appended to every refusal.
pub(crate) const LIST: &str = "docs/images.md lists what an image must hold";

/// Contents of a tarball that hint at something other than a root.
#[derive(Debug, Default)]
pub(super) struct Inside {
    /// Names at the top level, at most 64, and the files among them.
    top: BTreeSet<String>,
    files: BTreeSet<String>,
    more: bool,
    /// Path of a root that is not at the top. The shortest path wins.
    root: Option<String>,
    /// Path of a disk image, detected by its contents. `named_disk`: detected by its name only.
    disk: Option<String>,
    named_disk: Option<String>,
    /// Path of a tarball inside the tarball.
    tarball: Option<String>,
}

impl Inside {
    pub(super) fn top(&mut self, name: &str, file: bool) {
        // A root has about twenty entries at the top. The limit bounds memory for hostile archives.
        if self.top.len() < 64 {
            self.top.insert(name.to_owned());
            if file {
                self.files.insert(name.to_owned());
            }
        } else if !self.top.contains(name) {
            self.more = true;
        }
    }

    pub(super) fn root(&mut self, base: &str) {
        // A root may contain others, for example a chroot. The outermost one counts.
        let depth = |path: &str| path.split('/').count();
        if self.root.as_ref().is_none_or(|known| depth(base) < depth(known)) {
            self.root = Some(base.to_owned());
        }
    }

    pub(super) fn file(&mut self, path: &str, named_disk: bool) {
        if named_disk {
            self.named_disk.get_or_insert_with(|| path.to_owned());
        }
        let lower = path.to_ascii_lowercase();
        if [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.zst"].iter().any(|ending| lower.ends_with(ending)) {
            self.tarball.get_or_insert_with(|| path.to_owned());
        }
    }

    pub(super) fn disk(&mut self, path: &str) {
        self.disk.get_or_insert_with(|| path.to_owned());
    }

    /// Describes the contents if they are something other than a root, with the remedy. `None`: no hint found.
    fn other(&self) -> Option<String> {
        // A root without an init is still a root. Its other contents do not matter.
        if ["etc", "usr", "sbin", "boot"].iter().any(|folder| self.top.contains(*folder)) {
            return None;
        }
        let file = |name: &str| self.files.contains(name);
        if file("oci-layout") || file("manifest.json") {
            return Some(
                "it is the output of docker save: use docker export (docker export $(docker create NAME) > root.tar), of a \
                 container that has a kernel and boot files too"
                    .to_owned(),
            );
        }
        if let Some(base) = &self.root {
            let whole = self.top.len() == 1 && !self.more;
            let place = if whole { "everything is below" } else { "the root of a system is below" };
            return Some(format!("{place} {base}/: pack with -C {base} . (tar -C {base} -cf root.tar .)"));
        }
        if let Some(disk) = self.disk.as_ref().or(self.named_disk.as_ref()) {
            return Some(format!("it holds the image of a disk: push that ({disk})"));
        }
        self.tarball.as_ref().map(|path| format!("it holds another tarball: push that ({path})"))
    }
}

/// Files of one boot folder or partition: names in lower case, relative to the folder, without overlays, and the small
/// texts among them.
#[derive(Debug, Default)]
pub(crate) struct Folder {
    pub(crate) names: BTreeSet<String>,
    pub(crate) texts: BTreeMap<String, String>,
}

impl BootFiles for Folder {
    fn has(&self, name: &str) -> bool {
        self.names.contains(&lookup(name))
    }

    fn text(&self, name: &str) -> Option<String> {
        self.texts.get(&lookup(name)).cloned()
    }
}

impl Folder {
    /// Returns the selection of the board that lacks the fewest files of this folder.
    pub(crate) fn best(&self) -> Selection {
        best(self, &self.names)
    }

    /// Converts the folder to facts without a refusal.
    pub(crate) fn facts(&self) -> Facts {
        Facts { boot_files: self.names.clone(), texts: self.read_texts(), ..Facts::default() }
    }

    /// Returns `config.txt` and its includes. Other texts are dropped: they may contain secrets.
    fn read_texts(&self) -> BTreeMap<String, String> {
        self.configuration().0
    }

    /// Returns `config.txt` and its includes, and the names of those that exist and whose text is not known.
    fn configuration(&self) -> (BTreeMap<String, String>, Vec<String>) {
        let (mut kept, mut unknown) = (BTreeMap::new(), Vec::new());
        let mut todo = vec!["config.txt".to_owned()];
        while let Some(name) = todo.pop() {
            let Some(text) = self.text(&name) else {
                unknown.extend(self.has(&name).then_some(name));
                continue;
            };
            let included = text.lines().filter_map(|line| line.trim().strip_prefix("include"));
            let included = included.filter(|rest| rest.starts_with([' ', '\t'])).map(|name| lookup(name.trim()));
            todo.extend(included.filter(|name| !kept.contains_key(name)).collect::<Vec<_>>());
            kept.insert(name, text);
        }
        (kept, unknown)
    }
}

/// Contents of the boot folders, in the order of [`BootMount::ALL`].
pub(super) struct Found {
    pub(super) folders: [Folder; 2],
    pub(super) fstab: String,
    /// Reasons for which the boot files are not all known, each with its remedy.
    pub(super) hidden: Vec<String>,
}

impl Found {
    pub(super) fn judge(self, inside: &Inside, guard: &Guard) -> Facts {
        let mut lacks = Vec::new();
        let folders: Vec<(BootMount, Folder)> = BootMount::ALL.into_iter().zip(self.folders).collect();
        let whole = |folder: &Folder| folder.best().lacks.is_empty();
        let chosen = BootMount::choose(&self.fstab, &folders, whole).map(|(_, folder)| folder);
        let selection = chosen.map(Folder::best);

        let file = |path: &str| guard.find(path.as_bytes()) == Some(Known::File);
        // `init=` on the command line overrides the kernel's list. The last one wins.
        let cmdline = chosen.zip(selection.as_ref()).and_then(|(folder, found)| folder.text(&found.cmdline));
        let named = cmdline.as_deref().unwrap_or_default().split_whitespace();
        let named = named.rev().find_map(|word| word.strip_prefix("init=")).is_some_and(file);
        if !named && !INITS.iter().any(|init| file(init)) {
            // Something that is not a root lacks everything. Naming the actual format helps more than a list.
            if let Some(other) = inside.other() {
                return Facts::refused(format!("this is no system that a Pi can start: {other}; {LIST}"));
            }
            lacks.push("an init (sbin/init, lib/systemd/systemd, or what init= names)".to_owned());
        }
        // The firmware would read these files, so without them any verdict on the others would be a guess.
        let unknown = chosen.map(|folder| folder.configuration().1).unwrap_or_default();
        let unknown = unknown.iter().map(|name| {
            format!("{name} is no file of at most 64 KiB named .txt, and no link to one below /boot: make it one")
        });
        let hidden: Vec<String> = self.hidden.into_iter().chain(unknown).collect();
        if !hidden.is_empty() {
            let lacks = if lacks.is_empty() { String::new() } else { format!("; it lacks {}", listed(&lacks)) };
            return Facts::refused(format!("its boot files cannot be read here: {}{lacks}; {LIST}", listed(&hidden)));
        }
        match &selection {
            Some(selection) => lacks.extend(selection.lacks.iter().cloned()),
            None => {
                // Without a config.txt or a kernel no folder can be chosen, so a file counts in either one.
                let any =
                    |wanted: &dyn Fn(&str) -> bool| folders.iter().any(|(_, f)| f.names.iter().any(|n| wanted(n)));
                lacks.extend(["a kernel (kernel8.img or the like)", "config.txt"].map(str::to_owned));
                if !any(&|name| name == "cmdline.txt") {
                    lacks.push("cmdline.txt".to_owned());
                }
                if !any(&|name| name.ends_with(".dtb")) {
                    lacks.push("a device tree (bcm27*.dtb)".to_owned());
                }
            }
        }
        if !lacks.is_empty() {
            return Facts::refused(format!(
                "this is no system that a Pi can start: it lacks {}; boot files were looked for in {} and {}, as the firmware \
                 does; {LIST}",
                listed(&lacks),
                BootMount::Firmware.mount_point(),
                BootMount::Boot.mount_point(),
            ));
        }
        chosen.map_or_else(Facts::default, Folder::facts)
    }
}
