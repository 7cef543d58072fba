//! Facts about an image as a system, collected while it streams by: the reasons for which no board can start it, and
//! the boot files by which a single board is judged. Push, creation, dry run, agent and installer judge by the same
//! value.

mod collect;
mod system;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ZipSummary;
use crate::disk::Needs;
use crate::firmware::{BootFiles, FAMILIES, Selection, Tree, lookup, select};

pub(crate) use collect::{Collector, MAX_DEPTH, MAX_NAMES, MAX_TEXT, MAX_TEXTS};
pub(crate) use system::{Folder, LIST};

/// Paths of the first process: the kernel's own choices, and replacements that images use.
pub const INITS: [&str; 7] =
    ["sbin/init", "usr/sbin/init", "lib/systemd/systemd", "usr/lib/systemd/systemd", "etc/init", "bin/init", "init"];

/// Result of judging an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Reason for which no board can start the image, with the remedy. `None`: no such reason is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<String>,
    /// Names of boot files in lower case, relative to the boot partition, without overlays. Empty: not known.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub boot_files: BTreeSet<String>,
    /// Texts of `config.txt` and its includes, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub texts: BTreeMap<String, String>,
    /// Room that the file systems of a disk image need. Zeros: not a disk image, or stored by a controller that did not
    /// record it.
    #[serde(default)]
    pub needs: Needs,
}

impl BootFiles for Facts {
    fn has(&self, name: &str) -> bool {
        self.boot_files.contains(&lookup(name))
    }

    fn text(&self, name: &str) -> Option<String> {
        self.texts.get(&lookup(name)).cloned()
    }
}

impl Facts {
    /// Creates facts that consist of a refusal only.
    pub fn refused(refusal: impl Into<String>) -> Self {
        Self { refusal: Some(refusal.into()), ..Self::default() }
    }

    /// Collects the facts from boot files in a zip.
    pub fn of_zip(zip: &ZipSummary) -> Self {
        let files = zip.files.iter().filter(|file| file.size > 0);
        Self {
            refusal: None,
            boot_files: files.map(|file| file.name.to_lowercase()).collect(),
            texts: zip.texts.clone(),
            needs: Needs::default(),
        }
    }

    /// Judges the image for one board. `family`: name of the board's family; `device_tree`: the board's own file, if
    /// known.
    ///
    /// # Errors
    /// Returns all missing files in one sentence.
    pub fn judge(&self, family: &str, device_tree: Option<&str>) -> Result<(), String> {
        if let Some(refusal) = &self.refusal {
            return Err(refusal.clone());
        }
        // Unknown is no refusal: a wrong refusal cannot be overruled, and the installer checks the real files.
        if self.boot_files.is_empty() || family.is_empty() {
            return Ok(());
        }
        let lacks = select(self, family, device_tree.map_or(Tree::Unknown, Tree::Named), false).lacks;
        if lacks.is_empty() {
            return Ok(());
        }
        Err(format!("the image cannot start this board ({family}): it lacks {}", listed(&lacks)))
    }
}

/// Returns the selection of the board that lacks the fewest files of this set.
pub(crate) fn best(files: &dyn BootFiles, names: &BTreeSet<String>) -> Selection {
    let trees = names.iter().filter_map(|name| {
        let (folder, file) = name.rsplit_once('/').unwrap_or(("", name));
        (file.ends_with(".dtb") && !folder.split('/').any(|part| part == "overlays")).then_some(file)
    });
    let named = trees.flat_map(|tree| families(tree).into_iter().map(move |family| (family, Tree::Named(tree))));
    let every = FAMILIES.into_iter().map(|family| (family, Tree::Missing));
    let selections = named.chain(every).map(|(family, tree)| select(files, family, tree, false));
    selections.min_by_key(|selection| selection.lacks.len()).unwrap_or_default()
}

/// Returns the families that take a device tree, by the processor in its name. All families if the name is unknown.
fn families(tree: &str) -> Vec<&'static str> {
    let known: &[(&str, &[&'static str])] = &[
        ("bcm2708", &["pi1"]),
        ("bcm2835", &["pi1"]),
        ("bcm2709", &["pi2"]),
        ("bcm2836", &["pi2"]),
        ("bcm2710-rpi-2", &["pi2"]),
        ("bcm2710", &["pi3"]),
        ("bcm2837", &["pi3", "pi2"]),
        ("bcm2711", &["pi4"]),
        ("bcm2712", &["pi5"]),
    ];
    let found = known.iter().find(|(start, _)| tree.starts_with(start));
    found.map_or_else(|| FAMILIES.to_vec(), |(_, families)| families.to_vec())
}

/// `a`, `a and b`, `a, b and c`.
pub(crate) fn listed(items: &[String]) -> String {
    match items {
        [] => String::new(),
        [one] => one.clone(),
        [rest @ .., last] => format!("{} and {last}", rest.join(", ")),
    }
}

#[cfg(test)]
mod tests;
