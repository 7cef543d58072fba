//! Identifies the boot files on a FAT partition: compares the digests of all files with those of the sets that were
//! pushed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::image::sha256;
use crate::tree::list;

/// Files that the installer adapts to each card.
const FITTED: [&str; 1] = ["cmdline.txt"];
/// Files that the installer adds: the name of the installed set.
const ADDED: [&str; 1] = ["marco-release"];

/// The files of a boot set: path in lower case, and SHA-256.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Name of the set, for messages.
    pub name: String,
    files: BTreeMap<String, String>,
}

impl Manifest {
    /// Reads an installer's zip.
    pub fn of_zip(name: &str, zip: &Path) -> Result<Self> {
        let mut archive = zip::ZipArchive::new(File::open(zip).with_context(|| format!("opening {}", zip.display()))?)?;
        let mut files = BTreeMap::new();
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index)?;
            if entry.is_file() {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes)?;
                // FAT ignores case, so names are compared in lower case.
                files.insert(entry.name()?.to_lowercase(), sha256(&bytes));
            }
        }
        Ok(Self { name: name.to_owned(), files })
    }

    /// Reads the files in a folder. Names are lower-cased, because FAT ignores case.
    pub fn of_folder(name: &str, folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for path in list(folder)? {
            if folder.join(&path).is_file() {
                files.insert(path.to_string_lossy().to_lowercase(), sha256(&std::fs::read(folder.join(&path))?));
            }
        }
        Ok(Self { name: name.to_owned(), files })
    }

    /// Removes the files that differ from card to card.
    pub fn without_own(mut self) -> Self {
        self.files.retain(|name, _| !FITTED.contains(&name.as_str()) && !ADDED.contains(&name.as_str()));
        self
    }

    /// Lists the files that are missing, differ, or do not belong to the wanted set.
    pub fn differs_from(&self, wanted: &Self) -> Vec<String> {
        let lacking = wanted.files.iter().filter_map(|(name, digest)| match self.files.get(name) {
            None => Some(format!("{name} is missing")),
            Some(found) if found != digest => Some(format!("{name} is another")),
            Some(_) => None,
        });
        // A file that is left over from another set would make the boot a mix of both.
        let more = self.files.keys().filter(|name| !wanted.files.contains_key(*name));
        lacking.chain(more.map(|name| format!("{name} is too much"))).collect()
    }

    /// The name of the set that this is exactly.
    ///
    /// # Errors
    /// Returns an error with the differences to each set if it is none of them.
    pub fn which<'a>(&self, sets: &'a [Self]) -> Result<&'a str> {
        let found = sets.iter().find(|set| self.differs_from(set).is_empty());
        let told = || {
            let each = sets.iter().map(|set| format!("not {}: {}", set.name, self.differs_from(set).join(", ")));
            format!("{} holds no whole set: {}", self.name, each.collect::<Vec<_>>().join("; "))
        };
        found.map(|set| set.name.as_str()).with_context(told)
    }
}

#[cfg(test)]
mod tests {
    use super::Manifest;
    use std::fs;

    #[test]
    fn a_set_is_told_from_its_neighbours_and_from_mixes() {
        let dir = tempfile::tempdir().unwrap();
        let set = |name: &str, files: &[(&str, &str)]| {
            let folder = dir.path().join(name);
            fs::create_dir_all(&folder).unwrap();
            for (file, text) in files {
                fs::write(folder.join(file), text).unwrap();
            }
            Manifest::of_folder(name, &folder).unwrap()
        };
        let sets = [
            set("one", &[("kernel.img", "1"), ("initramfs", "1"), ("cmdline.txt", "1")]).without_own(),
            set("two", &[("kernel.img", "2"), ("initramfs", "2"), ("cmdline.txt", "2")]).without_own(),
        ];
        let fitted =
            set("fitted", &[("KERNEL.IMG", "2"), ("initramfs", "2"), ("cmdline.txt", "x"), ("marco-release", "")]);
        assert_eq!(fitted.without_own().which(&sets).unwrap(), "two");
        for (files, why) in [
            ([("kernel.img", "1"), ("initramfs", "2")].as_slice(), "initramfs is another"),
            (&[("kernel.img", "1")], "initramfs is missing"),
            (&[("kernel.img", "1"), ("initramfs", "1"), ("old.dtb", "0")], "old.dtb is too much"),
        ] {
            let error = set(&format!("mix of {}", files.len()), files).which(&sets).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
            fs::remove_dir_all(dir.path().join(format!("mix of {}", files.len()))).unwrap();
        }
    }
}
