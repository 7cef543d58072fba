//! Collects facts of a tarball, member by member. Memory is bounded: names of boot files and a few small texts.

use super::Facts;
use super::system::{Folder, Found, Inside};
use crate::disk::is_disk;
use crate::firmware::BootMount;
use crate::tar::guard::{Guard, Known};
use crate::tar::reader::{Kind, Member};

/// Maximum size of a text that is kept, in bytes. The firmware reads no more of `config.txt`.
pub(crate) const MAX_TEXT: u64 = 64 << 10;
/// Maximum number of texts, and of names of boot files. A full set has about 500 files, most of them overlays.
pub(crate) const MAX_TEXTS: usize = 64;
pub(crate) const MAX_NAMES: usize = 4000;
/// Bytes needed to detect a disk image.
const SECTOR: usize = 512;
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
    /// Files of each boot folder. `links`: links among them, with their paths in the archive.
    folders: [Folder; 2],
    links: Vec<(usize, String, Vec<u8>)>,
    fstab: Option<String>,
    inside: Inside,
    /// True after a limit was exceeded. The boot files are then not known.
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
    /// The whole text of a file in a boot folder.
    Text(usize, String),
    Fstab,
}

impl Collector {
    /// Starts a member. The contents of the previous one are complete.
    pub(crate) fn member(&mut self, path: &[Vec<u8>], member: &Member) {
        self.settle();
        let parts: Vec<String> = path.iter().map(|part| String::from_utf8_lossy(part).into_owned()).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let Some((first, rest)) = parts.split_first() else { return };
        self.inside.top(first, rest.is_empty() && member.kind != Kind::Folder);
        self.landmark(&parts);
        let file = member.kind == Kind::File;
        if file && member.size > 0 {
            self.inside.file(&parts.join("/"), DISKS.iter().any(|ending| holds(first_of(&parts), ending)));
        }
        if let Some((folder, name)) = boot_file(&parts) {
            self.boot_member(folder, name, path, member);
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
            Wanted::Text(..) | Wanted::Fstab => usize::try_from(MAX_TEXT).unwrap_or(usize::MAX),
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
        // A link may precede its target in the archive. Only now is it known to lead to a file.
        for (folder, name, path) in std::mem::take(&mut self.links) {
            if guard.find(&path) == Some(Known::Other)
                && let Some(folder) = self.folders.get_mut(folder)
            {
                folder.names.insert(name);
            }
        }
        // Members of a linked boot folder have other paths, so this collector did not see them.
        let linked = BootMount::ALL.iter().any(|mount| guard.is_symlink(mount.folder().as_bytes()));
        let found = Found {
            folders: std::mem::take(&mut self.folders),
            fstab: self.fstab.take().unwrap_or_default(),
            known: !self.overflow && !linked,
        };
        self.facts = found.judge(&self.inside, guard);
    }

    pub(crate) fn into_facts(self) -> Facts {
        self.facts
    }

    fn boot_member(&mut self, folder: usize, name: String, path: &[Vec<u8>], member: &Member) {
        let Some(Folder { names, .. }) = self.folders.get_mut(folder) else { return };
        // A later member of the same name replaces the earlier one, as it does when unpacking.
        names.remove(&name);
        match member.kind {
            Kind::File => {
                if name.ends_with(".txt") && member.size <= MAX_TEXT {
                    self.wanted = Wanted::Text(folder, name.clone());
                }
                if member.size > 0 {
                    names.insert(name);
                }
            }
            Kind::Symlink(_) | Kind::HardLink(_) => {
                if name == "config.txt" {
                    // The text of a linked config.txt was part of another member.
                    self.overflow = true;
                }
                self.links.push((folder, name, path.join(&b'/')));
            }
            _ => {}
        }
        let names: usize = self.folders.iter().map(|folder| folder.names.len()).sum();
        let texts: usize = self.folders.iter().map(|folder| folder.texts.len()).sum();
        // Giving up means "not known", not a refusal.
        if self.links.len() + names > MAX_NAMES || texts > MAX_TEXTS {
            self.overflow = true;
            self.folders = Default::default();
            self.links.clear();
        }
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
            Wanted::Text(folder, name) => {
                if let Some(folder) = self.folders.get_mut(folder) {
                    folder.texts.insert(name, String::from_utf8_lossy(&start).into_owned());
                }
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

/// Returns the index of the boot folder and the name in it, in lower case. `None`: not a boot file, or an overlay.
fn boot_file(parts: &[&str]) -> Option<(usize, String)> {
    let (folder, rest) = match parts {
        ["boot", "firmware", rest @ ..] => (0, rest),
        ["boot", rest @ ..] => (1, rest),
        _ => return None,
    };
    let overlays = rest.iter().rev().skip(1).any(|part| part.eq_ignore_ascii_case("overlays"));
    let wanted = !rest.is_empty() && rest.len() <= MAX_DEPTH && !overlays;
    wanted.then(|| (folder, rest.join("/").to_lowercase()))
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
