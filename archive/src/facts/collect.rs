//! Collects facts of a tarball, member by member. Memory is bounded: names of boot files and a few small texts.

use std::collections::{BTreeMap, BTreeSet};

use super::Facts;
use super::system::{Folder, Found, Inside};
use crate::disk::is_disk;
use crate::firmware::BootMount;
use crate::tar::guard::{Guard, Known, Place};
use crate::tar::reader::{Kind, Member};

/// Maximum size of a text that is kept, in bytes. The firmware reads no more of `config.txt`.
pub(crate) const MAX_TEXT: u64 = 64 << 10;
/// Maximum number of texts, and of names of boot files. A full set has about 500 files, most of them overlays.
pub(crate) const MAX_TEXTS: usize = 64;
pub(crate) const MAX_NAMES: usize = 4000;
/// Bytes needed to detect a disk image.
const SECTOR: usize = 512;
/// Folder that holds both boot folders.
const BOOT: &str = "boot";
/// Maximum depth below the boot folder. The firmware's files lie higher.
pub(crate) const MAX_DEPTH: usize = 4;
/// Paths that exist in every root. Found deeper in the tarball, they show the position of the root.
const LANDMARKS: [&[&str]; 6] = [
    &["sbin", "init"],
    &["lib", "systemd", "systemd"],
    &["etc", "os-release"],
    &["etc", "fstab"],
    &["etc", "passwd"],
    &["bin", "sh"],
];
/// Name endings of disk images inside a tarball.
const DISKS: [&str; 5] = [".img", ".wic", ".sdimg", ".rpi-sdimg", ".sdcard"];
/// Name beginnings of boot files. Such a file is not a disk image despite its ending.
const NO_DISKS: [&str; 5] = ["kernel", "initr", "initramfs", "ramfs", "u-boot"];

/// Collector of facts. The caller reports each member, then its contents.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    /// Paths of the files and links below [`BOOT`], without overlays, and the small texts among them.
    paths: BTreeSet<String>,
    texts: BTreeMap<String, String>,
    fstab: Option<String>,
    inside: Inside,
    /// True after a limit was exceeded. The boot files are then not all known.
    overflow: bool,
    /// Purpose of the current member's contents, and their first bytes.
    wanted: Wanted,
    start: Vec<u8>,
    name: String,
    facts: Facts,
}

#[derive(Debug, Default)]
enum Wanted {
    #[default]
    Nothing,
    /// The first sector, to detect a disk image.
    Start,
    /// The whole text of a file below [`BOOT`], by its path.
    Text(String),
    Fstab,
}

impl Collector {
    /// Starts a member. The contents of the previous one are complete.
    pub(crate) fn member(&mut self, place: &Place, member: &Member) {
        self.settle();
        let parts: Vec<String> = place.path.iter().map(|part| String::from_utf8_lossy(part).into_owned()).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let Some((first, rest)) = parts.split_first() else { return };
        self.inside.top(first, rest.is_empty() && member.kind != Kind::Folder);
        self.landmark(&parts);
        let file = member.kind == Kind::File;
        if file && member.size > 0 {
            self.inside.file(&parts.join("/"), DISKS.iter().any(|ending| holds(first_of(&parts), ending)));
        }
        if is_boot_file(&parts) {
            self.boot_member(parts.join("/"), place, member);
        } else if parts.as_slice() == ["etc", "fstab"] && file && member.size <= MAX_TEXT {
            self.wanted = Wanted::Fstab;
        } else if file && member.size >= SECTOR_SIZE {
            self.wanted = Wanted::Start;
            self.name = parts.join("/");
        }
    }

    /// Receives contents of the current member.
    pub(crate) fn contents(&mut self, offset: u64, block: &[u8]) {
        let limit = match self.wanted {
            Wanted::Nothing => return,
            Wanted::Start => SECTOR,
            Wanted::Text(_) | Wanted::Fstab => usize::try_from(MAX_TEXT).unwrap_or(usize::MAX),
        };
        // A sparse file may skip an offset. Only contiguous bytes from the start are kept.
        if offset == u64::try_from(self.start.len()).unwrap_or(u64::MAX) && self.start.len() < limit {
            let room = limit - self.start.len();
            self.start.extend_from_slice(block.get(..room.min(block.len())).unwrap_or_default());
        }
    }

    /// Ends the archive. `guard` knows all entries by now.
    pub(crate) fn finish(&mut self, guard: &Guard) {
        self.settle();
        let mut hidden = Vec::new();
        if self.overflow {
            hidden.push(format!("/{BOOT} has more than {MAX_NAMES} files or {MAX_TEXTS} texts: remove some"));
        }
        let folders = BootMount::ALL.map(|mount| {
            // The installer follows a link at the boot folder's place, and so does this.
            let Some((path, Known::Folder)) = guard.follow(mount.folder().as_bytes()) else { return Folder::default() };
            let path = String::from_utf8_lossy(&path).into_owned();
            if path != BOOT && !path.starts_with("boot/") {
                let mount = mount.mount_point();
                hidden.push(format!(
                    "{mount} is a link to /{path}, where no boot files are looked for: make it a folder"
                ));
            }
            self.folder(&path, guard)
        });
        let found = Found { folders, fstab: self.fstab.take().unwrap_or_default(), hidden };
        self.facts = found.judge(&self.inside, guard);
    }

    pub(crate) fn into_facts(self) -> Facts {
        self.facts
    }

    /// The files of one folder, links to files among them. Only now, at the end, is a link known to lead to a file.
    fn folder(&self, folder: &str, guard: &Guard) -> Folder {
        let mut found = Folder::default();
        for path in &self.paths {
            let name = path.strip_prefix(folder).and_then(|rest| rest.strip_prefix('/'));
            let Some(name) = name.filter(|name| name.split('/').count() <= MAX_DEPTH) else { continue };
            let Some((target, Known::File)) = guard.follow(path.as_bytes()) else { continue };
            if let Some(text) = std::str::from_utf8(&target).ok().and_then(|target| self.texts.get(target)) {
                found.texts.insert(name.to_lowercase(), text.clone());
            }
            found.names.insert(name.to_lowercase());
        }
        found
    }

    fn boot_member(&mut self, path: String, place: &Place, member: &Member) {
        // A later member of the same name replaces the earlier one, as it does when unpacking.
        self.texts.remove(&path);
        if self.paths.len() >= MAX_NAMES || self.texts.len() >= MAX_TEXTS {
            self.overflow = true;
            return;
        }
        match (&member.kind, &place.target) {
            (Kind::File, _) if path.to_lowercase().ends_with(".txt") && member.size <= MAX_TEXT => {
                self.wanted = Wanted::Text(path.clone());
            }
            // The contents came with the other name. They stay, even if that name gets a new file.
            (Kind::HardLink(_), Some(target)) => {
                let target = String::from_utf8_lossy(&target.join(&b'/')).into_owned();
                if let Some(text) = self.texts.get(&target).cloned() {
                    self.texts.insert(path.clone(), text);
                }
            }
            (Kind::File | Kind::Symlink(_), _) => {}
            _ => return,
        }
        self.paths.insert(path);
    }

    /// Stores the wanted contents of the member that just ended.
    fn settle(&mut self) {
        let start = std::mem::take(&mut self.start);
        match std::mem::take(&mut self.wanted) {
            Wanted::Nothing => {}
            Wanted::Start => {
                if is_disk(&start) {
                    self.inside.disk(&self.name);
                }
            }
            // The firmware reads bytes. Invalid UTF-8 occurs in comments only.
            Wanted::Text(path) => {
                self.texts.insert(path, String::from_utf8_lossy(&start).into_owned());
            }
            Wanted::Fstab => self.fstab = Some(String::from_utf8_lossy(&start).into_owned()),
        }
    }

    fn landmark(&mut self, parts: &[&str]) {
        for landmark in LANDMARKS {
            let Some(base) = parts.strip_suffix(landmark) else { continue };
            // `usr/sbin/init` in the root itself is also a landmark.
            let base = base.strip_suffix(&["usr"]).unwrap_or(base);
            if !base.is_empty() {
                self.inside.root(&base.join("/"));
            }
        }
    }
}

/// [`SECTOR`] as the size of a member.
const SECTOR_SIZE: u64 = 512;

/// Returns true for a path that may be a boot file in one of the folders, and no overlay.
fn is_boot_file(parts: &[&str]) -> bool {
    let Some((&BOOT, rest)) = parts.split_first() else { return false };
    let overlays = rest.iter().rev().skip(1).any(|part| part.eq_ignore_ascii_case("overlays"));
    // One more for the folder /boot/firmware.
    !rest.is_empty() && rest.len() <= MAX_DEPTH + 1 && !overlays
}

fn first_of<'a>(parts: &[&'a str]) -> &'a str {
    parts.last().copied().unwrap_or_default()
}

/// Returns true if a name has this ending, optionally followed by an ending of a compression.
fn holds(name: &str, ending: &str) -> bool {
    let name = name.to_ascii_lowercase();
    if NO_DISKS.iter().any(|start| name.starts_with(start)) {
        return false;
    }
    let plain = [".gz", ".xz", ".zst", ".bz2", ".zip"].iter().find_map(|packed| name.strip_suffix(packed));
    plain.unwrap_or(&name).ends_with(ending)
}
