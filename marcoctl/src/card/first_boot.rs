//! Files for the first boot of the card's systems, read from a local folder.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use marco_archive::first_boot::{FOLDER, NAMES, label};

use super::contents::Contents;

/// Maximum size of a file in bytes. The installer reads a file into memory.
const LARGEST: u64 = 16 << 20;

impl Contents {
    /// Adds the files of a folder: those directly in it, and those in subfolders that are labels.
    ///
    /// # Errors
    /// Returns an error for any other file or folder. No system would ever read it.
    pub(crate) fn first_boot(&mut self, folder: &Path) -> Result<()> {
        // FAT ignores case, so two such folders would become one.
        let mut folders = BTreeSet::new();
        let mut found = 0;
        for (name, path) in entries(folder)? {
            if !path.is_dir() {
                self.known(FOLDER, &name, &path)?;
                found += 1;
                continue;
            }
            if label(&name).is_none() {
                bail!(
                    "{} is no label: folders are called KEY=VALUE, of letters, digits, dots, underscores and hyphens, \
                     with no dot at the end",
                    path.display()
                );
            }
            if !folders.insert(name.to_lowercase()) {
                bail!(
                    "{} differs from another folder only by its case, which a card cannot tell apart",
                    path.display()
                );
            }
            for (inner, path) in entries(&path)? {
                self.known(&format!("{FOLDER}/{name}"), &inner, &path)?;
                found += 1;
            }
        }
        // An empty folder is probably the wrong folder.
        if found == 0 {
            bail!("there is no file for a first boot in {}: {}", folder.display(), NAMES.join(", "));
        }
        Ok(())
    }

    fn known(&mut self, folder: &str, name: &str, path: &Path) -> Result<()> {
        // A misspelt name would show only on the Pi, as a system without its user.
        if !NAMES.contains(&name) {
            bail!("no system reads {} when it first boots; known are {}", path.display(), NAMES.join(", "));
        }
        let named = || format!("cannot read {}", path.display());
        let found = std::fs::metadata(path).with_context(named)?;
        if !found.is_file() {
            bail!("{} is no file", path.display());
        }
        if found.len() > LARGEST {
            bail!("{} has {} bytes, and may have {LARGEST}", path.display(), found.len());
        }
        self.put_file(&format!("{folder}/{name}"), path)
    }
}

/// Lists a folder, sorted by name.
fn entries(folder: &Path) -> Result<Vec<(String, std::path::PathBuf)>> {
    let named = || format!("cannot read {}", folder.display());
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(named)? {
        let path = entry.with_context(named)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
        all.push((name.with_context(|| format!("{} has no name that a card can have", path.display()))?, path));
    }
    all.sort();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::Contents;

    /// Adds a folder with these files to empty contents.
    fn with(files: &[&str]) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        for name in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        let mut contents = Contents::default();
        contents.first_boot(folder.path()).map_err(|error| format!("{error:#}"))?;
        Ok(contents.files().map(|(name, _)| name.to_owned()).collect())
    }

    #[test]
    fn a_folder_is_taken_as_it_is_when_everything_in_it_means_something() {
        let files = ["userconf.txt", "room=a1/user-data", "room=a2/user-data"];
        let wanted = files.map(|name| format!("marco/first-boot/{name}"));
        let mut found = with(&files).unwrap();
        found.sort_by_key(|name| wanted.iter().position(|wanted| wanted == name));
        assert_eq!(found, wanted);
    }

    #[test]
    fn what_no_system_would_see_is_refused_with_what_one_sees() {
        for (files, why) in [
            (&[][..], "there is no file"),
            (&["user_data"], "known are custom.toml, meta-data, network-config, ssh, ssh.txt, user-data, userconf.txt"),
            (&["room=a1/config.txt"], "known are custom.toml"),
            (&["room=a1/user-data/x"], "is no file"),
            (&["room/user-data"], "KEY=VALUE"),
            (&["room=a1./user-data"], "KEY=VALUE"),
            (&["room=a1/user-data", "room=A1/user-data"], "only by its case"),
        ] {
            let error = with(files).unwrap_err();
            assert!(error.contains(why), "{files:?}: {error}");
        }
    }
}
